import pytest
import torch

from mmkd.losses.dmkd import DMKDLoss


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 4, 6, 5).unbind()


def identity(block):
    """Make a generation hand its input through, positive or negative."""
    first, _, second = block
    block[1] = torch.nn.Identity()
    for conv in (first, second):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)


def plain(share=0.5, **settings):
    """Identity in both branches; the spatial one has this share."""
    loss = DMKDLoss(4, **settings)
    identity(loss.spatial_generation)
    identity(loss.channel_generation)
    odds = torch.tensor(share / (1 - share))
    loss.fusion.data = torch.stack([odds.log(), torch.tensor(0.0)])
    return loss


def literal_mask(strength, count):
    """Zero at the ``count`` largest of a list."""
    hidden = sorted(range(len(strength)), key=lambda i: -strength[i])[:count]
    return torch.tensor(
        [0.0 if i in hidden else 1.0 for i in range(len(strength))]
    )


def made_by(block, seen):
    first, _, second = block
    hidden = torch.conv2d(seen, first.weight, first.bias, padding=1)
    return torch.conv2d(
        hidden.clamp(min=0), second.weight, second.bias, padding=1
    )


def test_equals_a_literal_loop(maps):
    student, teacher = maps
    loss = DMKDLoss(4, loss_weight=0.5, spatial_ratio=0.4, channel_ratio=0.25)
    loss.fusion.data = torch.tensor([0.3, -0.4])
    a, b = (torch.tensor(one).exp() for one in (0.3, -0.4))
    total = 0.0
    for s, t in zip(student, teacher):
        cells = literal_mask(
            [
                sum(abs(t[c, y, x].item()) for c in range(4))
                for y in range(6)
                for x in range(5)
            ],
            12,
        ).view(6, 5)
        channels = literal_mask(
            [
                sum(abs(t[c, y, x].item()) for y in range(6) for x in range(5))
                for c in range(4)
            ],
            1,
        )
        one = made_by(loss.spatial_generation, (cells * s)[None])
        other = made_by(
            loss.channel_generation, (channels[:, None, None] * s)[None]
        )
        fused = (a * one + b * other) / (a + b)
        total = total + (fused[0] - t).square().sum()
    torch.testing.assert_close(loss(student, teacher), 0.5 * total / 2)


def test_without_masks_and_with_identity_it_is_the_sum_over_images(maps):
    student, teacher = maps
    loss = plain(0.8, loss_weight=0.5, spatial_ratio=0.0, channel_ratio=0.0)
    expected = 0.5 * (student - teacher).square().sum() / 2
    torch.testing.assert_close(loss(student, teacher), expected)


def test_with_everything_hidden_the_student_does_not_matter(maps):
    student, teacher = maps
    student.requires_grad_()
    loss = plain(loss_weight=1.0, spatial_ratio=1.0, channel_ratio=1.0)
    value = loss(student, teacher)
    torch.testing.assert_close(value, teacher.square().sum() / 2)
    value.backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize('share', [0.25, 0.5])
def test_the_branches_have_shares_that_sum_to_one(maps, share):
    student, teacher = maps
    one = plain(share, loss_weight=1.0, spatial_ratio=1, channel_ratio=0)
    torch.testing.assert_close(
        one(student, teacher),
        ((1 - share) * student - teacher).square().sum() / 2,
    )
    other = plain(share, loss_weight=1.0, spatial_ratio=0, channel_ratio=1)
    torch.testing.assert_close(
        other(student, teacher),
        (share * student - teacher).square().sum() / 2,
    )


def test_both_branches_start_with_a_half(maps):
    student, teacher = maps
    loss = DMKDLoss(4, loss_weight=1.0, spatial_ratio=0, channel_ratio=1)
    identity(loss.spatial_generation)
    identity(loss.channel_generation)
    torch.testing.assert_close(
        loss(student, teacher), (student / 2 - teacher).square().sum() / 2
    )


def test_cells_and_channels_are_hidden_where_the_teacher_is_strong():
    student = torch.ones(2, 4, 6, 5, requires_grad=True)
    teacher = torch.zeros(2, 4, 6, 5)
    teacher[0, 2, 1, 4] = -9.0  # strength has no sign
    teacher[1, 3, 0, 0] = 9.0
    loss = plain(spatial_ratio=1 / 30, channel_ratio=1.0)
    loss(student, teacher).backward()
    untouched = (student.grad == 0).all(1)
    expected = torch.zeros(2, 6, 5, dtype=torch.bool)
    expected[0, 1, 4] = expected[1, 0, 0] = True
    assert torch.equal(untouched, expected)
    student.grad = None
    loss = plain(spatial_ratio=1.0, channel_ratio=0.25)
    loss(student, teacher).backward()
    untouched = (student.grad == 0).all(3).all(2)
    assert untouched.nonzero().tolist() == [[0, 2], [1, 3]]


def test_a_steady_channel_is_stronger_than_one_with_a_peak():
    student = torch.ones(1, 4, 6, 5, requires_grad=True)
    teacher = torch.zeros(1, 4, 6, 5)
    teacher[:, 0, 2, 2] = 9.0
    teacher[:, 1] = -2.0
    loss = plain(spatial_ratio=1.0, channel_ratio=0.25)
    loss(student, teacher).backward()
    untouched = (student.grad == 0).flatten(2).all(2)
    assert untouched.tolist() == [[False, True, False, False]]


def test_nothing_is_random(maps):
    loss = DMKDLoss(4)
    assert loss(*maps) == loss(*maps)


def test_gradient_is_that_of_finite_differences(maps):
    student, teacher = (one.double() for one in maps)
    loss = DMKDLoss(4, loss_weight=0.1).double()
    assert torch.autograd.gradcheck(
        lambda one: loss(one, teacher), student.requires_grad_()
    )


def test_branches_and_their_shares_learn(maps):
    loss = DMKDLoss(4)
    loss(*maps).backward()
    assert all(one.grad.abs().sum() > 0 for one in loss.parameters())


def test_half_precision_is_not_used_under_autocast(maps):
    loss = DMKDLoss(4, loss_weight=1.0)
    value = loss(*maps)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(loss(*maps), value)


@pytest.mark.parametrize('name', ['spatial_ratio', 'channel_ratio'])
def test_an_impossible_ratio_is_refused(name):
    with pytest.raises(ValueError, match=f'{name} between 0 and 1'):
        DMKDLoss(4, **{name: 65})


def test_other_channels_than_built_for_are_named(maps):
    with pytest.raises(ValueError, match='Set its channels to 4'):
        DMKDLoss(3)(*maps)


def test_channel_mismatch_names_the_fix(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='in_channels=2, out_channels=4'):
        DMKDLoss(4)(student[:, :2], teacher)

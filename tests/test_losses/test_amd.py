import pytest
import torch

from mmkd.losses.amd import AMDLoss, SqueezeExcitation


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


def plain(**settings):
    """A loss that generates the identity and halves every channel."""
    loss = AMDLoss(4, **settings)
    identity(loss.generation)
    torch.nn.init.zeros_(loss.excitation.excite.weight)
    torch.nn.init.zeros_(loss.excitation.excite.bias)
    return loss


def literal_mask(strength, count):
    """Strength of one image as a list; zero at the ``count`` largest."""
    hidden = sorted(range(len(strength)), key=lambda i: -strength[i])[:count]
    return [0.0 if i in hidden else 1.0 for i in range(len(strength))]


def test_equals_a_literal_loop(maps):
    student, teacher = maps
    loss = AMDLoss(4, loss_weight=0.5, mask_ratio=0.4, reduction=2)
    squeeze, excite = loss.excitation.squeeze, loss.excitation.excite
    first, _, second = loss.generation
    total = 0.0
    for s, t in zip(student, teacher):
        strength = [
            sum(abs(t[c, y, x].item()) for c in range(4))
            for y in range(6)
            for x in range(5)
        ]
        mask = torch.tensor(literal_mask(strength, 12)).view(6, 5)
        inner = (squeeze.weight @ s.mean((1, 2)) + squeeze.bias).clamp(min=0)
        factor = 1 / (1 + (-(excite.weight @ inner + excite.bias)).exp())
        seen = torch.stack([mask * f * one for f, one in zip(factor, s)])[None]
        hidden = torch.conv2d(seen, first.weight, first.bias, padding=1)
        made = torch.conv2d(
            hidden.clamp(min=0), second.weight, second.bias, padding=1
        )
        total = total + (made[0] - t).square().sum()
    torch.testing.assert_close(loss(student, teacher), 0.5 * total / 2)


def test_without_a_mask_and_with_identity_it_is_the_sum_over_images(maps):
    student, teacher = maps
    loss = plain(loss_weight=0.5, mask_ratio=0.0)
    expected = 0.5 * (student / 2 - teacher).square().sum() / 2
    torch.testing.assert_close(loss(student, teacher), expected)


def test_with_everything_hidden_the_student_does_not_matter(maps):
    student, teacher = maps
    student.requires_grad_()
    value = plain(loss_weight=1.0, mask_ratio=1.0)(student, teacher)
    torch.testing.assert_close(value, teacher.square().sum() / 2)
    value.backward()
    assert (student.grad == 0).all()


def test_cells_are_hidden_where_the_teacher_is_strong(maps):
    student, _ = maps
    student = student.requires_grad_()
    teacher = torch.zeros(2, 4, 6, 5)
    teacher[0, 1, 2, 3] = -8.0  # strength has no sign
    teacher[1, :, 0, 0] = 1.0
    plain(mask_ratio=1 / 30)(student, teacher).backward()
    untouched = (student.grad == 0).all(1)
    expected = torch.zeros(2, 6, 5, dtype=torch.bool)
    expected[0, 2, 3] = expected[1, 0, 0] = True
    assert torch.equal(untouched, expected)


def test_the_student_s_own_strength_hides_nothing(maps):
    student, teacher = maps
    loss = plain(loss_weight=1.0, mask_ratio=0.5)
    value = loss(student, teacher)
    strong = student.clone()
    strong[:, :, 0, 0] *= 100
    strength = teacher.abs().mean(1).flatten(1)
    seen = strength[:, 0] <= strength.median(1).values
    expected = value
    for n in range(2):
        if seen[n]:
            before = student[n, :, 0, 0] / 2 - teacher[n, :, 0, 0]
            after = strong[n, :, 0, 0] / 2 - teacher[n, :, 0, 0]
            expected = expected + (after**2 - before**2).sum() / 2
    torch.testing.assert_close(loss(strong, teacher), expected)


def test_values_that_a_softmax_would_round_to_zero_keep_their_order():
    student = torch.ones(1, 4, 2, 2)
    teacher = torch.tensor([300.0, 200, 100, 0]).view(1, 1, 2, 2)
    teacher = teacher.expand(1, 4, 2, 2)
    student.requires_grad_()
    plain(mask_ratio=0.5)(student, teacher).backward()
    assert (student.grad[0, 0] == 0).tolist() == [[True, True], [False, False]]


def test_excitation_scales_channels_by_what_all_of_them_hold(maps):
    feature = maps[0]
    block = SqueezeExcitation(4, reduction=4)
    assert block.squeeze.weight.shape == (1, 4)
    torch.nn.init.ones_(block.squeeze.weight)
    torch.nn.init.zeros_(block.squeeze.bias)
    torch.nn.init.zeros_(block.excite.bias)
    block.excite.weight.data = torch.tensor([[0.0], [1.0], [-1.0], [2.0]])
    whole = feature.mean((2, 3)).sum(1).clamp(min=0)
    for n in range(2):
        for c, slope in enumerate((0, 1, -1, 2)):
            factor = torch.sigmoid(slope * whole[n])
            torch.testing.assert_close(
                block(feature)[n, c], factor * feature[n, c]
            )


def test_a_wide_reduction_leaves_one_channel_in_between():
    assert AMDLoss(8).excitation.squeeze.out_features == 1
    assert AMDLoss(64).excitation.squeeze.out_features == 4


def test_nothing_is_random(maps):
    loss = AMDLoss(4)
    assert loss(*maps) == loss(*maps)


def test_gradient_is_that_of_finite_differences(maps):
    student, teacher = (one.double() for one in maps)
    loss = AMDLoss(4, loss_weight=0.1).double()
    assert torch.autograd.gradcheck(
        lambda one: loss(one, teacher), student.requires_grad_()
    )


def test_excitation_and_generation_learn(maps):
    loss = AMDLoss(4, reduction=1)
    loss(*maps).backward()
    assert all(one.grad.abs().sum() > 0 for one in loss.parameters())


def test_half_precision_is_not_used_under_autocast(maps):
    loss = AMDLoss(4, loss_weight=1.0)
    value = loss(*maps)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(loss(*maps), value)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match='mask_ratio between 0 and 1'):
        AMDLoss(4, mask_ratio=65)
    with pytest.raises(ValueError, match='reduction > 0'):
        AMDLoss(4, reduction=0)


def test_other_channels_than_built_for_are_named(maps):
    with pytest.raises(ValueError, match='Set its channels to 4'):
        AMDLoss(3)(*maps)


def test_channel_mismatch_names_the_fix(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='in_channels=2, out_channels=4'):
        AMDLoss(4)(student[:, :2], teacher)

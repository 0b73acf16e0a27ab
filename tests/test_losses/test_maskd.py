import pytest
import torch
from torch import nn

from mmkd.losses.maskd import MasKDLoss, maskd_loss
from mmkd.structures import GroundTruth


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 8, 4, 6).unbind()


@pytest.fixture
def loss():
    """With tokens and shares that have learnt something."""
    torch.manual_seed(1)
    loss = MasKDLoss(8, tokens=3)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loss


def literal(student, teacher, masks, shares):
    """The squared error of masked maps, mask by mask and image by image."""
    total = 0.0
    for n in range(len(student)):
        for t in range(masks.shape[1]):
            mask = masks[n, t]
            masked = (mask * student[n] - mask * teacher[n]).square()
            per_channel = masked.sum((1, 2)) / mask.sum()
            total = total + shares[n, t] * per_channel.mean()
    return total / len(student)


def test_equals_the_error_of_masked_maps_mask_by_mask(maps):
    masks, shares = torch.rand(2, 3, 4, 6), torch.rand(2, 3)
    torch.testing.assert_close(
        maskd_loss(*maps, masks, shares), literal(*maps, masks, shares)
    )


def test_two_cells_by_hand():
    # Errors 4 and 16; the masks see (1, 0) and (1/2, 1/2).
    student, teacher = torch.zeros(2, 1, 1, 1, 2).unbind()
    teacher[0, 0, 0] = torch.tensor([2.0, 4.0])
    masks = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])
    shares = torch.tensor([[0.75, 0.25]])
    expected = 0.75 * 4 / 1 + 0.25 * (1 + 4) / 1
    assert maskd_loss(student, teacher, masks, shares).item() == expected


def test_a_map_of_one_cell_by_hand():
    student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    mask = torch.full((1, 1, 1, 1), 0.5)
    loss = maskd_loss(student, teacher, mask, torch.ones(1, 1))
    assert loss.item() == 0.25 * 4 / 0.5


def test_where_no_mask_sees_anything_it_is_zero_with_a_gradient(maps):
    student, teacher = maps
    student.requires_grad_()
    value = maskd_loss(
        student, teacher, torch.zeros(2, 3, 4, 6), torch.ones(2, 3)
    )
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


# The module ------------------------------------------------------------------


def test_masks_and_shares_are_drawn_from_the_teacher(maps, loss):
    student, teacher = maps
    loss.customise, loss.loss_weight = False, 7.0
    masks = torch.einsum('nchw,tc->nthw', teacher, loss.tokens).sigmoid()
    conv, _, _, linear = loss.weigher
    pooled = torch.conv2d(teacher, conv.weight, conv.bias, padding=1)
    shares = linear(pooled.mean((2, 3))).softmax(1)
    assert shares.std() > 0.01
    torch.testing.assert_close(
        loss(student, teacher), 7 * literal(student, teacher, masks, shares)
    )


def test_customised_masks_are_those_of_both_sides(maps, loss):
    student, teacher = maps
    masks = loss.masks(teacher) * loss.masks(student)
    torch.testing.assert_close(
        loss(student, teacher),
        literal(student, teacher, masks, loss.shares(teacher)),
    )


def test_the_students_masks_are_no_way_out_for_it(maps, loss):
    """The gradient is that of the error alone."""
    student, teacher = maps
    masks = (loss.masks(teacher) * loss.masks(student)).detach()
    student.requires_grad_()
    (found,) = torch.autograd.grad(loss(student, teacher), student)
    (expected,) = torch.autograd.grad(
        literal(student, teacher, masks, loss.shares(teacher).detach()),
        student,
    )
    torch.testing.assert_close(found, expected)


def test_fresh_masks_stay_near_one_half_and_learn_nothing_here(maps):
    student, teacher = maps
    loss = MasKDLoss(8, customise=False)
    assert loss.tokens.shape == (6, 8)
    torch.testing.assert_close(
        loss(student, teacher),
        (student - teacher).square().mean() / 2,
        rtol=0.05,
        atol=0,
    )
    loss(student, teacher).backward()
    assert all((one.grad == 0).all() for one in loss.parameters())


def test_tokens_start_apart_and_small():
    torch.manual_seed(0)
    assert MasKDLoss(256).tokens.std().item() == pytest.approx(0.01, rel=0.1)


def test_cells_of_the_border_do_not_count(maps, loss):
    student, teacher = maps
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2, (32, 48), image_shapes=[(32, 48), (32, 24)]
    )
    other = student.clone()
    other[1, :, :, 3:] += 5
    torch.testing.assert_close(
        loss(other, teacher, gt), loss(student, teacher, gt)
    )
    assert loss(other, teacher) != loss(student, teacher)


def test_what_is_revealed_is_the_map_under_the_mixed_mask(maps, loss):
    _, teacher = maps
    revealed, overlap = loss.reveal(teacher)
    masks, shares = loss.masks(teacher), loss.shares(teacher)
    expected = sum(
        shares[:, t].view(2, 1, 1, 1) * masks[:, t : t + 1] * teacher
        for t in range(3)
    )
    torch.testing.assert_close(revealed, expected)
    assert 0 < overlap < 1
    same = MasKDLoss(8, tokens=2)
    nn.init.ones_(same.tokens)
    assert same.reveal(teacher)[1].item() == pytest.approx(1)


def test_all_that_draws_masks_learns_from_what_is_revealed(maps, loss):
    revealed, overlap = loss.reveal(maps[1])
    revealed.square().sum().backward(retain_graph=True)
    assert all(one.grad.abs().sum() > 0 for one in loss.parameters())
    loss.zero_grad()
    overlap.backward()
    assert loss.tokens.grad.abs().sum() > 0


def test_autocast_does_not_lower_the_precision(maps, loss):
    plain, revealed = loss(*maps), loss.reveal(maps[1])[0]
    with torch.autocast('cpu', torch.bfloat16):
        cast, again = loss(*maps), loss.reveal(maps[1])[0]
    assert torch.equal(plain, cast)
    assert torch.equal(revealed, again)


def test_mistakes_are_named(maps):
    with pytest.raises(ValueError, match='built for 4 channels'):
        MasKDLoss(4)(*maps)
    with pytest.raises(ValueError, match='built for 4 channels'):
        MasKDLoss(4).reveal(maps[0])
    with pytest.raises(ValueError, match='out_channels=8'):
        MasKDLoss(8)(maps[0][:, :4], maps[1])
    with pytest.raises(ValueError, match='tokens > 0'):
        MasKDLoss(4, tokens=0)

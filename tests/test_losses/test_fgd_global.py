import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkd.losses.fgd_global import FGDGlobalLoss, fgd_global_loss


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 8, 4, 6).unbind()


@pytest.fixture
def loss():
    """With blocks that have learnt something."""
    torch.manual_seed(1)
    loss = FGDGlobalLoss(8, loss_weight=1.0)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loss


def slow_relation(block, feature):
    """R(F) by the paper's equation 8, one location at a time."""
    images, _, height, width = feature.shape
    key = block.conv_mask
    first, norm, _, last = block.channel_add_conv
    rows = []
    for n in range(images):
        places = [
            feature[n, :, y, x] for y in range(height) for x in range(width)
        ]
        scores = torch.stack(
            [key.weight.flatten() @ place + key.bias[0] for place in places]
        )
        share = scores.exp() / scores.exp().sum()
        pooled = sum(one * place for one, place in zip(share, places))
        inner = first.weight[:, :, 0, 0] @ pooled + first.bias
        centred = inner - inner.mean()
        inner = centred / (centred.square().mean() + norm.eps).sqrt()
        inner = inner * norm.weight.flatten() + norm.bias.flatten()
        added = last.weight[:, :, 0, 0] @ inner.clamp(min=0) + last.bias
        rows.append(feature[n] + added[:, None, None])
    return torch.stack(rows)


def test_equals_the_formula_location_by_location(maps, loss):
    student, teacher = maps
    student.requires_grad_()
    gap = slow_relation(loss.student_block, student) - slow_relation(
        loss.teacher_block, teacher
    )
    expected = gap.square().sum() / 2
    actual = loss(student, teacher)
    torch.testing.assert_close(actual, expected)
    wanted = [student, *loss.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual, wanted),
        torch.autograd.grad(expected, wanted),
        rtol=1e-4,
        atol=1e-4,
    )


def test_equals_the_distance_of_the_blocks_outputs(maps, loss):
    student, teacher = maps
    expected = F.mse_loss(
        loss.student_block(student),
        loss.teacher_block(teacher),
        reduction='sum',
    )
    torch.testing.assert_close(loss(student, teacher), expected / 2)


def test_starts_as_the_plain_squared_distance(maps):
    student, teacher = maps
    expected = (student - teacher).square().sum() / 2
    actual = FGDGlobalLoss(8, loss_weight=3.0)(student, teacher)
    torch.testing.assert_close(actual, 3 * expected)


def test_each_side_has_a_block_of_its_own_and_both_learn(maps, loss):
    student, teacher = maps
    blocks = loss.student_block, loss.teacher_block
    shared = {id(one) for one in blocks[0].parameters()} & {
        id(one) for one in blocks[1].parameters()
    }
    assert not shared
    loss(student, teacher).backward()
    for block in blocks:
        # The key's bias moves no softmax.
        for name, parameter in block.named_parameters():
            learns = parameter.grad.abs().max() > 1e-4
            assert learns or name == 'conv_mask.bias', name


def test_the_inner_channels_are_half():
    first = FGDGlobalLoss(8).student_block.channel_add_conv[0]
    assert first.out_channels == 4


def test_the_context_is_kept_where_maps_are_equal(maps):
    # (D + A)² with D = 0: what is left is H W A².
    student, _ = maps
    added = torch.randn(2, 8, 1, 1)
    torch.testing.assert_close(
        fgd_global_loss(student, student, added, -added),
        24 * (2 * added).square().sum() / 2,
    )


def test_autocast_does_not_lower_the_precision(maps, loss):
    student, teacher = maps
    plain = loss(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        cast = loss(student, teacher)
    assert torch.equal(plain, cast)


def test_a_cropped_map_is_taken(maps, loss):
    student, teacher = maps
    large = F.pad(teacher, (0, 2, 0, 1))
    torch.testing.assert_close(
        loss(student, large[..., :4, :6]), loss(student, teacher)
    )


def test_a_map_of_other_channels_is_refused(maps, loss):
    with pytest.raises(ValueError, match='built for 8 channels'):
        loss(*(one[:, :4] for one in maps))


def test_a_single_channel_cannot_be_halved():
    with pytest.raises(ValueError, match='at least 2, got channels=1'):
        FGDGlobalLoss(1)

import pytest
import torch
from torch import nn

from mmkd.losses.freekd import FreeKDLoss, coarse_attention
from mmkd.ops.wavelets import haar
from mmkd.structures import GroundTruth


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 6, 8, 16).unbind()


@pytest.fixture
def loss():
    """With prompts that have learnt something."""
    torch.manual_seed(1)
    loss = FreeKDLoss(6, prompts=2, loss_weight=3.0)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.3)
    return loss


def literal(loss, student, teacher):
    """Masked bands of both sides, prompt by prompt and scale by scale."""
    own, theirs = haar(student, 3)[1], haar(teacher, 3)[1]
    total = 0.0
    for scale in range(3):
        whole = theirs[scale].sum(2)
        values = []
        for prompt in loss.high[scale]:
            mask = torch.einsum('nchw,c->nhw', whole, prompt).sigmoid()
            mask = mask[:, None, None]
            values.append((mask * own[scale] - mask * theirs[scale]).abs())
        total = total + torch.stack(values).mean()
    return total


def test_equals_the_difference_of_masked_bands(maps, loss):
    torch.testing.assert_close(loss(*maps), 3 * literal(loss, *maps))


def test_one_square_by_hand():
    # The bands of the gap are 1 (columns), 2 (rows) and 0.
    teacher = torch.zeros(1, 1, 2, 2)
    student = torch.tensor([[[[1.5, 0.5], [-0.5, -1.5]]]])
    loss = FreeKDLoss(1, prompts=4, scales=1)
    assert loss(student, teacher).item() == pytest.approx(0.5 * (1 + 2) / 3)


def test_an_offset_of_a_channel_is_the_coarse_bands_affair(maps, loss):
    student, teacher = maps
    offset = torch.arange(6.0).view(6, 1, 1)
    torch.testing.assert_close(
        loss(student + offset, teacher), loss(student, teacher)
    )


def test_gradient_is_that_of_finite_differences(maps):
    student, teacher = (one[:1, :2, :4, :4].double() for one in maps)
    loss = FreeKDLoss(2, scales=2).double()
    assert torch.autograd.gradcheck(
        lambda one: loss(one, teacher), student.requires_grad_()
    )


def test_prompts_learn_nothing_here(maps, loss):
    loss(*maps).backward()
    assert all((one.grad == 0).all() for one in loss.parameters())


def test_prompts_start_small():
    loss = FreeKDLoss(256)
    assert loss.low.shape == (6, 256)
    assert loss.high.shape == (3, 6, 256)
    for one in loss.parameters():
        assert one.std().item() == pytest.approx(0.01, rel=0.1)


def test_cells_of_the_border_do_not_count(maps, loss):
    student, teacher = maps
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2, (64, 128), image_shapes=[(64, 128), (64, 64)]
    )
    other = student.clone()
    other[1, :, :, 8:] += torch.randn(6, 8, 8)
    torch.testing.assert_close(
        loss(other, teacher, gt), loss(student, teacher, gt)
    )
    assert loss(other, teacher) != loss(student, teacher)
    same = student.clone()
    same[1, :, :, 8:] = student[1, :, :, :8]
    twice = teacher.clone()
    twice[1, :, :, 8:] = teacher[1, :, :, :8]
    left = loss(same[1:], twice[1:])
    part = GroundTruth.from_boxes(
        [torch.zeros(0, 4)], (64, 128), image_shapes=[(64, 64)]
    )
    torch.testing.assert_close(loss(same[1:], twice[1:], part), left)


def test_where_everything_is_ignored_it_is_zero(maps, loss):
    whole = torch.tensor([[0.0, 0, 128, 64]])
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2, (64, 128), ignored=[whole, whole]
    )
    assert loss(*maps, gt) == 0


# The channels' weights -------------------------------------------------------


@pytest.fixture
def gated():
    """With prompts and a gate that have learnt something."""

    def build(position):
        torch.manual_seed(2)
        loss = FreeKDLoss(6, prompts=2, scales=2, position=position)
        for parameter in loss.parameters():
            nn.init.normal_(parameter, std=0.6)
        return loss

    return build


def literal_weights(loss, feature):
    """Channel by channel, from maps whose blocks are filled with means."""
    side = 2 ** len(loss.high)
    first, _, last = loss.gate
    found = []
    for image in feature:
        rows, columns = image.shape[1:]
        blocks = image.clone()
        for y in range(0, rows, side):
            for x in range(0, columns, side):
                part = image[:, y : y + side, x : x + side]
                mean = part.mean((1, 2), keepdim=True)
                blocks[:, y : y + side, x : x + side] = mean
        scores = []
        for one in blocks:
            row = [
                (one * other).sum() / (one.norm() * other.norm())
                for other in image
            ]
            row = 6 * torch.stack(row).exp() / sum(x.exp() for x in row)
            hidden = (first.weight @ row + first.bias).clamp(min=0)
            scores.append((last.weight @ hidden + last.bias).squeeze())
        total = sum(score.exp() for score in scores)
        found.append(torch.stack([6 * x.exp() / total for x in scores]))
    return torch.stack(found)


def literal_with(loss, student, teacher, weights):
    own, theirs = (haar(x, len(loss.high))[1] for x in (student, teacher))
    total = 0.0
    for one, other, prompts in zip(own, theirs, loss.high):
        mask = torch.einsum('nchw,pc->nphw', other.sum(2), prompts).sigmoid()
        mask = mask.mean(1)[:, None, None]
        gap = weights[:, :, None, None, None] * mask * (one - other).abs()
        total = total + gap.mean()
    return total


@pytest.mark.parametrize('position', ['teacher', 'student'])
def test_channels_count_as_the_gate_says(maps, gated, position):
    loss = gated(position)
    seen = dict(zip(('student', 'teacher'), maps))[position]
    weights = literal_weights(loss, seen)
    assert weights.std() > 0.05
    torch.testing.assert_close(loss.weights(seen), weights)
    torch.testing.assert_close(loss(*maps), literal_with(loss, *maps, weights))


def test_attention_of_two_channels_by_hand():
    """One is flat, the other a chessboard whose blocks are all 0.

    The flat one finds itself (cosine 1) and not the other; the other nothing.
    """
    flat, board = torch.ones(4, 4), torch.tensor([[1.0, -1], [-1, 1]])
    maps = torch.stack([flat, board.repeat(2, 2)])[None]
    found = coarse_attention(3 * maps, scales=1)
    e = torch.e
    expected = torch.tensor([[[e / (e + 1), 1 / (e + 1)], [0.5, 0.5]]])
    torch.testing.assert_close(found, expected)


def test_size_of_a_channel_does_not_matter(maps, gated):
    loss = gated('teacher')
    scale = torch.tensor([0.01, 1, 5, 100, 2, 3]).view(6, 1, 1)
    torch.testing.assert_close(
        loss.weights(scale * maps[1]), loss.weights(maps[1])
    )


def test_weights_are_one_in_the_mean_and_at_first(maps, gated):
    weights = gated('teacher').weights(maps[1])
    torch.testing.assert_close(weights.mean(1), torch.ones(2))
    assert (weights[0] - weights[1]).abs().max() > 1e-3  # of the image
    torch.manual_seed(0)
    plain = FreeKDLoss(6, prompts=2)
    torch.manual_seed(0)
    loss = FreeKDLoss(6, prompts=2, position='teacher')
    torch.testing.assert_close(loss.weights(maps[1]), torch.ones(2, 6))
    torch.testing.assert_close(loss(*maps), plain(*maps))
    assert torch.equal(plain.weights(maps[1]), torch.ones(2, 6))


def test_one_channel_has_nothing_to_choose_from():
    loss = FreeKDLoss(1, position='student')
    assert loss.weights(torch.randn(2, 1, 8, 8)).tolist() == [[1.0], [1.0]]


def test_a_map_of_nothing_has_weights(gated):
    weights = gated('teacher').weights(torch.zeros(1, 6, 8, 8))
    torch.testing.assert_close(weights, torch.ones(1, 6))


def test_the_gate_is_no_way_out_for_the_student(maps, gated):
    """Its gradient is that of weights that stay as they are."""
    loss, (student, teacher) = gated('student'), maps
    weights = literal_weights(loss, student).detach()
    student = student.clone().requires_grad_()
    loss(student, teacher).backward()
    assert all((one.grad == 0).all() for one in loss.parameters())
    other = student.detach().clone().requires_grad_()
    literal_with(loss, other, teacher, weights).backward()
    torch.testing.assert_close(student.grad, other.grad)


def test_revealed_details_are_weighed_and_the_coarse_band_is_not(maps, gated):
    loss, (_, teacher) = gated('teacher'), maps
    left, kept = haar(loss.reveal(teacher)[0], 2)
    low, highs = haar(teacher, 2)
    weights = literal_weights(loss, teacher)[:, :, None, None, None]
    masks = torch.einsum('nchw,pc->nphw', low, loss.low).sigmoid()
    torch.testing.assert_close(left, low * masks.sum(1, keepdim=True))
    for one, other, prompts in zip(kept, highs, loss.high):
        masks = torch.einsum('nchw,pc->nphw', other.sum(2), prompts).sigmoid()
        torch.testing.assert_close(
            one,
            weights * other * masks.sum(1)[:, None, None],
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_gate_learns_from_what_is_revealed(maps, gated):
    loss = gated('student')
    loss.reveal(maps[1])[0].square().sum().backward()
    assert all(one.grad.any() for one in loss.gate[0].parameters())
    assert loss.gate[2].weight.grad.any()
    fresh = FreeKDLoss(6, position='student')
    fresh.reveal(maps[1])[0].square().sum().backward()
    assert fresh.gate[2].weight.grad.any()


@pytest.mark.parametrize('position', ['teacher', 'student'])
def test_the_border_has_no_say_in_weights(maps, gated, position):
    loss, (student, teacher) = gated(position), maps
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2, (64, 128), image_shapes=[(64, 128), (64, 64)]
    )
    before = loss(student, teacher, gt)
    for one in (student, teacher):
        one[1, :, :, 8:] = 50 * torch.randn(6, 8, 8)
    torch.testing.assert_close(loss(student, teacher, gt), before)


def test_weights_are_as_exact_under_autocast(maps, gated):
    loss = gated('teacher')
    with torch.autocast('cpu', torch.bfloat16):
        cast = loss.weights(maps[1])
    assert torch.equal(cast, loss.weights(maps[1]))


# What is revealed ------------------------------------------------------------


def test_bands_come_through_as_much_as_their_masks_add_up_to(maps, loss):
    _, teacher = maps
    revealed, overlap = loss.reveal(teacher)
    low, highs = haar(teacher, 3)
    left, kept = haar(revealed, 3)
    masks = torch.einsum('nchw,pc->nphw', low, loss.low).sigmoid()
    torch.testing.assert_close(left, low * masks.sum(1, keepdim=True))
    for one, other, prompts in zip(kept, highs, loss.high):
        masks = torch.einsum('nchw,pc->nphw', other.sum(2), prompts).sigmoid()
        torch.testing.assert_close(
            one, other * masks.sum(1)[:, None, None], rtol=1e-4, atol=1e-5
        )
    assert 0 < overlap < 4


def test_two_prompts_of_nothing_reveal_the_map_and_overlap_wholly(maps):
    loss = FreeKDLoss(6, prompts=2)
    for one in loss.parameters():
        nn.init.zeros_(one)
    revealed, overlap = loss.reveal(maps[1])
    torch.testing.assert_close(revealed, maps[1])
    assert overlap.item() == pytest.approx(4)


@pytest.mark.parametrize('size', [(7, 10), (1, 2)])
def test_maps_of_odd_sizes_are_revealed_whole(size):
    loss = FreeKDLoss(6, prompts=2)
    for one in loss.parameters():
        nn.init.zeros_(one)
    teacher = torch.randn(2, 6, *size)
    torch.testing.assert_close(loss.reveal(teacher)[0], teacher)
    assert loss(2 * teacher, teacher).isfinite()


def test_every_prompt_learns_from_what_is_revealed(maps, loss):
    revealed, overlap = loss.reveal(maps[1])
    for value in (revealed.square().sum(), overlap):
        loss.zero_grad()
        value.backward(retain_graph=True)
        assert (loss.low.grad.abs().sum(1) > 0).all()
        assert (loss.high.grad.abs().sum(2) > 0).all()


def test_autocast_does_not_lower_the_precision(maps, loss):
    plain = loss(*maps)
    with torch.autocast('cpu', torch.bfloat16):
        cast = loss(*maps)
    assert torch.equal(plain, cast)


def test_mistakes_are_named(maps):
    with pytest.raises(ValueError, match='built for 4 channels'):
        FreeKDLoss(4)(*maps)
    with pytest.raises(ValueError, match='built for 4 channels'):
        FreeKDLoss(4).reveal(maps[0])
    with pytest.raises(ValueError, match='out_channels=6'):
        FreeKDLoss(6)(maps[0][:, :4], maps[1])
    with pytest.raises(ValueError, match='prompts > 0'):
        FreeKDLoss(4, prompts=0)
    with pytest.raises(ValueError, match='scales > 0'):
        FreeKDLoss(4, scales=0)
    with pytest.raises(ValueError, match=r"'techer'.*'teacher'"):
        FreeKDLoss(4, position='techer')

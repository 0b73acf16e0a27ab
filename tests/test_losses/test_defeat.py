import pytest
import torch

from mmkd.losses.defeat import DeFeatLoss, assign_by_size, defeat_loss
from mmkd.ops.masks import union_mask, valid_mask
from mmkd.structures import GroundTruth


@pytest.fixture
def pyramid():
    """Student and teacher, two levels of strides 8 and 16."""
    torch.manual_seed(0)
    return tuple(
        tuple(
            torch.randn(2, 3, rows, columns)
            for rows, columns in ((8, 12), (4, 6))
        )
        for _ in range(2)
    )


@pytest.fixture
def gt():
    return GroundTruth.from_boxes(
        [
            torch.tensor([[10.0, 20, 40, 36], [0, 0, 20, 40]]),
            torch.zeros(0, 4),
        ],
        shape=(64, 96),
        image_shapes=[(64, 96), (40, 80)],
    )


def slow(student, teacher, masks):
    """Mean of half the squared differences under a mask, over the levels."""
    means = []
    for one, other, mask in zip(student, teacher, masks):
        chosen = []
        for n, c, y, x in torch.cartesian_prod(
            *(torch.arange(extent) for extent in one.shape)
        ).tolist():
            if mask[n, 0, y, x] == 1:
                chosen.append((one - other)[n, c, y, x].item() ** 2 / 2)
        means.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return sum(means) / len(means)


def test_equals_the_means_over_boxes_and_over_the_rest(pyramid, gt):
    sizes = [tuple(one.shape[-2:]) for one in pyramid[0]]
    inside = [union_mask(gt, size) for size in sizes]
    outside = [
        valid_mask(gt, size) - mask for size, mask in zip(sizes, inside)
    ]
    parts = DeFeatLoss()(*pyramid, gt)
    assert parts['foreground'].item() == pytest.approx(
        3 * slow(*pyramid, inside), rel=1e-5
    )
    assert parts['background'].item() == pytest.approx(
        12 * slow(*pyramid, outside), rel=1e-5
    )


def test_neither_size_nor_channels_nor_levels_change_a_mean():
    # A difference of 2 everywhere: half its square is 2.
    for boxes in ([[0.0, 0, 8, 8]], [[0.0, 0, 60, 30], [4, 4, 20, 60]]):
        gt = GroundTruth.from_boxes([torch.tensor(boxes)], shape=(64, 64))
        for channels in (1, 5):
            teacher = tuple(
                torch.randn(1, channels, size, size) for size in (8, 4, 2)
            )
            student = tuple(one + 2 for one in teacher)
            for levels in (slice(1), slice(3)):
                parts = DeFeatLoss(1.0, 1.0)(
                    student[levels], teacher[levels], gt
                )
                assert parts['foreground'].item() == pytest.approx(2)
                assert parts['background'].item() == pytest.approx(2)


def test_foreground_sees_the_box_and_background_the_rest(pyramid):
    student, teacher = (one[:1] for one in pyramid)
    gt = GroundTruth.from_boxes(
        [torch.tensor([[16.0, 8, 32, 24]]), torch.zeros(0, 4)], shape=(64, 96)
    )
    feature = student[0].clone().requires_grad_()
    parts = DeFeatLoss()((feature,), teacher, gt)
    inside = torch.zeros(2, 3, 8, 12, dtype=torch.bool)
    inside[0, :, 1:3, 2:4] = True
    for name, where in (('foreground', inside), ('background', ~inside)):
        (grad,) = torch.autograd.grad(parts[name], feature, retain_graph=True)
        assert torch.equal(grad != 0, where)


def test_padding_is_background_only_on_demand(pyramid, gt):
    student, teacher = pyramid
    changed = tuple(one.clone() for one in student)
    changed[0][1, :, 5:] += 1  # below the second image, 40 of 64 pixels
    for keep in (False, True):
        loss = DeFeatLoss(keep_padding=keep)
        before, after = (
            loss(one, teacher, gt)['background'] for one in (student, changed)
        )
        assert (before != after).item() is keep


def test_a_batch_without_boxes_keeps_its_graph(pyramid):
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=(64, 96))
    student = tuple(one.requires_grad_() for one in pyramid[0])
    parts = DeFeatLoss()(student, pyramid[1], gt)
    parts['foreground'].backward()
    assert parts['foreground'].item() == 0
    assert all((one.grad == 0).all() for one in student)
    assert parts['background'] > 0


def test_a_batch_without_background_has_none(pyramid):
    whole = torch.tensor([[0.0, 0, 96, 64]])
    gt = GroundTruth.from_boxes([whole, whole], shape=(64, 96))
    parts = DeFeatLoss()(*pyramid, gt)
    assert parts['background'].item() == 0
    assert parts['foreground'] > 0


def test_by_size_each_box_is_on_one_level(pyramid):
    small, large = [0.0, 0, 16, 16], [48.0, 0, 96, 48]
    boxes = torch.tensor([small, large])
    gt = GroundTruth.from_boxes([boxes, boxes], shape=(64, 96))
    loss = DeFeatLoss(finest_scale=16)
    fine, _ = loss.masks(gt, pyramid[0][0], 0, 2)
    coarse, rest = loss.masks(gt, pyramid[0][1], 1, 2)
    assert fine.sum() == 2 * 2 * 2  # the small box of either image
    assert fine[:, :, :2, :2].all()
    assert coarse.sum() == 2 * 3 * 3
    assert coarse[:, :, :3, 3:].all()
    assert torch.equal(coarse + rest, torch.ones_like(rest))


def test_sizes_double_from_level_to_level():
    sides = torch.tensor([0.0, 1, 111, 112, 113, 223, 224, 500, 10000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    assert assign_by_size(boxes, 56, 4).tolist() == [
        0, 0, 0, 1, 1, 1, 2, 3, 3,
    ]  # fmt: skip


def test_a_long_box_counts_by_its_area():
    # Side of the square of the same area: 128.
    boxes = torch.tensor([[0.0, 0, 64, 256], [0, 0, 256, 64]])
    assert assign_by_size(boxes, 32, 5).tolist() == [2, 2]
    assert assign_by_size(boxes + 1000, 32, 5).tolist() == [2, 2]


def test_a_box_inside_out_is_as_small_as_can_be():
    turned = torch.tensor([[0.0, 0, -64, 256], [900, 900, 0, 0]])
    assert assign_by_size(turned, 32, 5).tolist() == [0, 0]


def test_half_precision_does_not_overflow():
    feature = torch.full((1, 2, 4, 4), 300.0, dtype=torch.half)
    value = defeat_loss(feature, -feature, torch.ones(1, 1, 4, 4))
    assert value.item() == 600**2 / 2


def test_missing_ground_truth_is_named(pyramid):
    with pytest.raises(ValueError, match=r'DeFeatLoss .* gt=None'):
        DeFeatLoss()(*pyramid)

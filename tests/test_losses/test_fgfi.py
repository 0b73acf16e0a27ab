import copy
import math
import random

import pytest
import torch
from mmdet.registry import TASK_UTILS
from torch._subclasses import FakeTensorMode

from mmkd.losses import fgfi
from mmkd.losses.fgfi import FGFILoss, fgfi_loss, imitation_mask
from mmkd.ops import masks
from mmkd.structures import GroundTruth

SQUARES = dict(scales=[1], ratios=[1.0], strides=[8])
MANY = dict(
    type='AnchorGenerator',
    octave_base_scale=2,
    scales_per_octave=2,
    ratios=[0.5, 1.0, 2.0],
    strides=[8, 16],
)


def mask_of(loss, gt, size):
    anchors = loss.anchors(size, torch.device('cpu'))
    return imitation_mask(gt, anchors, size, loss.threshold)


def marked(loss, gt, size):
    """Cells that the whole loss sends a gradient to, of one image."""
    student = torch.ones(1, 1, *size, requires_grad=True)
    loss(student, torch.zeros(1, 1, *size), gt).backward()
    return student.grad[0, 0].nonzero().tolist()


def one_box(*box, shape=(32, 32)):
    return GroundTruth.from_boxes([torch.tensor([box]).float()], shape=shape)


# The mask ----------------------------------------------------------------


def test_an_anchor_that_is_the_box_is_alone():
    # Squares of 8 pixels around (0, 0), (8, 0), …: no two of them overlap.
    mask = mask_of(FGFILoss(SQUARES), one_box(4, 12, 12, 20), (4, 4))
    assert mask[0, 0].nonzero().tolist() == [[2, 1]]


def test_the_threshold_is_a_share_of_the_largest_iou():
    # IoU with 16 x 16 pixels: 64/256 of the square around (8, 8), which lies
    # inside, 32/288 of its four neighbours, 16/304 at the corners.
    gt = one_box(0, 0, 16, 16)
    assert marked(FGFILoss(SQUARES, threshold=0.5), gt, (4, 4)) == [[1, 1]]
    assert marked(FGFILoss(SQUARES, threshold=0.4), gt, (4, 4)) == [
        [0, 1], [1, 0], [1, 1], [1, 2], [2, 1],
    ]  # fmt: skip


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def shapes(config, level):
    """Width and height of the anchors of a cell, by mmdet's convention."""
    for ratio in config['ratios']:
        for step in range(config['scales_per_octave']):
            scale = config['octave_base_scale'] * 2 ** (
                step / config['scales_per_octave']
            )
            side = scale * config['strides'][level]
            yield side / ratio**0.5, side * ratio**0.5


def slow_mask(config, level, gt, size, threshold):
    """The paper's procedure: boxes, cells, anchors, one after the other."""
    stride = config['strides'][level]
    mask = torch.zeros(gt.num_images, 1, *size)
    for box, image in zip(gt.boxes.tolist(), gt.image.tolist()):
        overlaps = {}
        for row in range(size[0]):
            for column in range(size[1]):
                x, y = column * stride, row * stride
                overlaps[row, column] = [
                    iou(box, [x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                    for w, h in shapes(config, level)
                ]
        largest = max(max(values) for values in overlaps.values())
        for cell, values in overlaps.items():
            if any(value > threshold * largest for value in values):
                mask[image, 0][cell] = 1
    return mask


def random_ground_truth(seed, shape=(64, 96)):
    draw = random.Random(seed)
    images = []
    for _ in range(3):
        boxes = []
        for _ in range(draw.randint(0, 4)):
            x, y = (draw.uniform(-0.2, 1) * side for side in shape[::-1])
            boxes.append(
                [x, y, x + draw.uniform(1, 60), y + draw.uniform(1, 60)]
            )
        images.append(torch.tensor(boxes).view(-1, 4))
    return GroundTruth.from_boxes(images, shape=shape)


@pytest.mark.parametrize('seed', range(6))
def test_equals_the_paper_s_procedure_anchor_by_anchor(seed):
    gt = random_ground_truth(seed)
    level, threshold = seed % 2, (0.5, 0.7)[seed % 2]
    size = ((8, 12), (4, 6))[level]
    loss = FGFILoss(MANY, threshold, level_index=level)
    torch.testing.assert_close(
        mask_of(loss, gt, size), slow_mask(MANY, level, gt, size, threshold)
    )


def test_the_largest_iou_is_that_of_this_level():
    # Two strides apart, and yet the box marks cells on both levels.
    gt = one_box(3, 3, 11, 11, shape=(64, 64))
    for level, size in enumerate(((8, 8), (4, 4))):
        loss = FGFILoss(MANY, level_index=level)
        assert mask_of(loss, gt, size).sum() > 0


def test_strides_may_differ_between_the_axes():
    config = dict(scales=[1], ratios=[1.0], base_sizes=[8], strides=[(8, 16)])
    gt = one_box(4, 12, 12, 20, shape=(64, 32))
    assert marked(FGFILoss(config), gt, (4, 4)) == [[1, 1]]


def test_chunks_of_boxes_do_not_change_the_mask(monkeypatch):
    gt = random_ground_truth(3)
    loss = FGFILoss(MANY)
    whole = mask_of(loss, gt, (8, 12))
    assert len(gt.boxes) > 1
    monkeypatch.setattr(masks, 'CHUNK', 1)
    torch.testing.assert_close(mask_of(loss, gt, (8, 12)), whole)


@pytest.mark.parametrize(
    'box',
    [
        (100, 100, 120, 120),
        (4, 4, 4, 12),
        (12, 4, 4, 12),
        (math.nan, 4, 12, 12),
    ],
    ids=str,
)
def test_a_box_that_no_anchor_meets_marks_nothing(box):
    mask = mask_of(FGFILoss(SQUARES), one_box(*box), (4, 4))
    assert mask.sum() == 0


def test_no_value_is_read_back_from_the_device():
    loss = FGFILoss(SQUARES)
    anchors = loss.anchors((4, 4), torch.device('cpu'))
    with FakeTensorMode(allow_non_fake_inputs=True):
        gt = GroundTruth.from_boxes([torch.rand(3, 4)], shape=(32, 32))
        mask = imitation_mask(gt, anchors, (4, 4))
        feature = torch.rand(1, 2, 4, 4)
        assert fgfi_loss(feature, feature, mask).shape == ()


# The loss ----------------------------------------------------------------


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 3, 5, 8, 12).unbind()


def test_is_half_the_squared_error_per_marked_location(maps):
    gt = random_ground_truth(1)
    student, teacher = maps
    mask = slow_mask(MANY, 0, gt, (8, 12), 0.5)
    total, locations = 0.0, 0
    for n in range(3):
        for y in range(8):
            for x in range(12):
                if mask[n, 0, y, x]:
                    locations += 1
                    gap = (student - teacher)[n, :, y, x]
                    total += sum(value.item() ** 2 for value in gap)
    actual = FGFILoss(MANY, loss_weight=1.0)(student, teacher, gt)
    assert actual.item() == pytest.approx(total / (2 * locations), rel=1e-5)


def test_the_default_weight_is_the_authors_one_hundredth(maps):
    gt = random_ground_truth(1)
    torch.testing.assert_close(
        FGFILoss(MANY)(*maps, gt),
        0.01 * FGFILoss(MANY, loss_weight=1.0)(*maps, gt),
    )


def test_only_marked_cells_get_a_gradient(maps):
    gt = random_ground_truth(1)
    student, teacher = maps
    student.requires_grad_()
    FGFILoss(MANY)(student, teacher, gt).backward()
    mask = slow_mask(MANY, 0, gt, (8, 12), 0.5).bool().expand_as(student)
    assert torch.equal(student.grad != 0, mask)


def test_a_batch_without_boxes_is_zero_and_keeps_its_graph(maps):
    student, teacher = maps
    student.requires_grad_()
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 3, shape=(64, 96))
    value = FGFILoss(MANY)(student, teacher, gt)
    value.backward()
    assert value.item() == 0
    assert (student.grad == 0).all()


def test_half_precision_does_not_overflow():
    feature = torch.full((1, 2, 4, 4), 300.0, dtype=torch.half)
    loss = FGFILoss(SQUARES, loss_weight=1.0)
    value = loss(feature, -feature, one_box(4, 4, 12, 12))
    assert value.item() == 2 * 600**2 / 2


def test_takes_the_anchors_of_a_student_s_head():
    head = TASK_UTILS.build(MANY)
    anchors = FGFILoss(MANY, level_index=1).anchors(
        (4, 6), torch.device('cpu')
    )
    torch.testing.assert_close(
        anchors, head.grid_priors([(8, 12), (4, 6)], device='cpu')[1]
    )


def test_anchors_are_made_once_a_size(monkeypatch):
    loss = FGFILoss(SQUARES)
    device = torch.device('cpu')
    assert loss.anchors((4, 4), device) is loss.anchors((4, 4), device)
    monkeypatch.setattr(fgfi, '_REMEMBERED', 2)
    for rows in range(1, 6):
        assert len(loss.anchors((rows, 4), device)) == 4 * rows
        assert len(loss._anchors) <= 2
    copy.deepcopy(loss)
    assert not list(loss.state_dict())


# Messages ----------------------------------------------------------------


def test_a_level_without_anchors_is_refused():
    with pytest.raises(ValueError, match=r'2 levels.* asked for level 2'):
        FGFILoss(MANY, level_index=2)


def test_a_map_of_another_stride_is_refused(maps):
    gt = random_ground_truth(1)
    with pytest.raises(ValueError, match=r'stride .*16.* a map of \(8, 12\)'):
        FGFILoss(MANY, level_index=1)(*maps, gt)


@pytest.mark.parametrize('cells', [6, 7])
def test_a_coarse_map_may_be_rounded_either_way(cells):
    config = dict(scales=[4], ratios=[1.0], strides=[128])
    feature = torch.zeros(1, 2, cells, cells)
    gt = one_box(0, 0, 90, 90, shape=(800, 800))
    assert FGFILoss(config)(feature, feature, gt).item() == 0


@pytest.mark.parametrize('cells', [5, 7])
def test_a_cell_too_few_or_too_many_is_another_stride(cells):
    config = dict(scales=[4], ratios=[1.0], strides=[128])
    feature = torch.zeros(1, 2, cells, cells)
    gt = one_box(0, 0, 90, 90, shape=(768, 768))
    with pytest.raises(ValueError, match='stride'):
        FGFILoss(config)(feature, feature, gt)


def test_missing_ground_truth_is_named(maps):
    with pytest.raises(ValueError, match=r'FGFILoss .* gt=None'):
        FGFILoss(MANY)(*maps)


def test_points_are_no_anchors():
    points = dict(type='MlvlPointGenerator', strides=[8])
    with pytest.raises(ValueError, match=r'MlvlPointGenerator gives points'):
        FGFILoss(anchor_generator=points, level_index=0)

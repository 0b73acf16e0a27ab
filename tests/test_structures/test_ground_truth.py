import pytest
import tiny
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData

from mmkd.structures import GroundTruth

IMAGES = torch.zeros(3, 3, 64, 96)
FIRST = torch.tensor([[1.0, 2, 30, 40], [5, 6, 7, 8]])
THIRD = torch.tensor([[9.0, 9, 20, 20]])


def sample(boxes=None, labels=None, ignored=None, **meta):
    one = DetDataSample(metainfo=meta)
    if boxes is not None:
        one.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    if ignored is not None:
        one.ignored_instances = InstanceData(bboxes=ignored)
    return one


@pytest.fixture
def samples():
    return [
        sample(FIRST, torch.tensor([2, 0]), img_id=7, img_shape=(60, 90)),
        sample(FIRST[:0], torch.zeros(0, dtype=torch.long), THIRD, img_id='b'),
        sample(THIRD, torch.tensor([1]), THIRD[:0], img_shape=(64, 80, 3)),
    ]


@pytest.fixture
def gt(samples):
    return GroundTruth.from_samples(samples, IMAGES)


def test_boxes_of_all_images_lie_in_one_tensor(gt):
    assert torch.equal(gt.boxes, torch.cat([FIRST, THIRD]))
    assert gt.labels.tolist() == [2, 0, 1]
    assert gt.image.tolist() == [0, 0, 2]
    assert gt.num_images == 3


def test_ignored_boxes_are_kept_apart(gt):
    assert torch.equal(gt.ignored, THIRD)
    assert gt.ignored_image.tolist() == [1]


def test_sizes_are_those_of_batch_and_of_each_image(gt):
    assert gt.shape == (64, 96)
    assert gt.image_shapes == ((60, 90), (64, 96), (64, 80))


def test_identifiers_and_samples_come_along(gt, samples):
    assert gt.ids == (7, 'b', None)
    assert gt.samples == tuple(samples)


def test_box_types_of_mmdet_are_unpacked(samples):
    samples[0].gt_instances.bboxes = HorizontalBoxes(FIRST)
    gt = GroundTruth.from_samples(samples, IMAGES)
    assert type(gt.boxes) is torch.Tensor
    assert torch.equal(gt.boxes[:2], FIRST)


def test_half_precision_boxes_become_float32(samples):
    samples[0].gt_instances.bboxes = FIRST.half()
    gt = GroundTruth.from_samples(samples, IMAGES.half())
    assert gt.boxes.dtype == torch.float32


def test_no_box_at_all_still_has_shapes():
    gt = GroundTruth.from_samples([sample(), sample()], IMAGES[:2])
    assert gt.boxes.shape == gt.ignored.shape == (0, 4)
    assert gt.labels.shape == gt.image.shape == gt.ignored_image.shape == (0,)
    assert gt.labels.dtype == gt.image.dtype == torch.long
    assert gt.num_images == 2


def test_boxes_without_labels_get_class_zero():
    one = DetDataSample()
    one.gt_instances = InstanceData(bboxes=FIRST)
    assert GroundTruth.from_samples([one], IMAGES[:1]).labels.tolist() == [
        0,
        0,
    ]


def test_what_a_preprocessor_hands_over_is_understood():
    images, samples = tiny.batch(boxes=4)
    gt = GroundTruth.from_samples(samples, images)
    assert gt.boxes.shape == (8, 4)
    assert gt.image.tolist() == [0] * 4 + [1] * 4
    assert gt.image_shapes == ((tiny.SIZE, tiny.SIZE), (96, 112))


def test_from_boxes_equals_from_samples(gt, samples):
    other = GroundTruth.from_boxes(
        [FIRST, FIRST[:0], THIRD],
        shape=(64, 96),
        labels=[torch.tensor(one) for one in ([2, 0], [], [1])],
        image_shapes=[(60, 90), (64, 96), (64, 80)],
        ignored=[THIRD[:0], THIRD, THIRD[:0]],
    )
    for name in ('boxes', 'labels', 'image', 'ignored', 'ignored_image'):
        assert torch.equal(
            getattr(gt, name), getattr(other, name).to(gt.image)
        )
    assert (gt.shape, gt.image_shapes) == (other.shape, other.image_shapes)


def test_from_boxes_fills_what_is_not_given():
    gt = GroundTruth.from_boxes([FIRST, THIRD], shape=(64, 96))
    assert gt.labels.tolist() == [0, 0, 0]
    assert gt.image_shapes == ((64, 96), (64, 96))
    assert len(gt.ignored) == 0


def test_boxes_are_spread_over_their_images(gt):
    assert gt.counts == (2, 0, 1)
    assert gt.most == 2
    assert gt.place.tolist() == [0, 1, 0]
    assert gt.spread(gt.labels).tolist() == [[2, 0], [0, 0], [1, 0]]
    spread = gt.spread(gt.boxes)
    assert torch.equal(spread[0], FIRST)
    assert torch.equal(spread[2, :1], THIRD)
    assert not spread[1].any()


def test_boxes_in_another_order_stand_in_that_order():
    gt = GroundTruth(
        boxes=torch.zeros(4, 4),
        labels=torch.tensor([5, 6, 7, 8]),
        image=torch.tensor([1, 0, 1, 1]),
        shape=(8, 8),
        image_shapes=((8, 8), (4, 8)),
        ignored=torch.zeros(0, 4),
        ignored_image=torch.zeros(0, dtype=torch.long),
    )
    assert gt.most == 3  # counted
    assert gt.spread(gt.labels).tolist() == [[6, 0, 0], [5, 7, 8]]
    assert gt.image_sizes.tolist() == [[8, 8], [8, 4]]


def test_there_is_always_a_place():
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=(8, 8))
    assert gt.most == 1
    assert gt.spread(gt.labels).tolist() == [[0], [0]]

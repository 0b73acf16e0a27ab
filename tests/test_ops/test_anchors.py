import pytest
import torch
from mmdet.models.task_modules import ATSSAssigner
from mmengine.structures import InstanceData
from torchvision.ops import box_iou, distance_box_iou

from mmkd.ops.anchors import valuable_region
from mmkd.structures import GroundTruth


def grid(size, stride, side):
    """Square anchors around the cells of a map, row by row."""
    middles = (torch.arange(size) + 0.5) * stride
    y, x = torch.meshgrid(middles, middles, indexing='ij')
    half = side / 2
    return torch.stack([x - half, y - half, x + half, y + half], -1).reshape(
        -1, 4
    )


ANCHORS = [grid(8, 8, 64), grid(4, 16, 128)]
BOXES = [
    torch.tensor([[4.0, 6, 50, 60], [30, 20, 60, 64]]),
    torch.zeros(0, 4),
    torch.tensor([[0.0, 0, 64, 40]]),
]


@pytest.fixture
def gt():
    return GroundTruth.from_boxes(BOXES, shape=(64, 64))


def slow(anchors, boxes, topk, ratio):
    """The weights of one image's anchors, box by box."""
    every = torch.cat(anchors)
    weights = torch.zeros(len(every))
    for box in boxes:
        chosen = []
        for level in anchors:
            centres = (level[:, :2] + level[:, 2:]) / 2
            far = (centres - (box[:2] + box[2:]) / 2).norm(dim=1)
            nearest = far.argsort(stable=True)[:topk]
            chosen += box_iou(level[nearest], box[None])[:, 0].tolist()
        chosen = torch.tensor(chosen)
        alpha = (chosen.mean() + chosen.std()).item()
        for place, anchor in enumerate(every):
            near = distance_box_iou(anchor[None], box[None]).item()
            overlap = box_iou(anchor[None], box[None]).item()
            if ratio * alpha <= near < alpha:
                weights[place] = max(weights[place].item(), overlap)
    return weights


@pytest.mark.parametrize('ratio', [0.25, 0.6])
def test_equals_the_rule_written_out(gt, ratio):
    found = valuable_region(ANCHORS, gt, 9, ratio)
    assert [one.shape for one in found] == [(3, 64), (3, 16)]
    for image, boxes in enumerate(BOXES):
        expected = slow(ANCHORS, boxes, 9, ratio)
        torch.testing.assert_close(
            torch.cat([one[image] for one in found]), expected
        )


def test_it_ends_where_the_assignment_of_atss_begins(gt):
    """Nothing that ATSS holds for the box is below its threshold."""
    boxes = BOXES[2]
    only = GroundTruth.from_boxes([boxes], shape=(64, 64))
    assigned = ATSSAssigner(topk=9).assign(
        InstanceData(priors=torch.cat(ANCHORS)),
        [len(one) for one in ANCHORS],
        InstanceData(bboxes=boxes, labels=torch.zeros(1, dtype=torch.long)),
    )
    positive = assigned.gt_inds > 0
    iou = box_iou(torch.cat(ANCHORS), boxes)[:, 0]
    below = torch.cat(valuable_region(ANCHORS, only), 1)[0] > 0
    assert positive.any()
    assert below.any()
    aligned = distance_box_iou(torch.cat(ANCHORS), boxes)[:, 0] == iou
    assert not (positive & below & aligned).any()


def test_a_batch_without_boxes_has_no_region():
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=(64, 64))
    assert all((one == 0).all() for one in valuable_region(ANCHORS, gt))


def test_fewer_anchors_than_asked_for(gt):
    few = [ANCHORS[0], ANCHORS[1][:4]]
    found = valuable_region(few, gt, topk=9)
    torch.testing.assert_close(
        torch.cat([one[2] for one in found]), slow(few, BOXES[2], 9, 0.25)
    )

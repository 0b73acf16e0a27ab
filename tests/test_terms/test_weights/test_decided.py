from types import SimpleNamespace

import pytest
import rois
import tiny
import torch

from mmkd.taps import recording
from mmkd.terms.weights.decided import DecidedWeight, label_weights

LABELS = [torch.tensor([[3, 0, 3, 2]]), torch.tensor([[3]])]
ANCHORS = [torch.zeros(1, 4, 4), torch.zeros(1, 1, 4)]
WEIGHTS = [torch.tensor([[1.0, 0, 0, 2]]), torch.tensor([[0.0]])]


def step(scores, targets):
    outputs = {
        'bbox_head': (scores, ['boxes']),
        'bbox_head.get_targets': targets,
    }
    return SimpleNamespace(student=SimpleNamespace(at=outputs.get))


@pytest.mark.parametrize(
    'targets',
    [
        (LABELS, WEIGHTS, ANCHORS, 5),
        (ANCHORS, LABELS, WEIGHTS, ANCHORS, 5),
        (
            [one.flatten() for one in LABELS],
            [one.flatten() for one in WEIGHTS],
        ),
    ],
    ids=['retina', 'gfl', 'flat'],
)
def test_one_where_the_label_has_a_weight(targets):
    """Wherever among a head's targets the weights stand."""
    scores = [torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 1, 1)]
    found = DecidedWeight()(step(scores, targets))
    assert [one.tolist() for one in found] == [[[[[1, 0], [0, 1]]]], [[[[0]]]]]


def test_an_anchor_that_is_decided_is_enough():
    scores = [torch.zeros(1, 2 * 3, 2, 1)]  # two anchors of two cells
    labels, weights = (
        torch.tensor([[0, 3, 3, 3]]),
        torch.tensor([[0, 1.0, 0, 0]]),
    )
    found = DecidedWeight()(step(scores, ([labels], [weights])))
    assert found[0].tolist() == [[[[1], [0]]]]


def test_a_head_without_such_weights_leaves_nothing_open():
    found = label_weights((LABELS, ANCHORS))
    assert [one.tolist() for one in found] == [[[1, 1, 1, 1]], [[1]]]
    assert all(one.dtype == torch.float32 for one in found)


def test_what_lies_between_the_thresholds_and_in_the_border_is_open():
    """Of RetinaNet's own assignment, cell by cell."""
    model = tiny.retinanet()
    model['train_cfg']['assigner'].update(
        pos_iou_thr=0.6, neg_iou_thr=0.1, match_low_quality=False
    )
    student = tiny.build(model).train()
    images, samples = tiny.batch(shapes=((128, 128), (64, 96)))
    samples[1].set_metainfo(dict(pad_shape=(64, 96)))
    paths = ['bbox_head', 'bbox_head.get_targets']
    with recording(student, paths) as record:
        student.loss(images, samples)
    found = DecidedWeight()(SimpleNamespace(student=record))
    anchors = student.bbox_head.prior_generator.grid_priors(
        [one.shape[-2:] for one in found], device='cpu'
    )
    reasons = dict(border=0, between=0)
    for image, sample in enumerate(samples):
        height, width = sample.metainfo['pad_shape']
        boxes = sample.gt_instances.bboxes.tolist()
        for level, (weight, priors) in enumerate(zip(found, anchors)):
            stride = 8 << level
            for cell, prior in enumerate(priors.tolist()):
                y, x = divmod(cell, weight.shape[-1])
                border = y * stride >= height or x * stride >= width
                between = 0.1 <= max(iou(prior, box) for box in boxes) < 0.6
                assert weight[image, 0, y, x] == (not border and not between)
                reasons['border'] += border
                reasons['between'] += between and not border
    assert min(reasons.values()) > 5


def iou(one, other):
    sides = [
        max(min(one[i + 2], other[i + 2]) - max(one[i], other[i]), 0)
        for i in (0, 1)
    ]
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (one, other)]
    inside = sides[0] * sides[1]
    return inside / (sum(areas) - inside)


def test_a_student_without_an_assignment_is_refused(tmp_path):
    file = tmp_path / 'teacher.pth'
    tiny.save_teacher(rois.faster(), file)
    big = dict(config=dict(model=rois.faster()), checkpoint=str(file))
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        weight=dict(type='mmkd.DecidedWeight', tap='neck'),
        loss=dict(type='mmkd.WeightedMSELoss'),
    )
    model = tiny.distilled(rois.faster(), dict(big=big), dict(x=term))
    with pytest.raises(ValueError, match='DecidedWeight .* Use weight=dict'):
        tiny.build(model)

import heads
import pytest
import tiny
import torch

from mmkd.structures import GroundTruth
from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.seen import Seen, dense_head, response_gaps, seen


def one_cell(logits, corners, shape=(8, 8)):
    """Predictions of a single anchor in each of N images."""
    logits = torch.tensor(logits)
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * len(logits), shape=shape)
    scores = (logits[:, :, None, None],)
    corners = torch.tensor(corners)[:, None]
    return Seen(gt, (), scores, corners, logits.shape[1])


BOX = [0.0, 0, 4, 4]


def test_gaps_by_hand():
    own = one_cell([[0.0, 2.0]], [[0.0, 0, 4, 2]])
    other = one_cell([[2.0, 2.0]], [BOX])
    scores, boxes = response_gaps('X', own, other, temperature=2.0)
    p = 1 / (1 + torch.tensor(-1.0).exp())
    divergence = p * (p / 0.5).log() + (1 - p) * ((1 - p) / 0.5).log()
    torch.testing.assert_close(scores, 4 * divergence[None])
    torch.testing.assert_close(boxes, torch.tensor([0.5]))  # half as high


def test_equal_predictions_have_no_gap():
    one = one_cell([[1.0, -2.0], [0.0, 3.0]], [BOX, BOX])
    for gap in response_gaps('X', one, one, temperature=3.0):
        assert torch.equal(gap, torch.zeros(2))


def test_the_teacher_says_which_anchors_count():
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], shape=(8, 16))
    corners = torch.tensor([[BOX, BOX]])

    def predictions(left, right):
        return Seen(
            gt, (), (torch.tensor([[[[left, right]]]]),), corners, classes=1
        )

    sure, unsure = 9.0, -9.0
    other = predictions(sure, unsure)
    wrong_there = response_gaps('X', predictions(0.0, unsure), other, 1.0)[0]
    wrong_elsewhere = response_gaps('X', predictions(sure, 0.0), other, 1.0)[0]
    assert wrong_there > 100 * wrong_elsewhere


def test_no_gradient_reaches_who_teaches():
    own, other = (
        Seen(
            one_cell([[0.0]], [BOX]).gt,
            (),
            (torch.randn(1, 1, 1, 1, requires_grad=True),),
            torch.tensor([[[0.0, 0, 4, 3]]], requires_grad=True),
            1,
        )
        for _ in range(2)
    )
    sum(one.sum() for one in response_gaps('X', own, other, 1.0)).backward()
    assert own.scores[0].grad.abs().sum() > 0
    assert other.scores[0].grad is None
    assert other.corners.grad is None


@pytest.mark.parametrize('kind', ['retinanet', 'gfl', 'atss', 'fcos'])
def test_anchors_scores_and_boxes_are_in_one_order(kind):
    model = tiny.build(getattr(heads, kind)()).eval()
    images, samples = tiny.batch()
    gt = GroundTruth.from_samples(samples, images)
    with torch.no_grad(), recording(model, ['bbox_head']) as record:
        run_detector(model, images, samples)
        found = seen(record, gt)
    logits, corners = found.logits(), found.corners
    assert logits.shape[:2] == corners.shape[:2]
    assert logits.shape[2] == tiny.CLASSES
    # Of the finest level the cell in row 2, column 1.
    columns = found.scores[0].shape[3]
    anchors = found.scores[0].shape[1] // tiny.CLASSES
    at = (2 * columns + 1) * anchors
    torch.testing.assert_close(
        logits[0, at], found.scores[0][0, : tiny.CLASSES, 2, 1]
    )
    middle = (corners[0, at, :2] + corners[0, at, 2:]) / 2
    assert (middle - torch.tensor([12.0, 20.0])).abs().max() < 8


def test_anchors_of_the_border_do_not_count():
    images, samples = tiny.batch()
    gt = GroundTruth.from_samples(samples, images)
    scores = (torch.zeros(2, 3, 16, 16),)
    found = Seen(gt, (), scores, torch.zeros(2, 256, 4), 3)
    assert found.valid()[0].sum() == 256
    assert found.valid()[1].sum() == 12 * 14
    assert found.anchor_weight()[1].count_nonzero() == 12 * 14


def test_a_head_of_softmax_is_refused():
    model = tiny.retinanet()
    model.bbox_head.loss_cls = dict(type='CrossEntropyLoss')
    with pytest.raises(ValueError, match='softmax'):
        dense_head('X', tiny.build(model), 'bbox_head', 'student')


def test_energy_is_one_on_average_and_told_by_place():
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], shape=(64, 64))
    strong = torch.ones(1, 4, 16, 16)
    strong[..., :2, :2] = 5
    (energy,) = Seen(gt, (strong,)).energy()
    assert energy.mean().item() == pytest.approx(1)
    torch.testing.assert_close(energy[0] / energy[1:], torch.full((63,), 25.0))

import pytest
import torch

from mmkd.ops.fusion import fuse_boxes

A = [0.0, 0, 10, 10]
NEAR_A = [0.0, 0, 10, 14]
FAR = [50.0, 50, 60, 60]


def fuse(boxes, scores, labels=None, count=2, **settings):
    labels = [0] * len(boxes) if labels is None else labels
    return fuse_boxes(
        torch.tensor(boxes).view(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.long),
        count,
        **settings,
    )


def test_nms_keeps_the_best_as_it_is():
    boxes, scores, _ = fuse([A, NEAR_A, FAR], [0.5, 0.8, 0.3])
    assert boxes.tolist() == [NEAR_A, FAR]
    assert scores.tolist() == pytest.approx([0.8, 0.3])


def test_fused_boxes_are_means_by_score():
    boxes, scores, _ = fuse([A, NEAR_A], [0.6, 0.2], how='wbf')
    # (0.6 * 10 + 0.2 * 14) / 0.8
    assert boxes[0].tolist() == pytest.approx([0, 0, 10, 11])
    assert scores.tolist() == pytest.approx([0.4])


def test_what_one_of_two_has_seen_counts_half():
    _, scores, _ = fuse([A, A, FAR], [0.9, 0.7, 0.9], how='wbf')
    assert scores.tolist() == pytest.approx([0.8, 0.45])


def test_more_boxes_than_detectors_are_averaged():
    _, scores, _ = fuse([A] * 4, [0.8, 0.6, 0.4, 0.2], how='wbf')
    assert scores.tolist() == pytest.approx([0.5])


@pytest.mark.parametrize('how', ['nms', 'wbf'])
def test_classes_are_apart(how):
    boxes, _, labels = fuse([A, A], [0.6, 0.4], [2, 1], how=how)
    assert boxes.tolist() == [A, A]
    assert labels.tolist() == [2, 1]


def test_the_threshold_says_what_is_the_same():
    assert len(fuse([A, NEAR_A], [0.6, 0.2], iou_threshold=0.7)[0]) == 1
    assert len(fuse([A, NEAR_A], [0.6, 0.2], iou_threshold=0.8)[0]) == 2


def test_the_best_comes_first():
    _, scores, labels = fuse(
        [A, FAR, FAR], [0.9, 0.6, 0.8], [3, 4, 4], how='wbf'
    )
    assert labels.tolist() == [4, 3]  # both have seen the far one
    assert scores.tolist() == pytest.approx([0.7, 0.45])


@pytest.mark.parametrize('how', ['nms', 'wbf'])
def test_nothing_stays_nothing(how):
    boxes, scores, labels = fuse([], [], how=how)
    assert (len(boxes), len(scores), len(labels)) == (0, 0, 0)

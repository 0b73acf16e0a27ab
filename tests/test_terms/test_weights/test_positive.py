from types import SimpleNamespace

import pytest
import torch

from mmkd.terms.weights.positive import (
    PositiveWeight,
    best,
    spread,
)


def step(scores, targets, classes=3):
    outputs = {'bbox_head': (scores, ['boxes'])}
    outputs['bbox_head.get_targets'] = targets
    head = SimpleNamespace(num_classes=classes)
    return SimpleNamespace(
        student=SimpleNamespace(
            at=outputs.get, detector=SimpleNamespace(bbox_head=head)
        )
    )


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 2, 2), torch.randn(2, 3, 1, 1)]


@pytest.fixture
def labels():
    """3 is background, and -1 is ignored."""
    return [
        torch.tensor([[3, 0, 3, 2], [3, 3, 1, -1]]),
        torch.tensor([[3], [2]]),
    ]


ANCHORS = [torch.zeros(2, 4, 4), torch.zeros(2, 1, 4)]


@pytest.mark.parametrize('first', [True, False])
def test_objects_count_and_nothing_else(scores, labels, first):
    """Wherever among a head's targets the labels stand."""
    targets = (ANCHORS, labels, 5) if first else (labels, ANCHORS, 5)
    found = PositiveWeight(score=False)(step(scores, targets))
    assert found[0][:, 0].tolist() == [[[0, 1], [0, 1]], [[0, 0], [1, 0]]]
    assert found[1].flatten().tolist() == [0, 1]


def test_they_count_as_the_student_believes_in_them(scores, labels):
    found = PositiveWeight()(step(scores, (ANCHORS, labels)))
    expected = scores[0][1, :, 1, 0].max().sigmoid()
    torch.testing.assert_close(found[0][1, 0, 1, 0], expected)
    assert found[0][1].sum() == found[0][1, 0, 1, 0]


def test_labels_may_lie_flat_image_by_image(scores, labels):
    flat = [one.flatten() for one in labels]
    one, other = (PositiveWeight()(step(scores, (x,))) for x in (labels, flat))
    assert all(map(torch.equal, one, other))


def test_anchors_of_a_cell_are_maps_of_their_own():
    scores = [torch.randn(1, 2 * 3, 2, 1)]
    labels = [torch.tensor([[3, 0, 3, 1]])]  # two anchors of two cells
    found = PositiveWeight(score=False)(step(scores, (labels,)))
    assert found[0].shape == (1, 2, 2, 1)
    assert found[0][0, :, :, 0].tolist() == [[0, 0], [1, 1]]
    weighed = PositiveWeight()(step(scores, (labels,)))
    torch.testing.assert_close(
        weighed[0][0, 1, 0, 0], scores[0][0, 3:, 0, 0].max().sigmoid()
    )


def test_best_is_over_the_classes_of_an_anchor():
    scores = torch.arange(6.0).reshape(1, 6, 1, 1)
    expected = torch.tensor([2.0, 5.0]).sigmoid()
    torch.testing.assert_close(best(scores, 2).flatten(), expected)


def test_spread_keeps_rows():
    values = torch.arange(6)[None]
    maps = spread(values, torch.zeros(1, 1, 2, 3))
    assert maps[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]

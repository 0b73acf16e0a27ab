"""Which query belongs to which: by hand, by trying everything."""

import itertools

import pytest
import torch
from mmdet.models.task_modules.assigners import (
    ClassificationCost,
    FocalLossCost,
)
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from mmengine.structures import InstanceData

from mmkd.losses.query import query_class_divergence
from mmkd.ops.matching import (
    assign,
    pairwise_box_cost,
    pairwise_class_divergence,
    pairwise_label_cost,
    pick_queries,
)


@pytest.fixture
def boxes():
    torch.manual_seed(0)
    return torch.rand(2, 2, 5, 4) * 0.5 + 0.2


def test_the_cost_is_that_of_detr(boxes):
    cost = pairwise_box_cost(boxes[0], boxes[1], 5.0, 2.0)
    one, other = boxes[0, 1, 3], boxes[1, 1, 2]
    near = bbox_overlaps(
        bbox_cxcywh_to_xyxy(one[None]),
        bbox_cxcywh_to_xyxy(other[None]),
        mode='giou',
    )
    expected = 5 * (one - other).abs().sum() + 2 * (1 - near)
    assert cost[1, 3, 2].item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_other_assignment_is_cheaper():
    torch.manual_seed(0)
    cost = torch.rand(3, 5, 4)
    rows, found = assign(cost)
    assert found.all()
    for table, row in zip(cost, rows):
        total = table[row, torch.arange(4)].sum().item()
        best = min(
            sum(table[one, column].item() for column, one in enumerate(tried))
            for tried in itertools.permutations(range(5), 4)
        )
        assert total == pytest.approx(best)
        assert len(set(row.tolist())) == 4


def test_with_fewer_rows_the_dearest_columns_go_without():
    rows, found = assign(torch.tensor([[[5.0, 1.0, 9.0]]]))
    assert found.tolist() == [[False, True, False]]
    assert rows.tolist() == [[0, 0, 0]]


def test_what_is_not_finite_is_dear():
    nan = float('nan')
    rows, _ = assign(torch.tensor([[[nan, 1.0], [2.0, nan]]]))
    assert rows.tolist() == [[1, 0]]


def test_queries_are_picked_image_by_image():
    values = torch.arange(12.0).view(1, 2, 3, 2)  # L, N, Q, K
    picked = pick_queries(values, torch.tensor([[2, 0], [1, 1]]))
    assert picked.tolist() == [
        [[[4, 5], [0, 1]], [[8, 9], [8, 9]]],
    ]


# Classes ---------------------------------------------------------------------


@pytest.mark.parametrize('softmax', [True, False])
def test_divergence_of_all_pairs_is_that_of_each(softmax):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    expected = query_class_divergence(
        student[:, :, None], teacher[:, None], softmax
    )
    found = pairwise_class_divergence(student, teacher, softmax)
    torch.testing.assert_close(found, expected)


def test_divergence_of_all_pairs_bears_large_logits():
    logits = torch.tensor([[[80.0, -90.0], [-90.0, 80.0]]])
    found = pairwise_class_divergence(logits, logits)[0]
    assert found.isfinite().all()
    assert found.diagonal().tolist() == [0, 0]
    assert found[0, 1] > 100


@pytest.mark.parametrize('softmax', [True, False])
def test_label_cost_is_that_of_mmdet(softmax):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([2, 0])
    cost = ClassificationCost(1) if softmax else FocalLossCost(eps=1e-8)
    expected = cost(InstanceData(scores=logits), InstanceData(labels=labels))
    found = pairwise_label_cost(logits[None], labels[None], softmax)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize('softmax', [False, True])
def test_no_rounding_makes_a_divergence_negative(softmax):
    torch.manual_seed(0)
    logits = 5 * torch.randn(1, 200, 40)
    found = pairwise_class_divergence(logits, logits, softmax)
    assert (found >= 0).all()
    assert found[0].diagonal().max() < 1e-3

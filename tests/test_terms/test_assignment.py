from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS

from mmkd.terms.assignment import (
    assigned_labels,
    check_assigns,
    count_positives,
)


def step(targets):
    def at(path):
        assert path == 'rpn_head.get_targets'
        return targets

    return SimpleNamespace(student=SimpleNamespace(at=at))


def test_labels_are_the_first_whole_numbers_level_by_level():
    labels = [torch.tensor([0, 3]), torch.tensor([1])]
    anchors = [torch.zeros(2, 4), torch.zeros(1, 4)]
    others = [torch.tensor([9, 9]), torch.tensor([9])]
    found = assigned_labels(step((anchors, labels, others, 5)), 'rpn_head')
    assert found is labels


def test_a_head_that_assigns_none_is_an_error():
    with pytest.raises(ValueError, match='assigns no labels'):
        assigned_labels(step((torch.zeros(3), 4)), 'rpn_head')


def test_positives_are_the_labels_of_classes():
    labels = [torch.tensor([[0, 2, 3, -1]]), torch.tensor([[1, 3]])]
    assert count_positives(labels, 3) == 3
    assert count_positives([torch.tensor([3, -1])], 3) == 1


def test_masks_are_no_labels():
    """AutoAssign's say which anchors lie inside of boxes."""
    inside = [torch.tensor([[True, False]])]
    with pytest.raises(ValueError, match='assigns no labels'):
        assigned_labels(step((inside, [torch.zeros(1, 2)])), 'rpn_head')


@pytest.mark.parametrize(
    'name',
    ['AutoAssignHead', 'DDODHead', 'RepPointsHead', 'YOLOV3Head'],
)
def test_heads_whose_labels_cannot_be_read_are_refused(name):
    kind = MODELS.get(name)
    head = kind.__new__(kind)
    torch.nn.Module.__init__(head)
    with pytest.raises(ValueError, match=f"BoxTerm.*student's {name}.*Do so"):
        check_assigns('BoxTerm', head, 'Do so.')


def test_labels_image_by_image_can_be_counted_and_not_placed():
    kind = MODELS.get('LADHead')
    head = kind.__new__(kind)
    torch.nn.Module.__init__(head)
    check_assigns('BoxTerm', head, '')
    with pytest.raises(ValueError, match='LADHead assigns'):
        check_assigns('PositiveWeight', head, '', places=True)


def test_a_head_must_have_targets():
    head = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="student's Linear"):
        check_assigns('BoxTerm', head, '')
    head.get_targets = print
    check_assigns('BoxTerm', head, '')

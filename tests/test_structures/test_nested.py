from collections import namedtuple

import pytest
import torch

from mmkd.structures.nested import apply, join, leaves, pick

Pair = namedtuple('Pair', 'scores boxes')
A, B = torch.arange(4.0).reshape(2, 2), torch.arange(3.0).reshape(1, 3)


def equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            equal(one[key], other[key]) for key in one
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


VALUES = [A, (A, B), [A, [B]], dict(a=A, b=(B, None)), Pair(A, B)]


@pytest.mark.parametrize('value', VALUES, ids=str)
def test_structures_are_kept(value):
    assert equal(apply(lambda one: one, value), value)
    doubled = apply(lambda one: 2 * one, value)
    assert all(
        torch.equal(one, 2 * other)
        for one, other in zip(leaves(doubled), leaves(value))
    )


@pytest.mark.parametrize('value', VALUES, ids=str)
def test_what_is_picked_apart_joins_again(value):
    parts = [pick(value, slice(1)), pick(value, slice(1, None))]
    assert [len(one) for one in leaves(parts[0])] == [1] * len(leaves(value))
    assert equal(join(parts), value)


def test_leaves_stand_from_left_to_right():
    assert [len(one) for one in leaves([A, dict(x=(B, 'no'))])] == [2, 1]


def test_different_structures_do_not_join():
    with pytest.raises(ValueError, match='zip'):
        join([(A,), (A, B)])

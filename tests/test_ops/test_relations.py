import math

import pytest
import torch

from mmkd.ops.relations import (
    products,
    relation_divergence,
    row_divergence,
)


@pytest.fixture
def tokens():
    """Two groups of five tokens; widths 4 and 6."""
    torch.manual_seed(0)
    return torch.randn(2, 5, 4), 2 * torch.randn(2, 5, 6)


VALID = torch.tensor([[True] * 5, [True, True, False, True, False]])


def rotation(channels):
    return torch.linalg.qr(torch.randn(channels, channels))[0]


def softmax(row):
    total = sum(math.exp(one) for one in row)
    return [math.exp(one) / total for one in row]


def literal(student, teacher, valid):
    """Token by token, what is not there left out."""
    values = []
    for own, other, there in zip(student, teacher, valid):
        both = []
        for one in (own[there].tolist(), other[there].tolist()):
            root = math.sqrt(len(one[0]))
            both.append(
                [
                    softmax(
                        [sum(map(math.prod, zip(a, b))) / root for b in one]
                    )
                    for a in one
                ]
            )
        for s, t in zip(*both):
            values.append(sum(q * math.log(q / p) for p, q in zip(s, t)))
    return sum(values) / len(values)


@pytest.mark.parametrize('valid', [torch.ones(2, 5, dtype=bool), VALID])
def test_equals_a_literal_loop(tokens, valid):
    found = relation_divergence(*tokens, valid)
    assert found.item() == pytest.approx(literal(*tokens, valid), rel=1e-4)


def test_all_are_there_if_nothing_is_said(tokens):
    torch.testing.assert_close(
        relation_divergence(*tokens),
        relation_divergence(*tokens, torch.ones(2, 5)),
    )


def test_rows_of_the_relation_sum_to_one(tokens):
    rows = products(tokens[1]).softmax(-1)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 5))


def test_a_row_by_hand():
    # Against a half each: log 2 + 3/4 log 3/4 + 1/4 log 1/4.
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    torch.testing.assert_close(
        row_divergence(student, teacher), torch.tensor([expected])
    )


def test_the_divergence_is_from_the_teacher(tokens):
    logits = products(tokens[0]), products(tokens[1])
    assert not torch.allclose(
        row_divergence(*logits), row_divergence(*reversed(logits))
    )


def test_a_rotation_of_the_channels_changes_nothing(tokens):
    student, teacher = tokens
    before = relation_divergence(student, teacher)
    torch.testing.assert_close(
        relation_divergence(student, teacher @ rotation(6)), before
    )
    torch.testing.assert_close(
        relation_divergence(teacher @ rotation(6), teacher),
        torch.tensor(0.0),
        atol=1e-5,
        rtol=0,
    )


def test_one_order_of_tokens_is_as_good_as_another(tokens):
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        relation_divergence(*(one[:, order] for one in tokens), VALID),
        relation_divergence(*tokens, VALID[:, order.argsort()]),
    )


def test_what_is_not_there_has_no_influence(tokens):
    student, teacher = (one.clone() for one in tokens)
    before = relation_divergence(student, teacher, VALID)
    student[~VALID], teacher[~VALID] = 9.0, -7.0
    torch.testing.assert_close(
        relation_divergence(student, teacher, VALID), before
    )


def test_nothing_there_costs_nothing_and_is_finite(tokens):
    student, teacher = tokens
    student.requires_grad_()
    found = relation_divergence(student, teacher, torch.zeros(2, 5))
    found.backward()
    assert found == 0
    assert (student.grad == 0).all()

import math

import pytest
import torch

from mmkd.ops.contrast import supervised_contrast


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(6, 4)


LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def literal(vectors, labels, temperature):
    """One vector after another; the one of class 2 has no other."""
    rows = [(one / one.norm()).tolist() for one in vectors]
    similar = [
        [sum(p * q for p, q in zip(a, b)) / temperature for b in rows]
        for a in rows
    ]
    values = []
    for i, label in enumerate(labels.tolist()):
        others = [j for j in range(len(rows)) if j != i]
        positive = [j for j in others if labels[j] == label]
        if not positive:
            continue
        below = math.log(sum(math.exp(similar[i][j]) for j in others))
        terms = [below - similar[i][j] for j in positive]
        values.append(sum(terms) / len(terms))
    return sum(values) / len(values)


@pytest.mark.parametrize('temperature', [0.07, 0.5])
def test_equals_a_literal_loop(vectors, temperature):
    found = supervised_contrast(vectors, LABELS, temperature)
    expected = literal(vectors, LABELS, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_two_of_a_class_and_one_beside_by_hand():
    # Each of the two sees the other with e^1 and the third with e^0.
    vectors = torch.tensor([[1.0, 0], [3, 0], [0, 2]])
    found = supervised_contrast(vectors, torch.tensor([0, 0, 1]), 1.0)
    torch.testing.assert_close(found, torch.tensor(math.log1p(math.exp(-1))))


def test_a_pair_of_one_class_costs_less_when_pulled_together(vectors):
    before = supervised_contrast(vectors, LABELS, 0.1)
    nearer = vectors.clone()
    nearer[4] = (nearer[4] + 2 * nearer[1]) / 3
    assert supervised_contrast(nearer, LABELS, 0.1) < before


def test_labels_count(vectors):
    one, other = (
        supervised_contrast(vectors, labels, 0.1)
        for labels in (LABELS, LABELS.flip(0))
    )
    assert not torch.isclose(one, other)


def test_lengths_do_not_matter(vectors):
    lengths = torch.tensor([1.0, 2, 5, 0.1, 3, 7])[:, None]
    torch.testing.assert_close(
        supervised_contrast(lengths * vectors, LABELS, 0.1),
        supervised_contrast(vectors, LABELS, 0.1),
    )


@pytest.mark.parametrize(
    ('count', 'labels'), [(0, []), (1, [0]), (3, [0, 1, 2])]
)
def test_nothing_that_belongs_together_costs_nothing(vectors, count, labels):
    vectors = vectors[:count].requires_grad_()
    found = supervised_contrast(
        vectors, torch.tensor(labels, dtype=torch.long), 0.1
    )
    assert found == 0
    (grad,) = torch.autograd.grad(found, vectors)
    assert (grad == 0).all()

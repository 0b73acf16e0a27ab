import math

import pytest
import torch

from mmkd.losses.dkd import DKDLoss, dkd_loss
from mmkd.structures import GroundTruth

SHAPE = (32, 48)
SIZES = ((4, 6), (2, 3))


@pytest.fixture
def samples():
    """Logits of both sides and labels, one sample without."""
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 6, 4)
    return student, teacher, torch.tensor([0, 3, 1, -1, 2, 3])


@pytest.fixture
def pyramid():
    """Two levels of two anchors and three classes."""
    torch.manual_seed(0)
    return tuple(
        tuple(2 * torch.randn(2, 6, *size) for size in SIZES) for _ in range(2)
    )


@pytest.fixture
def gt():
    """A small box of class 2 in a large one of class 1; one of class 0."""
    return GroundTruth.from_boxes(
        [
            torch.tensor([[8.0, 8, 16, 16], [0, 0, 24, 24]]),
            torch.tensor([[16.0, 8, 48, 32]]),
        ],
        shape=SHAPE,
        labels=[torch.tensor([2, 1]), torch.tensor([0])],
        image_shapes=[SHAPE, (16, 24)],
    )


def softmax(values, temperature=1.0):
    weights = [math.exp(one / temperature) for one in values]
    return [one / sum(weights) for one in weights]


def divergence(teacher, student):
    return sum(t * math.log(t / s) for s, t in zip(student, teacher))


def literal(student, teacher, label, temperature):
    """Both parts of one sample."""
    both = [softmax(one, temperature) for one in (teacher, student)]
    coins = [[p[label], 1 - p[label]] for p in both]
    others = [
        [one / (1 - p[label]) for c, one in enumerate(p) if c != label]
        for p in both
    ]
    return (
        temperature**2 * divergence(*coins),
        temperature**2 * divergence(*others),
    )


def means(samples, temperature):
    """Of (student, teacher, label) lists."""
    parts = [literal(*one, temperature) for one in samples]
    return [sum(part) / len(parts) for part in zip(*parts)]


# The formula -----------------------------------------------------------------


def test_three_classes_by_hand():
    # The teacher has 1/2, 1/4 and 1/4; the student 1/4, 1/4 and 1/2.
    teacher = torch.tensor([[2.0, 1.0, 1.0]]).log()
    student = torch.tensor([[1.0, 1.0, 2.0]]).log()
    target, others = dkd_loss(student, teacher, torch.tensor([0]))
    # Halves against 1/4 and 3/4, halves against 1/3 and 2/3.
    assert target.item() == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )
    assert others.item() == pytest.approx(
        0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    )


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_equals_a_literal_loop_over_labelled_samples(samples, temperature):
    student, teacher, labels = samples
    rows = [
        (one.tolist(), other.tolist(), label)
        for one, other, label in zip(student, teacher, labels.tolist())
        if label >= 0
    ]
    for value, expected in zip(
        dkd_loss(student, teacher, labels, temperature),
        means(rows, temperature),
    ):
        assert value.item() == pytest.approx(expected, rel=1e-4)


def test_coupled_again_it_is_the_divergence_of_softmaxes(samples):
    """The equation that the paper starts from."""
    student, teacher, labels = samples
    for one, other, label in zip(student, teacher, labels.clamp(min=0)):
        target, others = dkd_loss(one[None], other[None], label[None])
        rest = 1 - other.softmax(0)[label]
        plain = (
            other.softmax(0) * (other.log_softmax(0) - one.log_softmax(0))
        ).sum()
        torch.testing.assert_close(target + rest * others, plain)


def test_with_two_classes_there_is_no_other_to_compare():
    student, teacher = torch.randn(2, 5, 2)
    target, others = dkd_loss(student, teacher, torch.tensor([0, 1, 1, 0, 1]))
    assert others.item() == 0
    assert target > 0.01


def test_equal_logits_cost_nothing_and_an_offset_is_none(samples):
    student, teacher, labels = samples
    offset = torch.arange(6.0)[:, None]
    for part in dkd_loss(teacher + offset, teacher, labels):
        assert part.item() == pytest.approx(0, abs=1e-5)
    for one, other in zip(
        dkd_loss(student + offset, teacher - offset, labels),
        dkd_loss(student, teacher, labels),
    ):
        torch.testing.assert_close(one, other)
        assert other > 0.01


def test_the_parts_do_not_see_each_other(samples):
    """Moving the target's logit leaves the others, and the reverse."""
    student, teacher, labels = samples
    target, others = dkd_loss(student, teacher, labels)
    index = labels.clamp(min=0)[:, None]
    moved = student.scatter_add(1, index, torch.ones(6, 1))
    changed = dkd_loss(moved, teacher, labels)
    torch.testing.assert_close(changed[1], others)
    assert changed[0] != target
    # Two others that exchange their logits keep the target's probability.
    swapped = student.clone()
    for row, label in enumerate(index[:, 0].tolist()):
        first, second = [c for c in range(4) if c != label][:2]
        swapped[row, [first, second]] = student[row, [second, first]]
    changed = dkd_loss(swapped, teacher, labels)
    torch.testing.assert_close(changed[0], target)
    assert changed[1] != others


def test_gradients_are_differences_of_probabilities():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 4)
    student.requires_grad_()
    label = torch.tensor([1])
    target, others = dkd_loss(student, teacher, label, 2.0)
    (grad,) = torch.autograd.grad(others, student, retain_graph=True)
    rest = [0, 2, 3]
    expected = 2 * (
        (student[:, rest] / 2).softmax(1) - (teacher[:, rest] / 2).softmax(1)
    )
    torch.testing.assert_close(grad[:, rest], expected.detach())
    assert grad[0, 1] == 0
    (grad,) = torch.autograd.grad(target, student)
    gap = (student / 2).softmax(1)[0, 1] - (teacher / 2).softmax(1)[0, 1]
    torch.testing.assert_close(grad[0, 1], 2 * gap.detach())
    torch.testing.assert_close(grad.sum(), torch.tensor(0.0))


def test_without_a_label_it_is_zero_and_keeps_its_graph(samples):
    student, teacher, labels = samples
    student.requires_grad_()
    target, others = dkd_loss(student, teacher, torch.full_like(labels, -1))
    (target + others).backward()
    assert target.item() == others.item() == 0
    assert (student.grad == 0).all()


# The module ------------------------------------------------------------------

#: Cells that count and their class, (level, image, row, column): class.
#: The second image is 16 x 24 of 32 x 48.
CELLS = {
    **{(0, 0, y, x): 1 for y in range(3) for x in range(3)},
    (0, 0, 1, 1): 2,
    **{(1, 0, y, x): 1 for y in range(2) for x in range(2)},
    (1, 0, 0, 0): 2,
    (0, 1, 1, 2): 0,
    (1, 1, 0, 1): 0,
}


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_equals_a_literal_loop_over_cells_and_anchors(
    pyramid, gt, temperature
):
    rows = [
        [
            side[level][n, anchor : anchor + 3, y, x].tolist()
            for side in pyramid
        ]
        + [label]
        for (level, n, y, x), label in CELLS.items()
        for anchor in (0, 3)
    ]
    target, others = means(rows, temperature)
    loss = DKDLoss(
        num_classes=3,
        temperature=temperature,
        target_weight=3.0,
        other_weight=5.0,
        loss_weight=0.5,
    )
    parts = loss(*pyramid, gt)
    assert list(parts) == ['target', 'others']
    assert parts['target'].item() == pytest.approx(0.5 * 3 * target, rel=1e-4)
    assert parts['others'].item() == pytest.approx(0.5 * 5 * others, rel=1e-4)


def test_weights_are_the_published_ones(pyramid, gt):
    plain = DKDLoss(3, target_weight=1.0, other_weight=1.0)(*pyramid, gt)
    parts = DKDLoss(3)(*pyramid, gt)
    torch.testing.assert_close(parts['target'], plain['target'])
    torch.testing.assert_close(parts['others'], plain['others'] / 4)


def test_cells_outside_all_boxes_have_no_gradient(pyramid, gt):
    student = tuple(one.clone().requires_grad_() for one in pyramid[0])
    sum(DKDLoss(3)(student, pyramid[1], gt).values()).backward()
    for level, one in enumerate(student):
        for n, y, x in torch.cartesian_prod(
            *(torch.arange(s) for s in (2, *one.shape[-2:]))
        ).tolist():
            moved = (one.grad[n, :, y, x] != 0).all().item()
            still = (one.grad[n, :, y, x] == 0).all().item()
            counts = (level, n, y, x) in CELLS
            assert (moved, still) == (counts, not counts)


def test_padding_and_ignored_boxes_count_on_demand(pyramid):
    student, teacher = pyramid
    gt = GroundTruth.from_boxes(
        [torch.tensor([[0.0, 0, 48, 32]])] * 2,
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
        ignored=[torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)],
    )
    for name, index in (
        ('keep_padding', (1, slice(None), 3, 5)),
        ('keep_ignored', (0, slice(None), 0, 0)),
    ):
        changed = (student[0].clone(), student[1])
        changed[0][index] = -changed[0][index]
        for keep in (False, True):
            loss = DKDLoss(3, **{name: keep})
            before = loss(student, teacher, gt)['target']
            after = loss(changed, teacher, gt)['target']
            assert (before == after).item() is not keep


def test_contradictions_in_half_precision_stay_finite():
    gt = GroundTruth.from_boxes(
        [torch.tensor([[0.0, 0, 48, 32]])],
        shape=SHAPE,
        labels=[torch.tensor([1])],
    )
    teacher = torch.full((1, 4, 4, 6), 300.0, dtype=torch.half)
    teacher[:, ::2] *= -1
    for factor in (-1, 1):
        student = (factor * teacher).requires_grad_()
        parts = DKDLoss()((student,), (teacher,), gt)
        sum(parts.values()).backward()
        assert all(part.isfinite() for part in parts.values())
        assert student.grad.isfinite().all()
        assert (parts['others'] > 100).item() is (factor == -1)


def test_settings_that_do_not_fit_are_refused(pyramid, gt):
    with pytest.raises(ValueError, match='DKDLoss needs temperature > 0'):
        DKDLoss(temperature=0)
    with pytest.raises(ValueError, match='DKDLoss .* num_classes=4'):
        DKDLoss(num_classes=4)(*pyramid, gt)
    with pytest.raises(ValueError, match='DKDLoss .* SoftTargetLoss'):
        DKDLoss(num_classes=1)(*pyramid, gt)
    with pytest.raises(ValueError, match='DKDLoss .* gt=None'):
        DKDLoss(num_classes=3)(*pyramid)

import math

import pytest
import torch

from mmkd.losses.nkd import NKDLoss, nkd_loss
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
    """A box of class 2; the second image is 16 x 24 of 32 x 48."""
    return GroundTruth.from_boxes(
        [torch.tensor([[8.0, 8, 16, 24]]), torch.tensor([[16.0, 8, 48, 32]])],
        shape=SHAPE,
        labels=[torch.tensor([2]), torch.tensor([0])],
        image_shapes=[SHAPE, (16, 24)],
    )


#: Cells that count and their class, (level, image, row, column): class.
CELLS = {
    (0, 0, 1, 1): 2,
    (0, 0, 2, 1): 2,
    (1, 0, 0, 0): 2,
    (1, 0, 1, 0): 2,
    (0, 1, 1, 2): 0,
    (1, 1, 0, 1): 0,
}


def softmax(values, temperature=1.0):
    weights = [math.exp(one / temperature) for one in values]
    return [one / sum(weights) for one in weights]


def literal(student, teacher, label, temperature):
    """Both parts of one sample."""
    target = -softmax(teacher)[label] * math.log(softmax(student)[label])
    rest = [
        softmax([x for c, x in enumerate(side) if c != label], temperature)
        for side in (teacher, student)
    ]
    others = -sum(t * math.log(s) for t, s in zip(*rest))
    return target, temperature**2 * others


def means(samples, temperature):
    """Of (student, teacher, label) lists."""
    parts = [literal(*one, temperature) for one in samples]
    return [sum(part) / len(parts) for part in zip(*parts)]


# The formula -----------------------------------------------------------------


def test_three_classes_by_hand():
    # The teacher has 1/2, 1/4 and 1/4; the student 1/4, 1/4 and 1/2.
    teacher = torch.tensor([[2.0, 1.0, 1.0]]).log()
    student = torch.tensor([[1.0, 1.0, 2.0]]).log()
    target, others = nkd_loss(student, teacher, torch.tensor([0]))
    assert target.item() == pytest.approx(0.5 * math.log(4))
    # Halves, of a student with 1/3 and 2/3.
    assert others.item() == pytest.approx(
        0.5 * math.log(3) + 0.5 * math.log(3 / 2)
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
        nkd_loss(student, teacher, labels, temperature),
        means(rows, temperature),
    ):
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_the_target_is_the_students_own_loss_times_the_teachers_belief():
    torch.manual_seed(0)
    student, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    sure = 40 * torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(
        nkd_loss(student, sure, labels)[0],
        torch.nn.functional.cross_entropy(student, labels),
    )


def test_equal_others_stop_at_the_teachers_entropy():
    _, others = nkd_loss(
        torch.tensor([[-3.0, 1.0, 1.0, 1.0, 1.0]]),
        torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]]),
        torch.tensor([0]),
        temperature=2.0,
    )
    assert others.item() == pytest.approx(4 * math.log(4), rel=1e-5)


def test_an_offset_of_either_side_does_not_matter(samples):
    student, teacher, labels = samples
    offset = torch.arange(6.0)[:, None]
    for one, other in zip(
        nkd_loss(student + offset, teacher - offset, labels),
        nkd_loss(student, teacher, labels),
    ):
        torch.testing.assert_close(one, other)


def test_temperature_is_for_the_others_alone(samples):
    target, others = nkd_loss(*samples)
    changed = nkd_loss(*samples, temperature=3.0)
    assert changed[0] == target
    assert changed[1] != others


def test_gradient_of_the_others_vanishes_at_equality_that_of_the_target_not(
    samples,
):
    _, teacher, labels = samples
    student = teacher.clone().requires_grad_()
    target, others = nkd_loss(student, teacher, labels, 2.0)
    (grad,) = torch.autograd.grad(others, student, retain_graph=True)
    assert grad.abs().max() < 1e-6
    (grad,) = torch.autograd.grad(target, student)
    # p (p - 1) at the target, over the five labelled samples.
    index = labels.clamp(min=0)[:, None]
    p = teacher.softmax(1).gather(1, index)[:, 0]
    expected = torch.where(labels >= 0, p * (p - 1) / 5, 0)
    torch.testing.assert_close(grad.gather(1, index)[:, 0], expected)


def test_gradient_of_the_others_is_a_difference_of_probabilities():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 4)
    student.requires_grad_()
    _, others = nkd_loss(student, teacher, torch.tensor([1]), 2.0)
    others.backward()
    rest = [0, 2, 3]
    expected = 2 * (
        (student[:, rest] / 2).softmax(1) - (teacher[:, rest] / 2).softmax(1)
    )
    torch.testing.assert_close(student.grad[:, rest], expected.detach())
    assert student.grad[0, 1] == 0


def test_without_a_label_it_is_zero_and_keeps_its_graph(samples):
    student, teacher, labels = samples
    student.requires_grad_()
    target, others = nkd_loss(student, teacher, torch.full_like(labels, -1))
    (target + others).backward()
    assert target.item() == others.item() == 0
    assert (student.grad == 0).all()


# The module ------------------------------------------------------------------


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
    loss = NKDLoss(
        num_classes=3,
        temperature=temperature,
        other_weight=5.0,
        loss_weight=0.5,
    )
    parts = loss(*pyramid, gt)
    assert list(parts) == ['target', 'others']
    assert parts['target'].item() == pytest.approx(0.5 * target, rel=1e-4)
    assert parts['others'].item() == pytest.approx(0.5 * 5 * others, rel=1e-4)


def test_weight_of_the_others_is_the_authors(pyramid, gt):
    plain = NKDLoss(3, other_weight=1.0)(*pyramid, gt)
    parts = NKDLoss(3)(*pyramid, gt)
    torch.testing.assert_close(parts['target'], plain['target'])
    torch.testing.assert_close(parts['others'], 1.5 * plain['others'])


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
            loss = NKDLoss(3, **{name: keep})
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
        parts = NKDLoss()((student,), (teacher,), gt)
        sum(parts.values()).backward()
        assert all(part.isfinite() for part in parts.values())
        assert student.grad.isfinite().all()
        assert (parts['others'] > 100).item() is (factor == -1)


def test_settings_that_do_not_fit_are_refused(pyramid, gt):
    with pytest.raises(ValueError, match='NKDLoss needs temperature > 0'):
        NKDLoss(temperature=0)
    with pytest.raises(ValueError, match='NKDLoss .* num_classes=4'):
        NKDLoss(num_classes=4)(*pyramid, gt)
    with pytest.raises(ValueError, match='NKDLoss .* SoftTargetLoss'):
        NKDLoss(num_classes=1)(*pyramid, gt)
    with pytest.raises(ValueError, match='NKDLoss .* gt=None'):
        NKDLoss(num_classes=3)(*pyramid)

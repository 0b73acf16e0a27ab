import math

import pytest
import torch

from mmkd.losses.bckd import BCKDClassLoss, bckd_class_loss
from mmkd.structures import GroundTruth

SHAPE = (32, 48)
SIZES = ((4, 6), (2, 3))


@pytest.fixture
def pyramid():
    """Two levels of two anchors and three classes."""
    torch.manual_seed(0)
    return tuple(
        tuple(2 * torch.randn(2, 6, *size) for size in SIZES) for _ in range(2)
    )


@pytest.fixture
def gt():
    """Three boxes; the second image is 16 x 24 in its batch of 32 x 48."""
    return GroundTruth.from_boxes(
        [
            torch.tensor([[10.0, 4, 30, 16], [0, 0, 9, 9]]),
            torch.tensor([[2.0, 2, 20, 12]]),
        ],
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def literal(student, teacher, power):
    """One sample, two lists of logits."""
    total = 0.0
    for q, p in zip(map(sigmoid, student), map(sigmoid, teacher)):
        entropy = -p * math.log(q) - (1 - p) * math.log(1 - q)
        total += abs(q - p) ** power * entropy
    return total


def rows_that_count(maps):
    """Samples of three classes: two anchors a cell, without the border."""
    rows = []
    for one, height, width in zip(maps, ((4, 2), (2, 1)), ((6, 3), (3, 2))):
        for n in range(2):
            for y in range(height[n]):
                for x in range(width[n]):
                    rows += [one[n, :3, y, x], one[n, 3:, y, x]]
    return torch.stack(rows).tolist()


# The formula -----------------------------------------------------------------


@pytest.mark.parametrize('power', [1.0, 2.0])
def test_one_class_by_hand(power):
    # The teacher says 3/4, the student 1/2.
    loss = bckd_class_loss(
        torch.zeros(1, 1), torch.tensor([[3.0]]).log(), power
    )
    assert loss.tolist() == pytest.approx([0.25**power * math.log(2)])


@pytest.mark.parametrize('power', [1.0, 2.0])
def test_equals_a_literal_loop(power):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 5, 4)
    expected = [
        literal(*pair, power)
        for pair in zip(student.tolist(), teacher.tolist())
    ]
    assert bckd_class_loss(student, teacher, power).tolist() == pytest.approx(
        expected, rel=1e-5
    )


def test_equal_logits_cost_nothing_and_pull_nowhere():
    x = torch.linspace(-20, 20, 15).view(5, 3).requires_grad_()
    loss = bckd_class_loss(x, x.detach())
    loss.sum().backward()
    assert (loss == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize('power', [1.0, 2.0])
def test_gradient_is_that_of_product_rule(power):
    """The weight learns too, as in the authors' code."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4)
    student.requires_grad_()
    bckd_class_loss(student, teacher, power).sum().backward()
    q, p = student.detach().sigmoid(), teacher.sigmoid()
    entropy = -p * q.log() - (1 - p) * (1 - q).log()
    gap = q - p
    expected = gap.abs() ** power * gap + entropy * (
        power * gap.abs() ** (power - 1) * gap.sign() * q * (1 - q)
    )
    torch.testing.assert_close(student.grad, expected)


def test_an_object_that_neither_sees_costs_nothing_one_that_is_missed_does():
    teacher = torch.tensor([[-20.0, 0.0], [20.0, 0.0]])
    loss = bckd_class_loss(torch.tensor([[-20.0, 0.0]] * 2), teacher)
    assert loss.tolist() == pytest.approx([0, 20], abs=1e-4)


# The module ------------------------------------------------------------------


@pytest.mark.parametrize('normalise_by', ['teacher', 'boxes'])
@pytest.mark.parametrize('power', [1.0, 2.0])
def test_equals_a_literal_loop_over_levels_images_cells_and_anchors(
    pyramid, gt, normalise_by, power
):
    student, teacher = (rows_that_count(side) for side in pyramid)
    total = sum(
        literal(one, other, power) for one, other in zip(student, teacher)
    )
    norm = 3
    if normalise_by == 'teacher':
        norm = sum(sigmoid(max(row)) for row in teacher)
        assert norm > 3
    loss = BCKDClassLoss(
        num_classes=3,
        power=power,
        normalise_by=normalise_by,
        loss_weight=2.0,
    )
    assert loss(*pyramid, gt).item() == pytest.approx(
        2 * total / norm, rel=1e-5
    )


def test_a_level_without_boxes_learns_as_well(pyramid):
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=SHAPE)
    student = tuple(one.clone().requires_grad_() for one in pyramid[0])
    BCKDClassLoss(3)(student, pyramid[1], gt).backward()
    assert all((one.grad != 0).all() for one in student)


@pytest.mark.parametrize('normalise_by', ['teacher', 'boxes'])
def test_without_objects_the_divisor_is_one(normalise_by):
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], shape=SHAPE)
    teacher = torch.full((1, 2, 2, 3), -12.0)
    student = torch.full((1, 2, 2, 3), -3.0)
    value = BCKDClassLoss(normalise_by=normalise_by)(
        (student,), (teacher,), gt
    )
    expected = 6 * literal([-3.0] * 2, [-12.0] * 2, 1)
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('normalise_by', ['teacher', 'boxes'])
def test_repeating_the_batch_changes_nothing(pyramid, normalise_by):
    boxes = [torch.tensor([[0.0, 0, 9, 9]])]
    one, two = (
        GroundTruth.from_boxes(count * boxes, shape=SHAPE) for count in (2, 4)
    )
    loss = BCKDClassLoss(num_classes=3, normalise_by=normalise_by)
    batch = ([torch.cat([x, x]) for x in side] for side in pyramid)
    torch.testing.assert_close(loss(*batch, two), loss(*pyramid, one))


def test_padding_and_ignored_boxes_count_on_demand(pyramid):
    student, teacher = pyramid
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
        ignored=[torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)],
    )
    for name, index in (
        ('keep_padding', (1, slice(None), 3, 5)),
        ('keep_ignored', (0, slice(None), 0, 0)),
    ):
        for side in (0, 1):  # the teacher's score divides
            changed = [list(student), list(teacher)]
            changed[side][0] = changed[side][0].clone()
            changed[side][0][index] += 3
            for keep in (False, True):
                loss = BCKDClassLoss(3, **{name: keep})
                same = loss(student, teacher, gt) == loss(*changed, gt)
                assert same.item() is not keep


def test_contradictions_in_half_precision_stay_finite():
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], shape=SHAPE)
    teacher = torch.full((1, 4, 4, 6), 300.0, dtype=torch.half)
    teacher[:, ::2] *= -1
    for factor in (-1, 1):
        student = (factor * teacher).requires_grad_()
        loss = BCKDClassLoss()((student,), (teacher,), gt)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()
        # 300 for each of four classes where both contradict each other
        assert loss.item() == pytest.approx(1200 if factor == -1 else 0)


def test_settings_that_do_not_fit_are_refused(pyramid, gt):
    with pytest.raises(ValueError, match="BCKDClassLoss .* mean 'boxes'"):
        BCKDClassLoss(normalise_by='boxs')
    with pytest.raises(ValueError, match='BCKDClassLoss needs power >= 1'):
        BCKDClassLoss(power=0.5)
    with pytest.raises(ValueError, match='BCKDClassLoss .* num_classes=4'):
        BCKDClassLoss(num_classes=4)(*pyramid, gt)
    with pytest.raises(ValueError, match='BCKDClassLoss .* gt=None'):
        BCKDClassLoss(num_classes=3, normalise_by='boxes')(*pyramid)

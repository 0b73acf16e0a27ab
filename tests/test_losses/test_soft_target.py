import math

import pytest
import torch

from mmkd.losses.soft_target import (
    SoftTargetLoss,
    soft_target_loss,
    soft_target_weight,
)
from mmkd.structures import GroundTruth

SHAPE = (32, 48)
SIZES = ((4, 6), (2, 3))


@pytest.fixture
def samples():
    """Logits of both sides and a weight, five samples of four classes."""
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 5, 4)
    return student, teacher, torch.rand(5, 1)


@pytest.fixture
def pyramid():
    """Two levels of two anchors and three classes."""
    torch.manual_seed(0)
    return tuple(
        tuple(2 * torch.randn(2, 6, *size) for size in SIZES) for _ in range(2)
    )


@pytest.fixture
def gt():
    """The second image is 16 x 24 in its batch of 32 x 48."""
    return GroundTruth.from_boxes(
        [torch.tensor([[10.0, 4, 30, 16]]), torch.zeros(0, 4)],
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(values):
    weights = [math.exp(one) for one in values]
    return [one / sum(weights) for one in weights]


def coin(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def divergences(student, teacher, activation, temperature):
    """Of each class of one sample with sigmoid, of the sample else."""
    student, teacher = (
        [one / temperature for one in side] for side in (student, teacher)
    )
    if activation == 'sigmoid':
        return [coin(sigmoid(t), sigmoid(s)) for s, t in zip(student, teacher)]
    return [
        sum(
            t * math.log(t / s)
            for s, t in zip(softmax(student), softmax(teacher))
        )
    ]


def slow(student, teacher, weight_by, activation, temperature, power):
    """The weighted mean over lists of samples, one at a time."""
    total = norm = 0.0
    for one, other in zip(student, teacher):
        costs = divergences(one, other, activation, temperature)
        if activation == 'sigmoid':
            ps, qs = ([sigmoid(x) for x in side] for side in (other, one))
            objects = ps
        else:
            ps, qs = softmax(other), softmax(one)
            objects = ps[:-1]  # the last is background
        gaps = [abs(p - q) for p, q in zip(ps, qs)]
        if weight_by == 'teacher':
            weights = [max(objects)]
        elif weight_by == 'uniform':
            weights = [1.0]
        elif activation == 'sigmoid':
            weights = [gap**power for gap in gaps]
        else:
            weights = [(sum(gaps) / 2) ** power]
        if len(weights) == 1:
            costs = [sum(costs)]
        total += sum(w * cost for w, cost in zip(weights, costs))
        norm += sum(weights)
    return temperature**2 * total / norm


# The formula -----------------------------------------------------------------


def test_one_class_by_hand():
    # The teacher says 3/4, the student 1/2.
    teacher, student = torch.tensor([[3.0]]).log(), torch.zeros(1, 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    value = soft_target_loss(student, teacher, torch.ones(1, 1))
    assert value.item() == pytest.approx(expected)


def test_two_classes_of_a_softmax_are_one_coin():
    student, teacher = torch.randn(2, 7, 1)
    weight = torch.rand(7, 1)
    zero = torch.zeros(7, 1)
    torch.testing.assert_close(
        soft_target_loss(
            torch.cat([student, zero], 1),
            torch.cat([teacher, zero], 1),
            weight,
            'softmax',
        ),
        soft_target_loss(student, teacher, weight),
    )


def test_a_sample_counts_in_proportion_to_its_weight(samples):
    student, teacher, _ = samples
    each = torch.stack(
        [
            soft_target_loss(one[None], other[None], torch.ones(1, 1))
            for one, other in zip(student, teacher)
        ]
    )
    weight = torch.tensor([[3.0], [0.0], [1.0], [0.0], [0.0]])
    expected = (3 * each[0] + each[2]) / 4
    for factor in (1, 10):
        torch.testing.assert_close(
            soft_target_loss(student, teacher, factor * weight), expected
        )


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_gradient_is_the_difference_of_probabilities(samples, temperature):
    student, teacher, weight = samples
    student.requires_grad_()
    share = temperature * weight / weight.sum()
    for activation, probs in (
        ('sigmoid', torch.sigmoid),
        ('softmax', lambda x: x.softmax(1)),
    ):
        loss = soft_target_loss(
            student, teacher, weight, activation, temperature
        )
        (grad,) = torch.autograd.grad(loss, student)
        gap = probs(student / temperature) - probs(teacher / temperature)
        torch.testing.assert_close(grad, share * gap.detach())


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_equal_logits_cost_nothing_and_others_do(samples, activation):
    student, teacher, weight = samples
    assert soft_target_loss(teacher, teacher, weight, activation).item() == 0
    assert soft_target_loss(student, teacher, weight, activation) > 0.01


def test_an_offset_matters_to_sigmoids_only(samples):
    student, teacher, weight = samples
    for side in (0, 1):
        moved = [student, teacher]
        moved[side] = moved[side] + torch.arange(5.0)[:, None]
        torch.testing.assert_close(
            soft_target_loss(*moved, weight, 'softmax'),
            soft_target_loss(student, teacher, weight, 'softmax'),
        )
        assert soft_target_loss(*moved, weight) != soft_target_loss(
            student, teacher, weight
        )


def test_at_high_temperature_it_is_a_squared_difference_of_logits(samples):
    # p (1 - p) = 1/4, half of it by Taylor.
    student, teacher, weight = (one.double() for one in samples)
    gap = (student - teacher).square().sum(1, keepdim=True)
    torch.testing.assert_close(
        soft_target_loss(student, teacher, weight, temperature=1e3),
        (weight * gap).sum() / weight.sum() / 8,
        rtol=1e-2,
        atol=0,
    )


def test_without_any_weight_it_is_zero(samples):
    student, teacher, weight = samples
    student.requires_grad_()
    loss = soft_target_loss(student, teacher, 0 * weight)
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


# The weights -----------------------------------------------------------------


def test_weights_by_hand():
    student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1 / 3]]).log()

    def weight(*settings):
        return soft_target_weight(student, teacher, *settings)[0].tolist()

    assert weight('uniform') == [1]
    assert weight('teacher') == pytest.approx([0.75])
    assert weight('difference') == pytest.approx([0.25, 0.25])
    assert weight('difference', 'sigmoid', 2.0) == pytest.approx([1 / 16] * 2)
    # Softmax: 0.9 and 0.1 against halves.
    assert weight('difference', 'softmax') == pytest.approx([0.4])
    assert weight('difference', 'softmax', 2.0) == pytest.approx([0.16])
    assert weight('teacher', 'softmax', 1.0, False) == pytest.approx([0.9])
    teacher = teacher.flip(1)
    assert weight('teacher', 'softmax', 1.0, True) == pytest.approx([0.1])


def test_a_softmax_of_many_classes_differs_by_what_must_be_moved():
    # Quarters against tenths: 0.15 and 0.05 too much, as much too little.
    teacher = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()
    weight = soft_target_weight(
        torch.zeros(1, 4), teacher, 'difference', 'softmax'
    )
    assert weight.tolist()[0] == pytest.approx([0.2])


@pytest.mark.parametrize('weight_by', ['teacher', 'difference'])
def test_weights_have_no_gradient(samples, weight_by):
    student, teacher, _ = samples
    student.requires_grad_()
    teacher.requires_grad_()
    assert not soft_target_weight(student, teacher, weight_by).requires_grad


# The module ------------------------------------------------------------------


def rows_that_count(maps, heights, widths):
    """Samples of three classes, as lists: two anchors a cell."""
    rows = []
    for level, one in enumerate(maps):
        for n in range(2):
            for y in range(heights[n][level]):
                for x in range(widths[n][level]):
                    for anchor in (0, 3):
                        rows.append(one[n, anchor : anchor + 3, y, x].tolist())
    return rows


@pytest.mark.parametrize('weight_by', ['teacher', 'uniform', 'difference'])
@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize(('temperature', 'power'), [(1.0, 1.0), (2.5, 2.0)])
def test_equals_a_literal_loop_over_levels_images_cells_and_anchors(
    pyramid, gt, weight_by, activation, temperature, power
):
    loss = SoftTargetLoss(
        num_classes=3,
        activation=activation,
        temperature=temperature,
        weight_by=weight_by,
        power=power,
        loss_weight=2.0,
    )
    rows = [
        rows_that_count(side, ((4, 2), (2, 1)), ((6, 3), (3, 2)))
        for side in pyramid
    ]
    expected = 2 * slow(*rows, weight_by, activation, temperature, power)
    assert loss(*pyramid, gt).item() == pytest.approx(expected, rel=1e-4)


def test_padding_and_ignored_boxes_count_on_demand(pyramid):
    student, teacher = pyramid
    ignored = [torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)]
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
        ignored=ignored,
    )
    for name, index in (
        ('keep_padding', (1, slice(None), 3, 5)),
        ('keep_ignored', (0, slice(None), 0, 0)),
    ):
        changed = (student[0].clone(), student[1])
        changed[0][index] += 3
        for keep in (False, True):
            loss = SoftTargetLoss(3, **{name: keep})
            same = loss(student, teacher, gt) == loss(changed, teacher, gt)
            assert same.item() is not keep


def test_repeating_the_batch_or_the_levels_changes_nothing(pyramid):
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=SHAPE)
    twice = GroundTruth.from_boxes([torch.zeros(0, 4)] * 4, shape=SHAPE)
    loss = SoftTargetLoss(num_classes=3)
    value = loss(*pyramid, gt)
    batch = ([torch.cat([one, one]) for one in side] for side in pyramid)
    torch.testing.assert_close(loss(*batch, twice), value)
    torch.testing.assert_close(
        loss(*(side + side for side in pyramid), gt), value
    )


def test_a_background_class_has_no_weight_unless_it_is_an_object(pyramid):
    """Wherever the teacher is sure of the last class, nothing is learnt."""
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=SHAPE)
    student, teacher = pyramid
    sure = tuple(one.clone() for one in teacher)
    sure[0][0, 2, 0, 0] = 60.0  # class 2 of the first anchor
    feature = student[0].clone().requires_grad_()
    for background in (True, False):
        loss = SoftTargetLoss(
            3, activation='softmax', has_background=background
        )
        value = loss((feature, student[1]), sure, gt)
        (grad,) = torch.autograd.grad(value, feature)
        none = grad[0, :3, 0, 0].abs().max() < 1e-12
        assert none.item() is background


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('weight_by', ['teacher', 'uniform', 'difference'])
def test_contradictions_in_half_precision_stay_finite(activation, weight_by):
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], shape=SHAPE)
    teacher = torch.full((1, 4, 4, 6), 300.0, dtype=torch.half)
    teacher[:, ::2] *= -1
    for factor in (-1, 1):
        student = (factor * teacher).requires_grad_()
        loss = SoftTargetLoss(
            activation=activation, weight_by=weight_by, has_background=False
        )((student,), (teacher,), gt)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()
        assert (loss > 100).item() is (factor == -1)


def test_misspelt_settings_are_refused(pyramid, gt):
    with pytest.raises(ValueError, match="Did you mean 'softmax'"):
        SoftTargetLoss(activation='sofmax')
    with pytest.raises(ValueError, match="Did you mean 'teacher'"):
        SoftTargetLoss(weight_by='teachr')
    with pytest.raises(ValueError, match='SoftTargetLoss needs temperature'):
        SoftTargetLoss(temperature=0)
    with pytest.raises(ValueError, match='SoftTargetLoss needs power > 0'):
        SoftTargetLoss(power=-1)
    with pytest.raises(ValueError, match='SoftTargetLoss .* num_classes=4'):
        SoftTargetLoss(num_classes=4)(*pyramid, gt)

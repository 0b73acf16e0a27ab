import math

import pytest
import torch

from mmkd.losses.cckd import CCKDLoss, cckd_loss, correlations
from mmkd.structures import GroundTruth


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(2, 5, 4).unbind()


@pytest.fixture
def gt():
    boxes = torch.tensor(
        [[2.0, 2, 16, 16], [4, 20, 30, 29], [10, 2, 28, 20], [3, 3, 9, 12]]
    )
    return GroundTruth.from_boxes([boxes[:1], boxes[1:]], shape=(32, 32))


def cosines(vectors):
    """Of all pairs, as a list of rows."""
    rows = vectors.tolist()
    norms = [math.sqrt(sum(v**2 for v in row)) for row in rows]
    return [
        [
            sum(p * q for p, q in zip(a, b)) / (m * n)
            for b, n in zip(rows, norms)
        ]
        for a, m in zip(rows, norms)
    ]


@pytest.mark.parametrize('gamma', [0.4, 1.3])
@pytest.mark.parametrize('order', [1, 2, 3, 5])
def test_equals_a_literal_loop(vectors, gamma, order):
    matrices = []
    for one in vectors:
        values = []
        for row in cosines(one):
            for cosine in row:
                series = sum(
                    (2 * gamma) ** p / math.factorial(p) * cosine**p
                    for p in range(order + 1)
                )
                values.append(math.exp(-2 * gamma) * series)
        matrices.append(values)
    expected = sum((s - t) ** 2 for s, t in zip(*matrices)) / 25
    value = cckd_loss(*vectors, gamma=gamma, order=order).item()
    assert value == pytest.approx(expected, rel=1e-4)


def test_the_bilinear_kernel_is_the_cosine(vectors):
    student, teacher = (torch.tensor(cosines(one)) for one in vectors)
    torch.testing.assert_close(
        cckd_loss(*vectors, kernel='bilinear'),
        (student - teacher).square().mean(),
    )


def test_many_orders_give_the_gaussian_of_the_distance(vectors):
    one = vectors[0]
    directions = one / one.norm(dim=1, keepdim=True)
    distances = (directions[:, None] - directions[None]).square().sum(2)
    torch.testing.assert_close(
        correlations(one, gamma=0.7, order=20), (-0.7 * distances).exp()
    )


def test_two_samples_by_hand():
    # Right angle against equal directions: only the two pairs differ,
    # by (2 g + (2 g)^2 / 2) e^(-2 g) = 1.5 / e for g = 1/2.
    right = torch.tensor([[2.0, 0], [0, 5]])
    equal = torch.tensor([[3.0, 3], [1, 1]])
    torch.testing.assert_close(
        cckd_loss(right, equal, gamma=0.5, order=2),
        torch.tensor(2 * (1.5 / math.e) ** 2 / 4),
    )


def test_length_and_rotation_do_not_matter(vectors):
    student, teacher = vectors
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    scales = torch.tensor([1.0, 5, 0.1, 3, 300])[:, None]
    turned = scales * student @ rotation
    torch.testing.assert_close(
        cckd_loss(turned, teacher), cckd_loss(student, teacher)
    )
    assert cckd_loss(turned, student) < 1e-10
    assert cckd_loss(teacher, student) > 1e-3


def test_student_and_teacher_may_differ_in_channels(vectors):
    student, teacher = vectors
    wider = torch.cat([teacher, torch.zeros(5, 3)], 1)
    torch.testing.assert_close(
        cckd_loss(student, wider), cckd_loss(student, teacher)
    )


@pytest.mark.parametrize('kernel', ['gaussian', 'bilinear'])
def test_gradient_is_that_of_finite_differences(vectors, kernel):
    student, teacher = (one.double() for one in vectors)
    assert torch.autograd.gradcheck(
        lambda one: cckd_loss(one, teacher, kernel, order=3),
        student.requires_grad_(),
    )


@pytest.mark.parametrize('count', [0, 1])
def test_too_few_samples_cost_nothing_and_keep_the_graph(count):
    student = torch.zeros(count, 4, requires_grad=True)
    value = cckd_loss(student, torch.ones(count, 4))
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize('kernel', ['gaussian', 'bilinear'])
def test_an_empty_map_has_a_finite_gradient(vectors, kernel):
    student = torch.zeros(5, 4, requires_grad=True)
    cckd_loss(student, vectors[1], kernel).backward()
    assert student.grad.isfinite().all()


def test_a_map_enters_as_the_means_over_its_boxes(gt):
    steps = torch.arange(8) * 4 + 2.0
    y, x = torch.meshgrid(steps, steps, indexing='ij')
    student = torch.stack([x, y]).expand(2, 2, 8, 8)
    teacher = torch.stack([x - y, y, x * 0]).expand(2, 3, 8, 8)
    x, y = (gt.boxes[:, :2] + gt.boxes[:, 2:]).T / 2
    centres = torch.stack([x, y], 1), torch.stack([x - y, y, x * 0], 1)
    for settings in (
        dict(),
        dict(gamma=1.0, order=4),
        dict(kernel='bilinear'),
    ):
        torch.testing.assert_close(
            CCKDLoss(loss_weight=7.0, **settings)(student, teacher, gt),
            7 * cckd_loss(*centres, **settings),
        )


def test_the_bins_of_a_box_are_those_asked_for(gt):
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 4, 8, 8).unbind()
    one, other = (CCKDLoss(output_size=n)(*maps, gt) for n in (1, 7))
    assert (one - other).abs() > 1e-3 * one


def test_half_precision_is_not_used_under_autocast(gt):
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 4, 8, 8).unbind()
    plain = CCKDLoss()(*maps, gt)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(CCKDLoss()(*maps, gt), plain)


def test_a_misspelt_kernel_is_named():
    with pytest.raises(ValueError, match="Did you mean 'gaussian'"):
        CCKDLoss(kernel='gausian')


@pytest.mark.parametrize('name', ['gamma', 'order', 'output_size'])
def test_settings_that_leave_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f'{name} > 0'):
        CCKDLoss(**{name: 0})


def test_a_missing_ground_truth_is_named():
    with pytest.raises(ValueError, match='got gt=None'):
        CCKDLoss()(torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8))

import math

import pytest
import torch

from mmkd.losses.rkd import RKDLoss, rkd_angle, rkd_distance
from mmkd.structures import GroundTruth


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(2, 5, 4).unbind()


@pytest.fixture
def gt():
    boxes = torch.tensor(
        [
            [2.0, 2, 16, 16],
            [4, 20, 30, 29],
            [10, 2, 28, 20],
            [3, 3, 9, 12],
            [17, 5, 22, 30],
        ]
    )
    return GroundTruth.from_boxes([boxes[:2], boxes[2:]], shape=(32, 32))


def smooth_l1(difference):
    size = abs(difference)
    return size**2 / 2 if size < 1 else size - 0.5


def literal_distance(vectors):
    vectors = vectors.tolist()
    lengths = [[math.dist(a, b) for b in vectors] for a in vectors]
    positive = [d for row in lengths for d in row if d > 0]
    mean = sum(positive) / len(positive)
    return [d / mean for row in lengths for d in row]


def literal_angle(vectors):
    vectors = vectors.tolist()
    cosines = []
    for i in vectors:
        for j in vectors:
            for k in vectors:
                a = [q - p for p, q in zip(i, j)]
                b = [q - p for p, q in zip(i, k)]
                length = math.hypot(*a) * math.hypot(*b)
                dot = sum(p * q for p, q in zip(a, b))
                cosines.append(dot / length if length else 0.0)
    return cosines


@pytest.mark.parametrize(
    ('loss', 'literal'),
    [(rkd_distance, literal_distance), (rkd_angle, literal_angle)],
)
def test_equals_a_literal_loop(vectors, loss, literal):
    gaps = [s - t for s, t in zip(*(literal(one) for one in vectors))]
    expected = sum(smooth_l1(gap) for gap in gaps) / len(gaps)
    assert loss(*vectors).item() == pytest.approx(expected, rel=1e-5)


def test_three_points_on_a_line_by_hand():
    # Distances 1, 1, 2 with mean 4/3 against 1, 1, 1 with mean 1.
    line = torch.tensor([[0.0, 0], [1, 0], [2, 0]])
    triangle = torch.tensor([[0.0, 0], [1, 0], [0.5, 3**0.5 / 2]])
    distance = (4 * 0.25**2 / 2 + 2 * 0.5**2 / 2) / 9
    assert rkd_distance(line, triangle).item() == pytest.approx(
        distance, rel=1e-5
    )
    # Cosines between others: 1, -1, 1 against 1/2 each, both ways round.
    angle = 2 * (0.5**2 / 2 + (1.5 - 0.5) + 0.5**2 / 2) / 27
    assert rkd_angle(line, triangle).item() == pytest.approx(angle, rel=1e-5)


@pytest.mark.parametrize('loss', [rkd_distance, rkd_angle])
def test_scale_shift_and_rotation_do_not_matter(vectors, loss):
    student, teacher = vectors
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    moved = 3 * student @ rotation + torch.arange(4.0)
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher))
    assert loss(moved, student) < 1e-10
    assert loss(teacher, student) > 1e-3


@pytest.mark.parametrize('loss', [rkd_distance, rkd_angle])
def test_dimensions_may_differ(vectors, loss):
    student, teacher = vectors
    wide = torch.cat([student, torch.zeros(5, 3)], 1)
    torch.testing.assert_close(loss(wide, teacher), loss(student, teacher))


@pytest.mark.parametrize('loss', [rkd_distance, rkd_angle])
def test_gradient_is_that_of_finite_differences(vectors, loss):
    student, teacher = (one.double() for one in vectors)
    assert torch.autograd.gradcheck(
        lambda s: loss(s, teacher), student.requires_grad_()
    )


@pytest.mark.parametrize(
    ('loss', 'fewest'), [(rkd_distance, 2), (rkd_angle, 3)]
)
def test_too_few_samples_cost_nothing_and_keep_the_graph(loss, fewest):
    for count in range(fewest):
        student = torch.randn(count, 4, requires_grad=True)
        value = loss(student, torch.randn(count, 4))
        value.backward()
        assert value == 0
        assert (student.grad == 0).all()


@pytest.mark.parametrize('loss', [rkd_distance, rkd_angle])
def test_samples_that_coincide_have_a_finite_gradient(vectors, loss):
    _, teacher = vectors
    twins = torch.tensor([[1.0, 2, 3, 4]] * 4 + [[0, 0, 0, 1]])
    for student in (twins, torch.ones(5, 4)):
        student.requires_grad_()
        value = loss(student, teacher)
        value.backward()
        assert value.isfinite()
        assert student.grad.abs().max() < 10


def test_a_map_enters_as_the_means_over_its_boxes(gt):
    # A map linear in x and y has its value at each centre as mean.
    steps = torch.arange(8) * 4 + 2.0
    y, x = torch.meshgrid(steps, steps, indexing='ij')
    student = torch.stack([x, y]).expand(2, 2, 8, 8)
    teacher = torch.stack([x + 2 * y, x, y * 0]).expand(2, 3, 8, 8)
    x, y = (gt.boxes[:, :2] + gt.boxes[:, 2:]).T / 2
    centres = torch.stack([x, y], 1)
    others = torch.stack([x + 2 * y, x, y * 0], 1)
    parts = RKDLoss(0.5, 3.0, 7.0)(student, teacher, gt)
    assert parts.keys() == {'distance', 'angle'}
    torch.testing.assert_close(
        parts['distance'], 0.5 * 3 * rkd_distance(centres, others)
    )
    torch.testing.assert_close(
        parts['angle'], 0.5 * 7 * rkd_angle(centres, others)
    )


def test_channels_and_sizes_of_the_maps_may_differ(gt):
    torch.manual_seed(0)
    student = torch.randn(2, 4, 8, 8, requires_grad=True)
    parts = RKDLoss()(student, torch.randn(2, 6, 4, 4), gt)
    sum(parts.values()).backward()
    assert student.grad.abs().sum() > 0


def test_at_most_so_many_regions_take_part(gt):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 8, 8).unbind()
    some = RKDLoss(max_regions=2)(student, teacher, gt)
    two = GroundTruth.from_boxes([gt.boxes[:1], gt.boxes[2:3]], shape=(32, 32))
    torch.testing.assert_close(some, RKDLoss()(student, teacher, two))
    assert some['angle'] == 0


def test_half_precision_is_not_used_under_autocast(gt):
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 4, 8, 8).unbind()
    plain = RKDLoss()(*maps, gt)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(RKDLoss()(*maps, gt), plain)


def test_no_value_is_read_on_the_host(gt):
    maps = torch.ones(2, 2, 4, 8, 8, device='meta').unbind()
    assert RKDLoss()(*maps, gt)['angle'].shape == ()

import pytest
import torch

from mmkd.losses.dist import DISTLoss, correlation, dist_loss
from mmkd.structures import GroundTruth

SHAPE = (32, 48)
SIZES = ((4, 6), (2, 3))


@pytest.fixture
def samples():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 4)
    return student, teacher, torch.rand(9)


@pytest.fixture
def pyramid():
    """Two levels of two anchors and three classes."""
    torch.manual_seed(0)
    return tuple(
        tuple(torch.randn(2, 6, *size) for size in SIZES) for _ in range(2)
    )


@pytest.fixture
def gt():
    """The second image is 16 x 24 in its batch of 32 x 48."""
    return GroundTruth.from_boxes(
        [torch.tensor([[10.0, 4, 30, 16]]), torch.zeros(0, 4)],
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
    )


def pearson(one, other, weights=None):
    """Literal, over two lists of numbers."""
    if weights is None:
        weights = [1.0] * len(one)
    norm = sum(weights)

    def mean(values):
        return sum(w * v for w, v in zip(weights, values)) / norm

    a = [x - mean(one) for x in one]
    b = [y - mean(other) for y in other]
    shared = mean([x * y for x, y in zip(a, b)])
    squares = [mean([x * x for x in side]) for side in (a, b)]
    return shared / (squares[0] * squares[1]) ** 0.5


def slow(student, teacher, weights):
    """Both parts from lists of probabilities, one list a sample."""
    inter = sum(
        w * (1 - pearson(one, other))
        for w, one, other in zip(weights, student, teacher)
    ) / sum(weights)
    columns = list(zip(zip(*student), zip(*teacher)))
    intra = sum(1 - pearson(*pair, weights) for pair in columns)
    return inter, intra / len(columns)


# The formula -----------------------------------------------------------------


def test_correlation_equals_numpys_rule():
    x, y = torch.randn(2, 3, 7)
    uniform = torch.full((1, 7), 1 / 7)
    expected = [torch.corrcoef(pair)[0, 1] for pair in torch.stack([x, y], 1)]
    torch.testing.assert_close(
        correlation(x, y, uniform, 1), torch.stack(expected)
    )
    torch.testing.assert_close(
        correlation(x.T, y.T, uniform.T, 0), torch.stack(expected)
    )


def test_a_weight_of_two_is_a_sample_twice():
    x, y = torch.randn(2, 5, 3)
    weight = torch.tensor([1.0, 2, 0, 1, 1]) / 5
    twice = [0, 1, 1, 3, 4]
    torch.testing.assert_close(
        correlation(x, y, weight[:, None], 0),
        correlation(x[twice], y[twice], torch.full((5, 1), 1 / 5), 0),
    )


def test_a_flat_side_is_unrelated_and_has_no_gradient():
    x = torch.full((1, 4), 0.3).requires_grad_()
    r = correlation(x, torch.randn(1, 4), torch.full((1, 4), 0.25), 1)
    r.sum().backward()
    assert r.item() == 0
    assert (x.grad == 0).all()


def test_what_deviates_less_than_rounding_is_flat():
    y = torch.tensor([[0.1, 0.2, 0.4]]).double()
    uniform = torch.full((1, 3), 1 / 3).double()
    for scale, expected in ((1e-4, 1.0), (1e-8, 0.0)):
        x = 0.3 + scale * y
        assert correlation(x, y, uniform, 1).item() == pytest.approx(expected)


def test_two_classes_correlate_fully_or_not_at_all():
    """Of two numbers only the order is left."""
    teacher = torch.tensor([[2.0, 1.0]])
    for student, expected in (([0.1, 0.0], 0.0), ([-3.0, 5.0], 2.0)):
        inter, _ = dist_loss(torch.tensor([student]), teacher, torch.ones(1))
        assert inter.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_equals_a_literal_loop(samples, activation, temperature):
    student, teacher, weight = samples
    probs = [
        (
            (one / temperature).sigmoid()
            if activation == 'sigmoid'
            else (one / temperature).softmax(1)
        ).tolist()
        for one in (student, teacher)
    ]
    for value, expected in zip(
        dist_loss(student, teacher, weight, activation, temperature),
        slow(*probs, weight.tolist()),
    ):
        assert value.item() == pytest.approx(
            temperature**2 * expected, rel=1e-4
        )


def test_probabilities_scaled_and_shifted_cost_nothing(samples):
    """The point of the method: the student may be less sure throughout."""
    _, teacher, weight = samples
    student = (0.3 * teacher.sigmoid() + 0.1).logit()
    for part in dist_loss(student, teacher, weight):
        assert part.item() == pytest.approx(0, abs=1e-5)


def test_what_is_between_classes_ignores_a_scale_of_each_sample(samples):
    _, teacher, weight = samples
    scale = torch.linspace(0.1, 0.9, 9)[:, None]
    inter, intra = dist_loss(
        (scale * teacher.sigmoid()).logit(), teacher, weight
    )
    assert inter.item() == pytest.approx(0, abs=1e-5)
    assert intra > 0.01


def test_what_is_within_a_class_ignores_a_scale_of_each_class(samples):
    _, teacher, weight = samples
    scale = torch.linspace(0.1, 0.9, 4)
    inter, intra = dist_loss(
        (scale * teacher.sigmoid()).logit(), teacher, weight
    )
    assert intra.item() == pytest.approx(0, abs=1e-5)
    assert inter > 0.01


def test_opposite_probabilities_cost_two(samples):
    _, teacher, weight = samples
    for part in dist_loss(-teacher, teacher, weight):  # sigmoid(-x) = 1 - p
        assert part.item() == pytest.approx(2, abs=1e-5)


def test_an_offset_of_a_sample_matters_to_sigmoids_only(samples):
    student, teacher, weight = samples
    moved = student + torch.linspace(-1, 1, 9)[:, None]
    for activation, same in (('softmax', True), ('sigmoid', False)):
        for one, other in zip(
            dist_loss(student, teacher, weight, activation),
            dist_loss(moved, teacher, weight, activation),
        ):
            assert torch.allclose(one, other, atol=1e-5) is same


def test_the_scale_of_the_weights_does_not_matter(samples):
    student, teacher, weight = samples
    for one, other in zip(
        dist_loss(student, teacher, weight),
        dist_loss(student, teacher, 7 * weight),
    ):
        torch.testing.assert_close(one, other)


def test_a_sample_without_weight_has_no_gradient(samples):
    student, teacher, weight = samples
    weight[3] = 0
    student.requires_grad_()
    sum(dist_loss(student, teacher, weight)).backward()
    moved = student.grad.abs().sum(1) > 0
    assert moved.tolist() == [index != 3 for index in range(9)]


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_gradient_is_that_of_finite_differences(samples, activation):
    student, teacher, weight = (one.double() for one in samples)
    assert torch.autograd.gradcheck(
        lambda s: dist_loss(s, teacher, weight, activation, 2.0),
        student.requires_grad_(),
    )


# The module ------------------------------------------------------------------


def rows_that_count(maps):
    """Samples of three classes: two anchors a cell, without the border."""
    rows = []
    for one, height, width in zip(maps, ((4, 2), (2, 1)), ((6, 3), (3, 2))):
        for n in range(2):
            for y in range(height[n]):
                for x in range(width[n]):
                    rows += [one[n, :3, y, x], one[n, 3:, y, x]]
    return torch.stack(rows)


@pytest.mark.parametrize('weight_by', ['teacher', 'uniform'])
@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_equals_a_literal_loop_over_levels_images_cells_and_anchors(
    pyramid, gt, weight_by, activation
):
    loss = DISTLoss(
        num_classes=3,
        activation=activation,
        temperature=2.0,
        inter_weight=3.0,
        intra_weight=5.0,
        weight_by=weight_by,
        loss_weight=0.5,
    )
    student, teacher = (rows_that_count(side) for side in pyramid)
    if activation == 'sigmoid':
        probs = [(one / 2).sigmoid().tolist() for one in (student, teacher)]
        weights = [max(row) for row in teacher.sigmoid().tolist()]
    else:
        probs = [(one / 2).softmax(1).tolist() for one in (student, teacher)]
        # The last class is the background.
        weights = [max(row[:2]) for row in teacher.softmax(1).tolist()]
    if weight_by == 'uniform':
        weights = [1.0] * len(weights)
    inter, intra = slow(*probs, weights)
    parts = loss(*pyramid, gt)
    assert list(parts) == ['inter', 'intra']
    assert parts['inter'].item() == pytest.approx(
        0.5 * 3 * 4 * inter, rel=1e-4
    )
    assert parts['intra'].item() == pytest.approx(
        0.5 * 5 * 4 * intra, rel=1e-4
    )


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
        changed = (student[0].clone(), student[1])
        changed[0][index] = -changed[0][index]
        for keep in (False, True):
            loss = DISTLoss(3, **{name: keep})
            for part in ('inter', 'intra'):
                before = loss(student, teacher, gt)[part]
                after = loss(changed, teacher, gt)[part]
                assert (before == after).item() is not keep


def test_a_background_class_counts_as_a_score_on_demand(pyramid, gt):
    values = [
        DISTLoss(3, activation='softmax', has_background=background)(
            *pyramid, gt
        )['inter']
        for background in (False, True)
    ]
    assert values[0] != values[1]


def test_without_a_number_of_classes_anchors_are_one_sample(pyramid, gt):
    """As the authors have it: all channels of a cell."""
    student, teacher = (
        torch.cat([one.permute(0, 2, 3, 1).flatten(0, 2) for one in side])
        for side in pyramid
    )
    inter, intra = dist_loss(student, teacher, torch.ones(len(student)))
    parts = DISTLoss(weight_by='uniform', keep_padding=True)(*pyramid, gt)
    torch.testing.assert_close(parts['inter'], inter)
    torch.testing.assert_close(parts['intra'], intra)


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_contradictions_in_half_precision_stay_finite(activation):
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], shape=SHAPE)
    torch.manual_seed(0)
    teacher = (300 * torch.randn(1, 4, 4, 6)).half()
    for student in (teacher.clone(), -teacher, torch.full_like(teacher, -300)):
        student.requires_grad_()
        parts = DISTLoss(activation=activation)((student,), (teacher,), gt)
        sum(parts.values()).backward()
        assert all(part.isfinite() for part in parts.values())
        assert student.grad.isfinite().all()


def test_misspelt_settings_are_refused(pyramid, gt):
    with pytest.raises(ValueError, match="DISTLoss .* mean 'sigmoid'"):
        DISTLoss(activation='sigmod')
    with pytest.raises(ValueError, match="DISTLoss .* mean 'uniform'"):
        DISTLoss(weight_by='unifrm')
    with pytest.raises(ValueError, match='DISTLoss needs temperature > 0'):
        DISTLoss(temperature=0)
    with pytest.raises(ValueError, match='DISTLoss .* num_classes=4'):
        DISTLoss(num_classes=4)(*pyramid, gt)

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.losses import lsh
from mmkd.losses.lsh import (
    LSHLoss,
    hashes,
    image_mean,
    lsh_error,
    vector_error,
)
from mmkd.structures import GroundTruth

SHAPE = (32, 48)
SIZES = ((4, 6), (2, 3))
CHANNELS = 3


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.fixture
def maps():
    return torch.randn(2, 2, CHANNELS, 4, 5).unbind()


@pytest.fixture
def pyramid():
    return tuple(
        tuple(torch.randn(2, CHANNELS, *size) for size in SIZES)
        for _ in range(2)
    )


@pytest.fixture
def gt():
    """The second image is 16 x 24 in its batch of 32 x 48."""
    return GroundTruth.from_boxes(
        [torch.tensor([[10.0, 4, 30, 16]]), torch.zeros(0, 4)],
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
    )


@pytest.fixture
def whole():
    """Two images without a border."""
    return GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=SHAPE)


def build(**settings):
    settings = dict(channels=CHANNELS, hash_num=7, std=0.5) | settings
    return LSHLoss(**settings)


def planes(unfold=3, count=7):
    return torch.randn(count, CHANNELS, unfold, unfold), torch.randn(count)


def vectors(feature, unfold=3):
    """One vector a cell, laid out, (N, H·W, C·k·k)."""
    return F.unfold(feature, unfold, padding=unfold // 2).transpose(1, 2)


# The formula -----------------------------------------------------------------


@pytest.mark.parametrize('unfold', [1, 3, 5])
def test_hashes_are_products_of_planes_and_unfolded_vectors(maps, unfold):
    normals, bias = planes(unfold)
    expected = vectors(maps[0], unfold) @ normals.flatten(1).T + bias
    found = hashes(maps[0], normals, bias)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize('unfold', [1, 3])
def test_both_errors_are_those_of_unfolded_vectors(maps, unfold):
    normals, bias = planes(unfold)
    one, other = (vectors(side, unfold) for side in maps)
    own, like = (x @ normals.flatten(1).T + bias for x in (one, other))
    entropy = F.binary_cross_entropy_with_logits(
        own, (like > 0).float(), reduction='none'
    ).mean(2)
    square = (one - other).square().mean(2)
    for found, expected in (
        (lsh_error(*maps, normals, bias), entropy),
        (vector_error(*maps, unfold), square),
    ):
        assert found.shape == (2, 1, 4, 5)
        torch.testing.assert_close(found.flatten(1), expected)


def test_the_teachers_scale_does_not_matter_without_a_bias(maps):
    normals, bias = planes()
    student, teacher = maps
    for scale in (1e-3, 0.7, 2.0, 500.0):
        assert torch.equal(
            lsh_error(student, scale * teacher, normals, 0 * bias),
            lsh_error(student, teacher, normals, 0 * bias),
        )
    assert not torch.equal(
        lsh_error(student, 2 * teacher, normals, bias),
        lsh_error(student, teacher, normals, bias),
    )


def test_the_teachers_own_vector_still_costs_and_longer_ones_cost_less(maps):
    normals, bias = planes()
    student = maps[0]
    costs = [
        lsh_error(scale * student, student, normals, 0 * bias).mean().item()
        for scale in (1, 2, 4, 400)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0.05
    assert 0 < costs[-1] < 0.01
    product = hashes(student, normals, 0 * bias).abs()
    expected = (1 + (-product).exp()).log().mean()
    assert costs[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_vector_on_the_other_side_of_all_planes_costs_its_distance(maps):
    normals, bias = planes()
    far = 1000 * maps[0]
    found = lsh_error(-far, far, normals, 0 * bias)
    expected = hashes(far, normals, 0 * bias).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1.0)


def test_a_hash_of_zero_is_no_bit():
    one = torch.ones(1, 1, 1, 1)
    plane, bias = torch.ones(1, 1, 1, 1), torch.tensor([-1.0])
    found = lsh_error(3 * one, one, plane, bias)
    assert found.item() == pytest.approx(math.log(1 + math.exp(2)))


def test_gradients_are_those_of_finite_differences(maps):
    student, teacher = (one[:, :, :2, :2].double() for one in maps)
    normals, bias = (one.double() for one in planes())
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: lsh_error(s, teacher, normals, bias), student
    )
    assert torch.autograd.gradcheck(
        lambda s: vector_error(s, teacher, 3), student
    )


def test_the_mean_is_that_of_cells_and_then_of_images():
    errors = [torch.rand(2, 1, 2, 2), torch.rand(2, 1, 1, 1)]
    counts = [torch.rand(2, 1, 2, 2), torch.rand(2, 1, 1, 1)]
    counts[0][1] = 0
    counts[0][0, 0, 1, 1] = 0
    first = errors[0][0].flatten().tolist() + errors[1][0].flatten().tolist()
    shares = counts[0][0].flatten().tolist() + counts[1][0].flatten().tolist()
    expected = sum(e * c for e, c in zip(first, shares)) / sum(shares)
    expected = (expected + errors[1][1].item()) / 2
    assert image_mean(errors, counts).item() == pytest.approx(expected)
    nothing = [0 * one for one in counts]
    assert image_mean(errors, nothing) == 0


# The module ------------------------------------------------------------------


def literal(loss, pyramid, border=True, skip=(), weights=None):
    """Both parts, vector by vector; cells of the border are zeros."""
    normals = loss.std * loss.planes.flatten(1)
    parts = [0.0, 0.0]
    for n in range(2):
        sums, total = [0.0, 0.0], 0.0
        for level, maps in enumerate(zip(*pyramid)):
            rows, columns = maps[0].shape[-2:]
            if border and n == 1:
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
            sides = [torch.zeros_like(one[n : n + 1]) for one in maps]
            for side, one in zip(sides, maps):
                side[..., :rows, :columns] = one[n, :, :rows, :columns]
            one, other = (
                vectors(side, loss.unfold)[0].view(*side.shape[-2:], -1)
                for side in sides
            )
            for y in range(rows):
                for x in range(columns):
                    if (n, level, y, x) in skip:
                        continue
                    weight = (
                        1.0
                        if weights is None
                        else weights[level][n, :, y, x].max().item()
                    )
                    own, like = normals @ one[y, x], normals @ other[y, x]
                    own, like = own + loss.bias, like + loss.bias
                    entropy = sum(
                        math.log(1 + math.exp(-h if bit else h))
                        for h, bit in zip(own.tolist(), (like > 0).tolist())
                    ) / len(own)
                    square = (one[y, x] - other[y, x]).square().mean().item()
                    sums[0] += weight * square
                    sums[1] += weight * entropy
                    total += weight
        parts = [part + s / total / 2 for part, s in zip(parts, sums)]
    return parts


@pytest.mark.parametrize('unfold', [1, 3])
@pytest.mark.parametrize('mode', ['l2', 'lsh', 'lshl2'])
def test_equals_a_literal_loop_over_images_levels_and_cells(
    pyramid, gt, mode, unfold
):
    whole = build(unfold=unfold)
    square, entropy = literal(whole, pyramid)
    expected = dict(l2=7 * square, lsh=7 * entropy)
    loss = build(mode=mode, unfold=unfold)
    if mode != 'l2':
        loss.load_state_dict(whole.state_dict())
    parts = loss(*pyramid, gt)
    assert list(parts) == (['l2', 'lsh'] if mode == 'lshl2' else [mode])
    for name, value in parts.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4)


def test_cells_count_as_a_weight_says(pyramid, gt):
    """Of several anchors the weightiest stands for the cell."""
    loss = build(loss_weight=1.0)
    weights = tuple(torch.rand(2, 2, *size) for size in SIZES)
    square, entropy = literal(loss, pyramid, weights=weights)
    parts = loss(*pyramid, gt, weights)
    assert parts['l2'].item() == pytest.approx(square, rel=1e-4)
    assert parts['lsh'].item() == pytest.approx(entropy, rel=1e-4)


def test_padding_and_ignored_boxes_count_on_demand(pyramid):
    """An ignored cell is still a neighbour of those that count."""
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
        ignored=[torch.tensor([[1.0, 1, 7, 7]]), torch.zeros(0, 4)],
    )
    skip = [(0, level, 0, 0) for level in range(2)]
    for settings, arguments in (
        (dict(), dict(skip=skip)),
        (dict(keep_ignored=True), dict()),
        (dict(keep_padding=True), dict(skip=skip, border=False)),
    ):
        loss = build(loss_weight=1.0, **settings)
        square, entropy = literal(loss, pyramid, **arguments)
        parts = loss(*pyramid, gt)
        assert parts['l2'].item() == pytest.approx(square, rel=1e-4)
        assert parts['lsh'].item() == pytest.approx(entropy, rel=1e-4)


def test_without_ground_truth_there_is_no_border(pyramid, whole):
    loss = build()
    assert loss(*pyramid) == loss(*pyramid, whole)


def test_defaults_are_those_of_the_method(pyramid, gt):
    loss = LSHLoss(CHANNELS, std=0.5)
    assert loss.planes.shape == (4 * 9 * CHANNELS, CHANNELS, 3, 3)
    named = LSHLoss(
        channels=CHANNELS,
        mode='lshl2',
        hash_num=4 * 9 * CHANNELS,
        std=0.5,
        bias='zero',
        unfold=3,
        loss_weight=7.0,
    )
    named.load_state_dict(loss.state_dict())
    assert loss(*pyramid, gt) == named(*pyramid, gt)
    assert len(LSHLoss(5, unfold=1, std=1.0).planes) == 4 * 5


# The planes ------------------------------------------------------------------


def test_planes_are_of_a_normal_distribution():
    loss = LSHLoss(64, hash_num=500, std=0.2)
    drawn = (loss.std * loss.planes).flatten()
    assert drawn.std().item() == pytest.approx(0.2, rel=0.01)
    assert drawn.mean().item() == pytest.approx(0, abs=0.005)
    kurtosis = (drawn / drawn.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, rel=0.05)


def test_planes_never_learn(pyramid, gt):
    loss = build()
    assert [*loss.parameters()] == []
    before = copy.deepcopy(loss.state_dict())
    student = tuple(one.requires_grad_() for one in pyramid[0])
    sum(loss(student, pyramid[1], gt).values()).backward()
    assert all(one.grad is None for one in loss.buffers())
    assert before.keys() == {'planes', 'std', 'bias', 'medians'}
    for name, one in loss.state_dict().items():
        assert torch.equal(one, before[name])


def test_planes_follow_from_the_seed_and_from_a_checkpoint(pyramid, gt):
    torch.manual_seed(3)
    one = build()
    torch.manual_seed(3)
    same = build()
    other = build()
    assert torch.equal(one.planes, same.planes)
    assert not torch.equal(one.planes, other.planes)
    other.load_state_dict(one.state_dict())
    assert one(*pyramid, gt) == other(*pyramid, gt)


def test_squares_alone_need_no_planes(pyramid, gt):
    assert build(mode='l2', std=None).state_dict() == {}


def test_the_deviation_is_that_of_a_classifier(pyramid, gt):
    loss = build(std=None)
    assert loss.reads_classifier
    with pytest.raises(RuntimeError, match='set std=, for instance std=0.01'):
        loss(*pyramid, gt)
    weight = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    loss.read_classifier(weight)
    deviation = math.sqrt((9 + 1 + 1 + 9) / 3)
    given = build(std=deviation)
    given.planes.copy_(loss.planes)
    for one, other in zip(
        loss(*pyramid, gt).values(), given(*pyramid, gt).values()
    ):
        torch.testing.assert_close(one, other)
    assert not given.reads_classifier
    assert not build(mode='l2', std=None).reads_classifier


# The bias --------------------------------------------------------------------


def medians(loss, maps, cells=slice(None)):
    """Of each hash over all cells of all levels and images, literal."""
    normals = (loss.std * loss.planes).flatten(1)
    rows = torch.cat([vectors(one, loss.unfold).flatten(0, 1) for one in maps])
    found = (rows @ normals.T)[cells]
    return torch.stack([sorted(one)[(len(one) - 1) // 2] for one in found.T])


def test_half_of_the_cells_have_each_bit(pyramid, whole):
    loss = build(bias='median')
    loss(*pyramid, whole)
    torch.testing.assert_close(loss.bias, -medians(loss, pyramid[1]))
    bits = torch.cat(
        [
            hashes(one, loss.std * loss.planes, loss.bias)
            .movedim(1, 0)
            .flatten(1)
            for one in pyramid[1]
        ],
        1,
    )  # 7 planes, 60 cells
    share = (bits > 1e-5).float().mean(1)
    assert ((share - 0.5).abs() <= 1 / 60 + 1e-6).all()


def test_the_bias_is_the_mean_of_the_first_medians_and_then_fixed(whole):
    loss = build(bias='median', bias_steps=3)
    found = []
    for step in range(5):
        maps = tuple(torch.randn(2, CHANNELS, *size) + step for size in SIZES)
        loss(maps, maps, whole)
        found.append(-medians(loss, maps))
        expected = torch.stack(found[:3]).mean(0)
        torch.testing.assert_close(loss.bias, expected)
    assert loss.medians == 3


def test_the_bias_of_a_batch_counts_in_this_batch(pyramid, whole):
    loss = build(bias='median', bias_steps=1)
    assert loss(*pyramid, whole) == loss(*pyramid, whole)
    assert loss.bias.abs().min() > 0


def test_with_medians_the_teachers_scale_matters(pyramid, whole):
    loss = build(bias='median', bias_steps=1)
    student, teacher = pyramid
    before = loss(student, teacher, whole)['lsh']
    larger = tuple(2 * one for one in teacher)
    assert loss(student, larger, whole)['lsh'] != before


def test_evaluation_leaves_the_bias(pyramid, whole):
    loss = build(bias='median').eval()
    loss(*pyramid, whole)
    assert (loss.bias == 0).all()
    assert loss.medians == 0


def test_a_training_that_goes_on_counts_medians_on(pyramid, whole):
    loss = build(bias='median', bias_steps=2)
    loss(*pyramid, whole)
    other = build(bias='median', bias_steps=2)
    other(*pyramid, whole)
    other.load_state_dict(loss.state_dict())
    maps = tuple(one + 1 for one in pyramid[1])
    for one in (loss, other):
        for _ in range(3):
            one(maps, maps, whole)
    assert other.medians == 2
    assert torch.equal(loss.bias, other.bias)
    twice = -(medians(loss, pyramid[1]) + medians(loss, maps)) / 2
    torch.testing.assert_close(loss.bias, twice)


def test_medians_are_those_of_cells_that_count(pyramid, gt):
    """Neither border nor what a weight leaves out."""
    loss = build(bias='median', unfold=1)
    weights = tuple(torch.ones(2, 1, *size) for size in SIZES)
    weights[0][0] = 0
    loss(*pyramid, gt, weights)
    first = [n for n in range(24, 48) if (n - 24) // 6 < 2 and n % 6 < 3]
    second = [*range(48, 54), 54, 55]
    expected = medians(loss, pyramid[1], first + second)
    torch.testing.assert_close(loss.bias, -expected)


def test_a_batch_without_a_cell_that_counts_leaves_the_bias(pyramid, whole):
    loss = build(bias='median')
    loss(*pyramid, whole)
    before = loss.bias.clone()
    nothing = tuple(torch.zeros(2, 1, *size) for size in SIZES)
    parts = loss(*pyramid, whole, nothing)
    assert torch.equal(loss.bias, before)
    assert parts['lsh'] == 0


def test_of_many_cells_some_are_looked_at(pyramid, whole, monkeypatch):
    monkeypatch.setattr(lsh, 'CELLS', 21)
    loss = build(bias='median')
    loss(*pyramid, whole)  # 60 cells, every third
    expected = medians(loss, pyramid[1], slice(None, None, 3))
    torch.testing.assert_close(loss.bias, -expected)


def test_all_processes_have_one_bias(pyramid, whole, monkeypatch):
    def all_reduce(value, how):
        assert how == 'mean'
        value += 5

    loss, plain = build(bias='median'), build(bias='median')
    plain.load_state_dict(loss.state_dict())
    plain(*pyramid, whole)
    monkeypatch.setattr(lsh, 'all_reduce', all_reduce)
    loss(*pyramid, whole)
    torch.testing.assert_close(loss.bias, plain.bias + 5)


# Wrong use -------------------------------------------------------------------


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="LSHLoss .* mean 'lshl2'"):
        build(mode='lshl')
    with pytest.raises(ValueError, match="LSHLoss .* mean 'median'"):
        build(bias='mediam')
    with pytest.raises(ValueError, match='unfold=2. Try unfold=3'):
        build(unfold=2)
    for name in ('channels', 'hash_num', 'std', 'bias_steps'):
        with pytest.raises(ValueError, match=f'LSHLoss needs {name} > 0'):
            build(**{name: 0})


def test_maps_that_do_not_fit_are_named(pyramid, gt):
    student, teacher = pyramid
    loss = build()
    with pytest.raises(ValueError, match='got 1 of the student and 2 of the'):
        loss(student[:1], teacher, gt)
    narrow = tuple(one[:, :2] for one in student)
    with pytest.raises(ValueError, match='in_channels=2, out_channels=3'):
        loss(narrow, teacher, gt)
    with pytest.raises(ValueError, match='Set its channels to 2'):
        loss(narrow, narrow, gt)

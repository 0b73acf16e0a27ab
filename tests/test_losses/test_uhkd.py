import cmath
import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.losses.uhkd import UHKDLoss, low_spectrum, spectrum_error
from mmkd.structures import GroundTruth

#: Nothing but the transform.
PLAIN = dict(grid=None, sigma=None, standardise=False)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 3, 8, 8).double().unbind()


def wave(rows, columns, size=8, shift=0.0):
    """A real pattern of one frequency, whole turns over the map."""
    step = torch.arange(size).double() * 2 * math.pi / size
    return (rows * step[:, None] + columns * step + shift).cos()


def literal(feature, keep, sigma):
    """The same by the definition, frequency by frequency."""
    height, width = feature.shape
    found = {}
    for u in range(-(keep[0] // 2), keep[0] - keep[0] // 2):
        for v in range(-(keep[1] // 2), keep[1] - keep[1] // 2):
            total = sum(
                feature[y, x].item()
                * cmath.exp(-2j * math.pi * (u * y / height + v * x / width))
                for y in range(height)
                for x in range(width)
            )
            squares = (2 * u / height) ** 2 + (2 * v / width) ** 2
            gain = math.exp(-squares / (2 * sigma**2))
            found[u, v] = gain * total / math.sqrt(height * width)
    return found


@pytest.mark.parametrize(
    ('size', 'keep'), [((6, 4), (4, 2)), ((5, 6), (3, 3)), ((4, 5), (4, 5))]
)
def test_a_spectrum_is_the_literal_sum_damped_and_cut(size, keep):
    torch.manual_seed(0)
    feature = torch.randn(size).double()
    found = low_spectrum(feature[None, None], keep, sigma=0.7)[0, 0]
    expected = literal(feature, keep, 0.7)
    assert tuple(found.shape) == keep
    for (u, v), value in expected.items():
        place = u + keep[0] // 2, v + keep[1] // 2
        assert abs(found[place].item() - value) < 1e-12


def test_all_frequencies_together_are_the_error_of_the_maps(maps):
    """Parseval's theorem."""
    loss = UHKDLoss(keep=(8, 8), component='complex', **PLAIN)
    torch.testing.assert_close(
        loss(*maps), F.mse_loss(*maps), rtol=0, atol=1e-15
    )


def test_an_amplitude_differs_by_hand():
    # A wave of height 2 a turn: 2 / 2 * 8 at either sign of its frequency,
    # nothing else; the other side has none.
    student = 2 * wave(1, 2)[None, None]
    loss = UHKDLoss(keep=(8, 8), loss_weight=3.0, **PLAIN)
    expected = 3 * 2 * 8.0**2 / 64
    value = loss(student, torch.zeros_like(student))
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_amplitudes_ignore_a_shift_and_complex_ones_do_not(maps):
    student, teacher = maps
    turned = student.roll((3, -2), (2, 3))
    for standardise in (True, False):
        settings = dict(grid=None, keep=(4, 4), standardise=standardise)
        loss = UHKDLoss(**settings)
        torch.testing.assert_close(
            loss(turned, teacher), loss(student, teacher)
        )
        assert loss(turned, student) < 1e-12
        assert UHKDLoss(component='complex', **settings)(turned, student) > 0.1


@pytest.mark.parametrize('standardise', [True, False])
@pytest.mark.parametrize('component', ['amplitude', 'complex'])
def test_a_frequency_above_the_cut_does_not_count(
    maps, component, standardise
):
    student, teacher = maps
    loss = UHKDLoss(
        grid=None, keep=(4, 4), component=component, standardise=standardise
    )
    before = loss(student, teacher)
    for rows, columns in ((3, 0), (0, 3), (2, 3), (4, 4)):
        added = 5 * wave(rows, columns, shift=0.3)
        assert (loss(student + added, teacher) - before).abs() < 1e-12
    assert (loss(student + wave(1, 1), teacher) - before).abs() > 1e-3


def test_the_filter_damps_what_is_far_from_the_constant():
    values = [
        UHKDLoss(grid=None, keep=(8, 8), sigma=sigma, standardise=False)(
            wave(*frequency)[None, None], torch.zeros(1, 1, 8, 8).double()
        )
        for sigma, frequency in (
            (None, (1, 2)),
            (0.5, (1, 2)),
            (0.5, (0, 1)),
        )
    ]
    # Frequencies in units of the fourth: (1/4)^2 + (2/4)^2 = 5/16.
    gain = math.exp(-(5 / 16) / (2 * 0.25)) ** 2
    assert values[1].item() == pytest.approx(gain * values[0].item())
    assert values[1] < values[2] < values[0]


def test_transforms_run_over_space_not_over_channels_or_images(maps):
    """A permutation of either is one of what is compared."""
    student, teacher = maps
    loss = UHKDLoss(grid=None, keep=(3, 5), component='complex')
    plain = loss(student, teacher)
    turned = [one[:, [2, 0, 1]] for one in maps]
    torch.testing.assert_close(loss(*turned), plain)
    turned = [one.flip(0) for one in maps]
    torch.testing.assert_close(loss(*turned), plain)
    # Every cell matters to every frequency.
    turned = [one.flatten(2)[..., torch.randperm(64)] for one in maps]
    turned = [one.unflatten(2, (8, 8)) for one in turned]
    assert (loss(*turned) - plain).abs() > 1e-3


def test_each_channel_of_each_image_is_standardised(maps):
    student, teacher = maps
    loss = UHKDLoss(grid=None, keep=(8, 8), sigma=None, component='complex')
    scale, offset = torch.rand(2, 2, 3, 1, 1).double() + 0.5
    torch.testing.assert_close(
        loss(scale * student + offset, teacher), loss(student, teacher)
    )
    one, other = (
        (x - x.mean((2, 3), keepdim=True))
        / x.std((2, 3), correction=0, keepdim=True)
        for x in maps
    )
    torch.testing.assert_close(loss(*maps), F.mse_loss(one, other))


def test_a_flat_channel_has_no_frequency_and_no_gradient():
    student = torch.full((1, 2, 8, 8), 3.0, requires_grad=True)
    teacher = torch.zeros(1, 2, 8, 8)
    loss = UHKDLoss(grid=None, keep=(4, 4))
    value = loss(student, teacher)
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


def test_maps_of_any_size_meet_on_the_grid():
    smooth = torch.linspace(0, 1, 24).square()[:, None] * torch.ones(32)
    fine = smooth[None, None]
    coarse = F.avg_pool2d(fine, 2)
    loss = UHKDLoss(grid=(6, 8), keep=(4, 4), component='complex')
    assert loss(coarse, fine) < 1e-3
    assert loss(coarse.flip(2), fine) > 0.1


def test_a_fine_pattern_does_not_fold_into_a_smaller_grid():
    """Every other cell of a map, sampled without care, is a constant."""
    smooth = wave(1, 1, size=32)[None, None]
    stripes = wave(0, 14, size=32)[None, None]
    loss = UHKDLoss(grid=(8, 8), keep=(4, 4), sigma=None, standardise=False)
    alone, changed = (
        loss(smooth, 0 * smooth),
        loss(smooth + stripes, 0 * smooth),
    )
    assert (changed - alone).abs() < 0.05 * alone


def test_the_border_is_zero_before_the_transform(maps):
    student, teacher = maps
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=(64, 64),
        image_shapes=[(64, 64), (40, 48)],
    )
    loss = UHKDLoss(keep=(8, 8), component='complex', **PLAIN)
    squares = (student - teacher).square()
    squares[1, :, 5:] = 0
    squares[1, :, :, 6:] = 0
    torch.testing.assert_close(loss(*maps, gt), squares.mean())
    loss.keep_padding = True
    torch.testing.assert_close(loss(*maps, gt), F.mse_loss(*maps))


def test_mean_and_scale_are_those_of_the_cells_that_count(maps):
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=(64, 64),
        image_shapes=[(64, 64), (40, 48)],
    )
    loss = UHKDLoss(grid=None, keep=(8, 8), sigma=None, component='complex')
    inside = [one[1:, :, :5, :6] for one in maps]
    first = loss(*(one[:1] for one in maps))
    small = UHKDLoss(grid=None, keep=(5, 6), sigma=None, component='complex')
    torch.testing.assert_close(loss(*maps, gt), (first + small(*inside)) / 2)


def test_an_image_without_a_cell_that_counts_costs_nothing(maps):
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=(64, 64),
        image_shapes=[(64, 64), (0, 0)],
    )
    loss = UHKDLoss(grid=None, keep=(4, 4))
    alone = loss(*(one[:1] for one in maps))
    torch.testing.assert_close(loss(*maps, gt), alone / 2)


def test_tokens_are_the_map_that_they_are_of():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 6, 8).unbind()
    tokens = teacher.flatten(2).transpose(1, 2)  # N, L, C
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=(96, 128))
    loss = UHKDLoss(grid=(8, 8), keep=(4, 4))
    torch.testing.assert_close(
        loss(student, tokens, gt), loss(student, teacher, gt)
    )
    with pytest.raises(ValueError, match='Leave class tokens out'):
        loss(student, tokens[:, 1:], gt)


def test_gradient_is_that_of_finite_differences(maps):
    student, teacher = (one[:1, :2, :5, :5].clone() for one in maps)
    for component in ('amplitude', 'complex'):
        loss = UHKDLoss(grid=(4, 4), keep=(3, 3), component=component)
        assert torch.autograd.gradcheck(
            lambda s: loss(s, teacher),  # noqa: B023
            student.clone().requires_grad_(),
        )


def test_half_precision_is_not_used_under_autocast(maps):
    maps = [one.float() for one in maps]
    loss = UHKDLoss(grid=(6, 6), keep=(4, 4))
    plain = loss(*maps)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(*maps), plain)


def test_nothing_of_it_learns():
    loss = UHKDLoss()
    assert list(loss.parameters()) == []
    assert list(loss.buffers()) == []


def test_parts_of_a_complex_error_are_added():
    student = torch.tensor([3 + 4j]).view(1, 1, 1, 1)
    teacher = torch.zeros_like(student)
    for component in ('amplitude', 'complex'):
        assert spectrum_error(student, teacher, component) == 25


def test_channel_mismatch_names_the_projection(maps):
    student, teacher = maps
    fix = "type='mmkd.SpectralAdapt', in_channels=2, out_channels=3"
    with pytest.raises(ValueError, match=fix):
        UHKDLoss(grid=(4, 4), keep=(2, 2))(student[:, :2], teacher)
    with pytest.raises(ValueError, match='ResizeAdapt'):
        UHKDLoss(keep=(2, 2), **PLAIN)(student[..., :4], teacher)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(keep=(40, 16)), r'spectrum of \(32, 32\), got keep=\(40, 16\)'),
        (dict(keep=(16, 0)), r'for instance keep=\(16, 16\)'),
        (dict(sigma=0.0), 'sigma > 0'),
        (dict(component='phase'), "no component 'phase'"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        UHKDLoss(**settings)


def test_a_map_smaller_than_what_is_kept_is_named(maps):
    with pytest.raises(ValueError, match=r'spectrum of \(8, 8\)'):
        UHKDLoss(grid=None)(*maps)

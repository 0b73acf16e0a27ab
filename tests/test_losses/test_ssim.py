import math

import pytest
import torch

from mmkd.losses.ssim import (
    SSIMLoss,
    _root,
    gaussian_window,
    ssim_loss,
    ssim_map,
)
from mmkd.structures import GroundTruth

C1, C2 = 0.01**2, 0.03**2


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 3, 6, 5).unbind()


def literal(student, teacher, window, exponents, data_range=1.0, mask=None):
    """SSIM of one plane, cell by cell, from the definition."""
    rows, columns = student.shape
    reach = len(window) // 2
    c1, c2 = C1 * data_range**2, C2 * data_range**2
    result = torch.zeros(rows, columns)
    for y in range(rows):
        for x in range(columns):
            weights, own, other = [], [], []
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    if not (0 <= y + i < rows and 0 <= x + j < columns):
                        continue
                    if mask is not None and not mask[y + i, x + j]:
                        continue
                    weights.append(
                        window[i + reach].item() * window[j + reach].item()
                    )
                    own.append(student[y + i, x + j].item())
                    other.append(teacher[y + i, x + j].item())
            if not weights:
                continue
            whole = sum(weights)
            weights = [one / whole for one in weights]
            a = sum(w * s for w, s in zip(weights, own))
            b = sum(w * t for w, t in zip(weights, other))
            va = sum(w * (s - a) ** 2 for w, s in zip(weights, own))
            vb = sum(w * (t - b) ** 2 for w, t in zip(weights, other))
            cov = sum(
                w * (s - a) * (t - b) for w, s, t in zip(weights, own, other)
            )
            product = math.sqrt(va) * math.sqrt(vb)
            factors = (
                (2 * a * b + c1) / (a**2 + b**2 + c1),
                (2 * product + c2) / (va + vb + c2),
                (cov + c2 / 2) / (product + c2 / 2),
            )
            value = 1.0
            for factor, power in zip(factors, exponents):
                size = abs(factor) ** power if power else 1.0
                value *= math.copysign(size, factor) if power else 1.0
            result[y, x] = value
    return result


def planes(student, teacher, *settings, mask=None):
    images, channels = student.shape[:2]
    return torch.stack(
        [
            torch.stack(
                [
                    literal(
                        student[n, c],
                        teacher[n, c],
                        *settings,
                        mask=None if mask is None else mask[n, 0],
                    )
                    for c in range(channels)
                ]
            )
            for n in range(images)
        ]
    )


@pytest.mark.parametrize(
    'exponents',
    [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (2, 1.5, 3)],
)
def test_equals_a_literal_loop(maps, exponents):
    window = gaussian_window(3, 0.8)
    torch.testing.assert_close(
        ssim_map(*maps, window, exponents, data_range=2.0),
        planes(*maps, window, exponents, 2.0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_window_larger_than_the_map_is_cut(maps):
    window = gaussian_window(11, 1.5)
    torch.testing.assert_close(
        ssim_map(*maps, window),
        planes(*maps, window, (1, 1, 1)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_masked_cells_enter_no_window_and_do_not_count(maps):
    mask = torch.ones(2, 1, 6, 5)
    mask[1, :, :, 3:] = 0
    mask[0, :, 5] = 0
    window = gaussian_window(3, 0.8)
    likeness = planes(*maps, window, (1, 1, 1), mask=mask)
    expected = (mask * (1 - likeness) / 2).sum() / (3 * mask.sum())
    torch.testing.assert_close(
        ssim_loss(*maps, window, mask=mask), expected, rtol=1e-4, atol=1e-6
    )


def test_the_loss_is_half_of_what_is_missing_to_one(maps):
    window = gaussian_window(5, 1.0)
    expected = (1 - planes(*maps, window, (1, 1, 1)).mean()) / 2
    torch.testing.assert_close(ssim_loss(*maps, window), expected)


def test_the_window_is_a_gaussian_that_sums_to_one():
    window = gaussian_window(5, sigma=2.0)
    ratio = math.exp(-(2**2) / (2 * 2.0**2))
    assert (window[0] / window[2]).item() == pytest.approx(ratio)
    assert window.sum().item() == pytest.approx(1)
    torch.testing.assert_close(window, window.flip(0))
    torch.testing.assert_close(gaussian_window(5, None), torch.full((5,), 0.2))


def test_flat_maps_differ_in_luminance_alone():
    student, teacher = torch.full((2, 1, 1, 4, 4), 2.0).unbind()
    teacher = 3 * teacher
    value = (2 * 2 * 6 + C1) / (4 + 36 + C1)
    torch.testing.assert_close(
        ssim_map(student, teacher, gaussian_window(3)),
        torch.full((1, 1, 4, 4), value),
    )


def test_an_inverted_pattern_has_a_negative_structure():
    row = torch.tensor([1.0, -1.0, 0.0])
    pattern = torch.stack([row, row.roll(1), row.roll(2)])[None, None]
    # The middle cell sees all nine, with mean 0 and variance 6 / 9.
    centre = ssim_map(-pattern, pattern, gaussian_window(3, None))[0, 0, 1, 1]
    variance = 6 / 9
    expected = (-2 * variance + C2) / (2 * variance + C2)
    assert centre.item() == pytest.approx(expected)


def test_equal_maps_cost_nothing_and_opposite_ones_nearly_one(maps):
    student, _ = maps
    student = student - student.mean((2, 3), keepdim=True)
    assert SSIMLoss()(student, student) < 1e-6
    only = dict(exponents=(0, 1, 1), window_size=3)
    assert SSIMLoss(**only)(-student, student) > 0.99


def test_scale_of_both_and_of_the_range_cancels(maps):
    student, teacher = maps
    window = gaussian_window(3)
    torch.testing.assert_close(
        ssim_map(7 * student, 7 * teacher, window, data_range=7.0),
        ssim_map(student, teacher, window),
    )


def test_student_and_teacher_may_change_places(maps):
    student, teacher = maps
    torch.testing.assert_close(
        SSIMLoss()(student, teacher), SSIMLoss()(teacher, student)
    )


def test_contrast_and_structure_do_not_see_the_level(maps):
    student, teacher = maps
    loss = SSIMLoss(exponents=(0, 1, 1))
    torch.testing.assert_close(
        loss(student + 300, teacher - 200),
        loss(student, teacher),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize('exponents', [(1, 1, 1), (1, 2, 1)])
def test_rounding_in_flat_places_stays_in_bounds(exponents):
    """Two flat halves, 300 and -300, have variances of rounding alone."""
    student = torch.full((1, 1, 8, 24), 300.1)
    student[..., 12:] = -300.3
    likeness = ssim_map(
        student, student * 1.001, gaussian_window(3), exponents
    )
    assert likeness.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize('exponents', [(1, 1, 1), (2, 1, 3)])
def test_gradient_is_that_of_finite_differences(maps, exponents):
    student, teacher = (one[:1, :1].double() for one in maps)
    window = gaussian_window(3, 0.8).double()
    mask = torch.ones(1, 1, 6, 5, dtype=torch.double)
    mask[..., 4:] = 0
    assert torch.autograd.gradcheck(
        lambda one: ssim_loss(one, teacher, window, exponents, mask=mask),
        student.requires_grad_(),
    )


@pytest.mark.parametrize('exponents', [(1, 2, 1), (2, 1, 3), (0, 0, 1)])
def test_flat_maps_have_a_finite_gradient_under_every_exponent(exponents):
    student = torch.zeros(1, 2, 4, 4, requires_grad=True)
    SSIMLoss(exponents=exponents)(student, torch.ones(1, 2, 4, 4)).backward()
    assert student.grad.isfinite().all()


def test_a_deviation_of_zero_has_no_gradient():
    variance = torch.tensor([0.0, 4.0], requires_grad=True)
    deviation = _root(variance)
    deviation.sum().backward()
    assert deviation.tolist() == [0, 2]
    assert variance.grad.tolist() == [0, 0.25]


def padded():
    """Two images of a batch of 48x40 pixels; the second is narrower."""
    boxes = [torch.tensor([[2.0, 2, 9, 9]]), torch.zeros(0, 4)]
    ignored = [torch.tensor([[20.0, 20, 30, 30]]), torch.zeros(0, 4)]
    return GroundTruth.from_boxes(
        boxes,
        shape=(48, 40),
        image_shapes=[(48, 40), (48, 24)],
        ignored=ignored,
    )


def test_the_padded_border_does_not_count(maps):
    student, teacher = maps
    loss = SSIMLoss(loss_weight=3.0, window_size=3)
    value = loss(student, teacher, padded())
    mask = torch.ones(2, 1, 6, 5)
    mask[1, :, :, 3:] = 0
    torch.testing.assert_close(
        value, 3 * ssim_loss(student, teacher, gaussian_window(3), mask=mask)
    )
    student = student.clone()
    student[1, :, :, 3:] += 9
    torch.testing.assert_close(loss(student, teacher, padded()), value)
    kept = SSIMLoss(loss_weight=3.0, window_size=3, keep_padding=True)
    torch.testing.assert_close(
        kept(student, teacher, padded()), loss(student, teacher)
    )


def test_the_window_of_the_module_is_that_of_its_settings(maps):
    loss = SSIMLoss(window_size=3, sigma=None, data_range=4.0)
    torch.testing.assert_close(
        loss(*maps),
        ssim_loss(*maps, gaussian_window(3, None), data_range=4.0),
    )
    torch.testing.assert_close(
        SSIMLoss()(*maps), ssim_loss(*maps, gaussian_window(11, 1.5))
    )
    assert not loss.state_dict()


def test_half_precision_is_not_used_under_autocast(maps):
    value = SSIMLoss()(*maps)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(SSIMLoss()(*maps), value)


def test_an_even_window_is_refused_with_the_next_odd_one():
    with pytest.raises(ValueError, match='Try window_size=9'):
        SSIMLoss(window_size=8)


@pytest.mark.parametrize(
    'exponents', [(0.5, 1, 1), (0, 0, 0), (1, 1), (1, -1, 1)]
)
def test_exponents_without_a_derivative_are_refused(exponents):
    with pytest.raises(ValueError, match='each 0 or at least 1'):
        SSIMLoss(exponents=exponents)


def test_impossible_scales_are_refused():
    with pytest.raises(ValueError, match='data_range > 0'):
        SSIMLoss(data_range=0)
    with pytest.raises(ValueError, match='sigma > 0'):
        SSIMLoss(sigma=-1.0)


def test_channel_mismatch_names_the_fix(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='in_channels=2, out_channels=3'):
        SSIMLoss()(student[:, :2], teacher)


def test_another_batch_of_ground_truth_is_refused(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='has 1, gt has 2'):
        SSIMLoss()(student[:1], teacher[:1], padded())


def test_where_no_cell_counts_nothing_is_lost(maps):
    student, teacher = maps
    mask = torch.zeros_like(student[:, :1])
    assert ssim_loss(student, teacher, gaussian_window(3), mask=mask) == 0


def test_a_window_may_be_a_single_cell(maps):
    """Nothing varies in it: only luminance is left."""
    one = SSIMLoss(window_size=1)(*maps)
    other = SSIMLoss(window_size=1, exponents=(1.0, 0.0, 0.0))(*maps)
    torch.testing.assert_close(one, other)


def test_float64_maps_are_taken_beside_a_mask_in_float32(maps):
    student, teacher = (one.double() for one in maps)
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=(48, 40))
    torch.testing.assert_close(
        SSIMLoss()(student, teacher, gt).float(), SSIMLoss()(*maps, gt)
    )

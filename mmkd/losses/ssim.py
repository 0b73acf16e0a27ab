"""SSIM: imitate level, contrast and structure of each neighbourhood."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive, check_same_shape
from mmkd.ops.masks import require_ground_truth, valid_mask
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

#: Share of the data range that keeps quotients of flat neighbourhoods finite.
LUMINANCE_SHARE, CONTRAST_SHARE = 0.01, 0.03


def gaussian_window(size: int, sigma: float | None = 1.5) -> Tensor:
    r"""Weights :math:`\propto e^{-x^2 / 2 \sigma^2}` that sum to one, (size,).

    Args:
        size: Number of cells, odd.
        sigma: Deviation in cells; None weighs all cells alike.

    Example:
        >>> gaussian_window(3, sigma=None)
        tensor([0.3333, 0.3333, 0.3333])
    """
    offset = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    weight = (
        torch.ones_like(offset)
        if sigma is None
        else (-(offset**2) / (2 * sigma**2)).exp()
    )
    return weight / weight.sum()


def ssim_map(
    student: Tensor,
    teacher: Tensor,
    window: Tensor,
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
    data_range: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Structural similarity of each cell's neighbourhood in each channel.

    With means :math:`\mu`, deviations :math:`\sigma` and the covariance
    :math:`\sigma_{ST}` under a window around the cell:

    .. math:: SSIM = l^\alpha c^\beta s^\gamma, \quad
        l = \frac{2 \mu_S \mu_T + C_1}{\mu_S^2 + \mu_T^2 + C_1}, \quad
        c = \frac{2 \sigma_S \sigma_T + C_2}
                 {\sigma_S^2 + \sigma_T^2 + C_2}, \quad
        s = \frac{\sigma_{ST} + C_3}{\sigma_S \sigma_T + C_3}

    where :math:`C_1 = (0.01 R)^2`, :math:`C_2 = (0.03 R)^2`,
    :math:`C_3 = C_2 / 2` for data of range R. Features have signs, which
    images do not: l and s may be negative, and a power keeps their sign.

    The window has no weight beyond the map and where the mask is zero; what
    is left of it is scaled to sum to one. A window larger than the map is
    therefore cut, and nothing is mirrored at the border.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        window: Weights along a row, used along columns alike; odd, (K,).
        exponents: Powers of luminance, contrast and structure. Each is 0,
            which leaves the factor out, or at least 1.
        data_range: R.
        mask: 1 where a cell counts, 0 elsewhere, (N, 1, H, W); all if None.

    Returns:
        Similarity in [-1, 1], computed in float32, (N, C, H, W). It has no
        meaning where the mask is zero.

    Reference:
        Wang et al., "Image Quality Assessment: From Error Visibility to
        Structural Similarity", IEEE TIP 2004.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> bool((ssim_map(x, x, gaussian_window(5)) > 0.9999).all())
        True
    """
    check_same_shape('SSIMLoss', student, teacher)
    student, teacher = as_float(student), as_float(teacher)
    if mask is None:
        mask = torch.ones_like(student[:, :1])
    window, mask = window.to(student), mask.to(student)
    with full_precision(student):
        total = _blur(mask, window).clamp(min=torch.finfo(window.dtype).tiny)

        def mean(values: Tensor) -> Tensor:
            return _blur(values * mask, window) / total

        # Variances do not depend on the level of a channel, but their
        # rounding does: it is taken out first.
        levels = [
            one.detach().mean((2, 3), keepdim=True)
            for one in (student, teacher)
        ]
        student, teacher = student - levels[0], teacher - levels[1]
        own, other = mean(student), mean(teacher)
        own_variance = (mean(student**2) - own**2).clamp(min=0)
        other_variance = (mean(teacher**2) - other**2).clamp(min=0)
        covariance = mean(student * teacher) - own * other
    first = (LUMINANCE_SHARE * data_range) ** 2
    second = (CONTRAST_SHARE * data_range) ** 2
    alpha, beta, gamma = exponents
    luminance = _likeness(own + levels[0], other + levels[1], first)
    variances = own_variance + other_variance + second
    if beta == gamma:  # the deviations cancel, and their roots with them
        covariance = _within(covariance, (own_variance + other_variance) / 2)
        rest = _power((2 * covariance + second) / variances, beta)
    else:
        product = _root(own_variance) * _root(other_variance)
        covariance = _within(covariance, product)
        contrast = (2 * product + second) / variances
        structure = (covariance + second / 2) / (product + second / 2)
        rest = _power(contrast, beta) * _power(structure, gamma)
    return _power(luminance, alpha) * rest


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    window: Tensor,
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
    data_range: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    r""":math:`(1 - SSIM) / 2`, the mean over channels and cells that count.

    Args:
        student, teacher, window, exponents, data_range, mask: As for
            :func:`ssim_map`.

    Returns:
        Scalar in [0, 1], computed in float32, 0 for an empty mask.

    Reference:
        As :class:`SSIMLoss`.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> ssim_loss(x, x, gaussian_window(5)).item() < 1e-5
        True
    """
    likeness = ssim_map(student, teacher, window, exponents, data_range, mask)
    if mask is None:
        return (1 - likeness.mean()) / 2
    error = (1 - likeness.mean(1, keepdim=True)) / 2
    return (mask * error).sum() / mask.sum().clamp(min=1)


def _blur(feature: Tensor, window: Tensor) -> Tensor:
    """Weighted sum around each cell, zeros beyond the map, same shape."""
    reach = len(window) // 2
    planes = feature.flatten(0, 1)[:, None]  # N * C, 1, H, W
    planes = F.conv2d(planes, window.view(1, 1, -1, 1), padding=(reach, 0))
    planes = F.conv2d(planes, window.view(1, 1, 1, -1), padding=(0, reach))
    return planes.view_as(feature)


def _likeness(one: Tensor, other: Tensor, constant: float) -> Tensor:
    return (2 * one * other + constant) / (one**2 + other**2 + constant)


def _within(covariance: Tensor, bound: Tensor) -> Tensor:
    """What rounding adds to a covariance is more than a flat place has."""
    return torch.maximum(torch.minimum(covariance, bound), -bound)


def _power(values: Tensor, exponent: float) -> Tensor:
    """Power of the size, with the sign of the value."""
    if exponent == 1:
        return values
    if exponent == 0:
        return torch.ones_like(values)
    return values.sign() * values.abs().pow(exponent)


def _root(variance: Tensor, eps: float = 1e-12) -> Tensor:
    """Square root, 0 without a gradient up to ``eps``."""
    positive = variance > eps
    return torch.where(positive, variance, 1).sqrt() * positive


@MODELS.register_module()
class SSIMLoss(nn.Module):
    r"""Structural dissimilarity of two maps, channel by channel.

    See :func:`ssim_map` for the formula and :func:`ssim_loss` for the mean.
    Cells of the padded border neither count nor enter a window; cells in
    ignored boxes do, as nothing here depends on what an object is. Without a
    ground truth all cells count.

    It keeps five blurred copies of the map for the backward pass.

    Args:
        loss_weight: Factor of :func:`ssim_loss`; the default is ours.
        window_size: Cells of the window in each direction, odd.
        sigma: Deviation of its Gaussian in cells; None weighs all alike.
        exponents: Powers of luminance, contrast and structure, each 0 or at
            least 1.
        data_range: Range of the features, from which the constants follow.
        keep_padding: Let cells of the padded border count.

    Raises:
        ValueError: If the window is even, an exponent lies where its power
            has no derivative, or all exponents are 0.

    Not kept:
        batch: The mean is that over the cells of the whole batch.

    Reference:
        de Rijk et al., "Structural Knowledge Distillation for Object
        Detection", NeurIPS 2022, arXiv:2211.13133. Its abstract was read,
        not the paper: SSIM is that of Wang et al. with a Gaussian of
        11 cells and deviation 1.5, and halving ``1 - SSIM`` is kornia's way,
        the library that a list of detection papers names as the code. The
        treatment of borders, padding and signs is ours, and so is range 1:
        what features were scaled to is not known to us.
    """

    example: ClassVar[dict] = dict()

    def __init__(
        self,
        loss_weight: float = 1.0,
        window_size: int = 11,
        sigma: float | None = 1.5,
        exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
        data_range: float = 1.0,
        keep_padding: bool = False,
    ) -> None:
        super().__init__()
        check_positive('SSIMLoss', data_range=data_range)
        if sigma is not None:
            check_positive('SSIMLoss', sigma=sigma)
        _check_window(window_size)
        _check_exponents(exponents)
        self.loss_weight = loss_weight
        self.exponents = tuple(exponents)
        self.data_range = data_range
        self.keep_padding = keep_padding
        self.register_buffer(
            'window', gaussian_window(window_size, sigma), persistent=False
        )

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        mask = None
        if gt is not None:
            gt = require_ground_truth('SSIMLoss', gt, student)
            mask = valid_mask(
                gt,
                tuple(student.shape[-2:]),
                self.keep_padding,
                keep_ignored=True,
            )
        return self.loss_weight * ssim_loss(
            student,
            teacher,
            self.window,
            self.exponents,
            self.data_range,
            mask,
        )


def _check_window(size: int) -> None:
    if size % 2 != 1 or size < 1:
        raise ValueError(
            f'SSIMLoss centres its window on a cell and needs an odd '
            f'window_size, got window_size={size}. Try '
            f'window_size={max(1, size + 1)}.'
        )


def _check_exponents(exponents: tuple[float, ...]) -> None:
    fits = len(exponents) == 3 and any(exponents)
    if fits and all(one == 0 or one >= 1 for one in exponents):
        return
    raise ValueError(
        f'SSIMLoss needs three exponents, of luminance, contrast and '
        f'structure, each 0 or at least 1 and one of them not 0, got '
        f'exponents={tuple(exponents)!r}. The usual ones are (1, 1, 1).'
    )

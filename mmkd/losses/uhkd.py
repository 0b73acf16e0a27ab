"""UHKD: unlike networks agree on the low frequencies of their maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive, check_same_shape
from mmkd.ops.masks import require_ground_truth, valid_mask
from mmkd.ops.numeric import as_float, full_precision, unit
from mmkd.ops.tokens import tokens_as_map
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

COMPONENTS = ('amplitude', 'complex')


def low_spectrum(
    feature: Tensor, keep: Sequence[int], sigma: float | None = 0.5
) -> Tensor:
    r"""The lowest frequencies of a map, the higher of them damped.

    .. math:: X_{uv} \, e^{-(u^2 + v^2) / (2 \sigma^2)}, \quad
        X = \frac{1}{\sqrt{HW}} FFT_2(F)

    The frequencies u and v of rows and columns are in units of the highest
    that the map can hold, so that both lie in [-1, 1].

    Args:
        feature: Map, (N, C, H, W).
        keep: Rows and columns of the spectrum's middle that are kept.
        sigma: Width of the filter; no damping if None.

    Returns:
        Complex spectrum with the constant part in its middle, at ``h // 2``
        and ``w // 2``, (N, C, h, w).

    Example:
        >>> low_spectrum(torch.ones(1, 1, 4, 4), keep=(2, 2)).abs()
        tensor([[[[0., 0.],
                  [0., 4.]]]])
    """
    feature = as_float(feature)
    size = feature.shape[-2:]
    # Autocast would give half precision to the transform.
    with full_precision(feature):
        spectrum = torch.fft.fft2(feature, norm='ortho')
        spectrum = torch.fft.fftshift(spectrum, dim=(2, 3))
    kept, gains = [], []
    for cells, count in zip(size, keep):
        first = cells // 2 - count // 2
        middle = slice(first, first + count)
        step = torch.arange(cells, device=feature.device) - cells // 2
        kept.append(middle)
        gains.append((2 * step.to(feature) / cells)[middle])
    spectrum = spectrum[..., kept[0], kept[1]]
    if sigma is None:
        return spectrum
    squares = gains[0][:, None].square() + gains[1].square()
    return spectrum * torch.exp(-squares / (2 * sigma**2))


def spectrum_error(
    student: Tensor, teacher: Tensor, component: str = 'amplitude'
) -> Tensor:
    r"""Mean squared difference of two spectra.

    Args:
        student: Complex spectrum, (N, C, h, w).
        teacher: The same of the teacher, without gradient.
        component: ``'amplitude'``, :math:`(|X_S| - |X_T|)^2`, which does not
            know where a pattern is, or ``'complex'``,
            :math:`|X_S - X_T|^2`, which does: the squares of the real and of
            the imaginary part are added.

    Returns:
        Scalar >= 0.

    Example:
        >>> x = torch.ones(1, 1, 2, 2, dtype=torch.complex64)
        >>> spectrum_error(1j * x, x).item()
        0.0
        >>> spectrum_error(1j * x, x, 'complex').item()
        2.0
    """
    if component == 'amplitude':
        return (student.abs() - teacher.abs()).square().mean()
    gap = torch.view_as_real(student - teacher)
    return gap.square().sum(-1).mean()


@MODELS.register_module()
class UHKDLoss(nn.Module):
    """Distance of low-frequency spectra, for networks that are unlike.

    A convolutional network and a transformer differ in the details of their
    maps more than in the coarse layout. Both maps are brought to one grid and
    transformed; the low frequencies of each channel are compared, see
    :func:`low_spectrum` and :func:`spectrum_error`. On the teacher's side
    nothing is learnt; on the student's the projection is a part of the term,
    ``align=dict(type='mmkd.SpectralAdapt', …)``. Size and stride may differ,
    and the teacher's map may come as tokens, (N, L, C).

    Cells of the padded border are 0 before the transform.

    Args:
        grid: Rows and columns that both maps are resized to; None keeps their
            size, which must then be the same.
        keep: Rows and columns of the spectrum that are compared.
        sigma: Width of the low-pass filter, 1 for the highest frequency of
            the grid; None for no filter.
        component: ``'amplitude'`` or ``'complex'``.
        standardise: Take the mean over the cells that count from each
            channel of each image, and give what is kept of its spectrum a
            mean square of 1, so that it tells the pattern and not the scale
            of a network. What the low pass removes has no part in it.
        loss_weight: The outer factor.
        keep_padding: Let cells of the padded border count.

    Raises:
        ValueError: If a setting is out of range, more is kept than the grid
            has, or channels differ.

    Reference:
        Yu et al., "UHKD: A Unified Framework for Heterogeneous Knowledge
        Distillation via Frequency-Domain Representations", arXiv:2510.24116.
        Outline read, not the authors' code, of which there is none: spectra
        of both sides through a low pass, a learned projection of the student
        alone, mean squared error at several levels, divergence of the class
        scores beside it (a term of its own). The filter, the sizes, the
        weight, the standardised channels and the border are ours.

    Example:
        >>> maps = torch.randn(2, 8, 20, 30), torch.randn(2, 8, 40, 60)
        >>> UHKDLoss()(*maps).shape
        torch.Size([])
    """

    example: ClassVar[dict] = dict(grid=(16, 16), keep=(8, 8))

    def __init__(
        self,
        grid: tuple[int, int] | None = (32, 32),
        keep: tuple[int, int] = (16, 16),
        sigma: float | None = 0.5,
        component: str = 'amplitude',
        standardise: bool = True,
        loss_weight: float = 1.0,
        keep_padding: bool = False,
    ) -> None:
        super().__init__()
        check_name('UHKDLoss', 'component', component, COMPONENTS)
        if sigma is not None:
            check_positive('UHKDLoss', sigma=sigma)
        self.grid = None if grid is None else tuple(grid)
        self.keep = tuple(keep)
        if self.grid is not None:
            self._check_keep(self.grid)
        self.sigma = sigma
        self.component = component
        self.standardise = standardise
        self.loss_weight = loss_weight
        self.keep_padding = keep_padding

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        shape = None if gt is None else gt.shape
        teacher = tokens_as_map('UHKDLoss', teacher, shape)
        if self.grid is None:
            check_same_shape('UHKDLoss', student, teacher)
        elif student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f'UHKDLoss compares channel by channel, got student '
                f'{tuple(student.shape)} and teacher {tuple(teacher.shape)}. '
                f"Add align=dict(type='mmkd.SpectralAdapt', "
                f'in_channels={student.shape[1]}, '
                f'out_channels={teacher.shape[1]}) to this term.'
            )
        error = spectrum_error(
            self.spectrum(student, gt),
            self.spectrum(teacher, gt),
            self.component,
        )
        return self.loss_weight * error

    def spectrum(
        self, feature: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        """What is compared of a map, (N, C, H, W) → (N, C, h, w) complex."""
        size = tuple(feature.shape[-2:])
        if self.grid is None:
            self._check_keep(size)
        feature = as_float(feature)
        if gt is None:
            valid = torch.ones_like(feature[:, :1])
        else:
            gt = require_ground_truth('UHKDLoss', gt, feature)
            valid = valid_mask(gt, size, self.keep_padding, keep_ignored=True)
        if self.standardise:
            # Else the edge of the border would have the height of the mean.
            # From the first cell, so that the mean of equal ones is exact.
            feature = feature - feature[..., :1, :1].detach()
            count = valid.sum((2, 3), keepdim=True).clamp(min=1)
            total = (feature * valid).sum((2, 3), keepdim=True)
            feature = feature - total / count
        feature = feature * valid
        if self.grid not in (None, size):
            # Without the anti-aliasing, fine patterns would fold into the
            # low frequencies of a smaller grid.
            feature = F.interpolate(
                feature, self.grid, mode='bilinear', antialias=True
            )
        spectrum = low_spectrum(feature, self.keep, self.sigma)
        return _unit_power(spectrum) if self.standardise else spectrum

    def _check_keep(self, size: tuple[int, int]) -> None:
        if all(0 < one <= cells for one, cells in zip(self.keep, size)):
            return
        raise ValueError(
            f'UHKDLoss keeps the middle of a spectrum of {size}, got '
            f'keep={self.keep}. Keep at most as many rows and columns, for '
            f'instance keep={tuple(max(1, cells // 2) for cells in size)}.'
        )


def _unit_power(spectrum: Tensor) -> Tensor:
    """Each channel of each image with a mean square of 1, or with none."""
    parts = torch.view_as_real(spectrum)  # N, C, h, w, 2
    scale = math.sqrt(parts.shape[2] * parts.shape[3])
    scaled = scale * unit(parts.flatten(2), dim=2)
    return torch.view_as_complex(scaled.view_as(parts))

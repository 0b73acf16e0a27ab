"""CARAFE: upsampling with a kernel of its own at every pixel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import wide


@torch.no_grad()
def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Each output pixel is a weighted sum over the pixels around its source.

    Args:
        features: (N, C, H, W).
        masks: Weights, (N, group_size * kernel_size², H * s, W * s).
        output: Buffer for the result, (N, C, H * s, W * s).
        kernel_size: Odd side of the window; outside the map are zeros.
        group_size: Groups of channels that share their weights.
        scale_factor: The factor s.

    Reference:
        Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV
        2019, arXiv:1905.02188.
    """
    features, masks = wide(features, masks)
    views = _Views(features, kernel_size, group_size, scale_factor)
    masks = views.split_masks(masks)
    result = 0
    for tap, window in views.windows(views.pad(features)):
        result = result + window * masks[:, :, tap, None]
    output.copy_(result.reshape(output.shape))


@torch.no_grad()
def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the derivatives to ``grad_input`` and ``grad_masks``."""
    grad, features, masks = wide(grad_output, features, masks)
    views = _Views(features, kernel_size, group_size, scale_factor)
    grad = views.split_pixels(grad)
    masks = views.split_masks(masks)
    padded = views.pad(features)
    grad_padded = torch.zeros_like(padded)
    by_tap = []
    for (tap, window), (_, grad_window) in zip(
        views.windows(padded), views.windows(grad_padded)
    ):
        # Sums over the s × s pixels that one source serves (dims 4 and 6),
        # and over the channels of a group (dim 2).
        grad_window += (grad * masks[:, :, tap, None]).sum((4, 6), True)
        by_tap.append((grad * window).sum(2))
    grad_input.add_(views.unpad(grad_padded))
    grad_masks.add_(torch.stack(by_tap, 2).reshape(grad_masks.shape))


@torch.no_grad()
def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """The same operator with scratch buffers, of which one is needed.

    ``rfeatures`` is what mmcv hands to :func:`carafe_backward` in the place of
    ``features``. ``routput`` and ``rmasks`` stay as they are.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(
        features, masks, output, kernel_size, group_size, scale_factor
    )


@torch.no_grad()
def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the derivatives to ``grad_input`` and ``grad_masks``."""
    carafe_naive_backward(
        grad_output,
        rfeatures,
        masks,
        grad_input,
        grad_masks,
        kernel_size,
        group_size,
        scale_factor,
    )


class _Views:
    """The operands, seen so that they multiply without being copied.

    The common shape is (N, groups, C / groups, H, s, W, s): source pixels are
    dims 3 and 5, the output pixels that each serves are dims 4 and 6. Taking
    one tap of the window at a time needs no unfolded map.
    """

    def __init__(
        self, features: Tensor, kernel_size: int, groups: int, scale: int
    ) -> None:
        self.shape = features.shape
        self.kernel_size = kernel_size
        self.groups = groups
        self.scale = scale

    def split_pixels(self, tensor: Tensor) -> Tensor:
        n, c, h, w = self.shape
        return tensor.reshape(
            n, self.groups, c // self.groups, h, self.scale, w, self.scale
        )

    def split_masks(self, masks: Tensor) -> Tensor:
        """(N, groups, taps, H, s, W, s)."""
        n, _, h, w = self.shape
        return masks.reshape(
            n, self.groups, self.kernel_size**2, h, self.scale, w, self.scale
        )

    def pad(self, features: Tensor) -> Tensor:
        return F.pad(features, [self.kernel_size // 2] * 4)

    def unpad(self, padded: Tensor) -> Tensor:
        _, _, h, w = self.shape
        r = self.kernel_size // 2
        return padded[:, :, r : r + h, r : r + w]

    def windows(self, padded: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each tap with the features it sees, as views into ``padded``."""
        _, c, h, w = self.shape
        for tap in range(self.kernel_size**2):
            i, j = divmod(tap, self.kernel_size)
            window = padded[:, :, i : i + h, j : j + w]
            window = window.unflatten(1, (self.groups, c // self.groups))
            yield tap, window[:, :, :, :, None, :, None]

"""Deformable and masked convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 - brings torch.ops.torchvision
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .common import wide

# Derivatives by the weight that came along with those by the input, by the
# gradient they came from, until mmcv asks for them.
_ready = WeakTensorKeyDictionary()

#: An offset to where no map is, pixels.
OUTSIDE = 1e6


@torch.no_grad()
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,  # noqa: N803 - mmcv's names
    kH: int,  # noqa: N803
    dW: int,  # noqa: N803
    dH: int,  # noqa: N803
    padW: int,  # noqa: N803
    padH: int,  # noqa: N803
    dilationW: int,  # noqa: N803
    dilationH: int,  # noqa: N803
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolution whose taps are moved by offsets.

    Args:
        input: (N, C, H, W).
        weight: (O, C / group, kH, kW).
        offset: ``y x`` of each tap, (N, 2 * deformable_group * kH * kW,
            H', W').
        output: Buffer for the result, (N, O, H', W').
        columns: Scratch, not used.
        ones: Scratch, not used.
        kW: Width of the kernel.
        kH: Height of the kernel.
        dW: Stride across.
        dH: Stride down.
        padW: Zeros on the left and right.
        padH: Zeros above and below.
        dilationW: Distance of taps across.
        dilationH: Distance of taps down.
        group: Groups of channels.
        deformable_group: Groups of channels with offsets of their own.
        im2col_step: Images a kernel takes at once; of no consequence here.

    Reference:
        Dai et al., "Deformable Convolutional Networks", ICCV 2017,
        arXiv:1703.06211.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW)
    geometry += (group, deformable_group)
    output.copy_(_convolve(input, weight, offset, None, None, geometry))


@torch.no_grad()
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,  # noqa: N803
    kH: int,  # noqa: N803
    dW: int,  # noqa: N803
    dH: int,  # noqa: N803
    padW: int,  # noqa: N803
    padH: int,  # noqa: N803
    dilationW: int,  # noqa: N803
    dilationH: int,  # noqa: N803
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add the derivatives to ``grad_input`` and ``grad_offset``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW)
    geometry += (group, deformable_group)
    by_input, by_weight, by_offset, _, _ = _derive(
        grad_output, input, weight, offset, None, None, geometry
    )
    grad_input.add_(by_input)
    grad_offset.add_(by_offset)
    # torchvision computes all derivatives at once, mmcv asks twice.
    key = _version(grad_output, input, offset)
    _ready[grad_output] = (key, (input, offset), geometry, by_weight)


@torch.no_grad()
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,  # noqa: N803
    kH: int,  # noqa: N803
    dW: int,  # noqa: N803
    dH: int,  # noqa: N803
    padW: int,  # noqa: N803
    padH: int,  # noqa: N803
    dilationW: int,  # noqa: N803
    dilationH: int,  # noqa: N803
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the derivative to ``grad_weight``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW)
    geometry += (group, deformable_group)
    key = _version(grad_output, input, offset)
    known = _ready.pop(grad_output, None)
    if known is None or known[0] != key or known[2] != geometry:
        # Does not depend on the weight, which mmcv does not pass here.
        weight = torch.zeros_like(grad_weight)
        _, by_weight, _, _, _ = _derive(
            grad_output, input, weight, offset, None, None, geometry
        )
    else:
        by_weight = known[3]
    grad_weight.add_(by_weight, alpha=scale)


@torch.no_grad()
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Convolution whose taps are moved by offsets and scaled by a mask.

    Args:
        input: (N, C, H, W).
        weight: (O, C / group, kernel_h, kernel_w).
        bias: (O,), read if ``with_bias``.
        ones: Scratch, not used.
        offset: ``y x`` of each tap, (N, 2 * deformable_group * taps, H', W').
            Of a larger map the first numbers of each image are read, as
            mmcv's kernels do; DyHead gives one.
        mask: Factor of each tap, (N, deformable_group * taps, H', W'), or of
            a larger map likewise.
        output: Buffer for the result, (N, O, H', W').
        columns: Scratch, not used.
        kernel_h: Height of the kernel.
        kernel_w: Width of the kernel.
        stride_h: Stride down.
        stride_w: Stride across.
        pad_h: Zeros above and below.
        pad_w: Zeros on the left and right.
        dilation_h: Distance of taps down.
        dilation_w: Distance of taps across.
        group: Groups of channels.
        deformable_group: Groups of channels with offsets of their own.
        with_bias: Whether to add the bias.

    Reference:
        Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results",
        CVPR 2019, arXiv:1811.11168.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    geometry += (group, deformable_group)
    bias = bias if with_bias else None
    offset, mask = (_first(one, output) for one in (offset, mask))
    output.copy_(_convolve(input, weight, offset, mask, bias, geometry))


@torch.no_grad()
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add the derivatives to the five ``grad_`` buffers of the operands."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    geometry += (group, deformable_group)
    by_input, by_weight, by_offset, by_mask, by_bias = _derive(
        grad_output,
        input,
        weight,
        _first(offset, grad_output),
        _first(mask, grad_output),
        bias if with_bias else None,
        geometry,
    )
    grad_input.add_(by_input)
    grad_weight.add_(by_weight)
    for buffer, found in ((grad_offset, by_offset), (grad_mask, by_mask)):
        found = found.flatten(1)
        buffer.view(len(buffer), -1)[:, : found.size(1)].add_(found)
    if with_bias:
        grad_bias.add_(by_bias)


@torch.no_grad()
def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Windows of a map around some of its pixels, as columns.

    Args:
        im: (1, C, H, W).
        mask_h_idx: Rows of the pixels, (P,).
        mask_w_idx: Columns of the pixels, (P,).
        col: Buffer for the result, (C * kernel_h * kernel_w, P).
        kernel_h: Height of the window.
        kernel_w: Width of the window.
        pad_h: Rows of the window above the pixel.
        pad_w: Columns of the window on its left.
    """
    below, right = max(kernel_h - 1 - pad_h, 0), max(kernel_w - 1 - pad_w, 0)
    padded = F.pad(im[0], (pad_w, right, pad_h, below))
    down = torch.arange(kernel_h, device=im.device)[:, None, None]
    across = torch.arange(kernel_w, device=im.device)[:, None]
    windows = padded[:, down + mask_h_idx, across + mask_w_idx]
    col.copy_(windows.reshape(col.shape))


@torch.no_grad()
def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write columns (C, P) to pixels of the map ``im`` (1, C, H, W)."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)


def _first(maps: Tensor, output: Tensor) -> Tensor:
    """The first numbers of each image, as maps of the output's size."""
    size = output.shape[-2:]
    if maps.shape[-2:] == size:
        return maps
    count = maps.size(1) * size.numel()
    return maps.flatten(1)[:, :count].view(len(maps), -1, *size)


def _convolve(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> Tensor:
    operands = _operands(input, weight, offset, mask, bias)
    return torch.ops.torchvision.deform_conv2d(
        *operands, *geometry, mask is not None
    )


def _derive(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Derivatives by input, weight, offset, mask and bias."""
    operands = _operands(input, weight, offset, mask, bias)
    grad = grad.to(operands[0].dtype).contiguous()
    return torch.ops.torchvision._deform_conv2d_backward(
        grad, *operands, *geometry, mask is not None
    )


def _operands(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """As torchvision takes them: of one type, placeholders for None."""
    if mask is None:
        mask = input.new_zeros((input.size(0), 1))
    if bias is None:
        bias = input.new_zeros(weight.size(0))
    input, weight, offset, mask, bias = wide(input, weight, offset, mask, bias)
    # torchvision looks where an offset that is no number points to, and reads
    # memory that is not its own; mmcv's kernels find nothing there.
    return input, weight, offset.nan_to_num(nan=OUTSIDE), mask, bias


def _version(*tensors: Tensor) -> tuple[Any, ...]:
    """Changes when one of the tensors is another or is written to."""
    return tuple((t.data_ptr(), t._version) for t in tensors)

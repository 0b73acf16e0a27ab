"""Multi-scale deformable attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import wide


@torch.no_grad()
def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Weighted sum of values at the sampling locations.

    Args:
        value: Flattened maps of all levels, (N, S, heads, C).
        spatial_shapes: Rows and columns of each level, (L, 2).
        level_start_index: First value of each level, (L,); follows from the
            shapes.
        sampling_locations: ``x y`` in [0, 1], (N, Q, heads, L, P, 2).
        attention_weights: (N, Q, heads, L, P).
        im2col_step: Images a kernel takes at once; of no consequence here.

    Returns:
        (N, Q, heads * C).

    Reference:
        Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End
        Object Detection", ICLR 2021, arXiv:2010.04159.
    """
    tensors = wide(value, sampling_locations, attention_weights)
    return _attend(spatial_shapes, *tensors).to(value.dtype)


@torch.no_grad()
def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the derivatives to the three last buffers."""
    *tensors, grad_output = wide(
        value, sampling_locations, attention_weights, grad_output
    )
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        output = _attend(spatial_shapes, *tensors)
        grads = torch.autograd.grad(output, tensors, grad_output)
    for buffer, grad in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), grads
    ):
        buffer.add_(grad)


def _attend(
    spatial_shapes: Tensor, value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    # mmcv has it in plain PyTorch and takes it on the CPU. The import waits
    # because mmcv.ops is only half imported when this module is.
    from mmcv.ops.multi_scale_deform_attn import (
        multi_scale_deformable_attn_pytorch,
    )

    return multi_scale_deformable_attn_pytorch(
        value, spatial_shapes.tolist(), locations, weights
    )

"""The steps of mmcv's synchronised batch normalisation.

mmcv's module exchanges the statistics between them. Maps are (N, C, H * W),
statistics (C,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import wide


@torch.no_grad()
def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Mean of each channel."""
    (x,) = wide(input)
    mean.copy_(x.mean((0, 2)))


@torch.no_grad()
def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean squared distance of each channel from the given mean."""
    x, mean = wide(input, mean)
    var.copy_((x - _column(mean)).square().mean((0, 2)))


@torch.no_grad()
def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Normalise, scale and shift; update the running statistics.

    Args:
        input: (N, C, H * W).
        mean: Over all processes.
        var: Biased, over all processes.
        weight: Scale, or None.
        bias: Shift, or None.
        running_mean: Updated unless None.
        running_var: Updated with the unbiased variance unless None.
        norm: Buffer for the normalised map.
        std: Buffer for the deviation.
        output: Buffer for the result.
        eps: Added to the variance.
        momentum: Share of the new statistics.
        group_size: Number of processes.
    """
    x, mean, var = wide(input, mean, var)
    deviation = (var + eps).sqrt()
    normed = (x - _column(mean)) / _column(deviation)
    norm.copy_(normed)
    std.copy_(deviation)
    if weight is not None:
        normed = normed * _column(weight) + _column(bias)
    output.copy_(normed)
    if running_mean is not None:
        count = x.size(0) * x.size(2) * group_size
        unbiased = var * count / max(count - 1, 1)
        momentum = torch.as_tensor(momentum).to(running_mean)
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_(unbiased.to(running_var), momentum)


@torch.no_grad()
def sync_bn_backward_param(
    grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> None:
    """Derivatives by scale and shift, of this process."""
    grad, norm = wide(grad_output, norm)
    grad_weight.copy_((grad * norm).sum((0, 2)))
    grad_bias.copy_(grad.sum((0, 2)))


@torch.no_grad()
def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Derivative by the input, given those by scale and shift of all."""
    grad, weight, grad_weight, grad_bias, norm, std = wide(
        grad_output, weight, grad_weight, grad_bias, norm, std
    )
    count = grad.size(0) * grad.size(2)
    through = norm * _column(grad_weight) + _column(grad_bias)
    grad_input.copy_((grad - through / count) * _column(weight / std))


def _column(statistic: Tensor) -> Tensor:
    return statistic[None, :, None]

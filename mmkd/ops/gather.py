"""Gather: rows of all processes of a distributed training."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in their order, each with its gradient.

    The gradient of a row is the sum of what all processes make of it, so that
    DDP's mean over processes is the gradient of one loss over all rows. A
    process may have none, but every one must call. How many each has is asked
    of the device; alone, nothing is.

    Args:
        rows: Of this process, (M, …).

    Returns:
        (sum of M, …); the rows themselves if there is one process.

    Example:
        >>> rows = torch.eye(2)
        >>> gather_rows(rows) is rows
        True
    """
    if not _several():
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(_world())]
    distributed.all_gather(counts, own)
    counts = torch.cat(counts).tolist()
    filled = rows.new_zeros(max(counts), *rows.shape[1:])
    filled = torch.cat([rows, filled[len(rows) :]])
    parts = _Gather.apply(filled).unbind()
    return torch.cat([one[:count] for one, count in zip(parts, counts)])


class _Gather(torch.autograd.Function):
    """Tensors of one shape of all processes, (…) → (processes, …)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, one: Tensor):
        parts = [torch.empty_like(one) for _ in range(_world())]
        distributed.all_gather(parts, one.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor):
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)
        return grad[distributed.get_rank()]


def _several() -> bool:
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and _world() > 1


def _world() -> int:
    return distributed.get_world_size()

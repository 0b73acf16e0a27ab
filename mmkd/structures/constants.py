"""Numbers of Python, put beside a tensor without waiting for its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def constant(
    values: Sequence[Any], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of numbers on the device of another one.

    ``like.new_tensor(values)`` and ``torch.tensor(values, device=…)`` copy
    from the host and return when the device has done all that it was asked
    before; this returns at once. A single number needs no copy at all:
    ``like.new_full((), value)``.

    Args:
        values: Numbers, nested or not.
        like: Says where, and of which type.
        dtype: The type; that of ``like`` if None.

    Example:
        >>> constant([1, 2], torch.zeros(3))
        tensor([1., 2.])
    """
    made = torch.tensor(values, dtype=dtype or like.dtype)
    return made.to(like.device, non_blocking=True)

"""Outputs of detectors: tensors in lists, tuples and dicts of any depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def apply(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with a function of each tensor.

    Example:
        >>> one = torch.ones(2)
        >>> apply(lambda x: 2 * x, [one, (one, None)])
        [tensor([2., 2.]), (tensor([2., 2.]), None)]
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: apply(function, one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [apply(function, one) for one in value])
    return value


def leaves(value: Any) -> list[Tensor]:
    """All tensors, from left to right."""
    found: list[Tensor] = []
    apply(lambda one: found.append(one) or one, value)
    return found


def pick(value: Any, images: slice) -> Any:
    """Some images of a batch, the first axis of every tensor."""
    return apply(lambda one: one[images], value)


def join(parts: Sequence[Any], device: torch.device | None = None) -> Any:
    """Batches put together along the first axis of every tensor.

    Args:
        parts: Values of one structure.
        device: Of the result; the parts' own if None.

    Example:
        >>> join([(torch.zeros(1), 'x'), (torch.ones(1), 'x')])
        (tensor([0., 1.]), 'x')
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([one.to(device or one.device) for one in parts])
    if isinstance(first, dict):
        return {
            key: join([one[key] for one in parts], device) for key in first
        }
    if isinstance(first, (list, tuple)):
        return _like(
            first, [join(each, device) for each in zip(*parts, strict=True)]
        )
    return first


def _like(value: list | tuple, content: list) -> list | tuple:
    if hasattr(value, '_fields'):  # a named tuple
        return type(value)(*content)
    return type(value)(content)

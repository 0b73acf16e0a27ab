"""What modules remember outside of their state dict.

mmdet's batch-wise resizing keeps its present size, the dynamic R-CNN head its
history of overlaps, YOLOX's head whether the L1 loss is on: plain attributes
that change in training and that no checkpoint of MMEngine holds.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: Longest list that counts as an attribute's value.
MOST = 1000
_TORCHS_OWN = frozenset(vars(nn.Module()))


def plain_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Numbers, words and short lists of these, by module and attribute.

    mmkd's own modules are left out: what they need is in their state dict,
    and what they remember beside it concerns one process.

    Example:
        >>> module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5))
        >>> plain_attributes(module)['1']
        {'p': 0.5, 'inplace': False}
    """
    found = {}
    for name, module in model.named_modules():
        if type(module).__module__.split('.')[0] == 'mmkd':
            continue
        found[name] = {
            key: value
            for key, value in vars(module).items()
            if key not in _TORCHS_OWN and _is_plain(value)
        }
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= MOST and all(_is_plain(one) for one in value)
    return value is None or type(value) in (bool, int, float, str)


def changed_attributes(
    model: nn.Module, before: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Those that differ from an earlier :func:`plain_attributes`.

    Only these are training state: the others follow from the config, which
    may be edited between a stop and the resumption.

    Example:
        >>> dropout = nn.Dropout(0.5)
        >>> before = plain_attributes(dropout)
        >>> dropout.p = 0.1
        >>> changed_attributes(dropout, before)
        {'': {'p': 0.1}}
    """
    changed = {}
    for name, now in plain_attributes(model).items():
        was = before.get(name, {})
        differs = {
            key: value
            for key, value in now.items()
            if key not in was or was[key] != value
        }
        if differs:
            changed[name] = differs
    return changed


def set_attributes(model: nn.Module, values: dict[str, dict]) -> None:
    """Put back what :func:`changed_attributes` returned."""
    modules = dict(model.named_modules())
    for name, attributes in values.items():
        if name in modules:
            vars(modules[name]).update(attributes)

"""How many classes a detector's heads tell apart."""

from __future__ import annotations

from torch import nn


def head_classes(detector: nn.Module) -> dict[str, int]:
    """Numbers of classes by the path of the head that tells them apart.

    Left out are proposal heads, which tell objects from background, semantic
    ones, which have classes of their own, and losses, which repeat what their
    head says.
    """
    return {
        path: module.num_classes
        for path, module in detector.named_modules()
        if _counts(path.split('.'), module)
    }


def _counts(parts: list[str], module: nn.Module) -> bool:
    other = {'rpn_head', 'semantic_head', 'semantic_roi_extractor', 'terms'}
    return (
        any('head' in part for part in parts)
        and not other & set(parts)
        and not parts[-1].startswith('loss')
        and type(getattr(module, 'num_classes', None)) is int
    )


def check_num_classes(who: str, student: nn.Module, count: int) -> None:
    """What a term is told must be what a head of the student says.

    Raises:
        ValueError: If it is not.
    """
    known = set(head_classes(student).values())
    if known and count not in known:
        raise ValueError(
            f'{who} is told of {count} classes, the student of {max(known)}. '
            f'Set num_classes={max(known)} in it.'
        )

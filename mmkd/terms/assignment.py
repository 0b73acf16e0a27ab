"""What the student's own label assignment says, read and not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import (
    AutoAssignHead,
    CenterNetHead,
    CenterNetUpdateHead,
    CornerHead,
    DDODHead,
    DETRHead,
    FoveaHead,
    FreeAnchorRetinaHead,
    PAAHead,
    RepPointsHead,
    YOLOFHead,
    YOLOV3Head,
)
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmkd.structures import Step

#: Heads whose get_targets is not called, or gives no labels, or all in one.
WITHOUT_LABELS = (
    AutoAssignHead,
    CenterNetHead,
    CenterNetUpdateHead,
    CornerHead,
    DDODHead,
    DETRHead,
    FoveaHead,
    FreeAnchorRetinaHead,
    RepPointsHead,
    YOLOFHead,
    YOLOV3Head,
)
#: Heads that give them image by image: they can be counted.
BY_IMAGE = (PAAHead,)


def check_assigns(
    who: str, head: nn.Module, instead: str, places: bool = False
) -> None:
    """A student's head must assign labels by ``get_targets``.

    Args:
        who: Name of the term, for messages.
        head: The head.
        instead: What to type, for messages.
        places: Whether it matters which anchors they are of.

    Raises:
        ValueError: If it does not.
    """
    refused = WITHOUT_LABELS + (BY_IMAGE if places else ())
    if hasattr(head, 'get_targets') and not isinstance(head, refused):
        return
    raise ValueError(
        f"{who} reads the labels that the student's {type(head).__name__} "
        f'assigns, whose get_targets gives none level by level. {instead}'
    )


def assigned_labels(step: Step, head: str) -> list[Tensor]:
    """Labels that the student's loss gave the anchors of each level.

    Args:
        step: One in which ``head.get_targets`` was tapped.
        head: Path of the student's dense head.

    Raises:
        ValueError: If the head assigns no labels level by level.
    """
    return by_level(step.student.at(f'{head}.get_targets'), integers=True)


def by_level(targets: Sequence[Any], integers: bool) -> Sequence[Tensor]:
    """Of what a head's ``get_targets`` returned, the labels or the anchors.

    Heads return lists of tensors, one a level, in different orders; labels are
    the first whole numbers, anchors the first others.

    Raises:
        ValueError: If there are none.
    """
    for one in targets:
        if (
            isinstance(one, (list, tuple))
            and one
            and all(isinstance(level, Tensor) for level in one)
            and _is_one(one[0], integers)
        ):
            return one
    raise ValueError(
        f'The head assigns no {"labels" if integers else "anchors"} level by '
        f'level. Choose what does not read them, such as mmkd.ScoreWeight.'
    )


def _is_one(value: Tensor, integers: bool) -> bool:
    if integers:  # masks are no labels
        return not value.is_floating_point() and value.dtype != torch.bool
    return value.is_floating_point()


def count_positives(labels: list[Tensor], num_classes: int) -> Tensor:
    """Anchors that hold an object, averaged over the processes, at least 1.

    Args:
        labels: Labels of the anchors of each level; ``num_classes`` and what
            is below 0 is background.
        num_classes: Classes of the head.

    Example:
        >>> import torch
        >>> count_positives([torch.tensor([0, 3, -1]), torch.tensor([2])], 3)
        tensor(2.)
    """
    found = sum(((one >= 0) & (one < num_classes)).sum() for one in labels)
    return reduce_mean(found.float()).clamp(min=1)

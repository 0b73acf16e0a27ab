"""What the student's own label assignment says, read and not repeated."""

from __future__ import annotations

from mmdet.models.dense_heads import (
    CenterNetUpdateHead,
    DDODHead,
    RepPointsHead,
    YOLOV3Head,
)
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmkd.structures import Step
from mmkd.terms.weights.positive import by_level

#: Heads whose get_targets is not called, or gives no labels.
WITHOUT_LABELS = (CenterNetUpdateHead, DDODHead, RepPointsHead, YOLOV3Head)


def check_assigns(who: str, head: nn.Module, instead: str) -> None:
    """A student's head must assign labels by ``get_targets``.

    Args:
        who: Name of the term, for messages.
        head: The head.
        instead: What to type, for messages.

    Raises:
        ValueError: If it does not.
    """
    if hasattr(head, 'get_targets') and not isinstance(head, WITHOUT_LABELS):
        return
    raise ValueError(
        f"{who} counts the positives of the student's {type(head).__name__}, "
        f'whose get_targets gives no labels level by level. {instead}'
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

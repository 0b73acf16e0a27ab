"""What of a teacher classifies, for losses that take their scale from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Reader(Protocol):
    """A loss that asks for the weights of the teacher's classifier.

    Attributes:
        reads_classifier: Whether it does, with its settings.
    """

    reads_classifier: bool

    def read_classifier(self, weight: Tensor) -> None: ...


def readers(losses: Iterable[nn.Module]) -> list[Reader]:
    """Those of several losses that ask for a classifier."""
    return [one for one in losses if getattr(one, 'reads_classifier', False)]


def classifier_weight(who: str, part: nn.Module) -> Tensor:
    """All numbers of the layers that score classes, without biases.

    Args:
        who: Named in the message.
        part: A detector, whose dense head is looked at, or the last stage of
            its second; or a head.

    Returns:
        A vector: of MMDetection's heads the weights of what is called
        ``..._cls`` (``retina_cls``, ``conv_cls``, ``fc_cls``, …), or
        ``cls_branches`` where there is one for each layer of a decoder.

    Raises:
        ValueError: If there is no such layer.
    """
    head = _head(part)
    found = [
        layer.weight.detach().flatten()
        for name, child in head.named_children()
        if name.endswith(('_cls', 'cls_branches'))
        for layer in child.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    if not found:
        raise ValueError(
            f"{who} takes its scale from the teacher's classifier, a layer "
            f'..._cls of its head, but {type(head).__name__} has none. Set '
            f'std= of the loss, for instance std=0.01.'
        )
    return torch.cat(found)


def _head(part: nn.Module) -> nn.Module:
    """The head that classifies, or the part itself if it has none."""
    second = getattr(part, 'roi_head', None)
    head: Any = getattr(part if second is None else second, 'bbox_head', None)
    if isinstance(head, nn.ModuleList):
        return head[-1]
    return part if head is None else head

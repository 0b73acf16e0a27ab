"""Boxes drawn from what a head of distributions holds possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmdet.models.dense_heads import GFLHead
from torch import Tensor, nn

from mmkd.datasets.hypotheses import Boxes
from mmkd.terms.decoding import decode

_WHO = 'make_hypotheses.py'
#: By which sides of a box grow when their distance from the cell does.
_SIGNS = np.array([-1, -1, 1, 1])
#: Pixels by which a box may lie beside that of its cell.
_NEAR = 0.5


class BoxDraws:
    """The distributions behind the boxes that a detector has found.

    A head of GFL's kind says for each side of a box how likely each of some
    distances from the cell is; the box that it gives is their mean. A box is
    drawn side by side.

    Args:
        detector: One of mmdet with such a head as ``bbox_head``.

    Raises:
        ValueError: If its head is of another kind.
    """

    def __init__(self, detector: nn.Module) -> None:
        head = getattr(detector, 'bbox_head', None)
        if not isinstance(head, GFLHead):
            raise ValueError(
                f'{_WHO} --bins draws from the distributions of a GFLHead, '
                f'but the teacher has a {type(head).__name__}. Leave --bins '
                f'out and move boxes by --jitter, for instance 0.03.'
            )
        self.head = head
        self._said: tuple | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what the head says of one image."""

        def keep(_: nn.Module, __: tuple, said: tuple) -> None:
            self._said = said

        hook = self.head.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def draw(
        self,
        found: Boxes,
        sample: Any,
        random: np.random.Generator,
        temperature: float,
        number: int,
    ) -> np.ndarray:
        """Draw every box so often, in pixels of the image as stored.

        Args:
            found: What the detector has found in the image.
            sample: Its data sample, with ``img_shape`` and ``scale_factor``.
            random: Source of the draws.
            temperature: Divides the logits of the distances.
            number: How often.

        Returns:
            Corners, (number, N, 4).

        Raises:
            ValueError: If a box is that of no cell.
        """
        scores, maps = self._said
        mean = _cells(decode(self.head, maps))
        logits = _cells(maps).reshape(len(mean), 4, -1)
        strides = np.concatenate(
            [
                np.full(one.shape[-2:], stride[0]).ravel()
                for one, stride in zip(maps, self.head.prior_generator.strides)
            ]
        )
        sure = 1 / (1 + np.exp(-_cells(scores)))
        place = _places(found, self._stored(mean, sample), sure)
        logits = logits[place]
        bins = np.arange(logits.shape[-1])
        expected = (_softmax(logits) * bins).sum(-1)
        drawn = _drawn(logits / temperature, number, random)
        moved = _SIGNS * (drawn - expected) * strides[place, None]
        return self._stored(mean[place] + moved, sample)

    @staticmethod
    def _stored(boxes: np.ndarray, sample: Any) -> np.ndarray:
        """Boxes of the detector's input, cut at its border, as stored."""
        height, width = sample.img_shape[:2]
        cut = boxes.clip(0, [width, height, width, height])
        return cut / np.tile(sample.scale_factor, 2)


def _cells(maps: Sequence[Tensor]) -> np.ndarray:
    """One row for each cell of the first image, whatever the channels."""
    rows = [one[0].flatten(0, -3).flatten(1).T for one in maps]
    return torch.cat(rows).cpu().double().numpy()


def _softmax(logits: np.ndarray) -> np.ndarray:
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def _drawn(
    logits: np.ndarray, number: int, random: np.random.Generator
) -> np.ndarray:
    """Numbers of bins, (number, …), of logits (…, bins)."""
    sums = _softmax(logits).cumsum(-1)
    places = random.random((number, *logits.shape[:-1], 1))
    return (places >= sums).sum(-1).clip(max=logits.shape[-1] - 1)


def _places(found: Boxes, boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which cell each found box is of: its box, and its score."""
    if not len(found.labels):
        return np.zeros(0, int)
    apart = abs(boxes[None] - found.boxes[:, None]).max(-1)
    other = abs(scores[:, found.labels].T - found.scores[:, None])
    place = (apart + other).argmin(1)
    if apart[np.arange(len(place)), place].max() > _NEAR:
        raise ValueError(
            f'{_WHO} --bins cannot tell which cells the boxes are of, since '
            f'the teacher changes them afterwards. Leave --bins out, or take '
            f'its tests without augmentation and box voting.'
        )
    return place

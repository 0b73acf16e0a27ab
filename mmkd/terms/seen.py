"""What a detector with a dense head makes of a batch, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.ops.boxes import giou_error
from mmkd.ops.masks import valid_mask
from mmkd.ops.numeric import as_float
from mmkd.ops.scores import (
    bernoulli_divergence,
    cell_samples,
    check_class_maps,
    class_samples,
)
from mmkd.structures import GroundTruth, Outputs
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.decoding import check_decodable, decode
from mmkd.terms.weights.score import refuse_softmax

#: Rows and columns of the energy map of an image.
GRID = 8
#: Which of a dense head's outputs are what.
SCORES, BOXES = 0, 1


@dataclass(frozen=True)
class Seen:
    """What a detector made of a batch.

    Attributes:
        gt: Annotations of the batch.
        maps: Its features, (N, C, H, W) a level.
        scores: Class scores of its head, (N, A * K, H, W) a level; None if
            they are not compared.
        corners: Decoded boxes of all anchors, (N, P, 4).
        classes: K.
    """

    gt: GroundTruth
    maps: tuple[Tensor, ...]
    scores: tuple[Tensor, ...] | None = None
    corners: Tensor | None = None
    classes: int = 0

    def logits(self) -> Tensor:
        """Class scores of all anchors, (N, P, K)."""
        return torch.cat(
            [
                class_samples([one], self.classes).unflatten(0, (len(one), -1))
                for one in self.scores
            ],
            1,
        )

    def valid(self) -> Tensor:
        """1 for anchors that count at all, (N, P)."""
        return torch.cat(
            [
                cell_samples(
                    [valid_mask(self.gt, tuple(one.shape[-2:]))],
                    [one],
                    self.classes,
                ).unflatten(0, (len(one), -1))
                for one in self.scores
            ],
            1,
        )

    def anchor_weight(self) -> Tensor:
        """Largest probability at each anchor that counts, (N, P)."""
        return self.logits().sigmoid().amax(2) * self.valid()

    def best(self) -> Tensor:
        """Largest probability of every class in an image, (N, K)."""
        probs = self.logits().sigmoid() * self.valid()[..., None]
        return probs.amax(1)

    def energy(self) -> Tensor:
        """Where features are strong, mean 1 over an image, (N, 64)."""
        found = []
        for one in self.maps:
            valid = valid_mask(self.gt, tuple(one.shape[-2:]))
            strong = as_float(one).square().mean(1, keepdim=True) * valid
            strong = F.adaptive_avg_pool2d(strong, GRID).flatten(1)
            mean = strong.mean(1, keepdim=True)
            found.append(strong / mean.clamp(min=1e-12))
        return torch.stack(found).mean(0)


def seen(
    outputs: Outputs,
    gt: GroundTruth,
    path: str = 'bbox_head',
    maps: Sequence[Tensor] = (),
) -> Seen:
    """Read what a dense head predicts off its recorded outputs.

    Args:
        outputs: Of the detector, with the head among its taps.
        gt: Annotations of the batch.
        path: Tap of the head.
        maps: Features to hold beside it.
    """
    scores, boxes = (
        maps_of(outputs.at(path), f'Tap {path!r}', index)
        for index in (SCORES, BOXES)
    )
    head, _ = resolve(outputs.detector, path)
    corners = [
        one.permute(0, 3, 4, 1, 2).flatten(1, 3)  # N, H * W * A, 4
        for one in crop(decode(head, boxes), outputs.size, gt.shape)
    ]
    return Seen(
        gt,
        tuple(maps),
        crop(scores, outputs.size, gt.shape),
        torch.cat(corners, 1),
        scores_of(head),
    )


def response_gaps(
    who: str, own: Seen, other: Seen, temperature: float
) -> tuple[Tensor, Tensor]:
    r"""How far predictions of each image are from those of a teacher.

    Divergence of the class probabilities at a temperature, times its square,
    and one minus the GIoU of the boxes, both averaged over the anchors with
    the teacher's largest score as weight.

    Args:
        who: Named in messages.
        own: The student's.
        other: The teacher's; it is detached.
        temperature: The higher, the more small probabilities count.

    Returns:
        Two vectors, (N,) each.

    Raises:
        ValueError: If classes or anchors differ.
    """
    check_class_maps(who, own.scores, other.scores, own.classes)
    one, like = own.logits(), other.logits().detach()
    weight = other.anchor_weight().detach()
    total = weight.sum(1).clamp(min=1e-6)
    divergence = temperature**2 * bernoulli_divergence(
        one / temperature, like / temperature
    ).sum(2)
    error = giou_error(own.corners, other.corners.detach())
    return (
        (weight * divergence).sum(1) / total,
        (weight * error).sum(1) / total,
    )


def dense_head(
    who: str, detector: nn.Module, path: str, side: str
) -> nn.Module:
    """A dense head of sigmoid scores, whose boxes can be read.

    Args:
        who: Named in messages.
        detector: The detector.
        path: Tap of the head.
        side: Whose it is, for messages.

    Raises:
        ValueError: If there is none.
    """
    head, _ = resolve(detector, path)
    check_decodable(who, head, side)
    refuse_softmax(who, detector, path, side)
    return head


def scores_of(head: nn.Module) -> int:
    """Scores of one anchor."""
    return getattr(head, 'cls_out_channels', head.num_classes)

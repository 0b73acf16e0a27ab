"""FSP: how features flow from one map to the next, as in the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.ops.masks import require_ground_truth, valid_mask
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def fsp_matrix(
    first: Tensor,
    second: Tensor,
    first_mask: Tensor | None = None,
    second_mask: Tensor | None = None,
) -> Tensor:
    r"""Products of the channels of two maps, averaged over their cells.

    .. math:: G_{ij} = \frac{1}{HW} \sum_{hw} A_{hwi} B_{hwj}

    Where one map is larger, it is brought to the size of the other by the
    largest value in each window.

    Args:
        first: The map A, (N, C, H, W).
        second: The map B, (N, D, H', W').
        first_mask, second_mask: 1 where a cell counts, 0 elsewhere, (N, 1) and
            the map's size; all if None. A window counts if a cell of it does.

    Returns:
        One matrix an image, (N, C, D), float32; zero where no cell counts.

    Example:
        >>> a = torch.tensor([[[[1.0, 2.0]]]])
        >>> fsp_matrix(a, torch.tensor([[[[3.0, 4.0]]]])).item()  # (3 + 8) / 2
        5.5
    """
    sizes = [one.shape[-2:] for one in (first, second)]
    size = tuple(min(pair) for pair in zip(*sizes))
    first, first_mask = _pooled(first, first_mask, size)
    second, second_mask = _pooled(second, second_mask, size)
    mask = first_mask * second_mask
    with full_precision(first):
        rows = (mask * first).flatten(2)  # N, C, HW
        columns = second.flatten(2).transpose(1, 2)  # N, HW, D
        total = rows @ columns
    return total / mask.sum((2, 3)).clamp(min=1)[:, :, None]


def _pooled(
    feature: Tensor, mask: Tensor | None, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    feature = as_float(feature)
    if mask is None:
        mask = torch.ones_like(feature[:, :1])
    if tuple(feature.shape[-2:]) == size:
        return feature, mask
    # What does not count must not be the largest of a window.
    hidden = feature.masked_fill(mask == 0, -torch.inf)
    mask = F.adaptive_max_pool2d(mask, size)
    feature = F.adaptive_max_pool2d(hidden, size)
    return feature.masked_fill(mask == 0, 0), mask


def fsp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two matrices, (N, C, D) each.

    Example:
        >>> fsp_loss(torch.ones(1, 2, 2), torch.zeros(1, 2, 2)).item()
        1.0
    """
    return F.mse_loss(student, teacher)


@MODELS.register_module()
class FSPLoss(nn.Module):
    r"""The flow between pairs of maps, compared with the teacher's.

    .. math:: \frac{\lambda}{|P|} \sum_{(a, b) \in P}
        \frac{\|G^S_{ab} - G^T_{ab}\|_F^2}{C_a C_b}

    with the matrices G of :func:`fsp_matrix`. Their size is that of the
    channels alone, so that the two sides may have maps of other resolutions,
    but not of other channels. Cells of the padded border do not count; those
    in ignored boxes do, as nothing here depends on what an object is. Without
    a ground truth all cells count.

    Args:
        pairs: Which maps flow into which, by their positions among those of
            the term; each into the next if None.
        loss_weight: The outer factor. For detectors it is ours.

    Raises:
        ValueError: If there are fewer than two maps, a pair names one that is
            not there, or channels differ.

    Reference:
        Yim et al., "A Gift from Knowledge Distillation: Fast Optimization,
        Network Minimization and Transfer Learning", CVPR 2017, known
        second-hand, for the first and last layer of each stage of a
        classifier. There the flow is learnt first, and the task afterwards,
        which ``phases`` can do; here it may be learnt beside it. Sarfraz et
        al., "Knowledge Distillation Beyond Model Compression",
        arXiv:2007.01922, compare it with eight others.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict()

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]] | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.pairs = None if pairs is None else [tuple(one) for one in pairs]
        self.loss_weight = loss_weight
        if self.pairs is not None and (
            not self.pairs or any(len(one) != 2 for one in self.pairs)
        ):
            raise ValueError(
                f'FSPLoss needs pairs of maps by position, got {pairs!r}. '
                f'Write for instance pairs=[(0, 1), (1, 2)], or leave it out.'
            )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> Tensor:
        self._check(student, teacher)
        if gt is not None:
            gt = require_ground_truth('FSPLoss', gt, student[0])
        pairs = self.pairs or [
            (level, level + 1) for level in range(len(student) - 1)
        ]
        total = 0.0
        for pair in pairs:
            own, other = (_flow(maps, pair, gt) for maps in (student, teacher))
            total = total + fsp_loss(own, other)
        return self.loss_weight * total / len(pairs)

    def _check(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        count = len(student)
        if len(teacher) != count or count < 2:
            raise ValueError(
                f'FSPLoss compares how maps flow into each other, and needs '
                f'two or more of each side, as many of both; got {count} of '
                f'the student and {len(teacher)} of the teacher. Choose them '
                f'with tap=, levels= and teacher_levels=.'
            )
        for one in (place for pair in self.pairs or () for place in pair):
            if not 0 <= one < count:
                raise ValueError(
                    f'FSPLoss has maps 0 to {count - 1}, but pairs='
                    f'{self.pairs} names {one}. Choose among those there are.'
                )
        own, other = (
            [one.shape[1] for one in maps] for maps in (student, teacher)
        )
        if own != other:
            raise ValueError(
                f'FSPLoss multiplies channels, of which both sides must have '
                f'as many; got {own} of the student and {other} of the '
                f"teacher. Add align=dict(type='mmkd.ConvAdapt', "
                f'in_channels={_one(own)}, out_channels={_one(other)}) to '
                f'this term.'
            )


def _flow(
    maps: Sequence[Tensor], pair: tuple[int, int], gt: GroundTruth | None
) -> Tensor:
    first, second = (maps[one] for one in pair)
    if gt is None:
        return fsp_matrix(first, second)
    masks = (
        valid_mask(gt, tuple(one.shape[-2:]), keep_ignored=True)
        for one in (first, second)
    )
    return fsp_matrix(first, second, *masks)


def _one(channels: list[int]) -> int | list[int]:
    return channels[0] if len(set(channels)) == 1 else channels

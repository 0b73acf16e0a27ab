"""SemCKD: attention says which teacher's layer a student's learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import (
    check_channels,
    check_name,
    check_positive,
    check_statistics,
)
from mmkd.ops.masks import (
    masked_mean,
    require_ground_truth,
    resize_valid,
    valid_mask,
)
from mmkd.ops.numeric import as_float, full_precision, unit, zero_of
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth
from mmkd.structures.constants import constant

RELATIONS = ('grid', 'batch')


def grid_relation(feature: Tensor, valid: Tensor, grid: int) -> Tensor:
    """How parts of each image resemble each other.

    A map is pooled to grid x grid parts; the cosines of all pairs of them are
    what an image says.

    Args:
        feature: Map, (N, C, H, W).
        valid: 1 where a cell counts, 0 elsewhere, (N, 1, H, W). A part
            without such cells resembles none.
        grid: Parts in each direction.

    Returns:
        Cosines, (N, grid ** 4).

    Example:
        >>> feature = torch.tensor([[[[1.0, -2.0]]]])
        >>> grid_relation(feature, torch.ones(1, 1, 1, 2), 2).shape
        torch.Size([1, 16])
    """
    # Parts smaller than a cell repeat it; their scale does not matter.
    parts = F.adaptive_avg_pool2d(as_float(feature) * valid, grid)
    directions = unit(parts.flatten(2), dim=1)  # N, C, P
    with full_precision(directions):
        cosines = directions.transpose(1, 2) @ directions
    return cosines.flatten(1)


def batch_relation(feature: Tensor, valid: Tensor) -> Tensor:
    """How each image resembles the others of its batch: rows of products.

    Args:
        feature: Map, (N, C, H, W).
        valid: 1 where a cell counts, 0 elsewhere, (N, 1, H, W).

    Returns:
        Gram matrix of the whole maps, (N, N).

    Example:
        >>> feature = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        >>> batch_relation(feature, torch.ones(2, 1, 1, 1)).tolist()
        [[1.0, 3.0], [3.0, 9.0]]
    """
    vectors = (as_float(feature) * valid).flatten(1)
    with full_precision(vectors):
        return vectors @ vectors.T


class Embedding(nn.Sequential):
    """A relation as a query or key: two layers, and length 1.

    Args:
        width: Numbers of a relation.
        factor: How much shorter a query is.
    """

    def __init__(self, width: int, factor: int) -> None:
        out = width // factor
        super().__init__(
            nn.Linear(width, 2 * out), nn.ReLU(), nn.Linear(2 * out, out)
        )

    def forward(self, relation: Tensor) -> Tensor:
        return unit(super().forward(relation), dim=1)


def projector(
    in_channels: int, out_channels: int, inside: int
) -> nn.Sequential:
    """What brings a student's layer to a teacher's channels, for one pair."""
    return nn.Sequential(
        nn.Conv2d(in_channels, inside, 1, bias=False),
        nn.BatchNorm2d(inside),
        nn.ReLU(inplace=True),
        nn.Conv2d(inside, inside, 3, padding=1, bias=False),
        nn.BatchNorm2d(inside),
        nn.ReLU(inplace=True),
        nn.Conv2d(inside, out_channels, 1),
    )


@MODELS.register_module()
class SemCKDLoss(nn.Module):
    r"""Semantic calibration: all pairs of layers, weighted by attention.

    .. math:: \frac{w}{N s} \sum_{n,i,j} a_{nij} \,
        mean (P_{ij}(S_i) - T_j)^2, \quad
        a_{nij} = softmax_j(q_{ni} \cdot k_{nj} / \tau)

    Query and key of a layer are learned from how parts of each image resemble
    each other in it (:func:`grid_relation`), or images of the batch
    (:func:`batch_relation`); so each image has weights of its own. Of each
    pair the larger map is pooled to the smaller one; a projector of the pair
    brings the student's to the teacher's channels. Queries, keys and
    projectors learn along and stay in the term.

    Cells of the padded border are 0 for the projectors and count nowhere
    else. Student and teacher may differ in the number of layers, channels and
    strides: name ``levels`` and ``teacher_levels`` in the term.

    Args:
        student_channels: Channels of the student's layers, one entry each.
        teacher_channels: Channels of the teacher's, likewise.
        relation: ``'grid'``, which any number of images has, or ``'batch'``,
            the paper's, for whole batches of ``batch_size`` images; a smaller
            one, the last of an epoch, costs nothing.
        grid: Parts in each direction.
        batch_size: Images of a batch on one device, for ``'batch'``.
        soft: Temperature of the weights. Published: 1.
        embed_factor: How much shorter than a relation a query is. Published:
            4.
        max_stride_ratio: Pairs whose sizes differ by more get no weight; None
            for no limit.
        mid_channels: Channels inside a projector; the paper's, twice the
            teacher's, if None. Those of a ResNet's last stage alone would
            take 150 million numbers.
        loss_weight: Outer factor w. Published for classifiers: 400 on
            CIFAR-100, 50 on ImageNet; the default is ours.
        keep_padding: Let cells of the padded border count.

    Raises:
        ValueError: If a setting is out of range, layers are not those the
            loss was built for, a student's has no pair within the limit, or
            a batch is larger than ``batch_size``.

    Not kept:
        equality: The student's maps are projected.

    Reference:
        Chen et al., "Cross-Layer Distillation with Semantic Calibration",
        AAAI 2021, arXiv:2012.03236. The authors' code
        (https://github.com/DefangChen/SemCKD) was read for facts. There a
        batch of 64 images relates to itself; two images a device say too
        little, so that the parts of an image are ours, as are the limit of
        strides and the border.

    Example:
        >>> maps = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)
        >>> loss = SemCKDLoss([8], [8, 16])
        >>> loss(maps[:1], maps).shape
        torch.Size([])
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(
        student_channels=(8, 8), teacher_channels=(8, 8)
    )

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        relation: str = 'grid',
        grid: int = 4,
        batch_size: int | None = None,
        soft: float = 1.0,
        embed_factor: int = 4,
        max_stride_ratio: float | None = None,
        mid_channels: int | None = None,
        loss_weight: float = 1.0,
        keep_padding: bool = False,
    ) -> None:
        super().__init__()
        check_name('SemCKDLoss', 'relation', relation, RELATIONS)
        check_positive(
            'SemCKDLoss', grid=grid, soft=soft, embed_factor=embed_factor
        )
        if mid_channels is not None:
            check_positive('SemCKDLoss', mid_channels=mid_channels)
        self.student_channels = tuple(student_channels)
        self.teacher_channels = tuple(teacher_channels)
        width = _width(relation, grid, batch_size, embed_factor)
        self.relation = relation
        self.grid = grid
        self.batch_size = batch_size
        self.soft = soft
        self.max_stride_ratio = max_stride_ratio
        self.loss_weight = loss_weight
        self.keep_padding = keep_padding
        self.queries, self.keys = (
            nn.ModuleList(Embedding(width, embed_factor) for _ in channels)
            for channels in (self.student_channels, self.teacher_channels)
        )
        self.projectors = nn.ModuleList(
            nn.ModuleList(
                projector(one, other, mid_channels or 2 * other)
                for other in self.teacher_channels
            )
            for one in self.student_channels
        )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> Tensor:
        self._check_layers(student, teacher)
        own, other = self._valid(student, gt), self._valid(teacher, gt)
        # DDP waits for a gradient of every weight.
        idle = sum(map(zero_of, [*self.parameters(), *student]))
        if self.relation == 'batch' and self._is_last(student[0]):
            return idle
        weights = self.attention(own, other)
        total = idle
        for i, one in enumerate(own):
            for j, target in enumerate(other):
                if self._pairs(one, target):
                    error = self._error(self.projectors[i][j], one, target)
                    total = total + (weights[:, i, j] * error).mean()
        return self.loss_weight * total / len(own)

    def attention(
        self,
        student: Sequence[tuple[Tensor, Tensor]],
        teacher: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """How much each pair of layers counts, for each image.

        Args:
            student: s maps, (N, C, H, W), each with 1 where a cell counts,
                (N, 1, H, W).
            teacher: t maps, likewise.

        Returns:
            Weights that sum to 1 over the teacher's layers, (N, s, t).
        """
        queries, keys = (
            self._embed(layers, embeddings)
            for layers, embeddings in (
                (student, self.queries),
                (teacher, self.keys),
            )
        )
        with full_precision(queries):
            scores = queries @ keys.transpose(1, 2) / self.soft
        allowed = [
            [self._pairs(one, other) for other in teacher] for one in student
        ]
        if all(map(all, allowed)):
            return scores.softmax(2)
        self._check_pairs(allowed)
        barred = [[0.0 if one else -torch.inf for one in x] for x in allowed]
        return (scores + constant(barred, scores)).softmax(2)

    def _embed(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        embeddings: Sequence[nn.Module],
    ) -> Tensor:
        """Queries or keys of all layers, (N, layers, E)."""
        found = []
        for (feature, valid), embed in zip(layers, embeddings):
            if self.relation == 'grid':
                relation = grid_relation(feature, valid, self.grid)
            else:
                relation = batch_relation(feature, valid)
            with full_precision(relation):
                found.append(embed(relation))
        return torch.stack(found, 1)

    def _error(
        self,
        project: nn.Module,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Mean square over channels and cells that count, (N,)."""
        (one, own), (other, valid) = student, teacher
        smaller = min(own, valid, key=torch.Tensor.numel)
        size = smaller.shape[-2:]
        one, other = (
            resize_valid(one, own, size),
            resize_valid(other, valid, size),
        )
        with full_precision(one):
            error = (project(one) - other).square().mean(1, keepdim=True)
        return masked_mean(error, smaller)[:, 0]

    def _pairs(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
    ) -> bool:
        """Whether two layers are near enough in stride."""
        if self.max_stride_ratio is None:
            return True
        sizes = zip(student[0].shape[-2:], teacher[0].shape[-2:])
        return all(max(x) <= self.max_stride_ratio * min(x) for x in sizes)

    def _is_last(self, feature: Tensor) -> bool:
        """Whether a batch is smaller than those the loss was built for."""
        if len(feature) > self.batch_size:
            raise ValueError(
                f'SemCKDLoss was built for batches of {self.batch_size} '
                f'images, got {len(feature)}. Set batch_size={len(feature)}, '
                f"or use relation='grid'."
            )
        return len(feature) < self.batch_size

    def _valid(
        self, levels: Sequence[Tensor], gt: GroundTruth | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Maps in float32, each with 1 where a cell counts."""
        pairs = []
        for one in map(as_float, levels):
            if gt is None:
                valid = torch.ones_like(one[:, :1])
            else:
                gt = require_ground_truth('SemCKDLoss', gt, one)
                size = tuple(one.shape[-2:])
                valid = valid_mask(
                    gt, size, self.keep_padding, keep_ignored=True
                )
            pairs.append((one, valid))
        return pairs

    def _check_layers(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        for name, levels, channels in (
            ('student', student, self.student_channels),
            ('teacher', teacher, self.teacher_channels),
        ):
            if len(levels) != len(channels):
                raise ValueError(
                    f'SemCKDLoss was built for {len(channels)} layers of the '
                    f'{name}, got {len(levels)} maps. Give {name}_channels '
                    f'one entry a layer, and name levels and teacher_levels '
                    f'in the term.'
                )
            for one, expected in zip(levels, channels):
                check_channels('SemCKDLoss', one, expected)
            # Of each pair the larger map is pooled to the smaller one.
            check_statistics('SemCKDLoss', self.training, levels)

    def _check_pairs(self, allowed: Sequence[Sequence[bool]]) -> None:
        for level, row in enumerate(allowed):
            if not any(row):
                raise ValueError(
                    f'SemCKDLoss finds no layer of the teacher within '
                    f'max_stride_ratio={self.max_stride_ratio} of the '
                    f"student's layer {level}. Raise it, or choose other "
                    f'teacher_levels.'
                )


def _width(
    relation: str, grid: int, batch_size: int | None, factor: int
) -> int:
    """Numbers of a relation."""
    if relation == 'grid':
        width, name = grid**4, f'grid={grid}'
    elif batch_size is None:
        raise ValueError(
            "SemCKDLoss relates the images of a batch with relation='batch' "
            'and must know how many there are: set batch_size to those of '
            'one device.'
        )
    else:
        width, name = batch_size, f'batch_size={batch_size}'
    if width < factor:
        raise ValueError(
            f'SemCKDLoss makes queries embed_factor={factor} times shorter '
            f'than a relation of {width} numbers, and nothing is left. Raise '
            f"{name}, lower embed_factor, or use relation='grid'."
        )
    return width

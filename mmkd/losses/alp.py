"""ALP: each level of the student imitates a mixture of the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.ops.masks import (
    masked_mean,
    require_ground_truth,
    resize_valid,
    valid_mask,
)
from mmkd.ops.numeric import as_float, full_precision
from mmkd.ops.tokens import tokens_as_map
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

COMPARED = ('map', 'vector')
ATTENTION = ('image', 'cell')
BUCKETS = (None, 'no', 'po')
SCALES = ('sqrt_d', None)


def attention_weights(
    student: Tensor, teachers: Tensor, scale: str | None = 'sqrt_d'
) -> Tensor:
    r"""How much each layer of the teacher has in common with the student's.

    .. math:: e_k = softmax_k(h_S \cdot h_T^k / \sqrt{d})

    Args:
        student: Vectors of one layer, (..., d).
        teachers: Vectors of K layers of the teacher, (..., K, d).
        scale: ``'sqrt_d'`` divides by the root of the width, None by nothing.

    Returns:
        Weights > 0 that sum to 1, (..., K).

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> attention_weights(torch.tensor([7.0, 0.0]), 0 * vectors)
        tensor([0.3333, 0.3333, 0.3333])
    """
    student, teachers = as_float(student), as_float(teachers)
    with full_precision(student):
        products = (teachers @ student[..., None])[..., 0]
    if scale == 'sqrt_d':
        products = products / math.sqrt(student.shape[-1])
    return products.softmax(-1)


def bucket_of(
    level: int, students: int, teachers: int, bucket: str | None
) -> slice:
    """Which of the teacher's layers one of the student's may look at.

    Args:
        level: Position of the student's layer.
        students, teachers: Number of layers.
        bucket: None for all; ``'no'`` for consecutive parts that do not
            overlap, as equal as they can be; ``'po'`` for the same with one
            more layer at either end. With fewer layers than the student has,
            two of these share one.

    Example:
        >>> [bucket_of(level, 2, 6, 'no') for level in range(2)]
        [slice(0, 3, None), slice(3, 6, None)]
        >>> [bucket_of(level, 2, 6, 'po') for level in range(2)]
        [slice(0, 4, None), slice(2, 6, None)]
    """
    if bucket is None:
        return slice(0, teachers)
    first = level * teachers // students
    end = max((level + 1) * teachers // students, first + 1)
    if bucket == 'po':
        first, end = max(first - 1, 0), min(end + 1, teachers)
    return slice(first, end)


def layer_errors(
    student: Tensor,
    teacher: Tensor,
    bucket: str | None = None,
    scale: str | None = 'sqrt_d',
) -> Tensor:
    r"""How far vectors of layers are from the mixtures they attend to.

    .. math:: mean_d (S_j - \sum_k e_{jk} T_k)^2

    Args:
        student: The same vector of m layers, (m, ..., d).
        teacher: That of the teacher in n layers, (n, ..., d).
        bucket, scale: As of :func:`bucket_of` and :func:`attention_weights`.

    Returns:
        (m, ...), float32.

    Example:
        >>> student, teacher = torch.ones(2, 1, 3), torch.zeros(1, 1, 3)
        >>> layer_errors(student, teacher).tolist()  # nothing to choose from
        [[1.0], [1.0]]
    """
    student, teacher = as_float(student), as_float(teacher)
    errors = []
    for layer, one in enumerate(student):
        some = bucket_of(layer, len(student), len(teacher), bucket)
        others = teacher[some].movedim(0, -2)  # ..., k, d
        shares = attention_weights(one, others, scale)
        mixed = (shares[..., None] * others).sum(-2)
        errors.append((one - mixed).square().mean(-1))
    return torch.stack(errors)


@MODELS.register_module()
class ALPLoss(nn.Module):
    r"""Attention-based layer projection: no level of the teacher is skipped.

    .. math:: \frac{w}{m} \sum_j mean (S_j - \sum_k e_{jk} T_k)^2, \quad
        e_j = softmax_k(h_S^j \cdot h_T^k / \sqrt{d})

    h is the mean of a map over its cells. The teacher's maps are resized to
    the student's level, mixed, and compared with it. Student and teacher may
    differ in the number of levels: name ``levels`` and ``teacher_levels`` in
    the term, all of the teacher's by default. All maps must have one width d;
    a projection of the student, ``align=dict(type='mmkd.ConvAdapt', …)``,
    enters both the weights and the error. The weights carry a gradient to
    the student.

    Cells of the padded border count nowhere. Layers of a transformer may come
    as tokens, (N, L, C); those of both sides must stand for the same patches:
    queries of two decoders have no common order, see
    :class:`mmkd.terms.alp_queries.ALPQueryTerm`.

    Args:
        compare: ``'map'`` or ``'vector'``, the error of h alone, which is the
            paper's with its summary token.
        attention: ``'image'``, weights from h, or ``'cell'``, weights of each
            cell from its own vectors.
        bucket: Which layers of the teacher a level may look at, see
            :func:`bucket_of`. The paper's best is None, all of them.
        scale: ``'sqrt_d'`` or None.
        loss_weight: Outer factor w. A reimplementation for text takes 100.
        keep_padding: Let cells of the padded border count.

    Raises:
        ValueError: If a setting is unknown, there is no level, or maps differ
            in channels or are of other images.

    Not kept:
        equality: A level is compared with a mixture, not with itself.

    Reference:
        Passban et al., "ALP-KD: Attention-Based Layer Projection for
        Knowledge Distillation", AAAI 2021, arXiv:2012.14022. A
        reimplementation (https://github.com/ProFatXuanAll/BERT-gang) was
        read, not the paper: from it are the root of d, the mean over the
        student's layers and the weight. Maps instead of a summary token,
        their sizes and the border are ours, and so is the width of the
        overlap of ``'po'``.

    Example:
        >>> student = [torch.randn(2, 8, 4, 4)]
        >>> teacher = [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]
        >>> ALPLoss()(student, teacher).shape
        torch.Size([])
    """

    scope = 'levels'
    example: ClassVar[dict] = dict()

    def __init__(
        self,
        compare: str = 'map',
        attention: str = 'image',
        bucket: str | None = None,
        scale: str | None = 'sqrt_d',
        loss_weight: float = 100.0,
        keep_padding: bool = False,
    ) -> None:
        super().__init__()
        check_name('ALPLoss', 'compare', compare, COMPARED)
        check_name('ALPLoss', 'attention', attention, ATTENTION)
        if (compare, attention) == ('vector', 'cell'):
            raise ValueError(
                "ALPLoss has one vector an image with compare='vector', got "
                "attention='cell'. Use attention='image', or compare='map'."
            )
        check_choice('ALPLoss', 'bucket', bucket, BUCKETS)
        check_choice('ALPLoss', 'scale', scale, SCALES)
        self.compare = compare
        self.attention = attention
        self.bucket = bucket
        self.scale = scale
        self.loss_weight = loss_weight
        self.keep_padding = keep_padding

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> Tensor:
        student, teacher = self._maps(student, gt), self._maps(teacher, gt)
        _check_maps(student, teacher)
        others = [(one, self._valid(gt, one)) for one in teacher]
        total = 0.0
        for level, one in enumerate(student):
            bucket = bucket_of(level, len(student), len(teacher), self.bucket)
            valid = self._valid(gt, one)
            total = total + self._error(one, valid, others[bucket])
        return self.loss_weight * total / len(student)

    def weights(
        self,
        student: Tensor,
        valid: Tensor,
        teacher: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """How much each map of the teacher counts for a level.

        Args:
            student: Map of one level, (N, C, H, W).
            valid: 1 where a cell counts, 0 elsewhere, (N, 1, H, W).
            teacher: K maps with theirs; for weights of cells, of its size.

        Returns:
            Weights that sum to 1 over K, (N, K), or (N, H, W, K).
        """
        if self.attention == 'cell':
            one = student.movedim(1, -1)  # N, H, W, C
            others = torch.stack([x.movedim(1, -1) for x, _ in teacher], -2)
        else:
            one = masked_mean(student, valid)  # N, C
            others = torch.stack([masked_mean(*pair) for pair in teacher], 1)
        return attention_weights(one, others, self.scale)

    def _error(
        self,
        student: Tensor,
        valid: Tensor,
        teacher: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Mean square over channels, cells that count, and images."""
        if self.compare == 'vector':
            shares = self.weights(student, valid, teacher)
            others = torch.stack([masked_mean(*pair) for pair in teacher], 1)
            mixed = (shares[..., None] * others).sum(1)  # N, C
            return (masked_mean(student, valid) - mixed).square().mean()
        size = student.shape[-2:]
        resized = [(resize_valid(*pair, size), valid) for pair in teacher]
        shares = self.weights(
            student, valid, resized if self.attention == 'cell' else teacher
        )
        if self.attention == 'image':
            shares = shares[:, None, None]  # N, 1, 1, K
        mixed = sum(
            share[:, None] * other
            for share, (other, _) in zip(shares.unbind(-1), resized)
        )
        error = (student - mixed).square().mean(1, keepdim=True)
        return masked_mean(error, valid).mean()

    def _maps(
        self, levels: Sequence[Tensor], gt: GroundTruth | None
    ) -> list[Tensor]:
        shape = None if gt is None else gt.shape
        return [
            as_float(tokens_as_map('ALPLoss', one, shape)) for one in levels
        ]

    def _valid(self, gt: GroundTruth | None, feature: Tensor) -> Tensor:
        if gt is None:
            return torch.ones_like(feature[:, :1])
        gt = require_ground_truth('ALPLoss', gt, feature)
        size = tuple(feature.shape[-2:])
        return valid_mask(gt, size, self.keep_padding, keep_ignored=True)


def check_choice(
    who: str, name: str, value: str | None, known: Sequence[str | None]
) -> None:
    """A setting must be one of a few, of which None may be one.

    Raises:
        ValueError: If it is not.
    """
    if value not in known:
        raise ValueError(
            f'{who} has no {name}={value!r}. Use one of '
            f'{", ".join(map(repr, known))}.'
        )


def _check_maps(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if not (student and teacher):
        raise ValueError(
            f'ALPLoss needs a level of either side, got {len(student)} of '
            f'the student and {len(teacher)} of the teacher. Name them with '
            f'levels= and teacher_levels=.'
        )
    known = {tuple(one.shape[:2]) for one in [*student, *teacher]}
    if len(known) == 1:
        return
    own, other = ([one.shape[1] for one in x] for x in (student, teacher))
    if len({images for images, _ in known}) > 1:
        mend = 'The batches differ: both must see the same images.'
    elif len(set(other)) == 1:
        mend = (
            f"Add align=dict(type='mmkd.ConvAdapt', in_channels={own}, "
            f'out_channels={other[0]}) to this term.'
        )
    else:
        mend = (
            "The teacher's differ among themselves: tap its neck, with "
            "teacher_tap='neck'."
        )
    raise ValueError(
        f'ALPLoss mixes maps of one width, got a student with {own} and a '
        f'teacher with {other} channels. {mend}'
    )

"""BCKD: class scores are binary answers, weighted by the disagreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.ops.scores import top_score, valid_samples
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

NORMALISERS = ('teacher', 'boxes')


def bckd_class_loss(
    student: Tensor, teacher: Tensor, power: float = 1.0
) -> Tensor:
    r"""Binary cross entropies of all classes, weighted by the difference.

    .. math:: L_m = \sum_c |q_{mc} - p_{mc}|^\beta
        \big(-p_{mc} \log q_{mc} - (1 - p_{mc}) \log(1 - q_{mc})\big),
        \quad q = \sigma(s),\; p = \sigma(t)

    The weight carries a gradient as well. Equal logits cost 0.

    Args:
        student: Logits s of all samples, (M, C).
        teacher: Logits t of the teacher, without gradient.
        power: The formula's beta.

    Returns:
        Loss of each sample, (M,).

    Reference:
        Yang et al., "Bridging Cross-task Protocol Inconsistency for
        Distillation in Dense Object Detection", ICCV 2023, arXiv:2308.14286.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 8)
        >>> bckd_class_loss(x, x).tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    target = teacher.sigmoid()
    weight = (student.sigmoid() - target).abs() ** power
    entropy = F.binary_cross_entropy_with_logits(
        student, target, reduction='none'
    )
    return (weight * entropy).sum(1)


@MODELS.register_module()
class BCKDClassLoss(nn.Module):
    """Binary distillation of the class scores of all cells.

    This is the class part of BCKD; the box part is
    :class:`~mmkd.terms.box.BoxTerm`.

    The authors divide by the number of positives that the student's label
    assignment finds. A loss that sees maps has no assignment, so the sum over
    all cells is divided by one of two things, each at least 1:

    - ``'teacher'``: the teacher's largest class probability, summed over the
      cells that count. It is a soft number of positives, for the teacher is
      near 1 where there is an object; it needs no annotation, and a batch
      without objects, whose loss is small, is not divided by nothing.
    - ``'boxes'``: the number of boxes, which an assignment exceeds several
      times. Without a box all background cells are divided by 1, as are the
      authors' without positives.

    Args:
        num_classes: Scores of one anchor; None if a cell has a single anchor.
        power: Exponent of the difference, at least 1. Published: 1.
        normalise_by: ``'teacher'`` or ``'boxes'``.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
        loss_weight: The outer factor. Published, with their divisor: 1.

    Raises:
        ValueError: If a setting or the maps do not fit.

    Not kept:
        batch: The sum is divided by what counts in the whole batch.

    Reference:
        Yang et al., "Bridging Cross-task Protocol Inconsistency for
        Distillation in Dense Object Detection", ICCV 2023, arXiv:2308.14286.
        Read: the authors' loss, head and config
        (https://github.com/TinyTigerPan/BCKD), not the paper. There a level
        without positives has no distillation; here every level has. The
        number of positives is averaged over the processes, ours belongs to
        each batch by itself.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(num_classes=4)

    def __init__(
        self,
        num_classes: int | None = None,
        power: float = 1.0,
        normalise_by: str = 'teacher',
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_name('BCKDClassLoss', 'normalise_by', normalise_by, NORMALISERS)
        if not power >= 1:
            raise ValueError(
                f'BCKDClassLoss needs power >= 1, for below the gradient is '
                f'infinite where both sides agree; got power={power!r}.'
            )
        self.num_classes = num_classes
        self.power = power
        self.normalise_by = normalise_by
        self.keep_padding = keep_padding
        self.keep_ignored = keep_ignored
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> Tensor:
        one, other, valid = valid_samples(
            'BCKDClassLoss',
            student,
            teacher,
            gt,
            self.num_classes,
            self.keep_padding,
            self.keep_ignored,
        )
        total = (valid * bckd_class_loss(one, other, self.power)).sum()
        if self.normalise_by == 'boxes':
            return self.loss_weight * total / max(len(gt.boxes), 1)
        score = (valid * top_score(other, 'sigmoid')).sum()
        return self.loss_weight * total / score.clamp(min=1)

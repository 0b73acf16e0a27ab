"""DIST: what correlates for the teacher correlates for the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.ops.numeric import unit
from mmkd.ops.scores import (
    ACTIVATIONS,
    class_probs,
    top_score,
    valid_samples,
)
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

WEIGHTS = ('teacher', 'uniform')


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    activation: str = 'sigmoid',
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    r"""One minus the correlation of class probabilities, in both directions.

    .. math:: L_{inter} = \tau^2 \Big(1 - \sum_m w_m
        \rho_c(Y^S_{mc}, Y^T_{mc})\Big), \quad
        L_{intra} = \tau^2 \Big(1 - \frac{1}{C} \sum_c
        \rho_m(Y^S_{mc}, Y^T_{mc}; w)\Big)

    Y are the probabilities at the temperature :math:`\tau`, w weights with
    sum one, and :math:`\rho` Pearson's correlation, over the classes of a
    sample for the first, over the samples, weighted, for the second. Two
    sides of which one is flat count as unrelated, without a gradient.

    Args:
        student: Logits of all samples, (M, C).
        teacher: The same of the teacher, without gradient.
        weight: How much each sample counts, (M,).
        activation: ``'sigmoid'`` or ``'softmax'``.
        temperature: Divides the logits.
        eps: Deviation of probabilities up to which they count as flat.

    Returns:
        Scalars in [0, 2], between the classes and within them.

    Reference:
        Huang et al., "Knowledge Distillation from A Stronger Teacher",
        NeurIPS 2022, arXiv:2205.10536.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(9, 4), torch.ones(9)
        >>> inter, intra = dist_loss(x, x, weight)
        >>> max(inter.item(), intra.item()) < 1e-6
        True
    """
    student = class_probs(student / temperature, activation)
    teacher = class_probs(teacher / temperature, activation)
    weight = weight / weight.sum().clamp(min=eps)
    classes = student.new_full((1, student.shape[1]), 1 / student.shape[1])
    inter = correlation(student, teacher, classes, 1, eps)  # M
    intra = correlation(student, teacher, weight[:, None], 0, eps)  # C
    return (
        temperature**2 * (weight * (1 - inter)).sum(),
        temperature**2 * (1 - intra).mean(),
    )


def correlation(
    one: Tensor, other: Tensor, weight: Tensor, dim: int, eps: float = 1e-6
) -> Tensor:
    """Pearson's correlation along a dimension, weighted.

    Args:
        one: Values of one side, (M, C).
        other: Values of the other, (M, C).
        weight: Weights with sum one along the dimension, broadcast.
        dim: Dimension that is summed over.
        eps: Deviation up to which values count as flat.

    Returns:
        Correlations in [-1, 1], 0 where a side is flat.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0, 4.0]])
        >>> r = correlation(x, 3 - x, torch.full((1, 3), 1 / 3), dim=1)
        >>> round(r.item(), 5)
        -1.0
    """
    sides = [
        unit(
            weight.sqrt() * (x - (weight * x).sum(dim, keepdim=True)),
            dim,
            eps,
        )
        for x in (one, other)
    ]
    return (sides[0] * sides[1]).sum(dim)


@MODELS.register_module()
class DISTLoss(nn.Module):
    """Correlations between classes and within them, over all cells.

    A sample is an anchor of a cell; the samples of all levels and images are
    taken together.

    Args:
        num_classes: Scores of one anchor, with the background's where the
            head has one. None for a single anchor a cell, or to make one
            sample of all anchors of a cell, as the authors do.
        activation: ``'sigmoid'`` for heads with one binary classifier a
            class, ``'softmax'`` for the others.
        temperature: Of both sides.
        inter_weight: The paper's beta, factor of ``inter``.
        intra_weight: The paper's gamma, factor of ``intra``.
        weight_by: ``'teacher'``, samples count by the largest probability
            that the teacher gives to a class at temperature 1;
            ``'uniform'``, all alike, as for the authors.
        has_background: With softmax, the last class is the background, as in
            MMDetection's heads, and does not count as the teacher's largest.
        keep_padding: Let cells of the padded border count, as in the
            authors' code, which has no notion of them.
        keep_ignored: Let cells in ignored boxes count, likewise.
        loss_weight: Factor of both parts.

    Returns:
        ``inter``, over the classes of a sample, and ``intra``, over the
        samples of a class.

    Raises:
        ValueError: If a setting is unknown or maps do not fit.

    Not kept:
        batch: Correlations run over the samples of the whole batch.

    Reference:
        Huang et al., "Knowledge Distillation from A Stronger Teacher",
        NeurIPS 2022, arXiv:2205.10536. Read: the abstract, the authors'
        losses for detection and segmentation and their RetinaNet config
        (https://github.com/hunto/MasKD, mmrazor/); the temperature, which
        these lack, is known from their loss for classification. For
        RetinaNet they take sigmoid scores, all weights 1, each level by
        itself and summed, all 9 * 80 channels of a cell as one sample, and
        every cell alike. Here an anchor is a sample, levels are taken
        together, and cells count by the teacher's score: otherwise the
        background, which is nearly all of them, decides.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(num_classes=4)

    def __init__(
        self,
        num_classes: int | None = None,
        activation: str = 'sigmoid',
        temperature: float = 1.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        weight_by: str = 'teacher',
        has_background: bool = True,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_name('DISTLoss', 'activation', activation, ACTIVATIONS)
        check_name('DISTLoss', 'weight_by', weight_by, WEIGHTS)
        check_positive('DISTLoss', temperature=temperature)
        self.num_classes = num_classes
        self.activation = activation
        self.temperature = temperature
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.weight_by = weight_by
        self.has_background = has_background
        self.keep_padding = keep_padding
        self.keep_ignored = keep_ignored
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> dict[str, Tensor]:
        one, other, weight = valid_samples(
            'DISTLoss',
            student,
            teacher,
            gt,
            self.num_classes,
            self.keep_padding,
            self.keep_ignored,
        )
        if self.weight_by == 'teacher':
            score = top_score(other, self.activation, self.has_background)
            weight = weight * score
        inter, intra = dist_loss(
            one, other, weight, self.activation, self.temperature
        )
        return dict(
            inter=self.loss_weight * self.inter_weight * inter,
            intra=self.loss_weight * self.intra_weight * intra,
        )

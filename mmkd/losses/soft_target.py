"""SoftTarget: the student's class probabilities become the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.ops.scores import (
    ACTIVATIONS,
    bernoulli_divergence,
    class_probs,
    top_score,
    valid_samples,
)
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

WEIGHTS = ('teacher', 'uniform', 'difference')


def soft_target_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    activation: str = 'sigmoid',
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    r"""Weighted mean of the divergence of class probabilities.

    .. math:: \tau^2 \frac{\sum_m w_m KL(p^T_m \| p^S_m)}{\sum_m w_m},
        \quad p = softmax_c(z / \tau)

    With ``'sigmoid'`` each class is a distribution of its own,
    :math:`p_c = \sigma(z_c / \tau)`, and their divergences are added, or,
    with a weight for each class, averaged. A divergence is the cross entropy
    less the teacher's entropy: the gradient is the same,
    :math:`\tau (p^S - p^T)`, and equal logits cost 0.

    Args:
        student: Logits of all samples, (M, C).
        teacher: The same of the teacher, without gradient.
        weight: Weight of each sample, (M, 1), or of each of its classes,
            (M, C), the latter for ``'sigmoid'`` only.
        activation: ``'sigmoid'`` or ``'softmax'``.
        temperature: The higher, the more small probabilities count.
        eps: Least sum of the weights.

    Returns:
        Scalar >= 0.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", NIPS
        workshop 2014, arXiv:1503.02531.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(5, 8), torch.ones(5, 1)
        >>> soft_target_loss(x, x, weight).item()
        0.0
        >>> loss = soft_target_loss(x + 3, x, weight, 'softmax')
        >>> loss.abs().item() < 1e-6  # softmax ignores an offset
        True
    """
    student, teacher = student / temperature, teacher / temperature
    if activation == 'sigmoid':
        divergence = bernoulli_divergence(student, teacher)  # M, C
    else:
        divergence = F.kl_div(
            student.log_softmax(1),
            teacher.log_softmax(1),
            reduction='none',
            log_target=True,
        ).sum(1, keepdim=True)  # M, 1
    total = (weight * divergence).sum()
    return temperature**2 * total / weight.sum().clamp(min=eps)


def soft_target_weight(
    student: Tensor,
    teacher: Tensor,
    weight_by: str = 'teacher',
    activation: str = 'sigmoid',
    power: float = 1.0,
    has_background: bool = True,
) -> Tensor:
    r"""How much a sample, or each of its classes, counts.

    Probabilities are those of temperature 1, which the heads report.

    Args:
        student: Logits of all samples, (M, C).
        teacher: The same of the teacher.
        weight_by: ``'teacher'``, its largest probability;
            ``'uniform'``, 1; ``'difference'``, for sigmoid
            :math:`|p^T - p^S|^\beta` of each class, for softmax
            :math:`(\frac{1}{2} \sum_c |p^T_c - p^S_c|)^\beta`, which is
            the same if there are two classes.
        activation: ``'sigmoid'`` or ``'softmax'``.
        power: The formula's beta.
        has_background: With softmax, the last class is the background and
            does not count as the teacher's largest.

    Returns:
        Weights without gradient, (M, 1) or (M, C).
    """
    student, teacher = student.detach(), teacher.detach()
    if weight_by == 'uniform':
        return teacher.new_ones(len(teacher), 1)
    if weight_by == 'teacher':
        return top_score(teacher, activation, has_background)[:, None]
    gap = class_probs(teacher, activation) - class_probs(student, activation)
    gap = gap.abs()
    if activation == 'softmax':
        gap = gap.sum(1, keepdim=True) / 2
    return gap**power


@MODELS.register_module()
class SoftTargetLoss(nn.Module):
    r"""Soft targets at every anchor of every cell, weighted.

    Almost all cells of a dense head are background, where both sides say
    nothing. ``weight_by='teacher'`` lets those count where the teacher sees
    an object, ``'difference'`` those, and with sigmoid those classes, where
    the two disagree. The sum is divided by the sum of the weights of all
    levels and images, so that neither the size of the images nor the number
    of their objects changes the scale.

    Args:
        num_classes: Scores of one anchor, with the background's where the
            head has one; None if a cell has a single anchor.
        activation: ``'sigmoid'`` for heads with one binary classifier a
            class (RetinaNet, FCOS, GFL, …), ``'softmax'`` for the others.
        temperature: Of both sides. Above 1 the background of a sigmoid head
            counts more: a probability of 0.01 becomes 0.09 at 2.
        weight_by: ``'teacher'``, ``'uniform'`` or ``'difference'``, see
            :func:`soft_target_weight`.
        power: Exponent of the difference.
        has_background: With softmax, the last class is the background, as in
            MMDetection's heads.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
        loss_weight: The outer factor.

    Raises:
        ValueError: If a setting is unknown or maps do not fit.

    Not kept:
        batch: The sum is divided by the weights of the whole batch.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", NIPS
        workshop 2014, arXiv:1503.02531, known second-hand, for one label an
        image. What is done with dense heads is not from there: the teacher's
        largest score as a weight is FRS's (arXiv:2111.00674), the difference
        that of the quality focal loss (arXiv:2006.04388), which CrossKD
        (arXiv:2306.11369) takes for this. There it carries a gradient and
        the sum is divided by a number of positives; here it is a weight, and
        its sum divides.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(num_classes=4)

    def __init__(
        self,
        num_classes: int | None = None,
        activation: str = 'sigmoid',
        temperature: float = 1.0,
        weight_by: str = 'teacher',
        power: float = 1.0,
        has_background: bool = True,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        who = 'SoftTargetLoss'
        check_name(who, 'activation', activation, ACTIVATIONS)
        check_name(who, 'weight_by', weight_by, WEIGHTS)
        check_positive(who, temperature=temperature, power=power)
        self.num_classes = num_classes
        self.activation = activation
        self.temperature = temperature
        self.weight_by = weight_by
        self.power = power
        self.has_background = has_background
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
            'SoftTargetLoss',
            student,
            teacher,
            gt,
            self.num_classes,
            self.keep_padding,
            self.keep_ignored,
        )
        weight = soft_target_weight(
            one,
            other,
            self.weight_by,
            self.activation,
            self.power,
            self.has_background,
        )
        return self.loss_weight * soft_target_loss(
            one,
            other,
            weight * valid[:, None],
            self.activation,
            self.temperature,
        )

"""DKD: the target class against the rest, and the rest among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.ops.scores import (
    bernoulli_divergence,
    labelled_samples,
    target_and_others,
)
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""The two parts of a divergence of softmaxes, each by itself.

    .. math:: L_{target} = \tau^2 KL(b^T \| b^S), \quad
        L_{other} = \tau^2 KL(\hat p^T \| \hat p^S), \quad
        KL(p^T \| p^S) = KL(b^T \| b^S) + (1 - p^T_y) KL(\hat p^T \| \hat p^S)

    p is the softmax of a sample's logits at the temperature :math:`\tau`,
    y its target, :math:`b = (p_y, 1 - p_y)`, and :math:`\hat p` the softmax
    of the classes other than y. The last equation is what the paper starts
    from: in it a confident teacher silences the other classes. Both parts
    are means over the samples that have a label.

    Args:
        student: Logits of all samples, (M, C).
        teacher: The same of the teacher, without gradient.
        labels: Target of each sample, below 0 if it has none, (M,).
        temperature: Divides the logits.

    Returns:
        Scalars >= 0 of target and others, 0 if there is no label.

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022,
        arXiv:2203.08679.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[5.0, 1.0, 2.0]])
        >>> student = torch.tensor([[0.0, 1.0, 2.0]])
        >>> target, others = dkd_loss(student, teacher, torch.tensor([0]))
        >>> target.item() > 1, others.item()
        (True, 0.0)
    """
    margin, rest = target_and_others(student / temperature, labels)
    true_margin, true_rest = target_and_others(teacher / temperature, labels)
    target = bernoulli_divergence(margin, true_margin)  # M
    # The target's column is 0 on both sides.
    others = (true_rest.exp() * (true_rest - rest)).sum(1)  # M
    inside = (labels >= 0).to(student)
    share = temperature**2 / inside.sum().clamp(min=1)
    return share * (inside * target).sum(), share * (inside * others).sum()


@MODELS.register_module()
class DKDLoss(nn.Module):
    """Decoupled distillation of the cells that lie in a box.

    The target of a cell is the class of the smallest box that it overlaps;
    cells outside all boxes, in the padded border and in ignored boxes do not
    count. Every level sees every box, and all anchors of a cell share the
    target.

    Args:
        num_classes: Scores of one anchor; None if a cell has a single anchor.
        temperature: Of both sides. Published: 1 for detection, 4 for
            CIFAR-100 (the latter known second-hand).
        target_weight: The paper's alpha, factor of ``target``.
        other_weight: The paper's beta, factor of ``others``. Published for
            detection: 0.25.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
        loss_weight: Factor of both parts.

    Returns:
        ``target`` and ``others``.

    Raises:
        ValueError: If a setting or the maps do not fit.

    Not kept:
        batch: The mean is that over the samples of the whole batch.

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022,
        arXiv:2203.08679. Read: the authors' loss and their detectors
        (https://github.com/megvii-research/mdistiller), not the paper. There
        the samples are the proposals that Faster R-CNN's head is trained
        with, background is one of the classes, and the targets are those of
        the student's assignment. Here they are cells of a dense head, and
        the softmax runs over its logits even if the head itself takes
        sigmoids; a background class is one of the others.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(num_classes=4)

    def __init__(
        self,
        num_classes: int | None = None,
        temperature: float = 1.0,
        target_weight: float = 1.0,
        other_weight: float = 0.25,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('DKDLoss', temperature=temperature)
        self.num_classes = num_classes
        self.temperature = temperature
        self.target_weight = target_weight
        self.other_weight = other_weight
        self.keep_padding = keep_padding
        self.keep_ignored = keep_ignored
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> dict[str, Tensor]:
        samples = labelled_samples(
            'DKDLoss',
            student,
            teacher,
            gt,
            self.num_classes,
            self.keep_padding,
            self.keep_ignored,
        )
        target, others = dkd_loss(*samples, self.temperature)
        return dict(
            target=self.loss_weight * self.target_weight * target,
            others=self.loss_weight * self.other_weight * others,
        )

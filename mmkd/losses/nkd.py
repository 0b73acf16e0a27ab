"""NKD: a softened label, and the other classes brought to one sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.ops.scores import labelled_samples, target_and_others
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Cross entropies of the target and of the other classes.

    .. math:: L_{target} = -p^T_y \log p^S_y, \quad
        L_{other} = -\tau^2 \sum_{i \ne y} \hat p^T_i \log \hat p^S_i

    p is the softmax of a sample's logits, y its target, and :math:`\hat p`
    the softmax of the classes other than y at the temperature :math:`\tau`,
    which the target does not have. Both parts are means over the samples
    that have a label.

    Neither is 0 where both sides agree: the first is the loss of the label,
    softened, and pulls the student towards certainty; the second stops at
    the entropy of the teacher, where its gradient is 0.

    Args:
        student: Logits of all samples, (M, C).
        teacher: The same of the teacher, without gradient.
        labels: Target of each sample, below 0 if it has none, (M,).
        temperature: Of the other classes.

    Returns:
        Scalars >= 0 of target and others, 0 if there is no label.

    Reference:
        Yang et al., "From Knowledge Distillation to Self-Knowledge
        Distillation: A Unified Approach with Normalized Loss and Customized
        Soft Labels", ICCV 2023, arXiv:2303.13005.

    Example:
        >>> import torch
        >>> x, label = torch.zeros(1, 3), torch.tensor([2])
        >>> nkd_loss(x, x, label)  # log(3) / 3 and log(2)
        (tensor(0.3662), tensor(0.6931))
    """
    margin, _ = target_and_others(student, labels)
    true_margin, _ = target_and_others(teacher, labels)
    _, rest = target_and_others(student / temperature, labels)
    _, true_rest = target_and_others(teacher / temperature, labels)
    target = -true_margin.sigmoid() * F.logsigmoid(margin)  # M
    # The target's column of the student is 0.
    others = -(true_rest.exp() * rest).sum(1)  # M
    inside = (labels >= 0).to(student)
    count = inside.sum().clamp(min=1)
    return (
        (inside * target).sum() / count,
        temperature**2 * (inside * others).sum() / count,
    )


@MODELS.register_module()
class NKDLoss(nn.Module):
    """Normalised distillation of the cells that lie in a box.

    The target of a cell is the class of the smallest box that it overlaps;
    cells outside all boxes, in the padded border and in ignored boxes do not
    count. Every level sees every box, and all anchors of a cell share the
    target.

    Args:
        num_classes: Scores of one anchor; None if a cell has a single anchor.
        temperature: Of the other classes. The authors' default: 1.
        other_weight: The paper's gamma, factor of ``others``. The authors'
            default: 1.5.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
        loss_weight: Factor of both parts.

    Returns:
        ``target`` and ``others``.

    Raises:
        ValueError: If a setting or the maps do not fit.

    Not kept:
        equality: It is a cross entropy, whose least value is not 0.
        batch: The mean is that over the samples of the whole batch.

    Reference:
        Yang et al., "From Knowledge Distillation to Self-Knowledge
        Distillation: A Unified Approach with Normalized Loss and Customized
        Soft Labels", ICCV 2023, arXiv:2303.13005. Read: the abstract and the
        authors' loss and config (https://github.com/yzd-v/cls_KD), not the
        paper. It is a method for classifiers; the cells of dense heads as
        samples, and their targets, are ours. One version of the authors'
        file leaves the target among the other classes; here it is taken
        out, as in their other one.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(num_classes=4)

    def __init__(
        self,
        num_classes: int | None = None,
        temperature: float = 1.0,
        other_weight: float = 1.5,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('NKDLoss', temperature=temperature)
        self.num_classes = num_classes
        self.temperature = temperature
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
            'NKDLoss',
            student,
            teacher,
            gt,
            self.num_classes,
            self.keep_padding,
            self.keep_ignored,
        )
        target, others = nkd_loss(*samples, self.temperature)
        return dict(
            target=self.loss_weight * target,
            others=self.loss_weight * self.other_weight * others,
        )

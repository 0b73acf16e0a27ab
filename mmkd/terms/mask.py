"""Mask: the student's object masks become the teacher's of the same RoIs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox2roi
from torch import Tensor

from mmkd.checks import check_positive
from mmkd.ops.numeric import as_float
from mmkd.ops.scores import bernoulli_divergence
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.terms.proposal import SecondStageTerm, of_class


@MODELS.register_module()
class MaskTerm(SecondStageTerm):
    r"""Soft masks of the student's positive RoIs.

    .. math::
        L = \lambda \frac{\tau^2}{|P| h w} \sum_{i \in P} \sum_{xy}
            KL\big(\sigma(t_{ixy} / \tau) \| \sigma(s_{ixy} / \tau)\big)

    P are the RoIs that the student's mask loss sees, s and t the mask logits
    of both heads for the class that the student's assignment gave the RoI. KL
    is the binary cross entropy less the teacher's own entropy: the gradient
    is the same, and equal masks cost 0. Masks of another size than the
    student's are resized to it.

    Args:
        teacher: Name of the teacher.
        loss_weight: The outer factor.
        temperature: Of both sides.
        stage: Which of the student's stages, if it is a cascade; -1 is the
            last.
        teacher_stage: The same for the teacher.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a detector has no mask head, classes differ in number,
            or the teacher's maps are not of the strides that its head
            expects, while the model is built.

    Reference:
        The form is ours: that of soft targets, Hinton et al., "Distilling the
        Knowledge in a Neural Network", NIPS workshop 2014, arXiv:1503.02531,
        for the binary classifier that a mask head is at each of its cells.
    """

    part = 'mask_head'
    runs = '_mask_forward'

    def __init__(
        self,
        teacher: str,
        loss_weight: float = 1.0,
        temperature: float = 1.0,
        stage: int = 0,
        teacher_stage: int = -1,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(teacher, stage, teacher_stage, schedule)
        check_positive('MaskTerm', temperature=temperature)
        self.loss_weight, self.temperature = loss_weight, temperature

    def silent(self) -> bool:
        return not self.loss_weight

    def forward(self, step: Step) -> Tensor:
        seen = self.seen(step)
        if seen is None:
            return step.images.new_zeros(())
        sampled = seen['sampling_results']
        rois = bbox2roi([one.pos_priors for one in sampled])
        labels = torch.cat([one.pos_gt_labels for one in sampled])
        given = self.judge(step, rois)
        student, teacher = (
            of_class(as_float(one['mask_preds']), labels, head.class_agnostic)
            for one, head in zip((seen, given), self.pair(step))
        )  # P, h, w
        if teacher.shape != student.shape:
            teacher = F.interpolate(
                teacher[:, None], student.shape[-2:], mode='bilinear'
            )[:, 0]
        error = bernoulli_divergence(
            student / self.temperature, teacher / self.temperature
        )
        share = self.loss_weight * self.temperature**2
        return share * error.sum() / max(error.numel(), 1)

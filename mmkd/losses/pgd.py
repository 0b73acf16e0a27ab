"""PGD: imitate the towers of the head where the teacher predicts best."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive, check_same_shape
from mmkd.ops.attention import spatial_attention
from mmkd.ops.masks import background_mask, require_ground_truth, union_mask
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def cell_attention(feature: Tensor, temperature: float = 0.8) -> Tensor:
    r""":math:`C \cdot softmax_c(|F| / temperature)` in each cell by itself.

    Args:
        feature: Map of one level, (N, C, H, W).
        temperature: The lower, the sharper.

    Returns:
        Mask with mean 1 over the channels of each cell, (N, C, H, W).

    Example:
        >>> import torch
        >>> cell_attention(torch.ones(1, 2, 1, 1)).flatten().tolist()
        [1.0, 1.0]
    """
    strength = as_float(feature).abs() / temperature
    return feature.shape[1] * strength.softmax(1)


def pgd_class_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float = 0.8,
) -> dict[str, Tensor]:
    r"""Squared error of features of classes under masks and attention.

    With the attention over space, :math:`A_s`, and that over the channels of
    each cell, :math:`A_c`:

    .. math::
        foreground &= \frac{1}{N} \sum_n \frac{1}{|M_n|} \sum_x
            M_{nx} A_s^T \sum_c A_c^T (S - T)^2 \\
        attention &= \frac{1}{N H W} \|A_c^S - A_c^T\|_1 +
            \frac{1}{N} \|A_s^S - A_s^T\|_1

    :math:`|M_n|` is the number of cells of the image that are not 0. The
    background is the same with the other mask.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        foreground, background: Weight of each cell, (N, 1, H, W).
        temperature: Of the attentions; the lower, the sharper.

    Returns:
        The parts by name, computed in float32.

    Reference:
        As :class:`PGDClassLoss`.

    Example:
        >>> import torch
        >>> flat, mask = torch.ones(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> mask[..., :2] = 0.5
        >>> parts = pgd_class_loss(flat + 1, flat, mask, 0 * mask)
        >>> {name: part.item() for name, part in parts.items()}
        {'foreground': 1.0, 'background': 0.0, 'attention': 0.0}
    """
    check_same_shape('PGDClassLoss', student, teacher)
    student, teacher = as_float(student), as_float(teacher)
    channels, space = (
        attend(teacher, temperature)
        for attend in (cell_attention, spatial_attention)
    )
    error = channels * (student - teacher).square()
    error = space * error.sum(1, keepdim=True)  # N, 1, H, W
    over_channels = F.l1_loss(
        cell_attention(student, temperature), channels, reduction='sum'
    )
    over_space = F.l1_loss(
        spatial_attention(student, temperature), space, reduction='sum'
    )
    cells = space[0].numel()
    attention = (over_channels / cells + over_space) / len(student)
    return dict(
        foreground=_mean_of_images(foreground, error),
        background=_mean_of_images(background, error),
        attention=attention,
    )


def pgd_box_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    temperature: float = 0.8,
) -> dict[str, Tensor]:
    r"""Squared error of features of boxes, in the foreground alone.

    .. math::
        foreground &= \frac{1}{|M|} \sum_x
            M_x \frac{1}{C} \sum_c A_c^T (S - T)^2 \\
        attention &= \frac{1}{|M|} \sum_{x: M_x > 0} \sum_c |A_c^S - A_c^T|

    over the cells x of all images, :math:`|M|` of which have a weight.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        foreground: Weight of each cell, (N, 1, H, W).
        temperature: Of the attention; the lower, the sharper.

    Returns:
        The parts by name, 0 where nothing counts, computed in float32.

    Reference:
        As :class:`PGDBoxLoss`.

    Example:
        >>> import torch
        >>> flat, mask = torch.ones(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> mask[..., :2] = 0.5
        >>> parts = pgd_box_loss(flat + 1, flat, mask)
        >>> {name: part.item() for name, part in parts.items()}
        {'foreground': 0.5, 'attention': 0.0}
    """
    check_same_shape('PGDBoxLoss', student, teacher)
    student, teacher = as_float(student), as_float(teacher)
    foreground = as_float(foreground)
    channels = cell_attention(teacher, temperature)
    error = channels * (student - teacher).square()
    difference = (cell_attention(student, temperature) - channels).abs()
    there = (foreground > 0).to(foreground)
    count = there.sum().clamp(min=1)
    return dict(
        foreground=(foreground * error.mean(1, keepdim=True)).sum() / count,
        attention=(there * difference).sum() / count,
    )


def _mean_of_images(mask: Tensor, error: Tensor) -> Tensor:
    """Of each image the sum over its cells by their number, averaged."""
    mask = as_float(mask)
    count = (mask > 0).sum((2, 3), keepdim=True).clamp(min=1)
    return (mask / count * error).sum() / len(mask)


@MODELS.register_module()
class PGDClassLoss(nn.Module):
    r"""Of one level of the classification tower, after its first convolution.

    ``weight=dict(type='mmkd.QualityWeight', iou_power=0.8)`` is the
    foreground; without a weight it is every cell that a box overlaps. The
    background are the cells that no box overlaps, all alike. Neither holds
    cells of the padded border or in ignored boxes.

    Published settings, from the authors' configs:

    ===========  =====  ======  ======  ====
    student      fore-  back-   atten-  topk
                 ground ground  tion
    ===========  =====  ======  ======  ====
    ATSS         0.08   0.04    8e-4    9
    GFL, FCOS    0.04   0.02    8e-4    30
    ===========  =====  ======  ======  ====

    Args:
        foreground_weight: The paper's alpha.
        background_weight: The paper's beta; published is half of alpha.
        attention_weight: The paper's delta.
        temperature: Of the attentions; the lower, the sharper.
        level_index: Level this loss is for, 0 is the finest. The term that
            builds it tells.
        level_step: Foreground and background of a level count
            ``1 + level_step * level_index``.
        loss_weight: Factor of all parts.

    Not kept:
        border: Attention is that over all cells, as published.

    Reference:
        Yang et al., "Prediction-Guided Distillation for Dense Object
        Detection", ECCV 2022, arXiv:2203.05469. Read: the abstract, and the
        authors' code and configs (https://github.com/ChenhongyiYang/PGD) for
        facts. By a slip of dimensions their code applies the masks of every
        image of a GPU to the features of every image, four times four; here
        each has its own, and the weights are kept. Their background are cells
        whose centre lies in no box.
    """

    def __init__(
        self,
        foreground_weight: float = 0.08,
        background_weight: float = 0.04,
        attention_weight: float = 8e-4,
        temperature: float = 0.8,
        level_index: int = 0,
        level_step: float = 0.25,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('PGDClassLoss', temperature=temperature)
        scale = 1 + level_step * level_index
        self.weights = dict(
            foreground=scale * foreground_weight,
            background=scale * background_weight,
            attention=attention_weight,
        )
        self.temperature = temperature
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        gt: GroundTruth | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        gt = require_ground_truth('PGDClassLoss', gt, student)
        size = tuple(student.shape[-2:])
        boxes = union_mask(gt, size)
        parts = pgd_class_loss(
            student,
            teacher,
            boxes if weight is None else weight,
            background_mask(gt, size, foreground=boxes) > 0,
            self.temperature,
        )
        return {
            name: self.loss_weight * self.weights[name] * part
            for name, part in parts.items()
        }


@MODELS.register_module()
class PGDBoxLoss(nn.Module):
    """Of one level of the box tower, after its first convolution.

    ``weight=dict(type='mmkd.QualityWeight', iou_power=0.6)`` is the
    foreground; without a weight it is every cell that a box overlaps.

    Args:
        foreground_weight: The paper's gamma; published is 1.6 of the alpha of
            :class:`PGDClassLoss`, so 0.128 for ATSS, 0.064 for GFL and FCOS.
        attention_weight: The paper's delta.
        temperature: Of the attention; the lower, the sharper.
        loss_weight: Factor of both parts.

    Not kept:
        batch: The sum is divided by the weights of the whole batch.

    Reference:
        As :class:`PGDClassLoss`.
    """

    def __init__(
        self,
        foreground_weight: float = 0.128,
        attention_weight: float = 8e-4,
        temperature: float = 0.8,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('PGDBoxLoss', temperature=temperature)
        self.weights = dict(
            foreground=foreground_weight, attention=attention_weight
        )
        self.temperature = temperature
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        gt: GroundTruth | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if weight is None:
            gt = require_ground_truth('PGDBoxLoss', gt, student)
            weight = union_mask(gt, tuple(student.shape[-2:]))
        parts = pgd_box_loss(student, teacher, weight, self.temperature)
        return {
            name: self.loss_weight * self.weights[name] * part
            for name, part in parts.items()
        }

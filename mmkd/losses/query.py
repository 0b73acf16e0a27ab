"""Queries that belong together: how far apart their answers are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.ops.boxes import corners, giou_error
from mmkd.ops.numeric import as_float


def query_class_divergence(
    student: Tensor,
    teacher: Tensor,
    softmax: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    r"""How far a query's classes are from the teacher's, :math:`\ge 0`.

    For heads with a sigmoid a class, the sum of the divergences of two
    Bernoulli distributions; for those with one softmax, background included,
    :math:`KL(p^T \Vert p^S)`. Either times the squared temperature. Both are 0
    at equality, where a cross entropy with soft targets is not.

    Args:
        student, teacher: Logits, (…, C).
        softmax: Whether the C are classes of one distribution.
        temperature: Divides the logits.

    Returns:
        One value a query, (…).

    Example:
        >>> z = torch.randn(5, 3)
        >>> query_class_divergence(z, z).abs().max().item() < 1e-6
        True
    """
    student = as_float(student) / temperature
    teacher = as_float(teacher) / temperature
    if softmax:
        own, other = student.log_softmax(-1), teacher.log_softmax(-1)
        found = (other.exp() * (other - own)).sum(-1)
    else:
        chance = teacher.sigmoid()
        found = (
            chance * (F.logsigmoid(teacher) - F.logsigmoid(student))
            + (1 - chance) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        ).sum(-1)
    return found * temperature**2


def query_box_errors(
    student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """How far a query's box is from the teacher's, in DETR's two distances.

    Args:
        student, teacher: Centre x, y, width, height, of the image 1, (…, 4).

    Returns:
        Sum of the four absolute differences, and 1 - GIoU, (…) each.

    Example:
        >>> box = torch.tensor([0.5, 0.5, 0.2, 0.2])
        >>> l1, error = query_box_errors(
        ...     box + torch.tensor([0.2, 0, 0, 0]), box
        ... )
        >>> round(l1.item(), 4), round(error.item(), 4)
        (0.2, 1.0)
    """
    student, teacher = as_float(student), as_float(teacher)
    l1 = (student - teacher).abs().sum(-1)
    return l1, giou_error(corners(student), corners(teacher))


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of values (…) with a weight each; 0 where all weights are 0."""
    weight = torch.broadcast_to(as_float(weight), values.shape)
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1.0)

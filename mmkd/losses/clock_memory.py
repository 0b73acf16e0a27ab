"""CLoCKDistill, memory part: what encoders hand on, where objects are."""

from __future__ import annotations

import torch  # noqa: F401 - of the example
from torch import Tensor, nn

from mmkd.checks import check_same_shape
from mmkd.ops.masks import (
    background_mask,
    foreground_mask,
    require_ground_truth,
)
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


@MODELS.register_module()
class CLoCKMemoryLoss(nn.Module):
    r"""Squared difference in objects and beside them, each cell by area.

    .. math:: \frac{1}{N} \sum_{i, c}
              (\alpha M_i + \beta B_i) (S_{ic} - T_{ic})^2

    Args:
        foreground_weight: :math:`\alpha`.
        background_weight: :math:`\beta`.
        loss_weight: Factor of both.

    Returns:
        ``foreground`` and ``background``, in float32.

    Reference:
        Lan & Tian, "CLoCKDistill: Consistent Location-and-Context-aware
        Knowledge Distillation for DETRs", arXiv:2502.10683, with the masks of
        FGD. Read: a summary; no code. The weights are ours, FGD's by default.

    Example:
        >>> gt = GroundTruth.from_boxes(
        ...     [torch.tensor([[0.0, 0, 8, 8]])], shape=(24, 24)
        ... )
        >>> one, other = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
        >>> parts = CLoCKMemoryLoss(1.0, 0.5)(one, other, gt)
        >>> {name: part.item() for name, part in parts.items()}
        {'foreground': 2.0, 'background': 1.0}
    """

    def __init__(
        self,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> dict[str, Tensor]:
        check_same_shape('CLoCKMemoryLoss', student, teacher)
        gt = require_ground_truth('CLoCKMemoryLoss', gt, student)
        error = (as_float(student) - as_float(teacher)).square()
        error = error.sum(1, keepdim=True)
        size = tuple(student.shape[-2:])
        inside = foreground_mask(gt, size)
        beside = background_mask(gt, size, foreground=inside)
        return dict(
            foreground=self.loss_weight
            * self.foreground_weight
            * (inside * error).sum()
            / len(error),
            background=self.loss_weight
            * self.background_weight
            * (beside * error).sum()
            / len(error),
        )

"""FGD: focal and global distillation, the complete method."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mmkd.checks import check_channels, check_same_shape
from mmkd.losses.fgd_focal import FGDFocalLoss
from mmkd.losses.fgd_global import FGDGlobalLoss
from mmkd.ops.masks import require_ground_truth
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


@MODELS.register_module()
class FGDLoss(nn.Module):
    """Focal and global part of one level, sharing one difference of maps.

    Published settings, from the authors' configs. All clip gradients at 35,
    YOLOX excepted:

    ======================  =====  ======  ======  ======  ====  =========
    student                 fore-  back-   atten-  rela-   temp  levels
                            ground ground  tion    tion
    ======================  =====  ======  ======  ======  ====  =========
    RetinaNet, GFL          1e-3   5e-4    5e-4    5e-6    0.5   5
    SOLO                    1e-3   5e-4    5e-4    5e-6    0.5   4
    RepPoints               1.6e-3 8e-4    8e-4    8e-6    0.5   5
    FCOS                    1.6e-3 8e-4    8e-4    8e-6    0.8   5
    Faster and Mask R-CNN   5e-5   2.5e-5  5e-5    5e-7    0.5   4 (P2-P5)
    YOLOX                   2e-3   1e-3    1e-3    1e-5    0.5   3
    ======================  =====  ======  ======  ======  ====  =========

    The defaults are the first row. The authors' class has another default for
    the attention, 1e-3, which none of their one-stage configs uses.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ (the authors use a 1x1 convolution).
        foreground_weight: The paper's alpha.
        background_weight: The paper's beta.
        attention_weight: The paper's gamma.
        relation_weight: The paper's lambda.
        temperature: Of the attentions; the lower, the sharper.
        keep_padding: Let cells of the padded border count, as in the
            authors' code, which has no notion of them.
        keep_ignored: Let cells in ignored boxes count, likewise.
        loss_weight: Factor of all parts.

    Returns:
        ``foreground``, ``background``, ``attention``, ``relation``, computed
        in float32.

    Not kept:
        border: Attention and context see all cells, as published.

    Reference:
        Yang et al., "Focal and Global Knowledge Distillation for Detectors",
        CVPR 2022, arXiv:2111.11837. The authors' masks are stretched where an
        image is smaller than its padded batch; these are not.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        temperature: float = 0.5,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.focal = FGDFocalLoss(
            foreground_weight,
            background_weight,
            attention_weight,
            temperature,
            keep_padding,
            keep_ignored,
            loss_weight,
        )
        self.relation = FGDGlobalLoss(channels, loss_weight * relation_weight)

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> dict[str, Tensor]:
        check_same_shape('FGDLoss', student, teacher)
        check_channels('FGDLoss', teacher, self.relation.channels)
        gt = require_ground_truth('FGDLoss', gt, student)
        student, teacher = as_float(student), as_float(teacher)
        difference = student - teacher
        parts = self.focal(student, teacher, gt, difference)
        relation = self.relation(student, teacher, gt, difference)
        return dict(**parts, relation=relation)

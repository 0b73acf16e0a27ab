"""FGFI: imitate where anchors lie near objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from mmkd.checks import check_fraction, check_name, check_same_shape
from mmkd.ops.masks import maximum_per_image, require_ground_truth
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

#: Numbers that box_iou holds at once for a pair of boxes.
_DEPTH = 8

#: Map sizes whose anchors are remembered.
_REMEMBERED = 16


def fgfi_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    r"""Squared error per masked location, halved.

    .. math:: \frac{\sum M (S - T)^2}{2 \sum M}

    Unlike a mean, it grows with the number of channels.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        mask: 0 or 1 for each cell, (N, 1, H, W).

    Returns:
        Scalar, 0 for an empty mask, computed in float32.

    Reference:
        Wang et al., "Distilling Object Detectors with Fine-grained Feature
        Imitation", CVPR 2019, arXiv:1906.03609.

    Example:
        >>> x, mask = torch.zeros(1, 8, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> mask[..., 1:3] = 1
        >>> fgfi_loss(x + 3, x, mask).item()  # 8 channels
        36.0
    """
    check_same_shape('FGFILoss', student, teacher)
    difference = as_float(student) - as_float(teacher)
    error = difference.square().sum(1, keepdim=True)
    return (mask * error).sum() / (2 * mask.sum()).clamp(min=1)


def imitation_mask(
    gt: GroundTruth,
    anchors: Tensor,
    size: tuple[int, int],
    threshold: float = 0.5,
) -> Tensor:
    r"""1 at the cells of which some anchor is near some box, 0 elsewhere.

    An anchor is near a box if their IoU exceeds ``threshold`` times the
    largest IoU that the box has with any anchor *of this map*. So a box marks
    cells on each level of a pyramid, however badly its size fits there. A box
    that no anchor of the map meets marks nothing.

    Memory is bounded by taking as many boxes at once as fit.

    Args:
        gt: Boxes of the batch.
        anchors: x1 y1 x2 y2 in pixels, the K of a cell one after the other,
            cells row by row, (h * w * K, 4).
        size: Rows and columns of the map.
        threshold: The paper's psi.

    Returns:
        Mask, (N, 1, h, w).
    """
    rows, columns = size
    per_cell = len(anchors) // (rows * columns)
    boxes = as_float(gt.boxes)

    def near(part: slice) -> Tensor:
        iou = box_iou(boxes[part], anchors.to(boxes))
        close = iou > threshold * iou.amax(1, keepdim=True)
        return close.view(-1, rows, columns, per_cell).any(3)

    return maximum_per_image(
        near, gt.image, gt.num_images, size, depth=_DEPTH * per_cell
    )


@MODELS.register_module()
class FGFILoss(nn.Module):
    """Imitation of one level at the cells of :func:`imitation_mask`.

    .. code-block:: python

        loss = dict(
            type='mmkd.FGFILoss',
            anchor_generator=_base_.model.bbox_head.anchor_generator,
        )

    The number of cells is that of the whole batch. The paper has one map; on
    a pyramid each level is treated as that map, with its own anchors, its own
    largest IoU and its own number of cells. Cells over the padded border
    count if an anchor there is near a box.

    Args:
        anchor_generator: mmdet's config of the anchors, all levels: the
            student's own, or for a student without anchors any other,
            for instance ``dict(octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128])``. Its type
            is ``'AnchorGenerator'`` unless given.
        threshold: The paper's psi.
        loss_weight: Factor. The authors' code has 0.01 for one map of stride
            16.
        level_index: Level this loss is for, 0 is the first stride. The term
            that builds one loss a level gives it.

    Raises:
        ValueError: If the generator has no such level, or the map another
            stride than the anchors.

    Not kept:
        batch: The sum is divided by the marked cells of the whole batch.

    Reference:
        As :func:`fgfi_loss`.
    """

    example: ClassVar[dict] = dict(
        anchor_generator=dict(scales=[4], ratios=[0.5, 1.0, 2.0], strides=[8])
    )

    def __init__(
        self,
        anchor_generator: Mapping,
        threshold: float = 0.5,
        loss_weight: float = 0.01,
        level_index: int = 0,
    ) -> None:
        super().__init__()
        # Imported here: the losses themselves need no detector.
        from mmdet.models.task_modules import prior_generators  # noqa: F401
        from mmdet.registry import TASK_UTILS

        check_fraction('FGFILoss', threshold=threshold)
        anchors = {'type': 'AnchorGenerator', **anchor_generator}
        if TASK_UTILS.get(anchors['type']) is None:
            check_name(
                'FGFILoss',
                'anchor_generator',
                anchors['type'],
                TASK_UTILS.module_dict,
            )
        self.generator = TASK_UTILS.build(anchors)
        if not hasattr(self.generator, 'base_anchors'):
            raise ValueError(
                f'FGFILoss imitates near anchors, but '
                f'{type(self.generator).__name__} gives points. Set '
                f"anchor_generator=dict(type='AnchorGenerator', "
                f'octave_base_scale=4, scales_per_octave=3, ratios=[1.0], '
                f'strides=…).'
            )
        if not 0 <= level_index < self.generator.num_levels:
            raise ValueError(
                f'FGFILoss has anchors for {self.generator.num_levels} '
                f'levels, strides {self.generator.strides}, and is asked for '
                f'level {level_index}. Give anchor_generator one stride for '
                f'each level of the pyramid.'
            )
        self.threshold = threshold
        self.loss_weight = loss_weight
        self.level_index = level_index
        self._anchors: dict[tuple, Tensor] = {}

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        check_same_shape('FGFILoss', student, teacher)
        gt = require_ground_truth('FGFILoss', gt, student)
        size = tuple(student.shape[-2:])
        self._check_stride(size, gt.shape)
        mask = imitation_mask(
            gt, self.anchors(size, student.device), size, self.threshold
        )
        return self.loss_weight * fgfi_loss(student, teacher, mask)

    def anchors(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Anchors of the level in pixels, (h * w * K, 4)."""
        key = (size, device)
        if key not in self._anchors:
            if len(self._anchors) == _REMEMBERED:
                self._anchors.clear()
            self._anchors[key] = self.generator.single_level_grid_priors(
                size, self.level_index, device=device
            )
        return self._anchors[key]

    def _check_stride(
        self, size: tuple[int, int], shape: tuple[int, int]
    ) -> None:
        width, height = self.generator.strides[self.level_index]
        strides = height, width
        if all(
            abs(cells * stride - pixels) < stride
            for cells, stride, pixels in zip(size, strides, shape)
        ):
            return
        raise ValueError(
            f'FGFILoss has anchors of stride {strides} for level '
            f'{self.level_index}, got a map of {size} cells for images of '
            f'{shape} pixels. Give anchor_generator the strides of the '
            f'pyramid, or pick the levels that it has with levels=.'
        )

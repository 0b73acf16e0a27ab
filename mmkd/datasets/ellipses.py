"""Masks for a data set that has boxes alone, to try what needs masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.structures.mask import BitmapMasks

from mmkd.registry import TRANSFORMS


@TRANSFORMS.register_module()
class EllipseMasks(BaseTransform):
    """Give every object the ellipse that touches the sides of its box.

    For pictures of round things, and for tests. It stands behind what flips
    and resizes.

    Example:
        >>> from mmdet.structures.bbox import HorizontalBoxes
        >>> boxes = HorizontalBoxes([[0.0, 0.0, 4.0, 4.0]])
        >>> found = EllipseMasks()(dict(gt_bboxes=boxes, img_shape=(4, 5)))
        >>> found['gt_masks'].masks[0, :2].tolist()
        [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results['img_shape'][:2]
        boxes = results['gt_bboxes'].tensor.numpy()
        x1, y1, x2, y2 = boxes.T[..., None, None]  # M, 1, 1 each
        y = (np.arange(height)[:, None] + 0.5 - (y1 + y2) / 2) / (y2 - y1)
        x = (np.arange(width) + 0.5 - (x1 + x2) / 2) / (x2 - x1)
        masks = (x * x + y * y <= 0.25).astype(np.uint8)  # M, H, W
        results['gt_masks'] = BitmapMasks(masks, height, width)
        return results

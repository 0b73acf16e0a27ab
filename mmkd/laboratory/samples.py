"""Annotated images that no data loader made."""

from __future__ import annotations

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from numpy.typing import ArrayLike


def annotated(
    boxes: ArrayLike, labels: ArrayLike, masks: ArrayLike
) -> DetDataSample:
    """A sample of an image as a pipeline packs it, neither scaled nor turned.

    Args:
        boxes: Corners x1 y1 x2 y2, pixels, (M, 4).
        labels: Their classes, (M,).
        masks: 1 inside of each object, (M, H, W); these are the sizes of the
            image.
    """
    masks = np.asarray(masks, np.uint8)
    size = height, width = masks.shape[1:]
    sample = DetDataSample(
        metainfo=dict(
            ori_shape=size,
            img_shape=size,
            pad_shape=size,
            scale_factor=(1.0, 1.0),
            flip=False,
            flip_direction=None,
            border=(0, height, 0, width),
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.as_tensor(np.array(boxes), dtype=torch.float32).view(
            -1, 4
        ),
        labels=torch.as_tensor(np.array(labels), dtype=torch.long),
        masks=BitmapMasks(masks, height, width),
    )
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.long),
        masks=BitmapMasks(masks[:0], height, width),
    )
    return sample

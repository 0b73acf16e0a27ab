"""Tiny detectors with a second stage: masks, cascades, both."""

from __future__ import annotations

import copy

import tiny
import torch
from mmdet.structures.mask import BitmapMasks

STAGES = 2


def faster(base: int = tiny.BASE, **head) -> dict:
    """Faster R-CNN, with settings of its box head."""
    model = tiny.faster_rcnn(base=base)
    model['roi_head']['bbox_head'].update(head)
    return model


def mask(
    base: int = tiny.BASE, shared: bool = False, size: int = 7, **head
) -> dict:
    """Mask R-CNN, with settings of its mask head.

    Args:
        shared: Whether masks are made from the RoI features of the boxes.
        size: Cells of the features; masks have twice as many.
    """
    model = tiny.faster_rcnn(base=base)
    model['type'] = 'MaskRCNN'
    model['roi_head'].update(_masks(model, shared, size, **head))
    model['train_cfg']['rcnn']['mask_size'] = 2 * size
    model['test_cfg']['rcnn']['mask_thr_binary'] = 0.5
    return model


def cascade(base: int = tiny.BASE, masks: bool = False, **head) -> dict:
    """Cascade R-CNN of two stages that regress without regard to classes."""
    model = tiny.faster_rcnn(base=base)
    model['type'] = 'CascadeRCNN'
    roi_head = model['roi_head']
    roi_head.update(
        type='CascadeRoIHead', num_stages=STAGES, stage_loss_weights=[1, 0.5]
    )
    roi_head['bbox_head'].update(dict(reg_class_agnostic=True), **head)
    heads = [copy.deepcopy(roi_head['bbox_head']) for _ in range(STAGES)]
    heads[1]['bbox_coder'] = dict(
        type='DeltaXYWHBBoxCoder', target_stds=[0.05, 0.05, 0.1, 0.1]
    )
    roi_head['bbox_head'] = heads
    if masks:
        roi_head.update(_masks(model, False, 7))
        model['test_cfg']['rcnn']['mask_thr_binary'] = 0.5
    rcnn = model['train_cfg']['rcnn']
    model['train_cfg']['rcnn'] = [
        dict(copy.deepcopy(rcnn), mask_size=14) for _ in range(STAGES)
    ]
    return model


def _masks(model: dict, shared: bool, size: int, **head) -> dict:
    extractor = copy.deepcopy(model['roi_head']['bbox_roi_extractor'])
    extractor['roi_layer']['output_size'] = size
    channels = extractor['out_channels']
    return dict(
        mask_roi_extractor=None if shared else extractor,
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=tiny.CLASSES,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
            **head,
        ),
    )


def batch(**settings) -> tuple[torch.Tensor, list]:
    """A batch with masks of its objects."""
    images, samples = tiny.batch(**settings)
    add_masks(samples)
    return images, samples


def add_masks(samples: list) -> None:
    """Objects are the lower halves of their boxes."""
    for sample in samples:
        found = sample.gt_instances
        height, width = sample.img_shape
        x1, y1, x2, y2 = found.bboxes.T[..., None]  # M, 1 each
        y, x = torch.arange(height), torch.arange(width)
        rows = (y >= (y1 + y2) / 2) & (y < y2)
        columns = (x >= x1) & (x < x2)
        masks = rows[:, :, None] & columns[:, None]
        found.masks = BitmapMasks(masks.numpy().astype('uint8'), height, width)


def liven(detector: torch.nn.Module, seed: int) -> None:
    """Weights of a second stage that say something of each RoI.

    Boxes move by less than what their coder cuts off.
    """
    torch.manual_seed(seed)
    for name, weight in detector.roi_head.named_parameters():
        if name.endswith('weight'):
            std = 0.02 if 'reg' in name else 0.2
            torch.nn.init.normal_(weight.data, std=std)

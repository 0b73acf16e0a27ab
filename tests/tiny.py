"""Detectors and batches small enough for a test of milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

BASE = 8  # channels of the stem; stages have 8, 16, 32, 64
CLASSES = 3
SIZE = 128

PIXELS = dict(
    type='DetDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)


def backbone(base: int = BASE, depth: int = 18, **settings) -> dict:
    return dict(
        type='ResNet',
        depth=depth,
        base_channels=base,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        style='pytorch',
        **settings,
    )


def fpn(base: int, channels: int, **settings) -> dict:
    return dict(
        type='FPN',
        in_channels=[base, 2 * base, 4 * base, 8 * base],
        out_channels=channels,
        **settings,
    )


def retinanet(
    base: int = BASE,
    channels: int = 16,
    classes: int = CLASSES,
    pixels: dict | None = None,
    depth: int = 18,
) -> ConfigDict:
    return ConfigDict(
        type='RetinaNet',
        data_preprocessor=pixels or PIXELS,
        backbone=backbone(base, depth),
        neck=fpn(
            base,
            channels,
            start_level=1,
            add_extra_convs='on_input',
            num_outs=5,
        ),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=classes,
            in_channels=channels,
            stacked_convs=1,
            feat_channels=channels,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[8, 16, 32, 64, 128],
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.4,
                min_pos_iou=0,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
        ),
        test_cfg=dict(
            nms_pre=100,
            min_bbox_size=0,
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=10,
        ),
    )


def faster_rcnn(
    base: int = BASE, channels: int = 16, classes: int = CLASSES
) -> ConfigDict:
    assigner = dict(
        type='MaxIoUAssigner',
        pos_iou_thr=0.5,
        neg_iou_thr=0.5,
        min_pos_iou=0.3,
    )
    sampler = dict(
        type='RandomSampler',
        num=32,
        pos_fraction=0.25,
        add_gt_as_proposals=True,
    )
    proposals = dict(
        nms_pre=50,
        max_per_img=20,
        nms=dict(type='nms', iou_threshold=0.7),
        min_bbox_size=0,
    )
    coder = dict(type='DeltaXYWHBBoxCoder')
    return ConfigDict(
        type='FasterRCNN',
        data_preprocessor=PIXELS,
        backbone=backbone(base),
        neck=fpn(base, channels, num_outs=5),
        rpn_head=dict(
            type='RPNHead',
            in_channels=channels,
            feat_channels=channels,
            anchor_generator=dict(
                type='AnchorGenerator',
                scales=[8],
                ratios=[1.0],
                strides=[4, 8, 16, 32, 64],
            ),
            bbox_coder=coder,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=7),
                out_channels=channels,
                featmap_strides=[4, 8, 16, 32],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=channels,
                fc_out_channels=32,
                num_classes=classes,
                bbox_coder=coder,
                loss_cls=dict(type='CrossEntropyLoss'),
                loss_bbox=dict(type='L1Loss'),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=dict(assigner, pos_iou_thr=0.7, neg_iou_thr=0.3),
                sampler=dict(sampler, add_gt_as_proposals=False),
                allowed_border=-1,
                pos_weight=-1,
            ),
            rpn_proposal=proposals,
            rcnn=dict(assigner=assigner, sampler=sampler, pos_weight=-1),
        ),
        test_cfg=dict(
            rpn=proposals,
            rcnn=dict(
                score_thr=0.0,
                nms=dict(type='nms', iou_threshold=0.5),
                max_per_img=10,
            ),
        ),
    )


def build(model: dict, seed: int = 0) -> torch.nn.Module:
    """A detector whose weights follow from the seed alone."""
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    detector = MODELS.build(model)
    if hasattr(detector, 'level_embed'):  # else what was in the memory
        torch.nn.init.normal_(detector.level_embed)
    return detector


def lively(model: dict, seed: int = 5) -> torch.nn.Module:
    """A detector in evaluation whose every weight says something."""
    detector = build(copy.deepcopy(model))
    torch.manual_seed(seed)
    for name, one in detector.named_parameters():
        if one.ndim > 1:
            one.data.normal_(std=one[0].numel() ** -0.5)
        elif 'head' in name and name.endswith('bias'):
            one.data.normal_(std=0.1)
    return detector.eval()


def save_teacher(
    model: dict, path: Path, seed: int = 7, meta: dict | None = None
) -> Path:
    """A checkpoint of random weights whose BatchNorm has seen data."""
    # Some detectors write into the config that they are built from.
    detector = build(copy.deepcopy(model), seed)
    torch.manual_seed(seed)
    for one in detector.modules():
        if isinstance(one, torch.nn.BatchNorm2d):
            one.running_mean.normal_(std=0.1)
            one.running_var.uniform_(0.5, 1.5)
    torch.save(dict(state_dict=detector.state_dict(), meta=meta or {}), path)
    return path


def distilled(
    student: dict, teachers: dict, terms: dict, **settings
) -> ConfigDict:
    """The student's config with the three keys of the distiller."""
    return ConfigDict(
        student,
        type='mmkd.Distiller',
        student=student['type'],
        teachers=teachers,
        terms=terms,
        **settings,
    )


def batch(
    shapes: tuple = ((SIZE, SIZE), (96, 112)),
    boxes: int = 3,
    seed: int = 3,
    classes: int = CLASSES,
) -> tuple[torch.Tensor, list[DetDataSample]]:
    """Normalised images, padded to one size, with random boxes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(shapes), 3, SIZE, SIZE)
    samples = []
    for index, (height, width) in enumerate(shapes):
        images[index, :, :height, :width] = torch.randn(
            3, height, width, generator=generator
        )
        corner = torch.rand(boxes, 2, generator=generator) * 40
        extent = 16 + torch.rand(boxes, 2, generator=generator) * 36
        sample = DetDataSample(
            metainfo=dict(
                img_id=index,
                img_shape=(height, width),
                ori_shape=(height, width),
                pad_shape=(SIZE, SIZE),
                batch_input_shape=(SIZE, SIZE),
                scale_factor=(1.0, 1.0),
                flip=False,
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + extent], 1),
            labels=torch.randint(0, classes, (boxes,), generator=generator),
        )
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    return images, samples


def pixels(images: torch.Tensor, samples: list) -> dict:
    """The batch as a data loader would hand it over: BGR bytes, unpadded."""
    mean = torch.tensor(PIXELS['mean'])[:, None, None]
    std = torch.tensor(PIXELS['std'])[:, None, None]
    loaded = []
    for image, sample in zip(images, samples):
        height, width = sample.img_shape
        rgb = (image[:, :height, :width] * std + mean).clamp(0, 255)
        loaded.append(rgb.flip(0).to(torch.uint8))
    return dict(inputs=loaded, data_samples=samples)


def total(losses: dict) -> torch.Tensor:
    """What MMEngine would back-propagate."""
    return sum(
        value if isinstance(value, torch.Tensor) else sum(value)
        for key, value in losses.items()
        if 'loss' in key
    )

"""Tiny detectors of the families that ``tiny`` and ``heads`` lack."""

from __future__ import annotations

import heads
import numpy as np
import tiny
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict

STRIDES = [8, 16, 32, 64, 128]
NORM = dict(type='BN', requires_grad=True)
TEST = dict(
    nms_pre=100,
    min_bbox_size=0,
    score_thr=0.0,
    nms=dict(type='nms', iou_threshold=0.5),
    max_per_img=10,
)


# Dense heads on a pyramid ----------------------------------------------------


def paa(base: int = tiny.BASE) -> dict:
    """Labels assigned anew by the student's own scores."""
    model = heads.atss(base, convs=2)
    model['type'] = 'PAA'
    model['bbox_head'].update(type='PAAHead', reg_decoded_bbox=True, topk=9)
    model['train_cfg']['assigner'] = dict(
        type='MaxIoUAssigner',
        pos_iou_thr=0.1,
        neg_iou_thr=0.1,
        min_pos_iou=0,
    )
    return model


def ddod(base: int = tiny.BASE) -> dict:
    """Classes and boxes have an assignment each."""
    model = heads.atss(base, convs=2)
    model['type'] = 'DDOD'
    del model['bbox_head']['loss_centerness']
    model['bbox_head'].update(
        type='DDODHead',
        norm_cfg=NORM,
        loss_iou=dict(type='CrossEntropyLoss', use_sigmoid=True),
    )
    model['train_cfg'].update(
        assigner=dict(type='ATSSAssigner', topk=9, alpha=0.8),
        reg_assigner=dict(type='ATSSAssigner', topk=9, alpha=0.5),
    )
    return model


def guided(base: int = tiny.BASE) -> dict:
    """Anchors by what is seen; its convolutions see one image at a time."""
    model = tiny.retinanet(base)
    head, train = model.bbox_head, model.train_cfg
    coder = dict(type='DeltaXYWHBBoxCoder')
    model.bbox_head = dict(
        type='GARetinaHead',
        num_classes=tiny.CLASSES,
        in_channels=head.in_channels,
        feat_channels=head.feat_channels,
        stacked_convs=1,
        approx_anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=STRIDES,
        ),
        square_anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], scales=[4], strides=STRIDES
        ),
        anchor_coder=coder,
        bbox_coder=coder,
        loc_filter_thr=0.01,
        loss_loc=dict(type='FocalLoss', use_sigmoid=True),
        loss_shape=dict(type='BoundedIoULoss', beta=0.2),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='SmoothL1Loss', beta=0.04),
    )
    sampler = dict(type='RandomSampler', num=256, pos_fraction=0.5)
    model.train_cfg = dict(
        train,
        ga_assigner=dict(
            type='ApproxMaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0.4,
            ignore_iof_thr=-1,
        ),
        ga_sampler=dict(sampler, add_gt_as_proposals=False),
        center_ratio=0.2,
        ignore_ratio=0.5,
    )
    return model


def tood(base: int = tiny.BASE) -> dict:
    """Its head returns probabilities and decoded boxes."""
    model = heads.atss(base, convs=2)
    model['type'] = 'TOOD'
    model['bbox_head'].update(
        type='TOODHead',
        initial_loss_cls=dict(
            type='FocalLoss', use_sigmoid=True, activated=True
        ),
        loss_cls=dict(
            type='QualityFocalLoss', use_sigmoid=True, activated=True
        ),
    )
    model['train_cfg'].update(
        initial_epoch=4,
        initial_assigner=dict(type='ATSSAssigner', topk=9),
        assigner=dict(type='TaskAlignedAssigner', topk=13),
        alpha=1,
        beta=6,
    )
    return model


def reppoints(base: int = tiny.BASE) -> dict:
    """Two sets of points; boxes only outside of training."""
    model = tiny.retinanet(base=base)
    model.type = 'RepPointsDetector'
    channels = model.bbox_head.in_channels
    model.bbox_head = dict(
        type='RepPointsHead',
        num_classes=tiny.CLASSES,
        in_channels=channels,
        feat_channels=channels,
        point_feat_channels=channels,
        stacked_convs=2,
        point_strides=STRIDES,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
    )
    refine = model.train_cfg
    model.train_cfg = dict(
        init=dict(
            assigner=dict(type='PointAssigner', scale=4, pos_num=1),
            allowed_border=-1,
            pos_weight=-1,
        ),
        refine=refine,
    )
    return model


def centernet_update(base: int = tiny.BASE) -> dict:
    """A heat map a class on each level."""
    model = heads.fcos(base, convs=2)
    model['type'] = 'CenterNet'
    del model['bbox_head']['norm_on_bbox']
    model['bbox_head'].update(type='CenterNetUpdateHead')
    return model


def centernet(base: int = tiny.BASE) -> dict:
    """One map of stride 4, made by deformable and transposed convolutions."""
    return ConfigDict(
        type='CenterNet',
        data_preprocessor=tiny.PIXELS,
        backbone=dict(tiny.backbone(base), out_indices=(3,)),
        neck=dict(
            type='CTResNetNeck',
            in_channels=8 * base,
            num_deconv_filters=(4 * base, 2 * base, base),
            num_deconv_kernels=(4, 4, 4),
            use_dcn=True,
        ),
        bbox_head=dict(
            type='CenterNetHead',
            num_classes=tiny.CLASSES,
            in_channels=base,
            feat_channels=base,
        ),
        test_cfg=dict(topk=10, local_maximum_kernel=3, max_per_img=10),
    )


def yolox(base: int = tiny.BASE) -> dict:
    """Without a normalisation; each batch is resized as it comes."""
    return ConfigDict(
        type='YOLOX',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            pad_size_divisor=32,
            batch_augments=[
                dict(
                    type='BatchSyncRandomResize',
                    random_size_range=(128, 128),
                    size_divisor=32,
                    interval=1,
                )
            ],
        ),
        backbone=dict(
            type='CSPDarknet',
            deepen_factor=0.33,
            widen_factor=base / 64,
            out_indices=(2, 3, 4),
        ),
        neck=dict(
            type='YOLOXPAFPN',
            in_channels=_csp_channels(base),
            out_channels=16,
            num_csp_blocks=1,
        ),
        bbox_head=dict(
            type='YOLOXHead',
            num_classes=tiny.CLASSES,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
        ),
        train_cfg=dict(assigner=dict(type='SimOTAAssigner')),
        test_cfg=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.65)),
    )


def rtmdet(base: int = tiny.BASE) -> dict:
    """BGR; towers a level, of which the convolutions are shared."""
    return ConfigDict(
        type='RTMDet',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[103.53, 116.28, 123.675],
            std=[57.375, 57.12, 58.395],
            bgr_to_rgb=False,
            batch_augments=[
                dict(
                    type='BatchFixedSizePad',
                    size=(tiny.SIZE, tiny.SIZE),
                    pad_mask=False,
                )
            ],
        ),
        backbone=dict(
            type='CSPNeXt',
            deepen_factor=0.167,
            widen_factor=base / 64,
            norm_cfg=NORM,
            act_cfg=dict(type='SiLU', inplace=True),
        ),
        neck=dict(
            type='CSPNeXtPAFPN',
            in_channels=_csp_channels(base),
            out_channels=16,
            num_csp_blocks=1,
            norm_cfg=NORM,
            act_cfg=dict(type='SiLU', inplace=True),
        ),
        bbox_head=dict(
            type='RTMDetSepBNHead',
            num_classes=tiny.CLASSES,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            anchor_generator=dict(
                type='MlvlPointGenerator', offset=0, strides=STRIDES[:3]
            ),
            bbox_coder=dict(type='DistancePointBBoxCoder'),
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
            with_objectness=False,
            norm_cfg=NORM,
            act_cfg=dict(type='SiLU', inplace=True),
        ),
        train_cfg=dict(
            assigner=dict(type='DynamicSoftLabelAssigner', topk=13),
            allowed_border=-1,
            pos_weight=-1,
        ),
        test_cfg=TEST,
    )


def yolov3(base: int = tiny.BASE) -> dict:
    """Coarsest level first; one map a level holds boxes and classes."""
    channels = [8 * base, 4 * base, 2 * base]
    return ConfigDict(
        type='YOLOV3',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[0, 0, 0],
            std=[255.0, 255.0, 255.0],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=dict(tiny.backbone(base), out_indices=(1, 2, 3)),
        neck=dict(
            type='YOLOV3Neck',
            num_scales=3,
            in_channels=channels,
            out_channels=[32, 16, 8],
        ),
        bbox_head=dict(
            type='YOLOV3Head',
            num_classes=tiny.CLASSES,
            in_channels=[32, 16, 8],
            out_channels=[16, 16, 16],
            anchor_generator=dict(
                type='YOLOAnchorGenerator',
                base_sizes=[
                    [(116, 90), (156, 198), (373, 326)],
                    [(30, 61), (62, 45), (59, 119)],
                    [(10, 13), (16, 30), (33, 23)],
                ],
                strides=[32, 16, 8],
            ),
            bbox_coder=dict(type='YOLOBBoxCoder'),
            featmap_strides=[32, 16, 8],
        ),
        train_cfg=dict(
            assigner=dict(
                type='GridAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0,
            )
        ),
        test_cfg=dict(TEST, conf_thr=0.0),
    )


def ssd(base: int = tiny.BASE) -> dict:
    """Softmax over classes and background; anchors differ by level."""
    channels = (4 * base, 8 * base, 16, 16)
    return ConfigDict(
        type='SingleStageDetector',
        data_preprocessor=dict(tiny.PIXELS, std=[1, 1, 1], pad_size_divisor=1),
        backbone=dict(tiny.backbone(base), out_indices=(2, 3)),
        neck=dict(
            type='SSDNeck',
            in_channels=channels[:2],
            out_channels=channels,
            level_strides=(2, 2),
            level_paddings=(1, 1),
            l2_norm_scale=None,
        ),
        bbox_head=dict(
            type='SSDHead',
            in_channels=channels,
            num_classes=tiny.CLASSES,
            anchor_generator=dict(
                type='SSDAnchorGenerator',
                scale_major=False,
                input_size=tiny.SIZE,
                min_sizes=[16, 32, 64, 96],
                max_sizes=[32, 64, 96, 128],
                strides=[16, 32, 64, 128],
                ratios=[[2], [2, 3], [2, 3], [2]],
            ),
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]
            ),
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.0,
                gt_max_assign_all=False,
            ),
            sampler=dict(type='PseudoSampler'),
            smoothl1_beta=1.0,
            allowed_border=-1,
            pos_weight=-1,
            neg_pos_ratio=3,
        ),
        test_cfg=TEST,
    )


def _csp_channels(base: int) -> list[int]:
    return [4 * base, 8 * base, 16 * base]


# Two stages ------------------------------------------------------------------


def cascade_rcnn(base: int = tiny.BASE) -> dict:
    model = tiny.faster_rcnn(base)
    model.type = 'CascadeRCNN'
    head = model.roi_head
    head.update(
        type='CascadeRoIHead',
        num_stages=2,
        stage_loss_weights=[1, 0.5],
        bbox_head=[dict(head.bbox_head, reg_class_agnostic=True)] * 2,
    )
    model.train_cfg.rcnn = [model.train_cfg.rcnn] * 2
    return model


def mask_rcnn(base: int = tiny.BASE) -> dict:
    model = _with_masks(tiny.faster_rcnn(base))
    model.type = 'MaskRCNN'
    model.train_cfg.rcnn.mask_size = 8
    return model


def cascade_mask_rcnn(base: int = tiny.BASE) -> dict:
    model = _with_masks(cascade_rcnn(base))
    for stage in model.train_cfg.rcnn:
        stage.mask_size = 8
    return model


def _with_masks(model: ConfigDict) -> ConfigDict:
    extractor = model.roi_head.bbox_roi_extractor
    model.data_preprocessor = dict(tiny.PIXELS, pad_mask=True)
    model.roi_head.mask_roi_extractor = dict(
        extractor, roi_layer=dict(type='RoIAlign', output_size=4)
    )
    model.roi_head.mask_head = dict(
        type='FCNMaskHead',
        num_convs=1,
        roi_feat_size=4,
        in_channels=extractor.out_channels,
        conv_out_channels=8,
        num_classes=tiny.CLASSES,
        loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
    )
    model.test_cfg.rcnn.mask_thr_binary = 0.5
    return model


def faster_rcnn_c4(base: int = tiny.BASE) -> dict:
    """Without a neck."""
    model = tiny.faster_rcnn(base)
    del model['neck']
    model.backbone.out_indices = (2,)
    model.rpn_head.in_channels = 4 * base
    model.rpn_head.anchor_generator.strides = [16]
    model.roi_head.bbox_roi_extractor.update(
        out_channels=4 * base, featmap_strides=[16]
    )
    model.roi_head.bbox_head.in_channels = 4 * base
    return model


def trident(base: int = tiny.BASE) -> dict:
    """Three branches of one stage, of which one is deployed."""
    model = faster_rcnn_c4(2 * base)
    model.type = 'TridentFasterRCNN'
    branches = dict(num_branch=3, test_branch_idx=1)
    model.backbone.update(
        type='TridentResNet',
        depth=50,
        base_channels=base // 2,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        trident_dilations=(1, 2, 3),
        **branches,
    )
    model.roi_head.update(type='TridentRoIHead', **branches)
    return model


# Instance segmentation in one stage ------------------------------------------


def condinst(base: int = tiny.BASE) -> dict:
    """A box head that also predicts the weights of a mask head."""
    model = heads.fcos(base, convs=2)
    model['type'] = 'CondInst'
    model['data_preprocessor'] = dict(tiny.PIXELS, pad_mask=True)
    model['bbox_head'].update(type='CondInstBboxHead', num_params=169)
    model['mask_head'] = dict(
        type='CondInstMaskHead',
        mask_feature_head=dict(
            in_channels=16,
            feat_channels=8,
            start_level=0,
            end_level=2,
            out_channels=8,
            mask_stride=8,
            num_stacked_convs=1,
            norm_cfg=NORM,
        ),
        loss_mask=dict(
            type='DiceLoss', use_sigmoid=True, activate=True, eps=5e-6
        ),
    )
    model['train_cfg'] = None
    model['test_cfg'] = dict(TEST, mask_thr=0.5)
    return model


def solo(base: int = tiny.BASE) -> dict:
    """A mask head and nothing else."""
    return _solo(base, 'SOLO', type='SOLOHead', norm_cfg=NORM)


def solov2(base: int = tiny.BASE) -> dict:
    return _solo(
        base,
        'SOLOv2',
        type='SOLOV2Head',
        mask_feature_head=dict(
            feat_channels=8,
            start_level=0,
            end_level=3,
            out_channels=16,
            mask_stride=4,
            norm_cfg=NORM,
        ),
        norm_cfg=NORM,
    )


def _solo(base: int, kind: str, **head) -> dict:
    return ConfigDict(
        type=kind,
        data_preprocessor=dict(tiny.PIXELS, pad_mask=True),
        backbone=tiny.backbone(base),
        neck=tiny.fpn(base, 16, start_level=0, num_outs=5),
        mask_head=dict(
            num_classes=tiny.CLASSES,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            strides=[8, 8, 16, 32, 32],
            scale_ranges=(
                (1, 24),
                (12, 48),
                (24, 96),
                (48, 192),
                (96, 512),
            ),
            num_grids=[10, 9, 6, 4, 3],
            loss_mask=dict(type='DiceLoss', use_sigmoid=True, loss_weight=3.0),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            **head,
        ),
        test_cfg=dict(
            nms_pre=20,
            score_thr=0.0,
            mask_thr=0.5,
            filter_thr=0.05,
            kernel='gaussian',
            sigma=2.0,
            max_per_img=10,
        ),
    )


# Unlike teachers -------------------------------------------------------------


def swin_retinanet() -> dict:
    model = tiny.retinanet(base=16)
    model.backbone = dict(
        type='SwinTransformer',
        embed_dims=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
    )
    return model


#: As no other here: BGR, other numbers, and padded to 64.
PIXELS = dict(
    type='DetDataPreprocessor',
    mean=[103.53, 116.28, 123.675],
    std=[1.0, 2.0, 3.0],
    bgr_to_rgb=False,
    pad_value=7,
    pad_size_divisor=64,
)


# Batches ---------------------------------------------------------------------

SHAPES = (96, 96), (80, 88)


def batch(
    boxes: tuple[int, int] = (3, 3), masks: bool = False, seed: int = 3
) -> dict:
    """Two pictures as a data loader gives them.

    Args:
        boxes: Objects of each, at most 3.
        masks: Fill each box by a mask.
        seed: Of pictures and boxes.
    """
    images, samples = tiny.batch(shapes=SHAPES, seed=seed)
    for sample, count in zip(samples, boxes):
        # CenterNet predicts in the frame of a padded picture.
        sample.set_metainfo(dict(border=(0, *sample.img_shape, 0)))
        sample.gt_instances = sample.gt_instances[:count]
        if masks:
            sample.gt_instances.masks = _masks(sample)
    return tiny.pixels(images, samples)


def _masks(sample: DetDataSample) -> BitmapMasks:
    boxes = sample.gt_instances.bboxes.round().int().tolist()
    masks = np.zeros((len(boxes), *sample.img_shape), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top:bottom, left:right] = 1
    return BitmapMasks(masks, *sample.img_shape)


class Mixture:
    """Of two values, as PAA asks scikit-learn for it, here without fitting."""

    def __init__(self, count: int, means_init: np.ndarray, **_) -> None:
        self.means = means_init.ravel()

    def fit(self, values: np.ndarray) -> None:
        pass

    def predict(self, values: np.ndarray) -> np.ndarray:
        return self._distances(values).argmin(1)

    def score_samples(self, values: np.ndarray) -> np.ndarray:
        return -self._distances(values).min(1)

    def _distances(self, values: np.ndarray) -> np.ndarray:
        return np.abs(values - self.means)

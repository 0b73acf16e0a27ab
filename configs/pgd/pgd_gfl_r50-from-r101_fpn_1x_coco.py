"""PGD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/pgd/pgd_gfl_r50-from-r101_fpn_1x_coco.py

Published: 43.8 AP, the authors' README, from a teacher with 45.8 AP (below).
Trained by us: no.
Read: the authors' code and configs of this pair, from which all settings are,
    and their README (https://github.com/ChenhongyiYang/PGD); of the paper the
    abstract.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors' teacher was trained on several scales for 36 epochs, the
    zoo's for 24; their step has 32 images (8 GPUs x 4) at 0.02. Their masks of
    an image count for all images of its GPU, here for itself alone, and they
    scale all boxes of an image by one stride, here each by that of its level.
"""

_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
                'gfl_r101_fpn_mstrain_2x_coco/'
                'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth'
            ),
            inherit=True,
        )
    ),
    terms=dict(
        classes=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head.cls_convs.0',
            levels=(0, 1, 2, 3, 4),
            weight=dict(type='mmkd.QualityWeight', topk=30, iou_power=0.8),
            loss=dict(
                type='mmkd.PGDClassLoss',
                foreground_weight=0.04,
                background_weight=0.02,
                attention_weight=8e-4,
                temperature=0.8,
            ),
        ),
        boxes=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head.reg_convs.0',
            levels=(0, 1, 2, 3, 4),
            weight=dict(type='mmkd.QualityWeight', topk=30, iou_power=0.6),
            loss=dict(
                type='mmkd.PGDBoxLoss',
                foreground_weight=0.064,
                attention_weight=8e-4,
                temperature=0.8,
            ),
        ),
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))

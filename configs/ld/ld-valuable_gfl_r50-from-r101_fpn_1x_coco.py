"""LD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/ld/ld-valuable_gfl_r50-from-r101_fpn_1x_coco.py

Published: 42.1 AP, the authors' README, with the classes of positives
    distilled as well, which is not done here.
Trained by us: no.
Read: MMDetection's config and LDHead for the main region; for the valuable
    one a summary of the authors' code (https://github.com/HikariTJU/LD),
    from which its weight is: theirs divides by 16 where the main region
    divides by 4.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: anchors that are positive for any object are in the main region alone.
    For average=False see ld_gfl_r50-from-r101_fpn_1x_coco.py.
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
        )
    ),
    terms=dict(
        main=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.PositiveWeight'),
            loss=dict(
                type='mmkd.LDLoss',
                temperature=10.0,
                average=False,
                loss_weight=0.25,
            ),
        ),
        valuable=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.ValuableWeight'),
            loss=dict(
                type='mmkd.LDLoss',
                temperature=10.0,
                average=False,
                loss_weight=0.0625,
            ),
        ),
    ),
)

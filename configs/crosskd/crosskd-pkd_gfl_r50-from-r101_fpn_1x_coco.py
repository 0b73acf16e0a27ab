"""CrossKD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py \
    configs/crosskd/crosskd-pkd_gfl_r50-from-r101_fpn_1x_coco.py

Published: 43.9 AP, the authors' README, which lists this teacher with 44.9 AP.
Trained by us: no.
Read: a summary of the authors' settings; neither the paper nor their code,
    whose licence forbids use.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: with PKD on all levels of the neck. Cells of the padded border do not
    count in CrossKD.
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
        cross=dict(
            type='mmkd.CrossHeadTerm',
            teacher='r101',
            convs=3,
            class_weight=1.0,
            box_weight=4.0,
        ),
        pkd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            loss=dict(type='mmkd.PKDLoss', loss_weight=6.0),
        ),
    ),
)

"""CrossKD: ATSS R-50 (39.4 AP alone) learns from R-101 (41.5 AP).

python tools/train.py configs/crosskd/crosskd_atss_r50-from-r101_fpn_1x_coco.py

Family: response, by CrossHeadTerm.
Published: 41.8 AP, the authors' README.
Trained by us: no.
Read: a summary of the authors' settings; neither the paper nor their code,
    whose licence forbids use.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: cells of the padded border do not count.
"""

_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::atss/atss_r101_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/atss/'
                'atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth'
            ),
        )
    ),
    terms=dict(
        cross=dict(
            type='mmkd.CrossHeadTerm',
            teacher='r101',
            convs=3,
            class_weight=1.0,
            box_weight=1.0,
            centerness_weight=1.0,
        ),
    ),
)

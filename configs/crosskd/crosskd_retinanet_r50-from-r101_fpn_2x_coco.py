r"""CrossKD: RetinaNet R-50 (37.4 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/crosskd/crosskd_retinanet_r50-from-r101_fpn_2x_coco.py

Published: 39.7 AP, the authors' README.
Trained by us: no.
Read: a summary of the authors' settings; neither the paper nor their code,
    whose licence forbids use.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: cells of the padded border do not count.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
                'retinanet_r101_fpn_2x_coco/'
                'retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'
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
        ),
    ),
)

"""GID: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/gid/gid_gfl_r50-from-r101_fpn_1x_coco.py

Family: instance, by InstanceTerm.
Published: 41.5 AP, the README of LD's authors, who imitate the features of the
    instances alone, for a student with 40.1 AP; the whole method: none.
Trained by us: no.
Read: that number as a summary of the README (https://github.com/HikariTJU/LD)
    lists it, and for the settings the reproduction of GID's first author
    (https://github.com/daixinghome/Distill_GID_detectron2), which is of
    RetinaNet.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the weights are RetinaNet's. Boxes are compared by 1 - GIoU, not by
    offsets, so the weight of that part is ours.
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
        gid=dict(
            type='mmkd.InstanceTerm',
            teacher='r101',
            tap='bbox_head',
            neck='neck',
            topk=10,
            max_overlap=0.3,
            bins=10,
            feature_weight=5e-4,
            relation_weight=40.0,
            class_weight=0.1,
            box_weight=1.0,
        ),
    ),
)

"""GID: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/gid/gid_retinanet_r50-from-r101_fpn_1x_coco.py

Published: 39.1 AP, the abstract, from a teacher with 38.1 AP and for a student
    with 36.2 AP; the reproduction trains for 24 epochs.
Trained by us: no.
Read: the first author's reproduction, from which all settings are, and its
    README (https://github.com/daixinghome/Distill_GID_detectron2), which does
    not call it final; of the paper the abstract.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the reproduction's teacher was trained for 12 epochs.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

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

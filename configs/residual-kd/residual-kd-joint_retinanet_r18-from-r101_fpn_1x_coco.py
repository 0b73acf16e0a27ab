r"""Residual-KD: RetinaNet R-18 (31.7 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/residual-kd/residual-kd-joint_retinanet_r18-from-r101_fpn_1x_coco.py

Published: none on detection.
Trained by us: no.
Read: descriptions of Gao et al., "Residual Knowledge Distillation", 2020,
    arXiv:2002.09168; there is no code of theirs, and the form is our
    reading.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: what is deployed is 48 and 16 channels wide instead of 64, and no more
    expensive; it starts from random weights, that the AP alone does not.
    Student, assistant, neck and head learn at once. The weights are ours.
"""

_base_ = '../_base_/students/retinanet_r18_fpn_1x_coco_assisted.py'

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
        main=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='backbone.main',
            teacher_tap='backbone',
            levels=(0, 1, 2),
            teacher_levels=(1, 2, 3),
            loss=dict(type='mmkd.MimicLoss'),
        ),
        residual=dict(
            type='mmkd.ResidualTerm',
            teacher='r101',
            levels=(0, 1, 2),
            teacher_levels=(1, 2, 3),
            loss=dict(type='mmkd.MimicLoss'),
        ),
    ),
)

"""MHKD: RetinaNet R-18 (31.7 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/mhkd/mhkd_retinanet_r18-from-r101_fpn_1x_coco.py

Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: a description of Wang et al., "Multi-head Knowledge Distillation for
    Model Compression", arXiv:2012.02911, and the settings of a
    re-implementation, which are head_weight, mix and temperature here; neither
    the paper nor that code.
Schedule: 14 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: train_cfg.max_epochs, param_scheduler.1.end,
    param_scheduler.1.milestones.0, param_scheduler.1.milestones.1,
    param_scheduler.2.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: for 2 epochs the teacher's heads learn, and nothing else; then the
    student has its 12, with a warm-up of its own. Heads that are there already
    are taken with teacher_head_checkpoint, and phases left out. Several GPUs
    need --cfg-options find_unused_parameters=True. Heads on the stages of the
    backbone, lengths and the weight of the boxes are ours.
"""

_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

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
        heads=dict(
            type='mmkd.MultiHeadTerm',
            teacher='r101',
            num_classes=80,
            tap='backbone',
            levels=(1, 2, 3),
            strides=(8, 16, 32),
            channels=(128, 256, 512),
            teacher_channels=(512, 1024, 2048),
            head_channels=256,
            head_weight=0.5,
            mix=0.1,
            temperature=4.0,
        ),
    ),
    phases=[
        dict(
            length=2,
            train=(),
            freeze='terms.heads.student_heads',
            supervised=False,
        ),
        dict(length=12, freeze='terms.heads.teacher_heads'),
    ],
)
train_cfg = dict(max_epochs=14)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=14, milestones=[10, 13]),
    dict(
        type='LinearLR',
        start_factor=0.001,
        by_epoch=True,
        begin=2,
        end=3,
        convert_to_iter_based=True,
    ),
]

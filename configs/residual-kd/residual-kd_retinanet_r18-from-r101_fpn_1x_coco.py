r"""Residual-KD: RetinaNet R-18 (31.7 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/residual-kd/residual-kd_retinanet_r18-from-r101_fpn_1x_coco.py

Family: feature, by ResidualTerm.
Published: none on detection.
Trained by us: no.
Read: descriptions of Gao et al., "Residual Knowledge Distillation", 2020,
    arXiv:2002.09168; there is no code of theirs, and the order is our
    reading.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: param_scheduler.1.type, param_scheduler.1.milestones,
    param_scheduler.1.gamma, param_scheduler.1.begin, param_scheduler.1.end,
    param_scheduler.1.periods, param_scheduler.1.restart_weights,
    param_scheduler.1.eta_min.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: what is deployed is 48 and 16 channels wide instead of 64, and no more
    expensive; it starts from random weights, that the AP alone does not. Stage
    by stage the student imitates and the assistant learns the rest, an epoch
    each; neck and head then learn from the labels for 6. Several GPUs need
    --cfg-options find_unused_parameters=True. Lengths and weights are ours.
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
        **{
            f'main{i}': dict(
                type='mmkd.FeatureTerm',
                teacher='r101',
                tap='backbone.main',
                teacher_tap='backbone',
                levels=(i,),
                teacher_levels=(i + 1,),
                loss=dict(type='mmkd.MimicLoss', loss_weight=10.0),
            )
            for i in (0, 1, 2)
        },
        **{
            f'residual{i}': dict(
                type='mmkd.ResidualTerm',
                teacher='r101',
                levels=(i,),
                teacher_levels=(i + 1,),
                loss=dict(type='mmkd.MimicLoss', loss_weight=10.0),
            )
            for i in (0, 1, 2)
        },
    ),
    phases=[
        *[
            dict(
                train=(
                    *[f'backbone.{branch}.net.{part}' for part in stage],
                    f'backbone.{branch}.laterals.{i}',
                ),
                terms=f'{term}{i}',
                supervised=False,
            )
            for i, stage in enumerate(
                [
                    ('conv1', 'bn1', 'layer1', 'layer2'),
                    ('layer3',),
                    ('layer4',),
                ]
            )
            for branch, term in (('main', 'main'), ('assistant', 'residual'))
        ],
        dict(length=6, train=('neck', 'bbox_head'), terms=()),
    ],
)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(
        type='CosineRestartLR',
        periods=[1, 1, 1, 1, 1, 1, 6],
        restart_weights=[1, 1, 1, 1, 1, 1, 1],
        eta_min=0,
        by_epoch=True,
    ),
]

"""SSKD: RetinaNet R-18 (31.7 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/sskd/sskd_retinanet_r18-from-r101_fpn_1x_coco.py

Family: procedure, by MimicLoss.
Idea: Stage by stage imitates, then the head learns from labels.
Published: the paper reports COCO results of other pairs; none of this one.
Trained by us: no.
Read: the abstract of Gao et al., "An Embarrassingly Simple Approach for
    Knowledge Distillation", arXiv:1812.01819; that earlier stages rest while
    one learns is our reading of "stage by stage".
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: param_scheduler.1.type, param_scheduler.1.milestones,
    param_scheduler.1.gamma, param_scheduler.1.begin, param_scheduler.1.end,
    param_scheduler.1.periods, param_scheduler.1.restart_weights,
    param_scheduler.1.eta_min.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: four stages and the neck imitate for 6 epochs, then the head learns from
    the labels for 6. The learning rate starts again with each phase. All
    stages learn, where the zoo's config freezes the first. Several GPUs need
    --cfg-options find_unused_parameters=True. Lengths and weights are ours.
"""

_base_ = '../_base_/students/retinanet_r18_fpn_1x_unfrozen.py'

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
            f'stage{i}': dict(
                type='mmkd.FeatureTerm',
                teacher='r101',
                tap=f'backbone.layer{i}',
                levels=(0,),
                align=dict(
                    type='mmkd.ConvAdapt',
                    in_channels=32 * 2**i,
                    out_channels=128 * 2**i,
                ),
                loss=dict(type='mmkd.MimicLoss', loss_weight=10.0),
            )
            for i in (1, 2, 3, 4)
        },
        pyramid=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(type='mmkd.MimicLoss', loss_weight=10.0),
        ),
    ),
    phases=[
        dict(
            train=('backbone.conv1', 'backbone.bn1', 'backbone.layer1'),
            terms='stage1',
            supervised=False,
        ),
        *[
            dict(
                train=f'backbone.layer{i}',
                terms=f'stage{i}',
                supervised=False,
            )
            for i in (2, 3, 4)
        ],
        dict(length=2, train='neck', terms='pyramid', supervised=False),
        dict(length=6, train='bbox_head', terms=()),
    ],
)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(
        type='CosineRestartLR',
        periods=[1, 1, 1, 1, 2, 6],
        restart_weights=[1, 1, 1, 1, 1, 1],
        eta_min=0,
        by_epoch=True,
    ),
]

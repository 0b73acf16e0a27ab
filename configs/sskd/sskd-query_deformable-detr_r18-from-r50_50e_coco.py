r"""SSKD: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/sskd/sskd-query_deformable-detr_r18-from-r50_50e_coco.py

Published: the paper reports COCO results of other detectors; none of this one.
Trained by us: no.
Read: the abstract of Gao et al., "An Embarrassingly Simple Approach for
    Knowledge Distillation", arXiv:1812.01819; that earlier stages rest while
    one learns is our reading of "stage by stage".
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: param_scheduler.0.type, param_scheduler.0.milestones,
    param_scheduler.0.gamma, param_scheduler.0.begin, param_scheduler.0.end,
    param_scheduler.0.periods, param_scheduler.0.restart_weights,
    param_scheduler.0.eta_min.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: three stages of the backbone and the neck imitate for 12 epochs, the six
    layers of the encoder for 12, then decoder and head learn from the labels
    for 26. The learning rate starts again with each phase. The first stage
    stays as ImageNet left it, as in the zoo's config. Several GPUs need
    --cfg-options find_unused_parameters=True. Lengths and weights are ours.
    R-18's 40.0 AP are of the README of DETRDistill's authors; the zoo has no
    Deformable DETR on R-18.
"""

_base_ = '../_base_/students/deformable-detr_r18_16xb2-50e.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r50=dict(
            config='mmdet::deformable_detr/'
            'deformable-detr_r50_16xb2-50e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/'
                'deformable_detr/deformable-detr_r50_16xb2-50e_coco/'
                'deformable-detr_r50_16xb2-50e_coco_20221029_210934-'
                '6bc7d21b.pth'
            ),
        )
    ),
    terms=dict(
        **{
            f'stage{i}': dict(
                type='mmkd.FeatureTerm',
                teacher='r50',
                tap=f'backbone.layer{i}',
                levels=(0,),
                align=dict(
                    type='mmkd.ConvAdapt',
                    in_channels=32 * 2**i,
                    out_channels=128 * 2**i,
                ),
                loss=dict(type='mmkd.MimicLoss', loss_weight=10.0),
            )
            for i in (2, 3, 4)
        },
        pyramid=dict(
            type='mmkd.FeatureTerm',
            teacher='r50',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(type='mmkd.MimicLoss', loss_weight=10.0),
        ),
        **{
            f'layer{i}': dict(
                type='mmkd.FeatureTerm',
                teacher='r50',
                tap=f'encoder.layers.{i}',
                loss=dict(type='mmkd.MimicLoss', loss_weight=10.0),
            )
            for i in range(6)
        },
    ),
    phases=[
        *[
            dict(
                length=3,
                train=f'backbone.layer{i}',
                terms=f'stage{i}',
                supervised=False,
            )
            for i in (2, 3, 4)
        ],
        dict(length=3, train='neck', terms='pyramid', supervised=False),
        dict(
            length=2,
            train=('level_embed', 'encoder.layers.0'),
            terms='layer0',
            supervised=False,
        ),
        *[
            dict(
                length=2,
                train=f'encoder.layers.{i}',
                terms=f'layer{i}',
                supervised=False,
            )
            for i in range(1, 6)
        ],
        dict(
            length=26,
            train=(
                'decoder',
                'query_embedding',
                'reference_points_fc',
                'bbox_head',
            ),
            terms=(),
        ),
    ],
)
param_scheduler = [
    dict(
        type='CosineRestartLR',
        periods=[3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 26],
        restart_weights=[1] * 11,
        eta_min=0,
        by_epoch=True,
    ),
]

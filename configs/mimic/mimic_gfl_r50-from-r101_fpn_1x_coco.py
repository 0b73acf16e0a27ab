"""Mimic: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/mimic/mimic_gfl_r50-from-r101_fpn_1x_coco.py

Family: feature.
Published: 40.7 AP as FitNet in LD's comparison, where the student alone has
    40.1.
Trained by us: no.
Read: the config, head and imitation loss of LD
    (https://github.com/HikariTJU/LD), whose controlled comparison the result
    is from; not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: as in LD, the mean over a level, times 2, summed over levels, without an
    adapter. FitNet's own regressor is one line in the term:
    align=dict(type='mmkd.ConvAdapt', in_channels=256, out_channels=256).
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
        mimic=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(type='mmkd.MimicLoss', loss_weight=2.0),
        )
    ),
)

r"""PKD: RepPoints R-50 (38.6 AP alone) learns from X-101-DCN (44.2 AP).

python tools/train.py \
    configs/pkd/pkd_reppoints_r50-from-x101-dcn_fpn_2x_coco.py

Published: 42.3 AP, MMRazor's README.
Trained by us: no.
Read: MMRazor's config of this pair, from which all settings are, and its
    README (https://github.com/open-mmlab/mmrazor); not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.x101.checkpoint=FILE
Notes: the deviation is that of the population, MMRazor's the unbiased one.
"""

_base_ = 'mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        x101=dict(
            config=(
                'mmdet::reppoints/'
                'reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py'
            ),
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/reppoints/'
                'reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco/'
                'reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco'
                '_20200329-f87da1ea.pth'
            ),
        )
    ),
    terms=dict(
        pkd=dict(
            type='mmkd.FeatureTerm',
            teacher='x101',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(type='mmkd.PKDLoss', loss_weight=10.0),
        )
    ),
)

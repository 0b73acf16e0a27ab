r"""PKD: RetinaNet R-50 (37.4 AP alone) learns from X-101-64x4d (41.0 AP).

python tools/train.py \
    configs/pkd/pkd_retinanet_r50-from-x101-64x4d_fpn_2x_coco.py

Published: 40.8 AP, MMRazor's README.
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

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        x101=dict(
            config='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
                'retinanet_x101_64x4d_fpn_1x_coco/'
                'retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth'
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

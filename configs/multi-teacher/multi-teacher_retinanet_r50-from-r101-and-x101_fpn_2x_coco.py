r"""Multi: RetinaNet R-50 (37.4 AP alone) learns from two (38.9, 41.0 AP).

python tools/train.py \
    configs/multi-teacher/multi-teacher_retinanet_r50-from-r101-and-x101_fpn_2x_coco.py

Family: group, by PKDLoss.
Idea: Several teachers at once, each a term of its own.
Published: no result for this pair that we know of.
Trained by us: no.
Read: nothing but PKD's settings, which are MMRazor's for RetinaNet
    (https://github.com/open-mmlab/mmrazor), halved for each teacher.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your files:
    --cfg-options model.teachers.r101.checkpoint=FILE
    model.teachers.x101.checkpoint=FILE
Notes: two teachers are two terms. Each is a forward pass of its own.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

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
        ),
        x101=dict(
            config='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
                'retinanet_x101_64x4d_fpn_1x_coco/'
                'retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth'
            ),
        ),
    ),
    terms=dict(
        r101=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(type='mmkd.PKDLoss', loss_weight=5.0),
        ),
        x101=dict(
            type='mmkd.FeatureTerm',
            teacher='x101',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(type='mmkd.PKDLoss', loss_weight=5.0),
        ),
    ),
)

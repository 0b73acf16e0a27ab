"""CCKD: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/cckd/cckd_retinanet_r50-from-r101_fpn_1x_coco.py

Family: relational.
Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: the paper's abstract, and reimplementations for classifiers, from which
    kernel, gamma and order are; not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the samples are the boxes of the batch. COCO has about seven in an
    image. The weight is untuned.
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
        cckd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.CCKDLoss',
                loss_weight=10.0,
                kernel='gaussian',
                gamma=0.4,
                order=2,
            ),
        )
    ),
)

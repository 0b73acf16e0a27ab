"""FSP: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/fsp/fsp_retinanet_r50-from-r101_fpn_1x_coco.py

Family: feature.
Published: no result for a detector that we know of; for classifiers it is one
    of the nine methods of arXiv:2007.01922.
Trained by us: no.
Read: descriptions of the paper's loss, known second-hand; not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: stages flow into each other, and the pyramid's levels. The authors learn
    the flow before the task, see phases. The weight is untuned.
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
        stages=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='backbone',
            loss=dict(type='mmkd.FSPLoss', loss_weight=1.0),
        ),
        pyramid=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            loss=dict(type='mmkd.FSPLoss', loss_weight=1.0),
        ),
    ),
)

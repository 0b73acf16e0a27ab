r"""Affinity: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/affinity/affinity_retinanet_r50-from-r101_fpn_1x_coco.py

Family: relational.
Published: no result for this pair that we know of; the paper has object
    detection among its tasks.
Trained by us: no.
Read: the paper's abstract, a second-hand definition and copies of the authors'
    code for segmentation; not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: this is the pair-wise part of the method alone. Patch and weight are
    untuned.
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
        affinity=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(type='mmkd.AffinityLoss', loss_weight=1.0, patch_size=4),
        )
    ),
)

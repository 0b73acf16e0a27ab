"""PKD: Faster R-CNN R-50 (38.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py configs/pkd/pkd_faster-rcnn_r50-from-r101_fpn_2x_coco.py

Family: feature.
Published: 40.3 AP, MMRazor's README; its metafile says 40.4.
Trained by us: no.
Read: MMRazor's config of this pair, from which all settings are, and its
    README (https://github.com/open-mmlab/mmrazor); not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the deviation is that of the population, MMRazor's the unbiased one.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
                'faster_rcnn_r101_fpn_2x_coco/'
                'faster_rcnn_r101_fpn_2x_coco_'
                'bbox_mAP-0.398_20200504_210455-1d2dac9c.pth'
            ),
        )
    ),
    terms=dict(
        pkd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(type='mmkd.PKDLoss', loss_weight=6.0),
        )
    ),
)

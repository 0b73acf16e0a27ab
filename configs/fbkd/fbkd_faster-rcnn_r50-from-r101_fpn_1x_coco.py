r"""FBKD: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.4 AP).

python tools/train.py \
    configs/fbkd/fbkd_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Family: focal region.
Published: 39.3 AP, MMRazor's README; its metafile says 39.1.
Trained by us: no.
Read: MMRazor's config of this pair, from which all settings are, and its
    README (https://github.com/open-mmlab/mmrazor); not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the student starts from ImageNet weights, as alone. MMRazor's config
    builds it with pretrained=True, which loads the zoo's trained Faster R-CNN.
    Features are weighted by the channel mask too, as in the paper.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
                'faster_rcnn_r101_fpn_1x_coco/'
                'faster_rcnn_r101_fpn_1x_coco_20200130-f513f705.pth'
            ),
        )
    ),
    terms=dict(
        fbkd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(
                type='mmkd.FBKDLoss',
                channels=256,
                feature_weight=7e-5,
                attention_weight=4e-3,
                relation_weight=7e-5,
                temperature=0.5,
                pool_stride=(8, 4, 2, 2),
                reduction=(4, 4, 2, 2),
            ),
        )
    ),
)

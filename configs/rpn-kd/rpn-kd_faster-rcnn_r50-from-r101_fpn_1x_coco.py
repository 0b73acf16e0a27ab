r"""RPN: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py \
    configs/rpn-kd/rpn-kd_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Family: response, by SoftTargetLoss.
Published: no result in this form that we know of.
Trained by us: no.
Read: the abstract of Chen et al., NIPS 2017, who distil both stages of Faster
    R-CNN, among other things; no settings of theirs are used.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: soft targets for the one score of each anchor, object or background,
    weighted by the teacher's. Weight and temperature are untuned. Both sides
    must have the same anchors.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

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
        rpn=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='rpn_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.SoftTargetLoss',
                num_classes=1,  # of each of the three anchors of a cell
                activation='sigmoid',
                temperature=1.0,
                weight_by='teacher',
                loss_weight=1.0,
            ),
        )
    ),
)

r"""FGFI: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py \
    configs/fgfi/fgfi_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Family: focal region.
Published: no result for this pair on COCO that we know of.
Trained by us: no.
Read: a description of the paper's loss; threshold and weight are those of the
    authors' code, known second-hand.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors distil one map of stride 16; on this pyramid the weight is
    untuned.
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
        fgfi=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            align=dict(
                type='mmkd.ConvAdapt', in_channels=256, out_channels=256
            ),
            loss=dict(
                type='mmkd.FGFILoss',
                anchor_generator=_base_.model.rpn_head.anchor_generator,
                threshold=0.5,
                loss_weight=0.01,
            ),
        )
    ),
)

"""FGD: Faster R-CNN R-50 (38.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py configs/fgd/fgd_faster-rcnn_r50-from-r101_fpn_2x_coco.py

Published: 40.5 AP, 40.4 without inheriting; the paper's table, known
    second-hand and not read again.
Trained by us: no.
Read: the authors' config of this pair, from which all settings are, and their
    README (https://github.com/yzd-v/FGD); not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: where an image is smaller than its padded batch, the authors stretch its
    boxes over the border; here they stay in place, and the border and ignored
    boxes are neither object nor background.
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
            inherit=True,
        )
    ),
    terms=dict(
        fgd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(
                type='mmkd.FGDLoss',
                channels=256,
                foreground_weight=5e-5,
                background_weight=2.5e-5,
                attention_weight=5e-5,
                relation_weight=5e-7,
                temperature=0.5,
            ),
        )
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))

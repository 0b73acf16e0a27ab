"""FGD: FCOS R-50 (38.5 AP alone) learns from R-101 (40.8 AP).

python tools/train.py configs/fgd/fgd_fcos_r50-from-r101_fpn_ms-2x_coco.py

Published: 42.7 AP, the authors' README, but for an improved student (below),
    so not to be compared with 38.5; none for this student.
Trained by us: no.
Read: the authors' config of this pair, from which all settings are, the
    student's config it names, and their README (https://github.com/yzd-v/FGD);
    not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors' student has norm_on_bbox, center_sampling, conv_bias, a
    GIoU loss, NMS at 0.6, Detectron2's ImageNet weights with their mean, and a
    linear warm-up; here it is the zoo's. Closer to theirs, all but conv_bias,
    which does not allow to inherit the head:
    --cfg-options model.bbox_head.norm_on_bbox=True
    model.bbox_head.center_sampling=True
    model.bbox_head.loss_bbox.type=GIoULoss
    model.test_cfg.nms.iou_threshold=0.6
    The clip of 35 is in the zoo's config already. Also: where an image is
    smaller than its padded batch, the authors stretch its boxes over the
    border; here they stay in place, and the border and ignored boxes are
    neither object nor background.
"""

_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_ms-640-800-2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config=(
                'mmdet::fcos/fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco.py'
            ),
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/fcos/'
                'fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco/'
                'fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco'
                '-511424d6.pth'
            ),
            inherit=True,
        )
    ),
    terms=dict(
        fgd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.FGDLoss',
                channels=256,
                foreground_weight=1.6e-3,
                background_weight=8e-4,
                attention_weight=8e-4,
                relation_weight=8e-6,
                temperature=0.8,
            ),
        )
    ),
)

"""FGD: RetinaNet R-50 (37.4 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/fgd/fgd_retinanet_r50-from-r101_fpn_2x_coco.py

Published: 39.7 AP, 39.6 without inheriting; the paper's table, known
    second-hand and not read again.
Trained by us: no.
Read: the authors' config of this pair, from which all settings are, and their
    README (https://github.com/yzd-v/FGD); not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: where an image is smaller than its padded batch, the authors stretch its
    boxes over the border; here they stay in place, and the border and ignored
    boxes are neither object nor background.
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
                foreground_weight=1e-3,
                background_weight=5e-4,
                attention_weight=5e-4,
                relation_weight=5e-6,
                temperature=0.5,
            ),
        )
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))

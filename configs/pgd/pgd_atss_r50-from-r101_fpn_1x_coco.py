"""PGD: ATSS R-50 (39.4 AP alone) learns from R-101 (41.5 AP).

python tools/train.py configs/pgd/pgd_atss_r50-from-r101_fpn_1x_coco.py

Family: focal region.
Published: 44.2 AP, the authors' README, from a teacher with 45.5 AP and for a
    student with 39.6 AP (below), so not to be compared with 39.4.
Trained by us: no.
Read: the authors' code and configs of this pair, from which all settings are,
    and their README (https://github.com/ChenhongyiYang/PGD); of the paper the
    abstract.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors' teacher was trained on several scales for 36 epochs, the
    zoo's on one for 12. Both their heads predict an IoU, these the
    centerness; their step has 32 images (8 GPUs x 4) at 0.02. Their masks of
    an image count for all images of its GPU, here for itself alone.
"""

_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::atss/atss_r101_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/atss/'
                'atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth'
            ),
            inherit=True,
        )
    ),
    terms=dict(
        classes=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head.cls_convs.0',
            levels=(0, 1, 2, 3, 4),
            weight=dict(type='mmkd.QualityWeight', topk=9, iou_power=0.8),
            loss=dict(
                type='mmkd.PGDClassLoss',
                foreground_weight=0.08,
                background_weight=0.04,
                attention_weight=8e-4,
                temperature=0.8,
            ),
        ),
        boxes=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head.reg_convs.0',
            levels=(0, 1, 2, 3, 4),
            weight=dict(type='mmkd.QualityWeight', topk=9, iou_power=0.6),
            loss=dict(
                type='mmkd.PGDBoxLoss',
                foreground_weight=0.128,
                attention_weight=8e-4,
                temperature=0.8,
            ),
        ),
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))

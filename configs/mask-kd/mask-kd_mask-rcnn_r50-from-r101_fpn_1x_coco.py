r"""Masks: Mask R-CNN R-50 (38.2 AP alone) learns from R-101 (40.8 AP).

python tools/train.py \
    configs/mask-kd/mask-kd_mask-rcnn_r50-from-r101_fpn_1x_coco.py

Family: response, by MaskTerm.
Published: no result in this form that we know of.
Trained by us: no.
Read: nothing; the form is ours, that of soft targets (Hinton et al., NIPS
    workshop 2014) for the cells of a mask.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: AP above is of boxes; of masks it is 34.7 alone and 36.6 for the
    teacher. Weight and temperature are untuned. Terms on features and on
    proposals stand beside it.
"""

_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::mask_rcnn/mask-rcnn_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/'
                'mask_rcnn_r101_fpn_2x_coco/'
                'mask_rcnn_r101_fpn_2x_coco_bbox_mAP-0.408__segm_mAP-0.366_'
                '20200505_071027-14b391c7.pth'
            ),
        )
    ),
    terms=dict(
        mask=dict(
            type='mmkd.MaskTerm',
            teacher='r101',
            loss_weight=1.0,
            temperature=1.0,
        )
    ),
)

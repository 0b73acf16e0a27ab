"""LD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/ld/ld_gfl_r50-from-r101_fpn_1x_coco.py

Family: response.
Published: 41.0 AP, MMDetection's zoo (configs/ld), where the student alone has
    40.2; LD's own README has 41.1 and 40.1.
Trained by us: no.
Read: MMDetection's config of this pair and its LDHead, from which all settings
    are; not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the main region alone. The published weight belongs to a sum over the
    positives of two images, so average=False; with more images a GPU it pushes
    harder, and average=True with a weight of its own does not.
"""

_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
                'gfl_r101_fpn_mstrain_2x_coco/'
                'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth'
            ),
        )
    ),
    terms=dict(
        ld=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.PositiveWeight'),
            loss=dict(
                type='mmkd.LDLoss',
                temperature=10.0,
                average=False,
                loss_weight=0.25,
            ),
        ),
    ),
)

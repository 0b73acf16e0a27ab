"""BCKD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/bckd/bckd_gfl_r50-from-r101_fpn_1x_coco.py

Family: response.
Published: 43.2 AP, the authors' README; their student alone has 40.1.
Trained by us: no.
Read: the authors' config of this pair, loss and head, from which the weight
    is, and their README (https://github.com/TinyTigerPan/BCKD); not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors divide both parts by the number of positives; here the sum
    of the teacher's largest scores divides the class part, so that its weight
    does not mean quite the same.
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
        bckd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.BCKDClassLoss',
                num_classes=80,
                power=1.0,
                normalise_by='teacher',
                loss_weight=1.0,
            ),
        ),
        box=dict(
            type='mmkd.BoxTerm',
            teacher='r101',
            weight=dict(type='mmkd.DisagreementWeight', power=1.0),
            normalise_by='positives',
            loss_weight=4.0,
        ),
    ),
)

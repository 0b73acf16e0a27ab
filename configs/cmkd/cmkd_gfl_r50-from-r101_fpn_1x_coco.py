"""CMKD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/cmkd/cmkd_gfl_r50-from-r101_fpn_1x_coco.py

Family: response.
Published: none on detection.
Trained by us: no.
Read: the paper's abstract and a summary (arXiv:2410.06561); there is no code.
    Its lambda is 2; all other settings are ours.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the paper is about one label an image. Here a sample is a cell of the
    head, the thousand likeliest of an image count, and the boxes have a term
    of their own, which is ours.
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
        cmkd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.CMKDLoss',
                num_classes=80,
                rank_eps=0.1,
                topk=1000,
                difficulty='teacher_entropy',
                loss_weight=2.0,
            ),
        ),
        box=dict(
            type='mmkd.BoxTerm',
            teacher='r101',
            weight=dict(type='mmkd.ScoreWeight'),
            normalise_by='weight',
            loss_weight=1.0,
        ),
    ),
)

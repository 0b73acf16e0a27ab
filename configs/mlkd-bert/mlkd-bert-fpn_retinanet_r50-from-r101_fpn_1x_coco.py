r"""MLKD-BERT-FPN: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/mlkd-bert/mlkd-bert-fpn_retinanet_r50-from-r101_fpn_1x_coco.py

Published: none on detection; the method is one for language models.
Trained by us: no.
Read: a summary of Zhang et al., arXiv:2407.02775; no code is known.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: without attention: the maps of the pyramid stand for embeddings and
    layers, and the part on heads is left out. Backbone and neck imitate for 4
    epochs without labels, then all learns for 8. Several GPUs need
    --cfg-options find_unused_parameters=True. The parts are added as in the
    paper; lengths are ours.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

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
        )
    ),
    terms=dict(
        layers=dict(
            type='mmkd.MLKDBertLayersTerm',
            teacher='r101',
            attn=False,
            student_channels=[256] * 5,
            teacher_channels=[256] * 5,
        ),
        samples=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            loss=dict(
                type='mmkd.MLKDBertSampleLoss',
                student_channels=256,
                teacher_channels=256,
            ),
        ),
        kd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            loss=dict(
                type='mmkd.SoftTargetLoss', num_classes=80, temperature=2.0
            ),
        ),
        kd_box=dict(
            type='mmkd.BoxTerm',
            teacher='r101',
            weight=dict(type='mmkd.ScoreWeight'),
            normalise_by='weight',
        ),
    ),
    phases=[
        dict(
            length=4,
            train=('backbone', 'neck'),
            terms='layers',
            supervised=False,
        ),
        dict(length=8, terms=('samples', 'kd', 'kd_box')),
    ],
)

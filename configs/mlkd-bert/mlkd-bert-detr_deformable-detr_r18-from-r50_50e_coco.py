r"""MLKD-BERT: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/mlkd-bert/mlkd-bert-detr_deformable-detr_r18-from-r50_50e_coco.py

Published: none on detection; the method is one for language models.
Trained by us: no.
Read: a summary of Zhang et al., arXiv:2407.02775; no code is known.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: the AP alone is second-hand, by the authors of DETRDistill; the zoo has
    no R-18. All but the head imitates layers for 10 epochs without labels,
    then all learns from objects, soft targets and labels for 40. Several GPUs
    need --cfg-options find_unused_parameters=True. Lengths are ours.
"""

_base_ = '../_base_/students/deformable-detr_r18_16xb2-50e.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r50=dict(
            config='mmdet::deformable_detr/'
            'deformable-detr_r50_16xb2-50e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/'
                'deformable_detr/deformable-detr_r50_16xb2-50e_coco/'
                'deformable-detr_r50_16xb2-50e_coco_20221029_210934-'
                '6bc7d21b.pth'
            ),
        )
    ),
    terms=dict(
        layers=dict(
            type='mmkd.MLKDBertQueryLayersTerm',
            teacher='r50',
            student_channels=256,
            teacher_channels=256,
        ),
        samples=dict(
            type='mmkd.MLKDBertQuerySamplesTerm',
            teacher='r50',
            student_channels=256,
            teacher_channels=256,
        ),
    ),
    phases=[
        dict(
            length=10,
            train=('backbone', 'neck', 'encoder', 'decoder'),
            terms='layers',
            supervised=False,
        ),
        dict(length=40, terms='samples'),
    ],
)

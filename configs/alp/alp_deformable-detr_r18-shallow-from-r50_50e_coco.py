r"""ALP: shallow Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/alp/alp_deformable-detr_r18-shallow-from-r50_50e_coco.py

Family: feature.
Published: none on detection; the paper's results are for
    classifiers of text.
Trained by us: no.
Read: a reimplementation for text
    (https://github.com/ProFatXuanAll/BERT-gang); not the paper.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: the AP alone is of six layers of encoder and decoder, by the authors of
    DETRDistill; the zoo has no R-18. The student has three, each of which
    attends to all six of the teacher's. It is asked the teacher's queries in a
    pass of their own, and what it answers is compared beside it. Both weights
    are untuned.
"""

_base_ = '../_base_/students/deformable-detr_r18_16xb2-50e_shallow.py'

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
        alp=dict(
            type='mmkd.ALPQueryTerm',
            teacher='r50',
            parts=('decoder', 'encoder'),
            loss_weight=5.0,
        ),
        scores=dict(type='mmkd.SharedQueryTerm', teacher='r50', general=0),
    ),
)

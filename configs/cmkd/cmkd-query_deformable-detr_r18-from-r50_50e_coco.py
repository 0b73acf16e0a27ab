r"""CMKD: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/cmkd/cmkd-query_deformable-detr_r18-from-r50_50e_coco.py

Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: the abstract of arXiv:2410.06561 and a summary; there is no code. What
    is said of queries is ours.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: queries are matched by their answers, on the CPU; a pair counts as much
    as the teacher's score. Boxes are compared by asking both decoders the
    teacher's queries, which runs the student's once more; a tenth of the
    divergence of classes stands beside them, as correlations say nothing of
    how sure to be.
    R-18's 40.0 AP are of the README of DETRDistill's authors; the zoo has no
    Deformable DETR on R-18.
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
        cmkd=dict(
            type='mmkd.QueryFeatureTerm',
            teacher='r50',
            compare='logits',
            pairing='answers',
            loss=dict(type='mmkd.CMKDLoss', loss_weight=2.0),
        ),
        boxes=dict(
            type='mmkd.SharedQueryTerm',
            teacher='r50',
            general=0,
            cls_weight=0.1,
        ),
    ),
)

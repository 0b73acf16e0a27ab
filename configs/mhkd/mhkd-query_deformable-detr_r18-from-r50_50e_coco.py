r"""MHKD: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/mhkd/mhkd-query_deformable-detr_r18-from-r50_50e_coco.py

Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: a description of arXiv:2012.02911 and the settings of a
    re-implementation; neither text nor code. What is said of queries is ours.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: the layers of both decoders are the heads, and learn from labels in the
    detector's own loss; beta 0.5, tau 4 and alpha 0.1 are those of the
    re-implementation, for classifiers.
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
        heads=dict(
            type='mmkd.MultiHeadQueryTerm',
            teacher='r50',
            head_weight=0.5,
            mix=0.1,
            temperature=4.0,
        ),
    ),
)

r"""CrossKD: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/crosskd/crosskd-query_deformable-detr_r18-from-r50_50e_coco.py

Published: none for detectors of queries; see the other cards.
Trained by us: no.
Read: a summary of the paper's formulas and settings (arXiv:2306.11369);
    neither text nor code. What is said of queries is ours.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: the teacher's head is run once more, on the student's queries, which are
    matched with its own on the CPU. The weights are DETR's, untuned.
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
        crosskd=dict(
            type='mmkd.CrossQueryTerm',
            teacher='r50',
            class_weight=1.0,
            l1_weight=5.0,
            giou_weight=2.0,
        ),
    ),
)

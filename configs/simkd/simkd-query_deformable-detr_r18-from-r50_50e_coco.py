r"""SimKD: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/simkd/simkd-query_deformable-detr_r18-from-r50_50e_coco.py

Published: none on detection; on CIFAR-100 ResNet-8x4 learns from 32x4 to 78.08
    %, alone 73.09, the teacher 79.42, known second-hand.
Trained by us: no.
Read: descriptions of the paper and its code: Chen et al., "Knowledge
    Distillation with the Reused Teacher Classifier", CVPR 2022,
    arXiv:2203.14001. Decoders are ours.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: queries, decoder and head are the teacher's, their weights never move,
    and no label is read; the student's encoder learns to feed them and is the
    projector. Nothing is added to what is deployed. Several GPUs need
    --cfg-options find_unused_parameters=True.
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
            inherit=(
                'decoder',
                'query_embedding',
                'reference_points_fc',
                'bbox_head',
            ),
        )
    ),
    terms=dict(
        simkd=dict(
            type='mmkd.SimKDTerm',
            teacher='r50',
            reuse=(
                'decoder',
                'query_embedding',
                'reference_points_fc',
                'bbox_head',
            ),
            tap='encoder',
        ),
    ),
    phases=[
        dict(
            train=('backbone', 'neck', 'encoder', 'level_embed'),
            supervised=False,
        )
    ],
)

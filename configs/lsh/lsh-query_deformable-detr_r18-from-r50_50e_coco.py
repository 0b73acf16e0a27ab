r"""LSH: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/lsh/lsh-query_deformable-detr_r18-from-r50_50e_coco.py

Published: none for detectors of queries; see the other cards.
Trained by us: no.
Read: what the authors' code does (https://github.com/DoctorKey/LSHFM.detection)
    in a summary of it; not the paper. Queries are ours.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: the weight is that of dense and two-stage detectors, untuned.
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
        lsh=dict(
            type='mmkd.QueryFeatureTerm',
            teacher='r50',
            loss=dict(
                type='mmkd.LSHLoss',
                channels=256,
                mode='lshl2',
                hash_num=1024,
                bias='zero',
                unfold=1,
                loss_weight=7.0,
            ),
        ),
    ),
)

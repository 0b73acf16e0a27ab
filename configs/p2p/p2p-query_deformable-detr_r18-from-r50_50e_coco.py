r"""P2P: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/p2p/p2p-query_deformable-detr_r18-from-r50_50e_coco.py

Published: none of this pair; the paper has polyps and tissue.
Trained by us: no.
Read: a description of the paper, not the paper. Queries are ours.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: an R-18 and an R-50 are trained at once, and each decoder is asked what
    the other and the teacher are asked. The teacher, which learns along in the
    paper, has learned before. All weights are ours and untuned.
    tools/export_peer.py writes the better student as a plain checkpoint.
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
        p2p=dict(
            type='mmkd.PeersTerm',
            peers=dict(
                r50=dict(
                    config='mmdet::deformable_detr/'
                    'deformable-detr_r50_16xb2-50e_coco.py'
                ),
            ),
            teacher='r50',
            pairing='questions',
            alpha=1.0,
            beta=1.0,
            temperature=3.0,
        )
    ),
)

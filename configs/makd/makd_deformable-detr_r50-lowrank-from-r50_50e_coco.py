r"""MaKD: Deformable DETR R50 (44.3 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/makd/makd_deformable-detr_r50-lowrank-from-r50_50e_coco.py

Family: feature, by MultiAspectTerm.
Published: none on detection; the paper is on language models.
Trained by us: no.
Read: a description of Liu et al., "Multi-Aspect Knowledge Distillation for
    Language Model with Low-rank Factorization", arXiv:2604.03110.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.whole.checkpoint=FILE
Notes: the AP alone is of the whole network, which the student is made of: each
    matrix of its encoder and decoder that projects keeps half of the weights.
    Query i is query i of the teacher. What it answers joins after a tenth of
    the training. Ratio and weights are untuned.
"""

_base_ = '../_base_/students/deformable-detr_r50_16xb2-50e_lowrank.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        whole=dict(
            config='mmdet::deformable_detr/'
            'deformable-detr_r50_16xb2-50e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/'
                'deformable_detr/deformable-detr_r50_16xb2-50e_coco/'
                'deformable-detr_r50_16xb2-50e_coco_20221029_210934-'
                '6bc7d21b.pth'
            ),
            inherit=(
                *('backbone', 'neck', 'encoder', 'decoder', 'bbox_head'),
                *('query_embedding', 'reference_points_fc', 'level_embed'),
            ),
        )
    ),
    terms=dict(
        aspects=dict(
            type='mmkd.MultiAspectTerm',
            teacher='whole',
            parts=('encoder', 'decoder'),
        ),
        scores=dict(
            type='mmkd.SharedQueryTerm',
            teacher='whole',
            general=0,
            schedule=dict(type='mmkd.Between', begin=0.1),
        ),
    ),
)

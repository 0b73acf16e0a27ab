r"""HPM-KD: GFL R-50 (40.2 AP alone) learns from two (44.7, 45.9 AP).

python tools/train.py \
    configs/hpm-kd/hpm-kd_gfl_r50-from-r101-and-x101_fpn_1x_coco.py

Family: group, by TeacherAttentionTerm.
Published: none on detection.
Trained by us: no.
Read: a description of the paper and of the authors' code (DeepBridge). From
    there are the attention's width, the bounds of the temperature and its
    policies.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your files:
    --cfg-options model.teachers.r101.checkpoint=FILE
    model.teachers.x101.checkpoint=FILE
Notes: class logits and logits of edge distributions of both teachers are
    fused image by image. The weights of the parts and of the entropy are ours
    and untuned. The chain of students is a command of its own,
    tools/chain.py.
"""

_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
                'gfl_r101_fpn_mstrain_2x_coco/'
                'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth'
            ),
        ),
        x101=dict(
            config='mmdet::gfl/gfl_x101-32x4d_fpn_ms-2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
                'gfl_x101_32x4d_fpn_mstrain_2x_coco/'
                'gfl_x101_32x4d_fpn_mstrain_2x_coco_20200630_102002-50c1ffdb.pth'
            ),
        ),
    ),
    terms=dict(
        fused=dict(
            type='mmkd.TeacherAttentionTerm',
            teachers=('r101', 'x101'),
            channels=256,
            attn=dict(hidden=128, entropy_weight=0.1),
            temperature=dict(policy='cosine', tmin=2.0, tmax=6.0),
            losses=dict(
                scores=dict(
                    output=0,
                    loss=dict(type='mmkd.SoftTargetLoss', loss_weight=1.0),
                ),
                edges=dict(
                    output=1,
                    loss=dict(type='mmkd.LDLoss', loss_weight=0.25),
                ),
            ),
        ),
    ),
)

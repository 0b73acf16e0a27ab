r"""MaKD: Mask R-CNN Swin-T (42.7 AP alone) learns from Swin-T (42.7 AP).

python tools/train.py \
    configs/makd/makd_mask-rcnn_swin-t-lowrank-from-swin-t_fpn_1x_coco.py

Published: none on detection; the paper is on language models.
Trained by us: no.
Read: a description of Liu et al., "Multi-Aspect Knowledge Distillation for
    Language Model with Low-rank Factorization", arXiv:2604.03110.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.0001;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.whole.checkpoint=FILE
Notes: the AP alone is of the whole network, which the student is made of: each
    matrix of its backbone keeps half of the weights. It starts from the
    teacher's singular vectors, and the class scores join after a tenth of the
    training. Ratio and weights are untuned.
"""

_base_ = '../_base_/students/mask-rcnn_swin-t_fpn_1x_lowrank.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        whole=dict(
            config='mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/swin/'
                'mask_rcnn_swin-t-p4-w7_fpn_1x_coco/'
                'mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-'
                '9d6b7cfa.pth'
            ),
            inherit=('backbone', 'neck', 'rpn_head', 'roi_head'),
        )
    ),
    terms=dict(
        aspects=dict(type='mmkd.MultiAspectTerm', teacher='whole'),
        scores=dict(
            type='mmkd.ProposalTerm',
            teacher='whole',
            schedule=dict(type='mmkd.Between', begin=0.1),
        ),
    ),
)

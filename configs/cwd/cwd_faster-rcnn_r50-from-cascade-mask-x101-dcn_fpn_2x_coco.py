r"""CWD: Faster R-50 (38.4 AP alone) learns from Cascade X-101-DCN (47.3 AP).

python tools/train.py \
    configs/cwd/cwd_faster-rcnn_r50-from-cascade-mask-x101-dcn_fpn_2x_coco.py

Family: feature.
Published: 41.7 AP in a table of the MGD paper, known second-hand; its settings
    are unknown to us.
Trained by us: no.
Read: MMRazor's FPN config for Faster R-CNN with an R-101 teacher, 1x
    (https://github.com/open-mmlab/mmrazor), from which temperature, weight and
    levels are; not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.cascade.checkpoint=FILE
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        cascade=dict(
            config=(
                'mmdet::dcn/'
                'cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py'
            ),
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/dcn/'
                'cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco/'
                'cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco'
                '-e75f90c8.pth'
            ),
        )
    ),
    terms=dict(
        cwd=dict(
            type='mmkd.FeatureTerm',
            teacher='cascade',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(type='mmkd.CWDLoss', temperature=1.0, loss_weight=10.0),
        )
    ),
)

r"""FGD: Faster R-50 (38.4 AP alone) learns from Cascade X-101-DCN (47.3 AP).

python tools/train.py \
    configs/fgd/fgd_faster-rcnn_r50-from-cascade-mask-x101-dcn_fpn_2x_coco.py

Family: focal region.
Published: 42.0 AP, the authors' README.
Trained by us: no.
Read: the authors' config of this pair, from which all settings are, and their
    README (https://github.com/yzd-v/FGD); not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.cascade.checkpoint=FILE
Notes: nothing is inherited, as in the authors' config: the heads differ. Where
    an image is smaller than its padded batch, the authors stretch its boxes
    over the border; here they stay in place, and the border and ignored boxes
    are neither object nor background.
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
        fgd=dict(
            type='mmkd.FeatureTerm',
            teacher='cascade',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(
                type='mmkd.FGDLoss',
                channels=256,
                foreground_weight=5e-5,
                background_weight=2.5e-5,
                attention_weight=5e-5,
                relation_weight=5e-7,
                temperature=0.5,
            ),
        )
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))

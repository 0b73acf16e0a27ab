r"""FGD: RepPoints R-50 (38.6 AP alone) learns from X-101-DCN (44.2 AP).

python tools/train.py \
    configs/fgd/fgd_reppoints_r50-from-x101-dcn_fpn_2x_coco.py

Published: 42.0 AP, the authors' README.
Trained by us: no.
Read: the authors' config of this pair, from which all settings are, and their
    README (https://github.com/yzd-v/FGD); not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.x101.checkpoint=FILE
Notes: where an image is smaller than its padded batch, the authors stretch its
    boxes over the border; here they stay in place, and the border and ignored
    boxes are neither object nor background.
"""

_base_ = 'mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        x101=dict(
            config=(
                'mmdet::reppoints/'
                'reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py'
            ),
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/reppoints/'
                'reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco/'
                'reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco'
                '_20200329-f87da1ea.pth'
            ),
            inherit=True,
        )
    ),
    terms=dict(
        fgd=dict(
            type='mmkd.FeatureTerm',
            teacher='x101',
            # The convolutions, before their GN, as in the authors' config.
            tap=[f'neck.fpn_convs.{level}.conv' for level in range(5)],
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.FGDLoss',
                channels=256,
                foreground_weight=1.6e-3,
                background_weight=8e-4,
                attention_weight=8e-4,
                relation_weight=8e-6,
                temperature=0.5,
            ),
        )
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))

"""CWD: RTMDet s (44.5 AP alone) learns from RTMDet m (49.1 AP).

python tools/train.py configs/cwd/cwd_rtmdet_s-from-m_pafpn_300e_coco.py

Published: 45.7 AP, MMYOLO's README, where the student alone has 44.6 AP and
    the teacher 49.3 AP.
Trained by us: no.
Read: MMYOLO's README and config in configs/rtmdet/distillation
    (https://github.com/open-mmlab/mmyolo).
Schedule: 300 epochs of 256 images a step (8 GPUs x 32) at learning rate 0.004;
    with another number of images add --auto-scale-lr.
Changed besides model: auto_scale_lr.base_batch_size.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.m.checkpoint=FILE
Notes: maps are compared before the neck's last normalisation, each side
    normalised over the images of a GPU; the adapter's bias cancels out. The
    term stops where strong augmentation does, after 280 epochs. MMDetection's
    config says 16 images a step for --auto-scale-lr, and trains with 256.
"""

_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'

auto_scale_lr = dict(base_batch_size=256)

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        m=dict(
            config='mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/'
                'rtmdet_m_8xb32-300e_coco/'
                'rtmdet_m_8xb32-300e_coco_20220719_112220-229f527c.pth'
            ),
        )
    ),
    terms=dict(
        cwd=dict(
            type='mmkd.FeatureTerm',
            teacher='m',
            tap=(
                'neck.out_convs.0.conv',
                'neck.out_convs.1.conv',
                'neck.out_convs.2.conv',
            ),
            levels=(0, 1, 2),
            align=dict(
                type='mmkd.ConvAdapt', in_channels=128, out_channels=192
            ),
            loss=dict(
                type='mmkd.CWDLoss',
                temperature=1.0,
                normalise=True,
                loss_weight=1.0,
            ),
            schedule=dict(type='mmkd.StopAfter', fraction=280 / 300),
        )
    ),
)

"""CWD: RTMDet tiny (40.9 AP alone) learns from RTMDet s (44.5 AP).

python tools/train.py configs/cwd/cwd_rtmdet_tiny-from-s_pafpn_300e_coco.py

Published: 41.8 AP, MMYOLO's README, where the student alone has 41.0 AP and
    the teacher 44.6 AP.
Trained by us: no.
Read: MMYOLO's README and config in configs/rtmdet/distillation
    (https://github.com/open-mmlab/mmyolo).
Schedule: 300 epochs of 256 images a step (8 GPUs x 32) at learning rate 0.004;
    with another number of images add --auto-scale-lr.
Changed besides model: auto_scale_lr.base_batch_size.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.s.checkpoint=FILE
Notes: maps are compared before the neck's last normalisation, each side
    normalised over the images of a GPU; the adapter's bias cancels out. The
    term stops where strong augmentation does, after 280 epochs. MMDetection's
    config says 16 images a step for --auto-scale-lr, and trains with 256.
"""

_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'

auto_scale_lr = dict(base_batch_size=256)

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        s=dict(
            config='mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/'
                'rtmdet_s_8xb32-300e_coco/'
                'rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth'
            ),
        )
    ),
    terms=dict(
        cwd=dict(
            type='mmkd.FeatureTerm',
            teacher='s',
            tap=(
                'neck.out_convs.0.conv',
                'neck.out_convs.1.conv',
                'neck.out_convs.2.conv',
            ),
            levels=(0, 1, 2),
            align=dict(
                type='mmkd.ConvAdapt', in_channels=96, out_channels=128
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

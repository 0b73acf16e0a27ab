r"""FreeKD: RetinaNet R-50 (37.4 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/freekd/freekd_retinanet_r50-from-r101_fpn_2x_coco.py

Family: feature.
Published: 39.9 AP, the authors' README.
Trained by us: no.
Read: the authors' config and code (https://github.com/Gumpest/FreeKD), whose
    weights, prompts, learning rate and clipping these are; not the paper.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad, optim_wrapper.optimizer.lr,
    optim_wrapper.paramwise_cfg.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the prompts learn in the first 2000 of 176000 steps, while the student
    learns and by its optimiser; the authors load prompts that were trained
    before. Afterwards they must not decay. The two terms on features have an
    adapter each, the authors' losses share one. The offsets of the boxes are
    compared over all anchors, as in the authors' config. The weights of
    channels that the paper describes are not in their code: for ours add
    model.terms.freekd.loss.position=teacher to --cfg-options.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
                'retinanet_r101_fpn_2x_coco/'
                'retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'
            ),
        )
    ),
    terms=dict(
        freekd=dict(
            type='mmkd.LearnedMaskTerm',
            teacher='r101',
            levels=(0, 1, 2, 3, 4),
            align=dict(
                type='mmkd.ConvAdapt', in_channels=256, out_channels=256
            ),
            loss=dict(
                type='mmkd.FreeKDLoss',
                channels=256,
                prompts=6,
                scales=3,
                loss_weight=1.0,
            ),
            learn_until=2000 / 176000,
        ),
        mimic=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            align=dict(
                type='mmkd.ConvAdapt', in_channels=256, out_channels=256
            ),
            loss=dict(type='mmkd.MimicLoss', loss_weight=5.0),
        ),
        boxes=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=1,
            loss=dict(
                type='mmkd.MimicLoss', distance='smooth', loss_weight=1.0
            ),
        ),
    ),
)

optim_wrapper = dict(
    clip_grad=dict(max_norm=35, norm_type=2),
    optimizer=dict(lr=0.02),
    paramwise_cfg=dict(
        custom_keys={'terms.freekd.losses': dict(decay_mult=0)}
    ),
)

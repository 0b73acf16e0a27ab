"""UniKD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/unikd/unikd_gfl_r50-from-r101_fpn_1x_coco.py

Family: feature, by UnifiedTerm.
Published: the paper reports COCO results, which were not retrieved; none of
    this pair is known to us.
Trained by us: no.
Read: a summary of Huang et al., "Harmonizing Knowledge Transfer in Neural
    Network with Unified Distillation", ECCV 2024, arXiv:2409.18565; neither
    the paper nor code.
Schedule: 14 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: train_cfg.max_epochs, param_scheduler.1.end,
    param_scheduler.1.milestones.0, param_scheduler.1.milestones.1,
    param_scheduler.2.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: for 2 epochs the teacher's side of the term learns, and nothing else;
    then the student has its 12, with a warm-up of its own. A side that is
    there already is taken with teacher_side_checkpoint, and phases left out.
    Several GPUs need --cfg-options find_unused_parameters=True. All three
    terms are divergences; their weights are ours, untuned.
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
        )
    ),
    terms=dict(
        features=dict(
            type='mmkd.UnifiedTerm',
            teacher='r101',
            channels=(256, 256, 256, 256),
            levels=(0, 1, 2, 3),
            fuse_dim=256,
            dist_dim=64,
            loss_weight=1.0,
        ),
        classes=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.SoftTargetLoss', num_classes=80),
        ),
        edges=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.ScoreWeight'),
            loss=dict(type='mmkd.LDLoss', temperature=1.0),
        ),
    ),
    phases=[
        dict(
            length=2,
            train=(),
            terms='features',
            freeze='terms.features.student_side',
            supervised=False,
        ),
        dict(length=12, freeze='terms.features.teacher_side'),
    ],
)
train_cfg = dict(max_epochs=14)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=14, milestones=[10, 13]),
    dict(
        type='LinearLR',
        start_factor=0.001,
        by_epoch=True,
        begin=2,
        end=3,
        convert_to_iter_based=True,
    ),
]

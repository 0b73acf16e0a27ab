r"""MHKD: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py \
    configs/mhkd/mhkd_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Family: response, by MultiHeadTerm.
Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: as mhkd_retinanet_r18-from-r101_fpn_1x_coco.py.
Schedule: 14 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: train_cfg.max_epochs, param_scheduler.1.end,
    param_scheduler.1.milestones.0, param_scheduler.1.milestones.1,
    param_scheduler.2.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the auxiliary heads are dense ones on three levels of the pyramid. The
    last heads are compared in both stages: proposals by the term itself, and
    the student's proposals as both second stages judge them by one of their
    own. Phases as for RetinaNet; several GPUs need --cfg-options
    find_unused_parameters=True. The weights are ours, untuned.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
                'faster_rcnn_r101_fpn_2x_coco/'
                'faster_rcnn_r101_fpn_2x_coco_'
                'bbox_mAP-0.398_20200504_210455-1d2dac9c.pth'
            ),
        )
    ),
    terms=dict(
        heads=dict(
            type='mmkd.MultiHeadTerm',
            teacher='r101',
            num_classes=80,
            tap='neck',
            levels=(1, 2, 3),
            strides=(8, 16, 32),
            channels=256,
            head_channels=256,
            final='rpn_head',
            head_weight=0.5,
            mix=0.1,
            temperature=4.0,
        ),
        boxes=dict(
            type='mmkd.ProposalTerm',
            teacher='r101',
            cls_loss=dict(
                type='mmkd.SoftTargetLoss',
                activation='softmax',
                temperature=4.0,
                weight_by='uniform',
                loss_weight=0.1,
            ),
        ),
    ),
    phases=[
        dict(
            length=2,
            train=(),
            terms='heads',
            freeze='terms.heads.student_heads',
            supervised=False,
        ),
        dict(length=12, freeze='terms.heads.teacher_heads'),
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

r"""SemCKD: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/semckd/semckd_retinanet_r50-from-r101_fpn_1x_coco.py

Family: feature.
Published: none on detection; the paper's results are for
    classifiers.
Trained by us: no.
Read: the authors' code for CIFAR-100
    (https://github.com/DefangChen/SemCKD); not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: three stages of the student, C3 to C5, each attend to all four of the
    teacher. The projectors are narrower than the paper's, which would have
    660 million numbers here. The scores are compared beside it, as in the
    paper. Both weights are untuned.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

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
        semckd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='backbone',
            levels=(1, 2, 3),
            teacher_levels=(0, 1, 2, 3),
            loss=dict(
                type='mmkd.SemCKDLoss',
                student_channels=(512, 1024, 2048),
                teacher_channels=(256, 512, 1024, 2048),
                relation='grid',
                grid=4,
                soft=1.0,
                mid_channels=256,
                loss_weight=5.0,
            ),
        ),
        soft_target=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.SoftTargetLoss',
                num_classes=80,  # each of the nine anchors of a cell
                loss_weight=1.0,
            ),
        ),
    ),
)

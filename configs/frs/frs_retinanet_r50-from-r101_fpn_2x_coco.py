"""FRS: RetinaNet R-50 (37.4 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/frs/frs_retinanet_r50-from-r101_fpn_2x_coco.py

Family: focal region, by ScoreWeight.
Published: 39.7 AP, the abstract and the authors' README.
Trained by us: no.
Read: a summary of the authors' losses and weights; not the paper. There
    features count 0.005, summed over 256 channels, and classes 0.02.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: both terms rise over the first 500 of 176000 steps. Features are
    averaged level by level, classes over all levels; each anchor weighs by
    its own score, the authors' cells by the largest of theirs.
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
        feature=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            align=dict(
                type='mmkd.ConvAdapt',
                in_channels=256,
                out_channels=256,
                kernel_size=3,
            ),
            weight=dict(type='mmkd.ScoreWeight'),
            loss=dict(type='mmkd.WeightedMSELoss', loss_weight=1.28),
            schedule=dict(type='mmkd.LinearWarmup', start=0.002, end=0.003),
        ),
        scores=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.SoftTargetLoss', num_classes=80, loss_weight=0.02
            ),
            schedule=dict(type='mmkd.LinearWarmup', start=0.002, end=0.003),
        ),
    ),
)

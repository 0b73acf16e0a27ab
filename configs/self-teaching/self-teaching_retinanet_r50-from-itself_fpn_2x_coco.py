r"""Self: RetinaNet R-50 (37.4 AP alone) learns from its own average.

python tools/train.py \
    configs/self-teaching/self-teaching_retinanet_r50-from-itself_fpn_2x_coco.py

Family: group, by SelfTerm.
Published: no result for this student that we know of.
Trained by us: no.
Read: the abstract of arXiv:1703.01780, which is about classification; all
    settings are ours.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: none, the student's own are averaged.
Notes: begins after a quarter of the training with the student as it is then.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        own=dict(
            type='mmkd.SelfTerm',
            average=dict(type='ExponentialMovingAverage', momentum=0.001),
            terms=dict(
                cls=dict(
                    type='mmkd.FeatureTerm',
                    teacher='self',
                    tap='bbox_head',
                    output=0,
                    levels=(0, 1, 2, 3, 4),
                    loss=dict(type='mmkd.BCKDClassLoss', num_classes=80),
                ),
                box=dict(type='mmkd.BoxTerm', teacher='self', loss_weight=4.0),
            ),
            schedule=dict(type='mmkd.Between', begin=0.25),
        ),
    ),
)

"""SemCKD: a tiny RetinaNet chooses among the stages of one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        semckd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='backbone',
            levels=(1, 2),
            teacher_levels=(0, 1, 2),
            loss=dict(
                type='mmkd.SemCKDLoss',
                student_channels=(32, 64),
                teacher_channels=(32, 64, 128),
                grid=3,
                loss_weight=5.0,
            ),
        ),
        soft_target=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.SoftTargetLoss', num_classes=6),
        ),
    ),
)

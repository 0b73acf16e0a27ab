"""ALP: a tiny RetinaNet attends to all levels of one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        alp=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='neck',
            levels=(0, 1),
            teacher_levels=(0, 1, 2),
            loss=dict(type='mmkd.ALPLoss', loss_weight=5.0),
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

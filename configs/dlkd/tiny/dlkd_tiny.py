"""DLKD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        dlkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(
                type='mmkd.DLKDLoss',
                loss_weight=0.05,
                student_channels=32,
                teacher_channels=32,
                canonical_size=32,  # objects of 96 pixels
            ),
        ),
    ),
)

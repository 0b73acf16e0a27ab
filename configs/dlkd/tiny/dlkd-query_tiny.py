"""DLKD: a tiny Deformable DETR relates its queries as the teacher does."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        dlkd=dict(
            type='mmkd.QueryFeatureTerm',
            teacher='big',
            loss=dict(
                type='mmkd.DLKDLoss',
                loss_weight=0.05,
                student_channels=32,
                teacher_channels=32,
            ),
        ),
    ),
)

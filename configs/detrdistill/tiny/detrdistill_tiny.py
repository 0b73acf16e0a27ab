"""DETRDistill: a tiny Deformable DETR learns from one twice as wide."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        detrdistill=dict(
            type='mmkd.DETRDistillTerm', teacher='big', channels=(32, 32)
        )
    ),
)

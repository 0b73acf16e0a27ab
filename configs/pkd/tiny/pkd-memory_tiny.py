"""PKD on the encoder's memory: a tiny Deformable DETR learns from another."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        pkd=dict(
            type='mmkd.MemoryTerm',
            teacher='big',
            loss=dict(type='mmkd.PKDLoss', loss_weight=10.0),
        ),
    ),
)

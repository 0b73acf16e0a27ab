"""CLoCKDistill, memory: a tiny Deformable DETR learns where objects are."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        memory=dict(
            type='mmkd.MemoryTerm',
            teacher='big',
            loss=dict(type='mmkd.CLoCKMemoryLoss'),
        ),
    ),
)

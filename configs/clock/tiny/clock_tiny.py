"""CLoCKDistill: a tiny Deformable DETR learns what is asked about objects."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        clock=dict(type='mmkd.CLoCKTerm', teacher='big'),
    ),
)

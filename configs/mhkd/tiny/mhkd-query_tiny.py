"""MHKD: a tiny Deformable DETR, its layers beside those of its teacher."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        heads=dict(type='mmkd.MultiHeadQueryTerm', teacher='big'),
    ),
)

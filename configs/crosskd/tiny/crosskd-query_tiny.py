"""CrossKD: a tiny Deformable DETR, its queries read by the teacher's head."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        crosskd=dict(type='mmkd.CrossQueryTerm', teacher='big'),
    ),
)

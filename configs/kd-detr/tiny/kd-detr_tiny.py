"""KD-DETR: a tiny Deformable DETR is asked what its teacher is asked."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        kd_detr=dict(type='mmkd.SharedQueryTerm', teacher='big', general=20),
    ),
)

"""GO-LSD: a tiny Deformable DETR learns from its last layer."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(golsd=dict(type='mmkd.LayerSelfTeachingTerm')),
)

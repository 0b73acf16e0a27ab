"""D³ETR: a tiny DAB-DETR learns from one deeper and twice as wide."""

_base_ = '../../_base_/tiny/dab_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(d3etr=dict(type='mmkd.D3ETRTerm', teacher='big')),
)

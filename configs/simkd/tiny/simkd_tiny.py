"""SimKD: a tiny RetinaNet learns to feed the head of one twice as wide."""

_base_ = '../../_base_/tiny/retinanet_projected.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=dict(_base_.teacher, inherit='bbox_head')),
    terms=dict(simkd=dict(type='mmkd.SimKDTerm', teacher='big')),
    phases=[dict(train=('backbone', 'neck'), supervised=False)],
)

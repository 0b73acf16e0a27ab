"""GID: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        gid=dict(type='mmkd.InstanceTerm', teacher='big', feature_weight=0.01),
    ),
)

"""BackwardPass: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        widened=dict(
            type='mmkd.BackwardPassTerm',
            teacher='big',
            step_size=1.0,
            interval=2,
        ),
    ),
)

"""BackwardPass: a tiny Deformable DETR on images where its answers are off."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        widened=dict(
            type='mmkd.BackwardQueryTerm',
            teacher='big',
            num_steps=1,
            interval=4,
        ),
    ),
)

"""ONE: a tiny GFL learns from itself and two lighter heads."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        one=dict(
            type='mmkd.OneTerm',
            head=dict(_base_.model.bbox_head, stacked_convs=1),
            channels=32,
            num_levels=3,
        ),
    ),
)

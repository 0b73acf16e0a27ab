"""LSH: a tiny Deformable DETR mimics the queries of its teacher's objects."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        lsh=dict(
            type='mmkd.QueryFeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.LSHLoss', channels=32, unfold=1),
        ),
    ),
)

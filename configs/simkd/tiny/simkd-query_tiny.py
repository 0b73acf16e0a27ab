"""SimKD: a tiny Deformable DETR learns to feed its teacher's decoder."""

_base_ = '../../_base_/tiny/deformable_detr_reusing.py'

parts = ('decoder', 'query_embedding', 'reference_points_fc', 'bbox_head')

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=dict(_base_.teacher, inherit=parts)),
    terms=dict(
        simkd=dict(
            type='mmkd.SimKDTerm', teacher='big', reuse=parts, tap='encoder'
        )
    ),
    phases=[dict(train=('backbone', 'neck', 'encoder'), supervised=False)],
)

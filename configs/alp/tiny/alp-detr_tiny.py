"""ALP-DETR: a tiny Deformable DETR attends to all layers of a deeper one."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        alp=dict(
            type='mmkd.ALPQueryTerm',
            teacher='big',
            parts=('decoder', 'encoder'),
            loss_weight=5.0,
        ),
        scores=dict(type='mmkd.SharedQueryTerm', teacher='big', general=0),
    ),
)

"""CMKD: a tiny Deformable DETR correlates with its teacher by query."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        cmkd=dict(
            type='mmkd.QueryFeatureTerm',
            teacher='big',
            compare='logits',
            pairing='answers',
            loss=dict(type='mmkd.CMKDLoss'),
        ),
    ),
)

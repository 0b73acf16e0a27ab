"""CMKD of proposals: a tiny Faster R-CNN learns from one twice as wide."""

_base_ = '../../_base_/tiny/faster_rcnn.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        cmkd=dict(
            type='mmkd.ProposalTerm',
            teacher='big',
            decoupled=False,
            cls_loss=dict(type='mmkd.CMKDLoss', activation='softmax'),
        ),
    ),
)

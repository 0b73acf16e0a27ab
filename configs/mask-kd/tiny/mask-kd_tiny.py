"""Masks: a tiny Mask R-CNN learns from one twice as wide."""

_base_ = '../../_base_/tiny/mask_rcnn.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        mask=dict(type='mmkd.MaskTerm', teacher='big'),
    ),
)

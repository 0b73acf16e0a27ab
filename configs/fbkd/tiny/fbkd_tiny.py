"""FBKD: a tiny Faster R-CNN learns from one twice as wide."""

_base_ = '../../_base_/tiny/faster_rcnn.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        fbkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2, 3),
            loss=dict(type='mmkd.FBKDLoss', channels=32),
        ),
    ),
)

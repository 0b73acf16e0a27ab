"""LSH: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        lsh=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head.cls_convs.1',
            levels=(0, 1, 2),
            weight=dict(type='mmkd.DecidedWeight'),
            loss=dict(type='mmkd.LSHLoss', channels=32),
        ),
    ),
)

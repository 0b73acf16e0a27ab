"""PGD: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        classes=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head.cls_convs.0',
            levels=(0, 1, 2),
            weight=dict(type='mmkd.QualityWeight', iou_power=0.8),
            loss=dict(type='mmkd.PGDClassLoss'),
        ),
        boxes=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head.reg_convs.0',
            levels=(0, 1, 2),
            weight=dict(type='mmkd.QualityWeight', iou_power=0.6),
            loss=dict(type='mmkd.PGDBoxLoss'),
        ),
    ),
)

"""RPN: a tiny Faster R-CNN learns from one twice as wide."""

_base_ = '../../_base_/tiny/faster_rcnn.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        rpn=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='rpn_head',
            output=0,
            loss=dict(
                type='mmkd.SoftTargetLoss', num_classes=1, activation='sigmoid'
            ),
        ),
    ),
)

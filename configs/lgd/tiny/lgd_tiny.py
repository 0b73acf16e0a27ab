"""LGD: a tiny RetinaNet learns from its labels."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        lgd=dict(
            type='mmkd.LabelGuidedTerm', num_classes=6, channels=32, heads=4
        ),
    ),
)

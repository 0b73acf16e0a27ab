"""ICD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        icd=dict(
            type='mmkd.InstanceConditionalTerm',
            teacher='big',
            num_classes=6,
            channels=32,
            dim=32,
            heads=4,
            warmup=20,
            loss_weight=1.0,
        ),
    ),
)

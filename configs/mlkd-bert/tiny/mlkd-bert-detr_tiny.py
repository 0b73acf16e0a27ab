"""MLKD-BERT-DETR: a tiny Deformable DETR learns from a deeper one."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        layers=dict(
            type='mmkd.MLKDBertQueryLayersTerm',
            teacher='big',
            student_channels=32,
            teacher_channels=32,
        ),
        samples=dict(
            type='mmkd.MLKDBertQuerySamplesTerm',
            teacher='big',
            student_channels=32,
            teacher_channels=32,
        ),
    ),
    phases=[
        dict(
            length=80,
            train=('backbone', 'neck', 'encoder', 'decoder'),
            terms='layers',
            supervised=False,
        ),
        dict(length=80, terms='samples'),
    ],
)

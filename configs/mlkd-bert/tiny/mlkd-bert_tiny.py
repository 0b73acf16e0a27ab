"""MLKD-BERT: a tiny RetinaNet on Swin learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet_slim_swin.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        layers=dict(
            type='mmkd.MLKDBertLayersTerm',
            teacher='big',
            student_channels=(8, 16, 32, 64),
            teacher_channels=(16, 32, 64, 128),
        ),
        samples=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(
                type='mmkd.MLKDBertSampleLoss',
                student_channels=32,
                teacher_channels=32,
                canonical_size=32,  # objects of 96 pixels
            ),
        ),
        kd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(
                type='mmkd.SoftTargetLoss', num_classes=6, temperature=2.0
            ),
        ),
        kd_box=dict(
            type='mmkd.BoxTerm',
            teacher='big',
            weight=dict(type='mmkd.ScoreWeight'),
            normalise_by='weight',
        ),
    ),
    phases=[
        dict(
            length=60,
            train=('backbone.patch_embed', 'backbone.stages'),
            terms='layers',
            supervised=False,
        ),
        dict(length=100, terms=('samples', 'kd', 'kd_box')),
    ],
)

"""UniKD: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        features=dict(
            type='mmkd.UnifiedTerm',
            teacher='big',
            channels=(32, 32, 32),
            fuse_dim=32,
            dist_dim=16,
        ),
        classes=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.SoftTargetLoss', num_classes=6),
        ),
        edges=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.ScoreWeight'),
            loss=dict(type='mmkd.LDLoss', temperature=1.0),
        ),
    ),
    phases=[
        dict(
            length=60,
            train=(),
            terms='features',
            freeze='terms.features.student_side',
            supervised=False,
        ),
        dict(length=100, freeze='terms.features.teacher_side'),
    ],
)

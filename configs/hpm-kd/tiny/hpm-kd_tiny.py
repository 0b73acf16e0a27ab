"""HPM-KD: a tiny GFL learns from two that are fused image by image."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher, middle=_base_.middle_teacher),
    terms=dict(
        fused=dict(
            type='mmkd.TeacherAttentionTerm',
            teachers=('big', 'middle'),
            channels=32,
            attn=dict(hidden=128, entropy_weight=0.1),
            temperature=dict(policy='cosine', tmin=2.0, tmax=6.0),
            losses=dict(
                scores=dict(
                    output=0,
                    loss=dict(type='mmkd.SoftTargetLoss', loss_weight=1.0),
                ),
                edges=dict(
                    output=1,
                    loss=dict(type='mmkd.LDLoss', loss_weight=0.25),
                ),
            ),
        ),
    ),
)

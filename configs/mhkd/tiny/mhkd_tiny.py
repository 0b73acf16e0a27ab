"""MHKD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        heads=dict(
            type='mmkd.MultiHeadTerm',
            teacher='big',
            num_classes=6,
            tap='backbone',
            strides=(8, 16, 32),
            channels=(16, 32, 64),
            teacher_channels=(32, 64, 128),
            head_channels=32,
            head=dict(
                norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
                anchor_generator=dict(
                    type='AnchorGenerator',
                    ratios=[1.0],
                    octave_base_scale=3,
                    scales_per_octave=1,
                ),
            ),
        ),
    ),
    phases=[
        dict(
            length=40,
            train=(),
            freeze='terms.heads.student_heads',
            supervised=False,
        ),
        dict(length=120, freeze='terms.heads.teacher_heads'),
    ],
)

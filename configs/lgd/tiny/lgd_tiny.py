"""LGD: a tiny RetinaNet learns from its labels.

What they say is learned slower than by the student, and the learning rate
falls to 0, so that it can catch up.
"""

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

param_scheduler = _base_.falling
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'terms.lgd.instructor': dict(lr_mult=0.1)})
)

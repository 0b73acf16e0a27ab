"""LGD: a tiny RetinaNet learns from its labels."""

_base_ = '../../_base_/tiny/retinanet_falling.py'

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

optim_wrapper = dict(  # what labels say must not move too fast
    paramwise_cfg=dict(custom_keys={'terms.lgd.instructor': dict(lr_mult=0.1)})
)

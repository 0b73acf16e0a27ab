"""As its base, but the learning rate falls and starts again with a phase."""

_base_ = 'deformable_detr.py'

param_scheduler = [
    dict(
        type='CosineRestartLR',
        periods=[15, 15, 15, 15, 15, 15, 70],
        restart_weights=[1, 1, 1, 1, 1, 1, 1],
        eta_min=1e-5,
        by_epoch=False,
    )
]

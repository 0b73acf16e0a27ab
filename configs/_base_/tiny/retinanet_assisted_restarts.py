"""As its base, but the learning rate starts again with each of 7 phases."""

_base_ = 'retinanet_assisted.py'

param_scheduler = [
    dict(
        type='CosineRestartLR',
        periods=[15, 15, 15, 15, 15, 15, 70],
        restart_weights=[1, 1, 1, 1, 1, 1, 1],
        eta_min=0,
        by_epoch=False,
    )
]

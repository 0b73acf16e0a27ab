"""BCCD: the same student for twice as long, to see more photographs."""

_base_ = 'student.py'

iterations = 1000

train_cfg = dict(max_iters=iterations, val_interval=500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=30,
        end=iterations,
        T_max=iterations - 30,
        eta_min=1e-5,
    ),
]
default_hooks = dict(checkpoint=dict(interval=500))

"""Trees: the demo's student for twice as long, to see more tiles."""

_base_ = '../../../demo/configs/student.py'

iterations = 1200

train_cfg = dict(max_iters=iterations, val_interval=300)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=iterations, T_max=iterations - 30)
default_hooks = dict(checkpoint=dict(interval=300))

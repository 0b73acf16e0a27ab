"""BCCD: the same student for twice as long, to see more photographs."""

_base_ = 'student.py'

iterations = 1000

train_cfg = dict(max_iters=iterations, val_interval=500)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=iterations, T_max=iterations - 30)
default_hooks = dict(checkpoint=dict(interval=500))

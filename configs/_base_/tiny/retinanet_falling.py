"""As its base, but the learning rate falls to 0, so that all comes to rest."""

_base_ = 'retinanet.py'

param_scheduler = _base_.falling

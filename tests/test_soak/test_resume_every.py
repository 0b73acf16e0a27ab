"""Whatever carries state: each tiny config, stopped half-way and resumed.

Together they name every term, loss and weight of the package.
"""

import copy

import pytest
import runs
from test_tiny_configs import (
    EVERY,
    at_the_root,
    few_steps,
    pictures,
    root,
)

from mmkd.laboratory.preparation import preparations

pytestmark = pytest.mark.soak
quick_starts = runs.quick_starts
__all__ = ['at_the_root', 'pictures', 'root']

AVERAGE = dict(type='EMAHook', momentum=0.1)
SAVED = dict(type='CheckpointHook', interval=1, by_epoch=False)


@EVERY
def test_a_method_stopped_half_way_goes_on_as_if_it_had_not_been(path, root):
    config = few_steps(path, root)
    for one in preparations(config, path.name):
        one.carry_out()
    config.custom_hooks = [*config.get('custom_hooks', []), SAVED, AVERAGE]
    half = config.train_cfg.max_iters // 2
    again = copy.deepcopy(config)
    again.work_dir, again.experiment_name = str(root / 'again'), 'again'
    whole = runs.train(config)
    resumed = runs.train(again, resume=root / 'run' / f'iter_{half}.pth')
    assert runs.differences(whole, resumed) == []

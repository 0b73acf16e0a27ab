"""Five thousand steps: memory, open files and time of a step do not grow."""

import os
import time
from pathlib import Path
from statistics import quantiles

import pytest
import runs
import tiny
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmkd.engine.trainer import Trainer

STATUS = Path('/proc/self/statm')
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        not STATUS.exists(), reason='asks Linux for its memory'
    ),
]

data, quick_starts = runs.data, runs.quick_starts

STEPS = int(os.environ.get('STEPS', 5000))
#: Steps after which everything that is kept for good is there.
WARM = STEPS // 5
#: Most that the process may grow after that, MiB. MMEngine's log of every
#: loss takes 16 bytes a step and loss of it.
MEMORY = 16
#: Most that a step may slow down by.
SLOWER = 1.3


def memory():
    """Resident memory of this process, MiB."""
    pages = int(STATUS.read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def quick(spent):
    """Time of the quickest tenth, as of a machine that has no other work."""
    return quantiles(spent, n=10)[0]


def handles():
    return len(os.listdir('/proc/self/fd'))


@HOOKS.register_module()
class Measure(Hook):
    """Notes what the process has taken after each step."""

    priority = 'LOWEST'
    found = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.begun = time.process_time()

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        spent = time.process_time() - self.begun
        self.found.append((memory(), handles(), spent))


def test_neither_memory_nor_files_nor_time_grow(
    data, tmp_path, teachers, tell
):
    def feature(teacher, loss, **settings):
        return dict(
            type='mmkd.FeatureTerm',
            teacher=teacher,
            levels=(0, 1),
            loss=dict(type=loss),
            **settings,
        )

    align = dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=16)
    model = tiny.distilled(
        tiny.retinanet(),
        teachers,
        terms=dict(
            balanced=dict(
                type='mmkd.BalancedTerm',
                terms=dict(pkd=feature('big', 'mmkd.PKDLoss', align=align)),
            ),
            own=dict(
                type='mmkd.SelfTerm',
                terms=dict(mimic=feature('self', 'mmkd.MimicLoss')),
            ),
        ),
    )
    cfg = runs.config(data, tmp_path, iters=STEPS, model=model)
    cfg.optim_wrapper.optimizer.lr = 0.001
    cfg.optim_wrapper.clip_grad = dict(max_norm=5.0)
    cfg.default_hooks.logger.interval = 50
    cfg.default_hooks.checkpoint.update(interval=STEPS // 10, max_keep_ckpts=2)
    cfg.custom_hooks = [
        dict(type='EMAHook', momentum=0.1),
        dict(type='mmkd.FiniteLossHook', policy='skip'),
        dict(type='Measure'),
    ]
    Measure.found.clear()
    Trainer.from_cfg(cfg).train()

    room, files, spent = zip(*Measure.found)
    assert len(room) == STEPS
    grown = max(room[-WARM:]) - max(room[:WARM])
    first, last = quick(spent[WARM // 2 : WARM]), quick(spent[-WARM // 2 :])
    tell(
        f'{STEPS} steps: {max(room[:WARM]):.0f} MiB after {WARM} of them and '
        f'{grown:+.1f} MiB at the end; {files[WARM]} open files, then '
        f'{files[-1]}; {1000 * first:.1f} ms of the processor a step, then '
        f'{1000 * last:.1f} ms.'
    )
    assert grown < MEMORY
    assert files[-1] <= files[WARM]
    assert last < SLOWER * first

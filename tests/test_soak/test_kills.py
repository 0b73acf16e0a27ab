"""A training killed at random moments ends as one that was left alone."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import runs
import tiny
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.engine.resume import KEY
from mmkd.engine.trainer import latest_checkpoint

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        not hasattr(os, 'fork'), reason='starts its trainings by forking'
    ),
]

data, quick_starts = runs.data, runs.quick_starts

KILLS = int(os.environ.get('KILLS', 50))
#: Iterations from one checkpoint to the next: most of the time is writing.
EVERY = 2
#: Long enough for that many kills, each of which may undo all but one save.
ITERATIONS = 6 * KILLS
#: What a moment is chosen by, in turn.
MOMENTS = ('any', 'writing', 'renamed', 'step')
#: Longest wait for what a moment waits for, seconds.
PATIENCE = 120.0


@HOOKS.register_module()
class Diary(Hook):
    """Writes down each iteration, so that it outlives the process."""

    priority = 'VERY_HIGH'  # before the checkpoint of the same iteration

    def __init__(self, path):
        self.path = path

    def before_train(self, runner):
        self._write(f'start {runner.iter}')

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self._write(f'done {runner.iter + 1}')

    def _write(self, line):
        with open(self.path, 'a') as file:
            file.write(f'{line}\n')


def entries(path):
    """What the diary says: words and numbers."""
    if not path.exists():
        return []
    lines = (line.split() for line in path.read_text().splitlines())
    return [(word, int(number)) for word, number in lines]


def config(data, work_dir, teachers, diary):
    """Phases, a balanced group with an adapter, the student's own average."""
    adapted = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        levels=(0, 1),
        align=dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=16),
        loss=dict(type='mmkd.PKDLoss'),
    )
    own = dict(
        type='mmkd.FeatureTerm',
        teacher='self',
        levels=(0, 1),
        loss=dict(type='mmkd.MimicLoss'),
    )
    model = tiny.distilled(
        tiny.retinanet(),
        teachers=dict(big=dict(teachers['big'], cache=0.1)),
        terms=dict(
            balanced=dict(
                type='mmkd.BalancedTerm', terms=dict(pkd=adapted), interval=3
            ),
            own=dict(type='mmkd.SelfTerm', terms=dict(mimic=own)),
        ),
        phases=[
            dict(terms='balanced', length=1),
            dict(train=('neck', 'bbox_head'), terms=('own',), length=2),
        ],
    )
    cfg = runs.config(data, work_dir, iters=ITERATIONS, model=model)
    cfg.default_hooks.checkpoint.update(interval=EVERY, max_keep_ckpts=2)
    cfg.custom_hooks = [
        dict(type='EMAHook', momentum=0.1),
        dict(type='Diary', path=str(diary)),
    ]
    # Else it diverges on six images of noise.
    cfg.optim_wrapper.optimizer.lr = 0.001
    cfg.optim_wrapper.clip_grad = dict(max_norm=5.0)
    cfg.resume = True  # as one does who starts it again and again
    return cfg


def train(cfg, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    runs.train(cfg)


class Training:
    """A training in a process of its own."""

    def __init__(self, cfg, output):
        self.work_dir = Path(cfg.work_dir)
        context = multiprocessing.get_context('fork')
        self.process = context.Process(target=train, args=(cfg, output))
        self.process.start()

    def wait_for(self, condition):
        """Whether it comes true before the training ends."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < end, 'the training hangs'
            time.sleep(0.0005)
        return True

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def parts(self):
        return list(self.work_dir.glob('.*.part'))


def wait_until(moment, training, diary, draw):
    """Wait for a moment; False if the training ends before."""
    begun = len(entries(diary))
    ahead = draw.randint(1, 2 * EVERY + 1)
    if moment == 'any':  # also while it starts and reads the checkpoint
        time.sleep(draw.uniform(0.0, 3.0))
        return training.process.is_alive()
    if not training.wait_for(lambda: len(entries(diary)) > begun + ahead):
        return False
    if moment == 'writing':
        if not training.wait_for(training.parts):
            return False
        time.sleep(draw.uniform(0.0, 0.03))
    elif moment == 'renamed':
        before = {one.name for one in training.work_dir.glob('iter_*.pth')}
        training.wait_for(
            lambda: (
                {one.name for one in training.work_dir.glob('iter_*.pth')}
                - before
            )
        )
    else:
        time.sleep(draw.uniform(0.0, 0.2))
    return training.process.is_alive()


def test_a_training_killed_over_and_over_ends_as_an_undisturbed_one(
    data, teachers, tmp_path, tell
):
    whole = Training(
        config(data, tmp_path / 'whole', teachers, tmp_path / 'whole.txt'),
        tmp_path / 'whole.log',
    )
    whole.process.join()
    assert whole.process.exitcode == 0, (tmp_path / 'whole.log').read_text()

    diary, folder = tmp_path / 'diary.txt', tmp_path / 'killed'
    draw = random.Random(0)
    kills, torn, repeated = Counter(), 0, []
    while sum(kills.values()) < KILLS:
        moment = MOMENTS[sum(kills.values()) % len(MOMENTS)]
        cfg = config(data, folder, teachers, diary)
        training = Training(cfg, tmp_path / 'killed.log')
        met = wait_until(moment, training, diary, draw)
        killed = training.kill()
        assert met, (tmp_path / 'killed.log').read_text()
        assert killed
        kills[moment] += 1
        torn += bool(training.parts())

        done = max(
            (n for word, n in entries(diary) if word == 'done'), default=0
        )
        picked = latest_checkpoint(folder)
        at = read_checkpoint(picked)['meta']['iter'] if picked else 0
        assert done - at <= EVERY, f'{picked} after iteration {done}'
        repeated.append(done - at)

    last = Training(
        config(data, folder, teachers, diary), tmp_path / 'killed.log'
    )
    last.process.join()
    assert last.process.exitcode == 0, (tmp_path / 'killed.log').read_text()
    assert not last.parts(), 'what was torn stays for ever'

    ends = [
        read_checkpoint(one / f'iter_{ITERATIONS}.pth')
        for one in (tmp_path / 'whole', folder)
    ]
    for part in ('state_dict', 'ema_state_dict', 'optimizer', KEY):
        assert runs.differences(ends[0][part], ends[1][part], part) == []
    logged = [logs(one) for one in ends]
    assert runs.differences(*logged, 'log') == []
    assert torn, 'no kill hit a checkpoint that was being written'
    total = sum(kills.values())
    tell(
        f'{total} kills ({torn} left a half-written file), {ITERATIONS} '
        f'iterations, a checkpoint every {EVERY}: at most {max(repeated)} '
        f'iterations repeated; weights, average, optimiser, state and log '
        f'equal those of the undisturbed run.'
    )


def logs(checkpoint):
    return {
        key: buffer.data
        for key, buffer in checkpoint['message_hub']['log_scalars'].items()
        if 'time' not in key
    }

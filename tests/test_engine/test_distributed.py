import multiprocessing
import os
import signal
import socket

import pytest
import runs
import tiny
import torch
from mmengine.config import ConfigDict
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.engine.interrupt import Interrupted
from mmkd.engine.resume import KEY

data, quick_starts = runs.data, runs.quick_starts

RANKS = 2
forks = pytest.mark.skipif(
    not hasattr(os, 'fork'), reason='starts its ranks by forking'
)


@HOOKS.register_module()
class StopOneRank(Hook):
    """Sends a signal to the second rank alone."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() == 1 and runner.iter == 1:
            signal.raise_signal(signal.SIGTERM)


def free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


def train_rank(rank, port, cfg, resume):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        runs.train(cfg, resume)
    except Interrupted as stopped:
        os._exit(stopped.iteration)


def train(cfg, resume=None, expected=0):
    cfg.launcher = 'pytorch'
    context = multiprocessing.get_context('fork')
    port = free_port()
    ranks = [
        context.Process(target=train_rank, args=(rank, port, cfg, resume))
        for rank in range(RANKS)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(120)
        if one.is_alive():
            one.kill()
    assert [one.exitcode for one in ranks] == [expected] * RANKS


@forks
def test_two_ranks_resume_each_its_own_state(data, tmp_path):
    def config(work_dir):
        # Each rank draws sizes by a random state of its own.
        resize = dict(
            type='BatchSyncRandomResize',
            random_size_range=(64, 128),
            size_divisor=32,
            interval=1,
        )
        pixels = ConfigDict(tiny.PIXELS, batch_augments=[resize])
        cfg = runs.config(
            data,
            tmp_path / work_dir,
            epochs=3,
            model=tiny.retinanet(pixels=pixels),
            randomness=dict(seed=5, diff_rank_seed=True),
        )
        cfg.custom_hooks = [
            dict(type='CheckpointHook', interval=1, by_epoch=False)
        ]
        return cfg

    train(config('whole'))
    stop = tmp_path / 'whole' / 'iter_3.pth'
    first, second = read_checkpoint(stop)[KEY]['ranks']
    assert first['place'] == second['place'] == dict(epoch=1, batches=1)
    assert runs.differences(first['random'], second['random'])

    train(config('resumed'), resume=stop)
    whole, resumed = (
        read_checkpoint(tmp_path / folder / 'epoch_3.pth')
        for folder in ('whole', 'resumed')
    )
    for part in ('state_dict', 'optimizer', 'param_schedulers', KEY):
        assert runs.differences(whole[part], resumed[part], part) == []


@forks
def test_a_signal_to_one_rank_stops_all_in_the_same_step(data, tmp_path):
    cfg = runs.config(data, tmp_path)
    cfg.custom_hooks = [dict(type='StopOneRank')]
    train(cfg, expected=2)
    saved = read_checkpoint(tmp_path / 'interrupted.pth')
    assert saved['meta']['iter'] == 2
    assert len(saved[KEY]['ranks']) == RANKS


@forks
def test_ranks_that_look_at_their_first_step_train_the_same(
    data, tmp_path, teachers, terms
):
    for number, hooks in enumerate([[], [dict(type='mmkd.FirstStepHook')]]):
        cfg = runs.config(
            data,
            tmp_path / str(number),
            epochs=1,
            model=tiny.distilled(tiny.retinanet(), teachers, terms),
        )
        cfg.custom_hooks = hooks
        cfg.log_level = 'INFO'
        train(cfg)
    without, looked = (
        read_checkpoint(tmp_path / folder / 'epoch_1.pth') for folder in '01'
    )
    assert runs.differences(without['state_dict'], looked['state_dict']) == []
    said = [
        sum('Iteration 1, pkd: ' in one.read_text() for one in logs)
        for logs in ((tmp_path / one).rglob('*.log') for one in '01')
    ]
    assert said == [0, 1]

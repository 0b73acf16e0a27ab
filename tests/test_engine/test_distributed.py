import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

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
from mmkd.engine.trainer import start_without_gpu
from mmkd.structures.ground_truth import labelled

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


@HOOKS.register_module()
class Die(Hook):
    """Ends the second rank at once, as the system does without memory."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() == 1 and runner.iter == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class Note(Hook):
    """Breaks a loss of one rank; keeps the last weights of both."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        found = [len(one.gt_instances) for one in data_batch['data_samples']]
        if get_rank() == 1:
            assert sum(found) == 0
        self.broken = get_rank() == 1 and runner.iter == 1
        self.seen.append(len(found))

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        row = runner.message_hub.get_info('non_finite_in_a_row', 0)
        self.skipped.append(row)

    def before_train(self, runner):
        self.seen, self.skipped, self.broken = [], [], False
        head = runner.model.module.bbox_head
        plain = head.loss

        def loss(*given):
            found = plain(*given)
            if self.broken:  # no gradient tells the other rank of it
                found['loss_more'] = torch.tensor(float('nan'))
            return found

        head.loss = loss

    def after_train(self, runner):
        path = os.path.join(runner.work_dir, f'end{get_rank()}.pth')
        state = runner.model.module.state_dict()
        found = dict(state=state, seen=self.seen, skipped=self.skipped)
        torch.save(found, path)


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
            one.join()
    if isinstance(expected, int):
        expected = [expected] * RANKS
    assert [one.exitcode for one in ranks] == expected


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


@pytest.mark.slow
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


@forks
def test_a_rank_that_dies_ends_the_others_with_a_message(
    data, tmp_path, capfd
):
    cfg = runs.config(data, tmp_path, iters=50)
    cfg.custom_hooks = [dict(type='Die')]
    begun = time.monotonic()
    train(cfg, expected=[1, -signal.SIGKILL])
    assert time.monotonic() - begun < 60
    said = capfd.readouterr().err
    assert 'Another rank has ended' in said
    assert f'last whole checkpoint is {tmp_path}/iter_2.pth' in said


@forks
def test_ranks_stay_alike_without_boxes_and_with_an_uneven_batch(
    tmp_path, teachers, terms
):
    """And where the loss of one of them is no number."""
    folder = tmp_path / 'data'
    path = runs.write_coco(folder, images=10)
    content = json.loads(path.read_text())
    # The second rank is shown every other image.
    content['annotations'] = [
        one for one in content['annotations'] if one['image_id'] % 2 == 0
    ]
    path.write_text(json.dumps(content))

    terms['pkd']['align'] = dict(
        type='mmkd.ConvAdapt', in_channels=16, out_channels=16
    )
    model = tiny.distilled(tiny.retinanet(), teachers, terms)
    cfg = runs.config(folder, tmp_path / 'run', epochs=1, model=model)
    cfg.train_dataloader.sampler.shuffle = False
    del cfg.train_dataloader['batch_sampler']
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    cfg.custom_hooks = [
        dict(type='Note'),
        dict(type='mmkd.FiniteLossHook', policy='skip'),
    ]
    train(cfg)
    ends = [
        torch.load(tmp_path / 'run' / f'end{rank}.pth')
        for rank in range(RANKS)
    ]
    assert [one['seen'] for one in ends] == [[2, 2, 1]] * RANKS
    assert [one['skipped'] for one in ends] == [[0, 1, 0]] * RANKS
    assert all(one.isfinite().all() for one in ends[0]['state'].values())
    learnt = [
        {key: one for key, one in end['state'].items() if _is_learnt(key)}
        for end in ends
    ]
    assert any(key.startswith('terms.pkd.align') for key in learnt[0])
    assert runs.differences(*learnt) == []


@HOOKS.register_module()
class Watch(Hook):
    """Keeps what a rank was shown, and the weights that it ended with."""

    def before_train(self, runner):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen += [
            (labelled(one), one.img_path) for one in data_batch['data_samples']
        ]

    def after_train(self, runner):
        state = runner.model.module.state_dict()
        path = os.path.join(runner.work_dir, f'end{get_rank()}.pth')
        torch.save(dict(seen=self.seen, state=state), path)


@forks
def test_ranks_share_photographs_without_labels(tmp_path, teachers, terms):
    folder = tmp_path / 'data'
    runs.write_coco(folder, images=10)
    terms['pkd']['align'] = dict(
        type='mmkd.ConvAdapt', in_channels=16, out_channels=16
    )
    model = tiny.distilled(tiny.retinanet(), teachers, terms)
    cfg = runs.config(folder, tmp_path / 'run', epochs=4, model=model)
    loader = cfg.train_dataloader
    loader.dataset.indices = 4
    loader.dataset = dict(
        type='mmkd.PartlyLabelledDataset',
        dataset=loader.dataset,
        unlabelled=str(folder),
    )
    loader.batch_sampler = dict(type='mmkd.PartlyLabelledBatchSampler')
    cfg.custom_hooks = [dict(type='Watch')]
    train(cfg)
    ends = [
        torch.load(tmp_path / 'run' / f'end{rank}.pth')
        for rank in range(RANKS)
    ]
    for end in ends:  # four epochs of one batch of two
        assert [known for known, _ in end['seen']] == [True, False] * 4
    shown = Counter(one for end in ends for one in end['seen'])
    labels, photographs = (
        {
            Path(path).stem: count
            for (known, path), count in shown.items()
            if known == kind
        }
        for kind in (True, False)
    )
    # None twice as long as another was not shown.
    assert labels == {f'00{number}': 2 for number in range(4)}
    assert sorted(photographs) == [f'00{number}' for number in range(4, 10)]
    assert sorted(photographs.values()) == [1, 1, 1, 1, 2, 2]
    learnt = [
        {key: one for key, one in end['state'].items() if _is_learnt(key)}
        for end in ends
    ]
    assert any(key.startswith('terms.pkd.align') for key in learnt[0])
    assert runs.differences(*learnt) == []


def _is_learnt(key):
    # Statistics of BatchNorm are each rank's own.
    return 'running_' not in key and 'num_batches' not in key


def test_a_rank_that_hangs_is_waited_for_as_long_as_the_config_says(
    monkeypatch,
):
    asked = []
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr(
        'torch.distributed.init_process_group',
        lambda backend, timeout: asked.append((backend, timeout)),
    )
    start_without_gpu(90)
    start_without_gpu()
    assert asked == [('gloo', timedelta(seconds=90)), ('gloo', None)]

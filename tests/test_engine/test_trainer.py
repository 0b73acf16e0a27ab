import os
from pathlib import Path

import pytest
import runs
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, MODELS

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.engine.trainer import Trainer, latest_checkpoint, prepare_resume

data, quick_starts = runs.data, runs.quick_starts


@HOOKS.register_module()
class Fail(Hook):
    """Raises where it is told."""

    def __init__(self, stage, step=1):
        self.step = step
        setattr(self, stage, self.fail)

    def fail(self, runner, *arguments, **settings):
        if runner._train_loop is None or runner.iter + 1 >= self.step:
            raise RuntimeError('failed on purpose')


def files(folder):
    return sorted(
        str(one.relative_to(folder))
        for one in Path(folder).rglob('*')
        if one.is_file()
    )


def no_such_part(cfg):
    cfg.model.neck.in_channels = [1, 2, 3, 4]


def no_such_type(cfg):
    cfg.model.type = 'RetinaNot'


def fails_before_the_run(cfg):
    cfg.custom_hooks = [dict(type='Fail', stage='before_run')]


def fails_in_the_first_step(cfg):
    cfg.custom_hooks = [dict(type='Fail', stage='before_train_iter')]


def empty_data(cfg):
    cfg.train_dataloader.dataset.indices = []


BROKEN = [
    no_such_part,
    no_such_type,
    fails_before_the_run,
    fails_in_the_first_step,
    empty_data,
]


@pytest.mark.parametrize('broken', BROKEN)
def test_a_failed_start_leaves_no_work_directory(broken, data, tmp_path):
    cfg = runs.config(data, tmp_path / 'a' / 'b')
    broken(cfg)
    with pytest.raises(Exception):  # noqa: B017 - five kinds
        runs.train(cfg)
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('broken', BROKEN)
def test_a_failed_start_leaves_an_earlier_run_as_it_was(
    broken, data, tmp_path
):
    config = tmp_path / 'student.py'
    runs.config(data, tmp_path / 'run', epochs=1).dump(config)
    (tmp_path / 'run').mkdir()
    for name in ('epoch_1.pth', 'last_checkpoint', 'student.py'):
        (tmp_path / 'run' / name).write_text(name)
    before = files(tmp_path)
    cfg = Config.fromfile(config)
    broken(cfg)
    with pytest.raises(Exception):  # noqa: B017 - five kinds
        runs.train(cfg)
    assert files(tmp_path) == before
    for name in ('epoch_1.pth', 'last_checkpoint', 'student.py'):
        assert (tmp_path / 'run' / name).read_text() == name


def test_a_run_that_fails_later_keeps_its_log_and_checkpoints(data, tmp_path):
    cfg = runs.config(data, tmp_path)
    cfg.custom_hooks = [dict(type='Fail', stage='before_train_iter', step=5)]
    with pytest.raises(RuntimeError, match='on purpose'):
        runs.train(cfg)
    assert (tmp_path / 'epoch_1.pth').is_file()
    assert any(one.endswith('.log') for one in files(tmp_path))


def test_empty_training_data_says_what_to_check(data, tmp_path):
    cfg = runs.config(data, tmp_path)
    empty_data(cfg)
    with pytest.raises(ValueError, match=r'0 images are left.*ann_file'):
        runs.train(cfg)
    cfg = runs.config(data, tmp_path)
    cfg.train_dataloader.update(batch_size=9, drop_last=True)
    del cfg.train_dataloader['batch_sampler']
    with pytest.raises(ValueError, match=r'6 images are left.*batches of 9 x'):
        runs.train(cfg)


def test_a_checkpoint_appears_whole_or_not_at_all(data, tmp_path, monkeypatch):
    trainer = Trainer.from_cfg(runs.config(data, tmp_path, epochs=1))
    trainer.train()
    path = tmp_path / 'epoch_1.pth'
    before = path.read_bytes()

    def half(content, file, **settings):
        file.write(b'half')
        raise OSError('no space left on device')

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(OSError, match='no space'):
        trainer.save_checkpoint(str(tmp_path), 'epoch_1.pth')
    assert path.read_bytes() == before
    assert not [one for one in files(tmp_path) if 'part' in one]


def test_a_write_that_is_cut_off_leaves_the_old_file(
    data, tmp_path, monkeypatch
):
    trainer = Trainer.from_cfg(runs.config(data, tmp_path, epochs=1))
    trainer.train()
    before = (tmp_path / 'epoch_1.pth').read_bytes()

    def die(temporary, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', die)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(tmp_path), 'epoch_1.pth')
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before


def full_disk(content, file, **settings):
    raise OSError('no space left on device')


def test_the_old_checkpoint_goes_when_the_new_one_is_there(
    data, tmp_path, monkeypatch
):
    cfg = runs.config(data, tmp_path, epochs=2)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    trainer = Trainer.from_cfg(cfg)
    trainer.train()
    assert 'epoch_1.pth' not in files(tmp_path)
    assert 'epoch_2.pth' in files(tmp_path)

    (hook,) = [one for one in trainer.hooks if isinstance(one, CheckpointHook)]
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match='no space'):
        hook._save_checkpoint(trainer)
    assert 'epoch_2.pth' in files(tmp_path)


def test_the_best_checkpoint_goes_when_a_better_one_is_there(
    data, tmp_path, monkeypatch
):
    cfg = runs.config(data, tmp_path, epochs=1)
    cfg.default_hooks.checkpoint.update(save_best='AP', rule='greater')
    trainer = Trainer.from_cfg(cfg)
    trainer.train()
    (hook,) = [one for one in trainer.hooks if isinstance(one, CheckpointHook)]
    # Epoch and score; the second validation of an epoch may be better.
    for epoch, score in ((1, 0.1), (1, 0.2), (2, 0.3)):
        trainer.train_loop._epoch = epoch
        hook.after_val_epoch(trainer, dict(AP=score))
        best = [one for one in files(tmp_path) if one.startswith('best')]
        assert best == [f'best_AP_epoch_{epoch}.pth']
    trainer.train_loop._epoch = 3
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match='no space'):
        hook.after_val_epoch(trainer, dict(AP=0.4))
    assert 'best_AP_epoch_2.pth' in files(tmp_path)


@HOOKS.register_module()
class Spoil(Hook):
    """Makes the weights useless before a step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 4:
            runner.model.backbone.conv1.weight.data.fill_(float('nan'))


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    data, tmp_path
):
    cfg = runs.config(data, tmp_path, epochs=3)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.custom_hooks = [dict(type='Spoil')]
    with pytest.raises(FloatingPointError, match=r'loss_cls.*iteration 5'):
        runs.train(cfg)
    saved = read_checkpoint(tmp_path / 'epoch_1.pth')['state_dict']
    assert all(one.isfinite().all() for one in saved.values())
    assert not (tmp_path / 'epoch_2.pth').exists()


@pytest.fixture
def finished(data, tmp_path):
    """Work directory of a run of one epoch."""
    runs.train(runs.config(data, tmp_path / 'done', epochs=1))
    return tmp_path / 'done'


def test_the_latest_checkpoint_survives_moves_and_crashes(finished, tmp_path):
    assert latest_checkpoint(finished) == str(finished / 'epoch_1.pth')
    moved = finished.rename(tmp_path / 'moved')
    assert latest_checkpoint(moved) == str(moved / 'epoch_1.pth')
    (moved / 'last_checkpoint').write_text('')
    assert latest_checkpoint(moved) == str(moved / 'epoch_1.pth')
    # The machine crashed while a newer one was copied here.
    (moved / 'epoch_2.pth').write_bytes(b'PK\x03\x04 cut off')
    (moved / 'last_checkpoint').write_text(str(moved / 'epoch_2.pth'))
    assert latest_checkpoint(moved) == str(moved / 'epoch_1.pth')
    assert latest_checkpoint(tmp_path / 'nowhere') is None


def test_nothing_to_resume_is_a_start(data, tmp_path):
    cfg = runs.config(data, tmp_path / 'new', epochs=1)
    cfg.resume = True
    trainer = Trainer.from_cfg(cfg)
    trainer.train()
    assert trainer.epoch == 1


def test_weights_alone_cannot_be_resumed(data, finished, tmp_path):
    weights = tmp_path / 'weights.pth'
    state = read_checkpoint(finished / 'epoch_1.pth')['state_dict']
    torch.save(dict(state_dict=state), weights)
    cfg = runs.config(data, tmp_path / 'new')
    cfg.resume, cfg.load_from = True, str(weights)
    with pytest.raises(ValueError, match=r'has no meta\.epoch.*load_from='):
        prepare_resume(cfg)


def test_another_detectors_checkpoint_cannot_be_resumed(
    data, finished, tmp_path
):
    cfg = runs.config(data, tmp_path / 'new', model=tiny.retinanet(base=16))
    with pytest.raises(ValueError, match=r'--resume: .*another shape \(back'):
        runs.train(cfg, resume=finished / 'epoch_1.pth')
    assert not (tmp_path / 'new').exists()


def test_load_from_takes_what_fits_and_says_so(data, finished, tmp_path):
    cfg = runs.config(data, tmp_path / 'new', epochs=1)
    cfg.model.bbox_head.num_classes = 5
    cfg.load_from = str(finished / 'epoch_1.pth')
    trainer = Trainer.from_cfg(cfg)
    said = []
    trainer.logger.info = said.append
    trainer.train()
    (line,) = [one for one in said if one.startswith('load_from')]
    assert '2 of another shape (bbox_head.retina_cls.weight' in line


def test_load_from_of_a_stranger_is_an_error(data, tmp_path):
    stranger = tmp_path / 'stranger.pth'
    torch.save(dict(state_dict=dict(w=torch.zeros(1))), stranger)
    cfg = runs.config(data, tmp_path / 'new')
    cfg.load_from = str(stranger)
    with pytest.raises(ValueError, match=r'load_from: .*1 are left over \(w'):
        runs.train(cfg)


def test_a_tested_checkpoint_must_fit(data, finished, tmp_path):
    cfg = runs.config(data, tmp_path / 'test', **runs.evaluation(data, 'test'))
    cfg.load_from = str(finished / 'epoch_1.pth')
    Trainer.from_cfg(cfg).test()
    cfg.model.bbox_head.num_classes = 5
    cfg.work_dir = str(tmp_path / 'other')
    with pytest.raises(ValueError, match=r'mmkd test: .*have another shape'):
        Trainer.from_cfg(cfg).test()
    assert not (tmp_path / 'other').exists()


def test_other_loops_are_kept_with_a_warning(data, tmp_path):
    from mmengine.registry import LOOPS
    from mmengine.runner import EpochBasedTrainLoop

    @LOOPS.register_module(force=True)
    class OwnLoop(EpochBasedTrainLoop):
        pass

    cfg = runs.config(data, tmp_path, epochs=1)
    cfg.train_cfg.type = 'OwnLoop'
    trainer = Trainer.from_cfg(cfg)
    said = []
    trainer.logger.warning = said.append
    trainer.train()
    assert type(trainer.train_loop) is OwnLoop
    assert 'will differ' in said[0]


def test_plain_students_take_a_distilled_checkpoint(
    data, tmp_path, teachers, terms
):
    # An adapter, so that the checkpoint holds weights of a term.
    terms['pkd']['align'] = dict(
        type='mmkd.ConvAdapt', in_channels=16, out_channels=16
    )
    if MODELS.get('mmkd.ConvAdapt') is None:
        pytest.skip('mmkd.ConvAdapt does not exist yet')
    cfg = runs.config(data, tmp_path / 'distilled', epochs=1)
    cfg.model = tiny.distilled(tiny.retinanet(), teachers, terms)
    cfg.merge_from_dict(runs.evaluation(data, 'test'))
    trainer = Trainer.from_cfg(cfg)
    trainer.train()
    path = tmp_path / 'distilled' / 'epoch_1.pth'
    assert any(
        key.startswith('terms.') for key in read_checkpoint(path)['state_dict']
    )

    results = []
    for name, model in (('same', cfg.model), ('plain', tiny.retinanet())):
        again = runs.config(
            data, tmp_path / name, model=model, **runs.evaluation(data, 'test')
        )
        again.load_from = str(path)
        results.append(Trainer.from_cfg(again).test())
    assert results[0] == results[1]

import signal

import pytest
import runs
import tiny
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.datasets.photographs import with_photographs
from mmkd.engine import resume
from mmkd.engine.interrupt import Interrupted
from mmkd.engine.trainer import Trainer, latest_checkpoint

data, quick_starts = runs.data, runs.quick_starts

EVERY_STEP = dict(type='CheckpointHook', interval=1, by_epoch=False)
AVERAGE = dict(type='EMAHook', momentum=0.1)


@HOOKS.register_module()
class PressCtrlC(Hook):
    """Sends the signal of the keyboard in mid-run."""

    def __init__(self, step=None, validation=None):
        self.step, self.validation = step, validation

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.step:
            signal.raise_signal(signal.SIGINT)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == self.validation and batch_idx == 1:
            signal.raise_signal(signal.SIGINT)


def resized_in_batches():
    """A student whose preprocessor draws sizes and remembers the last."""
    resize = dict(
        type='BatchSyncRandomResize',
        random_size_range=(64, 128),
        size_divisor=32,
        interval=2,
    )
    pixels = ConfigDict(tiny.PIXELS, batch_augments=[resize])
    return tiny.retinanet(pixels=pixels)


def learning(folder):
    """A student with a teacher, and a term on what is detected."""
    teacher = tiny.retinanet(base=16)
    weights = tiny.save_teacher(teacher, folder / 'teacher.pth')
    wide = dict(config=dict(model=teacher), checkpoint=str(weights))
    return tiny.distilled(
        tiny.retinanet(),
        dict(wide=wide),
        dict(
            pkd=dict(
                type='mmkd.FeatureTerm',
                teacher='wide',
                tap='neck',
                loss=dict(type='mmkd.PKDLoss'),
            ),
            boxes=dict(
                type='mmkd.PredictedBoxTerm',
                teacher='wide',
                where='unlabelled',
                score_thr=0.0,
            ),
        ),
    )


CASES = {
    'epochs': dict(epochs=2),
    'epochs, two workers': dict(epochs=2, workers=2),
    'epochs, lasting workers': dict(epochs=2, workers=2, persistent=True),
    'iterations': dict(iters=6),
    'iterations, two workers': dict(iters=6, workers=2, persistent=True),
    'iterations, finite passes': dict(iters=6, sampler='DefaultSampler'),
    'photographs without labels': dict(epochs=3, unlabelled=True),
    'photographs, iterations': dict(iters=6, unlabelled=True),
    'batches resized': dict(epochs=2, model=resized_in_batches()),
    'gradients accumulated': dict(epochs=2, accumulate=2),
    'averaged and validated': dict(epochs=2, validate=True),
}


def config(data, work_dir, case):
    settings = dict(CASES[case])
    accumulate = settings.pop('accumulate', 1)
    sampler = settings.pop('sampler', None)
    unlabelled = settings.pop('unlabelled', False)
    cfg = runs.config(data, work_dir, **settings)
    cfg.custom_hooks = [EVERY_STEP, AVERAGE]
    cfg.optim_wrapper.accumulative_counts = accumulate
    if sampler:
        cfg.train_dataloader.sampler.type = sampler
    if unlabelled:
        loader = cfg.train_dataloader
        loader.dataset.indices = 4
        mixed = with_photographs(loader, data / 'images', [])
        for key, value in mixed.items():
            loader[key] = value
        cfg.model = learning(data)
    if settings.get('validate'):
        cfg.param_scheduler.append(
            ConfigDict(
                type='ReduceOnPlateauLR',
                monitor='coco/bbox_mAP_50',
                rule='greater',
                patience=0,
                threshold=1.0,
                factor=0.5,
            )
        )
        cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP_50'
    return cfg


@pytest.fixture(scope='module')
def uninterrupted(data, tmp_path_factory):
    """Final state and work directory of each case, run once."""
    done = {}

    def run(case):
        if case not in done:
            work_dir = tmp_path_factory.mktemp('whole')
            done[case] = runs.train(config(data, work_dir, case)), work_dir
        return done[case]

    return run


@pytest.mark.parametrize(
    ('case', 'stop'),
    [
        pytest.param(*('epochs', 'epoch_1'), marks=pytest.mark.slow),
        pytest.param(*('epochs', 'iter_2'), marks=pytest.mark.slow),
        pytest.param(*('epochs', 'iter_3'), marks=pytest.mark.slow),
        ('epochs', 'iter_4'),
        pytest.param(
            *('epochs, two workers', 'epoch_1'), marks=pytest.mark.slow
        ),
        pytest.param(
            *('epochs, two workers', 'iter_2'), marks=pytest.mark.slow
        ),
        pytest.param(
            *('epochs, lasting workers', 'epoch_1'), marks=pytest.mark.slow
        ),
        pytest.param(
            *('epochs, lasting workers', 'iter_4'), marks=pytest.mark.slow
        ),
        ('iterations', 'iter_4'),
        pytest.param(
            *('iterations, two workers', 'iter_4'), marks=pytest.mark.slow
        ),
        pytest.param(
            *('iterations, finite passes', 'iter_2'), marks=pytest.mark.slow
        ),
        pytest.param(
            *('iterations, finite passes', 'iter_3'), marks=pytest.mark.slow
        ),
        ('photographs without labels', 'iter_3'),
        ('photographs, iterations', 'iter_4'),
        ('batches resized', 'iter_3'),
        pytest.param(*('batches resized', 'epoch_1'), marks=pytest.mark.slow),
        pytest.param(
            *('gradients accumulated', 'iter_3'), marks=pytest.mark.slow
        ),
        pytest.param(
            *('averaged and validated', 'epoch_1'), marks=pytest.mark.slow
        ),
        ('averaged and validated', 'iter_5'),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    case, stop, uninterrupted, data, tmp_path
):
    whole, folder = uninterrupted(case)
    cfg = config(data, tmp_path, case)
    resumed = runs.train(cfg, resume=folder / f'{stop}.pth')
    assert runs.differences(whole, resumed) == []


def test_the_number_of_workers_does_not_matter(uninterrupted):
    alone, _ = uninterrupted('epochs')
    for case in ('epochs, two workers', 'epochs, lasting workers'):
        assert runs.differences(alone, uninterrupted(case)[0]) == []


def test_the_cases_train_with_random_data(uninterrupted, data, tmp_path):
    whole, _ = uninterrupted('epochs')
    cfg = config(data, tmp_path, 'epochs')
    # The same start and order, other flips and sizes.
    cfg.train_dataloader.dataset.pipeline[3].prob = 1.0
    other = runs.train(cfg)
    assert '.weights.bbox_head.retina_cls.weight' in runs.differences(
        whole, other
    )


@pytest.mark.parametrize(
    ('broken', 'case'),
    [
        ('restore', 'batches resized'),
        ('set_attributes', 'batches resized'),
        ('_set_gradients', 'gradients accumulated'),
        ('Place', 'epochs'),
        ('Place', 'iterations'),
    ],
)
def test_leaving_out_any_part_of_the_state_is_noticed(
    broken, case, uninterrupted, data, tmp_path, monkeypatch
):
    whole, folder = uninterrupted(case)
    stop = 'iter_3' if case != 'epochs' else 'iter_2'
    idle = {
        'Place': lambda **place: type('Start', (), dict(epoch=0, batches=0))
    }
    monkeypatch.setattr(
        resume, broken, idle.get(broken, lambda *arguments: None)
    )
    cfg = config(data, tmp_path, case)
    resumed = runs.train(cfg, resume=folder / f'{stop}.pth')
    assert any(
        path.startswith('.weights')
        for path in runs.differences(whole, resumed)
    )


@pytest.mark.parametrize(
    'press',
    [
        pytest.param(dict(step=2), marks=pytest.mark.slow),
        pytest.param(dict(step=3), marks=pytest.mark.slow),
        dict(validation=1),
    ],
)
def test_ctrl_c_and_resume_equal_one_run(press, uninterrupted, data, tmp_path):
    case = 'averaged and validated'
    whole, _ = uninterrupted(case)
    cfg = config(data, tmp_path, case)
    cfg.custom_hooks = [AVERAGE, dict(type='PressCtrlC', **press)]
    with pytest.raises(Interrupted, match=r'interrupted\.pth'):
        runs.train(cfg)
    assert latest_checkpoint(tmp_path).endswith('interrupted.pth')

    again = config(data, tmp_path, case)
    again.custom_hooks = [EVERY_STEP, AVERAGE]
    again.resume = True
    assert runs.differences(whole, runs.train(again)) == []


def test_ctrl_c_leaves_the_process_as_it_was(data, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    cfg = config(data, tmp_path, 'epochs')
    cfg.custom_hooks = [dict(type='PressCtrlC', step=1)]
    with pytest.raises(Interrupted) as stopped:
        runs.train(cfg)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.value.iteration == 1
    assert stopped.value.number == signal.SIGINT


@pytest.mark.slow
def test_a_run_without_a_seed_goes_on_with_the_one_it_drew(data, tmp_path):
    cfg = config(data, tmp_path / 'whole', 'iterations')
    cfg.randomness = dict(seed=None)
    whole = runs.train(cfg)
    again = config(data, tmp_path / 'again', 'iterations')
    again.randomness = dict(seed=None)
    resumed = runs.train(again, resume=tmp_path / 'whole' / 'iter_4.pth')
    assert runs.differences(whole, resumed) == []


def test_a_distilled_student_resumes_exactly(data, tmp_path, teachers, terms):
    def distilled(work_dir):
        cfg = runs.config(data, tmp_path / work_dir, epochs=2)
        cfg.model = tiny.distilled(tiny.retinanet(), teachers, terms)
        cfg.custom_hooks = [EVERY_STEP, AVERAGE]
        return cfg

    whole = runs.train(distilled('whole'))
    assert '.log.train/loss_kd_pkd' in [f'.log.{key}' for key in whole['log']]
    for stop in ('iter_2', 'epoch_1'):
        resumed = runs.train(
            distilled(stop), resume=tmp_path / 'whole' / f'{stop}.pth'
        )
        assert runs.differences(whole, resumed) == []


def test_a_checkpoint_of_another_trainer_goes_on_with_a_warning(
    data, tmp_path, caplog
):
    from mmengine.runner import Runner

    # Stock MMEngine, epoch_1.pth of two.
    cfg = runs.config(data, tmp_path / 'stock', epochs=1)
    Runner.from_cfg(cfg).train()
    again = runs.config(data, tmp_path / 'ours', epochs=2)
    again.resume = True
    again.load_from = str(tmp_path / 'stock' / 'epoch_1.pth')
    trainer = Trainer.from_cfg(again)
    said = []
    trainer.logger.warning = said.append
    trainer.train()
    assert any('not bit for bit' in one for one in said)
    assert (trainer.epoch, trainer.iter) == (2, 6)


def test_steps_keep_their_number_within_the_epoch(
    uninterrupted, data, tmp_path, monkeypatch
):
    _, folder = uninterrupted('epochs')
    numbers = []
    monkeypatch.setattr(
        PressCtrlC,
        'before_train_iter',
        lambda hook, runner, batch_idx, data_batch: numbers.append(batch_idx),
    )
    cfg = config(data, tmp_path, 'epochs')
    cfg.custom_hooks.append(dict(type='PressCtrlC'))
    runs.train(cfg, resume=folder / 'iter_2.pth')
    assert numbers == [2, 0, 1, 2]


def test_iterations_shuffle_finite_data_in_every_pass(
    data, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(
        PressCtrlC,
        'before_train_iter',
        lambda hook, runner, batch_idx, data_batch: shown.extend(
            one.img_id for one in data_batch['data_samples']
        ),
    )
    cfg = config(data, tmp_path, 'iterations, finite passes')
    cfg.custom_hooks = [dict(type='PressCtrlC')]
    runs.train(cfg)
    first, second = shown[:6], shown[6:]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second


def test_a_stopped_accumulation_keeps_its_gradients(uninterrupted):
    _, folder = uninterrupted('gradients accumulated')
    waiting = read_checkpoint(folder / 'iter_3.pth')[resume.KEY]['ranks'][0]
    done = read_checkpoint(folder / 'iter_4.pth')[resume.KEY]['ranks'][0]
    assert waiting['gradients']
    assert 'gradients' not in done

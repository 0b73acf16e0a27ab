"""Losses and gradients that are not numbers: stopped, skipped, replayed."""

import copy
from functools import partial

import pytest
import runs
import tiny
import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from torch import nn

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.distillers.guard import OVERFLOWS, Guard
from mmkd.engine.finite import FiniteLossHook, largest
from mmkd.engine.replay import blame, load_batch
from mmkd.engine.trainer import Trainer

data, quick_starts = runs.data, runs.quick_starts

NAN = float('nan')


class NoGradient(torch.autograd.Function):
    """The value as it is; its gradient is no number."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * NAN


def wrap(module, name, change):
    """Change what a method returns; what is returned undoes it."""
    plain = getattr(module, name)
    setattr(
        module, name, lambda *given, **named: change(plain(*given, **named))
    )
    return partial(delattr, module, name)


def nan_loss(model, batch):
    """The student's second level."""

    def spoil(losses):
        losses['loss_cls'][1] = losses['loss_cls'][1] * NAN
        return losses

    return wrap(model.bbox_head, 'loss', spoil)


def nan_gradient(model, batch):
    """Of one convolution; every loss is finite."""
    parameter = model.neck.fpn_convs[1].conv.weight
    return parameter.register_hook(lambda gradient: gradient * NAN).remove


def nan_term(model, batch):
    """The last of the term's levels."""
    return wrap(model.terms.pkd.losses[2], 'forward', lambda loss: loss * NAN)


def nan_gradient_of_term(model, batch):
    return wrap(model.terms.pkd, 'forward', NoGradient.apply)


def nan_weights(model, batch):
    """Of BatchNorm, whose statistics further up are broken by them."""
    weight = model.backbone.bn1.weight
    before = weight.detach().clone()
    weight.data.fill_(NAN)
    return partial(weight.data.copy_, before)


def nan_boxes(model, batch):
    """Boxes whose right side is on the left: a logarithm that is none."""
    Break.seen['batch'] = copy.deepcopy(batch)
    boxes = batch['data_samples'][0].gt_instances.bboxes.tensor
    boxes[:, 2] = boxes[:, 0] - 9


WAYS = (
    *(nan_loss, nan_gradient, nan_term, nan_gradient_of_term),
    *(nan_weights, nan_boxes),
)


@HOOKS.register_module()
class Break(Hook):
    """Breaks some iterations, and notes what each has changed."""

    priority = 'LOWEST'
    seen = {}

    def __init__(self, when):
        ways = {way.__name__: way for way in WAYS}
        self.when = {int(key[1:]): ways[one] for key, one in when.items()}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.before, self.undo = self.state(runner), None
        if runner.iter in self.when:
            self.undo = self.when[runner.iter](runner.model, data_batch)

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        if self.undo:
            self.undo()
        self.seen[runner.iter] = runs.differences(
            self.before, self.state(runner)
        )

    def state(self, runner):
        found = runs.state(runner)
        return copy.deepcopy({key: found[key] for key in ALL})


ALL = {'weights', 'optimizer', 'averages', 'schedulers'}


def parts(found):
    """What the paths begin with."""
    return {one.split('.')[1].split('[')[0] for one in found}


@pytest.fixture
def config(data, tmp_path, teachers, terms):
    """A training with iterations that are broken, counted from 0."""

    def config(when, iters, name='run', taught=True, **hook):
        Break.seen.clear()
        model = tiny.retinanet()
        if taught:
            model = tiny.distilled(model, teachers, terms)
        cfg = runs.config(data, tmp_path / name, iters=iters, model=model)
        when = {f'i{key}': way.__name__ for key, way in when.items()}
        cfg.custom_hooks = [
            dict(type='EMAHook', momentum=0.1),
            dict(type='Break', when=when),
            *([dict(type='mmkd.FiniteLossHook', **hook)] if hook else []),
        ]
        return cfg

    return config


# Stop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('how', 'said'),
    [
        (nan_loss, r'^loss_cls of level 1 = nan at iteration 3'),
        (
            nan_gradient,
            r'^All losses are finite, and the gradient of '
            r'neck\.fpn_convs\.1\.conv\.weight is not at iteration 3',
        ),
        (
            nan_term,
            r'^loss_kd_pkd = nan, term pkd at level 2 = nan at iteration 3'
            r'.*Only distillation terms',
        ),
    ],
)
def test_the_message_names_what_where_and_when(how, said, config, tmp_path):
    cfg = config({2: how}, iters=4, taught=how is nan_term)
    with pytest.raises(FloatingPointError, match=said):
        runs.train(cfg)
    saved = [read_checkpoint(one) for one in (tmp_path / 'run').glob('iter*')]
    assert {one['meta']['iter'] for one in saved} == {1, 2}
    for one in saved:
        assert all(w.isfinite().all() for w in one['state_dict'].values())


def test_a_last_step_that_is_broken_is_noticed_without_a_checkpoint(config):
    cfg = config({1: nan_gradient}, iters=2, taught=False)
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    with pytest.raises(FloatingPointError, match='iteration 2'):
        runs.train(cfg)


def test_a_hook_of_the_config_stands_alone(config):
    """Another one beside it would stop what it skips."""
    cfg = config({}, iters=1, taught=False)
    cfg.custom_hooks = [dict(type='mmkd.FiniteLossHook', policy='skip')]
    found = [
        hook.policy
        for hook in Trainer.from_cfg(cfg).hooks
        if isinstance(hook, FiniteLossHook)
    ]
    assert found == ['skip']


def test_nothing_waits_for_the_device(monkeypatch):
    """No value is read while a step is watched."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    hook = FiniteLossHook()
    hook._gradients = [('weight', weight)]

    def refuse(*arguments):
        raise AssertionError('reads a value of the device')

    with monkeypatch.context() as patch:
        for name in ('tolist', 'item', '__bool__', '__float__', 'cpu', 'to'):
            patch.setattr(torch.Tensor, name, refuse)
        hook.guard.watch(dict(loss=[torch.ones(2), torch.ones(())]), 0)
        assert hook.may_step(None)
        with pytest.raises(AssertionError):
            hook.guard.check()
    weight.grad[1] = NAN
    hook.may_step(None)
    with pytest.raises(FloatingPointError, match='gradient of weight'):
        hook.guard.check()


def test_sizes_of_gradients_are_their_largest_values():
    parameters = [(str(n), nn.Parameter(torch.zeros(2))) for n in range(5)]
    values = [[-3.0, 1.0], [NAN, 1.0], [1.0, float('inf')], [2e38, 2e38]]
    for (_, one), value in zip(parameters, values):
        one.grad = torch.tensor(value)
    empty = nn.Parameter(torch.zeros(0, 2))
    empty.grad = torch.zeros(0, 2)
    names, sizes = largest([('empty', empty), *parameters])
    assert names == ['0', '1', '2', '3']
    assert sizes.isfinite().tolist() == [True, False, False, True]


# Skip ------------------------------------------------------------------------


def test_a_skipped_step_leaves_all_as_it_was_and_says_why(config, tmp_path):
    broken = {
        1: nan_loss,
        2: nan_weights,
        4: nan_term,
        6: nan_gradient_of_term,
        7: nan_gradient,
    }
    cfg = config(broken, iters=9, policy='skip', limit=2)
    cfg.model.backbone.norm_eval = False  # its statistics move
    cfg.default_hooks.checkpoint.interval = 9
    trainer = Trainer.from_cfg(cfg)
    said = []
    trainer.logger.warning = said.append
    trainer.train()
    found = dict(Break.seen)
    assert {key: one for key, one in found.items() if key in broken} == {
        key: [] for key in broken
    }
    for key in set(range(9)) - set(broken):
        assert parts(found[key]) == ALL
    said = [one for one in said if 'skipped' in one]
    for line, (key, what, row) in zip(
        said,
        [
            (1, 'loss_cls of level 1 = nan', 1),
            (2, 'loss_cls of level 0 = nan', 2),
            (4, 'loss_kd_pkd = nan, term pkd at level 2 = nan', 1),
            (6, '(that of loss_kd_pkd)', 1),
            # As a sum only, for it is broken where all of them add up.
            (7, 'gradient of neck.fpn_convs.1.conv.weight is not', 2),
        ],
        strict=True,
    ):
        assert what in line
        assert f'at iteration {key + 1}.' in line
        assert f'number {row} in a row of at most 2' in line
    assert len(list((tmp_path / 'run').glob('non_finite_*'))) == 1


def test_one_more_than_the_limit_in_a_row_stops_even_if_resumed(
    config, tmp_path
):
    few = dict(policy='skip', limit=2)
    broken = dict.fromkeys(range(4), nan_gradient)
    with pytest.raises(
        FloatingPointError, match='iteration 3. 2 steps before it were skipped'
    ):
        runs.train(config(broken, 4, taught=False, **few))
    cfg = config(broken, 4, name='second', taught=False, **few)
    with pytest.raises(FloatingPointError, match='iteration 3. 2 steps'):
        runs.train(cfg, resume=tmp_path / 'run' / 'iter_2.pth')


def test_gradients_that_add_up_are_skipped_together(config):
    cfg = config({2: nan_loss}, iters=6, taught=False, policy='skip')
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.default_hooks.checkpoint.interval = 3  # between the two
    trainer = Trainer.from_cfg(cfg)
    said = []
    trainer.logger.warning = said.append
    trainer.train()
    (line,) = [one for one in said if 'skipped' in one]
    assert line.startswith('loss_cls of level 1 = nan in iteration 3 at iter')
    stepped = [
        key
        for key, found in Break.seen.items()
        if '.weights.backbone.conv1.weight' in found
    ]
    assert stepped == [1, 5]
    weights = trainer.model.state_dict().values()
    assert all(one.isfinite().all() for one in weights)


@pytest.mark.slow
def test_a_run_in_which_nothing_breaks_is_the_same_under_either(config):
    ends = [
        runs.train(config({}, iters=3, name=policy, policy=policy))
        for policy in ('stop', 'skip')
    ]
    assert runs.differences(*ends) == []


# A loss scaler ---------------------------------------------------------------


@OPTIM_WRAPPERS.register_module()
class ScaledOnTheHost(AmpOptimWrapper):
    """MMEngine's own asks for a GPU; this one has the scaler alone."""

    def __init__(self, scale, **settings):
        OptimWrapper.__init__(self, **settings)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        self._scale_update_param = None

    def optim_context(self, model):
        return OptimWrapper.optim_context(self, model)


def scaled(cfg, scale):
    cfg.optim_wrapper.update(type='ScaledOnTheHost', scale=scale)
    return cfg


@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_what_a_scaler_lets_overflow_is_its_own_affair(policy, config):
    scale = 2.0**127
    cfg = config({}, iters=3, taught=False, policy=policy, limit=1)
    # So large that it overflows each time.
    cfg.model.bbox_head.loss_cls.loss_weight = 100.0
    end = runs.train(scaled(cfg, scale))  # nothing is raised
    assert end['optimizer']['loss_scaler']['scale'] == scale / 2**3
    for found in Break.seen.values():
        assert '.optimizer.loss_scaler.scale' in found
        assert '.weights.backbone.conv1.weight' not in found
        if policy == 'skip':
            assert parts(found) == {'optimizer'}


def test_a_loss_that_is_no_number_has_not_been_scaled(config):
    with pytest.raises(FloatingPointError, match=r'loss_cls.*iteration 1'):
        runs.train(scaled(config({0: nan_loss}, 2, taught=False), 2.0))
    cfg = config({0: nan_loss}, 2, name='skip', taught=False, policy='skip')
    end = runs.train(scaled(cfg, 2.0))
    assert Break.seen[0] == []
    assert end['optimizer']['loss_scaler']['scale'] == 2.0


def test_gradients_that_no_scale_mends_stop():
    def overflow(size=float('inf'), scaled=True):
        guard.watch_gradients(['weight'], torch.tensor([size]), scaled)
        guard.check()

    guard = Guard()
    for _ in range(OVERFLOWS):
        overflow()
    overflow(1.0)  # a step that did not begins the count anew
    for _ in range(OVERFLOWS):
        overflow()
    with pytest.raises(FloatingPointError, match='gradient of weight'):
        overflow()


# Replay ----------------------------------------------------------------------


def test_the_batch_that_led_there_breaks_the_model_again(config, tmp_path):
    cfg = config({1: nan_boxes}, iters=3, taught=False)
    # Seen in the next step, and not before something is saved.
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    with pytest.raises(FloatingPointError, match='non_finite_iter_2.pth'):
        runs.train(cfg)
    found = load_batch(tmp_path / 'run' / 'non_finite_iter_2.pth')
    batch, clean = found['batch'], Break.seen['batch']
    assert found['iteration'] == 2
    assert 'loss_bbox' in found['what']
    assert found['sizes'] == [tuple(one.shape) for one in clean['inputs']]
    assert runs.differences(clean['inputs'], batch['inputs']) == []
    for one, was in zip(batch['data_samples'], clean['data_samples']):
        assert one.img_path == was.img_path
        assert one.img_shape == was.img_shape
        assert torch.equal(one.gt_instances.labels, was.gt_instances.labels)
    model = tiny.build(tiny.retinanet())
    model.init_weights()
    model.train()
    assert any('loss_bbox' in one for one in blame(model, batch))
    assert blame(model, clean) == []


def test_what_is_no_batch_is_refused(tmp_path):
    torch.save(dict(meta=1), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='expected a batch.*got meta'):
        load_batch(tmp_path / 'other.pth')


def test_a_batch_that_cannot_be_written_does_not_hide_what_is_broken(
    config, monkeypatch
):
    def full(*arguments, **settings):
        raise OSError('No space left on device')

    monkeypatch.setattr('mmkd.engine.finite.save_batch', full)
    with pytest.raises(
        FloatingPointError, match='loss_cls.*could not be written.*No space'
    ):
        runs.train(config({0: nan_loss}, iters=1, taught=False))


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        (dict(policy='skipp'), "no policy 'skipp'. Did you mean 'skip'"),
        (dict(limit=0), 'limit to be a whole number of at least 1, got 0'),
        (dict(batches=-1), 'batches to be a whole number of at least 0'),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        FiniteLossHook(**settings)

import logging

import pytest
import runs
import tiny
import torch
from mmengine.logging import MMLogger
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmkd.engine.diagnostics import DiagnosticsHook, by_term
from mmkd.engine.first_step import (
    DETECTION,
    FirstStepHook,
    Push,
    counting,
    judged,
    measure,
    trained,
)
from mmkd.engine.trainer import Trainer
from mmkd.terms.balanced import detection_loss

data, quick_starts = runs.data, runs.quick_starts

PKD = dict(
    type='mmkd.FeatureTerm',
    teacher='big',
    levels=(0, 1),
    loss=dict(type='mmkd.PKDLoss', loss_weight=3.0),
)
LATE = dict(type='mmkd.LinearWarmup', end=0.5)


def distilled(teachers, terms, **settings):
    return tiny.distilled(tiny.retinanet(), teachers, terms, **settings)


@pytest.fixture
def build(teachers):
    def build(**terms):
        model = tiny.build(distilled(teachers, terms))
        model.init_weights()
        return model.train()

    return build


class Watch:
    paths = ()

    def __init__(self, model, **settings):
        self.model, self.settings = model, settings

    def __call__(self, step, losses):
        found = measure(self.model, step.losses, losses, **self.settings)
        self.pushes = {one.name: one for one in found}


def watched(model):
    model.observer = Watch(model)
    losses = model.loss(*tiny.batch())
    return losses, model.observer.pushes


# Measuring -------------------------------------------------------------------


def test_gradients_are_those_of_a_backward_pass_of_each_loss_alone(build):
    model = build(pkd=PKD)
    losses, pushes = watched(model)
    own = {name: one for name, one in losses.items() if 'kd' not in name}
    for name, one in (
        ('pkd', losses['loss_kd_pkd']),
        (DETECTION, detection_loss(own)),
    ):
        model.zero_grad()
        one.backward(retain_graph=True)
        norm = torch.stack(
            [
                each.grad.norm()
                for each in trained(model)
                if each.grad is not None
            ]
        ).norm()
        assert pushes[name].gradient == pytest.approx(float(norm), rel=1e-4)
        assert pushes[name].value == pytest.approx(float(one))


def test_the_same_loss_twice_points_where_it_points(build):
    _, pushes = watched(build(one=PKD, other=PKD))
    one, other = pushes['one'], pushes['other']
    assert one.gradient == pytest.approx(other.gradient)
    assert one.cosine == pytest.approx(other.cosine)
    total = sum(each.gradient for each in pushes.values())
    assert one.part == pytest.approx(one.gradient / total)


def test_a_term_inside_of_a_group_is_a_row_of_its_own(build):
    group = dict(type='mmkd.BalancedTerm', terms=dict(a=PKD, b=PKD), share=0.5)
    _, pushes = watched(build(group=group))
    assert list(pushes) == [DETECTION, 'group_a', 'group_b']


def checkpointed(model, reentrant):
    """Activations of the first stage are computed again when needed."""
    stage = model.backbone.layer1
    forward = stage.forward
    stage.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)


@pytest.mark.parametrize('reentrant', [True, False])
def test_activations_computed_again_are_counted_once(build, reentrant):
    """Neither gradients nor statistics differ from those of plain layers."""
    found = []
    for number in range(3):
        model = build(pkd=PKD)
        model.backbone.norm_eval = False  # statistics learn
        model.train()
        if number:
            checkpointed(model, reentrant)
        if number < 2:
            model.observer = Watch(model, alone=True)
        model.loss(*tiny.batch())
        found.append((model.observer, model.state_dict()))
    (plain, _), (again, watched), (_, unwatched) = found
    for name, push in plain.pushes.items():
        other = again.pushes[name].gradient
        assert other == pytest.approx(push.gradient, rel=1e-4)
    assert runs.differences(watched, unwatched) == []
    assert all(one.grad is None for one in model.parameters())


def test_a_training_is_not_measured_by_a_backward_pass_of_its_own(build):
    model = build(pkd=PKD)
    checkpointed(model, True)
    with pytest.raises(RuntimeError, match='use_reentrant'):
        watched(model)


def test_of_two_names_the_longer_one_owns_a_loss():
    terms = dict(kd=nn.Module(), kd_box=nn.Module())
    losses = dict(loss_kd_kd=1, loss_kd_kd_box=2, kd_kd_seen=3, loss_cls=4)
    assert by_term(terms, losses) == dict(
        kd=dict(loss_kd_kd=1), kd_box=dict(loss_kd_kd_box=2)
    )


def test_what_counts_follows_weight_schedule_and_phase(teachers):
    silent = dict(PKD, loss=dict(PKD['loss'], loss_weight=0.0))
    model = tiny.build(
        distilled(
            teachers,
            dict(pkd=PKD, late=dict(PKD, schedule=LATE), silent=silent),
            phases=[
                dict(length=1, terms=('late', 'silent')),
                dict(length=1, terms=('pkd', 'late', 'silent')),
            ],
        )
    )
    assert counting(model, 0.0) == dict(pkd=False, late=False, silent=False)
    assert counting(model, 0.3) == dict(pkd=False, late=True, silent=False)
    assert counting(model, 0.7) == dict(pkd=True, late=True, silent=False)


def test_what_counts_in_a_group_follows_schedules_of_both(teachers):
    group = dict(
        type='mmkd.BalancedTerm',
        terms=dict(a=PKD, b=dict(PKD, schedule=LATE)),
        schedule=dict(type='mmkd.StopAfter', fraction=0.5),
    )
    model = tiny.build(distilled(teachers, dict(g=group)))
    assert counting(model, 0.0) == dict(g=True, g_a=True, g_b=False)
    assert counting(model, 0.3) == dict(g=True, g_a=True, g_b=True)
    assert counting(model, 0.7) == dict(g=False, g_a=False, g_b=False)


# Judging, by hand ------------------------------------------------------------


def pushes(*parts, name='x', **settings):
    """A detector and a term that push as hard as is said."""
    total = sum(parts)
    return [
        Push(one, 1.0, 0.5, part, part / total, None, **settings)
        for one, part in zip((DETECTION, name), parts)
    ]


@pytest.mark.parametrize(('times', 'named'), [(99.0, False), (101.0, True)])
def test_a_hundred_times_the_rest_is_too_much(build, times, named):
    found = judged(pushes(1.0, times), build(x=PKD), dict(x=PKD))
    assert bool(found) is named


def test_the_weight_to_type_brings_a_term_to_the_rest(build):
    (found,) = judged(pushes(1.0, 200.0), build(x=PKD), dict(x=PKD))
    # 3 / 200
    assert found.remedy.endswith('model.terms.x.loss.loss_weight=0.015')


def test_a_weight_inside_of_a_group_is_found(build):
    group = dict(type='mmkd.BalancedTerm', terms=dict(a=PKD))
    (found,) = judged(
        pushes(1.0, 300.0, name='group_a'), build(x=PKD), dict(group=group)
    )
    assert found.remedy.endswith(
        'model.terms.group.terms.a.loss.loss_weight=0.01'
    )


def test_a_large_value_that_does_not_push_is_a_note(build):
    rows = [
        Push(DETECTION, 1.0, 0.001, 1.0, 0.5, None),
        Push('x', 999.0, 0.999, 1.0, 0.5, 0.0),
    ]
    (found,) = judged(rows, build(x=PKD), dict(x=PKD))
    assert (found.mark, found.about) == ('note', 'x')
    assert '999 times the rest of the loss' in found.text


def test_one_batch_of_nothing_condemns_no_term(build):
    model, rows = build(x=PKD), pushes(1.0, 0.0)
    (once,) = judged(rows, model, dict(x=PKD))
    (again,) = judged(rows, model, dict(x=PKD), again=True)
    assert (once.mark, again.mark) == ('warn', 'fail')


# A training ------------------------------------------------------------------


@pytest.fixture
def said():
    """What a training logs as a warning, or worse."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(
        (record.levelname, record.getMessage())
    )
    return lines, handler


def run(cfg, *hooks, handler=None):
    trainer = Trainer.from_cfg(cfg)
    for hook in hooks:
        trainer.register_hook(hook)
    if handler is not None:
        logger = MMLogger.get_current_instance()
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    trainer.train()
    return runs.state(trainer)


def test_a_training_is_the_same_with_and_without(
    data, tmp_path, teachers, said
):
    """Bit for bit, with a term that begins late and other observers."""
    states, (lines, handler) = [], said
    for number, hooks in enumerate([(), (FirstStepHook(),)]):
        terms = dict(pkd=PKD, late=dict(PKD, schedule=LATE))
        cfg = runs.config(
            data,
            tmp_path / str(number),
            epochs=1,
            model=distilled(teachers, terms),
        )
        hooks = (DiagnosticsHook(interval=2), *hooks)
        states.append(run(cfg, *hooks, handler=handler))
        looked = [text for _, text in lines if text.startswith('Iteration')]
        assert bool(looked) is bool(number)
    assert runs.differences(*states) == []
    # Looked at when it begins, and the other not again.
    assert [text.partition(':')[0] for text in looked] == [
        'Iteration 1, detection',
        'Iteration 1, pkd',
        'Iteration 2, detection',
        'Iteration 2, pkd',
        'Iteration 2, late',
    ]
    measured = [
        len((tmp_path / str(number) / 'diagnostics.json').read_text())
        for number in (0, 1)
    ]
    assert measured[0] == measured[1] > 0


def test_a_heavy_term_is_a_warning_in_the_log(data, tmp_path, teachers, said):
    lines, handler = said
    heavy = dict(PKD, loss=dict(type='mmkd.PKDLoss', loss_weight=1e4))
    cfg = runs.config(
        data,
        tmp_path / 'run',
        epochs=None,
        iters=2,
        model=distilled(teachers, dict(heavy=heavy)),
    )
    run(cfg, FirstStepHook(), handler=handler)
    (warning,) = [
        text for level, text in lines if level == 'WARNING' and 'heavy' in text
    ]
    assert 'model.terms.heavy.loss.loss_weight=' in warning
    looked = [text for _, text in lines if text.startswith('Iteration')]
    assert [one.partition(',')[0] for one in looked] == ['Iteration 1'] * 2


def test_a_plain_student_has_nothing_to_look_at(data, tmp_path):
    run(
        runs.config(data, tmp_path / 'run', epochs=None, iters=1),
        FirstStepHook(),
    )

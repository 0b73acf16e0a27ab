import json
from types import SimpleNamespace

import pytest
import tiny
import torch

from mmkd.engine.diagnostics import FILE, DiagnosticsHook
from mmkd.terms.balanced import detection_loss

PKD = dict(
    type='mmkd.FeatureTerm',
    teacher='big',
    levels=(0, 1),
    loss=dict(type='mmkd.PKDLoss', loss_weight=3.0),
)


@pytest.fixture
def build(tmp_path):
    def build(**terms):
        teacher = tiny.retinanet()
        file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        model = tiny.build(
            tiny.distilled(tiny.retinanet(), dict(big=big), terms)
        )
        model.init_weights()
        return model.train()

    return build


class Visualizer:
    def __init__(self):
        self.lines = []

    def add_scalars(self, values, step):
        self.lines.append((step, values))


def one_step(model, tmp_path, hook=None, iteration=0):
    """A training step as the runner makes it, without the optimiser."""
    runner = SimpleNamespace(
        model=model,
        iter=iteration,
        visualizer=Visualizer(),
        work_dir=str(tmp_path),
    )
    if hook is not None:
        hook.before_train_iter(runner, iteration)
    losses = model.loss(*tiny.batch())
    tiny.total(losses).backward()
    if hook is not None:
        hook.after_train_iter(runner, iteration)
    return losses, runner.visualizer.lines


def test_takes_no_part_in_the_training(build, tmp_path):
    grads = []
    for hook in (None, DiagnosticsHook(interval=1)):
        model = build(pkd=PKD)
        torch.manual_seed(0)
        one_step(model, tmp_path, hook)
        grads.append([one.grad for one in model.parameters()])
        assert model.observer is None
    for one, other in zip(*grads):
        assert (one is None and other is None) or torch.equal(one, other)


def test_measures_at_its_interval_only(build, tmp_path):
    model, hook = build(pkd=PKD), DiagnosticsHook(interval=10)
    assert one_step(model, tmp_path, hook, 0)[1]
    assert not one_step(model, tmp_path, hook, 5)[1]
    assert one_step(model, tmp_path, hook, 10)[1]
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(one)['iteration'] for one in lines] == [1, 11]


def test_share_and_agreement_are_what_the_losses_say(build, tmp_path):
    model = build(pkd=PKD)
    losses, lines = one_step(model, tmp_path, DiagnosticsHook(interval=1))
    found = lines[0][1]
    total = detection_loss(losses)
    assert found['diagnostics/pkd_share'] == pytest.approx(
        float(losses['loss_kd_pkd'] / total)
    )
    # PKD is weight * sum over levels of one minus the correlation.
    levels = [found[f'diagnostics/pkd_agreement_{one}'] for one in (0, 1)]
    assert 3 * (2 - sum(levels)) == pytest.approx(
        float(losses['loss_kd_pkd']), rel=1e-4
    )


def test_twice_the_weight_is_twice_the_gradient_in_one_direction(
    build, tmp_path
):
    found = []
    for weight in (3.0, 6.0):
        term = dict(PKD, loss=dict(PKD['loss'], loss_weight=weight))
        _, lines = one_step(
            build(pkd=term), tmp_path, DiagnosticsHook(interval=1)
        )
        found.append(lines[0][1])
    one, other = found
    key = 'diagnostics/pkd_gradient'
    assert other[key] == pytest.approx(2 * one[key], rel=1e-4)
    key = 'diagnostics/pkd_cosine'
    assert other[key] == pytest.approx(one[key], rel=1e-3)
    assert -1 <= one[key] <= 1


def test_a_balanced_group_shows_the_share_that_was_asked_for(build, tmp_path):
    group = dict(type='mmkd.BalancedTerm', terms=dict(pkd=PKD), share=0.25)
    _, lines = one_step(
        build(group=group), tmp_path, DiagnosticsHook(interval=1)
    )
    found = lines[0][1]
    assert found['diagnostics/group_pkd_gradient'] == pytest.approx(
        0.25, rel=1e-3
    )
    assert 'diagnostics/group_pkd_agreement_1' in found


def test_a_student_with_its_teachers_weights_agrees_on_scores(build, tmp_path):
    model = build(pkd=PKD)
    big = model.teachers['big']
    model.load_state_dict(big.detector.state_dict(), strict=False)
    model.eval()  # the teacher's BatchNorm counts, not the batch's
    _, lines = one_step(model, tmp_path, DiagnosticsHook(interval=1))
    assert lines[0][1]['diagnostics/big_scores'] == pytest.approx(1, abs=1e-4)
    assert lines[0][1]['diagnostics/pkd_agreement_0'] == pytest.approx(
        1, abs=1e-4
    )


def test_a_plain_student_is_left_alone(tmp_path):
    model = tiny.build(tiny.retinanet())
    hook = DiagnosticsHook(interval=1)
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_run(runner)
    hook.before_train_iter(runner, 0)
    assert not hasattr(model, 'observer')


def test_a_group_that_shows_its_terms_another_teacher_is_left_whole(
    build, tmp_path
):
    """What its terms compare is not in the step."""
    terms = dict(m=dict(PKD, teacher='self'))
    model = build(own=dict(type='mmkd.SelfTerm', terms=terms), pkd=PKD)
    _, lines = one_step(model, tmp_path, DiagnosticsHook())
    found = lines[0][1]
    assert 'diagnostics/pkd_agreement_0' in found
    assert 'diagnostics/own_m_share' in found
    assert 'diagnostics/own_m_agreement_0' not in found

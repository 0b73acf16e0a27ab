import copy

import pytest
import tiny
import torch

from mmkd.losses.mimic import mimic_loss
from mmkd.terms.self_teaching import plain_copy

MIMIC = dict(
    type='mmkd.FeatureTerm', teacher='self', loss=dict(type='mmkd.MimicLoss')
)


@pytest.fixture
def hub(hub):
    """Says which iteration it is."""
    hub.update_info('max_iters', 100)
    hub.update_info('iter', 0)
    return hub


def build(teachers=None, terms=None, **settings):
    term = dict(
        type='mmkd.SelfTerm',
        terms=terms or dict(mimic=MIMIC),
        average=dict(type='ExponentialMovingAverage', momentum=0.25),
    )
    return tiny.build(
        tiny.distilled(
            tiny.retinanet(), teachers or {}, dict(x=dict(term, **settings))
        )
    ).train()


def average(model):
    return model.terms['x'].average.module


def shaken(model, seed=1):
    """Other weights and buffers, as after a step of the optimiser."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, one in model.state_dict().items():
            if not name.startswith('terms.') and one.is_floating_point():
                one += 0.01 * torch.rand_like(one)


def weights(model):
    return {
        name: one.clone()
        for name, one in model.state_dict().items()
        if not name.startswith('terms.')
    }


def test_it_begins_as_the_student_and_then_follows(hub):
    model = build()
    batch = tiny.batch()
    shaken(model)
    model.eval()  # BatchNorm's buffers stay what they are
    model.terms['x'].training = True
    first = weights(model)
    model.loss(*batch)
    for name, one in average(model).state_dict().items():
        assert torch.equal(one, first[name]), name
    shaken(model, 2)
    second = weights(model)
    hub.update_info('iter', 1)
    model.loss(*batch)
    for name, one in average(model).state_dict().items():
        if one.is_floating_point():
            expected = 0.75 * first[name] + 0.25 * second[name]
            torch.testing.assert_close(one, expected)


def test_it_follows_once_an_iteration(hub):
    model = build()
    model.loss(*tiny.batch())
    shaken(model)
    before = weights(average(model))
    model.loss(*tiny.batch())
    after = average(model).state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_the_loss_is_the_distance_to_the_average(hub):
    model = build()
    images, samples = tiny.batch()
    model.loss(images, samples)
    shaken(model)
    hub.update_info('iter', 1)
    loss = model.loss(images, samples)['loss_kd_x_mimic']
    with torch.no_grad():
        own = copy.deepcopy(model).extract_feat(images)
        theirs = average(model).extract_feat(images)
    expected = sum(mimic_loss(*pair) for pair in zip(own, theirs))
    assert loss > 0
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_only_the_student_learns(hub):
    model = build()
    model.loss(*tiny.batch())
    shaken(model)
    model.loss(*tiny.batch())['loss_kd_x_mimic'].backward()
    assert model.backbone.conv1.weight.grad.any()
    for one in average(model).parameters():
        assert one.grad is None
        assert not one.requires_grad


def test_the_average_stays_in_eval_mode():
    model = build().train()
    assert model.terms['x'].training
    assert not any(one.training for one in average(model).modules())


def test_nothing_changes_outside_of_training(hub):
    model = build()
    model.loss(*tiny.batch())
    model.eval()
    shaken(model)
    before = weights(average(model))
    hub.update_info('iter', 1)
    model.loss(*tiny.batch())
    after = average(model).state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_a_stopped_run_goes_on_with_its_average(hub):
    model = build()
    model.loss(*tiny.batch())
    shaken(model)
    hub.update_info('iter', 1)
    model.loss(*tiny.batch())
    other = build()
    other.load_state_dict(model.state_dict())
    hub.update_info('iter', 2)
    for one in (model, other):
        shaken(one, 3)
        one.loss(*tiny.batch())
    found, expected = (average(one).state_dict() for one in (other, model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_rest_of_the_checkpoint_is_the_student():
    model, plain = build(), tiny.build(tiny.retinanet())
    assert weights(model).keys() == plain.state_dict().keys()
    plain.load_state_dict(weights(average(model)))


def test_beside_a_teacher_of_the_distillers(hub, teachers):
    terms = dict(
        own=MIMIC,
        other=dict(MIMIC, teacher='big', levels=(0, 1)),
    )
    model = build(teachers, terms)
    model.teachers.load()
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_x_other'] > 0
    assert model.terms['x'].teacher_names == ['big']
    assert losses['loss_kd_x_own'].isfinite()


def test_two_averages_do_not_mix(hub):
    slow = dict(type='ExponentialMovingAverage', momentum=0.01)
    model = tiny.build(
        tiny.distilled(
            tiny.retinanet(),
            {},
            {
                name: dict(
                    type='mmkd.SelfTerm', terms=dict(m=MIMIC), average=one
                )
                for name, one in dict(
                    fast=dict(slow, momentum=0.9), slow=slow
                ).items()
            },
        )
    ).train()
    model.loss(*tiny.batch())
    shaken(model)
    hub.update_info('iter', 1)
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_fast_m'] < losses['loss_kd_slow_m']


def test_mmdetections_own_averages_serve():
    average = dict(type='ExpMomentumEMA', momentum=0.0002, gamma=2000)
    model = build(average=average)
    assert model.terms['x'].average.gamma == 2000


def test_a_late_start_begins_with_the_student_as_it_is_then(hub):
    late = dict(
        type='mmkd.LinearDecay', begin=0.5, end=0.6, start=0.0, stop=1.0
    )
    model = build(schedule=late)
    model.loss(*tiny.batch())
    assert model.terms['x'].average.steps == 0
    shaken(model)
    hub.update_info('iter', 60)
    model.loss(*tiny.batch())
    assert torch.equal(
        average(model).backbone.conv1.weight, model.backbone.conv1.weight
    )


def test_the_copy_is_the_plain_detector():
    model = build()
    copied = plain_copy(model)
    plain = tiny.build(tiny.retinanet())
    assert type(copied) is type(plain)
    assert not hasattr(copied, 'terms')
    assert not hasattr(copied, 'teachers')
    assert 'x' in model.terms
    assert copied.state_dict().keys() == plain.state_dict().keys()


def test_its_name_must_be_free_and_used(teachers):
    with pytest.raises(ValueError, match="average 'big': a teacher has"):
        build(teachers, name='big')
    other = dict(MIMIC, teacher='big', levels=(0, 1))
    with pytest.raises(ValueError, match="Write teacher='self' in one"):
        build(teachers, terms=dict(other=other))


def test_a_misspelt_tap_is_noticed_at_once():
    terms = dict(mimic=dict(MIMIC, tap='nek'))
    with pytest.raises(ValueError, match="'nek' to tap.*'neck'"):
        build(terms=terms)

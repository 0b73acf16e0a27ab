import copy

import pytest
import tiny
import torch
from test_contracts import pretended, pretending

from mmkd.losses.mimic import mimic_loss
from mmkd.structures import Step
from mmkd.taps import Record
from mmkd.terms.balanced import BalancedTerm, detection_loss

MIMIC = dict(
    type='mmkd.FeatureTerm', teacher='big', loss=dict(type='mmkd.MimicLoss')
)


class Outputs:
    """Outputs of one pass by tap."""

    size = None

    def __init__(self, **values):
        self.values = values

    def at(self, path):
        return self.values[path]


def step_of(maps, neck=None, iteration=0, losses=None, target=None, dry=False):
    """A step whose detection loss is 3 times the sum of its maps."""
    if losses is None:
        losses = dict(loss_cls=3 * maps.sum(), acc=maps.sum())
    target = torch.zeros_like(maps) if target is None else target
    return Step(
        student=Outputs(
            backbone=(maps,), neck=(maps if neck is None else neck,)
        ),
        images=torch.zeros(2, 3, 8, 8),
        samples=tiny.batch()[1],
        iteration=iteration,
        losses=losses,
        dry=dry,
        teachers=dict(big=lambda images, grad: Outputs(neck=(target,))),
    )


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 3).requires_grad_()


def length(loss, maps):
    return torch.autograd.grad(loss, maps, retain_graph=True)[0].norm()


@pytest.mark.parametrize('share', [0.5, 1.0, 4.0])
def test_a_term_pushes_as_hard_as_stated(maps, share):
    term = BalancedTerm(dict(mimic=MIMIC), share=share)
    step = step_of(maps)
    part = term(step)['mimic']
    detection = 3 * maps.numel() ** 0.5  # each derivative is 3
    torch.testing.assert_close(
        length(part, maps), torch.tensor(share * detection)
    )


def test_the_weight_is_the_ratio_of_the_norms_by_hand():
    maps = torch.full((1, 1, 2, 2), 5.0, requires_grad=True)
    term = BalancedTerm(dict(mimic=MIMIC))
    parts = term(step_of(maps))
    # |dL_det| = 3 * 2; mimic is the mean of 5^2, its derivative 2 * 5 / 4.
    assert parts['watch_weight_mimic'].item() == pytest.approx(6 / 5)
    assert parts['mimic'].item() == pytest.approx(6 / 5 * 25)


def test_the_unit_of_a_loss_does_not_matter(maps):
    heavy = copy.deepcopy(MIMIC)
    heavy['loss']['loss_weight'] = 1000.0
    term = BalancedTerm(dict(light=MIMIC, heavy=heavy))
    parts = term(step_of(maps))
    torch.testing.assert_close(parts['light'], parts['heavy'])


def test_each_term_has_its_own_share_and_schedule(maps):
    fading = dict(MIMIC, schedule=dict(type='mmkd.LinearDecay'))
    term = BalancedTerm(
        dict(one=MIMIC, two=MIMIC, fading=fading), share=dict(two=0.25)
    )
    step = step_of(maps)
    step.progress = 0.5
    parts = term(step)
    torch.testing.assert_close(parts['two'], 0.25 * parts['one'])
    torch.testing.assert_close(parts['fading'], 0.5 * parts['one'])


def test_norms_are_measured_at_the_interval_and_averaged(maps):
    term = BalancedTerm(dict(mimic=MIMIC), interval=2, momentum=0.75)
    term(step_of(maps, iteration=0))
    norm = length(mimic_loss(maps, torch.zeros_like(maps)), maps)
    torch.testing.assert_close(term.norms[0], norm)
    louder = dict(loss=9 * maps.sum())
    term(step_of(maps, iteration=1, losses=louder))  # not looked at
    root = maps.numel() ** 0.5
    torch.testing.assert_close(term.detection_norm, torch.tensor(3 * root))
    term(step_of(maps, iteration=2, losses=louder))
    torch.testing.assert_close(
        term.detection_norm, torch.tensor((0.75 * 3 + 0.25 * 9) * root)
    )


def test_a_nearly_fulfilled_term_pushes_as_hard_and_no_harder(maps):
    term = BalancedTerm(dict(mimic=MIMIC), momentum=0.0)
    term(step_of(maps))
    near = maps.detach() * (1 - 1e-3)
    step = step_of(maps, iteration=20, target=near)
    torch.testing.assert_close(
        length(term(step)['mimic'], maps),
        torch.tensor(3 * maps.numel() ** 0.5),
        rtol=1e-3,
        atol=0,
    )


def test_a_fulfilled_term_keeps_its_weight(maps):
    term = BalancedTerm(dict(mimic=MIMIC), momentum=0.0)
    before = term(step_of(maps))['watch_weight_mimic']
    done = step_of(maps, iteration=20, target=maps.detach().clone())
    after = term(done)
    assert after['watch_weight_mimic'] == before
    assert after['mimic'] == 0


def test_a_broken_measurement_is_passed_over(maps):
    term = BalancedTerm(dict(mimic=MIMIC))
    before = term(step_of(maps))['watch_weight_mimic']
    broken = dict(loss=maps.sum() * float('inf'))
    after = term(step_of(maps, iteration=20, losses=broken))
    torch.testing.assert_close(after['watch_weight_mimic'], before)


def test_before_the_first_measurement_nothing_counts(maps):
    parts = BalancedTerm(dict(mimic=MIMIC))(step_of(maps, iteration=7))
    assert parts['mimic'] == 0


@pretending
def test_weights_do_not_wait_for_the_device():
    term = BalancedTerm(dict(mimic=MIMIC))
    with pretended():
        for name in ('detection_norm', 'norms'):
            there = torch.empty(getattr(term, name).shape, device='cuda')
            term._buffers[name] = there
        assert term.weights().device.type == 'cuda'


def test_a_dry_pass_measures_nothing(maps):
    term = BalancedTerm(dict(mimic=MIMIC))
    with torch.no_grad():
        term(step_of(maps, losses={}, dry=True))
    assert term.norms.tolist() == [0]


def test_a_loss_beside_the_anchor_is_an_error(maps):
    aside = torch.randn(2, 4, 3, 3, requires_grad=True)
    term = BalancedTerm(dict(mimic=MIMIC))
    term.name = 'recipe'
    with pytest.raises(RuntimeError, match=r"no part in 'mimic'.*anchor=…"):
        term(step_of(maps, neck=aside))


def test_a_frozen_anchor_is_an_error():
    term = BalancedTerm(dict(mimic=MIMIC))
    head = torch.ones(1, requires_grad=True)
    step = step_of(torch.ones(1, 1, 2, 2), losses=dict(loss=head.sum()))
    with pytest.raises(RuntimeError, match="anchor='neck'"):
        term(step)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(share=dict(mimc=1)), "Did you mean 'mimic'"),
        (dict(share=-1), 'shares of 0 or more'),
        (dict(momentum=1.0), r'momentum in \[0, 1\)'),
        (dict(interval=0), 'interval'),
    ],
)
def test_settings_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BalancedTerm(dict(mimic=MIMIC), **arguments)


def test_lists_of_losses_count_and_accuracies_do_not():
    one = torch.ones(2)
    losses = dict(loss_cls=[one, 2 * one], loss_box=one, acc=9 * one)
    assert detection_loss(losses) == 4


# In a detector ---------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    teacher = tiny.retinanet()
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    terms = dict(
        feature=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1),
            loss=dict(type='mmkd.PKDLoss'),
        ),
        response=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            levels=(0, 1),
            loss=dict(type='mmkd.CWDLoss'),
        ),
    )
    group = dict(type='mmkd.BalancedTerm', terms=terms, share=0.5)
    model = tiny.build(
        tiny.distilled(tiny.retinanet(), dict(big=big), dict(recipe=group))
    )
    model.init_weights()
    return model.train()


def test_in_a_detector_each_term_gets_its_share(model):
    seen = {}
    at = Record.at

    def keep(record, path):
        seen[path] = at(record, path)
        return seen[path]

    Record.at = keep
    try:
        losses = model.loss(*tiny.batch())
    finally:
        Record.at = at
    maps = [one for one in seen['backbone'] if one.requires_grad]

    def norm(keys):
        loss = detection_loss({key: losses[key] for key in keys})
        grads = torch.autograd.grad(
            loss, maps, retain_graph=True, allow_unused=True
        )
        squares = [one.square().sum() for one in grads if one is not None]
        return sum(squares).sqrt()

    own = norm(key for key in losses if 'kd' not in key)
    for name in ('feature', 'response'):
        torch.testing.assert_close(
            norm([f'loss_kd_recipe_{name}']), 0.5 * own, rtol=1e-4, atol=0
        )
    assert losses['kd_recipe_weight_feature'] > 0


def test_the_norms_are_in_the_checkpoint_for_resuming(model):
    model.loss(*tiny.batch())
    state = model.state_dict()
    assert state['terms.recipe.norms'].tolist() == pytest.approx(
        model.terms['recipe'].norms.tolist()
    )
    assert (state['terms.recipe.norms'] > 0).all()
    assert not any('big' in key for key in state)

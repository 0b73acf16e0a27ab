"""Phases: what changes when, what counts, and what is refused."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from mmkd.engine.diagnostics import DiagnosticsHook
from mmkd.phases import Phase, Phases
from mmkd.teachers import Teacher

TOTAL = 12

#: Stage by stage, then the neck, then the head: as one method has it.
STAGES = [
    dict(
        train=('backbone.conv1', 'backbone.bn1', 'backbone.layer1'),
        terms='c2',
        supervised=False,
        length=3,
    ),
    dict(train='backbone.layer2', terms='c3', supervised=False, length=3),
    dict(train=('neck', 'bbox_head'), terms=(), length=6),
]


class Watcher:
    paths = ()

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, step, losses):
        self.seen.append(step)


def stage(level):
    return dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='backbone',
        levels=level,
        align=dict(
            type='mmkd.ConvAdapt',
            in_channels=8 * 2**level,
            out_channels=16 * 2**level,
        ),
        loss=dict(type='mmkd.MimicLoss'),
    )


def build(teachers, phases=STAGES, terms=None, **student):
    config = tiny.retinanet()
    config.backbone.update(student)
    terms = terms or dict(c2=stage(0), c3=stage(1))
    model = tiny.build(tiny.distilled(config, teachers, terms, phases=phases))
    model.init_weights()
    return model.train()


def at(hub, iteration, total=TOTAL):
    hub.update_info('iter', iteration)
    hub.update_info('max_iters', total)


def groups(model):
    """Copies of all weights and statistics, by the part they stand in."""
    depth = dict(backbone=2, terms=2, neck=1, bbox_head=1)
    found = {}
    for name, value in model.state_dict().items():
        path = name.split('.')
        key = '.'.join(path[: depth[path[0]]])
        found.setdefault(key, []).append(value.clone())
    return found


def changed(before, after):
    return {
        name
        for name, values in before.items()
        if any(not torch.equal(*pair) for pair in zip(values, after[name]))
    }


def train(model, hub, steps, optimiser, first=0):
    for iteration in range(first, first + steps):
        at(hub, iteration)
        optimiser.zero_grad()
        tiny.total(model.loss(*tiny.batch(seed=iteration))).backward()
        optimiser.step()


def sgd(model):
    """Momentum and decay would move what is only forgotten to be frozen."""
    return torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1
    )


# When ------------------------------------------------------------------------


def test_lengths_share_the_training_exactly():
    """A phase of one epoch in twelve begins with the epoch, not beside it."""
    phases = Phases([dict(length=1, train=f'part{i}') for i in range(12)])
    epoch = 7330
    for number in range(12):
        for iteration in (number * epoch, (number + 1) * epoch - 1):
            phase = phases.at(iteration / (12 * epoch))
            assert phase.train == (f'part{number}',)
    assert phases.at(1.0).train == ('part11',)


def test_a_resumed_training_is_in_the_phase_it_was_in(teachers, hub):
    whole, resumed = build(teachers), build(teachers)
    for iteration in (0, 4):
        at(hub, iteration)
        losses = whole.loss(*tiny.batch())
    assert set(resumed.loss(*tiny.batch())) == set(losses)
    for one, other in zip(whole.parameters(), resumed.parameters()):
        assert one.requires_grad == other.requires_grad


# What is trained -------------------------------------------------------------


def test_a_phase_changes_its_stage_and_its_adapter_and_nothing_else(
    teachers, hub
):
    model = build(teachers)
    optimiser = sgd(model)
    before = groups(model)
    train(model, hub, 3, optimiser)
    first = groups(model)
    stem = {'backbone.conv1', 'backbone.bn1', 'backbone.layer1'}
    assert changed(before, first) == {*stem, 'terms.c2'}
    # DDP gives what has a gradient one of zero, and decay would move it.
    assert not any(one.requires_grad for one in model.terms.c3.parameters())
    train(model, hub, 3, optimiser, first=3)
    second = groups(model)
    assert changed(first, second) == {'backbone.layer2', 'terms.c3'}
    train(model, hub, 3, optimiser, first=6)
    assert changed(second, groups(model)) == {'neck', 'bbox_head'}


def test_a_stage_is_nearer_to_the_teachers_after_its_phase(teachers, hub):
    model = build(teachers)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    errors = []
    for iteration in range(30):
        at(hub, iteration, total=120)
        optimiser.zero_grad()
        (loss,) = [
            value
            for name, value in model.loss(*tiny.batch()).items()
            if name == 'loss_kd_c2'
        ]
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert errors[-1] < 0.7 * errors[0]


def test_statistics_rest_and_heads_go_on_as_in_training(teachers, hub):
    model = build(teachers, norm_eval=False)
    at(hub, 3)
    model.loss(*tiny.batch())
    assert not model.backbone.bn1.training
    assert not model.backbone.layer1[0].bn1.training
    assert model.backbone.layer2[0].bn1.training
    assert model.bbox_head.training
    model.eval()
    model.train()  # as after a validation
    assert not model.backbone.bn1.training


def test_what_the_detector_froze_stays_frozen(teachers, hub):
    model = build(teachers, [dict(train='backbone')], frozen_stages=0)
    model.loss(*tiny.batch())
    assert not model.backbone.conv1.weight.requires_grad
    assert model.backbone.layer1[0].conv1.weight.requires_grad


def test_what_was_frozen_by_hand_stays_frozen(teachers, hub):
    model = build(teachers)
    weight = model.backbone.layer1[0].conv1.weight.requires_grad_(False)
    model.loss(*tiny.batch())
    assert not weight.requires_grad
    assert model.backbone.layer1[0].conv2.weight.requires_grad


def test_gradients_that_were_gathered_before_a_phase_move_nothing_in_it(
    teachers, hub
):
    model = build(teachers)
    at(hub, 2)
    tiny.total(model.loss(*tiny.batch())).backward()
    assert model.backbone.conv1.weight.grad is not None
    at(hub, 3)
    model.loss(*tiny.batch())
    assert model.backbone.conv1.weight.grad is None


def test_one_phase_may_freeze_a_part_throughout(teachers, hub):
    model = build(teachers, phases=[dict(freeze='bbox_head')])
    before = groups(model)
    train(model, hub, 2, sgd(model))
    moved = changed(before, groups(model))
    assert 'bbox_head' not in moved
    assert {'neck', 'backbone.layer4', 'terms.c2', 'terms.c3'} <= moved


def test_a_part_of_a_term_may_be_frozen(teachers, hub):
    model = build(
        teachers, phases=[dict(freeze='terms.c2.align.adapts.0.0.bias')]
    )
    before = model.state_dict()['terms.c2.align.adapts.0.0.bias'].clone()
    train(model, hub, 2, sgd(model))
    assert torch.equal(
        model.state_dict()['terms.c2.align.adapts.0.0.bias'], before
    )


def test_what_is_trained_inside_of_what_rests_goes_on(teachers, hub):
    phases = [dict(train='backbone.layer1.1')]
    model = build(teachers, phases, norm_eval=False)
    model.loss(*tiny.batch())
    assert model.backbone.layer1[1].bn1.training
    assert not model.backbone.layer1[0].bn1.training


def test_a_list_of_layers_rests_alone(teachers, hub):
    model = build(teachers, [dict(train='neck.fpn_convs.1')])
    model.loss(*tiny.batch())
    assert not model.neck.fpn_convs[0].conv.training
    assert model.neck.fpn_convs[1].conv.training


def test_attention_that_rests_drops_nothing():
    """It reads its own mode, though it has parts."""
    model = nn.ModuleDict(
        dict(
            attention=nn.MultiheadAttention(4, 2, dropout=0.5),
            head=nn.Linear(4, 4),
        )
    )
    phases = Phases([dict(train='head')])
    phases.enter(0.0, model)
    phases.rest(model)
    assert not model['attention'].training
    assert model['head'].training


def test_a_name_that_begins_alike_is_another():
    phase = Phase(train=('backbone.layer1',))
    assert phase.trains('backbone.layer1.conv')
    assert not phase.trains('backbone.layer10')


# What counts -----------------------------------------------------------------


def test_only_the_terms_of_the_phase_count(teachers, hub):
    model = build(teachers)
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_c2'] > 0
    assert losses['loss_kd_c3'] == 0
    at(hub, 3)
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_c2'] == 0
    assert losses['loss_kd_c3'] > 0


def test_without_the_detection_loss_labels_do_not_matter(teachers, hub):
    model = build(teachers)
    model.loss(*tiny.batch())
    model.eval()  # statistics of the first call are in no second one
    images, samples = tiny.batch()
    whole = model.loss(images, samples)
    for sample in samples:
        del sample.gt_instances, sample.ignored_instances
    assert set(whole) == {'loss_kd_c2', 'loss_kd_c3'}
    assert model.loss(images, samples)['loss_kd_c2'] == whole['loss_kd_c2']


def test_without_the_detection_loss_the_student_runs_as_far_as_taps_ask(
    teachers, hub, monkeypatch
):
    model = build(teachers)
    monkeypatch.setattr(model.neck, 'forward', None)
    assert model.loss(*tiny.batch())['loss_kd_c2'] > 0


def test_without_the_detection_loss_annotated_images_still_come_first(
    teachers, hub
):
    """Terms that read labels rely on it."""
    model = build(teachers)
    images, samples = tiny.batch()
    del samples[0].gt_instances
    seen = []
    model.observer = Watcher(seen)
    model.loss(images, samples)
    (step,) = seen
    assert step.samples == samples[::-1]
    assert torch.equal(step.images, images.flip(0))


def test_diagnostics_look_at_a_phase_without_the_detection_loss(
    teachers, hub, tmp_path
):
    model = build(teachers)
    hook = DiagnosticsHook()
    hook.before_train_iter(SimpleNamespace(model=model, iter=0), 0)
    model.loss(*tiny.batch())
    assert 'big_scores' in hook._found
    assert 'c2_share' not in hook._found


def test_where_no_term_counts_no_teacher_runs(teachers, hub, monkeypatch):
    model = build(teachers)
    monkeypatch.setattr(Teacher, 'run', None)
    at(hub, 6)
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_c2'] == losses['loss_kd_c3'] == 0
    assert sum(losses['loss_cls']) > 0


def test_a_phase_says_what_it_does():
    assert str(Phase.of(STAGES[1], 2)) == 'trains backbone.layer2 by c3'
    assert str(Phase()) == 'trains all by the detection loss and all terms'
    head = Phase.of(STAGES[2], 3)
    assert str(head) == 'trains neck, bbox_head by the detection loss'


# What is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ('phases', 'message'),
    [
        ([], 'a training without a phase'),
        (dict(train='neck'), 'a list of dicts, one a phase, got phases='),
        (['neck'], 'a list of dicts, one a phase, got phases='),
        ([dict(trains='neck')], "setting 'trains'. Did you mean 'train'"),
        ([dict(length=0)], 'Phase 1 needs length > 0, got length=0'),
        (
            [dict(train='backbone.layer9')],
            "no part 'backbone.layer9'.*Did you mean 'backbone.layer",
        ),
        ([dict(terms='c5')], "no term 'c5'. It has 'c2', 'c3'"),
        ([dict(terms='c2')], "Term 'c3' counts in none of the 1 phases"),
        (
            [dict(), dict(supervised=False, terms=())],
            'Phase 2 has supervised=False and no term',
        ),
    ],
)
def test_phases_that_cannot_be_are_refused(teachers, phases, message):
    with pytest.raises(ValueError, match=message):
        build(teachers, phases=phases)


def test_a_part_that_the_detector_froze_is_refused(teachers):
    with pytest.raises(ValueError, match=r'no parameter of backbone\.conv1 '):
        build(teachers, frozen_stages=1)


@pytest.mark.parametrize(
    ('term', 'message'),
    [
        (
            dict(type='mmkd.BalancedTerm', terms=dict(c2=stage(0))),
            'weighs itself by the detection loss',
        ),
        (
            dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                tap='bbox_head.get_targets',
                loss=dict(type='mmkd.MimicLoss'),
            ),
            "taps 'bbox_head.get_targets', which only the detection loss",
        ),
    ],
)
def test_a_term_that_needs_the_detection_loss_is_refused_without_it(
    teachers, term, message
):
    with pytest.raises(ValueError, match=message):
        build(teachers, [dict(supervised=False)], dict(late=term))


def test_terms_that_do_not_reach_what_is_trained_are_refused(teachers, hub):
    term = dict(stage(0), teacher_tap='neck', teacher_levels=0)
    term.update(align=None, tap='neck')
    phase = dict(train='bbox_head', supervised=False)
    model = build(teachers, [phase], dict(near=term))
    with pytest.raises(RuntimeError, match='none of its losses depends on'):
        model.loss(*tiny.batch())
    with torch.no_grad():
        assert model.loss(*tiny.batch())['loss_kd_near'] > 0

"""D³ETR: where decoders look, literally, and the order of queries in none."""

import copy
from itertools import chain

import detrs
import pytest
import tiny
import torch
from mmdet.models.layers.transformer.utils import ConditionalAttention

from mmkd.losses.attention_divergence import attention_divergence
from mmkd.losses.query import query_box_errors, query_class_divergence
from mmkd.taps import recording
from mmkd.terms.d3etr import (
    CROSS,
    SELF,
    D3ETRTerm,
    _mean,
    attention_maps,
    attention_paths,
    has_maps,
    most_certain,
    pick_both,
)
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import Answers, answers, ask, question
from mmkd.terms.query_matching import match_answers, of_layers

FEW = dict(queries=6)
WIDE = dict(queries=9, layers=3)


def pair(student='dab', teacher='dab', few=FEW, **settings):
    term = D3ETRTerm('big', **settings)
    step = detrs.step_of(
        term, detrs.built(student, **few), detrs.built(teacher, 1, **WIDE)
    )
    return term, step


# Whom it pairs ---------------------------------------------------------------


@pytest.mark.parametrize(
    ('student', 'teacher', 'zeros'),
    [
        ('detr', 'dab', 'fixed'),
        ('dab', 'detr', 'fixed'),
        ('detr', 'detr', ''),
        ('dab', 'deformable', 'fixed cross'),
        ('refine', 'deformable', 'cross'),
        ('ddq', 'refine', 'fixed cross'),
        ('refine', 'ddq', 'fixed cross'),
        ('ddq', 'ddq', 'cross'),
    ],
)
def test_kinds_teach_each_other(student, teacher, zeros):
    off = {f'{one}_weight': 0 for one in zeros.split()}
    term, step = pair(student, teacher, **off)
    parts = term(step)
    matchings = {'adaptive', 'fixed'} - set(zeros.split())
    kinds = {'prediction', 'self', 'cross'} - set(zeros.split())
    assert parts.keys() == {f'{m}_{k}' for m in matchings for k in kinds}
    assert all(one > 0 and one.isfinite() for one in parts.values())
    for name, one in parts.items():
        model = step.student.detector
        model.zero_grad()
        one.backward(retain_graph=True)
        assert model.backbone.conv1.weight.grad.abs().sum() > 0, name
    detector = step.teacher('big').detector
    assert all(one.grad is None for one in detector.parameters())


def test_what_has_no_map_is_refused_with_the_weight_to_set():
    term = D3ETRTerm('big')
    dab, deformable = (detrs.built(kind) for kind in ('dab', 'deformable'))
    for student, teacher, side in (
        (dab, deformable, 'teacher'),
        (deformable, dab, 'student'),
    ):
        message = f'{side}, DeformableDETR, .*Set cross_weight=0'
        with pytest.raises(ValueError, match=message):
            term.bind(student, dict(big=detrs.Shown(teacher)))
    assert has_maps(deformable, SELF)
    assert not has_maps(deformable, CROSS)


def test_decoders_of_unlike_form_refuse_the_fixed_matching():
    term, step = pair('dab', 'detr')
    with pytest.raises(ValueError, match='D3ETRTerm.*fixed_weight=0'):
        term(step)


def test_detectors_without_queries_are_refused():
    one = detrs.Shown(tiny.build(tiny.retinanet()))
    with pytest.raises(ValueError, match='teacher, RetinaNet, has none'):
        D3ETRTerm('big').bind(detrs.built('dab'), dict(big=one))


# Maps ------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['detr', 'dab'])
def test_maps_are_what_values_are_added_by(kind):
    """The output of an attention with the identity for values."""
    model = detrs.built(kind, **FEW)
    term = D3ETRTerm('big')
    step = detrs.step_of(term, model, detrs.built('dab'))
    for which, columns in ((SELF, 6), (CROSS, 16)):
        maps = attention_maps(step.student, which)
        assert maps.shape == (2, 2, 6, columns)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 6))
    # The padded border is not looked at: columns 112 to 128 of 128.
    assert not maps[:, 1].unflatten(-1, (4, 4))[..., 3, :].any()


def test_conditional_attention_is_tapped_where_its_map_is():
    model = detrs.built('dab', **FEW)
    attention = model.decoder.layers[1].self_attn
    assert isinstance(attention, ConditionalAttention)
    path = attention_paths(model, SELF)[1]
    with torch.no_grad(), recording(model, [path]) as record:
        model.loss(*tiny.batch())
    _, given = record.inputs(path)
    query, key = (
        given[name].unflatten(-1, (4, -1)).transpose(1, 2)
        for name in ('query', 'key')
    )
    scale = query.shape[-1] ** -0.5
    expected = (scale * query @ key.mT).softmax(-1).mean(1)
    torch.testing.assert_close(record.at(path)[1], expected)


def test_queries_of_training_are_left_out_of_the_maps():
    model = detrs.built('ddq', **FEW)
    term = D3ETRTerm('big', cross_weight=0, fixed_weight=0)
    step = detrs.step_of(term, model, detrs.built('refine'))
    path = attention_paths(model, SELF)[0]
    whole = step.student.at(path)[1]
    assert whole.shape[-1] > 6
    assert attention_maps(step.student, SELF).shape == (2, 2, 6, 6)
    begin = model.cache_dict['dis_query_info'][0]
    own = slice(begin, begin + 6)
    assert torch.equal(
        attention_maps(step.student, SELF)[0], whole[:, own, own]
    )


# The parts -------------------------------------------------------------------


def prediction(own, other, index, found):
    """Of one layer, query by query."""
    classes, boxes, sure = [], 0.0, 0.0
    for image in range(2):
        for column in range(other.boxes.shape[1]):
            if not found[image, column]:
                continue
            row = index[image, column]
            classes.append(
                query_class_divergence(
                    own.logits[image, row], other.logits[image, column]
                )
            )
            l1, error = query_box_errors(
                own.boxes[image, row], other.boxes[image, column]
            )
            weight = other.logits[image, column].sigmoid().max()
            boxes = boxes + weight * (5 * l1 + 2 * error)
            sure = sure + weight
    return 2 * torch.stack(classes).mean() + boxes / sure


class Layer:
    def __init__(self, found, layer):
        self.logits, self.boxes = found.logits[layer], found.boxes[layer]


@pytest.mark.parametrize('few', [FEW, dict(queries=12)])
def test_adaptive_parts_equal_the_literal_formula(few):
    term, step = pair(few=few, fixed_weight=0)
    shown = step.teacher('big')
    own, other = answers(step.student), answers(shown)
    layers = uniform_map(2, 3)
    other = of_layers(other, layers)
    index, found = match_answers(
        own, other, first=most_certain(other, few['queries'])
    )
    assert found.sum(-1).eq(min(few['queries'], 9)).all()
    expected = dict.fromkeys(('prediction', 'self', 'cross'), 0.0)
    maps = {
        kind: (attention_maps(step.student, kind), attention_maps(shown, kind))
        for kind in (SELF, CROSS)
    }
    for layer, theirs in enumerate(layers):
        expected['prediction'] += prediction(
            Layer(own, layer), Layer(other, layer), index[layer], found[layer]
        )
        rows = dict(self=[], cross=[])
        for image in range(2):
            pairs = [
                (index[layer, image, column].item(), column)
                for column in range(9)
                if found[layer, image, column]
            ]
            mine, there = (list(one) for one in zip(*pairs))
            for row, column in pairs:
                for kind, name in ((SELF, 'self'), (CROSS, 'cross')):
                    one = maps[kind][0][layer, image, row]
                    like = maps[kind][1][theirs, image, column]
                    if kind == SELF:
                        one, like = one[mine], like[there]
                    one, like = one / one.sum(), like / like.sum()
                    some = like > 0
                    rows[name].append(
                        (like[some] * (like[some] / one[some]).log()).sum()
                    )
        for name, some in rows.items():
            expected[name] += torch.stack(some).mean()
    parts = term(step)
    for name, value in expected.items():
        torch.testing.assert_close(
            parts[f'adaptive_{name}'], value, rtol=1e-3, atol=1e-4
        )


def test_fixed_parts_are_of_the_same_questions_in_the_same_order():
    term, step = pair(adaptive_weight=0, fixed_weight=0.5)
    shown = step.teacher('big')
    layers = uniform_map(2, 3)
    other = of_layers(answers(shown), layers)
    model = step.student.detector
    paths = [attention_paths(model, kind) for kind in (SELF, CROSS)]
    with recording(model, chain(*paths)) as record:
        own = ask(step.student, question(shown))
    index = torch.arange(9).expand(2, 9)
    found = torch.ones(2, 9, dtype=torch.bool)
    expected = dict(
        prediction=sum(
            prediction(Layer(own, layer), Layer(other, layer), index, found)
            for layer in range(2)
        )
    )
    for some, kind, name in zip(paths, (SELF, CROSS), ('self', 'cross')):
        maps = torch.stack([record.at(path)[1] for path in some])
        expected[name] = attention_divergence(
            maps, attention_maps(shown, kind)[layers]
        )
    parts = term(step)
    for name, value in expected.items():
        torch.testing.assert_close(parts[f'fixed_{name}'], 0.5 * value)


def test_a_copy_has_nothing_to_learn():
    model = detrs.built('dab', **FEW)
    term = D3ETRTerm('big')
    parts = term(detrs.step_of(term, model, copy.deepcopy(model)))
    assert len(parts) == 6
    for one in parts.values():
        assert one.item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize('kind', ['dab', 'refine'])
def test_the_order_of_queries_does_not_matter(kind):
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    models = [detrs.built(kind, seed, **FEW) for seed in range(2)]
    cross = float(kind == 'dab')
    shares, gradients = [], []
    for side in (None, 0, 1):
        some = copy.deepcopy(models)
        if side is not None:
            detrs.reorder(some[side], order)
        term = D3ETRTerm('big', cross_weight=cross)
        parts = term(detrs.step_of(term, *some))
        sum(parts.values()).backward()
        shares.append(parts)
        gradients.append(some[0].query_embedding.weight.grad)
    for parts in shares[1:]:
        for name, value in parts.items():
            torch.testing.assert_close(
                value, shares[0][name], rtol=1e-3, atol=1e-5
            )
    near = dict(rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0][order], **near)
    torch.testing.assert_close(gradients[2], gradients[0], **near)


def test_both_axes_are_put_in_order():
    maps = torch.rand(2, 1, 4, 4)
    index = torch.tensor([[[2, 0, 1]], [[3, 3, 0]]])
    found = pick_both(maps, index)
    for layer in range(2):
        for row, column in ((0, 1), (2, 0), (1, 2)):
            some = index[layer, 0]
            expected = maps[layer, 0, some[row], some[column]]
            assert found[layer, 0, row, column] == expected


def test_a_memory_of_another_size_is_resized():
    """Stride 16 of the teacher against 32 of the student."""
    config = detrs.detr('dab', **WIDE)
    config.backbone.out_indices, config.neck.in_channels = (2,), [32]
    teacher = tiny.build(config, 1)
    term = D3ETRTerm('big', prediction_weight=0, self_weight=0)
    step = detrs.step_of(term, detrs.built('dab', **FEW), teacher)
    assert attention_maps(step.teacher('big'), CROSS).shape[-1] == 64
    parts = term(step)
    assert parts.keys() == {'adaptive_cross', 'fixed_cross'}
    # A teacher that looks everywhere alike does so in any size.
    shown = step.teacher('big')
    for path in attention_paths(teacher, CROSS):
        shown.at(path)[1].data.fill_(1 / 64)  # no new version
    model = step.student.detector
    paths = attention_paths(model, CROSS)
    with recording(model, paths) as record:
        ask(step.student, question(shown))
    maps = torch.stack([record.at(path)[1] for path in paths])
    fixed = attention_divergence(maps, torch.full_like(maps, 1 / 16))
    torch.testing.assert_close(term(step)['fixed_cross'], fixed)


# Settings --------------------------------------------------------------------


def test_attention_can_be_taught_alone():
    term, step = pair(prediction_weight=0, self_weight=2.0, fixed_weight=0)
    parts = term(step)
    assert parts.keys() == {'adaptive_self', 'adaptive_cross'}
    alone = D3ETRTerm('big', self_weight=1.0, fixed_weight=0)(step)
    torch.testing.assert_close(
        parts['adaptive_self'], 2 * alone['adaptive_self']
    )


def test_without_weight_it_is_silent():
    assert not D3ETRTerm('big').silent()
    assert D3ETRTerm('big', adaptive_weight=0, fixed_weight=0).silent()
    parts = dict(prediction_weight=0, self_weight=0, cross_weight=0)
    assert D3ETRTerm('big', **parts).silent()


def test_images_without_boxes_are_taught_as_all():
    term = D3ETRTerm('big')
    models = [detrs.built('dab', seed, **FEW) for seed in range(2)]
    parts = term(detrs.step_of(term, *models, tiny.batch(boxes=0)))
    assert all(one > 0 and one.isfinite() for one in parts.values())


@pytest.mark.parametrize(
    ('weight', 'parts'),
    [
        ('adaptive_weight', 'adaptive_'),
        ('fixed_weight', 'fixed_'),
        ('prediction_weight', '_prediction'),
        ('self_weight', '_self'),
        ('cross_weight', '_cross'),
    ],
)
def test_each_weight_is_a_factor_of_its_parts(weight, parts):
    term, step = pair()
    before = term(step)
    setattr(term, weight, 2.0)
    for name, value in term(step).items():
        times = 2 if parts in name else 1
        torch.testing.assert_close(value, times * before[name])


def test_those_that_are_surest_of_any_class_come_first():
    chance = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.2]])
    found = Answers(
        chance.logit()[None, None],
        torch.rand(1, 1, 3, 4),
        torch.rand(1, 1, 3, 2),
        softmax=False,
    )
    assert most_certain(found, 1).tolist() == [[[True, False, False]]]
    assert most_certain(found, 2).tolist() == [[[True, True, False]]]


def test_where_nobody_is_sure_nothing_is_learnt():
    values = torch.ones(2, 1, 3, requires_grad=True)
    found = _mean(values, torch.zeros(2, 1, 3))
    assert found.item() == 0

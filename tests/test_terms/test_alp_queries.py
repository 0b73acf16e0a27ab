"""ALP by queries: each one's mixture of layers, by hand and in any order."""

import copy
import math

import detrs
import pytest
import tiny
import torch

from mmkd.losses.alp import attention_weights, layer_errors
from mmkd.terms.alp_queries import ALPQueryTerm
from mmkd.terms.queries import answers, ask, question
from mmkd.terms.query_matching import Objects, match_objects

FEW = dict(queries=6, layers=2)
MORE = dict(queries=9, layers=3)
BOTH = ('decoder', 'encoder')


def pair(student='refine', teacher='refine', batch=None, **settings):
    """A student of two layers, a teacher of three and of more queries."""
    models = detrs.built(student, **FEW), detrs.built(teacher, 1, **MORE)
    return of(*models, batch, **settings)


def of(student, teacher, batch=None, **settings):
    torch.manual_seed(0)
    term = ALPQueryTerm('big', **settings)
    return term, detrs.step_of(term, student, teacher, batch)


# The formula -----------------------------------------------------------------


def test_two_layers_and_three_of_the_teacher_by_hand():
    """One query of two numbers; e with the root of d = 2."""
    root = math.sqrt(2)
    student = [[1.0, 0.0], [1.0, 1.0]]
    teacher = [[root, 0.0], [0.0, 3.0], [0.0, 0.0]]
    expected = []
    for vector, scores in zip(student, [(1, 0, 0), (1, 3 / root, 0)]):
        powers = [math.exp(one) for one in scores]
        mixed = [
            sum(p * layer[c] for p, layer in zip(powers, teacher))
            / sum(powers)
            for c in range(2)
        ]
        expected.append(sum((a - b) ** 2 for a, b in zip(vector, mixed)) / 2)
    found = layer_errors(torch.tensor(student), torch.tensor(teacher))
    torch.testing.assert_close(
        found, torch.tensor(expected), rtol=1e-6, atol=0
    )


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 8), torch.randn(3, 4, 5, 8)


def test_the_order_of_the_teachers_layers_does_not_matter(layers):
    own, other = layers
    turned = other[[2, 0, 1]]
    torch.testing.assert_close(
        layer_errors(own, turned), layer_errors(own, other)
    )
    shares = [
        attention_weights(own[0], one.movedim(0, -2))
        for one in (other, turned)
    ]
    torch.testing.assert_close(shares[1], shares[0][..., [2, 0, 1]])
    assert (shares[0] > 0).all()
    torch.testing.assert_close(shares[0].sum(-1), torch.ones(4, 5))


def test_one_layer_of_the_teacher_is_a_mean_square(layers):
    own, other = layers
    expected = (own - other[:1]).square().mean(-1)
    torch.testing.assert_close(layer_errors(own, other[:1]), expected)


def test_equal_layers_of_the_teacher_are_that_layer(layers):
    own, other = layers
    same = other[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(
        layer_errors(own, same), layer_errors(own, other[:1])
    )


def test_buckets_keep_layers_apart(layers):
    own, _ = layers
    other = torch.randn(6, 4, 5, 8)
    found = layer_errors(own, other, 'no')
    for layer, some in enumerate((slice(0, 3), slice(3, 6))):
        torch.testing.assert_close(
            found[layer], layer_errors(own[layer : layer + 1], other[some])[0]
        )


def test_weights_of_layers_carry_a_gradient():
    own = torch.tensor([[1.0, 0.0]], requires_grad=True)
    other = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
    (full,) = torch.autograd.grad(layer_errors(own, other).sum(), own)
    share = attention_weights(own.detach(), other.movedim(0, -2))[..., :1]
    fixed = own.detach() - 2 * share * torch.tensor([[1.0, 0.0]])
    assert not torch.allclose(full, fixed)


# Queries ---------------------------------------------------------------------


def test_questions_equal_the_formula_query_by_query():
    term, step = pair(loss_weight=3.0)
    shown = step.teacher('big')
    own = ask(step.student, question(shown)).states
    said = answers(shown)
    total, weights = 0.0, 0.0
    for layer in range(2):
        for image in range(2):
            for query in range(9):
                vector = own[layer, image, query]
                others = said.states[:, image, query]  # 3, d
                share = (others @ vector / 4).softmax(0)  # root of 16
                mixed = (share[:, None] * others).sum(0)
                weight = said.logits[-1, image, query].sigmoid().max()
                total = total + weight * (vector - mixed).square().mean()
                weights = weights + weight
    torch.testing.assert_close(term(step)['decoder'], 3 * total / weights)


def test_objects_equal_the_formula_query_by_query():
    term, step = pair(pair='objects', loss_weight=3.0)
    objects = Objects.of(step.gt)
    own, other = answers(step.student), answers(step.teacher('big'))
    errors = []
    for image, place in zip(step.gt.image, step.gt.place):
        mine, theirs = (
            (match_objects(one, objects)[-1, image] == place).nonzero().item()
            for one in (own, other)
        )
        for layer in range(2):
            vector = own.states[layer, image, mine]
            others = other.states[:, image, theirs]
            share = (others @ vector / 4).softmax(0)
            mixed = (share[:, None] * others).sum(0)
            errors.append((vector - mixed).square().mean())
    expected = 3 * torch.stack(errors).mean()
    torch.testing.assert_close(term(step)['decoder'], expected)


@pytest.mark.parametrize('counts', [(2, 6), (6, 2)])
def test_an_object_without_a_query_on_a_side_does_not_count(counts):
    models = [
        detrs.built('detr', seed, queries=count)
        for seed, count in enumerate(counts)
    ]
    term, step = of(*models, pair='objects', loss_weight=1.0)
    objects = Objects.of(step.gt)
    own, other = answers(step.student), answers(step.teacher('big'))
    errors = []
    for image, place in zip(step.gt.image, step.gt.place):
        places = [
            (match_objects(one, objects)[-1, image] == place).nonzero()
            for one in (own, other)
        ]
        if all(len(one) for one in places):
            vectors = [
                one.states[:, image, at[0, 0]]
                for one, at in zip((own, other), places)
            ]
            errors.append(layer_errors(*vectors))
    assert len(errors) == 4  # of six
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(term(step)['decoder'], expected)


@pytest.mark.parametrize('how', ['questions', 'objects'])
@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_the_order_of_queries_does_not_matter(how, side):
    """Of the student, gradients are put in that order as well."""
    torch.manual_seed(0)
    order = torch.randperm(9 if side == 'teacher' else 6)
    found = []
    for turned in (False, True):
        models = detrs.built('refine', **FEW), detrs.built('refine', 1, **MORE)
        if turned:
            detrs.reorder(models[side == 'teacher'], order)
        term, step = of(*models, pair=how)
        share = term(step)['decoder']
        share.backward()
        found.append((share, models[0].query_embedding.weight.grad))
    (before, gradient), (after, turned) = found
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)
    if how == 'questions':  # the student's own queries are not looked at
        assert gradient is None
        return
    if side == 'student':
        gradient = gradient[order]
    torch.testing.assert_close(turned, gradient, rtol=1e-2, atol=1e-3)


def test_images_without_objects_cost_nothing():
    term, step = pair(batch=tiny.batch(boxes=0), pair='objects')
    share = term(step)['decoder']
    assert share == 0
    share.backward()
    assert term.compares_classes()


def test_layers_can_be_named():
    term, step = pair(
        pair='objects', student_layers=(1,), teacher_layers=(0, 2)
    )
    alone = term(step)['decoder']
    shown = step.teacher('big')
    objects = Objects.of(step.gt)
    states = []
    for one, some in ((answers(step.student), [1]), (answers(shown), [0, 2])):
        owner = match_objects(one, objects)[-1]
        rows = [
            one.states[some, image, (owner[image] == place).nonzero().item()]
            for image, place in zip(step.gt.image, step.gt.place)
        ]
        states.append(torch.stack(rows, 1))
    torch.testing.assert_close(alone, 100 * layer_errors(*states).mean())


@pytest.mark.parametrize('settings', [dict(bucket='no'), dict(scale=None)])
def test_settings_reach_the_layers(settings):
    term, step = pair(parts='encoder', loss_weight=1.0, **settings)
    own, other, _ = term._encoder(step, step.teacher('big'))
    expected = layer_errors(own, other, **settings).mean()
    torch.testing.assert_close(term(step)['encoder'], expected)
    assert not torch.isclose(expected, layer_errors(own, other).mean())


# Encoders --------------------------------------------------------------------


def test_encoders_equal_the_formula_without_the_border():
    term, step = pair(parts='encoder')
    means = []
    for side, count in ((step.student, 2), (step.teacher('big'), 3)):
        _, given = side.inputs('forward_decoder')
        assert given['memory_mask'][1].any()
        kept = ~given['memory_mask']
        means.append(
            torch.stack(
                [
                    torch.stack(
                        [
                            side.at(f'encoder.layers.{layer}')[image][
                                kept[image]
                            ].mean(0)
                            for image in range(2)
                        ]
                    )
                    for layer in range(count)
                ]
            )
        )
    expected = 100 * layer_errors(*means).mean()
    torch.testing.assert_close(term(step)['encoder'], expected)


def test_the_border_has_no_influence():
    term, step = pair(parts='encoder')
    before = term(step)['encoder']
    for side, count in ((step.student, 2), (step.teacher('big'), 3)):
        border = side.inputs('forward_decoder')[1]['memory_mask']
        for layer in range(count):
            side.at(f'encoder.layers.{layer}').data[border] = 99.0
    torch.testing.assert_close(term(step)['encoder'], before)


# Who learns ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('student', 'teacher', 'how'),
    [
        ('detr', 'detr', 'questions'),
        ('detr', 'refine', 'objects'),
        ('dab', 'dab', 'questions'),
        ('dab', 'detr', 'objects'),
        ('deformable', 'refine', 'questions'),
        ('conditional', 'conditional', 'questions'),
        ('two_stage', 'two_stage', 'questions'),
        ('dino', 'dino', 'questions'),
        ('dino', 'dino', 'objects'),
    ],
)
def test_kinds_teach_each_other(student, teacher, how):
    term, step = pair(student, teacher, parts=BOTH, pair=how)
    found = term(step)
    assert found.keys() == set(BOTH)
    assert all(one > 0 and one.isfinite() for one in found.values())
    model = step.student.detector
    for one in found.values():
        model.zero_grad()
        one.backward(retain_graph=True)
        assert model.backbone.conv1.weight.grad.abs().sum() > 0
    detector = step.teacher('big').detector
    assert all(one.grad is None for one in detector.parameters())


def test_widths_that_differ_are_projected():
    student = detrs.built('refine', **FEW)
    teacher = detrs.built('dino', 1, **MORE)
    settings = dict(parts=BOTH, pair='objects')
    with pytest.raises(ValueError, match=r'Set channels=\(16, 256\)'):
        of(student, teacher, **settings)
    term, step = of(student, teacher, channels=(16, 256), **settings)
    found = term(step)
    sum(found.values()).backward()
    for part in BOTH:
        assert term.projections[part].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match='has 16 and'):
        pair(channels=(8, 16))


def test_a_teacher_of_other_weights_says_something_else():
    student = detrs.built('refine', **FEW)
    found = []
    for seed in (1, 2):
        teacher = detrs.built('refine', seed, **MORE)
        term, step = of(copy.deepcopy(student), teacher, parts=BOTH)
        found.append(term(step))
    for part in BOTH:
        assert not torch.isclose(found[0][part], found[1][part])


# What is refused -------------------------------------------------------------


def test_decoders_of_unlike_form_are_paired_by_objects():
    term, step = pair('detr', 'dab')
    with pytest.raises(ValueError, match="Set pair='objects'"):
        term(step)


@pytest.mark.parametrize(
    ('student', 'teacher'), [('ddq', 'refine'), ('refine', 'ddq')]
)
def test_queries_that_change_are_refused_in_decoders(student, teacher):
    with pytest.raises(ValueError, match=r"Set parts=\('encoder',\)"):
        pair(student, teacher)
    term, step = pair(student, teacher, parts='encoder')
    assert term(step)['encoder'] > 0


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match='has 2, 0 to 1.*student_layers'):
        pair(student_layers=(2,))
    with pytest.raises(ValueError, match='has 3, 0 to 2.*teacher_layers'):
        pair(teacher_layers=(3,))


@pytest.mark.parametrize(
    'settings',
    [
        dict(parts='decoders'),
        dict(pair='object'),
        dict(bucket='yes'),
        dict(scale='d'),
    ],
)
def test_a_misspelt_setting_is_refused(settings):
    with pytest.raises(ValueError, match='ALPQueryTerm'):
        ALPQueryTerm('big', **settings)


def test_without_weight_it_does_not_run():
    assert ALPQueryTerm('big', loss_weight=0.0).silent()
    assert not ALPQueryTerm('big').compares_classes()

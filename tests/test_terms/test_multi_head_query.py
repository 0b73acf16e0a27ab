"""The layers of a decoder are heads, paired by depth, queries by answers."""

import detrs
import pytest
import tiny
import torch
from asking import detector, distilled, permuted, step_of

from mmkd.losses.query import query_box_errors, query_class_divergence
from mmkd.terms.multi_head_query import MultiHeadQueryTerm
from mmkd.terms.query_pairs import pair_queries

#: Student and teacher; all pairs of classes of softmax and sigmoid.
PAIRS = [
    ('detr', 'detr'),
    ('detr', 'dab'),
    ('dab', 'detr'),
    ('deformable', 'conditional'),
    ('dino', 'deformable'),
    ('refine', 'two_stage'),
    ('ddq', 'ddq'),
]


def said(step, **settings):
    return MultiHeadQueryTerm('big', **settings)(step)


@pytest.fixture(scope='module')
def pair():
    return (
        detector('refine', layers=3),
        detector('refine', 1, queries=15, layers=6),
    )


@pytest.fixture
def step(pair):
    return step_of(*pair)


@pytest.mark.parametrize('pairing', ['answers', 'questions'])
def test_it_is_the_formula(step, pairing):
    found = said(
        step,
        pairing=pairing,
        head_weight=0.3,
        mix=0.2,
        temperature=2.0,
        box_weight=4.0,
    )
    pairs = pair_queries(pairing, step.student, step.teacher('big'), step.gt)
    own, other = pairs.student, pairs.teacher
    weight = other.logits[-1].sigmoid().amax(-1)
    weight = weight / weight.sum()
    expected = dict(cls=0.0, box=0.0, final_cls=0.0, final_box=0.0)
    for layer, place in enumerate((1, 3, 5)):
        classes = query_class_divergence(
            own.logits[layer], other.logits[place], temperature=2.0
        )
        l1, giou = query_box_errors(own.boxes[layer], other.boxes[place])
        name, factor = ('', 0.3) if layer < 2 else ('final_', 1.0)
        expected[f'{name}cls'] += 0.2 * factor * (weight * classes).sum()
        expected[f'{name}box'] += (
            0.2 * factor * 4 * (weight * (5 * l1 + 2 * giou)).sum()
        )
    assert {*found} == {*expected}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


def test_a_copy_costs_nothing(pair):
    turned = permuted(pair[0], torch.randperm(12))
    for value in said(step_of(turned, pair[0])).values():
        assert value < 1e-4


@pytest.mark.parametrize('pairing', ['answers', 'questions'])
def test_the_order_of_queries_changes_nothing(pair, step, pairing):
    student, teacher = pair
    plain = said(step, pairing=pairing)
    torch.manual_seed(0)
    for turned in (
        (student, permuted(teacher, torch.randperm(15))),
        (permuted(student, torch.randperm(12)), teacher),
    ):
        for key, value in said(step_of(*turned), pairing=pairing).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)


def test_a_head_teaches_no_deeper_layer(pair):
    student = pair[0].train()
    found = said(step_of(*pair))
    student.eval()
    (found['cls'] + found['box']).backward()
    norms = [
        [
            one.grad is not None and one.grad.abs().sum() > 0
            for one in layer.parameters()
        ]
        for layer in student.decoder.layers
    ]
    student.zero_grad()
    assert any(norms[0])
    assert any(norms[1])
    assert not any(norms[2])


def test_one_layer_has_no_heads_before_the_last(pair):
    found = said(step_of(detector('refine', layers=1), pair[1]))
    assert {*found} == {'final_cls', 'final_box'}


@pytest.mark.parametrize('kinds', PAIRS, ids='-from-'.join)
def test_every_kind_learns(kinds, tmp_path):
    student, teacher = (
        detrs.detr(kind, base=base, queries=queries)
        for kind, base, queries in zip(kinds, (8, 16), (12, 14))
    )
    term = dict(type='mmkd.MultiHeadQueryTerm', teacher='big')
    model = distilled(student, teacher, term, tmp_path)
    assert not [*model.terms.x.parameters()]
    losses = model.loss(*tiny.batch(shapes=((128, 128), (96, 64))))
    shares = {key: one for key, one in losses.items() if 'loss_kd' in key}
    assert len(shares) == 4
    assert all(one.isfinite() and one > 0 for one in shares.values())
    sum(shares.values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    for one in model.teachers['big'].detector.parameters():
        assert one.grad is None


def test_half_precision_and_images_without_boxes_are_finite(pair):
    with torch.autocast('cpu', torch.bfloat16):
        found = said(step_of(*pair, boxes=0))
    for value in found.values():
        assert value.dtype == torch.float32
        assert value.isfinite()


def test_detectors_without_queries_are_refused(tmp_path):
    term = dict(type='mmkd.MultiHeadQueryTerm', teacher='big')
    with pytest.raises(ValueError, match='teacher, RetinaNet, has none'):
        distilled(detrs.detr('dab'), tiny.retinanet(), term, tmp_path)


def test_settings_that_mean_nothing_are_refused():
    for setting in (
        dict(pairing='objects'),
        dict(temperature=0.0),
        dict(mix=2.0),
    ):
        with pytest.raises(ValueError, match='MultiHeadQueryTerm'):
            MultiHeadQueryTerm('big', **setting)


def test_without_a_share_it_is_silent():
    assert MultiHeadQueryTerm('big', mix=0.0).silent()
    assert not MultiHeadQueryTerm('big', head_weight=0.0).silent()
    assert MultiHeadQueryTerm('big').compares_classes()

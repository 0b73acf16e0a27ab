"""How detectors of queries are asked, whatever their family calls things."""

import detrs
import pytest
import tiny
import torch
from torch import nn

from mmkd.ops.numeric import as_float
from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.queries import (
    DECODER,
    HEAD,
    answers,
    ask,
    asks,
    drawn,
    question,
)

KINDS = list(detrs.CONFIGS)


def recorded(kind, training=True, **settings):
    """One pass of a tiny detector, in which nothing is dropped."""
    model = tiny.build(detrs.detr(kind, **settings))
    for one in model.modules():
        if isinstance(one, nn.Dropout):
            one.p = 0
        if isinstance(one, nn.MultiheadAttention):
            one.dropout = 0
    images, samples = tiny.batch()
    model.train(training)
    with recording(model, [DECODER, HEAD]) as record:
        if training:
            model.loss(images, samples)
        else:
            run_detector(model, images, samples)
    return record


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('training', [True, False])
def test_own_questions_get_own_answers(kind, training):
    record = recorded(kind, training)
    given, again = answers(record), ask(record, question(record))
    assert given.logits.shape[:3] == (2, 2, 12)
    assert given.boxes.shape == (2, 2, 12, 4)
    for part in ('logits', 'boxes', 'states'):
        torch.testing.assert_close(
            getattr(again, part), getattr(given, part), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize('kind', KINDS)
def test_they_answer_in_training_without_losses(kind):
    with_losses = answers(recorded(kind)).logits
    model = recorded(kind).detector
    with torch.no_grad(), recording(model, [DECODER, HEAD]) as record:
        run_detector(model, *tiny.batch())
    assert answers(record).logits.shape == with_losses.shape


@pytest.mark.parametrize('kind', KINDS)
def test_asking_leaves_the_detector_as_it_was(kind):
    record = recorded(kind)
    model = record.detector
    modes = [one.training for one in model.modules()]
    state = {key: one.clone() for key, one in model.state_dict().items()}
    ask(record, drawn(record, 5))
    assert [one.training for one in model.modules()] == modes
    for key, one in model.state_dict().items():
        assert torch.equal(one, state[key]), key
    model.loss(*tiny.batch())  # and able to go on
    model.eval().predict(*tiny.batch())


@pytest.mark.parametrize('kind', KINDS)
def test_drawn_questions_differ_and_have_the_form(kind):
    record = recorded(kind)
    own, asked = question(record), drawn(record, 5)
    assert own.keys() == asked.keys()
    for key, value in asked.items():
        assert value.shape == (2, 5, own[key].shape[-1])
        assert not value.requires_grad
    found = ask(record, asked)
    assert found.logits.shape[2] == 5
    assert found.boxes.std() > 0
    again = drawn(record, 5)
    assert any(not torch.equal(asked[key], again[key]) for key in asked)


def test_what_is_zero_in_all_queries_stays_zero():
    asked = drawn(recorded('dab'), 5)
    assert not asked['query'].any()
    assert asked['query_pos'].any()


def test_a_drawn_point_is_that_of_its_position():
    record = recorded('deformable')
    asked = drawn(record, 5)
    point = record.detector.reference_points_fc(asked['query_pos']).sigmoid()
    torch.testing.assert_close(asked['reference_points'], point)


def test_questions_answer_to_the_image():
    """The gradient of an answer reaches the backbone of who was asked."""
    record = recorded('deformable')
    ask(record, drawn(record, 5)).boxes.sum().backward()
    weight = record.detector.backbone.conv1.weight
    assert weight.grad.abs().sum() > 0


def test_chances_are_those_of_the_head():
    soft, sharp = (answers(recorded(kind)) for kind in ('detr', 'dab'))
    assert soft.softmax
    assert not sharp.softmax
    assert soft.logits.shape[-1] == tiny.CLASSES + 1
    total = as_float(soft.logits).softmax(-1)
    torch.testing.assert_close(soft.chances, total[..., :-1])
    torch.testing.assert_close(sharp.chances, sharp.logits.sigmoid())


def test_another_form_is_refused():
    record, other = recorded('dab'), recorded('deformable')
    with pytest.raises(ValueError, match='query_pos of 4.*reference_points'):
        ask(record, question(other))


def test_detectors_are_told_by_what_they_expose():
    assert asks(tiny.build(detrs.detr('dab')))
    assert not asks(tiny.build(tiny.retinanet()))

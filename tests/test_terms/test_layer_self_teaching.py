"""GO-LSD: formula by loops, hands for the weights, and who learns."""

import math

import detrs
import pytest
import tiny
import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmkd.losses.query import query_class_divergence
from mmkd.registry import MODELS
from mmkd.taps import recording
from mmkd.terms.layer_self_teaching import TARGETS, LayerSelfTeachingTerm
from mmkd.terms.queries import DECODER, HEAD, Answers, answers


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def distilled(kind='refine', **settings):
    more = {key: settings.pop(key) for key in ('layers',) if key in settings}
    torch.manual_seed(0)
    student = detrs.detr(kind, **dict(dict(layers=3), **more))
    term = dict(type='mmkd.LayerSelfTeachingTerm', **settings)
    model = MODELS.build(tiny.distilled(student, {}, dict(own=term)))
    torch.manual_seed(0)
    model.init_weights()
    for one in model.parameters():  # heads that start alike say the same
        one.data.add_(0.05 * torch.randn_like(one))
    return model


def shares(model, batch=None):
    torch.manual_seed(0)
    losses = model.loss(*(batch or tiny.batch()))
    return {
        key.removeprefix('loss_kd_own_'): value
        for key, value in losses.items()
        if key.startswith('loss_kd_own_')
    }


def literal(given, labels, targets, classes, part='box'):
    """The formula, query by query."""
    layers, images, queries = labels.shape
    matched, others = [], []
    for image in range(images):
        for query in range(queries):
            final = bbox_cxcywh_to_xyxy(given.boxes[-1, image, query])
            own = [
                layer
                for layer in range(layers)
                if labels[layer, image, query] < classes
            ]
            if own:
                goal = bbox_cxcywh_to_xyxy(targets[own[-1], image, query])
                weight = bbox_overlaps(final[None], goal[None]).item()
            else:
                weight = given.chances[-1, image, query].max().item()
            distance = 0
            for layer in range(layers - 1):
                if part == 'cls':
                    distance += query_class_divergence(
                        given.logits[layer, image, query],
                        given.logits[-1, image, query],
                        given.softmax,
                    ).item()
                    continue
                box = given.boxes[layer, image, query]
                l1 = (box - given.boxes[-1, image, query]).abs().sum()
                near = bbox_overlaps(
                    bbox_cxcywh_to_xyxy(box)[None], final[None], 'giou'
                )
                distance += (5 * l1 + 2 * (1 - near)).item()
            (matched if own else others).append(weight * distance)
    roots = [math.sqrt(len(one)) for one in (matched, others)]
    means = [sum(one) / max(len(one), 1) for one in (matched, others)]
    return sum(a * b for a, b in zip(roots, means)) / sum(roots)


@pytest.mark.parametrize('kind', ['detr', 'dab', 'refine', 'dino'])
@pytest.mark.parametrize('part', ['box', 'cls'])
def test_equals_the_formula_query_by_query(kind, part):
    layers = 2 if kind == 'dab' else 3
    model = distilled(kind, class_weight=1.0, layers=layers)
    torch.manual_seed(0)
    with recording(model, [DECODER, HEAD, TARGETS]) as record:
        found = shares(model)[part]
    given = answers(record)
    layers = len(given.logits)
    taken = record.outputs(TARGETS)[:layers]
    labels = torch.stack([torch.stack(one[0]) for one in taken])
    targets = torch.stack([torch.stack(one[2]) for one in taken])
    assert labels.shape == given.boxes.shape[:3]
    assert 0 < (labels < tiny.CLASSES).sum() < labels.numel()
    expected = literal(given, labels, targets, tiny.CLASSES, part)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_weights_by_hand():
    """One query matched in the first layer, one in both, two in none."""
    logits = torch.full((2, 1, 4, 3), -20.0)
    logits[1, 0, :, 0] = torch.tensor([9.0, 9.0, 0.0, math.log(3)])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(2, 1, 4, 4).clone()
    given = Answers(logits, boxes, boxes, softmax=False)
    matched = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 0, 0]]], dtype=torch.bool)
    targets = torch.zeros(2, 1, 4, 4)
    targets[0, 0, 0] = torch.tensor([0.5, 0.5, 0.2, 0.1])  # half of it
    targets[0, 0, 1] = torch.tensor([0.9, 0.9, 0.1, 0.1])  # another object
    targets[1, 0, 1] = torch.tensor([0.5, 0.5, 0.2, 0.2])  # all of it
    weight = LayerSelfTeachingTerm()._weights(given, matched, targets)
    # Two of each: 1 / sqrt(2) of each, over twice sqrt(2).
    expected = torch.tensor([[0.5, 1.0, 0.5, 0.75]]) / 4
    torch.testing.assert_close(weight, expected)


def test_classes_are_compared_where_asked():
    plain, more = shares(distilled()), shares(distilled(class_weight=2.0))
    assert set(plain) == {'box'}
    assert set(more) == {'box', 'cls'}
    twice = shares(distilled(class_weight=4.0, loss_weight=0.5))
    torch.testing.assert_close(twice['cls'], more['cls'])
    torch.testing.assert_close(2 * twice['box'], more['box'])
    assert more['cls'] > 0


def test_the_last_layer_teaches_and_does_not_learn():
    model = distilled('dab', class_weight=1.0)
    with recording(model, [HEAD]) as record:
        total = sum(shares(model).values())
    for one in record.at(HEAD):
        (grad,) = torch.autograd.grad(total, one, retain_graph=True)
        assert not grad[-1].any()
        assert grad[0].any()


def test_gradients_reach_the_backbone():
    model = distilled()
    sum(shares(model).values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_the_order_of_queries_does_not_matter():
    model = distilled('dab')
    before = shares(model)['box']
    embedding = model.query_embedding.weight
    with torch.no_grad():
        embedding.copy_(embedding[torch.randperm(len(embedding))])
    assert shares(model)['box'].item() == pytest.approx(
        before.item(), rel=1e-4
    )


def test_layers_that_agree_have_nothing_to_learn():
    logits, boxes = torch.randn(1, 2, 5, 3), torch.rand(1, 2, 5, 4)
    three = [one.expand(3, *one.shape[1:]) for one in (logits, boxes)]
    given = Answers(*three, boxes, softmax=False)

    class Outputs:
        detector = distilled()

        def at(self, path):
            if path == HEAD:
                return given.logits, given.boxes
            if path == DECODER:
                return dict(hidden_states=given.boxes)
            labels = [torch.zeros(5, dtype=torch.long)] * 2
            return ((labels, None, list(boxes[0])),) * 3

    class Step:
        student = Outputs()

    Outputs.detector.num_queries = 5
    found = LayerSelfTeachingTerm(class_weight=1.0)(Step())
    for value in found.values():
        assert value.item() == pytest.approx(0, abs=1e-5)


def test_images_without_objects_are_no_trouble():
    images, samples = tiny.batch()
    for one in samples:
        one.gt_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
    found = shares(distilled(class_weight=1.0), (images, samples))
    assert all(one.isfinite() and one > 0 for one in found.values())


@pytest.mark.parametrize(
    ('student', 'said'),
    [
        (lambda: detrs.detr('ddq'), 'goes on with other queries'),
        (tiny.retinanet, 'compares the queries'),
    ],
)
def test_what_has_no_such_layers_is_refused(student, said):
    term = dict(type='mmkd.LayerSelfTeachingTerm')
    with pytest.raises(ValueError, match=said):
        MODELS.build(tiny.distilled(student(), {}, dict(own=term)))


def test_one_layer_alone_is_refused():
    with pytest.raises(ValueError, match='return_intermediate=True'):
        shares(distilled('refine', layers=1))

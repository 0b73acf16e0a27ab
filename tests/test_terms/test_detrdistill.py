"""DETRDistill: each part literally, and the order of queries in none."""

import copy
import itertools

import detrs
import pytest
import tiny
import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from mmengine.structures import InstanceData

from mmkd.losses.query import query_box_errors, query_class_divergence
from mmkd.taps import recording
from mmkd.terms.detrdistill import (
    DETRDistillTerm,
    assigned_loss,
    by_layer,
    query_quality,
    target_mask,
)
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import HEAD, answers, ask, question
from mmkd.terms.query_matching import (
    Objects,
    match_answers,
    match_objects,
    memory_maps,
    of_layers,
)

#: Queries that matter alone, so that what is compared is not drowned.
FEW = dict(queries=6)
WIDE = dict(queries=9, layers=3)


def pair(student='dab', teacher='dab', few=FEW, **settings):
    """One object of each image fills it, so that all boxes meet one."""
    term = DETRDistillTerm('big', **settings)
    images, samples = tiny.batch()
    for one in samples:
        height, width = one.img_shape
        one.gt_instances.bboxes[0] = torch.tensor([0.0, 0, width, height])
    step = detrs.step_of(
        term,
        detrs.built(student, **few),
        detrs.built(teacher, seed=1, **WIDE),
        (images, samples),
    )
    return term, step


# Whom it pairs ---------------------------------------------------------------


@pytest.mark.parametrize(
    ('student', 'teacher', 'prior'),
    [
        ('detr', 'dab', 0),  # a softmax and sigmoids
        ('dab', 'detr', 0),
        ('detr', 'detr', 1),
        ('detr', 'deformable', 0),  # one level and four
        ('deformable', 'dab', 0),
        ('deformable', 'refine', 1),
        ('refine', 'ddq', 0),  # denoising queries only in training
        ('ddq', 'refine', 0),
        ('ddq', 'ddq', 1),
    ],
)
def test_kinds_teach_each_other(student, teacher, prior):
    term, step = pair(student, teacher, prior_weight=prior)
    parts = term(step)
    assert all(one > 0 and one.isfinite() for one in parts.values())
    assert ('prior' in parts) == bool(prior)
    for one in parts.values():
        model = step.student.detector
        model.zero_grad()
        one.backward(retain_graph=True)
        assert model.backbone.conv1.weight.grad.abs().sum() > 0
    detector = step.teacher('big').detector
    assert all(one.grad is None for one in detector.parameters())


def test_memories_of_unlike_width_are_aligned():
    wide = dict(queries=9, layers=1)
    student, teacher = (
        detrs.built(kind, seed, **wide)
        for seed, kind in enumerate(('dab', 'conditional'))
    )
    for channels, message in (
        (None, r'16 wide.*256\. Set channels=\(16, 256\)'),
        ((32, 256), 'DETRDistillTerm.*32'),
    ):
        term = DETRDistillTerm('big', channels, prior_weight=0)
        step = detrs.step_of(term, student, teacher)
        with pytest.raises(ValueError, match=message):
            term(step)
    term = DETRDistillTerm('big', (16, 256), prior_weight=0)
    term(detrs.step_of(term, student, teacher))['feature'].backward()
    assert term.align.weight.grad.abs().sum() > 0


# Answers ---------------------------------------------------------------------


@pytest.mark.parametrize('queries', [2, 6, 12])
def test_answers_equal_the_literal_formula(queries):
    """Also of fewer queries than there are objects."""
    term, step = pair(
        few=dict(queries=queries),
        positive_weight=0.5,
        negative_weight=3.0,
        prior_weight=0,
    )
    own, other = answers(step.student), answers(step.teacher('big'))
    other = of_layers(other, uniform_map(2, 3))
    owner = match_objects(other, Objects.of(step.gt))
    index, found = match_answers(own, other, first=owner >= 0)
    expected = dict(classes=0.0, boxes=0.0, negatives=0.0)
    for layer in range(2):
        values = dict(classes=[], boxes=[], negatives=[])
        for image, column in itertools.product(range(2), range(9)):
            if not found[layer, image, column]:
                continue
            row = index[layer, image, column]
            mine, theirs = ((layer, image, place) for place in (row, column))
            l1, error = query_box_errors(own.boxes[mine], other.boxes[theirs])
            if owner[theirs] < 0:
                values['negatives'].append(3 * (5 * l1 + 2 * error))
                continue
            values['boxes'].append(0.5 * (5 * l1 + 2 * error))
            divergence = query_class_divergence(
                own.logits[mine], other.logits[theirs]
            )
            values['classes'].append(0.5 * 2 * divergence)
        for name, some in values.items():
            if some:
                expected[name] = expected[name] + torch.stack(some).mean()
    parts = term(step)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], torch.as_tensor(value))


def test_a_copy_has_nothing_to_learn_but_the_prior():
    model = detrs.built('dab', **FEW)
    term = DETRDistillTerm('big')
    parts = term(detrs.step_of(term, model, copy.deepcopy(model)))
    for name in ('classes', 'boxes', 'negatives', 'feature'):
        assert parts[name].item() == pytest.approx(0, abs=1e-4)
    assert parts['prior'] > 0.1


@pytest.mark.parametrize('kind', ['dab', 'refine'])
def test_the_order_of_queries_does_not_matter(kind):
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    models = [detrs.built(kind, seed, **FEW) for seed in range(2)]
    shares, gradients = [], []
    for side in (None, 0, 1):
        some = copy.deepcopy(models)
        if side is not None:
            detrs.reorder(some[side], order)
        term = DETRDistillTerm('big')
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


def test_positives_are_taught_even_if_queries_are_few():
    term = DETRDistillTerm('big', prior_weight=0, feature_weight=0)
    student = detrs.built('dab', queries=3)
    teacher = detrs.built('dab', seed=1, queries=9)
    parts = term(detrs.step_of(term, student, teacher))
    # Three objects an image take all three queries.
    assert parts['classes'] > 0
    assert parts['negatives'] == 0


def test_images_without_boxes_have_negatives_alone():
    term = DETRDistillTerm('big')
    step = detrs.step_of(
        term,
        detrs.built('dab', **FEW),
        detrs.built('dab', seed=1, **FEW),
        tiny.batch(boxes=0),
    )
    parts = term(step)
    for name in ('classes', 'boxes', 'feature'):
        assert parts[name] == 0
    assert parts['negatives'] > 0
    sum(parts.values()).backward()
    for one in step.student.detector.parameters():
        assert one.grad is None or one.grad.isfinite().all()


# Features --------------------------------------------------------------------


def test_quality_equals_the_literal_formula():
    _, step = pair()
    found, objects = answers(step.teacher('big')), Objects.of(step.gt)
    quality = query_quality(found, objects, gamma=0.3)
    corners = bbox_cxcywh_to_xyxy(found.boxes[-1])
    for image, query in itertools.product(range(2), range(9)):
        overlap = bbox_overlaps(
            corners[image, query][None],
            bbox_cxcywh_to_xyxy(objects.boxes[image]),
        )[0]
        best = max(
            found.chances[-1, image, query, label] ** 0.3 * fit**0.7
            for label, fit in zip(objects.labels[image], overlap)
        )
        torch.testing.assert_close(quality[image, query], best)


def test_a_query_looks_along_its_own_direction():
    feature = torch.tensor([[[[3.0, 0.0, 1.0]], [[0.0, 2.0, 1.0]]]])
    mask = target_mask(feature, torch.tensor([[[2.0, 0.0]]]), torch.ones(1, 1))
    torch.testing.assert_close(mask.flatten(), torch.tensor([1.0, 0, 0.5]))


def test_quality_weighs_queries_and_its_scale_does_not_matter():
    torch.manual_seed(0)
    feature, queries = torch.randn(2, 4, 3, 5), torch.randn(2, 6, 4)
    quality = torch.rand(2, 6)
    expected = torch.zeros(2, 1, 3, 5)
    for image, query in itertools.product(range(2), range(6)):
        cosine = torch.cosine_similarity(
            feature[image], queries[image, query][:, None, None], dim=0
        )
        share = quality[image, query] / quality[image].sum()
        expected[image, 0] += share * cosine**2
    found = target_mask(feature, queries, quality)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        target_mask(feature, queries, quality / 9), found
    )
    assert not target_mask(feature, queries, 0 * quality).any()


def test_features_equal_the_literal_formula_over_all_levels():
    term, step = pair('deformable', 'refine', feature_weight=2.0, gamma=0.3)
    shown = step.teacher('big')
    quality = query_quality(answers(shown), Objects.of(step.gt), 0.3)
    total, count = 0.0, 0
    maps = memory_maps(step.student), memory_maps(shown)
    for own, other in zip(*maps):
        mask = target_mask(other, answers(shown).states[-1], quality)
        rows, columns = own.shape[-2:]
        for image, (height, width) in enumerate(step.gt.image_shapes):
            # A cell counts if its corner is of the image, as in mmdet.
            inside = (
                -(-rows * height // tiny.SIZE),
                -(-columns * width // tiny.SIZE),
            )
            for y, x in itertools.product(*map(range, inside)):
                error = (own[image, :, y, x] - other[image, :, y, x]) ** 2
                total = total + mask[image, 0, y, x] * error.mean()
                count += 1
    torch.testing.assert_close(term(step)['feature'], 2 * total / count)


def test_levels_of_unlike_size_take_the_nearest():
    """One level of stride 32 against strides 8, 16, 32 and 64."""
    term, step = pair('detr', 'deformable', prior_weight=0)
    before = term(step)['feature']
    shown = step.teacher('big')
    _, given = shown.inputs('forward_decoder')
    cells = 16 * 16 + 8 * 8
    given['memory'] = given['memory'].clone()
    given['memory'][:, :cells] += 1
    torch.testing.assert_close(term(step)['feature'], before)
    given['memory'][:, cells : cells + 16] += 1
    assert term(step)['feature'] != before


# The teacher's queries -------------------------------------------------------


class Given:
    """An assigner that knows what it says, image by image."""

    def __init__(self, owner):
        self.owner = iter(owner.flatten(0, 1))

    def assign(self, **_):
        return InstanceData(gt_inds=next(self.owner) + 1)


@pytest.mark.parametrize('kind', ['detr', 'dab', 'refine'])
def test_prior_is_the_detectors_own_loss_with_objects_given(kind):
    term, step = pair(kind, kind, prior_weight=0.5)
    student, shown = step.student, step.teacher('big')
    other = of_layers(answers(shown), uniform_map(2, 3))
    owner = match_objects(other, Objects.of(step.gt))
    found = ask(student, question(shown))
    head = student.detector.bbox_head
    head.assigner = Given(owner)
    expected = sum(
        sum(
            head.loss_by_feat_single(
                logits,
                boxes,
                [one.gt_instances for one in step.samples],
                [one.metainfo for one in step.samples],
            )
        )
        for logits, boxes in zip(found.logits, found.boxes)
    )
    torch.testing.assert_close(
        term(step)['prior'], 0.5 * expected.squeeze(), rtol=1e-4, atol=1e-5
    )


def test_prior_of_scores_of_quality_is_the_detectors_own():
    """DDQ's head tells how well a box fits."""
    model = detrs.built('ddq', **FEW)
    images, samples = tiny.batch()
    with recording(model, [HEAD]):
        model.loss(images, samples)
    step = pair('dab', 'dab')[1]
    head, objects = model.bbox_head, Objects.of(step.gt)
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 6, 3), torch.rand(2, 6, 4) * 0.3 + 0.3
    owner = torch.tensor([[0, -1, 2, 1, -1, -1], [-1, 1, 0, -1, 2, -1]])
    head.assigner = Given(owner[None])
    expected = head.loss_by_feat_single(
        logits,
        boxes,
        [one.gt_instances for one in step.samples],
        [one.metainfo for one in step.samples],
    )
    torch.testing.assert_close(
        assigned_loss(head, logits, boxes, owner, objects),
        sum(expected).squeeze(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_without_objects_the_prior_s_classes_are_divided_by_one():
    """And not by the nothing that a head without background weight counts."""
    model = detrs.built('dab', **FEW)
    head = model.bbox_head
    assert head.bg_cls_weight == 0
    logits, boxes = torch.randn(2, 6, tiny.CLASSES), torch.rand(2, 6, 4)
    owner = torch.full((2, 6), -1)
    nothing = Objects(
        torch.zeros(2, 1, 4),
        torch.zeros(2, 1, dtype=torch.long),
        torch.zeros(2, 1, dtype=torch.bool),
    )
    found = assigned_loss(head, logits, boxes, owner, nothing)
    chance = logits.sigmoid()  # a focal loss of background alone
    terms = 0.75 * chance**2 * -(1 - chance).log()
    expected = head.loss_cls.loss_weight * terms.sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_decoders_of_unlike_form_refuse_the_prior():
    term, step = pair('dab', 'detr')
    with pytest.raises(ValueError, match='DETRDistillTerm.*prior_weight=0'):
        term(step)


# Settings --------------------------------------------------------------------


def test_parts_without_weight_are_not_there():
    parts = dict(
        positive_weight=0, negative_weight=0, feature_weight=0, prior_weight=0
    )
    assert DETRDistillTerm('big', **parts).silent()
    _, step = pair()
    for name, left in (
        ('positive_weight', {'classes', 'boxes', 'negatives'}),
        ('negative_weight', {'classes', 'boxes', 'negatives'}),
        ('feature_weight', {'feature'}),
        ('prior_weight', {'prior'}),
    ):
        term = DETRDistillTerm('big', **{**parts, name: 1.0})
        assert not term.silent()
        assert set(term(step)) == left


def test_detectors_without_queries_are_refused():
    term = DETRDistillTerm('big')
    one = tiny.build(tiny.retinanet())
    with pytest.raises(ValueError, match='student, RetinaNet, has none'):
        term.bind(one, dict(big=detrs.Shown(detrs.built('dab'))))
    with pytest.raises(ValueError, match='gamma between 0 and 1'):
        DETRDistillTerm('big', gamma=2)


def test_the_distiller_checks_the_pair_while_it_is_built(tmp_path):
    teacher = detrs.detr('deformable')
    file = tiny.save_teacher(copy.deepcopy(teacher), tmp_path / 'big.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    term = dict(type='mmkd.DETRDistillTerm', teacher='big')
    config = tiny.distilled(detrs.detr('dab'), dict(big=big), dict(x=term))
    with pytest.raises(ValueError, match='prior_weight=0'):
        tiny.build(config)


def test_layers_are_averaged_by_themselves_and_added():
    values = torch.arange(12.0).view(2, 2, 3)
    there = torch.zeros(2, 2, 3, dtype=torch.bool)
    there[0, 0, 1] = there[0, 1, 2] = there[1, 1, 0] = True
    # (1 + 5) / 2 of the first layer, 9 of the second.
    assert by_layer(values, there).item() == 12
    assert by_layer(values, there & False).item() == 0

"""MLKD-BERT by queries: formulas by loops, matching, padding, who learns."""

import copy

import detrs
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from scipy.optimize import linear_sum_assignment
from torch import nn

from mmkd.ops.contrast import supervised_contrast
from mmkd.ops.heads import heads_of
from mmkd.ops.relations import relation_divergence
from mmkd.structures import GroundTruth
from mmkd.terms.mlkd_bert_queries import (
    MLKDBertQueryLayersTerm,
    MLKDBertQuerySamplesTerm,
    grid_pair,
    related,
)
from mmkd.terms.queries import answers
from mmkd.terms.query_matching import (
    Objects,
    match_objects,
    of_layers,
    queries_of,
)

FEW = dict(queries=6)
MORE = dict(queries=9, layers=3)
TERMS = dict(layers=MLKDBertQueryLayersTerm, samples=MLKDBertQuerySamplesTerm)


def width(model):
    return model.decoder.embed_dims


def pair(student='refine', teacher='refine', which='layers', **settings):
    """A student of two layers, a teacher of three and of more queries."""
    models = detrs.built(student, **FEW), detrs.built(teacher, 1, **MORE)
    return of(which, *models, **settings)


def of(which, student, teacher, batch=None, **settings):
    torch.manual_seed(0)
    settings = (
        dict(student_channels=width(student), teacher_channels=width(teacher))
        | settings
    )
    term = TERMS[which]('big', **settings)
    return term, detrs.step_of(term, student, teacher, batch)


# The first stage -------------------------------------------------------------


def relation(tokens):
    return (tokens @ tokens.T / tokens.shape[1] ** 0.5).softmax(1)


def divergences(own, other):
    """Of each row of the relations, one chance after another."""
    return [
        sum(t * (t / s).log() for s, t in zip(*rows))
        for rows in zip(relation(own), relation(other))
    ]


def partners(own, other):
    """Queries of both sides by the cost of their boxes."""
    l1 = (own[:, None] - other).abs().sum(-1)
    near = bbox_overlaps(
        bbox_cxcywh_to_xyxy(own), bbox_cxcywh_to_xyxy(other), 'giou'
    )
    rows, columns = linear_sum_assignment(
        (5 * l1 + 2 * (1 - near)).detach().numpy()
    )
    return torch.as_tensor(rows), torch.as_tensor(columns)


def test_decoders_equal_the_formula_query_by_query():
    term, step = pair(parts='decoder')
    shown = step.teacher('big')
    said, heeded = answers(step.student), answers(shown)
    weight = term.projections['decoder'].weight
    mha, ffn = 0.0, 0.0
    for layer, like in ((0, 1), (1, 2)):  # three layers for two
        heads = []
        for side, index in ((step.student, layer), (shown, like)):
            path = f'decoder.layers.{index}.self_attn.attn'
            module = side.detector.get_submodule(path)
            heads.append(heads_of(module, *side.inputs(path))[0])
        rows, errors = [], []
        for image in range(2):
            one, other = partners(
                said.boxes[-1, image], heeded.boxes[-1, image]
            )
            for split in range(0, 16, 4):
                part = slice(split, split + 4)
                rows += divergences(
                    heads[0][image, one, part], heads[1][image, other, part]
                )
            moved = said.states[layer, image, one] @ weight.T
            errors.append(F.mse_loss(moved, heeded.states[like, image, other]))
        mha = mha + sum(rows) / len(rows)
        ffn = ffn + sum(errors) / len(errors)
    found = term(step)
    torch.testing.assert_close(found['mha'], mha, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found['ffn'], ffn, rtol=1e-4, atol=1e-6)


def test_encoders_equal_the_formula_level_by_level():
    term, step = pair(parts='encoder', grid=(4, 4))
    shown = step.teacher('big')
    weight = term.projections['encoder'].weight
    maps = [step.student.at('neck'), shown.at('neck')]
    sizes = [one.shape[-2:] for one in maps[0]]
    counts = [rows * columns for rows, columns in sizes]

    gt = step.gt
    emb = [
        divergences(*(one[image][there[image]] for one in (tokens, like)))
        for level, both in enumerate(zip(*maps))
        for tokens, like, there in [grid_pair(gt, *both, (4, 4))]
        for image in range(2)
    ]
    found = term(step)
    expected = sum(
        torch.stack(emb[level] + emb[level + 1]).mean()
        for level in range(0, len(emb), 2)
    )
    torch.testing.assert_close(found['emb'], expected, rtol=1e-4, atol=1e-6)
    mha, ffn = 0.0, 0.0
    for layer, other in ((0, 1), (1, 2)):
        path = 'encoder.layers.{}'.format
        heads = [
            side.inputs(f'{path(index)}.self_attn.output_proj')[0][0]
            for side, index in ((step.student, layer), (shown, other))
        ]
        outputs = step.student.at(path(layer)), shown.at(path(other))
        for level, size in enumerate(sizes):
            heads_, outputs_ = (
                [
                    one.split(counts, 1)[level].mT.unflatten(2, size)
                    for one in both
                ]
                for both in (heads, outputs)
            )
            mha = mha + related(4, *grid_pair(gt, *heads_, (4, 4)))
            tokens, like, there = grid_pair(gt, *outputs_, (4, 4))
            ffn = ffn + F.mse_loss((tokens @ weight.T)[there], like[there])
    torch.testing.assert_close(found['mha'], mha, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found['ffn'], ffn, rtol=1e-4, atol=1e-6)


def test_queries_of_training_are_left_out():
    term, step = pair('dino', 'dino', parts='decoder')
    path = 'decoder.layers.0.self_attn.attn'
    module = step.student.detector.get_submodule(path)
    whole, _ = heads_of(module, *step.student.inputs(path))
    assert whole.shape[1] > 6
    ((own, *_), _) = term._decoder(step, step.student, step.teacher('big'))[
        'mha'
    ]
    for image in range(2):
        known = {tuple(one.tolist()) for one in whole[image, -6:]}
        assert {tuple(one.tolist()) for one in own[image]} == known


def test_splits_are_related_one_by_one():
    torch.manual_seed(0)
    own, other = torch.randn(2, 1, 5, 8)
    there = torch.tensor([[True, True, False, True, True]])
    kept = [one[0, there[0]] for one in (own, other)]
    expected = [
        row
        for part in (slice(0, 4), slice(4, 8))
        for row in divergences(*(one[:, part] for one in kept))
    ]
    torch.testing.assert_close(
        related(2, own, other, there), sum(expected) / len(expected)
    )
    for one in (own, other):  # what is not there
        one[:, 2] = 99.0
    torch.testing.assert_close(
        related(2, own, other, there), sum(expected) / len(expected)
    )


@pytest.mark.parametrize('which', TERMS)
@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_the_order_of_queries_does_not_matter(which, side):
    """Of the student, gradients are put in that order as well."""
    order = torch.randperm(9 if side == 'teacher' else 6)
    found = []
    for turned in (False, True):
        models = detrs.built('detr', **FEW), detrs.built('refine', 1, **MORE)
        if turned:
            detrs.reorder(models[side == 'teacher'], order)
        term, step = of(which, *models)
        shares = term(step)
        sum(shares.values()).backward()
        gradient = models[0].query_embedding.weight.grad
        found.append((shares, gradient))
    (before, gradient), (after, turned) = found
    near = dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after, before, **near)
    if side == 'student':
        gradient = gradient[order]
    torch.testing.assert_close(turned, gradient, rtol=1e-2, atol=1e-4)


def test_the_padded_border_has_no_influence():
    gt = GroundTruth.from_samples(tiny.batch()[1], tiny.batch()[0])
    rows, columns = (-(-size // 8) for size in gt.image_shapes[1])
    own, other = torch.randn(2, 2, 8, 16, 16)
    before = grid_pair(gt, own, other, (4, 4))
    for one in (own, other):
        one[1, :, rows:] = 99
        one[1, :, :, columns:] = 99
    after = grid_pair(gt, own, other, (4, 4))
    assert (rows, columns) != (16, 16)
    for one, like in zip(before, after):
        torch.testing.assert_close(one[before[2]], like[after[2]])


def test_maps_of_two_sizes_meet_on_the_smaller_grid():
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], (32, 32))
    own, other = torch.randn(1, 2, 8, 4), torch.randn(1, 3, 2, 8)
    tokens, like, there = grid_pair(gt, own, other, (16, 16))
    expected = F.adaptive_avg_pool2d(own, (2, 4)).flatten(2).mT
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(
        like, F.adaptive_avg_pool2d(other, (2, 4)).flatten(2).mT
    )
    assert there.all()


def test_relations_know_no_rotation_but_outputs_do():
    term = MLKDBertQueryLayersTerm('big', 16, 16)
    x = torch.randn(2, 6, 16)
    turned = torch.linalg.qr(torch.randn(16, 16))[0]
    there = torch.ones(2, 6, dtype=torch.bool)
    assert abs(related(1, x, x @ turned, there).item()) < 1e-5
    nn.init.eye_(term.projections['encoder'].weight)
    assert term._projected('encoder', x, x, there).item() < 1e-9
    assert term._projected('encoder', x, x @ turned, there).item() > 0.1


@pytest.mark.parametrize('kind', ['dab', 'refine', 'dino'])
def test_a_copy_has_nothing_to_learn(kind):
    student = detrs.built(kind, **FEW)
    term, step = of('layers', student, copy.deepcopy(student))
    for one in term.projections.values():
        nn.init.eye_(one.weight)
    for value in term(step).values():
        assert abs(value.item()) < 1e-4


def test_each_part_has_its_weight():
    term, step = pair()
    whole = term(step)
    for part in ('emb', 'mha', 'ffn'):
        setattr(term, f'{part}_weight', 3.0)
    for part, value in term(step).items():
        torch.testing.assert_close(value, 3 * whole[part])


# The second stage ------------------------------------------------------------


def test_samples_are_the_queries_that_answer_for_objects():
    term, step = pair(which='samples')
    gt, shown = step.gt, step.teacher('big')
    objects = Objects.of(gt)
    own, other = answers(step.student), answers(shown)
    rows = []
    for image, place in zip(gt.image, gt.place):
        row = []
        for one in (own, other):
            owner = match_objects(one, objects)[-1, image]
            row.append((owner == place).nonzero().item())
        rows.append((image, *row))
    images, mine, theirs = (torch.tensor(one) for one in zip(*rows))
    states = own.states[-1, images, mine], other.states[-1, images, theirs]
    found = term(step)
    expected = torch.stack(divergences(*states)).mean()
    torch.testing.assert_close(found['ss'], expected)
    moved = states[0] @ term.projection.weight.T
    torch.testing.assert_close(
        found['sc'],
        supervised_contrast(
            torch.cat([moved, states[1]]), gt.labels.repeat(2), 0.1
        ),
    )
    classes = []
    for image, one, like in rows:
        s, t = (
            side.logits[-1, image, query] / 2
            for side, query in ((own, one), (other, like))
        )
        p, q = t.sigmoid(), s.sigmoid()
        each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        classes.append(4 * each.sum())
    torch.testing.assert_close(
        found['kd'], torch.stack(classes).mean(), rtol=1e-3, atol=1e-5
    )
    boxes = own.boxes[-1, images, mine], other.boxes[-1, images, theirs]
    l1 = (boxes[0] - boxes[1]).abs().sum(-1)
    near = bbox_overlaps(
        *map(bbox_cxcywh_to_xyxy, boxes), 'giou', is_aligned=True
    )
    torch.testing.assert_close(found['box'], (5 * l1 + 2 * (1 - near)).mean())


def test_an_object_without_a_query_counts_in_no_part():
    """Two queries for three objects of each image: one has none."""
    models = [detrs.built('detr', seed, queries=2) for seed in range(2)]
    term, step = of('samples', *models)
    before = term(step)
    gt, objects = step.gt, Objects.of(step.gt)
    index = [
        queries_of(of_layers(answers(one), [-1]), objects)
        for one in (step.student, step.teacher('big'))
    ]
    kept = (index[0][1] & index[1][1])[0, gt.image, gt.place]
    assert 0 < kept.sum() < len(kept)
    rows = [
        answers(one).states[
            -1, gt.image[kept], query[0, gt.image, gt.place][kept]
        ]
        for one, (query, _) in zip((step.student, step.teacher('big')), index)
    ]
    torch.testing.assert_close(before['ss'], relation_divergence(*rows))
    vectors = torch.cat([term.projection(rows[0]), rows[1]])
    expected = supervised_contrast(vectors, gt.labels[kept].repeat(2), 0.1)
    torch.testing.assert_close(before['sc'], expected)


def test_contrast_leaves_out_what_is_not_there():
    torch.manual_seed(0)
    vectors, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    there = torch.tensor([True, True, True, False, True, True])
    torch.testing.assert_close(
        supervised_contrast(vectors, labels, 0.1, there),
        supervised_contrast(vectors[there], labels[there], 0.1),
    )


def test_images_without_boxes_cost_nothing():
    models = detrs.built('refine', **FEW), detrs.built('refine', 1, **MORE)
    term, step = of('samples', *models, batch=tiny.batch(boxes=0))
    found = term(step)
    assert found.keys() == {'ss', 'sc', 'kd', 'box'}
    assert all(value.item() == 0 for value in found.values())
    sum(found.values()).backward()
    assert term.projection.weight.grad is not None


def test_each_share_has_its_weight():
    term, step = pair(which='samples')
    whole = term(step)
    term.weights = dict.fromkeys(whole, 3.0)
    for part, value in term(step).items():
        torch.testing.assert_close(value, 3 * whole[part])


# Who learns ------------------------------------------------------------------


@pytest.mark.parametrize('which', TERMS)
@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ('detr', 'dab'),
        ('dab', 'refine'),
        ('refine', 'detr'),
        ('deformable', 'conditional'),
        ('conditional', 'dino'),
        ('dino', 'deformable'),
    ],
)
def test_the_student_learns_from_other_kinds(which, student, teacher):
    term, step = pair(student, teacher, which)
    found = term(step)
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()
    model = step.student.detector
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    detector = step.teacher('big').detector
    assert all(one.grad is None for one in detector.parameters())


@pytest.mark.parametrize(
    ('student', 'teacher'), [('ddq', 'refine'), ('refine', 'ddq')]
)
def test_queries_that_change_are_refused_in_decoders_alone(student, teacher):
    with pytest.raises(ValueError, match=r"parts=\('encoder',\)"):
        pair(student, teacher)
    term, step = pair(student, teacher, parts=('encoder',))
    assert term(step).keys() == {'emb', 'mha', 'ffn'}
    term, step = pair(student, teacher, 'samples')
    assert all(one.isfinite() for one in term(step).values())


@pytest.mark.parametrize('which', TERMS)
def test_wrong_channels_name_those_that_are_there(which):
    with pytest.raises(ValueError, match='teacher_channels=16'):
        pair(which=which, teacher_channels=8)


def test_splits_must_divide_the_channels():
    with pytest.raises(ValueError, match='Set splits='):
        pair(splits=3)
    assert pair(splits=2)[0].splits == 2

"""MLKD-BERT by queries: formulas by loops, matching, padding, who learns."""

import copy

import detrs
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.registry import init_default_scope
from scipy.optimize import linear_sum_assignment
from torch import nn

from mmkd.ops.heads import heads_of
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth
from mmkd.taps import recording
from mmkd.terms.mlkd_bert_queries import of_objects
from mmkd.terms.queries import DECODER, HEAD, Answers, answers


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def width(model):
    return model.encoder.layer_cfg.self_attn_cfg.embed_dims


def distilled(folder, kind='refine', of='refine', term='Layers', **settings):
    """A student with two layers, of a teacher with three and nine queries."""
    student = detrs.detr(kind)
    teacher = detrs.detr(of, base=4, queries=9, layers=3)
    file = tiny.save_teacher(copy.deepcopy(teacher), folder / 't.pth')
    config = dict(
        dict(
            type=f'mmkd.MLKDBertQuery{term}Term',
            teacher='big',
            student_channels=width(student),
            teacher_channels=width(teacher),
        ),
        **settings,
    )
    torch.manual_seed(0)
    model = MODELS.build(
        tiny.distilled(
            student,
            dict(big=dict(config=dict(model=teacher), checkpoint=str(file))),
            dict(own=config),
        )
    )
    torch.manual_seed(0)
    model.init_weights()
    return model


def shares(model, batch=None):
    torch.manual_seed(0)
    losses = model.loss(*(batch or tiny.batch()))
    return {
        key.removeprefix('loss_kd_own_'): value
        for key, value in losses.items()
        if key.startswith('loss_kd_own_')
    }


def permute_queries(detector, order):
    """The same detector, asked in another order."""
    with torch.no_grad():
        for path in ('query_embedding', 'reference_points_fc'):
            part = getattr(detector, path, None)
            if isinstance(part, nn.Embedding):
                part.weight.copy_(part.weight[order])


# Heads of an attention -------------------------------------------------------


@pytest.mark.parametrize('first', [True, False])
def test_heads_mixed_are_what_attention_returns(first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=first)
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(3, 5, 8)
    given = x if first else x.transpose(0, 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[0, 2] = True
    heads, rows = heads_of(
        attention,
        (given, given, given),
        dict(key_padding_mask=padding, attn_mask=mask),
    )
    expected, seen = attention(
        given,
        given,
        given,
        key_padding_mask=padding,
        attn_mask=mask,
        average_attn_weights=False,
    )
    if not first:
        expected = expected.transpose(0, 1)
    torch.testing.assert_close(attention.out_proj(heads), expected)
    torch.testing.assert_close(rows, seen)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, 2, 5))


# The first stage -------------------------------------------------------------


def relation(tokens):
    return (tokens @ tokens.T / tokens.shape[1] ** 0.5).softmax(1)


def divergence(own, other):
    own, other = relation(own), relation(other)
    return [
        sum(t * (t / s).log() for s, t in zip(*rows))
        for rows in zip(own, other)
    ]


def test_decoder_equals_the_formula_query_by_query(tmp_path):
    model = distilled(tmp_path, parts=('decoder',))
    projection = model.terms['own'].projections['decoder'].weight
    heads = [f'decoder.layers.{index}.self_attn.attn' for index in range(3)]
    detector = model.teachers['big'].detector
    batch = tiny.batch()
    with (
        recording(model, [DECODER, HEAD, *heads[:2]]) as own,
        recording(detector, [DECODER, HEAD, *heads]) as other,
    ):
        found = shares(model, batch)
    said, heeded = answers(own), answers(other)
    mha, ffn = [], []
    for layer, like in ((0, 1), (1, 2)):  # three layers for two
        tokens, target = (
            heads_of(
                side.detector.get_submodule(heads[index]),
                *side.inputs(heads[index]),
            )[0]
            for side, index in ((own, layer), (other, like))
        )
        rows, errors = [], []
        for image in range(2):
            a, b = said.boxes[-1, image], heeded.boxes[-1, image]
            l1 = (a[:, None] - b).abs().sum(-1)
            near = pairwise_giou(a, b)
            pairs = linear_sum_assignment(
                (5 * l1 + 2 * (1 - near)).detach().numpy()
            )
            pick, order = map(torch.as_tensor, pairs)
            for split in range(4):
                part = slice(4 * split, 4 * split + 4)
                rows += divergence(
                    tokens[image, pick, part], target[image, order, part]
                )
            moved = said.states[layer, image, pick] @ projection.T
            errors.append(F.mse_loss(moved, heeded.states[like, image, order]))
        mha.append(sum(rows) / len(rows))
        ffn.append(sum(errors) / len(errors))
    torch.testing.assert_close(found['mha'], sum(mha), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found['ffn'], sum(ffn), rtol=1e-4, atol=1e-6)


def pairwise_giou(first, second):
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps

    return bbox_overlaps(
        bbox_cxcywh_to_xyxy(first), bbox_cxcywh_to_xyxy(second), 'giou'
    )


@pytest.mark.parametrize('side', ['teacher', 'student'])
@pytest.mark.parametrize('term', ['Layers', 'Samples'])
def test_the_order_of_queries_does_not_matter(tmp_path, side, term):
    model = distilled(tmp_path, 'detr', 'refine', term)
    for one in model.modules():  # chance knows places
        if isinstance(one, nn.Dropout):
            one.p = 0.0
        elif isinstance(one, nn.MultiheadAttention):
            one.dropout = 0.0
    before = shares(model)
    detector = model if side == 'student' else model.teachers['big'].detector
    permute_queries(detector, torch.randperm(detector.num_queries))
    after = shares(model)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)


def test_padding_has_no_influence(tmp_path):
    model = distilled(tmp_path, parts=('encoder',))
    term = model.terms['own']
    images, samples = tiny.batch()
    gt = GroundTruth.from_samples(samples, images)

    class Fake:
        size = tuple(images.shape[-2:])

    step = type('Step', (), dict(images=images, gt=gt))
    own, other = torch.randn(2, 2, 8, 16, 16).unbind()
    before = term._pooled(step, Fake, own, other)
    rows, columns = gt.image_shapes[1]
    scale = images.shape[-1] // 16
    for one in (own, other):
        one[1, :, -(-rows // scale) :] = 99
        one[1, :, :, -(-columns // scale) :] = 99
    after = term._pooled(step, Fake, own, other)
    assert not before[2].all()
    for one, like in zip(before[:2], after[:2]):
        torch.testing.assert_close(one[before[2]], like[after[2]])


def test_relations_know_no_rotation_but_outputs_do(tmp_path):
    model = distilled(tmp_path)
    term = model.terms['own']
    x = torch.randn(2, 6, 16)
    turned = torch.linalg.qr(torch.randn(16, 16))[0]
    there = torch.ones(2, 6, dtype=torch.bool)
    term.splits = 1
    outputs = type('Outputs', (), dict(detector=model))
    sides = outputs, outputs
    related = term._related('encoder', sides, x, x @ turned, there)
    assert abs(related.item()) < 1e-5
    nn.init.eye_(term.projections['encoder'].weight)
    assert term._projected('encoder', x, x, there).item() < 1e-9
    assert term._projected('encoder', x, x @ turned, there).item() > 0.1


# The second stage ------------------------------------------------------------


def test_objects_by_hand():
    """Two objects; the second query sits on the first, the first on none."""
    boxes = torch.tensor(
        [[0.9, 0.1, 0.1, 0.1], [0.25, 0.25, 0.5, 0.5], [0.7, 0.7, 0.4, 0.4]]
    )
    logits = torch.zeros(1, 1, 3, 2)
    given = Answers(logits, boxes[None, None], boxes[None, None], False)
    gt = GroundTruth.from_boxes(
        [torch.tensor([[0.0, 0, 5, 5], [5, 5, 9, 9]])],
        (10, 10),
        [torch.tensor([0, 1])],
    )
    found = of_objects(given, gt)
    torch.testing.assert_close(found.boxes[0], boxes[1:])
    assert found.found.all()


def test_chances_choose_between_equal_boxes():
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 1, 2, 4)
    logits = torch.tensor([[[[4.0, -4], [-4, 4]]]])
    gt = GroundTruth.from_boxes(
        [torch.tensor([[4.0, 4, 6, 6]])], (10, 10), [torch.tensor([1])]
    )
    found = of_objects(Answers(logits, boxes, logits, False), gt)
    torch.testing.assert_close(found.logits[0, 0], logits[0, 0, 1])


def test_images_without_boxes_cost_nothing(tmp_path):
    model = distilled(tmp_path, term='Samples')
    found = shares(model, tiny.batch(boxes=0))
    assert all(value.item() == 0 for value in found.values())
    sum(found.values()).backward()


# Who learns ------------------------------------------------------------------


KINDS = ['detr', 'dab', 'conditional', 'deformable', 'refine', 'dino']


@pytest.mark.parametrize('term', ['Layers', 'Samples'])
@pytest.mark.parametrize(
    ('kind', 'of'), list(zip(KINDS, [*KINDS[1:], KINDS[0]]))
)
def test_the_student_learns_from_other_kinds(tmp_path, kind, of, term):
    model = distilled(tmp_path, kind, of, term)
    found = shares(model)
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    teacher = model.teachers['big'].detector
    assert all(one.grad is None for one in teacher.parameters())


@pytest.mark.parametrize(
    ('kind', 'of'), [('ddq', 'refine'), ('refine', 'ddq')]
)
def test_queries_that_change_are_refused(tmp_path, kind, of):
    with pytest.raises(ValueError, match=r"parts=\('encoder',\)"):
        distilled(tmp_path, kind, of)
    found = shares(distilled(tmp_path, kind, of, parts=('encoder',)))
    assert set(found) == {'emb', 'mha', 'ffn'}


def test_wrong_channels_name_those_that_are_there(tmp_path):
    for term in ('Layers', 'Samples'):
        with pytest.raises(ValueError, match='teacher_channels=16'):
            distilled(tmp_path, term=term, teacher_channels=8)


def test_splits_must_divide_the_channels(tmp_path):
    with pytest.raises(ValueError, match='Set splits='):
        distilled(tmp_path, splits=3)

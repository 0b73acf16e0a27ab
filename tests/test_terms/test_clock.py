import detrs
import pytest
import tiny
import torch
from asking import detector, distilled, permuted, step_of

from mmkd.losses.clock_memory import CLoCKMemoryLoss
from mmkd.ops.boxes import giou
from mmkd.structures import GroundTruth
from mmkd.terms.clock import CLoCKTerm, _cost, target_queries
from mmkd.terms.queries import Answers, answers, ask, question
from mmkd.terms.query_matching import memory_maps
from mmkd.terms.shared_queries import answer_distances

KINDS = list(detrs.CONFIGS)
#: Queries that hold a box.
BOXED = ['dab', 'two_stage', 'dino', 'ddq']
PADDED = dict(shapes=((128, 128), (96, 64)))
QUERIES = ('cls', 'l1', 'giou')


def targets(gt, image):
    """Boxes of an image by centre and size, relative to the image."""
    boxes = gt.boxes[gt.image == image]
    height, width = gt.image_shapes[image]
    x1, y1, x2, y2 = (boxes / boxes.new_tensor([width, height] * 2)).unbind(1)
    boxes = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    return torch.stack(boxes, 1).clamp(0, 1)


@pytest.fixture(scope='module')
def pair():
    return detector('dab'), detector('dab', 1, queries=15, layers=3)


@pytest.fixture
def step(pair):
    return step_of(*pair, **PADDED)


# The formula -----------------------------------------------------------------


def test_it_is_the_memory_and_the_queries_of_objects(step):
    found = CLoCKTerm('big')(step)
    teacher = step.teacher('big')
    (own,), (other,) = (memory_maps(one) for one in (step.student, teacher))
    expected = CLoCKMemoryLoss()(own, other, step.gt)
    asked, moved, objects = target_queries(teacher, step.gt, 100)
    assert moved
    parts = answer_distances(
        ask(step.student, asked), ask(teacher, asked), objects
    )
    for weight, part in zip((1, 5, 2), QUERIES):
        expected[part] = weight * parts[part]
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value)
        assert value > 0


def test_the_same_detector_says_the_same():
    model = detector('dab')
    for value in CLoCKTerm('big')(step_of(model, model)).values():
        assert value.abs() < 1e-5


def test_memory_alone(step):
    none = dict(cls_weight=0.0, l1_weight=0.0, giou_weight=0.0)
    term = CLoCKTerm('big', **none)
    assert {*term(step)} == {'foreground', 'background'}
    assert not term.compares_classes()
    assert not term.silent()
    assert CLoCKTerm('big', 0.0, 0.0, **none).silent()
    assert CLoCKTerm('big').compares_classes()


# Queries ---------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_each_object_has_one_query(kind):
    model = detector(kind)
    step = step_of(model, model, **PADDED)
    own = question(step.student)
    asked, moved, objects = target_queries(step.student, step.gt, 100)
    counts = step.gt.image.bincount(minlength=2).tolist()
    assert objects.sum(1).tolist() == counts
    assert moved == (kind in BOXED)
    key = 'query_pos' if kind == 'dab' else 'reference_points'
    for name, value in asked.items():
        assert torch.equal(value[objects == 0], own[name][objects == 0])
        if not moved:
            assert torch.equal(value, own[name])
    if not moved:
        return
    for image in range(2):
        places = asked[key][image][objects[image] > 0]
        places = places.sigmoid() if kind == 'dab' else places
        wanted = targets(step.gt, image)
        near = (places[:, None] - wanted).abs().sum(-1)
        assert near.min(0).values.max() < 5e-3


@pytest.mark.parametrize('kind', ['dino', 'ddq'])
def test_a_query_of_an_object_knows_its_class(kind):
    model = detector(kind)
    step = step_of(model, model)
    asked, _, objects = target_queries(step.student, step.gt, 100)
    table = model.dn_query_generator.label_embedding.weight
    for image in range(2):
        labels = step.gt.labels[step.gt.image == image]
        held = asked['query'][image][objects[image] > 0]
        expected = table[labels]
        order = (held[:, None] - expected).abs().sum(-1)
        assert order.min(1).values.max() == 0
        assert order.min(0).values.max() == 0


def test_a_box_is_given_the_query_that_answers_it(pair):
    """Boxes that are answers are given the queries that gave them."""
    step = step_of(*pair)
    outputs = step.teacher('big')
    said = answers(outputs)
    picked = torch.tensor([[3, 8], [5, 0]])
    boxes = torch.stack([said.boxes[-1][n][picked[n]] for n in range(2)])
    centre, size = boxes.split(2, -1)
    pixels = torch.cat([centre - size / 2, centre + size / 2], -1) * 128
    labels = [said.chances[-1][n][picked[n]].argmax(-1) for n in range(2)]
    gt = GroundTruth.from_boxes(list(pixels), (128, 128), labels)
    _, _, objects = target_queries(outputs, gt, 100)
    for n in range(2):
        chosen = objects[n].nonzero().flatten()
        got = said.boxes[-1][n][chosen]
        assert (got[:, None] - boxes[n]).abs().sum(-1).min(0).values.max() < (
            1e-2
        )
    assert giou(pixels, pixels).min() > 0


def test_objects_beyond_the_limit_have_none(step):
    _, _, objects = target_queries(step.teacher('big'), step.gt, 1)
    assert objects.sum(1).tolist() == [1, 1]


def test_more_objects_than_queries():
    model = detector('dab', queries=3)
    step = step_of(model, model, boxes=5)
    _, _, objects = target_queries(step.student, step.gt, 100)
    assert objects.sum(1).tolist() == [3, 3]


def test_what_else_is_in_the_batch_changes_nothing(pair):
    """Objects of one image do not ask for queries of another."""
    model = pair[1]
    step = step_of(model, model)
    few = GroundTruth.from_boxes(
        [step.gt.boxes[:1], step.gt.boxes[:0]],
        step.gt.shape,
        [step.gt.labels[:1], step.gt.labels[:0]],
    )
    many = GroundTruth.from_boxes(
        [step.gt.boxes[:1], step.gt.boxes],
        step.gt.shape,
        [step.gt.labels[:1], step.gt.labels],
    )
    one, other = (target_queries(step.student, gt, 100) for gt in (few, many))
    for key in one[0]:
        assert torch.equal(one[0][key][0], other[0][key][0])
    assert torch.equal(one[2][0], other[2][0])


def test_the_order_of_queries_changes_nothing(pair, step):
    student, teacher = pair
    plain = CLoCKTerm('big')(step)
    for models in (
        (student, permuted(teacher, torch.randperm(15))),
        (permuted(student, torch.randperm(12)), teacher),
    ):
        for key, value in CLoCKTerm('big')(step_of(*models, **PADDED)).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-6)


def test_images_without_boxes_have_background_alone(pair):
    found = CLoCKTerm('big')(step_of(*pair, boxes=0))
    assert found['background'] > 0
    for part in ('foreground', *QUERIES):
        assert found[part] == 0


# Every kind ------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_learns(kind, tmp_path):
    student = detrs.detr(kind)
    teacher = detrs.detr(kind, base=16, queries=14)
    term = dict(type='mmkd.CLoCKTerm', teacher='big')
    model = distilled(student, teacher, term, tmp_path)
    losses = model.loss(*tiny.batch(**PADDED))
    shares = {key: one for key, one in losses.items() if 'kd' in key}
    assert len(shares) == 5
    assert all(one.isfinite() and one > 0 for one in shares.values())
    sum(shares.values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    for one in model.teachers['big'].detector.parameters():
        assert one.grad is None


def test_memories_of_two_forms_are_compared_alone(tmp_path):
    models = detrs.detr('deformable'), detrs.detr('ddq')
    term = dict(type='mmkd.CLoCKTerm', teacher='big')
    with pytest.raises(ValueError, match='Shared queries need decoders'):
        distilled(*models, term, tmp_path)
    term.update(cls_weight=0.0, l1_weight=0.0, giou_weight=0.0)
    model = distilled(*models, term, tmp_path)
    assert model.loss(*tiny.batch())['loss_kd_x_foreground'] > 0


def test_detectors_without_queries_are_refused(tmp_path):
    term = dict(type='mmkd.CLoCKTerm', teacher='big')
    with pytest.raises(ValueError, match='teacher, RetinaNet, has none'):
        distilled(detrs.detr('dab'), tiny.retinanet(), term, tmp_path)


def test_of_two_answers_in_a_place_the_one_that_knows_the_class_is_taken():
    logits = torch.tensor([[[[0.0, 0.0], [0.0, 3.0]]]])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 1, 2, 4)
    said = Answers(logits, boxes, logits, softmax=False)
    cost = _cost(said, boxes[0, :, :1], torch.tensor([[1]]))
    assert cost[0, 1, 0] < cost[0, 0, 0]

"""Answers are paired whatever the order; memory becomes maps again."""

import itertools

import detrs
import pytest
import tiny
import torch
from mmdet.registry import TASK_UTILS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData

from mmkd.losses.query import query_box_errors, query_class_divergence
from mmkd.structures import GroundTruth
from mmkd.taps import recording
from mmkd.terms.queries import DECODER, Answers
from mmkd.terms.query_matching import (
    Objects,
    check_form,
    class_logits,
    inside_maps,
    map_sizes,
    match_answers,
    match_objects,
    memory_maps,
    of_layers,
)


def said(queries, layers=2, softmax=False, seed=0):
    torch.manual_seed(seed)
    shape = layers, 2, queries
    return Answers(
        logits=torch.randn(*shape, 4),
        boxes=torch.rand(*shape, 4) * 0.3 + 0.3,
        states=torch.randn(*shape, 8),
        softmax=softmax,
    )


def pair_cost(own, other, softmax):
    """Of one pair of queries."""
    divergence = query_class_divergence(own[0], other[0], softmax)
    l1, error = query_box_errors(own[1], other[1])
    return (2 * divergence + 5 * l1 + 2 * error).item()


@pytest.mark.parametrize('softmax', [True, False])
def test_no_other_pairs_are_cheaper(softmax):
    student, teacher = said(4, softmax=softmax), said(3, 2, softmax, seed=1)
    index, found = match_answers(student, teacher)
    assert found.all()
    for layer, image in itertools.product(range(2), range(2)):
        table = [
            [
                pair_cost(
                    (
                        student.logits[layer, image, row],
                        student.boxes[layer, image, row],
                    ),
                    (
                        teacher.logits[layer, image, column],
                        teacher.boxes[layer, image, column],
                    ),
                    softmax,
                )
                for column in range(3)
            ]
            for row in range(4)
        ]
        best = min(
            itertools.permutations(range(4), 3),
            key=lambda rows: sum(
                table[row][column] for column, row in enumerate(rows)
            ),
        )
        assert index[layer, image].tolist() == list(best)


def test_a_copy_finds_itself():
    index, _ = match_answers(said(6), said(6))
    assert index[0, 0].tolist() == list(range(6))


def test_another_order_is_found_again():
    order = torch.tensor([2, 0, 3, 1])
    student = said(4)
    teacher = Answers(
        student.logits[:, :, order],
        student.boxes[:, :, order],
        student.states[:, :, order],
        False,
    )
    index, _ = match_answers(student, teacher)
    assert (index == order).all()


def test_those_that_come_first_are_not_left_out():
    student, teacher = said(2), said(5, seed=1)
    for some in itertools.combinations(range(5), 2):
        first = torch.zeros(2, 2, 5, dtype=torch.bool)
        first[..., list(some)] = True
        _, found = match_answers(student, teacher, first=first)
        assert torch.equal(found, first)


def test_classes_of_unlike_heads_are_compared_by_their_chances():
    student, teacher = said(3, softmax=True), said(3, seed=1)
    teacher = Answers(
        teacher.logits[..., :3], teacher.boxes, teacher.states, False
    )
    own, other, softmax = class_logits(student, teacher)
    assert not softmax
    torch.testing.assert_close(
        own.sigmoid(), student.logits.softmax(-1)[..., :3]
    )
    assert torch.equal(other, teacher.logits)
    own, other, softmax = class_logits(teacher, student)
    torch.testing.assert_close(other.sigmoid(), student.chances)


def test_layers_are_taken_as_named():
    found = said(3, layers=3)
    taken = of_layers(found, [0, 2, 2])
    for part in ('logits', 'boxes', 'states'):
        one, whole = getattr(taken, part), getattr(found, part)
        assert torch.equal(one, whole[torch.tensor([0, 2, 2])])


# Objects ---------------------------------------------------------------------


def truth(counts=(3, 1)):
    torch.manual_seed(5)
    boxes = []
    for count in counts:
        corner = torch.rand(count, 2) * 40
        boxes.append(
            torch.cat([corner, corner + 10 + torch.rand(count, 2)], 1)
        )
    labels = [torch.randint(0, 3, (count,)) for count in counts]
    return GroundTruth.from_boxes(
        boxes, (64, 96), labels, image_shapes=[(64, 96), (60, 70)]
    )


@pytest.mark.parametrize('softmax', [True, False])
def test_objects_are_given_as_mmdet_does(softmax):
    gt, found = truth(), said(6, softmax=softmax)
    costs = [
        dict(type='ClassificationCost', weight=1.0)
        if softmax
        else dict(type='FocalLossCost', weight=2.0, eps=1e-8),
        dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
        dict(type='IoUCost', iou_mode='giou', weight=2.0),
    ]
    tiny.build(tiny.retinanet())  # registers
    assigner = TASK_UTILS.build(
        dict(type='HungarianAssigner', match_costs=costs)
    )
    owner = match_objects(found, Objects.of(gt))
    for layer, image in itertools.product(range(2), range(2)):
        height, width = gt.image_shapes[image]
        scale = torch.tensor([width, height, width, height])
        here = gt.image == image
        result = assigner.assign(
            InstanceData(
                scores=found.logits[layer, image],
                bboxes=bbox_cxcywh_to_xyxy(found.boxes[layer, image]) * scale,
            ),
            InstanceData(bboxes=gt.boxes[here], labels=gt.labels[here]),
            dict(img_shape=(height, width)),
        )
        assert torch.equal(owner[layer, image], result.gt_inds - 1)


def test_images_without_objects_are_background():
    owner = match_objects(said(4), Objects.of(truth((0, 2))))
    assert (owner[:, 0] == -1).all()
    assert ((owner[:, 1] >= 0).sum(-1) == 2).all()
    assert (match_objects(said(4), Objects.of(truth((0, 0)))) == -1).all()


def test_more_objects_than_queries_leave_some_out():
    owner = match_objects(said(2), Objects.of(truth((4, 1))))
    assert (owner[:, 0] >= 0).all()
    assert ((owner[:, 1] >= 0).sum(-1) == 1).all()


# Memory ----------------------------------------------------------------------


def seen(kind, **settings):
    model = detrs.built(kind, **settings)
    images, samples = tiny.batch()
    with torch.no_grad(), recording(model, [DECODER, 'neck']) as record:
        model.loss(images, samples)
    return record


@pytest.mark.parametrize('kind', ['detr', 'deformable'])
def test_memory_is_the_maps_one_after_the_other(kind):
    record = seen(kind)
    _, given = record.inputs(DECODER)
    sizes = [tuple(one.shape[-2:]) for one in record.at('neck')]
    assert map_sizes(record) == sizes
    maps = memory_maps(record)
    assert [tuple(one.shape[-2:]) for one in maps] == sizes
    flat = torch.cat([one.flatten(2) for one in maps], 2).mT
    assert torch.equal(flat, given['memory'])
    # The second image ends at row 96 and column 112 of 128.
    inside = inside_maps(record)[0]
    rows, columns = sizes[0]
    assert inside[0].all()
    assert inside[1].sum() == (rows * 96 // 128) * (
        columns * 112 // 128 + (columns * 112 % 128 > 0)
    )


def test_another_form_is_told_with_the_weight_to_set():
    with pytest.raises(
        ValueError,
        match=r'student, DABDETR, takes.*query_pos of 4 .*teacher, '
        r'DeformableDETR.*Set some_weight=0',
    ):
        check_form('It', 'some_weight', seen('dab'), seen('deformable'))
    check_form('It', 'some_weight', seen('dab'), seen('dab', layers=1))


def test_chances_pull_the_student_and_may_be_certain():
    logits = torch.tensor([[[[200.0, -200.0, -200.0]]]], requires_grad=True)
    sure = Answers(logits, torch.rand(1, 1, 1, 4), logits, softmax=True)
    other = Answers(
        torch.zeros(1, 1, 1, 2), sure.boxes, sure.states, softmax=False
    )
    own, _, _ = class_logits(sure, other)
    assert own.isfinite().all()
    soft = Answers(logits / 100, sure.boxes, sure.states, softmax=True)
    own, _, _ = class_logits(soft, other)
    (pull,) = torch.autograd.grad(own.sum(), logits)
    assert pull.abs().sum() > 0

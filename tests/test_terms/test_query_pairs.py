"""Queries that belong together stand in one place, whatever their order."""

import itertools

import pytest
import tiny
import torch
from asking import detector, permuted, step_of

from mmkd.ops.regions import jittered_boxes
from mmkd.structures import GroundTruth
from mmkd.terms.queries import Answers, answers, ask, question
from mmkd.terms.query_matching import Objects, object_cost, of_layers
from mmkd.terms.query_pairs import (
    PAIRINGS,
    matched_queries,
    object_queries,
    pair_queries,
)

PARTS = ('logits', 'boxes', 'states')


def said(queries, layers=2, seed=0, softmax=False, width=8):
    torch.manual_seed(seed)
    shape = layers, 2, queries
    return Answers(
        logits=torch.randn(*shape, 4),
        boxes=torch.rand(*shape, 4) * 0.3 + 0.3,
        states=torch.randn(*shape, width),
        softmax=softmax,
    )


def reordered(found, order):
    return Answers(
        *(getattr(found, part)[:, :, order] for part in PARTS), found.softmax
    )


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


def views_of(gt, count=2):
    torch.manual_seed(7)
    return jittered_boxes(gt.boxes, gt.image_sizes[gt.image], count, 0.3)


def literally(found, gt, boxes):
    """The cheapest query of each object, then of the boxes beside them."""
    last = of_layers(found, [-1])
    queries = range(found.boxes.shape[2])
    picked = torch.zeros(boxes.shape[:2], dtype=torch.long)
    for image in range(gt.num_images):
        rows = [row for row, one in enumerate(gt.image) if one == image]
        left = set(queries)
        views = range(boxes.shape[1])
        for places in (
            [(row, 0) for row in rows],
            [(row, view) for row in rows for view in views if view],
        ):
            cost = {
                (row, view): object_cost(
                    last,
                    Objects(
                        Objects.of(
                            GroundTruth.from_boxes(
                                [
                                    boxes[row, view][None]
                                    if one == image
                                    else torch.zeros(0, 4)
                                    for one in range(gt.num_images)
                                ],
                                gt.shape,
                                image_shapes=gt.image_shapes,
                            )
                        ).boxes,
                        gt.labels[row].expand(gt.num_images, 1),
                        torch.ones(gt.num_images, 1, dtype=torch.bool),
                    ),
                )[0, image, :, 0].tolist()
                for row, view in places
            }
            best = min(
                itertools.permutations(sorted(left), len(places)),
                key=lambda some: sum(
                    cost[place][query] for place, query in zip(places, some)
                ),
            )
            for place, query in zip(places, best):
                picked[place] = query
            left -= set(best)
    return picked


# By objects ------------------------------------------------------------------


@pytest.mark.parametrize('softmax', [True, False])
def test_objects_have_their_queries_and_views_those_that_are_left(softmax):
    found, gt = said(7, softmax=softmax), truth((2, 1))
    boxes = views_of(gt, 1)
    index = object_queries(found, gt, boxes)
    assert torch.equal(index, literally(found, gt, boxes))


def test_the_queries_of_an_image_are_different_ones():
    gt = truth()
    index = object_queries(said(12), gt, views_of(gt))
    for image in range(2):
        here = index[gt.image == image].flatten().tolist()
        assert len({*here}) == len(here)


def test_the_last_layer_decides():
    gt, found = truth(), said(8, layers=3)
    boxes = views_of(gt)
    alone = of_layers(found, [2])
    other = of_layers(found, [1, 0, 2])
    assert torch.equal(
        object_queries(found, gt, boxes), object_queries(alone, gt, boxes)
    )
    assert torch.equal(
        object_queries(found, gt, boxes), object_queries(other, gt, boxes)
    )


def test_objects_that_no_query_is_left_for_take_the_nearest():
    far, near = [0.9, 0.9, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2]
    boxes = torch.tensor([far, near]).expand(1, 1, 2, 4)
    found = Answers(torch.zeros(1, 1, 2, 3), boxes, boxes, False)
    gt = GroundTruth.from_boxes(
        [torch.tensor([[20.0, 20, 40, 40]]) + torch.arange(3.0)[:, None]],
        shape=(100, 100),
    )
    index = object_queries(found, gt, gt.boxes[:, None])[:, 0]
    # One each is matched, and the third has the one that fits.
    assert sorted(index.tolist()) == [0, 1, 1]


def test_what_an_image_does_not_have_takes_no_query_away():
    best, other = [0.45, 0.45, 0.2, 0.2], [0.6, 0.6, 0.2, 0.2]
    boxes = torch.tensor([best, other]).expand(1, 2, 2, 4)
    found = Answers(torch.zeros(1, 2, 2, 3), boxes, boxes, False)
    here = torch.tensor([[40.0, 40, 60, 60]])
    gt = GroundTruth.from_boxes([torch.cat([here, here]), here], (100, 100))
    index = object_queries(found, gt, gt.boxes[:, None])[:, 0]
    assert sorted(index[:2].tolist()) == [0, 1]
    assert index[2] == 0


def test_no_objects_have_no_queries():
    gt = truth((0, 0))
    assert object_queries(said(3), gt, views_of(gt)).shape == (0, 3)


# By answers ------------------------------------------------------------------


def test_a_copy_of_another_order_is_paired_with_itself():
    found, order = said(6), torch.tensor([2, 5, 0, 3, 1, 4])
    own, other = matched_queries(found, reordered(found, order))
    assert torch.equal(own, order[other])
    assert torch.equal(other.sort().values, torch.arange(6).expand(2, 6))


@pytest.mark.parametrize('queries', [(4, 7), (7, 4)])
def test_as_many_pairs_as_the_side_with_fewer_queries_has(queries):
    student, teacher = said(queries[0]), said(queries[1], 3, seed=1)
    for index, count in zip(matched_queries(student, teacher), queries):
        assert index.shape == (2, 4)
        assert all(len({*one}) == 4 for one in index.tolist())
        assert index.max() < count


def test_the_teachers_surest_queries_are_not_left_out():
    student, teacher = said(2), said(6, seed=1)
    _, other = matched_queries(student, teacher)
    surest = teacher.chances[-1].amax(-1).topk(2).indices
    assert torch.equal(other.sort().values, surest.sort().values)


# Both sides ------------------------------------------------------------------


@pytest.fixture(scope='module')
def pair():
    return detector('refine'), detector('refine', 1, queries=15, layers=3)


def paired(step, pairing, views=2):
    torch.manual_seed(3)
    return pair_queries(
        pairing, step.student, step.teacher('big'), step.gt, views
    )


def products(pairs):
    """Something of each pair that both sides have a say in, in any order."""
    found = torch.cat(
        [
            (pairs.student.logits[-1] * pairs.teacher.logits[-1]).sum(-1),
            (pairs.student.boxes[-1] * pairs.teacher.boxes[-1]).sum(-1),
            (pairs.student.states[-1] * pairs.teacher.states[-1]).sum(-1),
        ],
        -1,
    )
    return found.sort(-1).values


@pytest.mark.parametrize('pairing', PAIRINGS)
def test_the_order_of_queries_changes_nothing(pair, pairing):
    student, teacher = pair
    plain = products(paired(step_of(student, teacher), pairing))
    torch.manual_seed(0)
    for turned in (
        (student, permuted(teacher, torch.randperm(15))),
        (permuted(student, torch.randperm(12)), teacher),
    ):
        found = products(paired(step_of(*turned), pairing))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('pairing', PAIRINGS)
def test_pairs_of_a_detector_with_itself_are_the_same(pair, pairing):
    student, _ = pair
    turned = permuted(student, torch.randperm(12))
    pairs = paired(step_of(turned, student), pairing)
    for part in PARTS:
        torch.testing.assert_close(
            getattr(pairs.student, part),
            getattr(pairs.teacher, part),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize('pairing', PAIRINGS)
def test_gradient_reaches_the_student_alone(pair, pairing):
    student, teacher = pair
    teacher.requires_grad_(True)
    pairs = paired(step_of(student, teacher), pairing)
    teacher.requires_grad_(False)
    for part in PARTS:
        assert getattr(pairs.student, part).requires_grad
        assert not getattr(pairs.teacher, part).requires_grad


def test_rows_are_objects_with_their_labels(pair):
    step = step_of(*pair)
    pairs = paired(step, 'objects')
    count = len(step.gt.labels)
    assert pairs.student.states.shape[:3] == (2, count, 3)
    assert pairs.teacher.states.shape[:3] == (3, count, 3)
    assert torch.equal(pairs.labels, step.gt.labels)
    found, boxes = answers(step.student), step.gt.boxes[:, None]
    index = object_queries(found, step.gt, boxes)[:, 0]
    for row, (image, query) in enumerate(zip(step.gt.image, index)):
        for part in PARTS:
            assert torch.equal(
                getattr(pairs.student, part)[:, row, 0],
                getattr(found, part)[:, image, query],
            )


def test_rows_are_images_with_their_matched_queries(pair):
    step = step_of(*pair)
    pairs = paired(step, 'answers')
    found = answers(step.student), answers(step.teacher('big'))
    for said_by, kept, index in zip(
        found, (pairs.student, pairs.teacher), matched_queries(*found)
    ):
        for part in PARTS:
            for image in range(2):
                assert torch.equal(
                    getattr(kept, part)[:, image],
                    getattr(said_by, part)[:, image, index[image]],
                )


def test_rows_are_images_with_the_teachers_questions(pair):
    step = step_of(*pair)
    pairs = paired(step, 'questions')
    asked = ask(step.student, question(step.teacher('big')))
    for part in PARTS:
        assert torch.equal(getattr(pairs.student, part), getattr(asked, part))


def test_both_sides_look_for_the_same_views(pair, monkeypatch):
    student, _ = pair
    seen = []
    monkeypatch.setattr(
        'mmkd.terms.query_pairs.object_queries',
        lambda found, gt, boxes: (
            seen.append(boxes) or object_queries(found, gt, boxes)
        ),
    )
    paired(step_of(student, student), 'objects')
    assert torch.equal(*seen)
    assert (seen[0][:, 0] != seen[0][:, 1]).any()


def test_layers_are_paired_from_the_last(pair):
    pairs = paired(step_of(*pair), 'answers')
    matched = pairs.by_layer()
    for part in PARTS:
        whole = getattr(pairs.teacher, part)
        assert torch.equal(getattr(matched.teacher, part), whole[[1, 2]])
        assert torch.equal(
            getattr(matched.student, part), getattr(pairs.student, part)
        )


def test_unknown_pairings_are_refused(pair):
    with pytest.raises(ValueError, match="pairing 'object'.*objects"):
        paired(step_of(*pair), 'object')


def test_images_without_objects_have_no_rows(pair):
    step = step_of(*pair, boxes=0)
    pairs = paired(step, 'objects')
    assert pairs.student.states.shape[:3] == (2, 0, 3)
    assert pairs.student.logits.shape[-1] == tiny.CLASSES

"""LGD against its formula, written out object by object."""

import copy

import heads
import pytest
import rois
import tiny
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import nn

from mmkd.structures import GroundTruth
from mmkd.teachers import still_statistics
from mmkd.terms.label_guided import (
    Instructor,
    LabelGuidedTerm,
    Turn,
    describe,
    instructed_distance,
    object_masks,
)

BOXES = [
    torch.tensor([[0.0, 0, 40, 24], [32, 16, 64, 48], [5, 50, 6, 51]]),
    torch.tensor([[8.0, 8, 24, 56]]),
]
LABELS = [torch.tensor([2, 0, 1]), torch.tensor([1])]


def ground_truth(boxes=BOXES, labels=LABELS, shapes=((64, 64), (64, 48))):
    return GroundTruth.from_boxes(
        boxes, shape=(64, 64), labels=labels, image_shapes=shapes
    )


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return [torch.randn(2, 8, size, size) for size in (8, 4)]


@pytest.fixture(params=[True, False], ids=['context', 'objects'])
def instructor(request):
    torch.manual_seed(1)
    found = Instructor(3, 8, heads=2, context=request.param)
    for one in found.modules():  # else what is chosen is the identity
        if isinstance(one, Turn):
            nn.init.normal_(one.matrix.weight, std=0.05)
    return found


# The knowledge ---------------------------------------------------------------


def encoded(encoder, told):
    """The label encoder, for the objects of one image, (K, told)."""

    def layer(linear, x):
        x = linear(x)
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x.clamp(min=0)

    def turned(turn, x):
        y = x
        for one in turn.layers:
            y = layer(one, y)
        matrix = turn.matrix(y).reshape(len(x), len(x))
        return x @ (torch.eye(len(x)) + matrix)

    local, wide = [], []
    for x in told:
        x = turned(
            encoder.turn_local,
            layer(encoder.local, turned(encoder.turn_told, x)),
        )
        local.append(x)
        for one in encoder.wide:
            x = layer(one, x)
        wide.append(x)
    every = torch.stack(wide).max(0).values
    return torch.stack(
        [layer(encoder.fuse, torch.cat([one, every])) for one in local]
    )


def attended(attention, query, keys):
    """Scaled dot products, head by head, for one query."""
    size = len(query)
    parts = attention.in_proj_weight.split(size)
    offsets = attention.in_proj_bias.split(size)
    q = parts[0] @ query + offsets[0]
    k, v = (
        keys @ weight.T + offset
        for weight, offset in zip(parts[1:], offsets[1:])
    )
    found = []
    for head in torch.arange(size).chunk(attention.num_heads):
        logits = k[:, head] @ q[head] / len(head) ** 0.5
        found.append(logits.softmax(0) @ v[:, head])
    return attention.out_proj(torch.cat(found))


def normalised(x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def literal(one, feature, boxes, labels, shape):
    """Knowledge of a level of one image, (C, H, W), for 64 x 64 pixels."""
    context = one.context is not None
    height, width = shape
    told, cells = [], []
    size = feature.shape[-1]
    stride = 64 / size
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
        sides = [x1 / width, y1 / height, x2 / width, y2 / height]
        classes = [float(label == c) for c in range(3)]
        told.append([2 * value - 1 for value in sides + classes])
        cells.append(
            [
                (y, x)
                for y in range(size)
                for x in range(size)
                if x1 < (x + 1) * stride
                and x2 > x * stride
                and y1 < (y + 1) * stride
                and y2 > y * stride
            ]
        )
    if context:
        told.append([-1.0, -1, 1, 1, -1, -1, -1])
        cells.append(
            [
                (y, x)
                for y in range(size)
                for x in range(size)
                if y * stride < height and x * stride < width
            ]
        )
    seen = F.conv2d(
        feature[None], one.appearance.weight, one.appearance.bias, padding=1
    )[0]
    seen = normalised(seen).clamp(min=0)
    keys = []
    for vector in encoded(one.encoder, torch.tensor(told)):
        keys.append(normalised(one.label(vector)).clamp(min=0))
    written = torch.zeros_like(feature)
    around = 0
    for index, places in enumerate(cells):
        query = torch.stack([seen[:, y, x] for y, x in places]).mean(0)
        answer = attended(one.attention, query, torch.stack(keys))
        if context and index == len(cells) - 1:
            around = one.context(answer)[:, None, None]
            continue
        for y, x in places:
            written[:, y, x] += one.object(answer)
    x = one.written(written[None])[0] + around
    x = x.clamp(min=0)
    convs = [layer for layer in one.refine if isinstance(layer, nn.Conv2d)]
    for index, conv in enumerate(convs):
        x = normalised(conv(x[None])[0])
        if index < 2:
            x = x.clamp(min=0)
    return x


@torch.no_grad()
def test_knowledge_is_its_formula_object_by_object(instructor, maps):
    shapes = ((64, 64), (64, 48))
    found = instructor(maps, ground_truth(shapes=shapes))
    for level, feature in zip(found, maps):
        for n in range(2):
            expected = literal(
                instructor, feature[n], BOXES[n], LABELS[n], shapes[n]
            )
            torch.testing.assert_close(level[n], expected)


def test_a_box_smaller_than_a_cell_has_one():
    masks = object_masks(ground_truth(), (8, 8), context=False)
    assert masks[0, 2].nonzero().tolist() == [[6, 0]]
    assert not masks[1, 1:].any()


def test_context_is_the_image_without_its_border():
    masks = object_masks(ground_truth(), (8, 8), context=True)
    assert masks.shape == (2, 4, 8, 8)
    assert masks[0, 3].all()
    assert masks[1, 3, :, :6].all()
    assert not masks[1, 3, :, 6:].any()


def test_objects_are_told_by_sides_and_class():
    told, there = describe(ground_truth(), 3, context=True)
    assert there.tolist() == [[True] * 4, [True, False, False, True]]
    assert told[0, 0].tolist() == [-1, -1, 0.25, -0.25, -1, -1, 1]
    assert told[:, 3].tolist() == [[-1, -1, 1, 1, -1, -1, -1]] * 2


def test_what_lies_outside_of_the_image_is_not_told():
    boxes = [torch.tensor([[-16.0, 16, 96, 80]])]
    gt = ground_truth(boxes, [torch.tensor([1])], shapes=((64, 64),))
    told, _ = describe(gt, 3, context=False)
    assert told[0, 0, :4].tolist() == [-1, -0.5, 1, 1]


@torch.no_grad()
def test_the_order_of_objects_says_nothing(instructor, maps):
    one = instructor(maps, ground_truth())
    other = instructor(
        maps,
        ground_truth([x.flip(0) for x in BOXES], [x.flip(0) for x in LABELS]),
    )
    for pair in zip(one, other):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_image_is_told_of_itself_alone(instructor, maps):
    both = instructor(maps, ground_truth())
    alone = instructor(
        [x[1:] for x in maps],
        ground_truth(BOXES[1:], LABELS[1:], shapes=((64, 48),)),
    )
    for one, other in zip(both, alone):
        torch.testing.assert_close(one[1:], other)


@torch.no_grad()
@pytest.mark.parametrize('what', ['class', 'box', 'map'])
def test_labels_and_maps_both_say_something(instructor, maps, what):
    before = instructor(maps, ground_truth())
    boxes, labels = copy.deepcopy((BOXES, LABELS))
    if what == 'class':
        labels[0][0] = 1
    elif what == 'box':
        boxes[0][0, 2] += 16
    else:  # of a lone object, whatever is asked has one answer
        maps = [1 + x.roll(1, 1) for x in maps]
    after = instructor(maps, ground_truth(boxes, labels))
    for one, other in zip(before, after):
        assert (one[0] - other[0]).abs().max() > 1e-3


def test_images_without_objects_have_finite_knowledge(instructor, maps):
    nothing = ground_truth([BOXES[0][:0]] * 2, [LABELS[0][:0]] * 2)
    feature = [x.requires_grad_() for x in maps]
    found = instructor(feature, nothing)
    sum(one.square().sum() for one in found).backward()
    for one in [*found, *(x.grad for x in feature)]:
        assert one.isfinite().all()


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match='divisor of 8'):
        Instructor(3, 8, heads=3, context=True)


# The distance ----------------------------------------------------------------


def test_distance_is_that_of_instance_norms(maps):
    other = [torch.randn_like(x) for x in maps]
    count = [x.new_ones(2, 1, *x.shape[-2:]) for x in maps]
    expected = F.mse_loss(
        *(
            torch.cat([F.instance_norm(x).flatten(1) for x in side], 1)
            for side in (maps, other)
        )
    )
    torch.testing.assert_close(
        instructed_distance(maps, other, count), expected
    )


def test_scale_and_offset_of_a_channel_do_not_matter(maps):
    other = [3 * x + torch.randn(1, 8, 1, 1) for x in maps]
    count = [x.new_ones(2, 1, *x.shape[-2:]) for x in maps]
    assert instructed_distance(maps, other, count) < 1e-8


def test_the_border_does_not_count(maps):
    other = [torch.randn_like(x) for x in maps]
    count = [x.new_ones(2, 1, *x.shape[-2:]) for x in maps]
    for one in count:
        one[1, ..., one.shape[-1] // 2 :] = 0
    expected = instructed_distance(maps, other, count)
    for side in (maps, other):
        for one in side:
            one[1, ..., one.shape[-1] // 2 :] += torch.rand(1) * 100
    torch.testing.assert_close(
        instructed_distance(maps, other, count), expected
    )


def test_images_of_which_no_cell_counts_cost_nothing(maps):
    """An ignored box may hide one from end to end."""
    other = [torch.randn_like(x) for x in maps]
    count = [x.new_ones(2, 1, *x.shape[-2:]) for x in maps]
    expected = instructed_distance(
        *([x[:1] for x in side] for side in (maps, other, count))
    )
    for one in count:
        one[1] = 0
    found = instructed_distance(maps, other, count)
    torch.testing.assert_close(found, expected)
    student = [x.requires_grad_() for x in maps]
    nothing = [0 * x for x in count]
    value = instructed_distance(student, other, nothing)
    value.backward()
    assert value == 0
    assert all(x.grad.isfinite().all() for x in student)


def test_a_map_of_one_cell_has_no_form_to_imitate():
    one, other = torch.randn(2, 1, 4, 1, 1).requires_grad_()
    distance = instructed_distance([one], [other], [torch.ones(1, 1, 1, 1)])
    assert distance == 0


# In a detector ---------------------------------------------------------------


@pytest.fixture
def build():
    def build(model=None, **settings):
        model = model or tiny.retinanet()
        channels = model['neck']['out_channels']
        settings = dict(channels=channels, heads=2, num_classes=3) | settings
        term = dict(type='mmkd.LabelGuidedTerm', **settings)
        student = tiny.build(tiny.distilled(model, {}, dict(x=term)))
        student.init_weights()
        return student.train()

    return build


def shares(student, images, samples):
    losses = student.loss(images, samples)
    return losses['loss_kd_x_distil'], losses['loss_kd_x_task']


def knowledge_of(student, images, samples):
    student = copy.deepcopy(student)
    gt = GroundTruth.from_samples(samples, images)
    maps = student.extract_feat(images)
    return maps, student.terms['x'].instructor(maps, gt), gt


def test_parts_are_heads_loss_and_distance(build):
    student = build(begin=0, loss_weight=0.5, task_weight=2.0)
    images, samples = tiny.batch(boxes=5)
    maps, knowledge, gt = knowledge_of(student, images, samples)
    own = copy.deepcopy(student)
    expected = tiny.total(own.bbox_head.loss(tuple(knowledge), samples))
    distil, task = shares(student, images, samples)
    torch.testing.assert_close(task, 2 * expected)
    assert task > 0
    count = [torch.zeros(len(x), 1, *x.shape[-2:]) for x in maps]
    for mask in count:
        for n, (height, width) in enumerate(gt.image_shapes):
            rows = -(-height * mask.shape[2] // gt.shape[0])
            columns = -(-width * mask.shape[3] // gt.shape[1])
            mask[n, :, :rows, :columns] = 1
    adapted = [own.terms['x'].adapter(x) for x in maps]
    torch.testing.assert_close(
        distil, 0.5 * instructed_distance(adapted, knowledge, count)
    )


def grads(module):
    return [
        one.grad is not None and one.grad.abs().sum() > 0
        for one in module.parameters()
        if one.requires_grad
    ]


def test_who_learns_by_what(build):
    student = build(begin=0)
    term = student.terms['x']
    distil, task = shares(student, *tiny.batch(boxes=5))
    distil.backward(retain_graph=True)
    assert all(grads(term.adapter))
    assert any(grads(student.backbone))
    assert not any(grads(term.instructor))
    assert not any(grads(student.bbox_head))
    student.zero_grad()
    task.backward()
    assert all(grads(student.bbox_head))
    assert any(grads(student.backbone))
    assert not any(grads(term.adapter))
    assert all(
        grads(part)
        for name, part in term.instructor.named_children()
        if name != 'encoder'
    )
    assert any(grads(term.instructor.encoder.turn_told))


def test_detached_maps_learn_nothing_of_the_task(build):
    student = build(detach=True, begin=0)
    _, task = shares(student, *tiny.batch(boxes=5))
    task.backward()
    assert not any(grads(student.backbone))
    assert any(grads(student.terms['x'].instructor))


def test_before_its_time_only_the_adapter_imitates(build, hub):
    student = build(begin=0.3)
    hub.update_info('max_iters', 10)
    for iteration, imitates in ((2, False), (3, True)):
        hub.update_info('iter', iteration)
        student.zero_grad()
        distil, _ = shares(student, *tiny.batch(boxes=5))
        distil.backward()
        assert any(grads(student.backbone)) is imitates
        assert all(grads(student.terms['x'].adapter))


def test_images_without_annotations_are_left_out(build):
    student = build(begin=0)
    images, samples = tiny.batch(boxes=5)
    expected = shares(copy.deepcopy(student), images[:1], samples[:1])
    samples[1].gt_instances = InstanceData()
    found = shares(student, images, samples)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_images_without_objects_cost_something_finite(build):
    distil, task = shares(build(), *tiny.batch(boxes=0))
    (distil + task).backward()
    assert distil.isfinite()
    assert task.isfinite()


@pytest.mark.parametrize(
    'model',
    [heads.fcos, rois.faster, rois.mask],
    ids=lambda x: x.__name__,
)
def test_other_heads_are_taught_as_well(build, model):
    model = model()
    student = build(model)
    images, samples = tiny.batch(boxes=4)
    if 'mask_head' in model.get('roi_head', {}):
        rois.add_masks(samples)
    distil, task = shares(student, images, samples)
    (distil + task).backward()
    assert any(grads(student.backbone))
    assert task > 0


def test_statistics_of_the_heads_are_those_of_the_student(build):
    model = heads.fcos(norm_cfg=dict(type='BN'))
    student, plain = build(model), tiny.build(model)
    plain.load_state_dict(student.state_dict(), strict=False)
    images, samples = tiny.batch(boxes=5)
    shares(student, images, samples)
    plain.train().loss(images, samples)
    after = student.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(after[name], value)


def test_statistics_move_again_afterwards():
    norm = nn.BatchNorm2d(2)
    with pytest.raises(RuntimeError), still_statistics(norm):
        norm(torch.randn(4, 2, 3, 3))
        raise RuntimeError
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    norm(torch.randn(4, 2, 3, 3))
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.all()


def test_what_is_wrong_is_said(build):
    with pytest.raises(ValueError, match='num_classes=3 in it'):
        build(num_classes=80)
    with pytest.raises(ValueError, match=r'LabelGuidedTerm .*16'):
        build(channels=8)
    with pytest.raises(ValueError, match='begin'):
        LabelGuidedTerm(3, begin=2.0)
    with pytest.raises(ValueError, match="'nek'"):
        build(tap='nek')


def test_it_is_silent_only_without_both_weights():
    assert not LabelGuidedTerm(3, 8, heads=2, loss_weight=0).silent()
    assert not LabelGuidedTerm(3, 8, heads=2, task_weight=0).silent()
    both = dict(loss_weight=0, task_weight=0)
    assert LabelGuidedTerm(3, 8, heads=2, **both).silent()

import copy
import math

import families
import heads
import pytest
import tiny
import torch
from mmengine.structures import InstanceData
from taught_by import go_to

from mmkd.losses.ld import edge_divergence
from mmkd.ops.edges import bin_places

CLASSES = ('a', 'b', 'c')


STUDENTS = dict(retinanet=tiny.retinanet, gfl=heads.gfl, fcos=heads.fcos)


def student(model=None, **settings):
    term = dict(type='mmkd.StoredPredictionTerm', **settings)
    return tiny.build(
        tiny.distilled(model or heads.gfl(), {}, dict(said=term))
    ).train()


def said(points, strides, boxes, labels, logits):
    return InstanceData(
        points=torch.tensor(points).view(-1, 2).float(),
        strides=torch.tensor(strides).float(),
        bboxes=torch.tensor(boxes).view(-1, 4).float(),
        labels=torch.tensor(labels),
        logits=torch.tensor(logits),
    )


def batch(seed=0, count=5):
    images, samples = tiny.batch()
    generator = torch.Generator().manual_seed(seed)
    for one in samples:
        one.set_metainfo(dict(teacher_classes=CLASSES))
        points = torch.rand(count, 2, generator=generator) * 90
        extent = 10 + torch.rand(count, 4, generator=generator) * 20
        one.teacher_predictions = InstanceData(
            points=points,
            strides=8 * 2 ** torch.rand(count, generator=generator).mul(3),
            bboxes=torch.cat(
                [points - extent[:, :2], points + extent[:, 2:]], 1
            ),
            labels=torch.stack(
                [torch.randperm(3, generator=generator)[:2]] * count
            ),
            logits=2 * torch.randn(count, 2, generator=generator),
        )
    return images, samples


def with_edges(images, samples, bins=5):
    """Distributions of edges with bins of the teacher's own."""
    generator = torch.Generator().manual_seed(1)
    for one in samples:
        said = one.teacher_predictions
        shape = len(said), 4, bins
        said.edges = 2 * torch.randn(*shape, generator=generator)
        steps = said.strides[:, None].expand(-1, 2)
        said.places = bin_places(said.points - 3, steps, bins)
    return images, samples


def shares(model, images, samples):
    losses = model.loss(images, samples)
    return {
        key.removeprefix('loss_kd_said_'): value
        for key, value in losses.items()
        if 'said' in key
    }


def giou(one, other):
    """Of two boxes, by hand."""
    x1, y1 = max(one[0], other[0]), max(one[1], other[1])
    x2, y2 = min(one[2], other[2]), min(one[3], other[3])
    inner = max(x2 - x1, 0) * max(y2 - y1, 0)
    areas = [
        max(each[2] - each[0], 0) * max(each[3] - each[1], 0)
        for each in (one, other)
    ]
    union = sum(areas) - inner
    hull = (max(one[2], other[2]) - min(one[0], other[0])) * (
        max(one[3], other[3]) - min(one[1], other[1])
    )
    return inner / union - (hull - union) / hull


def literal(model, images, samples):
    """The formula, one prediction after the other."""
    head = model.bbox_head
    features = model.extract_feat(images)
    logits, boxes = head(features)[:2]
    sizes = [tuple(one.shape[-2:]) for one in logits]
    priors = head.prior_generator.grid_priors(sizes, device='cpu')
    strides = [
        one if isinstance(one, int) else one[0]
        for one in head.prior_generator.strides
    ]
    anchors = head.num_base_priors
    sums = dict.fromkeys(('class', 'box', 'weight'), 0.0)
    for number, sample in enumerate(samples):
        found = sample.teacher_predictions
        for point, side, box, labels, scores in zip(
            found.points.tolist(),
            found.strides.tolist(),
            found.bboxes,
            found.labels.tolist(),
            found.logits.sigmoid(),
        ):
            level = min(
                range(5), key=lambda at: abs(math.log(side / strides[at]))
            )
            column = min(int(point[0] / strides[level]), sizes[level][1] - 1)
            row = min(int(point[1] / strides[level]), sizes[level][0] - 1)
            cell = (row * sizes[level][1] + column) * anchors
            mine = priors[level][cell : cell + anchors]
            best = 0
            if anchors > 1:
                best = max(
                    range(anchors),
                    key=lambda at: iou(mine[at].tolist(), box.tolist()),
                )
            of_cell = logits[level][number, :, row, column]
            of_cell = of_cell.view(anchors, -1)[best][labels]
            weight = scores.max()
            target = scores
            chance = of_cell.sigmoid()
            divergence = (
                target * (target / chance).log()
                + (1 - target) * ((1 - target) / (1 - chance)).log()
            )
            sums['class'] = sums['class'] + weight * divergence.sum()
            raw = boxes[level][number, :, row, column].view(anchors, -1)[best]
            corners = corner(head, raw, mine[best], strides[level])
            error = 1 - giou(corners, box.tolist())
            sums['box'] = sums['box'] + weight * error
            sums['weight'] = sums['weight'] + weight
    return {key: sums[key] / sums['weight'] for key in ('class', 'box')}


def literal_edges(model, images, samples, temperature):
    """Prediction by prediction, edge by edge, bin by bin."""
    head = model.bbox_head
    maps = head(model.extract_feat(images))[1]
    total = weights = 0.0
    for number, sample in enumerate(samples):
        said = sample.teacher_predictions
        for at in range(len(said)):
            side, (x, y) = said.strides[at].item(), said.points[at].tolist()
            level = min(
                range(5),
                key=lambda one: abs(math.log(side / (8 * 2**one))),
            )
            stride, (rows, columns) = 8 * 2**level, maps[level].shape[-2:]
            row = min(int(y / stride), rows - 1)
            column = min(int(x / stride), columns - 1)
            logits = maps[level][number, :, row, column].view(4, -1)
            bins = logits.shape[1]
            probs = said.edges[at].softmax(1).tolist()
            distance = 0.0
            for edge in range(4):
                # GFL's anchors stand at the corner of their cell.
                centre = (column, row)[edge % 2] * stride
                sign = -1 if edge < 2 else 1
                target = [0.0] * bins
                places = said.places[at, edge].tolist()
                for place, prob in zip(places, probs[edge]):
                    bin = sign * (place - centre) / stride
                    bin = min(max(bin, 0), bins - 1)
                    low = math.floor(bin)
                    target[low] += prob * (1 - (bin - low))
                    if low + 1 < bins:
                        target[low + 1] += prob * (bin - low)
                target = [one ** (1 / temperature) for one in target]
                target = [one / sum(target) for one in target]
                own = (logits[edge] / temperature).softmax(0).tolist()
                for p, q in zip(target, own):
                    distance += p * math.log(p / q) if p else 0
            weight = said.logits[at].sigmoid().max().item()
            total += weight * temperature**2 * distance / (4 * bins)
            weights += weight
    return total / weights


@pytest.mark.parametrize('temperature', [1.0, 5.0])
def test_edges_are_the_formula(temperature):
    model = student(
        class_weight=0, box_weight=0, edge_weight=3, temperature=temperature
    )
    images, samples = with_edges(*batch())
    (found,) = shares(model, images, samples).values()
    wanted = literal_edges(model, images, samples, temperature)
    assert found.item() == pytest.approx(3 * wanted, rel=1e-4)


def test_on_the_same_anchors_edges_are_ld():
    model = student(edge_weight=1, temperature=10.0)
    images, samples = batch()
    head = model.bbox_head
    with torch.no_grad():
        maps = head(model.extract_feat(images))[1]
    other = [one + torch.randn_like(one) for one in maps]
    divergence = edge_divergence(maps[0], other[0], 10.0)  # N, 1, H, W
    for number, one in enumerate(samples):
        places = [(1, 2), (6, 5), (9, 9)]
        corners = torch.tensor([(x * 8.0, y * 8.0) for y, x in places])
        one.teacher_predictions = InstanceData(
            points=corners + 4,
            strides=torch.full((3,), 8.0),
            bboxes=torch.cat([corners, corners + 9], 1),
            labels=torch.zeros(3, 1, dtype=torch.long),
            logits=torch.zeros(3, 1),
            edges=torch.stack(
                [other[0][number, :, y, x].view(4, 4) for y, x in places]
            ),
            places=bin_places(corners, torch.full((3, 2), 8.0), 4),
        )
    found = shares(model, images, samples)['edge']
    wanted = torch.stack([divergence[:, 0, y, x] for y, x in places]).mean()
    torch.testing.assert_close(found, wanted)


def test_edges_teach_the_head_in_half_precision_too():
    model = student(edge_weight=1, temperature=4.0)
    with torch.autocast('cpu', torch.bfloat16):
        found = shares(model, *with_edges(*batch()))
    assert found['edge'].dtype == torch.float32
    found['edge'].backward()
    assert model.bbox_head.gfl_reg.weight.grad.abs().sum() > 0


def test_edges_that_are_not_there_are_told():
    with pytest.raises(ValueError, match=r'LoadPredictions\(edges=True\)'):
        shares(student(edge_weight=1), *batch())
    with pytest.raises(ValueError, match=r'FCOSHead gives none'):
        student(heads.fcos(), edge_weight=1)


def iou(one, other):
    x1, y1 = max(one[0], other[0]), max(one[1], other[1])
    x2, y2 = min(one[2], other[2]), min(one[3], other[3])
    inner = max(x2 - x1, 0) * max(y2 - y1, 0)
    areas = [
        (each[2] - each[0]) * (each[3] - each[1]) for each in (one, other)
    ]
    return inner / (sum(areas) - inner)


def corner(head, raw, prior, stride):
    """The student's box, by what mmdet itself does with it."""
    kind = type(head).__name__
    if kind == 'RetinaHead':
        return head.bbox_coder.decode(prior[None], raw[None])[0].tolist()
    if kind == 'GFLHead':
        centre = (prior[:2] + prior[2:]) / 2
        raw = head.integral(raw[None])[0] * stride
    else:
        centre = prior
        raw = raw * stride if head.norm_on_bbox else raw
    x, y = centre.tolist()
    left, top, right, bottom = raw.tolist()
    return [x - left, y - top, x + right, y + bottom]


@pytest.mark.parametrize('name', STUDENTS)
def test_it_is_the_formula(name):
    model = student(STUDENTS[name](), class_weight=2, box_weight=3)
    images, samples = batch()
    found = shares(model, images, samples)
    wanted = literal(model, images, samples)
    torch.testing.assert_close(found['class'], 2 * wanted['class'])
    torch.testing.assert_close(found['box'], 3 * wanted['box'])


def test_a_student_that_says_the_same_costs_nothing():
    model = student()
    images, samples = batch()
    with torch.no_grad():
        logits, boxes = model.bbox_head(model.extract_feat(images))[:2]
        anchor = torch.tensor([40.0, 48.0])  # of column 5 and row 6
        raw = model.bbox_head.integral(boxes[0][:, :, 6, 5]) * 8
    for number, one in enumerate(samples):
        one.teacher_predictions = InstanceData(
            points=anchor[None] + 4,
            strides=torch.tensor([9.0]),
            bboxes=torch.cat(
                [anchor - raw[number, :2], anchor + raw[number, 2:]]
            )[None],
            labels=torch.arange(3)[None],
            logits=logits[0][number, :, 6, 5][None],
        )
    found = shares(model, images, samples)
    assert found['class'] < 1e-6
    assert found['box'] < 1e-5


def test_the_order_of_predictions_does_not_matter():
    model = student()
    images, samples = batch()
    before = shares(model, images, samples)
    for one in samples:
        one.teacher_predictions = one.teacher_predictions[[3, 1, 4, 0, 2]]
    after = shares(model, images, samples)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)


def test_what_the_teacher_is_not_sure_of_counts_less():
    model = student()
    images, samples = batch(count=2)
    one = samples[0].teacher_predictions
    one.logits[0] = torch.tensor([2.0, -2.0])
    samples[1].teacher_predictions = one[:0]
    grown = []
    for logit in (-30.0, -5.0, 0.0):
        one.logits[1] = logit
        grown.append(shares(model, images, samples)['box'])
    alone = one[[0]]
    samples[0].teacher_predictions = alone
    torch.testing.assert_close(shares(model, images, samples)['box'], grown[0])
    assert abs(grown[1] - grown[0]) < abs(grown[2] - grown[0])


@pytest.mark.parametrize('weight', [0.5, 3.0])
def test_the_outer_factor_is_that_of_both_parts(weight):
    one = shares(student(), *batch())
    other = shares(student(loss_weight=weight), *batch())
    for key, value in one.items():
        torch.testing.assert_close(other[key], weight * value)


@pytest.mark.parametrize(
    ('settings', 'silent'),
    [
        (dict(loss_weight=0), True),
        (dict(class_weight=0, box_weight=0), True),
        (dict(class_weight=0, box_weight=0, edge_weight=1), False),
        (dict(class_weight=0), False),
        (dict(), False),
    ],
)
def test_a_term_without_weight_is_silent(settings, silent):
    assert bool(student(**settings).terms['said'].silent()) is silent


@pytest.mark.parametrize('name', ['class', 'box'])
def test_a_part_can_be_left_out(name):
    model = student(**{f'{name}_weight': 0})
    assert set(shares(model, *batch())) == {'class', 'box'} - {name}


@pytest.mark.parametrize('name', STUDENTS)
def test_it_teaches_backbone_and_head(name):
    model = student(STUDENTS[name]())
    sum(shares(model, *batch()).values()).backward()
    for part in (model.backbone.conv1, model.neck.lateral_convs[0].conv):
        assert part.weight.grad.abs().sum() > 0


def test_images_without_predictions_cost_nothing():
    model = student()
    images, samples = batch()
    for one in samples:
        one.teacher_predictions = one.teacher_predictions[:0]
    found = shares(model, images, samples)
    assert all(value == 0 for value in found.values())
    sum(found.values()).backward()


def test_half_precision_is_finite():
    model = student()
    with torch.autocast('cpu', torch.bfloat16):
        found = shares(model, *batch())
    assert all(
        one.isfinite() and one.dtype == torch.float32 for one in found.values()
    )


def test_no_predictions_are_told():
    model = student()
    with pytest.raises(ValueError, match=r'LoadPredictions behind Pack'):
        model.loss(*tiny.batch())


def test_other_classes_are_told(hub):
    hub.update_info('dataset_meta', dict(classes=('a', 'c', 'b')))
    go_to(hub, 0)
    model = student()
    with pytest.raises(ValueError, match=r"of the classes \('a', 'b', 'c'\)"):
        model.loss(*batch())


def test_another_number_of_classes_is_told():
    model = student(tiny.retinanet(classes=5))
    with pytest.raises(ValueError, match=r'of 3 classes, the student has 5'):
        model.loss(*batch())


def test_a_head_that_cannot_be_taught_is_told():
    with pytest.raises(ValueError, match='bbox_head'):
        student(tiny.faster_rcnn())
    with pytest.raises(ValueError, match=r'by a sigmoid.*PredictedBoxTerm'):
        student(families.ssd())


def test_a_copy_of_the_student_can_be_made():
    """As an average of its weights is."""
    model = student()
    assert isinstance(copy.deepcopy(model), type(model))


def test_only_one_level_is_asked_of_each():
    """The stride decides, on a logarithmic scale."""
    model = student()
    term = model.terms['said']
    maps = [torch.zeros(1, 3, side, side) for side in (16, 8, 4, 2, 1)]
    found = said(
        [[20, 36]] * 4,
        [8.0, 11.0, 11.6, 999.0],
        [[0, 0, 9, 9]] * 4,
        [[0]] * 4,
        [[0.5]] * 4,
    )
    cells = term._cells(model.bbox_head, maps, found)
    first = 256
    assert cells.tolist() == [4 * 16 + 2] * 2 + [first + 2 * 8 + 1] + [
        256 + 64 + 16 + 4
    ]


def test_a_point_past_the_last_cell_is_told_by_the_last():
    """Maps may leave out what is less than a stride."""
    model = student()
    term = model.terms['said']
    maps = [torch.zeros(1, 3, side, side) for side in (16, 8, 4, 2, 1)]
    found = said([[135, 4]], [8.0], [[0, 0, 9, 9]], [[0]], [[0.5]])
    assert term._cells(model.bbox_head, maps, found).tolist() == [15]

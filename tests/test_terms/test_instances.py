import copy
import math

import families
import heads
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from test_contracts import pretended, pretending
from torchvision.ops import box_iou, nms, roi_align

from mmkd.terms import instances
from mmkd.terms.decoding import decode
from mmkd.terms.instances import (
    InstanceTerm,
    assign,
    dispute,
    levels_of,
    read,
    relate,
    select,
)

KINDS = ('retinanet', 'gfl', 'atss', 'fcos')
STRIDES = (8, 16, 32, 64, 128)


class Head:
    """As much of a head as says where its levels are."""

    class prior_generator:  # noqa: N801
        strides = tuple((one, one) for one in STRIDES)


def boxes_at_random(images=2, count=60, seed=0):
    torch.manual_seed(seed)
    corner = 60 * torch.rand(images, count, 2)
    return torch.cat([corner, corner + 5 + 50 * torch.rand_like(corner)], 2)


# Suppression -----------------------------------------------------------------


@pytest.mark.parametrize('overlap', [0.1, 0.3, 0.7])
@pytest.mark.parametrize('topk', [1, 5, 60])
def test_suppression_leaves_what_nms_leaves(overlap, topk):
    boxes, scores = boxes_at_random(), torch.rand(2, 60)
    found, there = select(scores, boxes, topk, overlap)
    assert found.shape == (2, topk, 4)
    for n in range(2):
        kept = nms(boxes[n], scores[n], overlap)[:topk]
        assert there[n].tolist() == [True] * len(kept) + [False] * (
            topk - len(kept)
        )
        assert torch.equal(found[n, : len(kept)], boxes[n, kept])
        assert not found[n, len(kept) :].any()


def test_what_is_not_disputed_is_no_instance():
    found, there = select(torch.zeros(1, 9), boxes_at_random(1, 9), 3, 0.3)
    assert not there.any()
    assert not found.any()


def test_only_the_most_disputed_boxes_compete(monkeypatch):
    """Two suppress each other, and the third is no candidate."""
    monkeypatch.setattr(instances, 'CANDIDATES', 2)
    boxes = torch.tensor([[[0.0, 0, 9, 9], [1, 0, 9, 9], [20, 20, 30, 30]]])
    _, there = select(torch.tensor([[0.9, 0.8, 0.7]]), boxes, 3, 0.3)
    assert there.tolist() == [[True, False, False]]


def test_touching_boxes_at_the_limit_both_stay():
    """Half of each is shared, which is an IoU of a third."""
    boxes = torch.tensor([[[0.0, 0, 2, 2], [1, 0, 3, 2]]])
    scores = torch.tensor([[0.5, 0.4]])
    for limit, count in ((0.34, 2), (0.33, 1)):
        assert select(scores, boxes, 2, limit)[1].sum() == count


# Disputes --------------------------------------------------------------------


def test_disputes_written_out():
    torch.manual_seed(0)
    shapes = ((3, 4), (2, 1))
    logits = [
        [torch.randn(2, 2 * 3, *shape) for shape in shapes] for _ in range(2)
    ]
    corners = [
        [torch.randn(2, 2, 4, *shape) for shape in shapes] for _ in range(2)
    ]
    scores, boxes = dispute(*logits, *corners, 3)
    assert scores.shape == (2, 2 * 14)
    for n in range(2):
        index = 0
        for level, (rows, columns) in enumerate(shapes):
            for a in range(2):
                for y in range(rows):
                    for x in range(columns):
                        own, other = (
                            [
                                side[level][n, 3 * a + c, y, x].sigmoid()
                                for c in range(3)
                            ]
                            for side in logits
                        )
                        worst = max(abs(p - q) for p, q in zip(own, other))
                        surer = corners[max(other) > max(own)]
                        torch.testing.assert_close(scores[n, index], worst)
                        assert torch.equal(
                            boxes[n, index], surer[level][n, a, :, y, x]
                        )
                        index += 1


# Features --------------------------------------------------------------------


@pytest.mark.parametrize(
    ('width', 'height', 'level'),
    [
        (224, 224, 1),
        (223, 224, 0),
        (448, 112, 1),
        (447, 447, 1),
        (448, 448, 2),
        (900, 900, 3),
        (9000, 9000, 4),
        (10, 10, 0),
        (0, 0, 0),
    ],
)
def test_a_box_is_read_from_the_level_of_its_size(width, height, level):
    """A square of 224 pixels from that of stride 16."""
    box = torch.tensor([[[7.0, 9, 7 + width, 9 + height]]])
    assert levels_of(box, Head).tolist() == [[level]]


def test_a_head_of_one_level_reads_from_that():
    class Single:
        class prior_generator:  # noqa: N801
            strides = ((32, 32),)

    box = torch.tensor([[[0.0, 0, 500, 500], [0, 0, 20, 20]]])
    assert levels_of(box, Single).tolist() == [[0, 0]]


def test_reading_is_roi_align_at_the_level():
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 16, 12), torch.randn(2, 3, 8, 6)]
    boxes = boxes_at_random(2, 4)
    level = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    found = read(maps, boxes, level, (128, 96), 5)
    assert found.shape == (8, 3, 5, 5)
    for n in range(2):
        for k in range(4):
            stride = (8, 16)[level[n, k]]
            expected = roi_align(
                maps[level[n, k]][n : n + 1],
                [boxes[n, k][None]],
                5,
                spatial_scale=1 / stride,
                sampling_ratio=2,
                aligned=True,
            )
            torch.testing.assert_close(found[4 * n + k], expected[0])


def test_rows_and_columns_may_have_other_strides():
    """The map holds the column, a linear function, which bins average."""
    ramp = (torch.arange(8) + 0.5).expand(1, 1, 4, 8)
    box = torch.tensor([[[20.0, 16, 60, 48]]])  # columns 2 to 6
    found = read([ramp], box, torch.zeros(1, 1), (64, 80), 2)
    torch.testing.assert_close(
        found, torch.tensor([3.0, 5.0]).expand(1, 1, 2, 2)
    )


# Relations -------------------------------------------------------------------


def literal_relation(student, teacher, there):
    kept = [k for k in range(len(there)) if there[k]]
    pairs = [(i, j) for i in kept for j in kept if i != j]
    ratios = []
    for vectors in (student, teacher):
        distance = [
            torch.dist(vectors[i].double(), vectors[j].double())
            for i, j in pairs
        ]
        mean = sum(distance) / len(distance)
        ratios.append([one / mean for one in distance])
    errors = [
        (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5
        for a, b in zip(*ratios)
    ]
    return (sum(errors) / len(pairs)).float()


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 40) + 30
    teacher[2] *= 3  # an error above 1
    return student, teacher, torch.tensor([1.0, 1, 1, 0, 1, 1, 0])


def test_relations_written_out(vectors):
    expected = literal_relation(*vectors)
    assert expected > 0.1
    torch.testing.assert_close(
        relate(*vectors), expected, rtol=1e-3, atol=1e-5
    )


def test_what_is_not_there_does_not_matter(vectors):
    student, teacher, there = vectors
    before = relate(student, teacher, there)
    student[3] += 100
    teacher[6] *= 5
    torch.testing.assert_close(
        relate(student, teacher, there), before, rtol=1e-4, atol=1e-6
    )


def test_place_and_scale_of_either_side_do_not_matter(vectors):
    student, teacher, there = vectors
    before = relate(student, teacher, there)
    after = relate(0.1 * student + 3, 5 * teacher - 100, there)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)
    assert relate(2 * teacher + 1, teacher, there) < 1e-6


def test_distances_are_not_lost_in_what_is_common(vectors):
    """Squares of the vectors are a million times those of the distances."""
    student, teacher, there = vectors
    after = relate(student + 3000, teacher, there)
    expected = literal_relation(student + 3000, teacher, there)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-5)


def test_relations_are_as_exact_in_half_precision(vectors):
    with torch.autocast('cpu', torch.bfloat16):
        found = relate(*vectors)
    torch.testing.assert_close(found, relate(*vectors))


@pytest.mark.parametrize('count', [0, 1, 2])
def test_fewer_than_three_have_no_relation(vectors, count):
    student, teacher, _ = vectors
    there = (torch.arange(7) < count).float()
    student.requires_grad_()
    loss = relate(student, teacher, there)
    assert loss < 1e-10
    loss.backward()
    assert student.grad.isfinite().all()


def test_coinciding_instances_have_a_gradient(vectors):
    student, teacher, there = vectors
    student[1] = student[0]
    student.requires_grad_()
    relate(student, teacher, there).backward()
    assert student.grad.isfinite().all()
    assert student.grad[4].any()
    assert not student.grad[3].any()


@pretending
def test_nothing_is_read_back_from_the_device():
    """Before predictions are compared."""
    with pretended():
        maps = [torch.empty(2, 6, 4, 4, device='cuda')]
        corners = [torch.empty(2, 2, 4, 4, 4, device='cuda')]
        scores, boxes = dispute(maps, maps, corners, corners, 3)
        boxes, there = select(scores, boxes, 5, 0.3)
        level = levels_of(boxes, Head)
        found = read(maps, boxes, level, (32, 32), 3).flatten(1)
        loss = relate(found, found, there.flatten().to(found))
        assert loss.device.type == 'cuda'


# The term --------------------------------------------------------------------


def term(**settings):
    return dict(type='mmkd.InstanceTerm', teacher='big', **settings)


@pytest.fixture
def build(tmp_path):
    def build(kind, teacher=None, student=None, **settings):
        teacher = teacher or getattr(heads, kind)(base=16)
        file = tmp_path / 'teacher.pth'
        tiny.save_teacher(teacher, file, seed=3)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        model = tiny.distilled(
            student or getattr(heads, kind)(),
            dict(big=big),
            dict(x=term(**settings)),
        )
        model = tiny.build(model)
        model.teachers.load()
        # Else scores of an untrained head are all alike.
        for seed, one in enumerate((model, model.teachers['big'].detector)):
            torch.manual_seed(seed)
            for name, weight in one.bbox_head.named_parameters():
                if name.endswith('weight'):
                    torch.nn.init.normal_(weight.data, std=0.1)
        return model.train()

    return build


def parts_of(losses):
    return {
        name.removeprefix('loss_kd_x_'): value
        for name, value in losses.items()
        if 'kd_x' in name
    }


def rows_of(one, width):
    return one.permute(0, 2, 3, 1).reshape(len(one), -1, width)


def giou_of(one, other):
    """Boxes without area share nothing and cover nothing."""
    ends = [
        (max(one[k], other[k]), min(one[k + 2], other[k + 2])) for k in (0, 1)
    ]
    hull = 1.0
    for k in (0, 1):
        hull *= max(one[k + 2], other[k + 2]) - min(one[k], other[k])
    both = 1.0
    for start, end in ends:
        both *= max(end - start, 0.0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (one, other)]
    union = sum(areas) - both
    iou = both / union if union else 0.0
    return iou - ((hull - union) / hull if hull else 0.0)


def anchors_for(kind, model, boxes, images, samples):
    """Labels that the student's head assigns, image by image, flat."""
    objects = [
        InstanceData(bboxes=one, labels=torch.ones(len(one), dtype=torch.long))
        for one in boxes
    ]
    head = model.bbox_head
    sizes = [(128 // one, 128 // one) for one in STRIDES]
    if kind == 'fcos':
        points = head.prior_generator.grid_priors(sizes, device='cpu')
        labels, _ = head.get_targets(points, objects)
        labels = [one.reshape(len(images), -1) for one in labels]
    else:
        metas = [one.metainfo for one in samples]
        anchors, flags = head.get_anchors(sizes, metas, device='cpu')
        targets = head.get_targets(anchors, flags, objects, metas)
        labels = targets[0 if kind == 'retinanet' else 1]
    return torch.cat(labels, 1) == 1


def literal(kind, model, images, samples, seen=None):
    """All parts, unweighted, image by image and instance by instance."""
    big = model.teachers['big'].detector
    feats = model.extract_feat(images)
    seen = images if seen is None else seen
    own = model.bbox_head(feats)
    with torch.no_grad():
        like = big.extract_feat(seen)
        other = big.bbox_head(like)
    cut = [
        [
            one[..., : x.shape[-2], : x.shape[-1]]
            for one, x in zip(group, own[0])
        ]
        for group in other[:2]
    ]
    logits = [
        torch.cat([rows_of(one, 3) for one in group], 1)
        for group in (own[0], cut[0])
    ]
    width = own[1][0].shape[1]
    offsets = [
        torch.cat([rows_of(one, width) for one in group], 1)
        for group in (own[1], cut[1])
    ]
    corners = [
        torch.cat([rows_of(one[:, 0], 4) for one in decode(head, group)], 1)
        for head, group in (
            (model.bbox_head, own[1]),
            (big.bbox_head, cut[1]),
        )
    ]
    chosen, features, teachers = [], [], []
    for n, sample in enumerate(samples):
        p, q = (one[n].detach().sigmoid() for one in logits)
        score = (q - p).abs().amax(1)
        surer = (q.amax(1) > p.amax(1))[:, None]
        boxes = torch.where(surer, corners[1][n], corners[0][n]).detach()
        height, width = sample.img_shape
        boxes = torch.stack(
            [
                boxes[:, 0].clamp(0, width),
                boxes[:, 1].clamp(0, height),
                boxes[:, 2].clamp(0, width),
                boxes[:, 3].clamp(0, height),
            ],
            1,
        )
        wide = (boxes[:, 2] - boxes[:, 0] > 10) & (
            boxes[:, 3] - boxes[:, 1] > 10
        )
        boxes, score = boxes[wide], score[wide]
        boxes = boxes[nms(boxes, score, 0.3)[:10]]
        overlaps = box_iou(boxes, boxes) - torch.eye(len(boxes))
        assert overlaps.max() <= 0.3
        chosen.append(boxes)
        for box in boxes:
            side = ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
            level = (torch.log2(side / 224).floor() + 1).clamp(0, 4).int()
            for maps, group in ((feats, features), (like, teachers)):
                group.append(
                    roi_align(
                        maps[level][n : n + 1],
                        [box[None]],
                        10,
                        spatial_scale=1 / STRIDES[level],
                        sampling_ratio=2,
                        aligned=True,
                    )[0]
                )
    count = len(features)
    assert count > 6
    feature = sum(
        (one - other).square().sum() for one, other in zip(features, teachers)
    ) / (count * 100)
    relation = literal_relation(
        [one.flatten() for one in features],
        [one.flatten() for one in teachers],
        [1] * count,
    )
    positive = anchors_for(kind, model, chosen, images, samples)
    assert positive.any(1).all()
    cls = box = 0.0
    for n, a in positive.nonzero().tolist():
        target = logits[1][n, a].sigmoid()
        entropy = F.binary_cross_entropy(target, target, reduction='sum')
        cls += (
            F.binary_cross_entropy_with_logits(
                logits[0][n, a], target, reduction='sum'
            )
            - entropy
        )
        if kind == 'retinanet':
            box += (offsets[0][n, a] - offsets[1][n, a]).abs().sum()
        else:
            box += 1 - giou_of(*(one[n, a].tolist() for one in corners))
    total = positive.sum()
    return dict(
        feature=feature, relation=relation, cls=cls / total, box=box / total
    )


@pytest.mark.parametrize('kind', KINDS)
def test_equals_the_method_written_out(build, kind):
    factors = dict(feature=0.5, relation=2.0, cls=3.0, box=4.0)
    model = build(
        kind,
        feature_weight=0.5,
        relation_weight=2.0,
        class_weight=3.0,
        box_weight=4.0,
    )
    images, samples = tiny.batch()
    expected = literal(kind, model, images, samples)
    found = parts_of(model.loss(images, samples))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value > 0
        torch.testing.assert_close(
            value, factors[name] * expected[name], rtol=1e-3, atol=1e-5
        )


# One instance, a square of 64 pixels amid 128: ATSS takes the nine anchors of
# its size next to the centre, where overlaps are 1, 7/9 and 0.62; those of
# coarser levels overlap by 1/4 and less, far below mean plus deviation (0.59).
# FCOS takes every point inside, at the level of distances below 64.
NINE = [(row, column) for row in (7, 8, 9) for column in (7, 8, 9)]
INSIDE = [(row, column) for row in range(4, 12) for column in range(4, 12)]


@pytest.mark.parametrize(
    ('kind', 'cells'), [('gfl', NINE), ('atss', NINE), ('fcos', INSIDE)]
)
def test_the_anchors_of_an_instance_by_hand(kind, cells):
    head = tiny.build(getattr(heads, kind)()).bbox_head
    _, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    scores = [torch.zeros(2, 3, 128 // one, 128 // one) for one in STRIDES]
    boxes = torch.tensor([[32.0, 32, 96, 96], [0, 0, 0, 0]]).expand(2, 2, 4)
    there = torch.tensor([[False, False], [True, False]])
    finest, *others = assign(head, scores, boxes, there, samples)
    image, anchor, row, column = (one.tolist() for one in finest)
    assert set(image) == {1}  # in the other there is none
    assert set(anchor) == {0}
    assert list(zip(row, column)) == cells
    assert not any(one.numel() for level in others for one in level)


@pytest.mark.parametrize('kind', ['gfl', 'fcos'])
def test_predictions_by_hand(build, kind):
    """Each anchor's box is a square about it, of the teacher twice the side.

    A quarter of the teacher's is shared, whatever the level. At every anchor
    and class the student says 1/2, the teacher 3/4.
    """
    model = build(kind, class_weight=2.0, box_weight=10.0)
    big = model.teachers['big'].detector
    for head, logit, half in (
        (model.bbox_head, 0.0, 1.5),
        (big.bbox_head, math.log(3), 3.0),
    ):
        boxes = head.gfl_reg if kind == 'gfl' else head.conv_reg
        classes = head.gfl_cls if kind == 'gfl' else head.conv_cls
        for layer in (boxes, classes):
            torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(classes.bias, logit)
        if kind == 'fcos':  # in strides
            torch.nn.init.constant_(boxes.bias, half)
        else:  # bins 0 to 3: all alike, or the last alone
            bins = torch.tensor([0.0, 0, 0, 100 * (half - 1.5)])
            boxes.bias.data = bins.repeat(4)
    parts = parts_of(model.loss(*tiny.batch()))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert parts['cls'].item() == pytest.approx(2 * 3 * divergence, rel=1e-4)
    assert parts['box'].item() == pytest.approx(10 * 0.75, rel=1e-4)


@pytest.mark.parametrize('kind', ['ddod', 'paa', 'centernet_update'])
def test_heads_whose_assignment_reads_predictions_are_refused(build, kind):
    student, teacher = (getattr(families, kind)() for _ in range(2))
    with pytest.raises(
        ValueError, match=r'no get_targets that needs.*class_weight=0'
    ):
        build(kind, teacher=teacher, student=student)
    nothing = dict(class_weight=0.0, box_weight=0.0)
    build(kind, teacher=teacher, student=student, **nothing)


def test_a_head_whose_assignment_asks_for_more_than_boxes_is_refused():
    """YOLOF's asks for its scores and boxes as well."""
    from mmdet.models.dense_heads import GFLHead, YOLOFHead

    from mmkd.terms.instances import _takes_boxes

    assert not _takes_boxes(YOLOFHead.__new__(YOLOFHead))
    assert _takes_boxes(GFLHead.__new__(GFLHead))
    assert not _takes_boxes(torch.nn.Linear(1, 1))


def test_a_head_that_gives_probabilities_is_refused(build):
    student, teacher = families.tood(), families.tood()
    with pytest.raises(ValueError, match=r"student's TOODHead gives prob"):
        build('tood', teacher=teacher, student=student)


@pytest.mark.parametrize('kind', ['retinanet', 'gfl'])
def test_a_border_that_only_the_teacher_saw_does_not_matter(build, kind):
    teacher = getattr(heads, kind)(base=16)
    teacher['data_preprocessor'] = dict(tiny.PIXELS, pad_size_divisor=192)
    model = build(kind, teacher=teacher, feature_weight=1.0)
    images, samples = tiny.batch()
    seen = F.pad(images, (0, 64, 0, 64))
    expected = literal(kind, model, images, samples, seen)
    found = parts_of(model.loss(images, samples))
    torch.testing.assert_close(
        found['feature'], expected['feature'], rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        found['box'], expected['box'], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize('kind', KINDS)
def test_a_student_that_is_the_teacher_costs_nothing(build, kind):
    config = getattr(heads, kind)()
    model = build(kind, teacher=config, student=copy.deepcopy(config))
    big = model.teachers['big'].detector
    model.load_state_dict(big.state_dict(), strict=False)
    model.eval()
    parts = parts_of(model.loss(*tiny.batch()))
    assert len(parts) == 4
    assert all(value == 0 for value in parts.values())


@pytest.mark.parametrize('part', ['feature', 'relation', 'cls', 'box'])
@pytest.mark.parametrize('kind', KINDS)
def test_every_part_reaches_the_backbone_and_not_the_teacher(
    build, kind, part
):
    model = build(kind)
    parts_of(model.loss(*tiny.batch()))[part].backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    learns = any(
        one.grad is not None and one.grad.any()
        for one in model.bbox_head.parameters()
    )
    assert learns == (part in ('cls', 'box'))
    big = model.teachers['big'].detector
    assert all(one.grad is None for one in big.parameters())


@pytest.mark.parametrize('kind', KINDS)
def test_labels_do_not_matter(build, kind):
    model = build(kind).eval()
    images, samples = tiny.batch(boxes=3)
    _, empty = tiny.batch(boxes=0)
    one, other = (parts_of(model.loss(images, x)) for x in (samples, empty))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)


def test_no_instances_are_defined(build):
    """Every box is too small."""
    model = build('retinanet')
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    for sample in samples:
        sample.set_metainfo(dict(img_shape=(10, 128)))
    losses = model.loss(images, samples)
    parts = parts_of(losses)
    assert all(value == 0 for value in parts.values())
    tiny.total(losses).backward()
    assert all(
        one.grad is None or one.grad.isfinite().all()
        for one in model.parameters()
    )


def test_settings_reach_their_places(build):
    """Other numbers of instances, of bins, and another limit."""
    model = build('gfl', feature_weight=1.0)
    batch = tiny.batch()
    seen = []
    for settings in (
        {},
        dict(topk=3),
        dict(bins=4),
        dict(max_overlap=0.9),
    ):
        x = InstanceTerm('big', feature_weight=1.0, **settings)
        x.bind(model, model.teachers)
        model.terms['x'] = x
        seen.append(parts_of(model.loss(*batch))['feature'].item())
    assert len(set(seen)) == 4


def test_the_choice_of_instances_is_no_path_for_gradients(build, monkeypatch):
    seen = []
    monkeypatch.setattr(
        instances, 'select', lambda *x: seen.append(x) or select(*x)
    )
    build('gfl').loss(*tiny.batch())
    for scores, boxes, *_ in seen:
        assert not scores.requires_grad
        assert not boxes.requires_grad


def test_without_predictions_nothing_is_assigned(build):
    model = build('gfl', class_weight=0.0, box_weight=0.0)
    count = []
    head = model.bbox_head
    plain = head.get_targets
    head.get_targets = lambda *x, **y: count.append(1) or plain(*x, **y)
    parts = parts_of(model.loss(*tiny.batch()))
    assert parts.keys() == {'feature', 'relation'}
    assert len(count) == 1  # the student's own


def test_offsets_of_other_scales_are_compared_as_boxes(build):
    """A teacher that counts in other units, but means the same boxes."""
    config = heads.retinanet()
    teacher = copy.deepcopy(config)
    teacher['bbox_head']['bbox_coder'] = dict(
        type='DeltaXYWHBBoxCoder', target_stds=[0.5, 0.5, 0.5, 0.5]
    )
    model = build('retinanet', teacher=teacher, student=config)
    big = model.teachers['big'].detector
    model.load_state_dict(big.state_dict(), strict=False)
    with torch.no_grad():
        model.bbox_head.retina_reg.weight *= 0.5
        model.bbox_head.retina_reg.bias *= 0.5
        model.bbox_head.retina_cls.bias += 0.3
    model.eval()
    parts = parts_of(model.loss(*tiny.batch()))
    assert parts['cls'] > 0
    assert parts['box'] < 1e-5


def test_other_widths_are_aligned(build):
    wide = tiny.retinanet(channels=32)
    student = heads.retinanet()
    with pytest.raises(ValueError, match=r'Only the channels.*ConvAdapt'):
        build('retinanet', teacher=wide, student=student)
    adapt = dict(
        type='mmkd.ConvAdapt',
        in_channels=16,
        out_channels=32,
        num_levels=5,
    )
    model = build('retinanet', teacher=wide, student=student, align=adapt)
    parts_of(model.loss(*tiny.batch()))['feature'].backward()
    assert any(
        one.grad is not None and one.grad.any()
        for one in model.terms['x'].align.parameters()
    )


def test_half_precision_is_computed_in_float32(build):
    model = build('atss')
    with torch.autocast('cpu', torch.bfloat16):
        parts = parts_of(model.loss(*tiny.batch()))
    for value in parts.values():
        assert value.dtype == torch.float32
        assert value.isfinite()


def test_classes_are_compared_and_nothing_is_done_for_nothing():
    assert InstanceTerm('big').compares_classes()
    assert not InstanceTerm('big').silent()
    weights = ('feature', 'relation', 'class', 'box')
    nothing = {f'{name}_weight': 0.0 for name in weights}
    assert InstanceTerm('big', **nothing).silent()
    for name in nothing:
        assert not InstanceTerm('big', **{**nothing, name: 1.0}).silent()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(topk=0), 'topk > 0'),
        (dict(bins=0), 'bins > 0'),
        (dict(max_overlap=2), 'max_overlap between 0 and 1'),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InstanceTerm('big', **settings)


def test_a_misspelt_teacher_gets_the_nearest(build):
    with pytest.raises(ValueError, match=r"teacher 'bog'.*'big'"):
        build('gfl', **{'teacher': None})  # builds
        InstanceTerm('bog').bind(torch.nn.Module(), dict(big=None))


def altered(kind, **head):
    config = getattr(heads, kind)(base=16)
    config['bbox_head'].update(head)
    return config


def test_heads_that_differ(build):
    with pytest.raises(ValueError, match=r'has classes: 3, the teacher 4'):
        build('gfl', teacher=altered('gfl', num_classes=4))
    anchors = dict(heads.atss()['bbox_head']['anchor_generator'])
    anchors['ratios'] = [0.5, 2.0]
    with pytest.raises(ValueError, match=r'anchors a cell: \[1, 1, 1, 1, 1\]'):
        build('atss', teacher=altered('atss', anchor_generator=anchors))
    anchors = dict(heads.atss()['bbox_head']['anchor_generator'])
    anchors['strides'] = [4, 8, 16, 32, 64]
    with pytest.raises(ValueError, match='strides'):
        build('atss', teacher=altered('atss', anchor_generator=anchors))


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_heads_that_cannot_be_read(build, side):
    other = heads.retinanet(base=16)
    other['bbox_head']['loss_cls'] = dict(type='CrossEntropyLoss')
    with pytest.raises(ValueError, match=f"InstanceTerm reads.*{side}'s"):
        build('retinanet', **{side: other})
    with pytest.raises(ValueError, match="student's FPN"):
        build('retinanet', tap='neck')


def test_a_head_that_assigns_nothing(build, monkeypatch):
    model = build('gfl')
    monkeypatch.delattr(
        type(model.bbox_head).__mro__[0], 'get_targets', raising=False
    )
    x = InstanceTerm('big')
    if hasattr(model.bbox_head, 'get_targets'):
        monkeypatch.delattr(
            type(model.bbox_head).__mro__[1], 'get_targets', raising=True
        )
    with pytest.raises(
        ValueError, match='no get_targets that needs.*Set class_w'
    ):
        x.bind(model, model.teachers)
    InstanceTerm('big', class_weight=0.0, box_weight=0.0).bind(
        model, model.teachers
    )


def test_maps_that_the_head_does_not_see(build):
    with pytest.raises(ValueError, match=r"5 levels, but 'backbone' has 4"):
        build('gfl', neck='backbone')

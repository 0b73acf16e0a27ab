import math
from types import SimpleNamespace

import heads
import pytest
import tiny
import torch
from test_contracts import pretended, pretending

from mmkd.structures import GroundTruth
from mmkd.terms.weights import quality
from mmkd.terms.weights.quality import (
    SHAKE,
    QualityWeight,
    best_cells,
    density,
)

KINDS = ('gfl', 'atss', 'retinanet', 'fcos')


# The Gaussian ----------------------------------------------------------------


def literal_density(points, count):
    """With the inverse of the covariance, point by point."""
    values = torch.zeros(len(points), dtype=torch.float64)
    there = points[count > 0].double()
    if not len(there):
        return values
    mean = sum(there) / len(there)
    covariance = sum(torch.outer(x - mean, x - mean) for x in there)
    covariance = covariance / len(there) + SHAKE * torch.eye(2)
    inverse = torch.linalg.inv(covariance)
    for index, point in enumerate(points.double()):
        if count[index]:
            away = point - mean
            values[index] = torch.exp(-away @ inverse @ away / 2)
    return values


def test_the_density_written_out():
    torch.manual_seed(0)
    points = 40 * torch.randn(6, 9, 2) + 300
    points[1, :, 0] = 5 * points[1, :, 1] + torch.randn(9)
    # A steep line, from which they are as far as they are shaken.
    points[2, :, 0] = 300 + torch.randn(9)
    points[2, :, 1] = 20 * points[2, :, 0] + torch.randn(9)
    count = (torch.rand(6, 9) > 0.3).float()
    count[5] = 0
    found = density(points, count)
    expected = torch.stack([literal_density(*x) for x in zip(points, count)])
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


def test_four_corners_by_hand():
    """Variance 4 each way about (2, 2): d² = 2 at each, so 1/e."""
    points = torch.tensor([[[0.0, 0], [4, 0], [0, 4], [4, 4]]])
    found = density(points, torch.ones(1, 4))
    torch.testing.assert_close(
        found, torch.full((1, 4), math.exp(-1)), rtol=1e-3, atol=0
    )


def test_the_mean_weighs_one_and_so_does_a_single_point():
    points = torch.tensor([[[8.0, 8], [16, 8], [24, 8]]])
    assert density(points, torch.ones(1, 3))[0, 1] == 1
    one = torch.tensor([[0.0, 1, 0]])
    assert density(points, one).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize('slant', [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_points_on_a_line_have_the_density_of_a_line(slant):
    """However far they reach: -1, 0, 1 have variance 2/3."""
    points = 1000 * torch.tensor([-1.0, 0, 1])[:, None] * torch.tensor(slant)
    found = density(3000 + points[None], torch.ones(1, 3))
    end = math.exp(-3 / 4)
    torch.testing.assert_close(
        found, torch.tensor([[end, 1.0, end]]), rtol=1e-3, atol=1e-3
    )


def test_place_size_and_proportions_do_not_matter():
    torch.manual_seed(0)
    points, count = 40 * torch.randn(3, 9, 2), torch.ones(3, 9)
    before = density(points, count)
    moved = points * torch.tensor([2.0, 0.5]) + torch.tensor([100.0, 7.0])
    torch.testing.assert_close(
        density(moved, count), before, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        density(points.flip(2), count), before, rtol=1e-3, atol=1e-4
    )


# The best cells --------------------------------------------------------------


def iou_of(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (one, other)]
    return both / (sum(areas) - both) if both else 0.0


@pytest.fixture
def cells():
    """Two levels, of 4x4 and 2x2 cells, with predictions at random."""

    def cells(anchors=2, classes=3):
        torch.manual_seed(0)
        levels = []
        for stride, size in ((8, 4), (16, 2)):
            middle = (torch.arange(size) + 0.5) * stride
            y, x = torch.meshgrid(middle, middle, indexing='ij')
            levels.append(torch.stack([x, y], 2).reshape(-1, 2))
        centres = torch.cat(levels)
        shape = (2, len(centres), anchors)
        scores = torch.randn(*shape, classes)
        half = 4 + 8 * torch.rand(*shape, 2)
        middle = centres[:, None] + 4 * torch.randn(*shape, 2)
        return scores, torch.cat([middle - half, middle + half], -1), centres

    return cells


@pytest.fixture
def gt():
    return GroundTruth.from_boxes(
        [
            torch.tensor([[2.0, 3, 19, 28], [10, 1, 31, 18]]),
            torch.tensor([[0.0, 9, 30, 30]]),
        ],
        shape=(32, 32),
        labels=[torch.tensor([1, 0]), torch.tensor([2])],
    )


def literal_cells(scores, boxes, centres, gt, topk, power):
    weight = torch.zeros(scores.shape[:2])
    for n, label, box in zip(gt.image, gt.labels, gt.boxes.tolist()):
        found = {}
        for p, (x, y) in enumerate(centres.tolist()):
            if not (box[0] < x < box[2] and box[1] < y < box[3]):
                continue
            for a in range(scores.shape[2]):
                score = scores[n, p, a, label].sigmoid().item()
                iou = iou_of(boxes[n, p, a].tolist(), box)
                value = score ** (1 - power) * iou**power
                found[p] = max(found.get(p, 0.0), value)
        found = {p: value for p, value in found.items() if value > 0}
        best = sorted(found, key=found.get, reverse=True)[:topk]
        if best:
            values = literal_density(centres[best], torch.ones(len(best)))
            for p, value in zip(best, values.tolist()):
                weight[n, p] = max(weight[n, p], value)
    return weight


@pytest.mark.parametrize('topk', [1, 5, 30])
@pytest.mark.parametrize('power', [0.8, 0.3])
def test_the_best_cells_written_out(cells, gt, topk, power):
    inputs = cells()
    found = best_cells(*inputs, gt, topk, power)
    expected = literal_cells(*inputs, gt, topk, power)
    assert 0 < (expected > 0).sum() <= topk * 3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_boxes_may_be_taken_one_after_the_other(cells, gt, monkeypatch):
    inputs = cells()
    before = best_cells(*inputs, gt, 5, 0.8)
    monkeypatch.setattr(quality, 'CHUNK', 1)
    assert torch.equal(best_cells(*inputs, gt, 5, 0.8), before)


def test_one_box_by_hand():
    """Three cells in a row predict the box alike: 8, 16, 24."""
    centres = torch.tensor([[8.0, 8], [16, 8], [24, 8], [32, 8]])
    box = torch.tensor([4.0, 4, 28, 12])
    boxes = box.expand(1, 4, 1, 4)
    gt = GroundTruth.from_boxes([box[None]], shape=(40, 40))
    found = best_cells(torch.zeros(1, 4, 1, 1), boxes, centres, gt, 9, 0.8)
    end = math.exp(-3 / 4)  # 64 away, variance 2/3 · 64
    torch.testing.assert_close(
        found, torch.tensor([[end, 1.0, end, 0.0]]), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize('power', [0.0, 1.0])
def test_the_power_chooses_between_score_and_box(power):
    """One cell is sure of the class, the other of the box."""
    centres = torch.tensor([[8.0, 8], [16, 8]])
    box = torch.tensor([0.0, 0, 24, 16])
    boxes = torch.stack([box / 2, box])[None, :, None]
    scores = torch.tensor([3.0, -3.0]).view(1, 2, 1, 1)
    gt = GroundTruth.from_boxes([box[None]], shape=(32, 32))
    found = best_cells(scores, boxes, centres, gt, 1, power)
    assert found[0].tolist() == [1 - power, power]


def test_images_and_classes_are_not_mixed_up(cells, gt):
    scores, boxes, centres = cells()
    before = best_cells(scores, boxes, centres, gt, 5, 0.8)
    scores[0, :, :, 2] += 9  # of image 1 alone there is a box of class 2
    assert torch.equal(best_cells(scores, boxes, centres, gt, 5, 0.8), before)
    scores[1] = scores[1].flip(0)
    after = best_cells(scores, boxes, centres, gt, 5, 0.8)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_cells_of_no_quality_count_for_nothing(cells, gt):
    scores, _, centres = cells()
    far = torch.tensor([90.0, 90, 99, 99]).expand(*scores.shape[:3], 4)
    assert not best_cells(scores, far, centres, gt, 5, 0.8).any()


def test_no_boxes_no_cells(cells):
    empty = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=(32, 32))
    found = best_cells(*cells(), empty, 5, 0.8)
    assert found.shape == (2, 20)
    assert not found.any()


@pretending
def test_nothing_is_read_back_from_the_device():
    with pretended():
        box = torch.empty(3, 4, device='cuda')
        gt = GroundTruth.from_boxes([box, box[:1]], shape=(32, 32))
        found = best_cells(
            torch.empty(2, 20, 1, 5, device='cuda'),
            torch.empty(2, 20, 1, 4, device='cuda'),
            torch.empty(20, 2, device='cuda'),
            gt,
            9,
            0.8,
        )
        assert found.device.type == 'cuda'


# In a detector ---------------------------------------------------------------


def term(tower='cls', **settings):
    loss = 'mmkd.PGDClassLoss' if tower == 'cls' else 'mmkd.PGDBoxLoss'
    return dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap=f'bbox_head.{tower}_convs.0',
        levels=(0, 1, 2, 3, 4),
        weight=dict(type='mmkd.QualityWeight', **settings),
        loss=dict(type=loss),
    )


PLAIN = term()


@pytest.fixture
def build(tmp_path):
    def build(kind, teacher=None, term=PLAIN, **more):
        teacher = teacher or getattr(heads, kind)(base=16)
        # As wide a tower as the student's.
        if 'bbox_head' in teacher:
            teacher['bbox_head']['feat_channels'] = 16
        file = tmp_path / 'teacher.pth'
        tiny.save_teacher(teacher, file, seed=3)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        student = getattr(heads, kind)(**more)
        model = tiny.distilled(student, dict(big=big), dict(x=term))
        model = tiny.build(model)
        model.teachers.load()
        head = getattr(model.teachers['big'].detector, 'bbox_head', None)
        torch.manual_seed(0)
        for name, weight in head.named_parameters() if head else ():
            if name.endswith('weight'):
                torch.nn.init.normal_(weight.data, std=0.08)
        return model.train()

    return build


def weights_of(model, images, samples):
    """What the weight gives in a step, level by level."""
    seen = []
    weight = model.terms['x'].weight
    plain = weight.forward
    weight.forward = lambda step: seen.append(plain(step)) or seen[-1]
    losses = model.loss(images, samples)
    weight.forward = plain
    return seen[-1], losses


def cells_of(kind, head, feats):
    """Scores, boxes and places of the cells of a head, level by level."""
    strides = (8, 16, 32, 64, 128)
    outputs = head(feats)
    scores, boxes, centres = [], [], []
    for level, (score, box) in enumerate(zip(*outputs[:2])):
        rows, columns = score.shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(rows), torch.arange(columns), indexing='ij'
        )
        offset = strides[level] / 2 if kind == 'fcos' else 0
        place = strides[level] * torch.stack([x, y], 2).reshape(-1, 2) + offset
        box = box.permute(0, 2, 3, 1).flatten(1, 2)
        if kind == 'gfl':
            bins = box.unflatten(2, (4, 4)).softmax(3)
            box = strides[level] * (bins * torch.arange(4.0)).sum(3)
        if kind in ('gfl', 'fcos'):
            box = torch.cat([place - box[..., :2], place + box[..., 2:]], 2)
        else:
            side = strides[level] * (8 if kind == 'atss' else 4)
            deviation = (0.1, 0.1, 0.2, 0.2) if kind == 'atss' else (1.0,) * 4
            dx, dy, dw, dh = (box * torch.tensor(deviation)).unbind(2)
            middle = place + side * torch.stack([dx, dy], 2)
            half = side / 2 * torch.stack([dw, dh], 2).exp()
            box = torch.cat([middle - half, middle + half], 2)
        scores.append(score.permute(0, 2, 3, 1).flatten(1, 2))
        boxes.append(box)
        centres.append(place.float())
    return (
        torch.cat(scores, 1)[:, :, None],
        torch.cat(boxes, 1)[:, :, None],
        torch.cat(centres),
    )


@pytest.mark.parametrize('kind', KINDS)
def test_the_teacher_is_asked_and_nobody_else(build, kind):
    model = build(kind, term=term(topk=7, iou_power=0.6))
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    found, losses = weights_of(model, images, samples)
    big = model.teachers['big'].detector
    with torch.no_grad():
        given = cells_of(kind, big.bbox_head, big.extract_feat(images))
    gt = GroundTruth.from_samples(samples, images)
    expected = literal_cells(*given, gt, 7, 0.6)
    assert (expected > 0).sum() > 7
    sizes = [16, 8, 4, 2, 1]
    for size, one, like in zip(
        sizes, found, expected.split([size**2 for size in sizes], 1)
    ):
        assert one.shape == (2, 1, size, size)
        torch.testing.assert_close(one.flatten(1), like, rtol=1e-2, atol=1e-3)
    assert losses['loss_kd_x_foreground'] > 0


def test_border_and_ignored_cells_do_not_count(build):
    model = build('atss')
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    before, _ = weights_of(model, images, samples)
    samples[0].set_metainfo(dict(img_shape=(128, 32)))
    samples[1].ignored_instances.bboxes = torch.tensor([[0.0, 0, 32, 128]])
    samples[1].ignored_instances.labels = torch.zeros(1, dtype=torch.long)
    after, _ = weights_of(model, images, samples)
    fine, less = before[0].clone(), after[0]
    assert fine[0, :, :, 4:].any()
    assert fine[1, :, :, :4].any()
    fine[0, :, :, 4:] = 0
    fine[1, :, :, :4] = 0
    assert torch.equal(less, fine)


@pytest.mark.parametrize('anchor', [0, 1])
def test_of_the_anchors_of_a_cell_the_best_counts(build, anchor):
    """The boxes of this teacher are its anchors, one of which is right."""
    teacher = heads.retinanet(base=16)
    anchors = dict(teacher['bbox_head']['anchor_generator'], ratios=[0.5, 2])
    teacher['bbox_head']['anchor_generator'] = anchors
    model = build(
        'retinanet', teacher=teacher, term=term(topk=1, iou_power=1.0)
    )
    head = model.teachers['big'].detector.bbox_head
    torch.nn.init.zeros_(head.retina_reg.weight)
    images, samples = tiny.batch(shapes=((128, 128),), boxes=1)
    priors = head.prior_generator.grid_priors([(8, 8)] * 5, device='cpu')
    box = priors[1][2 * (3 * 8 + 5) + anchor]
    samples[0].gt_instances.bboxes = box[None]
    found, _ = weights_of(model, images, samples)
    assert [one.sum().item() for one in found] == [0, 1, 0, 0, 0]
    assert found[1][0, 0, 3, 5] == 1


@pytest.mark.parametrize('tower', ['cls', 'reg'])
@pytest.mark.parametrize('kind', KINDS)
def test_the_students_backbone_learns_and_the_teacher_does_not(
    build, kind, tower
):
    model = build(kind, term=term(tower))
    found, losses = weights_of(model, *tiny.batch())
    assert all(not one.requires_grad for one in found)
    share = [value for name, value in losses.items() if 'kd_x' in name]
    sum(share).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    tower, other = (
        getattr(model.bbox_head, f'{name}_convs')[0]
        for name in (tower, 'reg' if tower == 'cls' else 'cls')
    )
    assert tower.conv.weight.grad.abs().sum() > 0
    assert other.conv.weight.grad is None
    big = model.teachers['big'].detector
    assert all(one.grad is None for one in big.parameters())


def test_it_is_no_path_for_gradients(build):
    model = build('gfl')
    images, samples = tiny.batch()
    big = model.teachers['big'].detector.requires_grad_()
    outputs = big.bbox_head(big.extract_feat(images))
    assert outputs[0][0].requires_grad
    shown = SimpleNamespace(at=lambda path: outputs, detector=big, size=None)
    gt = GroundTruth.from_samples(samples, images)
    step = SimpleNamespace(teacher=lambda name: shown, gt=gt, images=images)
    found = model.terms['x'].weight(step)
    assert found[0].any()
    assert all(not one.requires_grad for one in found)


def test_images_without_boxes(build):
    model = build('gfl')
    found, losses = weights_of(model, *tiny.batch(boxes=0))
    assert not any(one.any() for one in found)
    assert losses['loss_kd_x_foreground'] == 0
    tiny.total(losses).backward()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(topk=0), 'topk > 0'),
        (dict(iou_power=1.5), 'iou_power between 0 and 1'),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        QualityWeight(**settings)


def test_a_head_whose_boxes_cannot_be_read(build):
    with pytest.raises(ValueError, match=r"QualityWeight.*teacher's FPN"):
        build('gfl', term=term(tap='neck'))


def test_a_softmax_has_no_score_of_a_class_by_itself(build):
    teacher = heads.retinanet(base=16)
    teacher['bbox_head']['loss_cls'] = dict(type='CrossEntropyLoss')
    with pytest.raises(ValueError, match='QualityWeight reads scores'):
        build('retinanet', teacher=teacher)

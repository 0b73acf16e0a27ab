"""mmcv's operators on torchvision, through mmcv.ops and directly.

Operators that mmcv calls on CUDA only are called directly, on every device
that there is. Slow literal versions stand beside their tests.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.autograd import gradcheck

from mmkd.compat import install

install()

mmcv_ops = pytest.importorskip('mmcv.ops')
ext = pytest.importorskip('mmcv._ext')
if not hasattr(ext, '_not_covered'):
    pytest.skip('mmcv is compiled here', allow_module_level=True)

DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_boxes(count, size=64.0, smallest=4.0, dtype=torch.float32):
    start = torch.rand(count, 2, dtype=dtype) * size
    extent = smallest + torch.rand(count, 2, dtype=dtype) * size / 2
    return torch.cat((start, start + extent), 1)


def slow_iou(a, b, offset=0):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    union = area_a + area_b - w * h
    return w * h / union if union > 0 else 0.0


def border_bilinear(plane, y, x):
    """A pixel beyond the border still sees it, one further out sees 0."""
    h, w = plane.shape
    if not (-1 <= y <= h and -1 <= x <= w):
        return 0.0
    y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
    return zero_bilinear(plane, y, x)


def zero_bilinear(plane, y, x):
    """All outside of the map is 0."""
    h, w = plane.shape
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < h and 0 <= j < w:
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            total += weight * float(plane[i, j])
    return total


# Suppression ----------------------------------------------------------------


def slow_nms(boxes, scores, threshold, offset=0):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        if all(
            slow_iou(boxes[i], boxes[j], offset) <= threshold for j in kept
        ):
            kept.append(i)
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.2, 0.4, 0.6])
def test_nms_keeps_what_the_slow_version_keeps(device, threshold, offset):
    boxes, scores = random_boxes(60, size=24.0), torch.rand(60)
    dets, kept = mmcv_ops.nms(
        boxes.to(device), scores.to(device), threshold, offset=offset
    )
    expected = slow_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    assert 1 < len(expected) < 60
    assert kept.tolist() == expected
    torch.testing.assert_close(
        dets.cpu(), torch.cat((boxes, scores[:, None]), 1)[expected]
    )


def test_nms_offset_counts_the_last_pixel():
    # Pixels 0…9 and 0…4: 5 of 10 columns shared, so IoU is 50 of 100 with the
    # last pixel counted, and 36 of 81 without.
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 4, 9]])
    scores = torch.tensor([0.9, 0.8])
    assert len(mmcv_ops.nms(boxes, scores, 0.47, offset=0)[1]) == 2
    assert len(mmcv_ops.nms(boxes, scores, 0.47, offset=1)[1]) == 1


def test_nms_takes_arrays_empty_input_and_limits():
    boxes, scores = random_boxes(20).numpy(), np.linspace(0, 1, 20)
    dets, kept = mmcv_ops.nms(
        boxes, scores.astype(np.float32), 0.99, score_threshold=0.5, max_num=3
    )
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == [19, 18, 17]
    dets, kept = mmcv_ops.nms(torch.empty(0, 4), torch.empty(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.dtype == torch.long


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_nms_works_in_half_precision(device, dtype):
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 7], [9, 9, 12, 12]])
    scores = torch.tensor([0.5, 0.75, 0.25])
    _, kept = mmcv_ops.nms(
        boxes.to(device, dtype), scores.to(device, dtype), 0.5
    )
    assert kept.tolist() == [1, 2]


def test_batched_nms_treats_classes_apart(device):
    boxes, scores = random_boxes(60, size=16.0), torch.rand(60)
    classes = torch.arange(60) % 3
    dets, kept = mmcv_ops.batched_nms(
        boxes.to(device),
        scores.to(device),
        classes.to(device),
        dict(type='nms', iou_threshold=0.4),
    )
    expected = []
    for c in range(3):
        rows = (classes == c).nonzero().squeeze(1)
        part = slow_nms(boxes[rows].tolist(), scores[rows].tolist(), 0.4)
        expected += rows[part].tolist()
    expected.sort(key=lambda i: -scores[i])
    assert kept.tolist() == expected
    torch.testing.assert_close(dets[:, 4].cpu(), scores[expected])


def slow_soft_nms(boxes, scores, method, threshold, sigma, least, offset):
    rest = list(range(len(boxes)))
    scores = list(scores)
    out = []
    while rest:
        best = max(rest, key=lambda i: scores[i])
        out.append((best, scores[best]))
        rest.remove(best)
        for i in rest:
            iou = slow_iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                scores[i] *= 1 - iou if method == 'linear' else 0
        rest = [i for i in rest if scores[i] >= least]
    return out


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_rescores_as_the_slow_version_does(device, method, offset):
    boxes, scores = random_boxes(40, size=16.0), torch.rand(40)
    before = boxes.clone(), scores.clone()
    dets, kept = mmcv_ops.soft_nms(
        boxes.to(device),
        scores.to(device),
        iou_threshold=0.3,
        sigma=0.4,
        min_score=0.05,
        method=method,
        offset=offset,
    )
    expected = slow_soft_nms(
        boxes.tolist(), scores.tolist(), method, 0.3, 0.4, 0.05, offset
    )
    assert 1 < len(expected) < 40
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(
        dets[:, 4].cpu(), torch.tensor([s for _, s in expected])
    )
    torch.testing.assert_close(dets[:, :4].cpu(), boxes[kept.cpu()])
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


def test_soft_nms_by_hand():
    # The second box covers half of the first: IoU 1/2. The third is alone.
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [8, 8, 9, 9]])
    scores = torch.tensor([0.9, 0.8, 0.5])
    dets, kept = mmcv_ops.soft_nms(boxes, scores, 0.5, method='linear')
    assert kept.tolist() == [0, 2, 1]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.5, 0.4]))
    dets, _ = mmcv_ops.soft_nms(boxes, scores, sigma=0.5, method='gaussian')
    torch.testing.assert_close(
        dets[:, 4], torch.tensor([0.9, 0.5, 0.8 * math.exp(-0.5)])
    )
    _, kept = mmcv_ops.soft_nms(boxes, scores, 0.5, method='naive')
    assert kept.tolist() == [0, 2]


def test_soft_nms_survives_empty_boxes_and_empty_input():
    boxes = np.array([[3.0, 1, 3, 1]] * 3, dtype=np.float32)
    scores = np.array([0.5, 0.9, 0.0], dtype=np.float32)
    for method in ('naive', 'linear', 'gaussian'):
        dets, kept = mmcv_ops.soft_nms(boxes, scores, method=method)
        assert kept.tolist() == [1, 0]
        assert np.isfinite(dets).all()
    dets, kept = mmcv_ops.soft_nms(torch.empty(0, 4), torch.empty(0))
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)


def test_batched_nms_runs_soft_nms():
    boxes = random_boxes(30, size=16.0)
    dets, kept = mmcv_ops.batched_nms(
        boxes,
        torch.rand(30),
        torch.arange(30) % 2,
        dict(type='soft_nms', iou_threshold=0.3, min_score=0.05),
    )
    assert (dets[:-1, 4] >= dets[1:, 4]).all()
    torch.testing.assert_close(dets[:, :4], boxes[kept])


def test_nms_match_groups_each_box_with_its_suppressor(device):
    boxes, scores = random_boxes(40, size=16.0), torch.rand(40)
    dets = torch.cat((boxes, scores[:, None]), 1)
    groups = mmcv_ops.nms_match(dets.to(device), 0.4)
    rest = sorted(range(40), key=lambda i: -scores[i])
    expected = []
    while rest:
        best, *others = rest
        hit = [
            i
            for i in others
            if slow_iou(boxes[best].tolist(), boxes[i].tolist()) >= 0.4
        ]
        expected.append([best, *hit])
        rest = [i for i in others if i not in hit]
    assert [group.tolist() for group in groups] == expected
    assert any(len(group) > 2 for group in groups)


def test_nms_match_takes_an_array_with_an_empty_box():
    dets = np.array([[1, 1, 1, 1, 0.9], [0, 0, 2, 2, 0.8]], dtype=np.float32)
    groups = mmcv_ops.nms_match(dets, 0.5)
    assert [group.tolist() for group in groups] == [[0], [1]]


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', ['iou', 'iof'])
@pytest.mark.parametrize('aligned', [False, True])
def test_bbox_overlaps_by_the_slow_version(device, aligned, mode, offset):
    first, second = random_boxes(6, 16.0), random_boxes(6, 16.0)
    result = mmcv_ops.bbox_overlaps(
        first.to(device), second.to(device), mode, aligned, offset
    )
    expected = torch.zeros(6, 6)
    for i, j in itertools.product(range(6), range(6)):
        a, b = first[i].tolist(), second[j].tolist()
        iou = slow_iou(a, b, offset)
        area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
        area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
        # From IoU = I / (A + B - I) follows I = IoU (A + B) / (1 + IoU).
        shared = iou * (area_a + area_b) / (1 + iou)
        expected[i, j] = iou if mode == 'iou' else shared / area_a
    expected = expected.diagonal() if aligned else expected
    torch.testing.assert_close(result.cpu(), expected)


def test_bbox_overlaps_of_empty_boxes_is_zero():
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert mmcv_ops.bbox_overlaps(point, point).item() == 0


# Regions --------------------------------------------------------------------


def regions(dtype=torch.float32):
    """Inside, across the border, outside, flat; of two images."""
    return torch.tensor(
        [
            [0, 1.3, 2.1, 13.7, 11.9],
            [1, -6.2, -3.4, 9.3, 7.7],
            [1, 10.1, 12.2, 26.3, 29.1],
            [0, 60.0, 60.0, 70.0, 70.0],
            [0, 4.3, 5.1, 8.9, 5.1],
        ],
        dtype=dtype,
    )


def slow_roi_align(x, rois, size, scale, ratio, aligned, reduce):
    out = torch.zeros(len(rois), x.size(1), *size, dtype=x.dtype)
    shift = 0.5 if aligned else 0.0
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * scale - shift for value in box)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        down = ratio or math.ceil(h / size[0])
        across = ratio or math.ceil(w / size[1])
        for c, i, j in itertools.product(
            range(x.size(1)), range(size[0]), range(size[1])
        ):
            samples = [
                border_bilinear(
                    x[int(image), c],
                    y1 + (i + (a + 0.5) / down) * h / size[0],
                    x1 + (j + (b + 0.5) / across) * w / size[1],
                )
                for a in range(down)
                for b in range(across)
            ]
            out[r, c, i, j] = reduce(samples) if samples else 0.0
    return out


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize(('mode', 'reduce'), [('avg', mean), ('max', max)])
def test_roi_align_by_the_slow_version(device, mode, reduce, ratio, aligned):
    x = torch.randn(2, 2, 10, 12)
    layer = mmcv_ops.RoIAlign((2, 3), 0.5, ratio, mode, aligned)
    result = layer(x.to(device), regions().to(device))
    expected = slow_roi_align(
        x, regions(), (2, 3), 0.5, ratio, aligned, reduce
    )
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_has_the_right_gradient(device, mode, ratio, aligned):
    x = torch.randn(2, 2, 6, 7, dtype=torch.double, device=device)
    rois = regions(torch.double).to(device)
    gradcheck(
        lambda x: mmcv_ops.roi_align(
            x, rois, (2, 2), 0.3, ratio, mode, aligned
        ),
        x.requires_grad_(),
        fast_mode=mode == 'avg',
    )


def test_roi_align_of_no_regions_is_empty(device):
    x = torch.randn(1, 2, 6, 6, device=device, requires_grad=True)
    rois = torch.empty(0, 5, device=device)
    for mode in ('avg', 'max'):
        out = mmcv_ops.roi_align(x, rois, 3, 1.0, 2, mode, True)
        assert out.shape == (0, 2, 3, 3)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert not grad.any()


def slow_roi_pool(x, rois, size, scale):
    out = torch.zeros(len(rois), x.size(1), *size, dtype=x.dtype)
    height, width = x.shape[-2:]
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = box[0], box[1], box[2] + 1, box[3] + 1
        x1, y1, x2, y2 = (value * scale for value in (x1, y1, x2, y2))
        if x2 <= x1 or y2 <= y1:
            continue
        h, w = (y2 - y1) / size[0], (x2 - x1) / size[1]
        for i, j in itertools.product(range(size[0]), range(size[1])):
            rows = range(
                max(math.floor(y1 + i * h), 0),
                min(math.ceil(y1 + (i + 1) * h), height),
            )
            columns = range(
                max(math.floor(x1 + j * w), 0),
                min(math.ceil(x1 + (j + 1) * w), width),
            )
            if len(rows) and len(columns):
                part = x[int(image)][:, list(rows)][:, :, list(columns)]
                out[r, :, i, j] = part.amax((1, 2))
    return out


def test_roi_pool_by_the_slow_version(device, monkeypatch):
    x = torch.randn(2, 3, 10, 12)
    rois = torch.cat((regions(), torch.tensor([[0, 9.0, 3.0, 8.0, 8.0]])))
    layer = mmcv_ops.RoIPool((2, 3), 0.5)
    result = layer(x.to(device), rois.to(device))
    expected = slow_roi_pool(x, rois, (2, 3), 0.5)
    torch.testing.assert_close(result.cpu(), expected)
    assert result.any((1, 2, 3)).tolist() == [True] * 3 + [False, True, False]
    # In chunks of one region the result is the same.
    monkeypatch.setattr(ext.common, 'BUDGET', 1)
    assert torch.equal(layer(x.to(device), rois.to(device)), result)


def test_roi_pool_has_the_right_gradient(device):
    x = torch.randn(2, 2, 6, 7, dtype=torch.double, device=device)
    rois = regions(torch.double).to(device)
    gradcheck(
        lambda x: mmcv_ops.roi_pool(x, rois, (2, 2), 0.3), x.requires_grad_()
    )


def test_roi_pool_of_no_regions_is_empty(device):
    x = torch.randn(1, 2, 6, 6, device=device, requires_grad=True)
    out = mmcv_ops.roi_pool(x, torch.empty(0, 5, device=device), 3, 1.0)
    assert out.shape == (0, 2, 3, 3)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad.any()


@pytest.mark.parametrize('ratio', [0, 2])
def test_deform_roi_pool_without_offsets_is_roi_align(device, ratio):
    x = torch.randn(2, 3, 10, 12, device=device)
    rois = regions().to(device)
    result = mmcv_ops.DeformRoIPool((2, 3), 0.5, ratio)(x, rois)
    torch.testing.assert_close(
        result,
        torchvision.ops.roi_align(x, rois, (2, 3), 0.5, ratio, aligned=True),
        atol=1e-5,
        rtol=1e-5,
    )


def test_deform_roi_pool_moves_each_bin(device, monkeypatch):
    """A bin that moved is a region of one bin somewhere else."""
    x = torch.randn(2, 3, 10, 12, device=device)
    rois, scale, gamma = regions()[:3], 0.5, 0.1
    offset = torch.randn(3, 2, 2, 2)
    bins = []
    for r, i, j in itertools.product(range(3), range(2), range(2)):
        image, x1, y1, x2, y2 = rois[r].tolist()
        w, h = (x2 - x1) / 2, (y2 - y1) / 2
        left = x1 + j * w + gamma * 2 * w * float(offset[r, 0, i, j])
        top = y1 + i * h + gamma * 2 * h * float(offset[r, 1, i, j])
        bins.append([image, left, top, left + w, top + h])
    expected = torchvision.ops.roi_align(
        x, torch.tensor(bins, device=device), 1, scale, 2, aligned=True
    )
    expected = expected.view(3, 2, 2, 3).permute(0, 3, 1, 2)

    def pool():
        return mmcv_ops.deform_roi_pool(
            x, rois.to(device), offset.to(device), (2, 2), scale, 2, gamma
        )

    torch.testing.assert_close(pool(), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(ext.common, 'BUDGET', 1)
    torch.testing.assert_close(pool(), expected, atol=1e-5, rtol=1e-5)


def test_deform_roi_pool_has_the_right_gradient(device):
    x = torch.randn(2, 2, 6, 7, dtype=torch.double, device=device)
    rois = regions(torch.double)[:3].to(device)
    offset = torch.randn(3, 2, 2, 2, dtype=torch.double, device=device)
    gradcheck(
        lambda x, offset: mmcv_ops.deform_roi_pool(
            x, rois, offset, (2, 2), 0.3, 2, 0.1
        ),
        (x.requires_grad_(), offset.requires_grad_()),
    )


def border_boxes(dtype=torch.float32):
    start = torch.rand(2, 5, 2, dtype=dtype) * 4 - 1
    return torch.cat((start, start + 1 + torch.rand_like(start) * 5), 2)


def test_border_align_by_the_slow_version(device):
    x, boxes, pool = torch.randn(2, 8, 6, 7), border_boxes(), 3
    result = mmcv_ops.BorderAlign(pool)(x.to(device), boxes.to(device))
    expected = torch.zeros(2, 2, 5, 4)
    for n, c, k in itertools.product(range(2), range(2), range(5)):
        x1, y1, x2, y2 = boxes[n, k].tolist()
        walks = [
            lambda t, a=(y1, x1, x2): (a[0], a[1] + t * (a[2] - a[1])),
            lambda t, a=(y1, x1, y2): (a[0] + t * (a[2] - a[0]), a[1]),
            lambda t, a=(y2, x1, x2): (a[0], a[1] + t * (a[2] - a[1])),
            lambda t, a=(y1, x2, y2): (a[0] + t * (a[2] - a[0]), a[1]),
        ]
        for side, walk in enumerate(walks):
            plane = x[n, side * 2 + c]
            expected[n, c, k, side] = max(
                border_bilinear(plane, *walk(i / pool))
                for i in range(pool + 1)
            )
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_border_align_has_the_right_gradient(device):
    x = torch.randn(2, 8, 5, 6, dtype=torch.double, device=device)
    boxes = border_boxes(torch.double).to(device)
    gradcheck(lambda x: mmcv_ops.border_align(x, boxes, 3), x.requires_grad_())


# Convolutions ---------------------------------------------------------------

GEOMETRIES = {
    'plain': dict(),
    'strided': dict(stride=2, padding=1),
    'dilated': dict(padding=2, dilation=2),
    'grouped': dict(padding=1, groups=2),
    'offset groups': dict(padding=1, deform_groups=2),
    'oblong': dict(
        stride=(2, 1), padding=(0, 2), dilation=(1, 2), kernel_size=(3, 2)
    ),
}


def deform_operands(layer, dtype=torch.float32):
    """Input of a layer, with offsets and masks of the right size."""
    x = torch.randn(2, layer.in_channels, 6, 7, dtype=dtype)
    with torch.no_grad():
        layer = layer.to(dtype)
        out = F.conv2d(
            x,
            layer.weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
    taps = layer.deform_groups * math.prod(layer.kernel_size)
    offset = torch.randn(2, 2 * taps, *out.shape[2:], dtype=dtype)
    return x, offset, torch.rand(2, taps, *out.shape[2:], dtype=dtype)


def build(kind, geometry, **kwargs):
    geometry = dict(dict(kernel_size=3), **geometry)
    return kind(4, 4, **geometry, **kwargs)


@pytest.mark.parametrize('geometry', GEOMETRIES.values(), ids=GEOMETRIES)
def test_deform_conv_equals_torchvision(device, geometry):
    layer = build(mmcv_ops.DeformConv2d, geometry).to(device)
    x, offset, _ = (t.to(device) for t in deform_operands(layer.cpu()))
    layer = layer.to(device)
    torch.testing.assert_close(
        layer(x, offset),
        torchvision.ops.deform_conv2d(
            x,
            offset,
            layer.weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
        ),
    )


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('geometry', GEOMETRIES.values(), ids=GEOMETRIES)
def test_modulated_deform_conv_equals_torchvision(device, geometry, bias):
    layer = build(mmcv_ops.ModulatedDeformConv2d, geometry, bias=bias)
    if bias:
        torch.nn.init.normal_(layer.bias)
    operands = deform_operands(layer)
    x, offset, mask = (t.to(device) for t in operands)
    layer = layer.to(device)
    torch.testing.assert_close(
        layer(x, offset, mask),
        torchvision.ops.deform_conv2d(
            x,
            offset,
            layer.weight,
            layer.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            mask,
        ),
    )


def test_deform_conv_by_the_slow_version():
    layer = mmcv_ops.DeformConv2d(
        4, 2, (2, 3), stride=2, padding=1, groups=2, deform_groups=2
    )
    x, offset, _ = deform_operands(layer)
    result = layer(x, offset)
    expected = torch.zeros_like(result)
    for n, o, i, j in itertools.product(*map(range, result.shape)):
        for c, a, b in itertools.product(range(2), range(2), range(3)):
            channel = o * 2 + c  # one output a group of two inputs
            tap = (channel // 2 * 6 + a * 3 + b) * 2
            y = i * 2 - 1 + a + float(offset[n, tap, i, j])
            z = j * 2 - 1 + b + float(offset[n, tap + 1, i, j])
            value = zero_bilinear(x[n, channel], y, z)
            expected[n, o, i, j] += float(layer.weight[o, c, a, b]) * value
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_deform_conv_without_offsets_is_a_convolution(device):
    pack = mmcv_ops.DeformConv2dPack(4, 6, 3, stride=2, padding=1).to(device)
    x = torch.randn(2, 4, 9, 8, device=device)
    torch.testing.assert_close(
        pack(x), F.conv2d(x, pack.weight, None, 2, 1), atol=1e-5, rtol=1e-5
    )


def test_fresh_modulated_deform_conv_is_half_a_convolution(device):
    # Offsets are 0 and masks sigmoid(0) = 1/2.
    pack = mmcv_ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1).to(device)
    torch.nn.init.normal_(pack.bias)
    x = torch.randn(2, 4, 9, 8, device=device)
    torch.testing.assert_close(
        pack(x),
        F.conv2d(x, pack.weight / 2, pack.bias, 1, 1),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize('geometry', GEOMETRIES.values(), ids=GEOMETRIES)
def test_deform_conv_has_the_right_gradient(device, geometry):
    layer = build(mmcv_ops.DeformConv2d, geometry)
    x, offset, _ = deform_operands(layer, torch.double)
    tensors = (x, offset, layer.weight.detach())
    gradcheck(
        lambda x, offset, weight: mmcv_ops.deform_conv2d(
            x,
            offset,
            weight,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.deform_groups,
        ),
        [t.to(device).requires_grad_() for t in tensors],
        fast_mode=True,
    )


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('geometry', GEOMETRIES.values(), ids=GEOMETRIES)
def test_modulated_deform_conv_has_the_right_gradient(device, geometry, bias):
    layer = build(mmcv_ops.ModulatedDeformConv2d, geometry, bias=bias)
    tensors = [*deform_operands(layer, torch.double), layer.weight.detach()]
    if bias:
        tensors.append(layer.bias.detach())
    gradcheck(
        lambda x, offset, mask, weight, bias=None: (
            mmcv_ops.modulated_deform_conv2d(
                x,
                offset,
                mask,
                weight,
                bias,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
                layer.deform_groups,
            )
        ),
        [t.to(device).requires_grad_() for t in tensors],
        fast_mode=True,
    )


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_an_offset_that_is_no_number_points_to_nothing(device, value):
    """As after an overflow; read as a place, it ends the whole process."""
    x, weight = torch.rand(1, 1, 3, 3), torch.rand(1, 1, 1, 1)
    offset = torch.zeros(1, 2, 3, 3)
    offset[0, 0, 1, 2] = value
    found = mmcv_ops.deform_conv2d(
        x.to(device), offset.to(device), weight.to(device)
    ).cpu()
    expected = weight[0, 0, 0, 0] * x
    expected[0, 0, 1, 2] = 0
    torch.testing.assert_close(found, expected)


def larger_operands(device, dtype=torch.float):
    """Of a map of 4 x 3, moved by offsets of one of 8 x 6, as in DyHead."""
    torch.manual_seed(5)
    return [
        one.to(device, dtype)
        for one in (
            torch.randn(2, 2, 4, 3),
            torch.randn(2, 18, 8, 6),
            torch.rand(2, 9, 8, 6),
            torch.randn(3, 2, 3, 3),
        )
    ]


def test_larger_offsets_are_read_from_their_beginning(device):
    """mmcv's kernels step through them as if they were of the output's size:
    number 12 k + 3 i + j of an image belongs to channel k, row i, column j."""
    x, offset, mask, weight = larger_operands(device)
    found = mmcv_ops.modulated_deform_conv2d(
        x, offset, mask, weight, None, 1, 1, 1, 1, 1
    )
    expected = torch.zeros_like(found)
    for n, o, i, j in itertools.product(*map(range, found.shape)):
        moves, factors = offset[n].flatten(), mask[n].flatten()
        for c, a, b in itertools.product(range(2), range(3), range(3)):
            tap, cell = 3 * a + b, 3 * i + j
            y = i - 1 + a + float(moves[12 * 2 * tap + cell])
            z = j - 1 + b + float(moves[12 * (2 * tap + 1) + cell])
            value = zero_bilinear(x[n, c], y, z) * factors[12 * tap + cell]
            expected[n, o, i, j] += weight[o, c, a, b] * value
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_larger_offsets_have_the_right_gradient(device):
    """Of what is not read it is 0."""
    tensors = larger_operands(device, torch.double)
    tensors = [one.requires_grad_() for one in tensors]

    def run(*operands):
        return mmcv_ops.modulated_deform_conv2d(*operands, None, 1, 1, 1, 1, 1)

    gradcheck(run, tensors, fast_mode=True)
    run(*tensors).sum().backward()
    for one, channels in zip(tensors[1:3], (18, 9)):
        gradient = one.grad.flatten(1)
        assert gradient[:, : channels * 12].abs().sum() > 0
        assert gradient[:, channels * 12 :].abs().max() == 0


def test_deform_conv_derives_once_for_input_and_weight(monkeypatch):
    calls = []
    derive = ext.convolution._derive

    def counting(*args):
        calls.append(1)
        return derive(*args)

    monkeypatch.setattr(ext.convolution, '_derive', counting)
    layer = mmcv_ops.DeformConv2d(2, 2, 3)
    x, offset, _ = deform_operands(layer)
    layer(x.requires_grad_(), offset).sum().backward()
    assert len(calls) == 1
    assert x.grad.any()
    assert layer.weight.grad.any()


@pytest.mark.parametrize('change', ['gradient', 'input', 'geometry'])
def test_deform_conv_never_takes_the_derivative_of_something_else(change):
    """What was derived with the input serves for the same operands only."""
    layer = mmcv_ops.DeformConv2d(2, 2, 3)
    x, offset, _ = deform_operands(layer)
    grad = torch.randn(2, 2, *offset.shape[2:])
    names = ('kW', 'kH', 'dW', 'dH', 'padW', 'padH', 'dilationW', 'dilationH')
    settings = dict(zip(names, (3, 3, 1, 1, 0, 0, 1, 1)))
    settings |= dict(group=1, deformable_group=1, im2col_step=2)
    none = torch.empty(0)

    def by_weight(grad):
        out = torch.zeros_like(layer.weight)
        ext.deform_conv_backward_parameters(
            x, offset, grad, out, none, none, scale=1, **settings
        )
        return out

    before = by_weight(grad)
    buffers = torch.zeros_like(x), torch.zeros_like(offset)
    ext.deform_conv_backward_input(
        x, offset, grad, *buffers, layer.weight, none, **settings
    )
    if change == 'geometry':  # of the same output size
        settings |= dict(padW=1, dilationW=2)
    else:
        (grad if change == 'gradient' else x).mul_(3)
    after = by_weight(grad)
    torch.testing.assert_close(after, by_weight(grad.clone()))
    assert not torch.allclose(after, before)


def test_masked_conv_is_a_convolution_where_the_mask_is_set(device):
    conv = mmcv_ops.MaskedConv2d(3, 4, (3, 5), padding=(1, 2)).to(device)
    x = torch.randn(1, 3, 6, 7, device=device)
    mask = (torch.rand(1, 6, 7, device=device) > 0.5).float()
    torch.testing.assert_close(
        conv(x, mask), conv(x) * mask, atol=1e-5, rtol=1e-5
    )
    assert not conv(x, torch.zeros_like(mask)).any()


# Losses ---------------------------------------------------------------------


def focal_case(device, dtype=torch.float32):
    logits = torch.randn(8, 3, dtype=dtype, device=device) * 3
    target = torch.tensor([0, 1, 2, 3, 3, 0, 2, 1], device=device)
    return logits, target


@pytest.mark.parametrize('gamma', [0.0, 1.5, 2.0])
def test_sigmoid_focal_loss_equals_torchvision(device, gamma):
    logits, target = focal_case(device)
    one_hot = F.one_hot(target, 4)[:, :3].float()  # class 3 is background
    result = mmcv_ops.sigmoid_focal_loss(
        logits, target, gamma, 0.3, None, 'none'
    )
    torch.testing.assert_close(
        result,
        torchvision.ops.sigmoid_focal_loss(logits, one_hot, 0.3, gamma),
    )


def test_sigmoid_focal_loss_weighs_rows_by_their_class(device):
    logits, target = focal_case(device)
    weight = torch.tensor([0.5, 2.0, 3.0], device=device)
    plain, weighted = (
        mmcv_ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, w, 'none')
        for w in (None, weight)
    )
    factor = torch.tensor([0.5, 2, 3, 1, 1, 0.5, 3, 2], device=device)
    torch.testing.assert_close(weighted, plain * factor[:, None])


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_focal_losses_have_the_right_gradient(
    device, gamma, reduction, weighted
):
    logits, target = focal_case(device, torch.double)
    weight = torch.rand(3, dtype=torch.double, device=device)
    weight = weight if weighted else None
    for loss, classes in (
        (mmcv_ops.sigmoid_focal_loss, target),
        (mmcv_ops.softmax_focal_loss, target % 3),
    ):
        gradcheck(
            lambda x, loss=loss, classes=classes: loss(
                x, classes, gamma, 0.25, weight, reduction
            ),
            logits.clone().requires_grad_(),
        )


@pytest.mark.parametrize('gamma', [0.0, 2.0])
def test_softmax_focal_loss_by_its_formula(device, gamma):
    logits, target = focal_case(device)
    target = target % 3
    weight = torch.tensor([0.5, 2.0, 3.0], device=device)
    result = mmcv_ops.softmax_focal_loss(
        logits, target, gamma, 0.25, weight, 'none'
    )
    for row, c in enumerate(target.tolist()):
        p = logits[row].double().softmax(0)[c].item()
        expected = -0.25 * (1 - p) ** gamma * math.log(p) * weight[c].item()
        assert result[row].item() == pytest.approx(expected, rel=1e-4)


def test_softmax_focal_loss_ignores_negative_classes(device):
    probs = torch.rand(2, 3, device=device).softmax(1)
    target = torch.tensor([-1, 1], device=device)
    weight = torch.ones(3, device=device)
    out, buff = torch.ones(2, 2, device=device)
    grad = torch.ones_like(probs)
    ext.softmax_focal_loss_forward(
        probs, target, weight, out, gamma=2.0, alpha=0.5
    )
    ext.softmax_focal_loss_backward(
        probs, target, weight, buff, grad, gamma=2.0, alpha=0.5
    )
    assert out[0] == 0
    assert not grad[0].any()
    assert out[1] > 0
    assert grad[1, 1] < 0


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_focal_losses_stay_finite_for_extreme_logits(device, gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], device=device)
    target = torch.zeros(2, dtype=torch.long, device=device)
    for loss in (mmcv_ops.sigmoid_focal_loss, mmcv_ops.softmax_focal_loss):
        x = logits.clone().requires_grad_()
        value = loss(x, target, gamma, 0.25, None, 'sum')
        (grad,) = torch.autograd.grad(value, x)
        assert value > 10
        assert grad.isfinite().all()


# Attention and upsampling ---------------------------------------------------


def attention_case(device, dtype=torch.float32):
    shapes = torch.tensor([[3, 4], [2, 2]], device=device)
    starts = torch.tensor([0, 12], device=device)
    value = torch.randn(2, 16, 2, 3, dtype=dtype, device=device)
    places = torch.rand(2, 5, 2, 2, 3, 2, dtype=dtype, device=device)
    places = places * 1.2 - 0.1  # some fall outside
    weights = torch.rand(2, 5, 2, 2, 3, dtype=dtype, device=device)
    return shapes, starts, value, places, weights


def attend(shapes, starts, value, places, weights):
    """The path that mmcv takes on CUDA."""
    function = mmcv_ops.multi_scale_deform_attn
    return function.MultiScaleDeformableAttnFunction.apply(
        value, shapes, starts, places, weights, 64
    )


def test_deformable_attention_by_the_slow_version(device):
    shapes, starts, value, places, weights = attention_case(device)
    result = attend(shapes, starts, value, places, weights).cpu()
    expected = torch.zeros_like(result)
    value, places, weights = value.cpu(), places.cpu(), weights.cpu()
    for n, q, m, lvl, p, c in itertools.product(
        range(2), range(5), range(2), range(2), range(3), range(3)
    ):
        h, w = shapes[lvl].tolist()
        plane = value[n, starts[lvl] : starts[lvl] + h * w, m, c].view(h, w)
        x, y = places[n, q, m, lvl, p].tolist()
        sample = zero_bilinear(plane, y * h - 0.5, x * w - 0.5)
        weight = float(weights[n, q, m, lvl, p])
        expected[n, q, m * 3 + c] += weight * sample
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_deformable_attention_has_the_right_gradient(device):
    shapes, starts, *tensors = attention_case(device, torch.double)
    gradcheck(
        lambda *tensors: attend(shapes, starts, *tensors),
        [t.requires_grad_() for t in tensors],
        fast_mode=True,
    )


def test_deformable_attention_module_agrees_with_its_cuda_path(monkeypatch):
    module = mmcv_ops.MultiScaleDeformableAttention(
        embed_dims=8, num_heads=2, num_levels=2, num_points=3
    ).eval()
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    inputs = dict(
        query=torch.randn(5, 2, 8),
        value=torch.randn(16, 2, 8),
        reference_points=torch.rand(2, 5, 2, 2),
        spatial_shapes=torch.tensor([[3, 4], [2, 2]]),
        level_start_index=torch.tensor([0, 12]),
    )
    expected = module(**inputs)
    source = mmcv_ops.multi_scale_deform_attn
    plain = source.multi_scale_deformable_attn_pytorch

    def on_cuda(value, shapes, places, weights):
        if isinstance(shapes, list):  # our own operator asks
            return plain(value, shapes, places, weights)
        starts = inputs['level_start_index']
        return attend(shapes, starts, value, places, weights)

    monkeypatch.setattr(source, 'multi_scale_deformable_attn_pytorch', on_cuda)
    torch.testing.assert_close(module(**inputs), expected)


def carafe_case(device, dtype=torch.float32):
    x = torch.randn(2, 4, 3, 5, dtype=dtype, device=device)
    masks = torch.rand(2, 2 * 9, 6, 10, dtype=dtype, device=device)
    return x, masks


@pytest.mark.parametrize('name', ['carafe', 'carafe_naive'])
def test_carafe_by_the_slow_version(device, name):
    x, masks = carafe_case(device)
    result = getattr(mmcv_ops, name)(x, masks, 3, 2, 2).cpu()
    x, masks = x.cpu(), masks.cpu()
    expected = torch.zeros(2, 4, 6, 10)
    for n, c, i, j in itertools.product(*map(range, expected.shape)):
        for a, b in itertools.product(range(3), range(3)):
            y, z = i // 2 + a - 1, j // 2 + b - 1
            if 0 <= y < 3 and 0 <= z < 5:
                weight = masks[n, c // 2 * 9 + a * 3 + b, i, j]
                expected[n, c, i, j] += weight * x[n, c, y, z]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_carafe_has_the_right_gradient(device):
    x, masks = carafe_case(device, torch.double)
    gradcheck(
        lambda x, masks: mmcv_ops.CARAFE(3, 2, 2)(x, masks),
        (x.requires_grad_(), masks.requires_grad_()),
        fast_mode=True,
    )


def test_naive_carafe_has_the_gradient_of_carafe(device):
    x, masks = carafe_case(device)
    grad = torch.randn(2, 4, 6, 10, device=device)
    by_x, by_masks = torch.zeros_like(x), torch.zeros_like(masks)
    ext.carafe_naive_backward(
        grad,
        x,
        masks,
        by_x,
        by_masks,
        kernel_size=3,
        group_size=2,
        scale_factor=2,
    )
    x.requires_grad_(), masks.requires_grad_()
    expected = torch.autograd.grad(
        mmcv_ops.carafe(x, masks, 3, 2, 2), (x, masks), grad
    )
    torch.testing.assert_close((by_x, by_masks), expected)


def test_carafe_upsampler_keeps_a_constant_inside():
    pack = mmcv_ops.CARAFEPack(4, 2, up_kernel=3, compressed_channels=4)
    out = pack(torch.ones(1, 4, 6, 6))
    # The weights of a pixel sum to one; only windows on the border lose some.
    torch.testing.assert_close(
        out[:, :, 2:-2, 2:-2], torch.ones(1, 4, 8, 8), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ('mode', 'expected'),
    [
        ('left', [[4, 4, 2, 2], [3, 3, 3, 1]]),
        ('right', [[1, 4, 4, 4], [0, 0, 3, 3]]),
        ('top', [[1, 4, 3, 2], [0, 0, 3, 1]]),
        ('bottom', [[1, 4, 0, 2], [1, 4, 3, 2]]),
    ],
)
def test_corner_pool_needs_no_operator(mode, expected):
    x = torch.tensor([[[[1.0, 4, 0, 2], [0, 0, 3, 1]]]])
    out = mmcv_ops.CornerPool(mode)(x)
    assert out[0, 0].tolist() == expected


# Synchronised batch normalisation -------------------------------------------


def sync_bn(parts, weight, bias, running_mean, running_var):
    """As mmcv does it, over several processes: maps (N, C, L) of each."""
    channels = parts[0].size(1)
    mean, var = torch.zeros(2, channels).to(parts[0])
    for part in parts:
        own = torch.zeros_like(mean)
        ext.sync_bn_forward_mean(part, own)
        mean += own / len(parts)
    for part in parts:
        own = torch.zeros_like(var)
        ext.sync_bn_forward_var(part, mean, own)
        var += own / len(parts)
    results = []
    for part in parts:
        norm, out, std = (torch.zeros_like(t) for t in (part, part, mean))
        ext.sync_bn_forward_output(
            part,
            mean,
            var,
            weight,
            bias,
            running_mean.clone() if part is not parts[0] else running_mean,
            running_var.clone() if part is not parts[0] else running_var,
            norm,
            std,
            out,
            eps=1e-5,
            momentum=torch.tensor(0.1),
            group_size=len(parts),
        )
        results.append((out, norm, std))
    return results


def test_sync_bn_over_two_processes_is_batch_norm_of_both(device):
    x = torch.randn(6, 3, 4, device=device) * 2 + 1
    weight, bias = torch.rand(2, 3, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    expected_mean, expected_var = mean.clone(), var.clone()
    x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    expected = F.batch_norm(
        x, expected_mean, expected_var, weight, bias, True, 0.1
    )
    results = sync_bn(x.detach().chunk(2), weight, bias, mean, var)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)

    grad = torch.randn_like(x)
    by_x, by_weight, by_bias = torch.autograd.grad(
        expected, (x, weight, bias), grad
    )
    pairs = list(zip(grad.chunk(2), results))
    sums = torch.zeros(2, 3, device=device)
    for part, (_, norm, _) in pairs:
        own = torch.zeros_like(sums)
        ext.sync_bn_backward_param(part, norm, *own)
        sums += own
    torch.testing.assert_close(sums, torch.stack((by_weight, by_bias)))
    for (part, (_, norm, std)), by_part in zip(pairs, by_x.chunk(2)):
        out = torch.zeros_like(part)
        mean_weight, mean_bias = sums / 2  # mmcv averages over processes
        ext.sync_bn_backward_data(
            part, weight, mean_weight, mean_bias, norm, std, out
        )
        torch.testing.assert_close(out, by_part, atol=1e-5, rtol=1e-4)


def test_sync_bn_module_runs_without_scale_and_statistics(tmp_path):
    torch.distributed.init_process_group(
        'gloo', f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        layer = mmcv_ops.SyncBatchNorm(
            3, affine=False, track_running_stats=False
        )
        x = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(
            layer(x), F.batch_norm(x, None, None, training=True)
        )
    finally:
        torch.distributed.destroy_process_group()


# All of them ----------------------------------------------------------------


def test_every_name_that_mmcv_loads_is_there():
    assert 'nms_rotated' not in ext.__all__
    assert all(callable(getattr(ext, name)) for name in ext.__all__)


def test_an_operator_that_is_missing_says_how_to_get_it():
    boxes = torch.rand(2, 5)
    with pytest.raises(NotImplementedError, match='box_iou_rotated') as info:
        mmcv_ops.box_iou_rotated(boxes, boxes)
    assert 'MMCV_WITH_OPS=1 pip install' in str(info.value)


def test_private_names_are_missing():
    assert not hasattr(ext, '__wrapped__')


def test_the_environment_report_says_what_runs():
    assert 'torchvision' in mmcv_ops.get_compiler_version()
    assert mmcv_ops.get_compiling_cuda_version() == 'not available'


def half_cases():
    conv = mmcv_ops.ModulatedDeformConv2d(4, 4, 3)
    x, offset, mask = deform_operands(conv)
    rois = regions().round()
    shapes, starts, *tensors = attention_case('cpu')
    logits, target = focal_case('cpu')
    return {
        'roi_align': (
            lambda x, rois: mmcv_ops.roi_align(x, rois, 2, 0.5, 2),
            (x, rois),
        ),
        'roi_align max': (
            lambda x, rois: mmcv_ops.roi_align(x, rois, 2, 0.5, 2, 'max'),
            (x, rois),
        ),
        'roi_pool': (
            lambda x, rois: mmcv_ops.roi_pool(x, rois, 2, 0.5),
            (x, rois),
        ),
        'modulated': (
            mmcv_ops.modulated_deform_conv2d,
            (x, offset, mask, conv.weight.detach()),
        ),
        'deform': (
            mmcv_ops.deform_conv2d,
            (x, offset, conv.weight.detach()),
        ),
        'attention': (
            lambda *tensors: attend(shapes, starts, *tensors),
            tensors,
        ),
        'carafe': (
            lambda x, masks: mmcv_ops.carafe(x, masks, 3, 2, 2),
            carafe_case('cpu'),
        ),
        'sigmoid focal': (
            lambda x: mmcv_ops.sigmoid_focal_loss(x, target),
            (logits,),
        ),
    }


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', list(half_cases()))
def test_half_precision_rounds_only_the_result(device, name, dtype):
    function, tensors = half_cases()[name]
    low = [t.to(device, dtype).requires_grad_() for t in tensors]
    high = [t.detach().float().requires_grad_() for t in low]
    results = [function(*low), function(*high)]
    assert results[0].dtype == dtype
    grads = [
        torch.autograd.grad(out.float().sum(), inputs[0])[0]
        for out, inputs in zip(results, (low, high))
    ]
    tolerance = dict(atol=0.02, rtol=0.02)
    torch.testing.assert_close(results[0].float(), results[1], **tolerance)
    torch.testing.assert_close(grads[0].float(), grads[1], **tolerance)


@pytest.mark.parametrize('name', list(half_cases()))
def test_autocast_does_not_round_inside(device, name):
    function, tensors = half_cases()[name]
    tensors = [t.to(device) for t in tensors]
    expected = function(*tensors)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(function(*tensors), expected)

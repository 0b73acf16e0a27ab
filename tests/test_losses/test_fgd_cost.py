"""What FGD costs, against the method written out box by box.

40 boxes an image, the five maps of a 320-pixel batch of two.
"""

import math
import statistics
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd.analysis.cost import bytes_kept
from mmkd.losses.fgd import FGDLoss
from mmkd.ops.attention import channel_attention, spatial_attention
from mmkd.structures import GroundTruth

SIDE, CHANNELS, IMAGES, BOXES = 320, 256, 2, 40
SIZES = (40, 20, 10, 5, 3)


def boxes_of(count):
    torch.manual_seed(count)
    corners = [200 * torch.rand(count, 2) for _ in range(IMAGES)]
    return [
        torch.cat([one, one + 8 + 100 * torch.rand(count, 2)], 1)
        for one in corners
    ]


def ground_truth(count):
    return GroundTruth.from_boxes(boxes_of(count), shape=(SIDE, SIDE))


def maps():
    torch.manual_seed(0)
    return [
        torch.randn(IMAGES, CHANNELS, size, size, requires_grad=True)
        for size in SIZES
    ], [torch.randn(IMAGES, CHANNELS, size, size) for size in SIZES]


@pytest.fixture(scope='module')
def loss():
    torch.manual_seed(1)
    one = FGDLoss(CHANNELS)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return one


def ours(loss, student, teacher, count):
    gt = ground_truth(count)
    return sum(
        sum(loss(one, other, gt).values())
        for one, other in zip(student, teacher)
    )


def literal(loss, student, teacher, count):
    """Masks box by box; copies of both maps under the root of each weight."""
    return sum(
        _level(loss, one, other, boxes_of(count))
        for one, other in zip(student, teacher)
    )


def _masks(boxes, size):
    foreground = torch.zeros(IMAGES, 1, size, size)
    background = torch.ones(IMAGES, 1, size, size)
    for image, each in enumerate(boxes):
        for box in each:
            x1, y1, x2, y2 = (box * size / SIDE).tolist()
            columns = slice(math.floor(x1), math.ceil(x2) + 1)
            rows = slice(math.floor(y1), math.ceil(y2) + 1)
            height, width = (
                rows.stop - rows.start,
                columns.stop - columns.start,
            )
            cells = foreground[image, 0, rows, columns]
            cells.copy_(cells.clamp(min=1 / (height * width)))
            background[image, 0, rows, columns] = 0
        background[image] /= background[image].sum().clamp(min=1)
    return foreground, background


def _level(loss, student, teacher, boxes):
    masks = _masks(boxes, student.shape[-1])
    focal, total = loss.focal, 0.0
    cells, channels = (
        function(teacher, focal.temperature)
        for function in (spatial_attention, channel_attention)
    )
    weights = focal.foreground_weight, focal.background_weight
    for mask, weight in zip(masks, weights):
        seen = [
            one * cells.sqrt() * channels.sqrt() * mask.sqrt()
            for one in (student, teacher)
        ]
        error = torch.nn.functional.mse_loss(*seen, reduction='sum')
        total = total + weight * error / IMAGES
    for function in (spatial_attention, channel_attention):
        apart = [
            function(one, focal.temperature) for one in (student, teacher)
        ]
        error = torch.nn.functional.l1_loss(*apart, reduction='sum')
        total = total + focal.attention_weight * error / IMAGES
    return total + loss.relation(student, teacher)


def saved(function, loss):
    """Bytes kept for the backward pass beside maps and weights."""
    student, teacher = maps()
    own = (*student, *teacher, *loss.parameters())
    return bytes_kept(lambda: function(loss, student, teacher, BOXES), own)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def calls(function, loss, count):
    student, teacher = maps()
    with _Count() as counter:
        function(loss, student, teacher, count).backward()
    return counter.calls


def test_both_are_the_same_method(loss):
    found = []
    for function in (ours, literal):
        student, teacher = maps()
        value = function(loss, student, teacher, BOXES)
        found.append((value, torch.autograd.grad(value, student)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_half_the_memory_is_kept_for_the_backward_pass(loss):
    assert saved(ours, loss) <= 0.5 * saved(literal, loss)


def test_as_many_operations_whatever_the_number_of_boxes(loss):
    assert calls(ours, loss, 3) == calls(ours, loss, 400)
    assert calls(literal, loss, 3) < calls(literal, loss, 40)


def seconds(function, loss, count):
    student, teacher = maps()
    begin = time.process_time()
    function(loss, student, teacher, count).backward()
    return time.process_time() - begin


@pytest.mark.slow
def test_three_quarters_of_the_time_and_nearly_flat_in_boxes(loss):
    """Medians of turns; the process's own time, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ways = ((ours, BOXES), (literal, BOXES), (ours, 5), (ours, 200))
        taken = {way: [] for way in ways}
        for turn in range(31):
            for way in ways if turn % 2 else reversed(ways):
                taken[way].append(seconds(way[0], loss, way[1]))
    finally:
        torch.set_num_threads(threads)
    median = {way: statistics.median(taken[way]) for way in ways}
    shares = [median[way] / median[ways[1]] for way in ways]
    print(f'of the literal method: {shares}')
    assert median[ours, BOXES] <= 0.75 * median[literal, BOXES]
    assert median[ours, 200] <= 1.25 * median[ours, 5]

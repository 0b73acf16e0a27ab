"""What every loss promises, whoever wrote it.

Each class of ``mmkd.losses`` in the registry is visited. Its attribute
``example`` holds the constructor's arguments for maps of 8 channels, 16x16
cells, stride 8.
"""

import copy
import inspect
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkd.registry import MODELS
from mmkd.structures import GroundTruth
from mmkd.structures.constants import constant
from mmkd.terms.feature import FeatureTerm

IMAGES, CHANNELS, CELLS, STRIDE = 2, 8, 16, 8
SIDE = CELLS * STRIDE

MODELS.import_from_location()
LOSSES = {
    name: loss
    for name, loss in MODELS.module_dict.items()
    if loss.__module__.startswith('mmkd.losses.')
}


@pytest.fixture(params=sorted(LOSSES))
def kind(request):
    return LOSSES[request.param]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def build(kind, **settings):
    return kind(**{**getattr(kind, 'example', {}), **settings})


def scope(kind):
    return getattr(kind, 'scope', 'level')


def maps(kind, scale=1.0, **settings):
    """Random maps as the loss takes them: one, or a pyramid of two."""
    levels = [
        (scale * torch.randn(IMAGES, CHANNELS, cells, cells)).to(**settings)
        for cells in (CELLS, CELLS // 2)
    ]
    return levels[0] if scope(kind) == 'level' else tuple(levels)


def each(value):
    return value if isinstance(value, tuple) else (value,)


def apply(value, function):
    changed = tuple(function(one) for one in each(value))
    return changed if isinstance(value, tuple) else changed[0]


def learning(value):
    return apply(value, lambda one: one.detach().requires_grad_())


def ground_truth(boxes=(3, 2), device=None):
    """Random boxes; the second image is narrower than the batch."""
    corners = [16 + 48 * torch.rand(count, 2) for count in boxes]
    extents = [8 + 24 * torch.rand(count, 2) for count in boxes]
    both = [
        torch.cat([corner, corner + extent], 1).to(device)
        for corner, extent in zip(corners, extents)
    ]
    ignored = torch.tensor([[100.0, 100, 120, 110]], device=device)
    return GroundTruth.from_boxes(
        both,
        shape=(SIDE, SIDE),
        image_shapes=[(SIDE, SIDE), (SIDE, 96)],
        ignored=[ignored, ignored[:0]],
    )


def parts_of(value):
    """Named parts that are summed; those to watch are left out."""
    if not isinstance(value, dict):
        return {'': value}
    return {
        name: part
        for name, part in value.items()
        if not name.startswith('watch_')
    }


def total(value):
    return sum(parts_of(value).values())


def run(loss, student, teacher, gt, seed=5):
    """The loss with the random numbers it draws held fixed."""
    torch.manual_seed(seed)
    return loss(student, teacher, gt)


def test_losses_are_found():
    assert {'PKDLoss', 'MGDLoss'} <= set(LOSSES)


def test_a_loss_has_a_scope_that_the_terms_know(kind):
    assert scope(kind) in ('level', 'levels')
    assert 'loss_weight' in inspect.signature(kind).parameters


def test_result_is_a_scalar_in_float32_or_named_ones(kind):
    value = build(kind)(maps(kind), maps(kind), ground_truth())
    assert parts_of(value)
    for part in value.values() if isinstance(value, dict) else [value]:
        assert part.shape == ()
        assert part.dtype == torch.float32


def test_gradient_reaches_the_student_and_every_weight(kind):
    loss, student = build(kind), learning(maps(kind))
    total(loss(student, maps(kind), ground_truth())).backward()
    assert all(one.grad.abs().sum() > 0 for one in each(student))
    assert [
        name for name, one in loss.named_parameters() if one.grad is None
    ] == []


def test_no_gradient_reaches_the_teacher_through_a_term(kind):
    """The term detaches; weights on the teacher's side still learn."""
    student, teacher = learning(maps(kind)), learning(maps(kind))
    term = FeatureTerm(
        'big',
        dict(getattr(kind, 'example', {}), type=f'mmkd.{kind.__name__}'),
        levels=range(len(each(student))),
    )
    total(term(_Step(each(student), each(teacher)))).backward()
    assert all(one.grad is not None for one in each(student))
    assert all(one.grad is None for one in each(teacher))


class _Outputs:
    size = None

    def __init__(self, levels):
        self.levels = levels

    def at(self, path):
        return self.levels


class _Step:
    """As much of a step as a feature term reads."""

    dry = False

    def __init__(self, student, teacher):
        self.student, self._teacher = _Outputs(student), _Outputs(teacher)
        self.images = torch.zeros(IMAGES, 3, SIDE, SIDE)
        self.gt = ground_truth()

    def teacher(self, name):
        return self._teacher


def test_inputs_are_left_as_they_were(kind):
    student, teacher, gt = maps(kind), maps(kind), ground_truth()
    inputs = [*each(student), *each(teacher), gt.boxes, gt.ignored, gt.image]
    before = [one.clone() for one in inputs]
    build(kind)(student, teacher, gt)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert all(one._version == 0 for one in each(student) + each(teacher))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_computed_in_float32(kind, dtype):
    """Values of 300, whose squares float16 cannot hold."""
    student = learning(maps(kind, scale=300, dtype=dtype))
    value = build(kind)(
        student, maps(kind, scale=300, dtype=dtype), ground_truth()
    )
    assert all(
        part.dtype == torch.float32 for part in parts_of(value).values()
    )
    assert all(part.isfinite() for part in parts_of(value).values())
    total(value).backward()
    assert all(one.grad.isfinite().all() for one in each(student))


def test_autocast_changes_neither_type_nor_finiteness(kind):
    student = learning(maps(kind, scale=300))
    with torch.autocast('cpu', torch.bfloat16):
        value = build(kind)(student, maps(kind, scale=300), ground_truth())
    assert all(
        part.dtype == torch.float32 for part in parts_of(value).values()
    )
    assert all(part.isfinite() for part in parts_of(value).values())


@pytest.mark.parametrize('boxes', [(3, 0), (1, 0), (0, 0)])
def test_images_without_boxes_are_defined_for_every_weight(kind, boxes):
    """A weight without a gradient would stop distributed training."""
    loss, student = build(kind), learning(maps(kind))
    value = loss(student, maps(kind), ground_truth(boxes))
    assert all(part.isfinite() for part in parts_of(value).values())
    total(value).backward()
    assert all(one.grad.isfinite().all() for one in each(student))
    assert [
        name
        for name, one in loss.named_parameters()
        if one.grad is None or not one.grad.isfinite().all()
    ] == []


def test_flat_maps_are_finite_with_their_gradient(kind):
    """Student and teacher alike are zero, as dead channels are."""
    loss = build(kind)
    student = learning(apply(maps(kind), torch.zeros_like))
    value = loss(student, apply(student, torch.zeros_like), ground_truth())
    assert all(part.isfinite() for part in parts_of(value).values())
    total(value).backward()
    assert all(one.grad.isfinite().all() for one in each(student))


def test_state_dict_holds_all_that_was_learnt(kind):
    student, teacher, gt = maps(kind), maps(kind), ground_truth()
    one = build(kind)
    with torch.no_grad():
        for weight in one.parameters():
            weight.normal_(std=0.1)
    other = build(kind)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(
        total(run(other.eval(), student, teacher, gt)),
        total(run(one.eval(), student, teacher, gt)),
        rtol=0,
        atol=0,
    )


# What a loss promises unless its docstring says that it does not -------------


def not_kept(kind):
    """Promises under ``Not kept`` of a loss's docstring."""
    text = inspect.cleandoc(kind.__doc__)
    section = re.search(r'^Not kept:\n((?:    .*\n?)+)', text, re.MULTILINE)
    if section is None:
        return set()
    return set(re.findall(r'^    (\w+): \S', section[1], re.MULTILINE))


def keeps(kind, promise, one, other):
    """Whether two values are equal, against what the loss declares."""
    holds = (one - other).abs() <= 1e-5 * (one.abs() + 1)
    if promise in not_kept(kind):
        assert not holds, (
            f'{kind.__name__} keeps {promise!r}: take it out of "Not kept" in '
            f'its docstring.'
        )
    else:
        assert holds, (
            f'{kind.__name__} does not keep {promise!r}, {one:.6g} against '
            f'{other:.6g}. Mend it, or say why under "Not kept" in its '
            f'docstring.'
        )


def alone(gt, index):
    """The ground truth of one image of the batch."""
    own, ignored = gt.image == index, gt.ignored_image == index
    return GroundTruth.from_boxes(
        [gt.boxes[own]],
        shape=gt.shape,
        labels=[gt.labels[own]],
        image_shapes=[gt.image_shapes[index]],
        ignored=[gt.ignored[ignored]],
    )


def test_what_is_not_kept_is_a_promise(kind):
    assert not_kept(kind) <= {'equality', 'batch', 'border'}


def test_equal_maps_cost_nothing(kind):
    student, gt = maps(kind), ground_truth()
    value = total(run(build(kind).eval(), student, student, gt))
    keeps(kind, 'equality', value, torch.tensor(0.0))


def test_a_batch_is_the_mean_of_its_images(kind):
    loss, student, teacher = build(kind).eval(), maps(kind), maps(kind)
    gt = ground_truth()
    singles = [
        run(
            loss,
            apply(student, lambda one: one[index : index + 1]),  # noqa: B023
            apply(teacher, lambda one: one[index : index + 1]),  # noqa: B023
            alone(gt, index),
        )
        for index in range(IMAGES)
    ]
    mean = sum(total(one) for one in singles) / IMAGES
    keeps(kind, 'batch', total(run(loss, student, teacher, gt)), mean)


def test_the_padded_border_does_not_count(kind):
    loss, student, teacher = build(kind).eval(), maps(kind), maps(kind)
    gt = ground_truth()
    before = total(run(loss, student, teacher, gt))

    def changed(one):
        one, width = one.clone(), one.shape[-1] * 96 // SIDE
        one[1, ..., width:] += 3 * torch.randn_like(one[1, ..., width:])
        return one

    student, teacher = apply(student, changed), apply(teacher, changed)
    after = total(run(loss, student, teacher, gt))
    keeps(kind, 'border', after, before)


def test_one_seed_gives_one_value_and_gradient(kind):
    loss, gt = build(kind), ground_truth()
    state = copy.deepcopy(loss.state_dict())
    student, teacher = maps(kind), maps(kind)
    found = []
    for _ in range(2):
        loss.load_state_dict(state)
        one = learning(student)
        value = total(run(loss, one, teacher, gt))
        value.backward()
        found.append([value, *(x.grad for x in each(one))])
    for one, other in zip(*found):
        assert torch.equal(one, other)


def test_what_the_teacher_says_counts(kind):
    loss, student, teacher = build(kind).eval(), maps(kind), maps(kind)
    gt = ground_truth()
    before = total(run(loss, student, teacher, gt))
    teacher = apply(teacher, lambda one: one + torch.randn_like(one))
    after = total(run(loss, student, teacher, gt))
    assert (after - before).abs() > 1e-4 * before.abs()


def test_loss_weight_scales_every_part(kind):
    student, teacher, gt = maps(kind), maps(kind), ground_truth()
    one = build(kind, loss_weight=0.5).eval()
    values = [parts_of(run(one, student, teacher, gt))]
    for weight in (1.5, 0.0):
        other = build(kind, loss_weight=weight).eval()
        other.load_state_dict(one.state_dict())
        values.append(parts_of(run(other, student, teacher, gt)))
    for name, value in values[0].items():
        assert value != 0
        torch.testing.assert_close(values[1][name], 3 * value)
        assert values[2][name] == 0


# Devices ---------------------------------------------------------------------

#: What a value, or a size that depends on one, is asked by.
ASKING = {'aten::_local_scalar_dense', 'aten::nonzero'}
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NobodyWaits(TorchDispatchMode):
    """Refuses copies for which host and device wait for each other.

    Those to the host do, and those to the device unless they say
    ``non_blocking``: also that of a list of numbers. Libraries are let do it.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        before, after = _devices(args), _devices([value])
        if 'cuda' in before and 'cpu' in after:
            raise RuntimeError(f'{func} copies to the host')
        if func in COPIES and 'cpu' in before and 'cuda' in after:
            waits = not kwargs.get('non_blocking', args[2:3] == (True,))
            if waits and not _is_for_a_library():
                raise RuntimeError(f'{func} waits for the device')
        return value


def _is_for_a_library():
    """Whether one of OpenMMLab's functions is nearer than any other."""
    frame = sys._getframe(2)
    while frame:
        places = {*Path(frame.f_code.co_filename).parts}
        if places & {'mmdet', 'mmcv', 'mmengine'}:
            return True
        if 'torch' not in places:
            return False
        frame = frame.f_back
    return False


def _devices(values):
    tensors = [one for one in tree_leaves(values) if torch.is_tensor(one)]
    return {one.device.type for one in tensors}


@contextmanager
def pretended(watched=True):
    """Tensors of a device that need not be there, without values.

    They raise where a value, or a size that depends on one, is asked, and
    where a tensor of the CPU meets one of the device; watched, also where
    anybody waits.
    """
    # At its first backward pass torch starts threads for the devices it
    # finds, the pretended one too, and could not be forked any more.
    torch.ones(1, requires_grad=True).sum().backward()
    watch = NobodyWaits() if watched else nullcontext()
    with FakeTensorMode(), watch, torch.no_grad():
        yield


def _can_pretend():
    try:
        with pretended():
            boxes = torch.rand(4, 4, device='cuda')
            boxes[boxes[:, 0] > 8]
    except RuntimeError as error:
        return 'CUDA' not in str(error)
    return True


pretending = pytest.mark.skipif(
    not _can_pretend(),
    reason=f'torch {torch.__version__} asks for a GPU even where no tensor '
    f'holds a value',
)


def test_no_gradient_is_read_back_from_the_device(kind):
    """On the CPU, where torch asks as well: that of ``prod`` counts zeros."""
    student = apply(maps(kind), torch.Tensor.requires_grad_)
    loss = total(build(kind)(student, maps(kind), ground_truth()))
    assert not asked(loss.backward)


@pytest.mark.parametrize(
    'forward',
    [
        lambda boxes: boxes.prod(1),
        lambda boxes: boxes[boxes[:, 0] > 0],
        lambda boxes: boxes * WithItem.apply(boxes),
    ],
)
def test_a_gradient_that_reads_would_be_noticed(forward):
    boxes = torch.rand(4, 4, requires_grad=True)
    assert asked(forward(boxes).sum().backward)
    assert not asked((boxes[:, 0] * boxes[:, 1]).sum().backward)


class WithItem(torch.autograd.Function):
    """Asks for the mean of a gradient."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.mean().item()


def asked(run):
    """What torch asked a device for while a function ran."""
    with torch.profiler.profile() as seen:
        run()
    return {one.name for one in seen.events()} & ASKING


@pretending
def test_nothing_is_read_back_from_the_device(kind):
    with pretended(watched=False):
        with torch.device('cuda'):
            loss, student, teacher = build(kind), maps(kind), maps(kind)
        gt = ground_truth(device='cuda')
        with NobodyWaits():
            value = loss(student, teacher, gt)
        assert total(value).device.type == 'cuda'


@pretending
@pytest.mark.parametrize(
    'read',
    [
        lambda boxes: boxes.sum().item(),
        lambda boxes: boxes.tolist(),
        lambda boxes: boxes.cpu(),
        lambda boxes: boxes.to('cpu').numpy(),
        lambda boxes: bool((boxes > 0).all()),
        lambda boxes: boxes[boxes[:, 0] > 8],
        lambda boxes: (boxes > 0).nonzero(),
        lambda boxes: boxes.masked_select(boxes > 0),
        lambda boxes: boxes[boxes[0, 0].int() :],
        lambda boxes: torch.equal(boxes, boxes),
        lambda boxes: boxes.unique(),
        lambda boxes: boxes.repeat_interleave(boxes[:, 0].int(), 0),
        lambda boxes: [0 for one in boxes if one[0] > 8],
        lambda boxes: boxes + torch.arange(4),
        lambda boxes: boxes.new_tensor([1.0, 2.0]),
        lambda boxes: boxes.new_tensor(1.0),
        lambda boxes: torch.tensor([1.0], device=boxes.device),
        lambda boxes: torch.as_tensor([1.0], device=boxes.device),
        lambda boxes: torch.arange(4).to(boxes.device),
        lambda boxes: torch.arange(4).to(boxes),
        lambda boxes: boxes[:, [0, 1]],
        lambda boxes: boxes[:, [True, False, True, True]],
        lambda boxes: boxes.copy_(torch.ones(4, 4)),
        lambda boxes: boxes.__setitem__([0, 1], 1.0),
    ],
)
def test_every_way_of_waiting_would_be_noticed(read):
    with pretended():
        boxes = torch.rand(4, 4, device='cuda')
        with pytest.raises(RuntimeError, match=r'aten\.|device'):
            read(boxes)


@pretending
@pytest.mark.parametrize(
    'place',
    [
        lambda boxes: constant([1.0, 2.0], boxes),
        lambda boxes: boxes.new_full((), 1.0),
        lambda boxes: torch.arange(4).to(boxes.device, non_blocking=True),
        lambda boxes: boxes.clone().copy_(torch.ones(4, 4), True),
        lambda boxes: torch.where(boxes > 0, 1.0, 2 * boxes),
    ],
)
def test_what_does_not_wait_is_let_pass(place):
    with pretended():
        boxes = torch.rand(4, 4, device='cuda')
        assert place(boxes).device.type == 'cuda'


class Count(TorchDispatchMode):
    """Counts operators, the backward pass's included."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operators(loss, kind, boxes):
    gt, student, teacher = ground_truth(boxes), maps(kind), maps(kind)
    # What a loss remembers of a map's size is not counted.
    loss(student, teacher, gt)
    with Count() as count:
        total(loss(learning(student), teacher, gt)).backward()
    return count.calls


def test_no_loop_runs_over_boxes(kind):
    """A loop takes an operator a box; chunks of many boxes take fewer."""
    loss = build(kind)
    few, many = operators(loss, kind, (2, 2)), operators(loss, kind, (20, 20))
    assert many - few < (40 - 4) / 2


def test_a_loop_over_boxes_would_be_noticed():
    class Looping(torch.nn.Module):
        def forward(self, student, teacher, gt):
            return sum(student.mean() * box.mean() for box in gt.boxes)

    loss, kind = Looping(), LOSSES['PKDLoss']
    few, many = operators(loss, kind, (2, 2)), operators(loss, kind, (20, 20))
    assert many - few >= 40 - 4

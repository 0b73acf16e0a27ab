"""No term waits for the device, but where MMDetection itself does.

Student and teachers run on the CPU; what they said, and all weights, are then
taken for tensors of a device that need not be there, without values. A term
that asks for one raises.
"""

import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import rotation
import taught_by
import torch
from taught_by import batch, counting, go_to, moment, taught
from test_contracts import asked, pretended, pretending
from test_term_contracts import PATHS
from torch.utils._pytree import tree_leaves

from mmkd.ops import matching
from mmkd.structures.nested import apply

weights = taught_by.weights

#: Functions that ask for a value themselves: the number of tokens, the regions
#: of a level, which anchors or boxes are left, the targets of a loss.
THEIRS = dict(
    multi_scale_deform_attn='forward',
    single_level_roi_extractor='forward',
    anchor_head='_get_targets_single',
    atss_head='_get_targets_single',
    gfl_head='_get_targets_single',
    rpn_head='_bbox_post_process',
    instances='assign',  # runs those of a head
)
#: What torch says where it cannot pretend: to go backward, to count positions.
UNREAL = ('hasPrimaryContext', 'data is not allocated yet')
#: Not to be moved by these means: a model out of sight, regions in samples, a
#: gradient that is asked for, outputs of which only inputs are read.
LEFT_OUT = (
    *('foundation_tiny', 'mask-kd_tiny', 'balanced_tiny', 'makd-detr_tiny'),
)
MARKS = rotation.marks(PATHS, 4, 'device')


def step_of(student):
    """What a training step shows the terms, on the CPU."""
    found, plain = [], student._step

    def kept(*arguments, **named):
        found.append(plain(*arguments, **named))
        return found[-1]

    student._step = kept
    student.loss(*batch(student))
    del student._step
    (step,) = found
    for name in student.teachers:
        step.teacher(name)  # all, also those that no term asks today
    return step


def there(value):
    """The same tensor on the device, without values."""
    return torch.empty(value.shape, dtype=value.dtype, device='cuda')


def move(module):
    for part in module.modules():
        for name, one in part._parameters.items():
            if one is not None:
                part._parameters[name] = torch.nn.Parameter(
                    there(one), one.requires_grad
                )
        for name, one in part._buffers.items():
            if one is not None:
                part._buffers[name] = there(one)
        for name in ('prior_generator', 'anchor_generator', 'generator'):
            anchors = getattr(getattr(part, name, None), 'base_anchors', None)
            if anchors is not None:
                anchors[:] = [there(one) for one in anchors]


def moved(student, step):
    """The step, all of it on the device."""
    move(student)
    for name, teacher in student.teachers.items():
        move(teacher.detector)
        step.teacher(name).convert(there)
    step.student.convert(there)
    for sample in step.samples:
        for _, instances in sample.items():
            for key, one in instances.items():
                if torch.is_tensor(one):
                    instances.set_field(there(one), key, torch.Tensor)
    vars(step).pop('gt', None)
    return replace(
        step,
        images=there(step.images),
        clean=None if step.clean is None else there(step.clean),
        losses=apply(there, dict(step.losses)),
    )


@pytest.fixture
def nobody_waits(monkeypatch):
    """Queries are given to objects without looking at what it costs."""

    def assign(cost):
        rows = cost.new_zeros(cost.shape[0], cost.shape[2], dtype=torch.long)
        return rows, rows > 0

    plain = matching.assign
    for module in [*sys.modules.values()]:
        if vars(module).get('assign') is plain:
            monkeypatch.setattr(module, 'assign', assign)


@pretending
@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem, marks=MARKS[path])
        for path in PATHS
        if path.stem not in LEFT_OUT
    ],
)
def test_no_term_reads_from_the_device(path, weights, hub, nobody_waits):
    student = taught(path, weights)
    go_to(hub, moment(student.phases))
    step = step_of(student)
    with pretended():
        step = moved(student, step)
        for name in counting(student):
            try:
                student.terms[name](step)
            except RuntimeError as error:
                if not _is_theirs(error):
                    raise


@pytest.mark.parametrize(
    'path',
    [pytest.param(path, id=path.stem, marks=MARKS[path]) for path in PATHS],
)
def test_no_gradient_of_a_term_reads_from_the_device(path, weights, hub):
    """On the CPU, where torch asks as well: that of ``prod`` counts zeros."""
    student = taught(path, weights)
    go_to(hub, moment(student.phases))
    step = step_of(student)
    values = [student.terms[name](step) for name in counting(student)]
    loss = sum(tree_leaves(values))
    assert not asked(loss.backward)


def _is_theirs(error):
    """Whether a library asks for a value, or torch cannot pretend."""
    if any(one in str(error) for one in UNREAL):
        return True
    place = [
        (Path(one.filename), one.name)
        for one in traceback.extract_tb(error.__traceback__)
    ]
    file, function = [
        (file.stem, function)
        for file, function in place
        if {'mmkd', 'mmdet', 'mmcv'} & {*file.parts}
        and not {'tests', 'torch'} & {*file.parts}
    ][-1]
    return THEIRS.get(file) == function

"""What every term promises, whoever wrote it.

Each tiny config is visited; together they name every term, loss and weight.
Teachers have random weights here.
"""

import copy
import re
from pathlib import Path

import pytest
import rotation
import taught_by
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from taught_by import batch, counting, go_to, moment, own, shares, taught

from mmkd.configs import read_config
from mmkd.laboratory.catalogue import tiny_configs

ROOT = Path(__file__).parents[1]
BASES = ROOT / 'configs' / '_base_' / 'tiny'
#: Those that have terms.
PATHS = [
    path for path in tiny_configs(ROOT) if 'mmkd.Distiller' in path.read_text()
]

weights = taught_by.weights


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(
            path, id=path.stem, marks=pytest.mark.xdist_group(path.stem)
        )
        for path in PATHS
    ],
)
def built(request, weights):
    return taught(request.param, weights)


@pytest.fixture
def student(built, hub):
    """A copy, in the middle of a training, or of a phase with terms."""
    go_to(hub, moment(built.phases))
    return copy.deepcopy(built)


def test_gradient_reaches_the_backbone_and_every_weight(student):
    found = shares(student, *batch(student))
    assert all(value > 0 for value in found.values())
    student.zero_grad()
    sum(found.values()).backward()
    if student.phases.given:
        last = [one for one in own(student) if one.requires_grad]
    else:
        last = [*[*student.backbone.children()][-1].parameters()]
    assert last
    assert all(one.grad.abs().sum() > 0 for one in last)
    assert [
        name
        for key in counting(student)
        for name, one in student.terms[key].named_parameters(key)
        if one.requires_grad and one.grad is None
    ] == []


def test_no_gradient_reaches_a_teacher(student):
    sum(shares(student, *batch(student)).values()).backward()
    for teacher in student.teachers.values():
        for one in teacher.detector.parameters():
            assert one.grad is None
            assert not one.requires_grad


def test_one_seed_gives_one_value(student):
    other = copy.deepcopy(student)
    found = shares(student, *batch(student))
    assert found == shares(other, *batch(other))


def test_inputs_are_left_as_they_were(student):
    images, samples = batch(student)
    before = copy.deepcopy((images, samples))
    shares(student, images, samples)
    assert torch.equal(images, before[0])
    for one, was in zip(samples, before[1]):
        assert torch.equal(one.gt_instances.bboxes, was.gt_instances.bboxes)
        assert torch.equal(one.gt_instances.labels, was.gt_instances.labels)


def test_images_without_boxes_are_defined(student):
    found = shares(student, *batch(student, boxes=0))
    sum(found.values()).backward()
    for one in [*found.values(), *(p.grad for p in student.parameters())]:
        assert one is None or one.isfinite().all()


def test_autocast_leaves_all_finite(student):
    with torch.autocast('cpu', torch.bfloat16):
        found = shares(student, *batch(student))
    for one in found.values():
        assert one.dtype == torch.float32
        assert one.isfinite()


def test_what_a_teacher_says_counts(student):
    if not student.teachers:
        pytest.skip('it has none')
    before = shares(copy.deepcopy(student), *batch(student))
    with torch.no_grad():
        for teacher in student.teachers.values():
            for one in teacher.detector.parameters():
                one.add_(0.1 * one.abs().mean() * torch.randn_like(one))
    after = shares(student, *batch(student))
    for name in counting(student):
        assert any(
            before[key] != after[key]
            for key in before
            if key.startswith(f'loss_kd_{name}')
        ), f'{name} does not depend on its teacher'


# A teacher that does not fit -------------------------------------------------

#: What a message tells to do.
ADVICE = re.compile(
    r'\b(add|set|use|take|choose|pair|give|name|did you mean|it has)\b', re.I
)


def wide(model):
    if 'decoder' in model:  # whose head is as wide as its queries
        model.backbone.update(base_channels=24, stem_channels=24)
        stages = model.backbone.out_indices
        model.neck.in_channels = [24 * 2**stage for stage in stages]
        return model
    model.neck.out_channels = model.bbox_head.in_channels = 48
    return model


def of_other_classes(model):
    model.bbox_head.num_classes = 4
    return model


def of_another_head(model):
    kind = 'gfl' if model.type == 'RetinaNet' else 'retinanet'
    return read_config(BASES / f'{kind}_teacher.py').model


def of_two_stages(model):
    return read_config(BASES / 'faster_rcnn_teacher.py').model


def of_one_stage(model):
    return read_config(BASES / 'retinanet_teacher.py').model


TAUGHT = [path for path in PATHS if 'teachers=dict()' not in path.read_text()]
CHANGES = {
    change: rotation.marks(TAUGHT, count=3, what=change.__name__)
    for change in (
        *(wide, of_other_classes, of_another_head),
        *(of_two_stages, of_one_stage),
    )
}


def two_stages(path):
    return 'rcnn' in path.read_text()


@pytest.mark.parametrize(
    ('path', 'change'),
    [
        pytest.param(
            path,
            change,
            id=f'{path.stem}-{change.__name__}',
            marks=marks[path],
        )
        for change, marks in CHANGES.items()
        for path in TAUGHT
        if (change is of_one_stage) == two_stages(path)
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_with_advice(
    path, change, tmp_path, monkeypatch
):
    """Either it teaches, or the model is not built, for a reason."""
    monkeypatch.chdir(ROOT)
    init_default_scope('mmdet')
    model = read_config(path).model
    for name, teacher in model.teachers.items():
        other = change(read_config(teacher.config).model)
        file = tmp_path / f'{name}.pth'
        tiny.save_teacher(other, file)
        teacher.config, teacher.checkpoint = dict(model=other), str(file)
    try:
        student = MODELS.build(model)
    except ValueError as error:
        message = str(error)
    else:
        message = ''
    if message:
        assert re.match(r"(Term|Teacher) '\w+'", message), message
        assert ADVICE.search(message), message
        return
    student.init_weights()
    found = shares(student.train(), *batch(student))
    assert all(value.isfinite() for value in found.values())

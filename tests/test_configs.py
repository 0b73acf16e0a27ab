"""Every COCO config: its card, its distance from the student's, two steps."""

from __future__ import annotations

import ast
import copy
import re
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import rois
import rotation
import runs
import tiny
import torch
import yaml
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model.weight_init import PretrainedInit
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from taught_by import add_predictions

from mmkd.configs import (
    OPTIONAL_KEYS,
    OWN_KEYS,
    read_config,
    student_config,
)
from mmkd.engine.preflight import check_types, unread_keys
from mmkd.laboratory.preparation import Preparation, preparations

ROOT = Path(__file__).parents[1]
COCO_CLASSES = 80

#: What every card says, in this order; notes are optional, and what is before
#: stands on one card of a folder.
OF_THE_METHOD = ('Family', 'Idea', 'Source')
FIELDS = [
    'Published',
    'Trained by us',
    'Read',
    'Schedule',
    'Changed besides model',
    "Teacher's weights",
]
SUMMARY = re.compile(
    r'\S+: .+ \((?P<student>\d+\.\d) AP alone\) learns from [^()]+'
    r'(\((?P<teachers>\d+\.\d(, \d+\.\d)*) AP\))?\.'
)
#: method_detector_student-from-teacher_neck_schedule_dataset.py
NAME = re.compile(
    r'[^_]+_[^_]+_[^_]+-from-[^_]+(_(pa)?fpn|_\dscale)?_(ms-)?'
    r'([12]x|\d+e)_coco\.py'
)


@cache
def teachers_in(path: Path) -> str:
    """Configs of a file's teachers, without reading the student's base."""
    names = [
        node.value.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == 'config'
    ]
    # Pytest reuses fixtures of the same object.
    return sys.intern(' '.join(sorted(names)))


# Neighbours share a teacher, which is saved once for all of them.
PATHS = sorted((ROOT / 'configs').glob('*/*.py'), key=teachers_in)
EVERY = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)


@cache
def config_of(path: Path) -> Config:
    return read_config(path)


packaged = cache(read_config)


def base_in(path: Path) -> str:
    """Name of the student's own config."""
    return next(
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_'
    )


def base_of(path: Path) -> Config:
    """The student's own config, MMDetection's or one of ours."""
    base = base_in(path)
    return packaged(base if '::' in base else str(path.parent / base))


def zoo_base_in(path: Path) -> str:
    """Name of the zoo's config that the student is made of."""
    base = base_in(path)
    return base if '::' in base else zoo_base_in(path.parent / base)


def card_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()))


def fields(path: Path) -> dict[str, str]:
    """Fields of a card by name, each on one line."""
    _, _, text = card_of(path).split('\n\n', 2)
    parts = re.split(r'\n(?=\S)', text)
    pairs = (' '.join(part.split()).split(': ', 1) for part in parts)
    return dict(pairs)


def teachers_of(path: Path) -> dict[str, ConfigDict]:
    return config_of(path).model.get('teachers', {})


def prepared_in(path: Path) -> list[Preparation]:
    return preparations(config_of(path), path.name)


def distils(path: Path) -> bool:
    """Whether it has terms, and is not the student's own on other data."""
    return 'terms' in config_of(path).model or not prepared_in(path)


def differences(one: object, other: object, place: str = '') -> Iterator[str]:
    """Dotted names of all that differs, MMEngine's ``_scope_`` aside."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield place
        return
    for key in {*one, *other} - {'_scope_'}:
        here = f'{place}.{key}' if place else str(key)
        if key in one and key in other:
            yield from differences(one[key], other[key], here)
        else:
            yield here


def test_there_are_configs_of_every_published_pair():
    names = {path.stem.partition('_')[2] for path in PATHS}
    assert names >= {
        'retinanet_r50-from-x101-64x4d_fpn_2x_coco',
        'retinanet_r50-from-r101_fpn_2x_coco',
        'gfl_r50-from-r101_fpn_1x_coco',
        'fcos_r50-from-r101_fpn_ms-2x_coco',
        'faster-rcnn_r50-from-r101_fpn_2x_coco',
        'faster-rcnn_r50-from-cascade-mask-x101-dcn_fpn_2x_coco',
        'reppoints_r50-from-x101-dcn_fpn_2x_coco',
    }


# The card ----------------------------------------------------------------


@EVERY
def test_name_says_method_detector_pair_neck_schedule_and_data(path):
    assert NAME.fullmatch(path.name)
    variant = r'(-[a-z]+)?_'
    assert re.match(re.escape(path.parent.name) + variant, path.name)


@EVERY
def test_card_has_summary_command_and_fields(path):
    lines = card_of(path).splitlines()
    assert SUMMARY.fullmatch(lines[0])
    command = card_of(path).split('\n\n')[1].replace('\\\n', '').split()
    assert command == ['python', 'tools/train.py', f'{path.relative_to(ROOT)}']
    said = [name for name in fields(path) if name not in OF_THE_METHOD]
    assert said in (FIELDS, [*FIELDS, 'Notes'])


@EVERY
def test_card_names_a_local_file_for_teachers_that_exist(path):
    said = fields(path)["Teacher's weights"]
    options = [
        f'model.teachers.{name}.checkpoint' for name in teachers_of(path)
    ]
    if prepared_in(path):
        assert 'by the command that stands under prepare; type it' in said
    if prepared_in(path) and not options:
        return
    if not options:
        assert said.startswith('none')
        return
    words = ' '.join(f'{option}=FILE' for option in options)
    assert said.endswith(f'--cfg-options {words}')
    config = copy.deepcopy(config_of(path))
    config.merge_from_dict(dict.fromkeys(options, 'my.pth'))
    for name, teacher in teachers_of(path).items():
        assert config.model.teachers[name].checkpoint == 'my.pth'
        assert config.model.teachers[name].config == teacher.config


@EVERY
def test_card_tells_the_schedule(path):
    config = config_of(path)
    said = fields(path)['Schedule']
    rate = config.optim_wrapper.optimizer.lr
    images = config.auto_scale_lr.base_batch_size
    assert f'{config.train_cfg.max_epochs} epochs of {images} images' in said
    assert f'learning rate {rate};' in said
    each = config.train_dataloader.batch_size
    assert f'({images // each} GPUs x {each})' in ' '.join(said.split())
    assert images % each == 0


# The distance from the student's own config ---------------------------------


@EVERY
def test_differs_from_the_student_only_in_what_the_card_names(path):
    base = base_of(path)
    named = fields(path)['Changed besides model'].rstrip('.')
    allowed = set() if named == 'nothing' else set(named.split(', '))
    found = {
        next(
            (one for one in allowed if f'{name}.'.startswith(f'{one}.')), name
        )
        for name in differences(config_of(path).to_dict(), base.to_dict())
    }
    if not distils(path):
        assert found == allowed
        return
    keys, optional = (
        {f'model.{key}' for key in names}
        for names in (OWN_KEYS, OPTIONAL_KEYS)
    )
    assert found - optional == {*keys, 'model.type', *allowed}


@EVERY
def test_all_that_it_names_is_there_and_read(path):
    config = config_of(path)
    check_types(config.to_dict())
    assert unread_keys(config) == []


@EVERY
def test_student_inside_is_the_plain_one(path):
    base = base_of(path)
    if distils(path):
        assert config_of(path).model.type == 'mmkd.Distiller'
    plain = student_config(config_of(path).model)
    assert list(differences(plain.to_dict(), base.model.to_dict())) == []


def test_child_config_changes_one_number(tmp_path):
    (parent,) = (path for path in PATHS if path.stem.startswith('sp_'))
    child = tmp_path / 'child.py'
    child.write_text(
        f'_base_ = {str(parent)!r}\n'
        'model = dict(terms=dict(sp=dict(loss=dict(loss_weight=6.0))))\n'
    )
    found = differences(
        read_config(child).to_dict(), config_of(parent).to_dict()
    )
    assert list(found) == ['model.terms.sp.loss.loss_weight']


# MMDetection's zoo -----------------------------------------------------------


@cache
def zoo() -> tuple[dict, ...]:
    """All models of MMDetection's metafiles."""
    import mmdet

    folder = Path(mmdet.__file__).parent / '.mim'
    index = yaml.safe_load((folder / 'model-index.yml').read_text())
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    return tuple(
        model
        for name in index['Import']
        for model in yaml.load((folder / name).read_text(), loader)['Models']
    )


def in_zoo(config: str) -> list[dict]:
    """The zoo's entries for ``'mmdet::folder/file.py'``."""
    name = config.replace('mmdet::', 'configs/')
    return [model for model in zoo() if model['Config'] == name]


def box_ap(model: dict) -> float:
    return next(
        float(result['Metrics']['box AP'])
        for result in model['Results']
        if result['Task'] == 'Object Detection'
    )


@EVERY
def test_zoo_has_the_weights_of_teachers_and_all_results(path):
    found = []
    asked = (*teachers_of(path).values(), *prepared_in(path))
    once = {(one.config, one.checkpoint): one for one in asked}
    for teacher in once.values():
        (weights,) = [
            model
            for model in in_zoo(teacher.config)
            if model['Weights'] == teacher.checkpoint
        ]
        found.append(box_ap(weights))
    said = SUMMARY.match(card_of(path))
    assert [
        float(ap) for ap in (said['teachers'] or '').split(', ') if ap
    ] == found
    students = {box_ap(one) for one in in_zoo(zoo_base_in(path))}
    cited = re.search(r'the\s+zoo\s+has\s+no\b', card_of(path))
    assert float(said['student']) in students or cited


# Two steps -------------------------------------------------------------------


#: Where layers begin to read numbers; students elsewhere than teachers, so
#: that no layer is the same on both sides.
PLACE = 0


@pytest.fixture(scope='module', autouse=True)
def cheap_weights():
    """Layers begin with numbers of one draw: drawing took half of the time."""
    drawn = 2 * torch.rand(2**22, generator=torch.manual_seed(0)) - 1
    read_from = cache(drawn.roll)

    def begin(layer):
        numbers = read_from(PLACE)
        with torch.no_grad():
            flat = layer.weight.view(-1)
            for part in flat.split(len(numbers)):
                part.copy_(numbers[: len(part)])
            flat /= layer.weight[0].numel() ** 0.5
            if layer.bias is not None:
                layer.bias.zero_()

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.nn.modules.conv._ConvNd, torch.nn.Linear):
            patch.setattr(kind, 'reset_parameters', begin)
        yield


@pytest.fixture(scope='module')
def weights(request, tmp_path_factory):
    """Random weights of teachers, by config, while theirs are tested."""
    folder = tmp_path_factory.mktemp('zoo')
    files = {
        name: tiny.save_teacher(
            read_config(name).model, folder / f'{index}.pth'
        )
        for index, name in enumerate(request.param.split())
    }
    yield files
    for file in files.values():
        file.unlink()  # hundreds of megabytes


def without_downloads(model: ConfigDict) -> ConfigDict:
    model = copy.deepcopy(model)
    model.backbone.init_cfg = None
    return model


def shares(losses: dict) -> dict:
    return {
        name: value
        for name, value in losses.items()
        if name.startswith('loss_kd_')
    }


def assert_teacher_is(teacher: torch.nn.Module, weights: Path) -> None:
    saved = torch.load(weights, mmap=True, weights_only=True)['state_dict']
    state = teacher.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)


def small_batch(model: ConfigDict, seed: int) -> dict:
    """Two pictures of at most 64 pixels, as a data loader gives them.

    Of 256 for students that choose hundreds of queries among the cells.
    """
    images, samples = tiny.batch(
        shapes=((64, 64), (48, 56)), seed=seed, classes=COCO_CLASSES
    )
    for one in samples:
        one.gt_instances.bboxes /= 2
    if 'mask_head' in model.get('roi_head', {}):
        rois.add_masks(samples)
    add_predictions(samples, seed)
    if 'dn_cfg' in model or model.get('as_two_stage'):
        images = magnify(images, samples, 4)
    return tiny.pixels(images, samples)


def magnify(images: torch.Tensor, samples: list, times: int) -> torch.Tensor:
    """Larger pictures, and what is said of them."""
    for one in samples:
        size = tuple(times * side for side in one.img_shape)
        one.set_metainfo(dict(img_shape=size, ori_shape=size, pad_shape=size))
        one.gt_instances.bboxes *= times
    return torch.nn.functional.interpolate(images, scale_factor=times)


def assert_backbone_learns_from(losses: dict, student) -> None:
    sum(shares(losses).values()).backward(retain_graph=True)
    last = [
        one
        for one in student.backbone.children()
        if not isinstance(one, torch.nn.LayerNorm)  # behind Swin's stages
    ][-1]
    part = student if student.phases.given else last
    # The first phase may train parts of terms, and nothing of the student.
    own = student.phases.at(0.0).train != ()
    reached = [
        one.grad.abs().sum()
        for name, one in part.named_parameters()
        if one.grad is not None and not (own and name.startswith('terms.'))
    ]
    assert reached, 'no gradient of the terms arrives'
    assert all(one.isfinite() for one in reached)
    assert sum(reached) > 0
    student.zero_grad()


def assert_loads_in_the_plain_student(student, model: ConfigDict) -> None:
    try:
        with torch.device('meta'):  # only names and shapes are compared
            plain = MODELS.build(model)
    except RuntimeError:  # Swin reads numbers while it is built
        plain = MODELS.build(model)
    report = plain.load_state_dict(student.state_dict(), strict=False)
    assert report.missing_keys == []
    assert all(key.startswith('terms.') for key in report.unexpected_keys)


TAUGHT = [path for path in PATHS if teachers_in(path)]
MARKS = rotation.marks(TAUGHT, count=5)
#: A minute each.
MARKS |= {path: pytest.mark.slow for path in TAUGHT if 'swin-l' in path.name}


@pytest.mark.parametrize(
    ('weights', 'path'),
    [
        pytest.param(
            teachers_in(path),
            path,
            id=path.stem,
            marks=MARKS[path],
        )
        for path in TAUGHT
    ],
    indirect=['weights'],
)
def test_learns_for_two_steps_and_loads_in_the_plain_student(weights, path):
    init_default_scope('mmdet')
    config = config_of(path)
    model = without_downloads(config.model)
    files = {
        name: weights[teacher.config]
        for name, teacher in model.teachers.items()
    }
    for name, file in files.items():
        model.teachers[name].checkpoint = str(file)
    student = built(model)
    optimiser = build_optim_wrapper(student, config.optim_wrapper)
    data = student.data_preprocessor(small_batch(model, seed=0), training=True)
    losses = student.loss(data['inputs'], data['data_samples'])
    assert_backbone_learns_from(losses, student)
    total, first = student.parse_losses(losses)
    optimiser.update_params(total)
    second = student.train_step(small_batch(model, seed=1), optimiser)
    idle = [
        f'loss_kd_{name}'
        for name, term in student.terms.items()
        if not (term.schedule(0.0) and student.phases.at(0.0).counts(name))
    ]
    for log in (first, second):
        heard = shares(log)
        assert all(heard.pop(name) == 0 for name in idle)
        if 'GFL' in model.student:
            # Its first boxes cover these pictures: one instance, no relation.
            heard.pop('loss_kd_gid_relation', None)
        assert heard
        assert all(value > 0 for value in heard.values())
        assert log['loss'].isfinite()
    for name, file in files.items():
        assert_teacher_is(student.teachers[name].detector, file)
    plain = without_downloads(base_of(path).model)
    assert_loads_in_the_plain_student(student, plain)


@pytest.mark.parametrize(
    'path',
    [
        path
        for path in PATHS
        if not teachers_in(path)
        and 'FoundationTerm' not in path.read_text()
        and distils(path)
    ],
    ids=lambda path: path.stem,
)
def test_without_a_teacher_it_learns_from_the_second_step(path, hub):
    init_default_scope('mmdet')
    config = config_of(path)
    student = built(without_downloads(config.model))
    optimiser = build_optim_wrapper(student, config.optim_wrapper)
    hub.update_info('max_iters', 4)
    hub.update_info('iter', 1)
    student.train_step(small_batch(config.model, seed=0), optimiser)
    hub.update_info('iter', 2)
    data = student.data_preprocessor(
        small_batch(config.model, seed=1), training=True
    )
    losses = student.loss(data['inputs'], data['data_samples'])
    assert all(value > 0 for value in shares(losses).values())
    assert_backbone_learns_from(losses, student)
    plain = without_downloads(base_of(path).model)
    assert_loads_in_the_plain_student(student, plain)


def carry_out(one: Preparation, weights: Path) -> None:
    """A command of a config, by its own tool, on small pictures."""
    main = runpy.run_path(str(ROOT / one.text.split()[0]))['main']
    tiny.save_teacher(read_config(one.config).model, weights)
    words = one.text.replace(one.checkpoint, str(weights)).split()[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(main.__globals__, 'read_config', shrunk)
        assert main(words) == 0


def shrunk(*words) -> Config:
    """A config that resizes to 64 pixels."""
    config = read_config(*words)
    text = re.sub(r'\(1333, \d+\)', '(64, 64)', str(config.to_dict()))
    return Config(ast.literal_eval(text))


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """Three pictures where configs look for COCO's."""
    runs.write_where_coco_is(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    'path',
    [path for path in PATHS if not distils(path)],
    ids=lambda path: path.stem,
)
def test_plain_student_learns_of_what_is_prepared(path, coco):
    init_default_scope('mmdet')
    for one in prepared_in(path):
        carry_out(one, coco / 'teacher.pth')
    config = shrunk(path)
    data = DATASETS.build(config.train_dataloader.dataset)
    student = built(without_downloads(config.model))
    optimiser = build_optim_wrapper(student, config.optim_wrapper)
    for _ in range(2):
        batch = pseudo_collate([data[0], data[1]])
        log = student.train_step(batch, optimiser)
        assert log['loss'].isfinite()
        assert log['loss'] > 0
    for one in prepared_in(path):
        one.out.rename('elsewhere')
    with pytest.raises(FileNotFoundError):
        DATASETS.build(config.train_dataloader.dataset)[0]


def built(model: ConfigDict) -> torch.nn.Module:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), 'PLACE', 7919)
        student = MODELS.build(model)
        # Peers of a term would be downloaded as well.
        patch.setattr(PretrainedInit, '__call__', lambda self, module: None)
        student.init_weights()
    return student.train()

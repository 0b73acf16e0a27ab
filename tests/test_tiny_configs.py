"""The tiny configs: one for every method, each the equation and no more.

`make test-all` trains them all; here they are built, and two of them, others
with each commit, learn for a few steps.
"""

from __future__ import annotations

import ast
import inspect
import math
from functools import cache
from pathlib import Path

import pytest
import runs
import tiny
from mmdet.registry import DATASETS, MODELS
from mmengine.registry import init_default_scope
from rotation import TODAY, marks

from mmkd.configs import (
    OPTIONAL_KEYS,
    OWN_KEYS,
    read_config,
    student_config,
)
from mmkd.datasets.shapes import TINY, prepare_shapes
from mmkd.laboratory.catalogue import Trial, sample, shares, tiny_configs
from mmkd.laboratory.preparation import preparations
from mmkd.registry import MODELS as OURS

ROOT = Path(__file__).parents[1]
PATHS = tiny_configs(ROOT)
EVERY = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
#: The methods that have a published experiment, with their folders.
METHODS = sorted(
    {
        (path.relative_to(ROOT).parts[1], path.name.partition('_')[0])
        for path in (ROOT / 'configs').rglob('*_coco.py')
    }
)
STEPS = 4

SKELETON = '''\
"""{name}: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        {term}=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.…Loss', loss_weight=1.0),
        ),
    ),
)
'''

quick_starts = runs.quick_starts


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Tiny configs name their teachers from there."""
    monkeypatch.chdir(ROOT)
    init_default_scope('mmdet')


@cache
def config_of(path: Path):
    return read_config(path)


@cache
def known_teachers() -> list[dict]:
    return [
        value.to_dict()
        for one in (ROOT / 'configs' / '_base_' / 'tiny').glob('*.py')
        for key, value in read_config(one).items()
        if key.endswith('teacher')
    ]


def base_of(path: Path) -> Path:
    (base,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_'
    )
    return path.parent / base


def named(value) -> set[str]:
    """Every ``type`` of mmkd's in a config."""
    if isinstance(value, dict):
        own = {str(value.get('type')).removeprefix('mmkd.')}
        return own.union(*map(named, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(named, value))
    return set()


# There is one ----------------------------------------------------------------


@pytest.mark.parametrize(('folder', 'method'), METHODS)
def test_every_method_with_a_published_config_has_a_tiny_one(folder, method):
    path = f'configs/{folder}/tiny/{method}_tiny.py'
    assert (ROOT / path).is_file(), (
        f'configs/{folder} has a config of {method!r}, but there is no '
        f'{path}. Write it, with as much of the method as the published one '
        f'has, for instance:\n\n'
        + SKELETON.format(name=method.upper(), term=method.replace('-', '_'))
        + f'\nand see it learn: python tools/test_all.py {method}_tiny'
    )


def test_every_loss_term_and_weight_is_in_a_tiny_config():
    used = set().union(*(named(config_of(path).model) for path in PATHS))
    OURS.import_from_location()
    known = {
        name
        for name, one in OURS.module_dict.items()
        if inspect.isclass(one)
        and one.__module__.startswith(('mmkd.losses.', 'mmkd.terms.'))
    }
    missing = sorted(known - used)
    assert missing == [], (
        f'No tiny config names {", ".join(missing)}. Add it to one of its '
        f'method, or write configs/METHOD/tiny/METHOD_tiny.py.'
    )


# It is the equation ----------------------------------------------------------


@EVERY
def test_is_its_base_with_teachers_and_terms(path):
    config, base = config_of(path), read_config(base_of(path))
    prepared = preparations(config, path.name)
    plain = student_config(config.model).to_dict()
    assert plain == base.model.to_dict()
    if not prepared or 'terms' in config.model:
        assert config.model.type == 'mmkd.Distiller'
        added = set(config.model) - set(base.model)
        assert added - set(OPTIONAL_KEYS) == set(OWN_KEYS)
    known = known_teachers()
    for teacher in config.model.get('teachers', {}).values():
        teacher = teacher.to_dict()
        teacher.pop('inherit', None)
        assert teacher in known
    for one in prepared:
        assert dict(config=one.config, checkpoint=one.checkpoint) in known
    free = {'model', 'optim_wrapper'}
    if prepared:  # the student learns of what was said
        free.add('train_dataloader')
    for key in set(base) - free:
        assert config[key] == base[key], key


@EVERY
def test_is_short_and_says_what_it_is(path):
    lines = 60 if config_of(path).model.get('phases') else 45
    assert len(path.read_text().splitlines()) <= lines
    (line,) = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    name, _, about = line.partition(': ')
    assert name
    assert about.startswith('a tiny ')
    assert path.name.partition('_')[0].startswith(path.parents[1].name)


@EVERY
def test_reads_the_checkpoint_that_its_teacher_ends_with(path):
    Trial(path, Path('work_dirs/tiny'), [0])  # raises if not


@EVERY
def test_builds(path):
    model = MODELS.build(config_of(path).model)
    terms = config_of(path).model.get('terms', {})
    assert list(getattr(model, 'terms', ())) == list(terms)


# Two of them learn -----------------------------------------------------------


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes') / 'tiny'
    counts = {'train': 16, 'val': 0, 'test': 1}
    prepare_shapes(folder, size=TINY['size'], counts=counts, say=len)
    return folder


@pytest.fixture
def root(pictures, tmp_path, monkeypatch):
    """A repository of the same configs with these pictures."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'data').mkdir()
    (tmp_path / TINY['out']).symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps_of(config) -> int:
    """As many as reach every phase."""
    phases = config.model.get('phases') or ()
    lengths = [one.get('length', 1) for one in phases]
    reach = math.ceil(sum(lengths) / min(lengths)) if lengths else 0
    return max(STEPS, reach)


def few_steps(path: Path, root: Path):
    """A config's training, begun by hardly trained teachers."""
    path = root / path.relative_to(ROOT)
    for teacher in Trial(path, Path('work_dirs/tiny'), [0]).teachers():
        teacher.final.parent.mkdir(parents=True)
        tiny.save_teacher(read_config(teacher.config).model, teacher.final)
    config = read_config(path)
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        config[key] = None
    config.train_cfg.max_iters = steps_of(config)
    config.default_hooks.logger.interval = 1
    config.work_dir, config.experiment_name = str(root / 'run'), path.stem
    return config


@pytest.mark.parametrize(
    'path',
    sample(PATHS, TODAY),
    ids=lambda path: f'{path.stem}-of-{TODAY}',
)
def test_one_of_this_commit_learns_for_a_few_steps(path, root):
    config = few_steps(path, root)
    for one in preparations(config, path.name):
        one.carry_out()
    log = runs.train(config)['log']
    assert all(math.isfinite(value) for value in log['train/loss'][0])
    for name in shares(config.model.get('terms', {})):
        keys = [
            key
            for key in log
            if f'{key}_'.startswith(f'train/loss_kd_{name}_')
        ]
        assert keys, f'{name} is not in the log: {sorted(log)}'
        values = [log[key][0] for key in keys]
        # A term that rests in a phase logs its parts in the others alone.
        if not config.model.get('phases'):
            assert all(len(one) == STEPS for one in values)
            assert all(max(one) > 0 for one in values)
        assert sum(len(one) for one in values) >= STEPS
        assert all(math.isfinite(value) for one in values for value in one)
        assert max(max(one) for one in values) > 0


# What a teacher has said before ----------------------------------------------

PREPARED = [path for path in PATHS if '\nprepare = ' in path.read_text()]
TURNS = marks(PREPARED, count=1)


@pytest.mark.parametrize(
    'path',
    [pytest.param(path, id=path.stem, marks=TURNS[path]) for path in PREPARED],
)
def test_learns_of_what_its_commands_write_and_of_nothing_else(path, root):
    config = few_steps(path, root)
    (one, *others) = preparations(config, path.name)
    for each in (one, *others):
        each.carry_out()
    log = runs.train(config)['log']
    assert all(math.isfinite(value) for value in log['train/loss'][0])
    one.out.rename('elsewhere')
    with pytest.raises(FileNotFoundError):
        DATASETS.build(config.train_dataloader.dataset)[0]

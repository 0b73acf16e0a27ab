"""Shipped configs with one wrong field: refused, and the message says where.

A fixed part of them is tried by the ordinary suite, all of the tiny ones by
``make soak``.
"""

from __future__ import annotations

import copy
import inspect
import json
import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import taught_by
import torch
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mutants import FREE, MISSING, Mutant, misspelt, mutants

import mmkd.distillers.distiller
import mmkd.teachers
from mmkd.build import find
from mmkd.configs import read_config
from mmkd.laboratory.catalogue import tiny_configs
from mmkd.phases import Phase
from mmkd.registry import SCHEDULES
from mmkd.teachers import Teacher

ROOT = Path(__file__).parents[1]
PATHS = [
    path for path in tiny_configs(ROOT) if 'mmkd.Distiller' in path.read_text()
]
FOR_COCO = [
    path
    for path in sorted((ROOT / 'configs').glob('*/*_coco*.py'))
    if 'mmkd.Distiller' in path.read_text()
]
#: Mutants of each of these: their parts are those of the tiny configs.
FEW = 6
#: Those of which some mutants are tried by the ordinary suite, and how many.
QUICK = ('amd_tiny', 'balanced_tiny', 'cmkd-proposal_tiny')
EACH = 25
#: Of these 0 is a number like any other.
FROM_ZERO = (
    'begin',
    'general',
    'iou_power',
    'learn_until',
    'score_thr',
    'warmup',
    'warmup_iters',
)
#: Widths inside of a component, which nothing else has to fit.
OWN_WIDTHS = ('mid_channels',)
MISSPELT = (
    'key misspelt',
    'type misspelt',
    'tap misspelt',
    'name misspelt',
    'unknown key',
)

weights = taught_by.weights


class Kept:
    """Builds a detector once, and hands out copies."""

    def __init__(self):
        self.built = {}

    def build(self, config):
        key = json.dumps(config, default=str, sort_keys=True)
        if key not in self.built:
            self.built[key] = MODELS.build(copy.deepcopy(config))
        return copy.deepcopy(self.built[key])


@pytest.fixture(scope='module', autouse=True)
def built_once():
    """Thousands of mutants are of the same few detectors."""
    logger = MMLogger.get_current_instance()
    level, kept = logger.level, Kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # tiny configs name their teachers from there
        patch.setattr(mmkd.distillers.distiller, 'DETECTORS', kept)
        patch.setattr(mmkd.teachers, 'DETECTORS', kept)
        init_default_scope('mmdet')
        logger.setLevel('CRITICAL')
        yield kept
        logger.setLevel(level)


# Those that are other settings -----------------------------------------------


def legitimate(mutant: Mutant) -> str | None:
    """Why a mutant is another config, and no wrong one."""
    key, kind, now = mutant.key, mutant.kind, mutant.now
    if kind == 'dropped' or now is None:
        if _has_default(mutant):
            return 'what is left out has a default'
        if kind == 'dropped' and (_free(mutant) or _is_a_name(mutant)):
            return 'one term, teacher or named part fewer'
    if kind == 'dropped' and mutant.place == 'phases':
        return 'one phase, in which everything counts'
    if kind == 'too short' and now:
        return 'one part fewer'
    if kind == 'too long' and key in ('teacher_levels', 'phases'):
        return 'one level may teach several; a phase may come again'
    if kind == 'reversed':
        return 'the same parts in another order'
    if kind == 'key misspelt' and _is_a_name(mutant):
        return "a name of the user's own"
    if kind == 'number out of range' and now == 0:
        if 'weight' in key or '.share' in mutant.place:
            return 'a part that is switched off'
        if key in FROM_ZERO:
            return 'from the beginning on, or nothing of it'
    if key == 'output_teachers' and now == []:
        return 'features alone'
    if kind == 'size by one' and key in OWN_WIDTHS:
        return 'another width inside'
    if kind == 'value of another type':
        if now == [mutant.was] and not mutant.place.endswith(']'):
            return 'a list of one, where a list is taken'
        if key == 'share' and now == 7:
            return 'one share for all'
    return None


def _above(mutant: Mutant) -> str:
    return mutant.place.rpartition('.')[0]


def _node(mutant: Mutant):
    """The dict that the field stands in, as it is now."""
    node = mutant.model
    for name, number in re.findall(r'(\w+)|\[(\d+)\]', _above(mutant)):
        node = node[name] if name else node[int(number)]
    return node


def _settings(mutant: Mutant) -> Mapping:
    """Parameters of what is built of that dict, by name."""
    node = _node(mutant)
    if re.fullmatch(r'teachers\.\w+', _above(mutant)):
        return inspect.signature(Teacher).parameters
    if _above(mutant).startswith('phases'):
        return inspect.signature(Phase).parameters
    if not isinstance(node, Mapping) or 'type' not in node:
        return {}
    registry = SCHEDULES if _above(mutant).endswith('schedule') else None
    return inspect.signature(find(node, 'it', registry)).parameters


def _free(mutant: Mutant) -> bool:
    return _above(mutant).rpartition('.')[2] in FREE


def _has_default(mutant: Mutant) -> bool:
    if mutant.place.endswith(']'):
        return False
    found = _settings(mutant).get(mutant.key)
    return found is not None and found.default is not inspect.Parameter.empty


def _is_a_name(mutant: Mutant) -> bool:
    """Whether the dict holds names that the user chose."""
    node = _node(mutant)
    return isinstance(node, Mapping) and 'type' not in node


# What becomes of one ---------------------------------------------------------


def outcome(mutant: Mutant, step: bool = True) -> tuple[str, str]:
    """Where it is caught, or 'accepted', or 'crash'; and what is said.

    Args:
        mutant: The config.
        step: Go on to the first step of one that is built.
    """
    try:
        model = MODELS.build(copy.deepcopy(mutant.model))
    except (FileNotFoundError, ValueError) as error:
        return 'build', str(error)
    except Exception as error:
        return 'crash', f'{type(error).__name__}: {error}'
    if legitimate(mutant):
        return 'legitimate', ''
    try:  # what the check and a training do at their beginning
        model.teachers.check_files()
        if not step:
            return 'accepted', ''
        model.init_weights()
        model.train()
        model.loss(*taught_by.batch(model))
        model._guard.check()
    except (FileNotFoundError, FloatingPointError, ValueError) as error:
        return 'check', str(error)
    except Exception as error:
        return 'crash', f'{type(error).__name__}: {error}'
    return 'accepted', ''


def lacks(mutant: Mutant, said: str) -> str | None:
    """What a message does not say and should."""
    place = mutant.place.split('.')
    names = [one.partition('[')[0] for one in place]
    who = {*names, 'Distiller', 'Phase', 'phases', 'student'}
    if not any(re.search(rf'\b{one}', said) for one in who):
        return 'who complains'
    if mutant.kind not in MISSPELT:
        return None
    wrong = 'nonsense' if mutant.kind == 'unknown key' else str(mutant.now)
    if not any(one in said for one in (wrong, *wrong.split('.'))):
        return 'what came'
    if not re.search(
        r'Did you mean|It has|needs|must|takes|no config|keyword|Set ', said
    ):
        return 'what was expected'
    return None


def identity(mutant: Mutant) -> str:
    """The same for mutants of which one is enough.

    What teachers are told is tried once for each pair of detectors.
    """
    parts = dict(mutant.model)
    if mutant.place.startswith(('teachers', 'student')):
        parts.pop('terms', None)
    return json.dumps([mutant.place, parts], default=str, sort_keys=True)


def try_all(
    path: Path, weights, chosen=None, tried=None
) -> tuple[Counter, list[str]]:
    """What became of a config's mutants, and what should not have."""
    tried = set() if tried is None else tried
    model = taught_by.tiny_model(path, weights)
    tally, wrong = Counter(), []
    for number, mutant in enumerate(mutants(model)):
        if chosen is not None and number not in chosen:
            continue
        if (key := identity(mutant)) in tried:
            tally['tried before'] += 1
            continue
        tried.add(key)
        torch.manual_seed(0)
        where, said = outcome(mutant)
        tally[where] += 1
        missing = lacks(mutant, said) if where in ('build', 'check') else None
        if where in ('crash', 'accepted') or missing:
            wrong.append(f'{path.stem} {mutant} [{where}] {missing}: {said}')
    return tally, wrong


def test_a_part_of_the_mutants_is_refused_in_words(weights):
    draw = random.Random(0)
    for path in (one for one in PATHS if one.stem in QUICK):
        model = taught_by.tiny_model(path, weights)
        count = sum(1 for _ in mutants(model))
        chosen = set(draw.sample(range(count), EACH))
        tally, wrong = try_all(path, weights, chosen)
        assert wrong == []
        assert tally['build'] > 0


@pytest.fixture(scope='module')
def tried():
    return set()


@pytest.mark.soak
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_every_mutant_is_refused_in_words(path, weights, tried, tell):
    tally, wrong = try_all(path, weights, tried=tried)
    tell(f'{path.stem}: {json.dumps(tally)}')
    assert wrong == []


@pytest.mark.soak
@pytest.mark.parametrize('path', FOR_COCO, ids=lambda path: path.stem)
def test_mutants_of_configs_for_coco_are_refused(path, built_once, tell):
    model = read_config(path).model
    found = [one for one in mutants(model) if not to_be_fetched(one)]
    tally, wrong = Counter(), []
    for mutant in random.Random(path.stem).sample(found, FEW):
        where, said = outcome(mutant, step=False)
        tally[where] += 1
        missing = lacks(mutant, said) if where in ('build', 'check') else None
        if where in ('crash', 'accepted') or missing:
            wrong.append(f'{mutant} [{where}] {missing}: {said}')
    built_once.built.clear()  # of hundreds of megabytes
    tell(f'{path.stem}: {json.dumps(tally)}')
    assert wrong == []


def to_be_fetched(mutant: Mutant) -> bool:
    """Whether it is an address, of which a training alone can tell."""
    return '://' in str(mutant.now) and mutant.key == 'checkpoint'


# Findings, one by one --------------------------------------------------------


@pytest.mark.parametrize(
    ('stem', 'place', 'value', 'said'),
    [
        ('fgd', 'student', None, 'student is not there.*student=_base_'),
        ('fgd', 'student', 'RetiaNet', "'RetiaNet'.*mean 'RetinaNet'"),
        ('fgd', 'student', 7, 'student as the type of a detector.*got.*7'),
        ('fgd', 'teachers', 'abc', "teachers as a dict of dicts.*'abc'"),
        ('fgd', 'teachers.big', 7, 'a teacher as a dict, got big=7'),
        ('fgd', 'teachers.big.config', 7, "'big' takes config as.*config=7"),
        ('fgd', 'teachers.big.config', {}, "'big' needs the config of a det"),
        (
            'fgd',
            'teachers.big.checkpoint',
            7,
            'takes checkpoint as.*got checkpoint=7',
        ),
        ('fgd', 'teachers.big.inherit', [7], 'takes inherit as.*got.*7'),
        ('fgd', 'teachers.big.inherit', ['neck', 'neck'], "'neck' twice"),
        ('fgd', 'teachers.big.sham', 'abc', "sham as True or.*got sham='abc'"),
        (
            'fgd',
            'teachers.big.cfg_options',
            {'model.bbox_hed.num_classes': 6},
            "'big': no detector can be built of .*retinanet_teacher.*bbox_hed",
        ),
        ('fgd', 'terms', 7, 'terms as a dict of dicts by name, got terms=7'),
        ('fgd', 'terms.fgd', 7, 'a term as a dict, got fgd=7'),
        ('fgd', 'terms.fgd.teacher', None, "'fgd'.*no teacher None.*'big'"),
        ('fgd', 'terms.fgd.type', 'mmkd.PKDLoss', 'be a term.*PKDLoss'),
        (
            'fgd',
            'terms.fgd.loss.type',
            'mmkd.ConvAdapt',
            'loss must be one of mmkd.losses, got ConvAdapt',
        ),
        ('fgd', 'terms.fgd.tap', 7, 'tap as a text or a list of.*got tap=7'),
        ('fgd', 'terms.fgd.tap', [], 'nothing to compare with tap='),
        ('fgd', 'terms.fgd.levels', [0, 1, 1], '1 twice in levels='),
        ('fgd', 'terms.fgd.levels', 'abc', "a list of whole numbers.*'abc'"),
        ('fgd', 'terms.fgd.levels', [0, None, 2], 'whole numbers.*None, 2'),
        ('fgd', 'terms.fgd.schedule', [], 'schedule as a dict or None, got'),
        (
            'fgd',
            'phases',
            [dict(length='abc')],
            "length as a finite number.*'abc'",
        ),
        ('fgd', 'phases', [dict(length=float('inf'))], 'a finite number, got'),
        ('fgd', 'phases', [dict(supervised='abc')], "True or False.*'abc'"),
        ('fgd', 'phases', [dict(train=7)], 'Phase 1 takes train as.*=7'),
        ('fgd', 'phases', [dict(terms=['fgd', 'fgd'])], "'fgd' twice"),
        ('soft-target', 'terms.*.output', 'abc', 'output as a whole number'),
        ('soft-target', 'terms.*.output', -1, 'output is the pos.*output=-1'),
        ('balanced', 'terms.both.terms', 'abc', "terms as a dict.*'abc'"),
        ('head', 'terms.head.terms', [], 'terms as a dict'),
        ('p2p', 'terms.p2p.peers', 7, 'peers as a dict of dicts'),
        (
            'hpm-kd',
            'terms.fused.temperature.polcy',
            'cosine',
            "temperature has no setting 'polcy'.*'policy'",
        ),
        (
            'hpm-kd',
            'terms.fused.temperature.tmax',
            float('inf'),
            'temperature takes tmax as a finite number, got tmax=inf',
        ),
        (
            'fgfi',
            'terms.fgfi.loss.anchor_generator.type',
            'AnchorGnerator',
            "'AnchorGnerator'.*mean 'AnchorGenerator'",
        ),
        ('foundation', 'terms.features.patch', -32, 'patch > 0.*patch=-32'),
        ('mhkd', 'terms.heads.head.norm_cfg.type', 'GNx', 'norm_cfg=.*GNx'),
        ('uhkd', 'terms.uhkd.loss.keep', [6, 6, 6], 'list of 2 whole.*6, 6'),
        (
            'detrdistill',
            'terms.detrdistill.channels',
            [32, 32, 32],
            'list of 2 whole numbers.*32, 32',
        ),
        (
            'alp-detr',
            'terms.alp.parts',
            ['decoder', 'encoder', 'encoder'],
            "'encoder' twice in parts=",
        ),
        ('mmkd-meta', 'terms.meta.levels', [0, 1, 2, 2], '2 twice in levels='),
        (
            'hpm-kd',
            'terms.fused.losses.scores.output',
            -1,
            "output of 'scores' as the position.*-1",
        ),
    ],
)
def test_a_wrong_field_says_what_was_expected_and_what_came(
    stem, place, value, said, weights
):
    path = next(one for one in PATHS if one.stem == f'{stem}_tiny')
    model = taught_by.tiny_model(path, weights)
    *above, last = place.split('.')
    node = model
    for name in above:
        node = next(iter(node.values())) if name == '*' else node[name]
    node[last] = value
    with pytest.raises(ValueError, match=f'(?s){said}'):
        MODELS.build(model)


def test_what_fails_deep_inside_is_said_of_its_term(weights):
    path = next(one for one in PATHS if one.stem == 'pkd_tiny')
    model = taught_by.tiny_model(path, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmkd.losses.pkd.pkd_loss', lambda *_: {}['nothing'])
        with pytest.raises(ValueError, match="'pkd': a setting does not fit"):
            MODELS.build(model)


def test_a_misspelt_key_of_the_distiller_is_no_setting_of_the_student(weights):
    path = next(one for one in PATHS if one.stem == 'fgd_tiny')
    for wrong, right in (('phaes', 'phases'), ('tems', 'terms')):
        model = taught_by.tiny_model(path, weights)
        model[wrong] = model.pop(right, [])
        with pytest.raises(ValueError, match=f"{wrong}'.*mean '{right}'"):
            MODELS.build(model)


# The mutants themselves ------------------------------------------------------


def test_a_mutant_differs_in_one_field(weights):
    path = next(one for one in PATHS if one.stem == 'fgd_tiny')
    model = taught_by.tiny_model(path, weights)
    before = copy.deepcopy(model)
    found = list(mutants(model))
    assert model == before
    assert all(one.model != before for one in found)
    (level,) = (
        one
        for one in found
        if one.place == 'terms.fgd.levels[1]' and one.now == 99
    )
    assert level.model.terms.fgd.levels == [0, 99, 2]
    (dropped,) = (
        one
        for one in found
        if one.place == 'terms.fgd.loss' and one.now is MISSING
    )
    assert 'loss' not in dropped.model.terms.fgd
    assert dropped.model.teachers == before.teachers


@pytest.mark.parametrize(
    ('word', 'wrong'),
    [('neck', ('nek', 'ncek')), ('mmkd.PKDLoss', ('mmkd.PKDoss',))],
)
def test_a_word_is_misspelt_behind_its_prefix(word, wrong):
    assert misspelt(word)[: len(wrong)] == wrong
    assert all(one != word for one in misspelt(word))

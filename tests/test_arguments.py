"""No component is built of a value that its documentation does not allow."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence

import mmengine.registry as engine
import numpy as np
import pytest

from mmkd.arguments import (
    check_arguments,
    described,
    fits,
    hints_of,
    range_of,
)
from mmkd.build import build
from mmkd.registry import DATASETS, HOOKS, MODELS, SCHEDULES, TRANSFORMS

BUILT_BY_OTHERS = (HOOKS, DATASETS, TRANSFORMS)
REGISTRIES = (MODELS, SCHEDULES, *BUILT_BY_OTHERS)
for registry in REGISTRIES:
    registry.import_from_location()
KINDS = {
    kind.__name__: kind
    for registry in REGISTRIES
    for kind in registry.module_dict.values()
    if kind.__module__.startswith('mmkd.')
    and kind.__module__.split('.')[1] not in ('distillers', 'detectors')
}
#: Of each type what is not of it.
WRONG = {
    float: ('1', None, [1.0], float('nan'), float('inf'), True),
    int: ('1', None, 1.5, True),
    bool: ('yes', 1, None),
    str: (1, ['a']),
}
EVERY = pytest.mark.parametrize('kind', sorted(KINDS))


def wrong_for(hint):
    """Values that an annotation excludes."""
    if hint in WRONG:
        return WRONG[hint]
    if hint is Mapping:
        return 'text', 3, ['a']
    inner = typing.get_args(hint)
    if inner and typing.get_origin(hint) in (Sequence, Mapping):
        return (5, object())
    # Of several types, what is none of any.
    return (object(),)


@EVERY
def test_each_argument_is_annotated_and_refuses_another_type(kind):
    kind = KINDS[kind]
    hints = hints_of(kind)
    for name, one in inspect.signature(kind).parameters.items():
        if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
            continue
        assert name in hints, f'{kind.__name__}({name}=) has no annotation'
        for value in wrong_for(hints[name]):
            with pytest.raises(ValueError) as error:
                check_arguments('the one', kind, {name: value})
            said = str(error.value)
            assert said.startswith(f'the one takes {name} as ')
            assert f'got {name}={value!r}' in said


@EVERY
def test_each_default_is_one_it_would_take(kind):
    kind = KINDS[kind]
    defaults = {
        name: one.default
        for name, one in inspect.signature(kind).parameters.items()
        if one.default is not one.empty
    }
    check_arguments('the one', kind, defaults)
    check_arguments('the one', kind, getattr(kind, 'example', {}))


@EVERY
def test_each_number_of_a_name_has_its_range(kind):
    kind = KINDS[kind]
    for name, hint in hints_of(kind).items():
        if hint not in (int, float) or range_of(name) is None:
            continue
        words, _ = range_of(name)
        low = 0 if words == '> 0' else -1
        with pytest.raises(ValueError, match=f'the one needs {name} {words}'):
            check_arguments('the one', kind, {name: low})


@pytest.mark.parametrize(
    ('name', 'refused', 'taken'),
    [
        ('loss_weight', (-1e-9, -3), (0, 1e-9, 20)),
        ('temperature', (0, -1), (1e-9, 10)),
        ('channels', (0, -4, (8, 0)), (1, (8, 16))),
        ('levels', (), (0, (0, 1, 2), -1)),
        ('layer', (), (-1, 0)),
    ],
)
def test_ranges_by_hand(name, refused, taken):
    hint = float | Sequence[int]

    class One:
        def __init__(self, **settings):
            pass

    One.__init__.__annotations__ = {name: hint}
    for value in taken:
        check_arguments('one', One, {name: value})
    for value in refused:
        with pytest.raises(ValueError, match=f'{name}='):
            check_arguments('one', One, {name: value})


@pytest.mark.parametrize(
    ('hint', 'words'),
    [
        (float, 'a finite number'),
        (str | None, 'a text or None'),
        (Sequence[str], 'a list of texts'),
        (Mapping, 'a dict'),
        (Mapping[str, typing.Any], 'a dict'),
        (Mapping[str, float], 'a dict of finite numbers'),
        (Sequence[tuple[int, int]], 'a list of lists of 2 whole numbers'),
        (typing.Literal['a', 'b'], "one of 'a', 'b'"),
    ],
)
def test_annotations_in_words(hint, words):
    assert described(hint) == words


@pytest.mark.parametrize(
    ('value', 'hint', 'expected'),
    [
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([], Sequence[int], True),
        (range(3), Sequence[int], True),
        ('abc', Sequence[str], False),
        ([[1, 2]], Sequence[tuple[int, int]], True),
        ([[1]], Sequence[tuple[int, int]], False),
        ({'a': 1}, Mapping[str, float], True),
        ({'a': 'b'}, Mapping[str, float], False),
        ({1: 1}, Mapping[str, float], False),
        ('b', typing.Literal['a', 'b'], True),
        ('c', typing.Literal['a', 'b'], False),
        (None, int | None, True),
        (object(), typing.Any, True),
    ],
)
def test_types_by_hand(value, hint, expected):
    assert fits(value, hint) is expected


def test_a_numpy_number_is_a_number():
    assert fits(np.float32(1), float)
    assert fits(np.int64(1), int)


def test_a_config_is_refused_with_its_place_and_what_to_type():
    config = dict(type='mmkd.PKDLoss', loss_weight='10')
    with pytest.raises(ValueError) as error:
        build(config, 'terms.pkd.loss')
    assert str(error.value) == (
        "terms.pkd.loss of type 'mmkd.PKDLoss' takes loss_weight as a finite "
        "number, got loss_weight='10'. Leave it out for loss_weight=1.0."
    )


@pytest.mark.parametrize(
    ('registry', 'config', 'said'),
    [
        (
            engine.HOOKS,
            dict(type='mmkd.FiniteLossHook', limit='5'),
            "FiniteLossHook takes limit as a whole number, got limit='5'",
        ),
        (
            engine.TRANSFORMS,
            dict(type='mmkd.LoadPredictions', folder=3),
            'LoadPredictions takes folder as a text or a path, got folder=3',
        ),
        (
            engine.HOOKS,
            dict(type='mmkd.FiniteLossHook', limt=5),
            "FiniteLossHook has no setting 'limt'. Did you mean 'limit'?",
        ),
        (
            engine.TRANSFORMS,
            dict(type='mmkd.LoadPredictions', folder='a', nonsense=3),
            "LoadPredictions has no setting 'nonsense'. It has 'folder'",
        ),
    ],
)
def test_what_mmengine_builds_is_checked_as_well(registry, config, said):
    with pytest.raises(ValueError, match=said):
        registry.build(config)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (dict(tap=['neck', 'neck']), "got 'neck' twice in tap="),
        (dict(levels=[0, 1, 1]), 'got 1 twice in levels='),
    ],
)
def test_nothing_is_named_twice(arguments, said):
    kind = KINDS['FeatureTerm']
    with pytest.raises(ValueError, match=said):
        check_arguments('the one', kind, arguments)
    check_arguments('the one', kind, dict(teacher_levels=[0, 0, 1]))


def test_components_of_others_are_theirs_to_check():
    build(_fpn(out_channels=8), 'align')
    with pytest.raises(ValueError, match='align of type') as error:
        build(_fpn(out_channels='8'), 'align')
    assert 'as a whole number' not in str(error.value)


def _fpn(**settings):
    return dict(type='mmdet.FPN', in_channels=[4, 8], num_outs=2, **settings)


def test_annotations_that_cannot_be_read_check_nothing():
    class One:
        def __init__(self, size: Nowhere = 1):  # noqa: F821
            self.size = size

    assert hints_of(One) == {}
    check_arguments('one', One, dict(size='any'))

"""Plans: how one detector is to teach another, looked at before it is done.

Two configs and the teacher's weights are enough: both detectors are looked at
once, the method's terms are written for what they have in common, and what
comes out is a config like any other, with a table that says what it does.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.models import BaseDetector
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.analysis.cost import multiply_accumulates
from mmkd.analysis.sheet import columns
from mmkd.checks import check_name, check_positive
from mmkd.classes import by_name, with_classes
from mmkd.compat.checkpoint import check_file, classes_of, read_checkpoint
from mmkd.configs import read_config, student_config
from mmkd.datasets.check import named_classes
from mmkd.datasets.photographs import mixed, tested, with_photographs
from mmkd.distillers.distiller import CHECK_SIZES, example_sample
from mmkd.distillers.unlabelled import partly_labelled
from mmkd.randomness import preserved
from mmkd.recipes import (
    DEFAULT,
    DEFAULT_PREDICTED,
    INHERIT,
    RECIPES,
    Pair,
    inherits,
    look,
    recipe,
)
from mmkd.registry import DETECTORS, MODELS
from mmkd.teachers import Teacher, run_detector
from mmkd.terms.feature import FeatureTerm
from mmkd.terms.group import GroupTerm

#: The teacher's name in a plan's config.
TEACHER = 'teacher'
#: A term's name while it is looked at alone.
TERM = 'term'
#: Characters of a line of what is written.
LINE = 79
HEADINGS = ('term', 'student', 'teacher', 'stride', 'channels', 'by', 'loss')


@dataclass(frozen=True)
class Plan:
    """A training that was looked at and not begun.

    Attributes:
        config: The whole config.
        source: What was typed for the student: a path or ``'mmdet::…'``.
        method: The method's name.
        rows: Of the table: term, tap of the student and of the teacher,
            stride in input pixels, channels of both, adapter, loss.
        notes: What else to know, in sentences.
        pair: What the two detectors have in common.
        unlabelled: Folder of photographs that the teacher teaches on, too.
    """

    config: Config = field(repr=False)
    source: str
    method: str
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    pair: Pair = field(repr=False)
    unlabelled: str | None = None

    def __str__(self) -> str:
        teacher = self.config.model.teachers[TEACHER]
        return '\n'.join(
            [
                f'{self.source}',
                f'  learns from {teacher.config} by {self.method!r}:',
                '',
                *columns([HEADINGS, *self.rows]),
                '',
                *self.notes,
            ]
        )

    def text(self, folder: Path) -> str:
        """The same training as a config file, to edit and to commit.

        Args:
            folder: Where it is going to stand.
        """
        base = from_folder(self.source, folder)
        whole = self.config.model.to_dict()
        added = ('type', 'student', 'teachers', 'terms')
        model = {key: whole[key] for key in added}
        text = (
            f'"""{self.method}, written by mmkd for this pair."""\n\n'
            f'_base_ = {base!r}\n\nmodel = {written(model)}\n'
        )
        if self.unlabelled is None:
            return text
        return f'{text}\ntrain_dataloader = {written(self._loader())}\n'

    def _loader(self) -> dict:
        """What a file changes of the base's loader."""
        plain = read_config(self.source, 'The student')
        named = Typed('_base_.train_dataloader.dataset')
        found = with_photographs(
            dict(plain.train_dataloader, dataset=named),
            self.unlabelled,
            [Typed(f'_base_.{key}.dataset') for key in tested(plain)],
        )
        # Only what is there can be deleted.
        for key in found:
            if key in plain.train_dataloader:
                found[key] = dict(_delete_=True, **found[key])
        return found


def from_folder(source: str, folder: Path) -> str:
    """A config as one in a folder inherits from it.

    Args:
        source: A path or ``'mmdet::…'``.
        folder: Where the heir is.

    Example:
        >>> from_folder('configs/a.py', Path('configs/mine'))
        '../a.py'
    """
    if '::' in source:
        return source
    return Path(os.path.relpath(source, folder)).as_posix()


class Typed(str):
    """An expression, in a value that is written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def written(value: Any, indent: str = '', used: int = 8) -> str:
    """A value of a config as it is typed, in lines of 79 characters.

    Args:
        value: A dict, list, tuple, or anything by its ``repr``.
        indent: Before each line after the first.
        used: Characters of the first line that stand before and after.

    Example:
        >>> print(written(dict(type='GFL', neck=dict(levels=(0, 1)))))
        dict(type='GFL', neck=dict(levels=(0, 1)))
    """
    flat = _flat(value)
    nested = isinstance(value, (dict, list, tuple)) and value
    if not nested or len(indent) + used + len(flat) <= LINE:
        return flat
    deeper = f'{indent}    '
    if isinstance(value, dict):
        names = [f'{key}=' for key in value]
        lines, (opened, closed) = value.values(), ('dict(', ')')
    else:
        names, lines = [''] * len(value), value
        opened, closed = '[]' if isinstance(value, list) else '()'
    return '\n'.join(
        [
            opened,
            *(
                f'{deeper}{name}{written(one, deeper, len(name) + 1)},'
                for name, one in zip(names, lines)
            ),
            f'{indent}{closed}',
        ]
    )


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        inside = ', '.join(f'{key}={_flat(one)}' for key, one in value.items())
        return f'dict({inside})'
    if isinstance(value, list):
        return f'[{", ".join(map(_flat, value))}]'
    if isinstance(value, tuple):
        more = ',' if len(value) == 1 else ''
        return f'({", ".join(map(_flat, value))}{more})'
    return repr(value)


def plan(
    student: str | Path | Config,
    teacher: str | Path,
    checkpoint: str | Path | None = None,
    method: str = DEFAULT,
    share: float | None = None,
    unlabelled: str | Path | None = None,
) -> Plan:
    """Look at two detectors and write the config by which one teaches.

    Args:
        student: Its plain config: a path, ``'mmdet::…'``, or one that was
            read.
        teacher: The teacher's config, likewise.
        checkpoint: The teacher's weights; those that its package names for
            the config if None.
        method: A key of :data:`mmkd.recipes.RECIPES`.
        share: Weigh the method by its gradient, see
            :func:`mmkd.recipes.recipe`.
        unlabelled: Folder of photographs without labels, of which half of
            each batch is made.

    Raises:
        FileNotFoundError: If there is no such config, checkpoint or folder.
        ValueError: If there is no such method, a config is none of a
            detector of images, the student's has teachers already, the
            weights are of another detector, or the method does not fit the
            pair; the message names those that do.
    """
    check_name('--method', 'method', method, RECIPES)
    _check_share(method, share)
    init_default_scope('mmdet')
    source = _source(student)
    student = read_config(student, 'The student')
    if student_config(student.model) != student.model:
        raise ValueError(
            f"{source} has teachers of its own. Name the student's plain "
            f'config beside --teacher, or train this one without.'
        )
    if unlabelled is not None:
        student = mixed(student, unlabelled)
    teacher_config = read_config(teacher, 'The teacher')
    checkpoint = str(checkpoint or published_weights(teacher))
    for who, config in (('student', student), ('teacher', teacher_config)):
        check_detector(who, config)
    names = _named_alike(student, teacher_config, checkpoint)
    pair, names, differ = _paired(student, teacher_config, names)
    settings = dict(config=str(teacher), checkpoint=checkpoint)
    inherit = inherits(method, pair)
    if inherit:
        settings['inherit'] = inherit
    if names is not None:
        settings['classes'] = names
    with preserved():
        try:
            terms = recipe(method, pair, share)
            config = _distilling(student, settings, terms)
            # Detectors write into the config that they are built from.
            model = MODELS.build(copy.deepcopy(config.model))
            model.eval()
            _check_classes(model, pair)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                _refusal(student, settings, pair, method, error, differ)
            ) from error
        if unlabelled is not None:
            _check_photographs(model, method)
        if '://' not in checkpoint:
            model.teachers[TEACHER].load()  # whether the file is its own
        if names and not (inherit or _compares(model)):
            del config.model.teachers[TEACHER]['classes']  # said of nothing
        rows = [
            row
            for name, term in terms.items()
            for row in _rows(name, model, term)
        ]
        alike = student_config(teacher_config.model) == student.model
        notes = [*differ, *_notes(model, terms, alike)]
        if unlabelled is not None:
            notes.append(
                f'Half of each batch has no labels: photographs of '
                f'{str(unlabelled)!r} on which the teacher teaches and '
                f'nothing else does. An epoch has as many steps as before.'
            )
        if method == DEFAULT and pair.comparable and _mute(pair):
            notes.append(
                'The heads say nothing that could be compared cell by cell. '
                '--method predicted trains on what the teacher detects.'
            )
    return Plan(
        config, source, method, tuple(rows), tuple(notes), pair, unlabelled
    )


def fitting(
    student: Config, teacher: Mapping, pair: Pair
) -> dict[str, str | None]:
    """Which methods fit a pair, and why the others do not.

    Every method's terms are built and shown one small image.

    Args:
        student: The student's plain config.
        teacher: Arguments of the teacher.
        pair: What the two have in common.

    Returns:
        By the name of each method, None or what its error says.
    """
    found: dict[str, str | None] = {}
    seen: dict = {}
    plain = dict(teacher, inherit=False)
    with preserved():
        model = MODELS.build(
            _distilling(student, plain, recipe('mimic', pair)).model
        )
        for method in RECIPES:
            model.teachers[TEACHER].inherit = inherits(method, pair)
            try:
                model.teachers[TEACHER].check_heirlooms(model)
                model.take(recipe(method, pair), seen)
                _check_classes(model, pair)
            except (ValueError, RuntimeError) as error:
                found[method] = str(error)
            else:
                found[method] = None
    return found


def published_weights(config: str | Path) -> str:
    """Where the weights of a packaged config are, as its package says.

    Args:
        config: ``'mmdet::folder/file.py'``.

    Raises:
        FileNotFoundError: If there are none.
    """
    try:
        if '::' not in str(config):
            raise ValueError
        return get_config(str(config), pretrained=True).model_path
    except (ValueError, AttributeError, AssertionError) as error:
        raise FileNotFoundError(
            f'The teacher {str(config)!r} needs trained weights, and none '
            f'are published for this config. Name them: '
            f'--teacher-checkpoint FILE.pth'
        ) from error


def _source(config: str | Path | Config) -> str:
    return str(config.filename if isinstance(config, Config) else config)


def _check_photographs(model: nn.Module, method: str) -> None:
    """What the terms tap must be there for images without labels, too."""
    paths = [
        path for term in model.terms.values() for path in term.student_paths
    ]
    for side in CHECK_SIZES:
        samples = [example_sample(side), example_sample(side)]
        samples[1].gt_instances = InstanceData()
        try:
            model.train()
            with torch.no_grad():
                partly_labelled(
                    model,
                    lambda *batch: run_detector(model, *batch) or {},
                    torch.rand(2, 3, side, side),
                    samples,
                    1,
                    list(dict.fromkeys(paths)),
                )
        except Exception as error:  # any detector's own trouble
            failed = error
            continue
        finally:
            model.eval()
        return
    other = DEFAULT if method == DEFAULT_PREDICTED else DEFAULT_PREDICTED
    raise ValueError(
        f'The method {method!r} cannot teach on photographs without labels: '
        f'{type(failed).__name__}: {failed} Choose --method {other}, or '
        f'train without --unlabelled.'
    ) from failed


def _check_share(method: str, share: float | None) -> None:
    if share is None:
        return
    check_positive('mmkd train', **{'--share': share})
    if method in (DEFAULT, DEFAULT_PREDICTED, INHERIT):
        none = method == INHERIT
        raise ValueError(
            f'--share weighs a method by its gradient, but {method!r} '
            f'{"has none" if none else "states its own shares"}. '
            f'Name another, for instance --method pkd, or edit what '
            f'--print-config writes.'
        )


def check_detector(who: str, config: Config) -> None:
    """A config must be that of a detector, not of a tracker or classifier.

    Raises:
        ValueError: If it is another's, or has no backbone.
    """
    model = student_config(config.get('model') or {})
    kind = model.get('type')
    kind = DETECTORS.get(kind) if isinstance(kind, str) else kind
    detects = not isinstance(kind, type) or issubclass(kind, BaseDetector)
    if 'backbone' in model and kind is not None and detects:
        return
    raise ValueError(
        f'The {who} must be a detector of mmdet with a backbone, but '
        f'{config.filename} is a config of {model.get("type")}. Name that of '
        f'a detector, for instance '
        f'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'
    )


def _distilling(student: Config, teacher: Mapping, terms: Mapping) -> Config:
    config = student.copy()
    config.model = ConfigDict(
        copy.deepcopy(student.model),
        type='mmkd.Distiller',
        student=student.model.type,
        teachers={TEACHER: dict(teacher)},
        terms=dict(terms),
    )
    return config


# ------------------------------------------------------------- their classes


class _Names(NamedTuple):
    """Two class lists that differ."""

    own: tuple[str, ...]
    theirs: tuple[str, ...]


def _named_alike(
    student: Config, teacher: Config, checkpoint: str
) -> _Names | None:
    """Class lists of data set and teacher, if they are known and differ."""
    if '://' in checkpoint:  # read when it is loaded; the config has to do
        theirs = classes_of_data(teacher)
    else:
        check_file(checkpoint, '--teacher-checkpoint')
        theirs = classes_of(read_checkpoint(checkpoint))
    ours = classes_of_data(student)
    if not theirs or not ours or theirs == ours:
        return None
    return _Names(ours, theirs)


def _paired(
    student: Config, teacher: Config, lists: _Names | None
) -> tuple[Pair, tuple[str | None, ...] | None, list[str]]:
    """What two detectors have in common, with their classes by name.

    Returns:
        The pair, the teacher's name of each of the student's classes, if the
        lists have to be mapped, and what to know of that.
    """
    if lists is None:
        return look(student, teacher, TEACHER), None, []
    names = by_name(*lists)
    apart = (
        f'The teacher tells apart {len(lists.theirs)} classes, '
        f'{_some(lists.theirs)}, the data {len(lists.own)}, '
        f'{_some(lists.own)}: '
    )
    count = sum(name is not None for name in names)
    if not count:
        pair = _without_classes(look(student, teacher, TEACHER))
        said = 'none is the same, so that only methods on features apply.'
        return pair, None, [apart + said]
    lacks = tuple(own for own, name in zip(lists.own, names) if name is None)
    said = (
        f'{count} are compared, by name, and not {_some(lacks)}.'
        if lacks
        else 'they are compared by name.'
    )
    try:
        pair = look(
            dict(model=with_classes(student_config(student.model), count))
            if lacks
            else student,
            dict(model=with_classes(student_config(teacher.model), count)),
            TEACHER,
        )
        with preserved():
            Teacher(config=teacher, classes=names)  # whether it can be cut
    except ValueError as error:
        pair = _without_classes(look(student, teacher, TEACHER))
        said = f'only methods on features apply. {error}'
        return pair, None, [apart + said]
    pair = replace(
        pair,
        student=student_config(student.model),
        # A head of more classes than the teacher's is the student's own.
        alike=() if lacks else pair.alike,
    )
    return pair, names, [apart + said]


def _mute(pair: Pair) -> bool:
    """Whether neither cells nor queries have scores that can be compared."""
    return pair.queries is None and not any(
        level.scores for level in pair.levels
    )


def _compares(model: nn.Module) -> bool:
    return any(term.compares_classes() for term in model.terms.values())


def classes_of_data(config: Config) -> tuple[str, ...] | None:
    """Names of the classes that a config's training set has, if it says."""
    dataset = (config.get('train_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    kind = DATASETS.get(dataset['type']) if 'type' in dataset else None
    return None if kind is None else named_classes(kind, dataset)


def _some(names: tuple[str, ...]) -> str:
    more = ', …' if len(names) > 3 else ''
    return f'({", ".join(names[:3])}{more})'


def _without_classes(pair: Pair) -> Pair:
    levels = tuple(replace(one, scores=False) for one in pair.levels)
    return replace(pair, levels=levels, heads=None, comparable=False, alike=())


def _check_classes(model: nn.Module, pair: Pair) -> None:
    if not pair.comparable and _compares(model):
        raise ValueError(
            'It compares classes, of which student and teacher share none. '
            'Choose a method on features, for instance pkd.'
        )


def _refusal(
    student: Config,
    teacher: Mapping,
    pair: Pair,
    method: str,
    error: Exception,
    differ: list[str],
) -> str:
    fits = [
        name
        for name, why in fitting(student, teacher, pair).items()
        if why is None and name != method
    ]
    return ' '.join(
        [
            f'The method {method!r} does not fit this pair: {error}',
            *differ,
            f'These do: --method {", ".join(fits)}.',
        ]
    )


# ----------------------------------------------------------------- the table


def _rows(
    name: str, model: nn.Module, config: Mapping, share: str = ''
) -> Iterator[tuple[str, ...]]:
    """What a term compares, level by level."""
    step = model.take({TERM: config})
    term = model.terms[TERM]
    if isinstance(term, GroupTerm) and term.transparent:
        shares = getattr(term, 'share', {})
        for part, child in config['terms'].items():
            given = shares.get(part)
            more = '' if given is None else f', share {given:g}'
            # By itself, so that the teacher's taps are its own.
            yield from _rows(f'{name}.{part}', model, child, more)
        return
    theirs = ', '.join(model.teachers[TEACHER].paths)
    loss = term.losses[0] if isinstance(term, FeatureTerm) else term
    weight = getattr(loss, 'loss_weight', None)
    said = type(loss).__name__ + share
    if weight is not None and not share:
        said += f', weight {weight:g}'
    align = getattr(term, 'align', None)
    adapter = '-' if align is None else type(align).__name__
    own = ', '.join(term.student_paths)
    if step is None or not isinstance(term, FeatureTerm):
        yield name, own, theirs, '', '', adapter, said
        return
    pairs, side = list(zip(*term.maps(step))), step.images.shape[-1]
    levels, others = (
        range(len(pairs)) if one is None else one
        for one in (term.levels, term.teacher_levels)
    )
    for number, (one, other) in enumerate(pairs):
        first = number == 0
        yield (
            name if first else '',
            f'{", ".join(term.taps)}[{levels[number]}]',
            f'{", ".join(term.teacher_taps)}[{others[number]}]',
            ' to '.join(dict.fromkeys(_strides(side, one, other))),
            f'{one.shape[1]} of {other.shape[1]}',
            adapter if first else '',
            said if first else '',
        )


def _strides(side: int, *maps: Tensor) -> list[str]:
    return [str(round(side / one.shape[-1])) for one in maps]


def _notes(model: nn.Module, terms: Mapping, alike: bool) -> list[str]:
    """What the whole costs, as far as arithmetic says."""
    model.take(terms)
    teacher = model.teachers[TEACHER]
    own = _size(model) - _size(model.terms)
    notes = []
    if alike:
        notes.append(
            'Student and teacher are one and the same detector: the student '
            'begins anew and learns from one that was trained before '
            '(self-distillation).'
        )
    elif _size(teacher.detector) <= own:
        notes.append(
            f'Warning: the teacher has {_size(teacher.detector) / 1e6:.1f} M '
            f'weights, the student {own / 1e6:.1f} M. A teacher should be '
            f'the larger one, or the better trained.'
        )
    added = _size(model.terms)
    notes.append(
        f'Terms add {added / 1e6:.2f} M weights that learn and are not '
        f'deployed.'
        if added
        else 'Terms add no weights.'
    )
    for side in CHECK_SIZES:
        with torch.no_grad(), suppress(RuntimeError):  # too small for one
            student, shown, compared = _arithmetic(model, side)
            break
    else:
        return notes
    ratio = (3 * (student + compared) + shown) / (3 * student)
    notes.append(
        f'The teacher runs as far as {", ".join(teacher.paths)}: '
        f'{shown / 1e9:.2f} billion '
        f"multiply-accumulates beside the student's {student / 1e9:.2f} "
        f'(forward, {side} x {side} pixels), the terms '
        f'{compared / 1e9:.2f}. By this count a step is {ratio:.2f} times '
        f"as long as the student's alone."
    )
    return notes


def _arithmetic(model: nn.Module, side: int) -> tuple[int, int, int]:
    """Multiply-accumulates of student, teacher and terms, forward."""
    images, samples = torch.rand(1, 3, side, side), [example_sample(side)]
    step, broken = model.dry_step(images, samples)
    if broken is not None:
        raise RuntimeError(broken)
    teacher = model.teachers[TEACHER]
    # As where the pair is checked: a BatchNorm of one cell learns nothing.
    model.terms.eval()
    try:
        student = multiply_accumulates(
            lambda: run_detector(model, images, samples)
        )
    except Exception as error:  # its own trouble, as where it finds nothing
        raise RuntimeError(str(error)) from error
    return (
        student,
        multiply_accumulates(
            lambda: teacher.run(images, samples, teacher.pixels)
        ),
        multiply_accumulates(
            lambda: [
                term(step)
                for term in model.terms.values()
                if term.checkable(step)
            ]
        ),
    )


def _size(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())

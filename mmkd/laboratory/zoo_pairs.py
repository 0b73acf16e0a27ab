"""Pairs of the zoo: which config of a folder teaches which.

mmdet ships a folder of configs a detector. What a folder holds, whether it is
a matter of boxes at all, and which of its configs is the larger one is read
from the configs, not from a list.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmdet.models import BaseDetector
from mmdet.models.detectors import MaskFormer, SemiBaseDetector
from mmdet.models.detectors import panoptic_two_stage_segmentor as panoptic
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmkd.classes import head_classes
from mmkd.registry import DETECTORS
from mmkd.teachers import without_init

#: A teacher has at least so many times the student's weights.
LARGER = 1.2
#: Where packages lie, which no message needs to repeat.
PACKAGES = Path(torch.__file__).resolve().parents[1]
#: Arguments of a model that make it fetch files of weights.
WEIGHTS = ('pretrained', 'teacher_ckpt')
#: What a model of another part of mmdet is for, by the part's package.
OTHER_TASKS = {
    'mot': 'tracks objects through videos',
    'vis': 'segments videos',
    'reid': 'tells persons apart',
}


def zoo() -> Path:
    """The folder of configs of the installed mmdet.

    Raises:
        FileNotFoundError: If the package came without.
    """
    spec = find_spec('mmdet')
    folder = Path(next(iter(spec.submodule_search_locations)))
    configs = folder / '.mim' / 'configs'
    if not configs.is_dir():
        raise FileNotFoundError(
            f'mmdet has no folder {configs}: this one was installed without '
            f'its configs. Install a wheel: pip install mmdet==3.3.0'
        )
    return configs


def folders(root: Path) -> list[str]:
    """Folders of configs that are trained as they stand, by name.

    Example:
        >>> 'retinanet' in folders(zoo()), '_base_' in folders(zoo())
        (True, False)
    """
    return sorted(
        one.name
        for one in root.iterdir()
        if one.is_dir() and not one.name.startswith('_')
    )


@dataclass(frozen=True)
class Entry:
    """A config of a box or instance detector.

    Attributes:
        file: Its path below the zoo.
        make: Detector, neck and head, by their types.
        weights: How many it has.
        classes: How many it tells apart, where its heads say so.
    """

    file: str
    make: tuple[str, ...]
    weights: int = 0
    classes: int | None = None

    @property
    def source(self) -> str:
        """As it is typed on the command line."""
        return f'mmdet::{self.file}'


@dataclass(frozen=True)
class Choice:
    """What a folder contributes.

    Attributes:
        student, teacher: The pair, one config twice where the folder has
            none that is larger; None where no config is of a detector that
            can be built.
        others: Why configs were left out, by the reason: their number.
        broken: Of these, the reasons that are errors of this installation.
    """

    student: Entry | None = None
    teacher: Entry | None = None
    others: Mapping[str, int] = field(default_factory=dict)
    broken: Sequence[str] = ()


def choose(root: Path, folder: str) -> Choice:
    """Read a folder of the zoo and pair two of its configs.

    Args:
        root: The zoo.
        folder: Its name.
    """
    init_default_scope('mmdet')
    entries, models = [], {}
    others, broken = Counter(), Counter()
    for path in sorted((root / folder).rglob('*.py')):
        file = path.relative_to(root).as_posix()
        try:
            config = Config.fromfile(path)
            model = config.get('model')
            if model is None:  # a part of others
                continue
            reason = other_task(model)
        except Exception as error:  # whatever a config's imports raise
            broken[said(error)] += 1
            continue
        if reason:
            others[reason] += 1
            continue
        entries.append(Entry(file, make(model)))
        models[file] = weightless(model)
    student, teacher = None, None
    while entries and student is None:
        candidates, tried, known = usual(entries), [], {}
        for one in candidates:
            try:
                tried.append(measured(one, models[one.file], known))
            except Exception as error:  # a package or file is missing
                broken[said(error)] += 1
        if tried:
            student, teacher = pair(tried)
        entries = [one for one in entries if one not in candidates]
    return Choice(student, teacher, others | broken, tuple(broken))


def other_task(model: Mapping) -> str | None:
    """Why a model is none that finds boxes in images; None if it is.

    Example:
        >>> other_task(dict(type='ByteTrack', detector={}))
        'tracks objects through videos'
    """
    kind = model.get('type')
    kind = DETECTORS.get(kind) if isinstance(kind, str) else kind
    if not isinstance(kind, type):
        return f'its {model.get("type")} is not registered'
    if not issubclass(kind, BaseDetector):
        part = kind.__module__.split('.')[2:3]
        return OTHER_TASKS.get(
            ''.join(part), f'{kind.__name__} is no detector'
        )
    if issubclass(kind, SemiBaseDetector):
        return 'learns from unlabelled images with a teacher of its own'
    if 'language_model' in model:
        return 'finds what a text names'
    head = model.get('panoptic_head') or {}
    stuff = issubclass(kind, MaskFormer) and head.get('num_stuff_classes', 0)
    if issubclass(kind, panoptic.TwoStagePanopticSegmentor) or stuff:
        return 'segments things and stuff (panoptic)'
    if 'backbone' not in model:
        return f'{kind.__name__} wraps a detector of another package'
    return None


def make(model: Mapping) -> tuple[str, ...]:
    """Types of a detector, its neck and its head.

    Example:
        >>> head = dict(bbox_head=[dict(type='A'), dict(type='A')])
        >>> make(
        ...     dict(type='CascadeRCNN', neck=dict(type='FPN'), roi_head=head)
        ... )
        ('CascadeRCNN', 'FPN', 'A')
    """
    parts = model.get('roi_head') or model
    found = (model, model.get('neck'), parts.get('bbox_head'))
    return tuple(_type(one) for one in found)


def _type(part: Any) -> str:
    if isinstance(part, (list, tuple)):
        return ' '.join(dict.fromkeys(map(_type, part)))
    kind = (part or {}).get('type', '-')
    return kind if isinstance(kind, str) else kind.__name__


def usual(entries: Iterable[Entry]) -> list[Entry]:
    """Those of the make that most have; of several such makes, all."""
    entries = list(entries)
    counts = Counter(one.make for one in entries)
    most = max(counts.values(), default=0)
    return [one for one in entries if counts[one.make] == most]


def measured(
    entry: Entry, model: Mapping, known: dict[str, tuple[int, int | None]]
) -> Entry:
    """The entry with the number of its weights and classes.

    Args:
        entry: The entry.
        model: ``model`` of its config.
        known: Of models that were measured before, by their text; most of a
            folder's configs differ in their schedules alone.
    """
    text = str(model)
    if text not in known:
        detector = build_structure(model)
        classes = head_classes(detector).values()
        weights = sum(one.numel() for one in detector.parameters())
        known[text] = weights, min(classes, default=None)
    return replace(
        entry, **dict(zip(('weights', 'classes'), known[text], strict=True))
    )


def build_structure(model: Mapping) -> torch.nn.Module:
    """A detector without memory for its weights, where it allows that."""
    try:
        with torch.device('meta'):
            return DETECTORS.build(without_init(copy.deepcopy(model)))
    except (NotImplementedError, RuntimeError):
        return DETECTORS.build(without_init(copy.deepcopy(model)))


def weightless(value: Any) -> Any:
    """A config whose modules fetch no files of weights.

    Args:
        value: A ``model``, or any part of it.
    """
    if isinstance(value, Mapping):
        kept = {
            key: _none(one) if key in WEIGHTS else weightless(one)
            for key, one in value.items()
            if not _fetches(one)
        }
        return type(value)(kept)
    if isinstance(value, (list, tuple)):
        return type(value)(
            [weightless(one) for one in value if not _fetches(one)]
        )
    return value


def _none(value: Any) -> bool | None:
    return False if isinstance(value, bool) else None


def _fetches(value: Any) -> bool:
    kind = value.get('type') if isinstance(value, Mapping) else None
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    # PVT's names a file and no type.
    untyped = isinstance(value, Mapping) and set(value) == {'checkpoint'}
    return untyped or kind.startswith('Pretrained')


def pair(entries: Sequence[Entry]) -> tuple[Entry, Entry]:
    """Student and teacher.

    The student has the fewest weights of a make that has a larger sibling
    (the shortest name, of several), the teacher the fewest of those that have
    at least :data:`LARGER` times as many and the same number of classes.
    Where no make has a larger sibling, the smallest config teaches its like.

    Args:
        entries: At least one.

    Example:
        >>> small, large = (
        ...     Entry(f'gfl/{name}.py', ('GFL',), weights)
        ...     for name, weights in (('r50', 32), ('r101', 51))
        ... )
        >>> pair([large, small]) == (small, large)
        True
    """
    order = sorted(entries, key=_size)
    for student in order:
        for teacher in order:
            if (teacher.make, teacher.classes) == (
                student.make,
                student.classes,
            ) and teacher.weights >= LARGER * student.weights:
                return student, teacher
    return order[0], order[0]


def _size(entry: Entry) -> tuple:
    return entry.weights, len(entry.file), entry.file


def said(error: Exception) -> str:
    """An error in one line."""
    text = ' '.join(str(error).split()).partition(', the current sys.path')[0]
    text = text.replace(f'{PACKAGES}/', '')
    return f'{type(error).__name__}: {text}' if text else type(error).__name__

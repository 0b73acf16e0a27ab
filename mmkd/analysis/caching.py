"""Write what a teacher says of all that a training will show it to disk.

A recipe that resizes and flips shows each image in two views, however long it
trains. The teacher looks at each once, and a training with
``Teacher(cache=FOLDER)`` reads the rest of its life.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.transforms import RandomChoiceResize, RandomFlip
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import DictAction
from mmengine.registry import init_default_scope
from torch import Tensor

from mmkd.analysis.offline import EVERY, command, store_goes_on, typed
from mmkd.checks import check_name
from mmkd.compat.checkpoint import add_trust_option
from mmkd.configs import read_config
from mmkd.distillers.distiller import Distilling
from mmkd.memory import GIB, Memory
from mmkd.pixels import kept
from mmkd.registry import MODELS
from mmkd.store import PRECISIONS, Store, room_of
from mmkd.taps import Record
from mmkd.teachers import Teacher

WHO = 'cache_teacher.py'
#: Images by which time and room are estimated.
PROBES = 4
#: Images shown at once, so that the first are compared with each alone.
TOGETHER = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``tools/cache_teacher.py``."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    options.command = typed('tools/cache_teacher.py', given)
    return command(make, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=WHO, description=__doc__)
    parser.add_argument('config', help='the distillation config')
    parser.add_argument(
        '--teacher', help='its name in the config; default: the only one'
    )
    parser.add_argument(
        '--out', type=Path, help="the folder; default: the teacher's cache"
    )
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='int8',
        help='of what is kept; int8: 256 steps a channel (default)',
    )
    parser.add_argument(
        '--limit',
        type=float,
        default=50.0,
        help='gibibytes that it may take (default: %(default)s)',
    )
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='as in train.py'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='begin anew in any case'
    )
    add_trust_option(parser)
    parser.add_argument(
        '--overwrite-if-changed',
        action='store_true',
        help='begin anew if --out was made otherwise',
    )
    return parser


def make(options: argparse.Namespace) -> None:
    """Make the cache, or go on with one that was interrupted.

    Raises:
        FileExistsError: If there is one that was made otherwise.
        ValueError: If the config shows ever new images, or what it shows
            takes more room than there may be.
    """
    init_default_scope('mmdet')
    config = read_config(options.config, WHO, options.cfg_options)
    name = _teacher_of(config, options)
    options.out = _folder(config.model.teachers[name], name, options)
    model = _built(config, name, options)
    teacher = model.teachers[name]
    shown = Shown(config, model)
    about = dict(
        teacher.about(),
        precision=options.precision,
        taps=list(teacher.paths),
        pipeline=shown.told,
        complete=False,
        command=options.command,
    )
    store = Store(options.out, WHO)
    if not store_goes_on(WHO, store, options, about):
        shutil.rmtree(options.out, ignore_errors=True)
    work = shown.work()
    print(shown.summary(work), flush=True)
    store.begin(about, _room(options, shown, work, teacher))
    teacher.memory = Memory(teacher.detector, 0, WHO, store)
    _fill(shown, work, teacher)
    store.tell(dict(about, complete=True))
    print(
        f'{options.out}: {len(store)} outputs, {_amount(store.size)}. '
        f'Train with '
        f"model.teachers.{name}.cache='{options.out}'"
    )
    store.close()


def _teacher_of(config: Mapping, options: argparse.Namespace) -> str:
    teachers = config.model.get('teachers')
    if not teachers:
        raise ValueError(
            f'{WHO}: {options.config} has no model.teachers. Name a '
            f'distillation config.'
        )
    name = options.teacher
    if name is None and len(teachers) > 1:
        raise ValueError(
            f'{WHO}: {options.config} has the teachers '
            f'{", ".join(teachers)}. Name one: --teacher NAME'
        )
    name = name or next(iter(teachers))
    check_name(f'{WHO} --teacher', 'teacher', name, teachers)
    return name


def _folder(teacher: Mapping, name: str, options: argparse.Namespace) -> Path:
    if options.out is not None:
        return options.out
    cache = teacher.get('cache')
    cache = cache.get('folder') if isinstance(cache, Mapping) else cache
    if not isinstance(cache, str):
        raise ValueError(
            f'{WHO} does not know where to write: {options.config} has no '
            f'model.teachers.{name}.cache. Name a folder: --out '
            f'work_dirs/cache/{name}'
        )
    return Path(cache)


def _built(
    config: Mapping, name: str, options: argparse.Namespace
) -> Distilling:
    settings = copy.deepcopy(config.model)
    settings.teachers[name].update(cache=0.0, sham=False, device=None)
    model = MODELS.build(settings)
    teacher = model.teachers[name]
    teacher.load()
    if not teacher.paths:
        raise ValueError(f'{WHO}: no term asks teacher {name!r} anything.')
    return model.to(options.device).eval()


class One(NamedTuple):
    """One image as a training may show it.

    Attributes:
        data: Its data set, and its place in there.
        view: Number of the view.
        size: Height and width of the batch that it comes in.
    """

    data: tuple[int, int]
    view: int
    size: tuple[int, int]


class Shown:
    """All images that a training may show, in each of their views.

    Args:
        config: Of the training.
        model: That is trained; its preprocessor makes batches.

    Raises:
        ValueError: If images are mixed or changed at random.
    """

    def __init__(self, config: Mapping, model: Distilling) -> None:
        loader = config.train_dataloader
        self.model = model
        self.batch_size = loader.get('batch_size', 1)
        sampler = loader.get('batch_sampler') or {}
        kind = str(sampler.get('type', ''))
        self.grouped = kind.endswith('AspectRatioBatchSampler')
        self.sets = list(_single(DATASETS.build(loader.dataset)))
        self.views = [
            list(views(one.pipeline.transforms)) for one in self.sets
        ]
        processor = model.data_preprocessor
        processor = getattr(processor, 'data_preprocessor', processor)
        if getattr(processor, 'batch_augments', None):
            raise ValueError(
                f'{WHO}: the data_preprocessor has batch_augments, which make '
                f'each batch a new one. {ELSE}'
            )
        self.told = f'{processor} {[one.pipeline for one in self.sets]}'

    def work(self) -> list[One]:
        """What is to be shown, images of one size behind each other."""
        own: dict[tuple, tuple[bool, tuple[int, int]]] = {}
        sizes: dict[tuple, tuple[int, int]] = {}
        for number, dataset in enumerate(self.sets):
            for place in range(len(dataset)):
                info = dataset.get_data_info(place)
                form = info.get('height'), info.get('width')
                group = self.grouped and form[1] < form[0]
                for view in range(len(self.views[number])):
                    key = number, view, *form
                    if None in form or key not in sizes:
                        size = self._own_size(number, place, view)
                        if size is None:  # left out by its pipeline
                            continue
                        sizes[key] = size
                    own[(number, place), view] = group, sizes[key]
        others: dict[bool, set] = {}
        for group, size in own.values():
            others.setdefault(group, set()).add(size)
        padded = {
            one: self._padded(one[1], others[one[0]])
            for one in set(own.values())
        }
        found = [
            One(*one, size)
            for one, shown in own.items()
            for size in padded[shown]
        ]
        return sorted(found, key=lambda one: (one.size, one.view, one.data))

    def _padded(self, size: tuple[int, int], others: set) -> set:
        """Sizes to which a batch may pad an image."""
        if self.batch_size == 1:
            return {size}
        heights, widths = (
            {max(size[i], other[i]) for other in others} for i in (0, 1)
        )
        if self.batch_size > 2:
            return set(itertools.product(heights, widths))
        return {tuple(map(max, size, other)) for other in others}

    def _own_size(
        self, number: int, place: int, view: int
    ) -> tuple[int, int] | None:
        loaded = self._loaded((number, place), view)
        if loaded is None:
            return None
        images, _ = self._batch([loaded])
        return tuple(images.shape[-2:])

    def _loaded(self, data: tuple[int, int], view: int) -> dict | None:
        dataset = self.sets[data[0]]
        results = dataset.get_data_info(data[1])
        for transform, pinned in self.views[data[0]][view]:
            before = _random_state()
            results = transform(results)
            if results is None:
                return None
            if not pinned and _random_state() != before:
                raise ValueError(
                    f'{WHO}: {type(transform).__name__} in the pipeline '
                    f'makes each view of an image a new one. {ELSE}'
                )
        return results

    def _batch(
        self, loaded: Sequence[dict], size: tuple[int, int] | None = None
    ) -> tuple[Tensor, list]:
        images = [one['inputs'] for one in loaded]
        samples = [one['data_samples'] for one in loaded]
        if size is not None:
            # What else is in the batch, as far as the size is concerned.
            images.append(images[0].new_zeros(3, *size))
            meta = dict(samples[0].metainfo, img_shape=size)
            samples.append(DetDataSample(metainfo=meta))
        data = dict(inputs=images, data_samples=samples)
        made = self.model.data_preprocessor(data, training=False)
        count = len(loaded)
        return made['inputs'][:count], made['data_samples'][:count]

    def show(self, teacher: Teacher, several: Sequence[One]) -> Record | None:
        """Show images of one size to a teacher.

        Returns:
            What it said; None if the pipeline left all of them out.
        """
        loaded = [self._loaded(one.data, one.view) for one in several]
        loaded = [one for one in loaded if one is not None]
        if not loaded:
            return None
        images, samples = self._batch(loaded, several[0].size)
        pixels = self.model._pixels
        clean = kept(images, samples, pixels)
        images = images if clean is None else clean
        return teacher.run(images, samples, pixels)

    def summary(self, work: Sequence[One]) -> str:
        """What there is to do, in words."""
        images = len({one.data for one in work})
        most = max(map(len, self.views), default=0)
        sizes = sorted({one.size for one in work})
        told = (
            f'{images} images, {most} views of each, padded to {len(sizes)} '
            f'sizes: {len(work)} to be shown'
        )
        if len(sizes) == 1:
            return told
        height, width = (max(one[i] for one in sizes) for i in (0, 1))
        return (
            f'{told}\nBatches are padded to their largest image, and an '
            f'image in another border is another one. One size would take '
            f'{images * most}: end the pipeline with dict(type="Pad", '
            f'size=({width}, {height})) before PackDetInputs, in the '
            f'training as well.'
        )


#: What to do where there are too many views.
ELSE = (
    'A cache on disk is for recipes that resize and flip. Run the teacher '
    'along with the training instead: cache=0.'
)


def _single(dataset: Any) -> Iterator[Any]:
    """Data sets of which each image comes through one pipeline."""
    if hasattr(dataset, 'datasets'):
        for one in dataset.datasets:
            yield from _single(one)
    elif hasattr(dataset, 'dataset'):
        if hasattr(dataset, 'pipeline'):
            raise ValueError(
                f'{WHO}: {type(dataset).__name__} mixes images, which makes '
                f'each view a new one. {ELSE}'
            )
        yield from _single(dataset.dataset)
    else:
        dataset.full_init()
        yield dataset


def views(transforms: Sequence[Any]) -> Iterator[list[tuple[Any, bool]]]:
    """A pipeline with each outcome of its flips and choices of a size.

    Args:
        transforms: The pipeline's.

    Returns:
        Of each view its transforms, and whether each was pinned down.
    """
    yield from map(list, itertools.product(*map(_outcomes, transforms)))


def _outcomes(transform: Any) -> list[tuple[Any, bool]]:
    if isinstance(transform, RandomFlip):
        given = transform.direction
        ways = [given] if isinstance(given, str) else list(given)
        share = transform.prob
        share = sum(share) if isinstance(share, Sequence) else share
        several = [(0.0, ways[0])] if share < 1 else []
        several += [(1.0, way) for way in ways if share > 0]
        return [
            (_with(transform, prob=prob, direction=way), True)
            for prob, way in several
        ]
    if isinstance(transform, RandomChoiceResize):
        return [
            (_with(transform, scales=[scale]), True)
            for scale in transform.scales
        ]
    return [(transform, False)]


def _with(transform: Any, **changed: Any) -> Any:
    found = copy.deepcopy(transform)
    for name, value in changed.items():
        setattr(found, name, value)
    return found


def _random_state() -> tuple:
    """Changes when something is drawn."""
    _, keys, place, *_ = np.random.get_state()
    return (
        keys.tobytes(),
        place,
        random.getstate(),
        torch.get_rng_state().sum(),
    )


def _room(
    options: argparse.Namespace,
    shown: Shown,
    work: Sequence[One],
    teacher: Teacher,
) -> int:
    """Bytes that it may take, once it is known that they suffice.

    Raises:
        ValueError: If they do not.
    """
    probes = [
        work[i] for i in np.linspace(0, len(work) - 1, PROBES, dtype=int)
    ]
    began, taken = time.monotonic(), 0
    for one in probes:
        record = shown.show(teacher, [one])
        if record is not None:
            outputs = [record.outputs(path) for path in teacher.paths]
            taken += sum(room_of(each, options.precision) for each in outputs)
    share = sum(map(_area, work)) / sum(map(_area, probes))
    needed = taken * share
    minutes = (time.monotonic() - began) * share / 60
    free = shutil.disk_usage(_existing(options.out)).free
    room = min(int(options.limit * GIB), free)
    print(f'about {_amount(needed)} and {minutes:.0f} min', flush=True)
    if needed > room:
        raise ValueError(
            f'{WHO}: about {_amount(needed)} are needed, and {_amount(room)} '
            f'may be taken (--limit {options.limit:g}, {_amount(free)} free). '
            f'Allow more, or keep less: fewer '
            f'levels in the terms, one padded size, --precision int8.'
        )
    return room


def _amount(count: float) -> str:
    """Bytes, as they are read."""
    unit, name = (GIB, 'GiB') if count >= GIB else (GIB / 1024, 'MiB')
    return f'{count / unit:.1f} {name}'


def _area(one: One) -> int:
    return one.size[0] * one.size[1]


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return folder if folder.exists() else _existing(folder.parent)


def _fill(shown: Shown, work: Sequence[One], teacher: Teacher) -> None:
    began = told = time.monotonic()
    for done, several in _together(work):
        shown.show(teacher, several)
        now = time.monotonic()
        if now - told > EVERY:
            told, left = now, (now - began) * (len(work) / done - 1)
            print(
                f'{done} of {len(work)}, about {left / 60:.0f} min left',
                flush=True,
            )


def _together(work: Sequence[One]) -> Iterator[tuple[int, list[One]]]:
    """Images of one size, and how many have come by then."""
    done = 0
    for _, same in itertools.groupby(work, key=lambda one: one.size):
        same = list(same)
        for start in range(0, len(same), TOGETHER):
            several = same[start : start + TOGETHER]
            done += len(several)
            yield done, several

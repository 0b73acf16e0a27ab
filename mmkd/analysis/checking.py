"""One page that says whether a training is worth to begin.

Files, data, teachers, pre-processing, and what each term does in a step: all
is looked at as the training would, and nothing is left behind, neither in
random states nor on disk.
"""

from __future__ import annotations

import copy
import logging
import os
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.analysis.sheet import LINE, Section, Sheet, columns
from mmkd.analysis.sizes import LARGE, Sizes, compared_sizes
from mmkd.analysis.teacher_check import (
    COCO_VAL,
    GAIN,
    LEAST,
    Seen,
    Verdict,
    better,
    compare_with_file,
    confused,
    detect,
    evaluate,
    label_names,
    look_at,
    other_pixels,
    permuted,
    published_ap,
    seeing,
    told,
)
from mmkd.compat.checkpoint import (
    kept_at,
    read_checkpoint,
    state_dict_of,
)
from mmkd.datasets.check import (
    Report,
    check_dataset,
    named_classes,
    same_pictures,
    single_sets,
)
from mmkd.distillers.distiller import Distilling
from mmkd.engine.findings import worst
from mmkd.engine.first_step import (
    DETECTION,
    Push,
    counting,
    judged,
    measure,
    trained,
)
from mmkd.engine.fit import Fit
from mmkd.engine.preflight import (
    check_classes,
    check_named_hash,
    check_training,
    named_weights,
)
from mmkd.engine.random_state import keyed
from mmkd.pixels import Pixels, valid_area
from mmkd.randomness import preserved
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.teachers import Teacher

#: Images that a teacher is evaluated on if nobody says otherwise.
IMAGES = 32
#: Batches after which a term of zero is no accident.
BATCHES = 3
#: Steps of a training that is only looked at; moments are parts of it.
STEPS = 100_000
#: Moments at which terms are looked for that rest at the beginning.
MOMENTS = [one / 20 for one in range(20)]
#: Classes that are listed one by one.
LISTED = 12
#: Sizes of normalised pixels that no detector was trained with.
STRANGE_MEAN, STRANGE_DEVIATION = 3.0, (0.2, 5.0)


def check(
    config: Config,
    source: str = '',
    images: int = IMAGES,
    device: str | None = None,
    data: bool = True,
) -> Sheet:
    """Look at a training as it would begin, and leave no trace.

    Args:
        config: The whole config, of a distilled or a plain student.
        source: What the user typed for it.
        images: On which each teacher is evaluated; 0 leaves it out.
        device: Where models run; a GPU if there is one.
        data: Look into annotations and pictures.
    """
    begun = time.perf_counter()
    sheet = Sheet(source or str(config.filename or 'a config'))
    seed = (config.get('randomness') or {}).get('seed') or 0
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with preserved(), keyed(seed), _hub() as hub, _quiet() as said:
        init_default_scope(config.get('default_scope') or 'mmdet')
        _Check(config, sheet, images, torch.device(device), hub, said).run(
            data
        )
    sheet.seconds = time.perf_counter() - begun
    return sheet


@contextmanager
def _hub() -> Iterator[MessageHub]:
    """A place where a training tells how far it is, for as long as needed."""
    known = MessageHub._instance_dict
    name = f'mmkd check {len(known)}'
    try:
        yield MessageHub.get_instance(name)
    finally:
        known.pop(name, None)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep the page free of logs; warnings are collected."""
    logger, said = MMLogger.get_current_instance(), []
    keep = logging.Handler(logging.WARNING)
    keep.emit = lambda record: said.append(record.getMessage())
    levels = [(one, one.level) for one in logger.handlers]
    for one, _ in levels:
        one.setLevel(logging.CRITICAL + 1)
    logger.addHandler(keep)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter('ignore')
            yield said
    finally:
        logger.removeHandler(keep)
        for one, level in levels:
            one.setLevel(level)


class _Check:
    """One check, section by section."""

    def __init__(
        self,
        config: Config,
        sheet: Sheet,
        images: int,
        device: torch.device,
        hub: MessageHub,
        said: list[str],
    ) -> None:
        self.config, self.sheet, self.images = config, sheet, images
        self.device, self.hub, self.said = device, hub, said
        self.classes: tuple[str, ...] | None = None
        self.model: nn.Module | None = None
        self._dataset: Any = None
        self._seen: Seen | None = None
        self._batches: list[Any] = []
        self._sizes: list[Sizes] = []

    def run(self, data: bool) -> None:
        sound = self._section('Files', self._files)
        if data:
            sound &= self._section('Data', self._data)
        sound = sound and self._section('Model', self._model)
        if not sound:
            return
        for name, teacher in getattr(self.model, 'teachers', {}).items():
            self._section(
                f'Teacher {name!r}',
                lambda part, one=teacher: self._teacher(part, one),
            )
        self._section('Pre-processing', self._pixels)
        self._section('One step', self._step)

    def _section(self, title: str, look: Any) -> bool:
        """Whether what follows can be looked at."""
        part = Section(title)
        self.sheet.sections.append(part)
        heard = len(self.said)
        try:
            look(part)
        except Exception as error:  # of a detector, a data set, a transform
            text = str(error).strip() or 'no message'
            known = isinstance(error, (ValueError, FileNotFoundError))
            kind = '' if known else f'{type(error).__name__}: '
            text = f'{kind}{text}'
            if text in (one.text for one in self.sheet.named('fail')):
                part.say('note', 'The same failure as above.')
            else:
                part.say('fail', text)
        for one in dict.fromkeys(self.said[heard:]):
            part.say('note', one)
        if not part.findings:
            part.say('ok', 'Nothing is named, and nothing is missing.')
        return worst(part.findings) != 'fail'

    # -------------------------------------------------------------- files

    def _files(self, part: Section) -> None:
        for text in check_training(self.config, data=False).warnings:
            part.say('warn', text)
        paths = {
            path: where
            for where, path in named_weights(self.config.model, 'model')
        }
        if self.config.get('load_from'):
            paths.setdefault(self.config.load_from, 'load_from')
        for path, where in paths.items():
            if '://' in path:
                part.say('note', f'{where}: {path} is fetched when needed.')
                continue
            changed = check_named_hash(path, where)
            if changed is None:
                part.say('ok', f'{where}: {path} is there.')
            else:
                part.findings.append(changed)

    # --------------------------------------------------------------- data

    def _data(self, part: Section) -> None:
        pictures, seen, unlabelled = {}, [], []
        for phase in ('train', 'val', 'test'):
            loader = self.config.get(f'{phase}_dataloader')
            if loader is None or loader.dataset in seen:
                continue
            seen.append(loader.dataset)
            where = f'{phase}_dataloader.dataset'
            for one, place in single_sets(loader.dataset, where):
                report = self._one_set(part, one, place, phase == 'train')
                if report is None:
                    continue
                if 'photographs' in one:
                    unlabelled += report.pictures
                    continue
                if phase == 'train':
                    self.classes = self.classes or report.classes
                pictures.setdefault(phase, []).extend(report.pictures)
                for group in same_pictures(report.pictures):
                    names = ', '.join(map(repr, group[:5]))
                    part.say(
                        'warn',
                        f'{place}: {len(group)} pictures are one and the '
                        f'same, byte for byte: {names}.',
                        'Keep one of them.',
                        place,
                    )
        held_out = {
            one for phase in ('val', 'test') for one in pictures.get(phase, ())
        }
        both = held_out & set(pictures.get('train', ()))
        if both:
            part.say(
                'note',
                f'{len(both)} of {len(held_out)} pictures of evaluation are '
                f'trained on: its AP will say nothing of others.',
            )
        self._copies(part, unlabelled, held_out)

    def _copies(
        self, part: Section, unlabelled: list[str], held_out: set[str]
    ) -> None:
        """Photographs that are pictures of evaluation under other paths."""
        places = {os.path.realpath(one) for one in held_out}
        others = {os.path.realpath(one) for one in unlabelled} - places
        copies = [
            group
            for group in same_pictures([*others, *places])
            if others & {*group} and places & {*group}
        ]
        if copies:
            first = ' and '.join(map(repr, copies[0][:2]))
            part.say(
                'warn',
                f'{len(copies)} pictures of evaluation are among the '
                f'photographs without labels under another path, the first as '
                f'{first}: its AP will say nothing of others.',
                'Take them out of the folder.',
                'train_dataloader.dataset.unlabelled',
            )

    def _one_set(
        self, part: Section, config: Mapping, place: str, training: bool
    ) -> Report | None:
        try:
            (report,) = check_dataset(config, place, training)
        except (FileNotFoundError, ValueError) as error:
            part.say('fail', str(error), about=place)
            return None
        if 'photographs' in config:
            part.say(
                'ok',
                f'{place}: {report.images} photographs, among them any that '
                f'are labelled, validated or tested on and will be left out.',
            )
            return report
        if not report.images:
            part.say(
                'note',
                f'{place}: {config.get("type")} is no COCO file on this disk '
                f'and was not looked into.',
            )
            return report
        sizes = ', '.join(
            f'{count} {size}' for size, count in report.of_sizes.items()
        )
        crowds = report.boxes - sum(report.of_sizes.values())
        part.say(
            'ok',
            f'{place}: {report.images} images, {report.boxes} boxes '
            f'({sizes}, {crowds} of crowds), {report.empty} images without '
            f'any.',
        )
        for one in report.notes:
            part.say('note', one, about=place)
        for one in report.warnings:
            part.say('warn', one, about=place)
        counts = report.of_classes
        bare = [name for name, count in counts.items() if not count]
        if training and bare:
            part.say(
                'warn',
                f'{place}: no box is of {", ".join(map(repr, bare[:5]))}'
                f'{", …" if len(bare) > 5 else ""}, of {len(counts)} classes.',
                'Leave them out of metainfo.classes and num_classes, or add '
                'boxes.',
                place,
            )
        part.facts[place] = dict(
            images=report.images,
            boxes=report.boxes,
            empty=report.empty,
            of_sizes=report.of_sizes,
            of_classes=counts,
        )
        part.table += _class_table(place, counts)
        return report

    # -------------------------------------------------------------- model

    def _model(self, part: Section) -> None:
        settings = copy.deepcopy(self.config.model)
        if self.config.get('data_preprocessor'):
            settings.setdefault(
                'data_preprocessor', self.config.data_preprocessor
            )
        model = MODELS.build(settings)
        model.init_weights()
        self.classes = self.classes or self._named_classes()
        inside = isinstance(self.config.model.get('student'), Mapping)
        check_classes(
            model, self.classes, 'model.student' if inside else 'model'
        )
        if self.config.get('load_from'):
            self._start_from(model, self.config.load_from)
        self.model = model.to(self.device).train()
        size = sum(
            one.numel()
            for name, one in model.named_parameters()
            if not name.startswith('terms.')
        )
        learnt = sum(one.numel() for one in trained(model))
        part.say(
            'ok',
            f'{type(model).__name__.removeprefix("Distilled")}: '
            f'{size / 1e6:.2f} M weights, {learnt / 1e6:.2f} M of them '
            f'trained.',
        )

    def _start_from(self, model: nn.Module, path: str) -> None:
        checkpoint = read_checkpoint(path)
        with Fit(model) as fit:
            model.load_state_dict(state_dict_of(checkpoint), strict=False)
        fit.compare(checkpoint)
        fit.refuse_strangers(
            'load_from', path, 'Name a checkpoint of this detector.'
        )

    # ----------------------------------------------------------- teachers

    def _teacher(self, part: Section, teacher: Teacher) -> None:
        settings = self.config.model.teachers[teacher.name]
        self._compare(part, teacher, settings)
        if self.classes and permuted(teacher, self.classes):
            self._say_order(part, teacher, self.classes)
        if self.images:
            self._evaluate(part, teacher)

    def _compare(
        self, part: Section, teacher: Teacher, settings: Mapping
    ) -> None:
        fetched = _fetched(teacher.checkpoint)
        changed = fetched and check_named_hash(fetched, teacher.name)
        if changed:
            part.findings.append(changed)
        found = compare_with_file(teacher, settings)
        part.facts['digest'] = found.digest
        wrong = [*found.differs, *found.strange]
        if wrong:
            part.say(
                'fail',
                f'{len(wrong)} tensors are not those of '
                f'{teacher.checkpoint}: {", ".join(wrong[:5])}'
                f'{", …" if len(wrong) > 5 else ""}.',
                'Look for what writes into the teacher: a hook, a custom '
                'detector, or parts that it shares with the student.',
                teacher.name,
            )
        else:
            cut = f', {found.cut} of them cut or renamed' if found.cut else ''
            part.say(
                'ok',
                f'{found.same + found.cut} tensors are those of '
                f'{teacher.checkpoint}{cut} (SHA-256 of all '
                f'{found.digest[:8]}).',
            )
        if found.infinite:
            part.say(
                'fail',
                f'{len(found.infinite)} tensors hold values that are not '
                f'finite: {", ".join(found.infinite[:5])}.',
                'Copy or train it again.',
                teacher.name,
            )

    def _say_order(
        self, part: Section, teacher: Teacher, classes: Sequence[str]
    ) -> None:
        names = label_names(teacher, classes) or []
        several = [
            name
            for name, term in self.model.terms.items()
            if term.compares_classes() and teacher.name in term.teacher_names
        ]
        text = (
            f'Its classes are {tuple(teacher.classes)[:8]}, those of the '
            f'data {tuple(classes)[:8]}.'
        )
        if several and any(one is not None for one in names):
            theirs = tuple(
                one if one in teacher.classes else None for one in classes
            )
            part.say(
                'fail',
                f'{text} Term {several[0]!r} compares them place by place.',
                f'Write in the config: teachers=dict({teacher.name}=dict('
                f'classes={theirs}))',
                teacher.name,
            )
        else:
            part.say('note', f'{text} No term compares them.')

    def _named_classes(self) -> tuple[str, ...] | None:
        """Of the training data, as config and type of the data set say."""
        place = 'train_dataloader.dataset'
        config = self.config.train_dataloader.dataset
        for one, _ in single_sets(config, place):
            kind = one.get('type')
            kind = DATASETS.get(kind) if isinstance(kind, str) else kind
            if kind is not None and (found := named_classes(kind, one)):
                return found
        return None

    def _evaluation_set(self) -> Any:
        """The data set of evaluation, built; None if there is none."""
        if self._dataset is None:
            loader = self.config.get('val_dataloader') or self.config.get(
                'test_dataloader'
            )
            if loader is not None:
                self._dataset = DATASETS.build(copy.deepcopy(loader.dataset))
                self._dataset.full_init()
        return self._dataset

    def _evaluate(self, part: Section, teacher: Teacher) -> None:
        dataset = self._evaluation_set()
        meta = {} if dataset is None else dataset.metainfo
        classes = meta.get('classes')
        names = label_names(teacher, classes) if classes else None
        if dataset is not None and names and self._seen is None:
            self._seen = look_at(dataset, self.images)
        why = ''
        if not classes:
            why = (
                'the config has no val_dataloader and no test_dataloader '
                'whose classes are named'
            )
        elif names is None:
            why = 'it shares no class with the data'
        elif not self._seen.objects:
            why = 'the images of evaluation have no box'
        if why:
            part.say('note', f'It was not evaluated: {why}.')
            return
        found = detect(teacher, self._seen, str(self.device))
        own = evaluate(self._seen, found, classes, names)
        published = None
        if str(getattr(dataset, 'ann_file', '')).endswith(COCO_VAL):
            published = published_ap(
                self.config.filename, list(self.config.model.teachers)
            ).get(teacher.name)
        part.facts.update(
            ap=own.ap,
            ap_low=own.low,
            ap_high=own.high,
            images=own.images,
            objects=own.objects,
            published=published,
        )
        if not self._say_why(part, teacher, found, own, published):
            card = f'; its card states {published}' if published else ''
            part.say('ok', f'{_of_ap(own)}{card}.')

    def _say_why(
        self,
        part: Section,
        teacher: Teacher,
        found: Sequence[Mapping],
        own: Verdict,
        published: float | None,
    ) -> bool:
        """What is odd about what a teacher finds, and where that is from."""
        classes = self._dataset.metainfo['classes']
        names = label_names(teacher, classes)
        poor = own.high < (published or LEAST)
        order = confused(self._seen, found, names, len(classes))
        way = self._other_way(
            teacher, classes, names, own, poor or order is not None
        )
        if order is not None:
            renamed = evaluate(self._seen, found, classes, order)
            if way is None or renamed.ap > way[2].ap + GAIN:
                self._say_calls(part, teacher, classes, order, own)
                return True
        if way is not None:
            name, pixels, other = way
            text = (
                f'Normalised by {name} it has {other.ap:.1f}: its config '
                f'tells another data_preprocessor than it was trained with.'
            )
            remedy = (
                f'Name the config that it was trained with, or set in '
                f'cfg_options of the teacher, under model.data_preprocessor: '
                f'{told(pixels)}'
            )
        elif poor:
            text = (
                f'Its card states {published}.'
                if published
                else 'It detects next to nothing.'
            )
            remedy = (
                f'See that config, file and data are of one kind: python '
                f'tools/test.py {teacher.source} {teacher.checkpoint}'
            )
        else:
            return False
        part.say('warn', f'{_of_ap(own)}. {text}', remedy, teacher.name)
        return True

    def _say_calls(
        self,
        part: Section,
        teacher: Teacher,
        classes: Sequence[str],
        order: Sequence[int | None],
        own: Verdict,
    ) -> None:
        named = [None if one is None else classes[one] for one in order]
        part.say(
            'warn',
            f'{_of_ap(own)}. It finds objects and calls them otherwise: its '
            f'outputs stand for {tuple(named)[:8]}, and were taken as '
            f'{tuple(teacher.classes or classes)[:8]}.',
            f'Write its own list into the file, meta.dataset_meta.classes, '
            f'and classes=… where teacher {teacher.name!r} is named.',
            teacher.name,
        )

    def _other_way(
        self,
        teacher: Teacher,
        classes: Sequence[str],
        names: Sequence[int | None],
        own: Verdict,
        every: bool,
    ) -> tuple[str, Pixels, Verdict] | None:
        """A normalisation with which it detects far more.

        Of a teacher of which nothing is odd, only the student's is tried.
        """
        best = None
        student = Pixels.of(self.model, 'The student')
        ways = other_pixels(teacher.pixels, student)
        for name, pixels in ways.items():
            if not every and pixels is not student:
                continue
            with seeing(teacher.detector, pixels) as possible:
                if not possible:
                    return None
                found = detect(teacher, self._seen, str(self.device))
            other = evaluate(self._seen, found, classes, names)
            if better(other, own) and (best is None or other.ap > best[2].ap):
                best = name, pixels, other
        return best

    # ------------------------------------------------------------- pixels

    def _pixels(self, part: Section) -> None:
        try:
            student = Pixels.of(self.model, 'The student')
        except TypeError as error:  # a distilled one would not have been built
            part.say('note', str(error))
            return
        rows = {'student': student}
        for name, one in getattr(self.model, 'teachers', {}).items():
            rows[name] = one.pixels
            differs = [
                what
                for what, key in (
                    ('mean', 'mean'),
                    ('std', 'std'),
                    ('channel order', 'swapped'),
                    ('value of the border', 'pad_value'),
                    ('divisor of sizes', 'divisor'),
                )
                if getattr(student, key) != getattr(one.pixels, key)
            ]
            if differs:
                part.say(
                    'note',
                    f'Teacher {name!r} and student differ in '
                    f'{", ".join(differs)}; each is shown its own.',
                )
            else:
                part.say('ok', f'Teacher {name!r} sees as the student does.')
        part.table += columns(
            [
                ('', 'mean', 'std', 'channels', 'border', 'divisor'),
                *(
                    (
                        name,
                        _numbers(one.mean),
                        _numbers(one.std),
                        'reversed' if one.swapped else 'as loaded',
                        f'{one.pad_value:g}',
                        f'{one.divisor}',
                    )
                    for name, one in rows.items()
                ),
            ]
        )
        part.facts = {name: asdict(one) for name, one in rows.items()}
        self._shown(part, self._batch(0))

    def _shown(self, part: Section, batch: Mapping) -> None:
        """What the student's preprocessor makes of a real batch."""
        data = self.model.data_preprocessor(copy.deepcopy(batch), True)
        inputs = data['inputs']
        if not isinstance(inputs, Tensor):
            return  # several views of an image
        inside = valid_area(
            [one.metainfo['img_shape'] for one in data['data_samples']],
            tuple(inputs.shape[-2:]),
            inputs.device,
        )
        inside = inputs[inside.expand_as(inputs)]  # without the border
        mean, deviation = float(inside.mean()), float(inside.std())
        part.facts['batch'] = dict(
            shape=list(inputs.shape), mean=mean, deviation=deviation
        )
        low, high = STRANGE_DEVIATION
        text = (
            f"A batch {tuple(inputs.shape)} comes out of the student's with "
            f'mean {mean:.2f} and deviation {deviation:.2f}'
        )
        plain = all(one == 1 for one in Pixels.of(self.model, 'student').std)
        sound = abs(mean) < STRANGE_MEAN and low < deviation < high
        if sound or plain:  # Caffe's way leaves pixels as large as they are
            part.say('ok', f'{text}.')
            return
        part.say(
            'warn',
            f'{text}: images are normalised twice or not at all.',
            'Look for Normalize in the pipeline beside mean and std of the '
            'data_preprocessor, and for images of 0 to 1.',
        )

    # --------------------------------------------------------------- step

    def _batch(self, number: int) -> Any:
        """A batch of the training data, the same whenever it is asked for."""
        if not self._batches:
            loader = dict(
                self.config.train_dataloader,
                num_workers=0,
                persistent_workers=False,
            )
            loader.pop('prefetch_factor', None)
            built = Runner.build_dataloader(loader, seed=0)
            meta = getattr(built.dataset, 'metainfo', None)
            if meta:
                self.hub.update_info('dataset_meta', meta)
            self._batches = list(islice(built, BATCHES))
            if not self._batches:
                raise ValueError(
                    'train_dataloader gives no batch: the data set has fewer '
                    'images than batch_size, or all are filtered out.'
                )
        return self._batches[number % len(self._batches)]

    def _step(self, part: Section) -> None:
        wrapper = self._optimiser(part)
        pushes = self._pushes(wrapper, 0, 0.0)
        self._warn_of_sizes(part)
        terms = self.config.model.get('terms') or {}
        several = [pushes]
        while len(several) < BATCHES and _still(several):
            several.append(self._pushes(wrapper, len(several), 0.0))
        moving = {one.name for some in several for one in some if one.gradient}
        found = judged(pushes, self.model, terms, again=True)
        rows = [(0.0, one) for one in pushes]
        still = [
            one.name
            for one in pushes
            if not one.gradient and not one.broken and one.name not in moving
        ]
        if isinstance(self.model, Distilling):
            if still and trained(self.model):  # some begin by themselves
                later = self._pushes(wrapper, 0, 0.5)
                moved = [one.name for one in later if one.gradient]
                late = [name for name in still if name in moved]
                if late:
                    part.say(
                        'note',
                        f'Moves the student after a while, and not in the '
                        f'first step: {", ".join(late)}.',
                    )
                moving.update(late)
            if not any(one.broken for one in pushes):
                rows += self._later(part, wrapper, terms)
        part.findings[:0] = [
            one
            for one in found
            if one.mark != 'fail'
            or one.about not in moving
            or 'finite' in one.text
        ]
        part.facts['pushes'] = [
            dict(asdict(one), progress=moment) for moment, one in rows
        ]
        part.table += _push_table(rows)
        if worst(part.findings) in ('ok', 'note'):
            every = all(one.gradient for _, one in rows)
            part.say(
                'ok',
                f'Every {"" if every else "other "}loss is finite, not zero, '
                f'and moves the student.',
            )

    def _later(
        self,
        part: Section,
        wrapper: OptimWrapper | None,
        terms: Mapping[str, Any],
    ) -> list[tuple[float, Push]]:
        """Steps at which terms count that rest at the beginning."""
        counts = {one: counting(self.model, one) for one in MOMENTS}
        resting = [name for name, now in counts[0.0].items() if not now]
        rows, seen = [], set()
        for name in resting:
            if name in seen:
                continue
            moments = [one for one in MOMENTS if counts[one][name]]
            if not moments:
                part.say(
                    'warn',
                    f'Term {name!r} counts at no time.',
                    'Give it a weight and a schedule above 0, or leave it '
                    'out.',
                    name,
                )
                continue
            # In the middle of its time, a warm-up is over.
            moment = moments[len(moments) // 2]
            pushes = self._pushes(wrapper, 0, moment)
            part.findings += [
                one
                for one in judged(pushes, self.model, terms)
                if one.about in resting and one.about not in seen
            ]
            new = [
                one
                for one in pushes
                if one.name in resting and one.name not in seen
            ]
            rows += [(moment, one) for one in new]
            seen |= {one.name for one in new}
            seen |= {one for one in resting if counts[moment][one]}
            part.say(
                'note',
                f'Rests at the beginning, and was looked at after '
                f'{moment:.0%} of the training: '
                f'{", ".join(one.name for one in new) or name}.',
            )
        return rows

    def _warn_of_sizes(self, part: Section) -> None:
        """Maps that a student would have to grow to before it can agree."""
        for one in self._sizes:
            level = one.largest()
            if one.times() < LARGE:
                continue
            part.say(
                'warn',
                f"Term {one.term!r} compares values, and the teacher's maps "
                f"are {one.times():.0f} times as large as the student's "
                f'({one.teacher[level]:.3g} beside {one.student[level]:.3g} '
                f'on average, map {level}).',
                'The student has to grow its maps first. mmkd.PKDLoss '
                'compares their patterns, whatever their size.',
                one.term,
            )

    def _optimiser(self, part: Section) -> OptimWrapper | None:
        try:
            return build_optim_wrapper(
                self.model, copy.deepcopy(self.config.optim_wrapper)
            )
        except AssertionError as error:  # mixed precision without a GPU
            part.say(
                'note', f'The optim_wrapper was not looked at here: {error}'
            )
            return None

    def _pushes(
        self, wrapper: OptimWrapper | None, number: int, moment: float
    ) -> list[Push]:
        """What the summands do on a batch, at a moment of the training."""
        model = self.model
        batch = copy.deepcopy(self._batch(number))
        for key, value in (
            ('iter', round(moment * STEPS)),
            ('epoch', 0),
            ('max_iters', STEPS),
        ):
            self.hub.update_info(key, value)
        data = model.data_preprocessor(batch, True)
        watcher = _Watcher(model)
        if isinstance(model, Distilling):
            model.observer = watcher
        context = (
            torch.enable_grad()
            if wrapper is None
            else wrapper.optim_context(model)
        )
        try:
            with context:
                losses = model._run_forward(data, mode='loss')
        finally:
            model.__dict__.pop('observer', None)
        if not isinstance(model, Distilling):
            return measure(model, losses, losses, alone=True)
        self._sizes = watcher.sizes
        return watcher.pushes


class _Watcher:
    """Measures a distilled student's step from the inside."""

    paths = ()

    def __init__(self, model: nn.Module) -> None:
        self.model, self.pushes = model, []
        self.sizes: list[Sizes] = []

    def __call__(self, step: Step, losses: Mapping[str, Any]) -> None:
        counts = counting(self.model, step.progress)
        names = [name for name, now in counts.items() if now]
        self.pushes = measure(
            self.model, step.losses, losses, names, alone=True
        )
        self.sizes = compared_sizes(self.model.terms, step)


def _still(several: Sequence[Sequence[Push]]) -> bool:
    """Whether something was zero in every batch so far, and nothing broke."""
    if any(one.broken for some in several for one in some):
        return False
    moved = {one.name for some in several for one in some if one.gradient}
    return any(
        one.gradient == 0 for one in several[0] if one.name not in moved
    )


def _of_ap(own: Verdict) -> str:
    return (
        f'{own.ap:.1f} AP on {own.images} images with {own.objects} objects '
        f'of the data of evaluation; on all, between {own.low:.1f} and '
        f'{own.high:.1f} with 99 % confidence'
    )


def _fetched(checkpoint: str | os.PathLike) -> Path | None:
    """Where torch keeps a file that was fetched."""
    if '://' not in str(checkpoint):
        return None
    path = kept_at(str(checkpoint))
    return path if path.is_file() else None


# ------------------------------------------------------------------- in words


def _class_table(place: str, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    ranked = sorted(counts.items(), key=lambda one: -one[1])
    shown = ranked
    if len(ranked) > LISTED:
        half = LISTED // 2
        shown = [*ranked[:half], ('…', len(ranked) - LISTED), *ranked[-half:]]
    told = ', '.join(
        f'{count} more' if name == '…' else f'{name} {count}'
        for name, count in shown
    )
    phase = place.partition('_')[0]
    return textwrap.wrap(
        f'boxes by class ({phase}): {told}', LINE - 6, subsequent_indent='  '
    )


def _push_table(rows: Sequence[tuple[float, Push]]) -> list[str]:
    found = [('loss', 'value', 'of loss', 'gradient', 'of it', 'cosine', 'at')]
    for moment, one in rows:
        norm = '-' if one.gradient is None else f'{one.gradient:.3g}'
        found.append(
            (
                'the detector' if one.name == DETECTION else one.name,
                f'{one.value:.4g}',
                f'{one.share:.1%}',
                norm,
                f'{one.part:.1%}',
                '-' if one.cosine is None else f'{one.cosine:.2f}',
                f'{moment:.0%}',
            )
        )
    return columns(found)


def _numbers(values: Sequence[float]) -> str:
    return ' '.join(f'{one:g}' for one in values)

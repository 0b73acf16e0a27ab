"""What distillation costs: a step, its parts, and the floor under it.

A training step of a student takes some time; with a teacher it takes at least
that and one forward pass of the teacher, as far as its taps ask. Four kinds of
steps take turns on the same batches, in blocks whose order is drawn anew each
round, so that a machine that slows down slows all of them:

- *plain*: the student without mmkd;
- *null*: the student in a distiller of which nothing counts;
- *teacher*: the teacher's forward pass alone;
- *full*: the training as its config says.

*Floor* is plain and teacher together, and the terms' own convolutions and
matrix products at the pace of the student's; what *full* takes beyond it is
what mmkd costs. Each term is timed by itself as well, forward and backward, on
outputs that are there already.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmkd.analysis.cost import bytes_kept, multiply_accumulates, quiet
from mmkd.analysis.statistics import percentile_interval
from mmkd.checks import check_positive
from mmkd.classes import head_classes
from mmkd.compat.checkpoint import add_trust_option, trusting
from mmkd.configs import read_config, student_config
from mmkd.distillers.distiller import Distilling
from mmkd.files import whole
from mmkd.laboratory.pace import load_batches
from mmkd.laboratory.samples import annotated
from mmkd.plan import plan
from mmkd.randomness import preserved
from mmkd.reading import read_json
from mmkd.recipes import DEFAULT
from mmkd.registry import MODELS
from mmkd.schedules import Constant
from mmkd.taps import counting, recording
from mmkd.teachers import without_init
from mmkd.version import __version__

ARMS = ('plain', 'null', 'teacher', 'full')
FOLDER = Path('work_dirs/benchmark')
#: How the files end that say in which ways a teacher can run.
WAYS = '.ways.json'
MIB = 2**20
#: Draws of the bootstrap.
DRAWS = 2000


@dataclass(frozen=True)
class Settings:
    """How a config is timed.

    Attributes:
        blocks: Rounds, in each of which every arm takes one block.
        steps: Of a block.
        warm_up: Steps of each arm that are not timed.
        batches: Different batches that the steps go through.
        device: ``'cpu'``, ``'cuda'``, …
        threads: Of the CPU.
        amp: Whether student and terms run in mixed precision.
        boxes: Mean number of boxes an image; None takes the config's own
            data.
        size: Height and width of images that are made up.
        batch_size: Of batches that are made up.
        random_weights: Whether teachers go without their checkpoints.
        seed: Of all that is drawn.
    """

    blocks: int = 10
    steps: int = 4
    warm_up: int = 4
    batches: int = 8
    device: str = 'cpu'
    threads: int = 1
    amp: bool = False
    boxes: float | None = None
    size: tuple[int, int] = (800, 1344)
    batch_size: int = 2
    random_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(
            'benchmark',
            blocks=self.blocks,
            steps=self.steps,
            batches=self.batches,
            threads=self.threads,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Timing:
    """What was measured of one config.

    Attributes:
        config: Its name.
        seconds: Of a step, by arm and block.
        terms: Of each term's forward and backward pass, by block.
        memory: MiB by arm: on a GPU at the peak of a step, above what stays;
            saved for the backward pass elsewhere.
        work: Multiply-accumulates, forward and backward, of ``'plain'`` and
            of ``'terms'``.
        facts: What was run where.
    """

    config: str
    seconds: Mapping[str, list[float]]
    terms: Mapping[str, list[float]]
    memory: Mapping[str, float]
    work: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def median(self, arm: str) -> float:
        """Milliseconds of an arm's step."""
        return 1000 * statistics.median(self.seconds[arm])

    @property
    def own(self) -> float:
        """The terms' convolutions and products, relative to plain's."""
        return self.work['terms'] / self.work['plain']

    @property
    def floor(self) -> float:
        """Plain, teacher and what the terms multiply, relative to plain."""
        both = self.median('plain') + self.median('teacher')
        return both / self.median('plain') + self.own

    def of_plain(self) -> tuple[float, float, float]:
        """Full relative to plain: estimate, low and high.

        The interval is that of a bootstrap over rounds: all arms of a round
        are drawn together.
        """
        return self._ratio(lambda taken: taken['plain'])

    def of_floor(self) -> tuple[float, float, float]:
        """Full relative to the floor, in the same way."""
        return self._ratio(
            lambda taken: taken['plain'] * (1 + self.own) + taken['teacher']
        )

    def _ratio(
        self, base: Callable[[Mapping[str, float]], float]
    ) -> tuple[float, float, float]:
        taken = {name: np.array(one) for name, one in self.seconds.items()}

        def of(rows: Any) -> float:
            medians = {
                name: float(np.median(one[rows]))
                for name, one in taken.items()
            }
            return medians['full'] / base(medians)

        return _resampled(of, len(taken['full']))

    def null_more(self) -> tuple[float, float, float]:
        """Milliseconds of null beyond plain: estimate, low and high.

        The median over rounds of the difference in each.
        """
        null, plain = (np.array(self.seconds[x]) for x in ('null', 'plain'))
        apart = 1000 * (null - plain)
        return _resampled(
            lambda rows: float(np.median(apart[rows])), len(apart)
        )

    def as_dict(self) -> dict:
        return asdict(self)


def _resampled(
    of: Callable[[Any], float], count: int
) -> tuple[float, float, float]:
    """A statistic of rounds, and its interval by a bootstrap over them."""
    dice = np.random.default_rng(0)
    draws = [of(dice.integers(0, count, count)) for _ in range(DRAWS)]
    found = percentile_interval(of(np.arange(count)), draws)
    return found.mean, found.low, found.high


def measure(
    config: Config, settings: Settings, name: str = '', **about: Any
) -> Timing:
    """Time a distillation config.

    Args:
        config: A training config whose model is a ``mmkd.Distiller``.
        settings: How.
        name: Of the config, for the report.
        **about: More for its ``facts``.

    Raises:
        ValueError: If it has no teachers.
        FileNotFoundError: If a teacher's weights, or the data, are missing;
            the message names the option that does without.
    """
    if config.model.get('type') not in ('mmkd.Distiller', 'Distiller'):
        raise ValueError(
            f'benchmark times distillation, but the model of {name} is '
            f'{config.model.get("type")}, which has no teacher. Name a config '
            f'with teachers, or write one: mmkd train STUDENT --teacher '
            f'TEACHER --print-config FILE'
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with preserved(settings.seed), quiet(), _no_collection():
            return _measure(config, settings, name, about)
    finally:
        torch.set_num_threads(threads)


def _measure(
    config: Config, settings: Settings, name: str, about: Mapping[str, Any]
) -> Timing:
    init_default_scope(config.get('default_scope', 'mmdet'))
    batches = load(config, settings)
    arms = _arms(config, settings)
    clock = Clock(settings.device)
    steps = {
        'plain': arms['plain'],
        'null': arms['null'],
        'teacher': TeacherPass(arms['full']),
        'full': arms['full'],
    }
    MessageHub.get_current_instance().update_info('max_iters', 10**9)
    for step in steps.values():
        for index in range(settings.warm_up):
            step.ready(batches[index % len(batches)])()
    terms = _Terms(arms['full'], clock)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    of_terms: dict[str, list[float]] = {}
    dice = random.Random(settings.seed)
    for chosen in rounds(batches, settings):
        for arm in dice.sample(ARMS, len(ARMS)):
            turns = [steps[arm].ready(batch) for batch in chosen]
            with clock.span() as span:
                for take in turns:
                    take()
            seconds[arm].append(span() / settings.steps)
        for term, taken in terms(chosen).items():
            of_terms.setdefault(term, []).append(taken)
    memory = {
        arm: _memory(arms[arm], batches[0], settings.device)
        for arm in ('plain', 'null', 'full')
    }
    work = dict(
        plain=arms['plain'].work(batches[0]),
        terms=terms.work(batches[0]),
    )
    facts = dict(about, **_facts(settings, batches, arms))
    return Timing(name, seconds, of_terms, memory, work, facts)


def rounds(batches: Sequence[Any], settings: Settings) -> Iterator[list]:
    """The batches of each round, on which all that is timed takes turns."""
    for block in range(settings.blocks):
        first = block * settings.steps
        yield [
            batches[(first + index) % len(batches)]
            for index in range(settings.steps)
        ]


# ---------------------------------------------------------------------- arms


class Arm:
    """Training steps of one model."""

    def __init__(
        self, model: nn.Module, config: Config, settings: Settings
    ) -> None:
        self.model = model.to(settings.device).train()
        wrapper = copy.deepcopy(dict(config.optim_wrapper))
        # Steps of random weights soon come to no number.
        wrapper['optimizer']['lr'] = 0.0
        if settings.amp:
            wrapper.update(type='AmpOptimWrapper')
        self.wrapper = build_optim_wrapper(self.model, wrapper)
        self.amp, self.taken = settings.amp, 0

    def __call__(self, batch: Any) -> None:
        hub = MessageHub.get_current_instance()
        hub.update_info('iter', self.taken)
        self.taken += 1
        self.model.train_step(batch, self.wrapper)

    def ready(self, batch: Any) -> Callable[[], None]:
        """A step on a batch, its preprocessing included."""
        return partial(self, batch)

    def shown(self, batch: Any) -> tuple[Tensor, list]:
        """A batch as the model's losses take it."""
        data = self.model.data_preprocessor(batch, True)
        return data['inputs'], data['data_samples']

    def work(self, batch: Any) -> int:
        """Multiply-accumulates of a step, forward and backward."""
        images, samples = self.shown(batch)

        def take() -> None:
            with self.precision:
                losses = self.model.loss(images, samples)
            self.model.parse_losses(losses)[0].backward()

        found = multiply_accumulates(take)
        self.model.zero_grad(set_to_none=True)
        return found

    @property
    def precision(self) -> Any:
        if not self.amp:
            return nullcontext()
        return self.wrapper.optim_context(self.model)


def _arms(config: Config, settings: Settings) -> dict[str, Arm]:
    with tempfile.TemporaryDirectory() as folder:
        full, null = (built(config, settings, folder) for _ in range(2))
    for term in null.terms.values():
        term.schedule = Constant(0.0)
    plain = _plain(config)
    state = plain.state_dict()
    weights = full.state_dict()
    plain.load_state_dict({key: weights[key] for key in state})
    null.load_state_dict(weights)
    return {
        name: Arm(model, config, settings)
        for name, model in dict(plain=plain, null=null, full=full).items()
    }


def _plain(config: Config) -> nn.Module:
    # Detectors write into the config that they are built from.
    return MODELS.build(copy.deepcopy(student_config(config.model)))


def built(config: Config, settings: Settings, folder: str) -> Distilling:
    """A distilled student with the weights of its teachers.

    Args:
        config: A training config.
        settings: How it is timed.
        folder: For weights of teachers that go without their checkpoints.
    """
    model = copy.deepcopy(config.model)
    if settings.random_weights:  # nor is a backbone's file fetched
        model = without_init(model)
    model = MODELS.build(model)
    if settings.random_weights:
        for name, teacher in model.teachers.items():
            teacher.checkpoint = Path(folder, f'{name}.pth')
            torch.manual_seed(settings.seed)
            torch.save(
                dict(state_dict=teacher.detector.state_dict()),
                teacher.checkpoint,
            )
    torch.manual_seed(settings.seed)
    try:
        model.init_weights()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{error} Times depend on shapes alone: --random-weights does '
            f'without.'
        ) from error
    return model


class TeacherPass:
    """The forward pass of each teacher, as far as its taps ask."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def ready(self, batch: Any) -> Callable[[], None]:
        """A pass on a batch that is preprocessed already, as in a step."""
        return partial(self, *self.arm.shown(batch))

    def __call__(self, images: Tensor, samples: list) -> None:
        model = self.arm.model
        with self.arm.precision:
            for teacher in model.teachers.values():
                if teacher.paths:
                    teacher.run(images, samples, model._pixels)


class _Terms:
    """Each term, forward and backward, on what the models returned."""

    def __init__(self, arm: Arm, clock: Clock) -> None:
        self.arm, self.clock = arm, clock

    def __call__(self, batches: Sequence[Any]) -> dict[str, float]:
        """Seconds a step by term."""
        spans: dict[str, list[Callable[[], float]]] = {}
        for batch in batches:
            with self._step(batch) as step:
                for name, term in self.arm.model.terms.items():
                    with self.clock.span() as span:
                        _once(term, step)
                    spans.setdefault(name, []).append(span)
        return {
            name: sum(span() for span in each) / len(batches)
            for name, each in spans.items()
        }

    def work(self, batch: Any) -> int:
        """Multiply-accumulates a step, of all terms."""
        with self._step(batch) as step:
            return sum(
                multiply_accumulates(partial(_once, term, step))
                for term in self.arm.model.terms.values()
            )

    @contextmanager
    def _step(self, batch: Any) -> Iterator[Any]:
        """What the terms see of a step, all models having run."""
        model = self.arm.model
        images, samples = self.arm.shown(batch)
        with self.arm.precision:
            paths = model._student_paths(list(model.terms))
            with counting(model) as copies, recording(model, paths) as record:
                losses = super(Distilling, model).loss(images, samples)
            step = model._step(
                record.mapped(_leaf),
                images,
                samples,
                copies,
                iteration=1,  # not one of those at which shares are weighed
                losses=dict(losses),
            )
            for name in model.teachers:
                step.teacher(name)
            yield step
        model.zero_grad(set_to_none=True)


def _once(term: nn.Module, step: Any) -> None:
    share = term(step)
    parts = share if isinstance(share, Mapping) else {'': share}
    total = sum(
        one for part, one in parts.items() if not part.startswith('watch_')
    )
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()


def _leaf(value: Tensor) -> Tensor:
    """What gradients reach and do not pass."""
    return value.detach().requires_grad_(value.requires_grad)


# ---------------------------------------------------------------------- data


def load(config: Config, settings: Settings) -> list[Any]:
    """Batches as a loader gives them, of data or of noise."""
    if settings.boxes is not None:
        return synthetic(config, settings)
    try:
        return load_batches(config, settings.batches, settings.seed)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{error} Put the data there, or take pictures of noise with '
            f'--synthetic BOXES.'
        ) from error


def synthetic(config: Config, settings: Settings) -> list[Any]:
    """Batches of noise, with as many boxes as one likes.

    Numbers of boxes are Poisson about ``settings.boxes``. There is a mask a
    box unless the config's own pipeline loads none.
    """
    dice = np.random.default_rng(settings.seed)
    height, width = settings.size
    known = _plain(config)
    classes = min(head_classes(known).values(), default=1)
    pipeline = config.get('train_dataloader')
    masked = pipeline is None or "'with_mask': True" in str(pipeline)
    batches = []
    for _ in range(settings.batches):
        inputs, samples = [], []
        for number in range(settings.batch_size):
            noise = dice.integers(0, 256, (3, height, width), np.uint8)
            inputs.append(torch.from_numpy(noise))
            count = int(dice.poisson(settings.boxes))
            centre = dice.uniform(0.1, 0.9, (count, 2))
            extent = dice.uniform(0.05, 0.2, (count, 2))
            boxes = np.concatenate(
                [centre - extent / 2, centre + extent / 2], 1
            )
            boxes = boxes.clip(0, 1) * [width, height, width, height]
            masks = np.zeros((count, height, width), np.uint8)
            for mask, corners in zip(masks, boxes.astype(int)):
                left, top, right, bottom = corners
                mask[top:bottom, left:right] = 1
            labels = dice.integers(classes, size=count)
            samples.append(annotated(boxes, labels, masks))
            if not masked:
                del samples[-1].gt_instances.masks
                del samples[-1].ignored_instances.masks
            samples[-1].set_metainfo(
                dict(img_id=number, img_path=f'{number}.jpg')
            )
        batches.append(dict(inputs=inputs, data_samples=samples))
    return batches


# --------------------------------------------------------------------- clock


class Clock:
    """Seconds of work: events on a GPU, the process's own on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith('cuda')

    @contextmanager
    def span(self) -> Iterator[Callable[[], float]]:
        """Time a block; on a GPU nothing waits for it until it is asked."""
        if self.cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()

            def seconds() -> float:
                events[1].synchronize()
                return events[0].elapsed_time(events[1]) / 1000

            yield seconds
            events[1].record()
            return
        ends: list[float] = [time.process_time()]
        yield lambda: ends[1] - ends[0]
        ends.append(time.process_time())


def _memory(arm: Arm, batch: Any, device: str) -> float:
    if device.startswith('cuda'):
        # The other arms' weights are there as well.
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        arm(batch)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    return saved(arm, batch) / MIB


def saved(arm: Arm, batch: Any) -> int:
    """Bytes that one step keeps for its backward pass, weights left out."""
    images, samples = arm.shown(batch)
    with arm.precision:
        return bytes_kept(
            lambda: arm.model.loss(images, samples), arm.model.parameters()
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# -------------------------------------------------------------------- report


def _facts(
    settings: Settings, batches: Sequence[Any], arms: Mapping[str, Arm]
) -> dict[str, Any]:
    samples = [one for batch in batches for one in batch['data_samples']]
    sizes = [
        tuple(one.shape[-2:]) for batch in batches for one in batch['inputs']
    ]
    model = arms['full'].model
    return dict(
        device=_device(settings.device),
        memory='peak above weights'
        if settings.device.startswith('cuda')
        else 'saved for backward',
        threads=settings.threads,
        precision='mixed' if settings.amp else 'float32',
        image=[int(x) for x in np.median(np.array(sizes), 0)],
        batch=len(batches[0]['data_samples']),
        boxes=float(np.mean([len(one.gt_instances) for one in samples])),
        data='noise' if settings.boxes is not None else 'the config’s own',
        weights='random' if settings.random_weights else 'checkpoint',
        student=model.student_class.__name__,
        teachers={
            name: type(one.detector).__name__
            for name, one in model.teachers.items()
        },
        blocks=settings.blocks,
        steps=settings.steps,
        versions=dict(
            mmkd=__version__, torch=torch.__version__, mmdet=mmdet.__version__
        ),
    )


def _device(device: str) -> str:
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    named = [one for one in lines if one.startswith('model name')]
    return named[0].partition(':')[2].strip() if named else 'CPU'


def report(timing: Timing) -> str:
    """What was measured, in lines."""
    plain = timing.median('plain')
    ratio, low, high = timing.of_plain()
    over, *ends = timing.of_floor()
    facts = timing.facts
    kind = facts['memory']
    lines = [
        f'{timing.config}: {facts["student"]} of '
        f'{", ".join(facts["teachers"].values()) or "no teacher"}',
        f'  {facts["device"]}, {facts["threads"]} threads, '
        f'{facts["precision"]}, images {facts["image"][0]} x '
        f'{facts["image"][1]}, batch {facts["batch"]}, {facts["boxes"]:.1f} '
        f'boxes an image ({facts["data"]}), {facts["weights"]} weights',
        '',
        f'  {"":10}{"ms a step":>12}{"of plain":>10}{kind + ", MiB":>26}',
    ]
    for arm in ARMS:
        memory = timing.memory.get(arm)
        lines.append(
            f'  {arm:10}{timing.median(arm):12.1f}'
            f'{timing.median(arm) / plain:10.3f}'
            + ('' if memory is None else f'{memory:26.1f}')
        )
    for term, taken in timing.terms.items():
        median = 1000 * statistics.median(taken)
        lines.append(f'  {"+ " + term:10}{median:12.1f}{median / plain:10.3f}')
    return '\n'.join(
        [
            *lines,
            '',
            f'  A step takes {ratio:.3f} times the student’s own '
            f'(95 %: {low:.3f} to {high:.3f}); the floor is '
            f'{timing.floor:.3f}.',
            f'  That is {over:.3f} times the floor '
            f'({ends[0]:.3f} to {ends[1]:.3f}): student, teacher, and '
            f'{100 * timing.own:.1f} % of the student’s multiplications for '
            f'the terms.',
        ]
    )


HEAD = """\
# Speed

What a training step costs with a teacher, relative to the student's own.
Written by `tools/benchmark.py --page`, from the measurements in
[speed/](speed/); times of two rows are to be compared within a row only.

*Plain* is the student without mmkd, *null* what a distiller adds of which
nothing counts, *teacher* its forward pass as far as the terms ask, *full* the
training as its config says. The *floor* is plain and teacher together, and
what the terms convolve and multiply themselves (adapters, generators,
affinities), at the pace of the student's own multiplications; no training that
shows each batch to its teacher can be much faster. Medians over blocks in
which the four take turns in an order drawn anew, on the same batches; in
brackets the 95 % interval of a bootstrap over blocks.
"""
#: Between them stand the tables of a page; what is around them may be edited.
MARKERS = ('<!-- timings:begin -->', '<!-- timings:end -->')
COLUMNS = (
    'image, batch, boxes',
    'plain, ms',
    'null, ms more',
    'teacher, ms',
    'full, ms',
    'full of plain',
    'terms’ own, %',
    'floor',
    'full of floor',
    'MiB, plain and full',
)


def page(folder: Path, path: Path | None = None) -> str:
    """The measurements of a folder as a page, by machine, versions and pair.

    Args:
        folder: Of the measurements.
        path: The page as it is; its own text is kept.
    """
    groups: dict[tuple[str, str], list[Timing]] = {}
    files = sorted(folder.glob('*.json'))
    for file in files:
        if file.name.endswith(WAYS):
            continue
        one = Timing(**read_json(file, 'benchmark', 'a timing', kind=dict))
        title = _circumstances(one.facts), _pair(one.facts)
        groups.setdefault(title, []).append(one)
    parts, before = [], ''
    for (where, pair), timings in sorted(groups.items()):
        if where != before:
            parts.append(f'{where}\n')
        before = where
        first = 'method' if pair else 'config'
        parts.append(
            '\n'.join(
                [
                    *([f'{pair}\n'] if pair else []),
                    f'| {" | ".join((first, *COLUMNS))} |',
                    f'|{"---|" * (len(COLUMNS) + 1)}',
                    *map(row, timings),
                    '',
                ]
            )
        )
    parts += _table_of_ways([x for x in files if x.name.endswith(WAYS)])
    begin, end = MARKERS
    head, tail = f'{HEAD}\n{begin}\n', f'{end}\n'
    text = path.read_text(encoding='utf-8') if path and path.exists() else ''
    if begin in text and end in text:
        head = text[: text.index(begin)] + f'{begin}\n'
        tail = text[text.index(end) :]
    return '\n'.join([head, *parts, tail])


def _table_of_ways(files: Sequence[Path]) -> list[str]:
    from mmkd.laboratory.ways import Ways, columns

    kept = [
        Ways(**read_json(one, 'benchmark', 'timings of a teacher', kind=dict))
        for one in files
    ]
    groups: dict[str, list[Ways]] = {}
    for one in kept:
        groups.setdefault(_circumstances(one.facts), []).append(one)
    return [
        '\n'.join(
            [
                f'Teachers. {where}\n',
                columns(),
                *(one.row() for one in group),
                '',
            ]
        )
        for where, group in groups.items()
    ]


def _pair(facts: Mapping[str, Any]) -> str:
    if 'plan' not in facts:
        return ''
    return '**{student}**, taught by **{teacher}**:'.format(**facts['plan'])


def _circumstances(facts: Mapping[str, Any]) -> str:
    versions = ', '.join(
        f'{name} {one}' for name, one in facts['versions'].items()
    )
    return (
        f'{facts["device"]}, {facts["threads"]} threads, '
        f'{facts["precision"]}, {facts["weights"]} weights, data: '
        f'{facts["data"]}; {facts["blocks"]} blocks of {facts["steps"]} '
        f'steps; memory: {facts["memory"]}; {versions}.'
    )


def row(one: Timing) -> str:
    """A line of the table."""
    ratio, low, high = one.of_plain()
    over, least, most = one.of_floor()
    more, *ends = one.null_more()
    facts, plain = one.facts, one.median('plain')
    cells = [
        facts.get('plan', dict(method=one.config))['method'],
        f'{facts["image"][0]} x {facts["image"][1]}, {facts["batch"]}, '
        f'{facts["boxes"]:.0f}',
        f'{plain:.0f}',
        f'{more:+.1f} ({ends[0]:+.1f} to {ends[1]:+.1f})',
        f'{one.median("teacher"):.0f}',
        f'{one.median("full"):.0f}',
        f'{ratio:.2f} ({low:.2f} to {high:.2f})',
        f'{100 * one.own:.1f}',
        f'{one.floor:.2f}',
        f'{over:.2f} ({least:.2f} to {most:.2f})',
        f'{one.memory["plain"]:.0f}, {one.memory["full"]:.0f}',
    ]
    return f'| {" | ".join(cells)} |'


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``benchmark.py``."""
    options = _parser().parse_args(arguments)
    settings = Settings(
        blocks=options.blocks,
        steps=options.steps,
        warm_up=options.warm_up,
        batches=options.batches,
        device=options.device or get_device(),
        threads=options.threads,
        amp=options.amp,
        boxes=options.synthetic,
        size=tuple(options.size),
        batch_size=options.batch_size,
        random_weights=options.random_weights,
        seed=options.seed,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with trusting(*options.trust_checkpoint):
            _measure_all(options, settings)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _measure_all(options: argparse.Namespace, settings: Settings) -> None:
    for name, config, about in _configs(options):
        found = measure(config, settings, name, **about)
        print(report(found), flush=True)
        _keep(found.as_dict(), options.out / f'{name}.json')
        if options.ways:
            from mmkd.laboratory.ways import measure_ways

            with preserved(settings.seed), quiet(), _no_collection():
                ways = measure_ways(config, settings, name, found.facts)
            print(f'\n{ways.report()}\n', flush=True)
            _keep(ways.as_dict(), options.out / f'{name}{WAYS}')
        if options.page:
            text = page(options.out, options.page)
            with whole(options.page) as part:
                part.write_text(text, encoding='utf-8')
        if options.trace:
            trace(config, settings, options.out / f'{name}.trace.json')


def _keep(found: Mapping[str, Any], path: Path) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(found, indent=1) + '\n')


def _configs(
    options: argparse.Namespace,
) -> Iterator[tuple[str, Config, dict[str, Any]]]:
    """Names, configs, and what they are: those given, or plans for them."""
    if options.teacher is None:
        if options.teacher_checkpoint or options.methods:
            raise ValueError(
                'benchmark: --teacher-checkpoint and --methods say how a '
                'teacher teaches, but there is none. Name its config: '
                '--teacher mmdet::folder/file.py'
            )
        for path in options.configs:
            yield Path(path).stem, read_config(path, 'benchmark'), {}
        return
    teacher = Path(options.teacher).stem
    for path in options.configs:
        student = Path(path).stem
        for method in options.methods or [DEFAULT]:
            with quiet():
                planned = plan(
                    path, options.teacher, options.teacher_checkpoint, method
                )
            about = dict(student=student, teacher=teacher, method=method)
            name = f'{student}-from-{teacher}_{method}'
            yield name, planned.config, dict(plan=about)


def trace(config: Config, settings: Settings, path: Path) -> None:
    """Write one full step as ``torch.profiler`` sees it, for a browser."""
    init_default_scope(config.get('default_scope', 'mmdet'))
    with preserved(settings.seed), quiet():
        arm = _arms(config, settings)['full']
        batch = load(config, settings)[0]
        arm(batch)
        with torch.profiler.profile() as profile:
            arm(batch)
    profile.export_chrome_trace(str(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='benchmark.py',
        description='What a distillation costs, relative to the student '
        'alone: time and memory of a step, of the teacher, of each term.',
    )
    parser.add_argument(
        'configs',
        nargs='+',
        metavar='CONFIG',
        help='distillation configs; students beside --teacher',
    )
    parser.add_argument(
        '--teacher',
        metavar='CONFIG',
        help='time its methods for the students, as mmkd train plans them',
    )
    parser.add_argument('--teacher-checkpoint', metavar='FILE')
    parser.add_argument(
        '--methods',
        nargs='+',
        metavar='METHOD',
        help='as --method of mmkd train',
    )
    whole_numbers = dict(blocks=10, steps=4, warm_up=4, batches=8, threads=1)
    for name, value in whole_numbers.items():
        parser.add_argument(
            f'--{name.replace("_", "-")}', type=int, default=value
        )
    parser.add_argument('--device', help='cuda where there is one')
    parser.add_argument('--amp', action='store_true')
    parser.add_argument(
        '--synthetic',
        type=float,
        metavar='BOXES',
        help="pictures of noise with so many boxes, not the config's data",
    )
    parser.add_argument(
        '--size', type=int, nargs=2, default=(800, 1344), metavar='PIXELS'
    )
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument(
        '--random-weights',
        action='store_true',
        help='teachers without their checkpoints, and no downloads',
    )
    add_trust_option(parser)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=FOLDER)
    parser.add_argument(
        '--page',
        type=Path,
        help='table of all measurements in --out, in a page whose other text '
        'is kept',
    )
    parser.add_argument(
        '--ways',
        action='store_true',
        help='also time the teacher whole, as far as the taps ask, and in the '
        'ways of fast=',
    )
    parser.add_argument(
        '--trace', action='store_true', help='write a step of torch.profiler'
    )
    return parser

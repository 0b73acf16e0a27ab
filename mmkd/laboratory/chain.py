"""The command that distils through a chain of models of falling size.

Between a teacher and a much smaller student stand models of sizes between.
Each learns from the one before it, the first from the teacher, by the same
distillation config; that of the student ends the chain. With ``--chain`` the
models are named, with ``--candidates`` those are taken whose numbers of
parameters are nearest to a geometric series, and the chain grows link by link
as long as the student gains.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from mmkd.analysis.average_precision import ImageMatches
from mmkd.analysis.cost import parameters, quiet
from mmkd.checks import check_positive
from mmkd.compat.checkpoint import add_trust_option, trusting
from mmkd.configs import OPTIONAL_KEYS, OWN_KEYS, read_config, student_config
from mmkd.laboratory.compare import sole_user
from mmkd.laboratory.digests import code_digest, data_digest, file_digest
from mmkd.laboratory.run_memory import (
    PastRun,
    RunMemory,
    configuration_of,
    configure,
    meta_features,
)
from mmkd.laboratory.runs import Run, carry_out
from mmkd.registry import DETECTORS

FOLDER = Path('work_dirs/chain')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``chain.py``.

    Args:
        arguments: Words of the command line; those of the process if None.

    Returns:
        Exit status: 0, 1 after a failure or a message on what to do, 130
        after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    # mmdet 3.3.0 warns of its own attributes at each detector.
    warnings.simplefilter('ignore')
    os.environ.setdefault('PYTHONWARNINGS', 'ignore')
    try:
        with (
            sole_user(options.work_dir),
            trusting(*options.trust_checkpoint),
        ):
            chain = Chain(
                Model(options.teacher),
                options.checkpoint,
                Model(options.student),
                options.work_dir,
                seed=options.seed,
                jobs=options.jobs,
                eps=options.eps,
                memory=options.memory,
                suggested=options.suggest,
            )
            if options.chain:
                best = chain.walk([Model(one) for one in options.chain])
            else:
                best = chain.grow(
                    [Model(one) for one in options.candidates],
                    options.max_links,
                )
    except KeyboardInterrupt:
        print('\nStopped. The same command goes on from here.')
        return 130
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f'chain.py: {error}', file=sys.stderr)
        return 1
    print(f'Best: {" -> ".join(best.names)}, AP {best.ap:.1f}')
    print(f'  {best.checkpoint}')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='chain.py',
        description='Distils a teacher into a student through models of '
        'sizes between. What is trained is not trained again.',
    )
    parser.add_argument('teacher', help="the teacher's config")
    parser.add_argument('checkpoint', help='its weights', type=Path)
    parser.add_argument(
        'student', help='distillation config of the student, with one teacher'
    )
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument(
        '--chain',
        nargs='+',
        metavar='CONFIG',
        help='the models between, from large to small',
    )
    models.add_argument(
        '--candidates',
        nargs='+',
        metavar='CONFIG',
        help='models to choose those between from, by their size',
    )
    parser.add_argument(
        '--eps',
        type=float,
        default=0.01,
        help='relative gain below which no link is added (default: 0.01)',
    )
    parser.add_argument('--max-links', type=int, default=4, metavar='N')
    parser.add_argument(
        '--memory', type=Path, metavar='FILE', help='JSON file of past runs'
    )
    parser.add_argument(
        '--suggest',
        action='store_true',
        help='set the training as past runs in --memory suggest',
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--work-dir', type=Path, default=FOLDER)
    add_trust_option(parser)
    return parser


# ------------------------------------------------------------------- the sizes


def sizes(teacher: float, student: float, links: int) -> list[float]:
    r"""Sizes of all models of a chain, teacher and student included.

    .. math:: |\theta_i| = |\theta_T| \, r^{i / L}, \quad
              r = |\theta_S| / |\theta_T|

    Args:
        teacher, student: Their numbers of parameters.
        links: L, the number of trainings.

    Raises:
        ValueError: If the student is not the smaller one.

    Example:
        >>> [round(one) for one in sizes(80, 10, 3)]
        [80, 40, 20, 10]
    """
    check_positive('A chain', links=links, student=student)
    if student >= teacher:
        raise ValueError(
            f'A chain leads from a large model to a small one, but the '
            f'student has {student:.0f} parameters and the teacher '
            f'{teacher:.0f}. Choose a smaller student.'
        )
    ratio = student / teacher
    return [teacher * ratio ** (place / links) for place in range(links + 1)]


def nearest(known: Mapping[str, int], wanted: Sequence[float]) -> list[str]:
    """The models whose sizes are nearest, by their ratio, each taken once.

    Args:
        known: Numbers of parameters by name.
        wanted: Sizes from large to small.

    Returns:
        Names, from large to small; fewer than asked if there are not enough.

    Example:
        >>> nearest(dict(a=70, b=45, c=18, d=12), [40, 20])
        ['b', 'c']
    """
    left = dict(known)
    found = []
    for size in wanted:
        if left:
            name = min(left, key=lambda x: abs(math.log(left[x] / size)))
            found.append(name)
            del left[name]
    return sorted(found, key=lambda name: -known[name])


class Model:
    """A detector's config.

    Args:
        config: Its path.
    """

    def __init__(self, config: str | Path) -> None:
        self.config = str(config)
        self.settings = read_config(config, 'chain.py')
        self.name = Path(self.config).stem

    @cached_property
    def plain(self) -> ConfigDict:
        """Its ``model``, without any distillation."""
        return student_config(self.settings.model)

    @cached_property
    def detector(self):
        """Built, with random weights."""
        init_default_scope(self.settings.get('default_scope', 'mmdet'))
        with redirect_stdout(None), quiet():
            return DETECTORS.build(self.plain)

    @cached_property
    def size(self) -> int:
        """Its number of parameters."""
        return parameters(self.detector)


# ------------------------------------------------------------------- the chain


@dataclass(frozen=True)
class Walk:
    """A chain that was gone through.

    Attributes:
        names: Its models, from teacher to student.
        ap: Validation AP of the student, in percent.
        checkpoint: The student's.
    """

    names: tuple[str, ...]
    ap: float
    checkpoint: Path


class Chain:
    """Trainings that lead from a teacher to a student.

    A link is known by its config, its code, its data and all links before it,
    so that chains which begin alike share what they have in common.

    Args:
        teacher: The first model.
        checkpoint: Its weights.
        student: The last one, whose config distils from one teacher.
        folder: Where all is written.
        seed: Of every training.
        jobs: Trainings at a time.
        eps: Relative gain below which no link is added.
        memory: File of past runs, read and added to; none if None.
        suggested: Whether trainings are set as the past runs suggest.

    Raises:
        ValueError: If the student's config has not exactly one teacher, or
            the student is not smaller.
        FileNotFoundError: If the teacher has no weights.

    Reference:
        Haase and da Silva, "HPM-KD", arXiv:2512.09886, known second-hand: the
        sizes, eps = 0.01, about twenty numbers that describe data and models,
        a regression over more than 50 runs and else the mean of the 5 most
        alike. There a chain ends when a link is not better than the one
        before it, although each is smaller; that what counts is the student
        at its end, and that the student without anything between is the first
        to be compared, is ours. So are the numbers themselves, and that
        nothing is ever dropped from the memory. The paper's check of a
        suggestion by ten epochs is left out.
    """

    def __init__(
        self,
        teacher: Model,
        checkpoint: Path,
        student: Model,
        folder: Path,
        seed: int = 0,
        jobs: int = 1,
        eps: float = 0.01,
        memory: Path | None = None,
        suggested: bool = False,
    ) -> None:
        check_positive('A chain', eps=eps, jobs=jobs)
        if not checkpoint.is_file():
            raise FileNotFoundError(
                f'The teacher of the chain has no weights {checkpoint}. Name '
                f'a file, as the second word.'
            )
        teachers = student.settings.model.get('teachers') or {}
        if len(teachers) != 1:
            raise ValueError(
                f'Each model of a chain learns from the one before it, but '
                f'{student.config} has {len(teachers)} teachers. Name a '
                f"config of type='mmkd.Distiller' with one."
            )
        if suggested and memory is None:
            raise ValueError(
                'Only past runs can suggest a configuration: add '
                '--memory FILE.'
            )
        self.teacher, self.checkpoint = teacher, checkpoint
        self.student, self.folder = student, folder
        self.seed, self.jobs, self.eps = seed, jobs, eps
        (self.role,) = teachers
        sizes(teacher.size, student.size, 1)  # raises if it is not smaller
        self.memory = None if memory is None else RunMemory(memory)
        self.settings = student.settings
        if suggested:
            found = self.memory.suggest(self.features)
            if found is None:
                print('There are no past runs; the config stays as it is.')
            else:
                print(f'Past runs suggest: {_shown(found)}')
                self.settings = configure(student.settings, found)
                self.eps = found.get('eps', eps)

    @cached_property
    def features(self) -> dict[str, float]:
        """What data and models are like."""
        dataset = self.student.settings.train_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        file = Path(dataset.get('data_root') or '', dataset['ann_file'])
        return meta_features(
            json.loads(file.read_text(encoding='utf-8')),
            self.teacher.detector,
            self.student.detector,
        )

    def walk(self, between: Sequence[Model]) -> Walk:
        """Go through a chain whose models are named.

        Raises:
            ValueError: If there is none between, or sizes do not fall.
        """
        if not between:
            raise ValueError(
                'A chain has a model between teacher and student; without '
                'one it is the distillation config alone: tools/train.py.'
            )
        models = [self.teacher, *between, self.student]
        for one, other in pairwise(models):
            if other.size >= one.size:
                raise ValueError(
                    f'Models of a chain become smaller, but {other.name} has '
                    f'{other.size} parameters after {one.name} with '
                    f'{one.size}. Name them from large to small.'
                )
        runs = self.links(between)
        carry_out(runs, self.jobs)
        return self._walked(between, runs)

    def grow(self, candidates: Sequence[Model], most: int) -> Walk:
        """Add links as long as the student gains.

        Args:
            candidates: What may stand between; only what is smaller than the
                teacher and larger than the student does.
            most: Trainings of the longest chain.

        Returns:
            The best chain, which may have nothing between.

        Raises:
            ValueError: If no candidate fits.
        """
        low, high = self.student.size, self.teacher.size
        fitting = {x.config: x for x in candidates if low < x.size < high}
        if not fitting or most < 2:
            raise ValueError(
                f'A chain has a model between teacher ({high} parameters) '
                f'and student ({low}). Name --candidates of such sizes, and '
                f'--max-links of 2 or more.'
            )
        known = {name: one.size for name, one in fitting.items()}
        best = None
        for count in range(1, min(most, len(fitting) + 1) + 1):
            wanted = sizes(high, low, count)[1:-1]
            between = [fitting[name] for name in nearest(known, wanted)]
            runs = self.links(between)
            carry_out(runs, self.jobs)
            found = self._walked(between, runs)
            print(f'{" -> ".join(found.names)}: AP {found.ap:.1f}')
            if best is not None and not gains(best.ap, found.ap, self.eps):
                return max(best, found, key=lambda one: one.ap)
            best = found
        return best

    def links(self, between: Sequence[Model]) -> list[Run]:
        """The trainings of a chain, each needing the one before it."""
        runs: list[Run] = []
        config, weights = self.teacher.config, self.checkpoint
        before = file_digest(self.checkpoint)
        for model in (*between, self.student):
            settings = self.link(model, config, weights)
            keys = dict(code=code_digest(settings), teacher=before)
            keys |= data_digest(settings)
            run = Run(
                model.name,
                self._write(model.name, settings, keys),
                self.folder,
                options=(f'randomness.seed={self.seed}',),
                keys=keys,
                needs=tuple(runs[-1:]),
            )
            before = run.fingerprint()
            run.folder = self.folder / f'{model.name}-{before}'
            runs.append(run)
            config, weights = str(run.config), run.final
        return runs

    def link(self, model: Model, config: str, weights: Path) -> Config:
        """Config of a training: the student's, of another model.

        Args:
            model: Who learns.
            config, weights: Of the one it learns from.
        """
        settings = copy.deepcopy(self.settings)
        own = (*OWN_KEYS, *OPTIONAL_KEYS)
        kept = {
            key: settings.model[key] for key in own if key in settings.model
        }
        plain = ConfigDict(model.plain)
        teacher = ConfigDict(kept['teachers'][self.role])
        teacher.update(
            config=os.path.abspath(config) if '::' not in config else config,
            checkpoint=os.path.abspath(weights),
        )
        settings.model = ConfigDict(
            {
                **plain,
                **kept,
                'type': 'mmkd.Distiller',
                'student': plain.type,
                'teachers': {self.role: teacher},
            }
        )
        # What decides between chains is not the test set, where there is one
        # for that.
        if settings.get('val_dataloader'):
            settings.test_dataloader = settings.val_dataloader
            settings.test_evaluator = settings.val_evaluator
        return settings

    def _write(
        self, name: str, settings: Config, keys: Mapping[str, str]
    ) -> Path:
        """A complete config, under the digest of what came before it."""
        folder = self.folder / 'configs'
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f'{name}-from-{keys["teacher"]}.py'
        text = settings.pretty_text
        if not path.is_file() or path.read_text(encoding='utf-8') != text:
            path.write_text(text, encoding='utf-8')
        return path

    def _walked(self, between: Sequence[Model], runs: Sequence[Run]) -> Walk:
        for run in runs:
            if not run.done:
                raise RuntimeError(run.reason or f'{run.name} is not done')
        names = (self.teacher.name, *(one.name for one in runs))
        found = Walk(names, validation_ap(runs[-1]), runs[-1].final)
        if self.memory is not None:
            self.memory.add(
                PastRun(
                    self.features,
                    configuration_of(self.settings, self.eps),
                    found.ap,
                    names,
                )
            )
        return found


def gains(before: float, after: float, eps: float) -> bool:
    """Whether a further link is worth it.

    Example:
        >>> gains(40.0, 40.3, eps=0.01), gains(40.0, 40.5, eps=0.01)
        (False, True)
    """
    return after > before and after - before >= eps * before


def validation_ap(run: Run) -> float:
    """AP of a run's detections, in percent."""
    evaluator = run.settings.test_evaluator
    matches = ImageMatches.from_files(evaluator.ann_file, run.predictions)
    return 100 * max(matches.ap(), 0.0)


def _shown(configuration: Mapping[str, float]) -> str:
    return ', '.join(f'{name} {x:.3g}' for name, x in configuration.items())

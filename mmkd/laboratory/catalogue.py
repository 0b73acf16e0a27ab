"""The command that trains every tiny config and says what its terms did.

A tiny config teaches a detector of a few thousand weights on generated
pictures, so that each method of the catalogue is seen to learn in seconds. The
command draws the pictures, trains the teachers and every config for several
seeds, and writes one page. Between the two it runs what a config asks of a
teacher before the training, under ``prepare``.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import math
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mmkd.build import find
from mmkd.checks import check_name
from mmkd.configs import read_config
from mmkd.datasets.shapes import TINY, prepare_shapes
from mmkd.laboratory.compare import check_seeds, sole_user
from mmkd.laboratory.digests import code_digest, data_digest, file_digest
from mmkd.laboratory.preparation import preparations
from mmkd.laboratory.results import versions
from mmkd.laboratory.runs import DONE, Run, carry_out

FOLDER = Path('work_dirs/tiny')
PAGE = Path('docs/tiny.md')
SEEDS = (0, 1, 2)
#: Processor time that a training may take, from start to end.
SECONDS = 60.0
#: A training is ended after so many minutes, whatever the machine is at.
TIMEOUT = 15.0
#: Keys of the log that are a term's share of the loss.
SHARE = 'loss_kd_'
#: What is looked at where a config distils by other data alone.
WHOLE = 'loss'

NOT_RUN, PASSED, FAILED = 'not run', 'passed', 'FAILED'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``test_all.py``.

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
        paths = {path.stem: path for path in tiny_configs()}
        for name in options.configs:
            check_name('test_all.py', 'tiny config', name, paths)
        check_seeds('test_all.py', options.seeds)
        with sole_user(options.work_dir):
            asked = options.configs or list(paths)
            trials = [
                Trial(path, options.work_dir, options.seeds)
                for path in paths.values()
            ]
            if not options.report_only:
                train([x for x in trials if x.name in asked], options.jobs)
            findings = [trial.finding() for trial in trials]
    except KeyboardInterrupt:
        print('\nStopped. The same command goes on from here.')
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f'test_all.py: {error}', file=sys.stderr)
        return 1
    options.page.parent.mkdir(parents=True, exist_ok=True)
    text = page(findings, options.seeds)
    options.page.write_text(text, encoding='utf-8')
    print(f'  {options.page}')
    failed = [
        one.path.stem
        for one in findings
        if one.path.stem in asked and one.verdict == FAILED
    ]
    if failed:
        print(f'test_all.py: failed: {", ".join(failed)}', file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='test_all.py',
        description='Trains every tiny config for several seeds and writes '
        'what its terms did. What is done is not done again.',
    )
    parser.add_argument(
        'configs',
        nargs='*',
        metavar='NAME',
        help='tiny configs to train, for instance pkd_tiny (default: all)',
    )
    parser.add_argument(
        '--seeds', nargs='+', type=int, default=list(SEEDS), metavar='SEED'
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=min(2, os.cpu_count() or 1),
        help='trainings at a time, one thread each',
    )
    parser.add_argument('--work-dir', type=Path, default=FOLDER)
    parser.add_argument('--page', type=Path, default=PAGE)
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='write the page of what is there, train nothing',
    )
    return parser


# ---------------------------------------------------------------- the configs


def tiny_configs(root: str | Path = '.') -> list[Path]:
    """The tiny configs below a folder, by path.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(Path(root).glob('configs/*/tiny/*_tiny.py'))
    if not found:
        raise FileNotFoundError(
            f'there is no configs/*/tiny/*_tiny.py below '
            f'{Path(root).resolve()}. Type the command in the root of the '
            f'repository.'
        )
    return found


def sample(paths: Iterable[Path], key: str, count: int = 2) -> list[Path]:
    """Some of the configs, others for another key, each as likely.

    Args:
        paths: The configs.
        key: Any text, for instance a commit or a day.
        count: How many.

    Example:
        >>> paths = [Path(name) for name in 'abcdef']
        >>> sample(paths, 'monday') == sample(paths[::-1], 'monday')
        True
    """

    def place(path: Path) -> str:
        return hashlib.sha256(f'{key} {path.stem}'.encode()).hexdigest()

    return sorted(paths, key=place)[:count]


def shares(terms: Mapping[str, Mapping], group: str = '') -> list[str]:
    """Names that terms log under, those in groups one by one.

    Example:
        >>> shares({'pkd': {}, 'both': {'terms': {'at': {}, 'cwd': {}}}})
        ['pkd', 'both_at', 'both_cwd']
    """
    return [
        name
        for key, term in terms.items()
        for name in (
            shares(term['terms'], f'{group}{key}_')
            if 'terms' in term
            else [f'{group}{key}']
        )
    ]


def rising(terms: Mapping[str, Mapping], group: str = '') -> list[str]:
    """Patterns of the shares that begin near 0, as their terms say.

    Example:
        >>> rising({'own': {'terms': {'one': {'type': 'mmkd.OneTerm'}}}})
        ['own_one_distil']
    """
    names = []
    for key, term in terms.items():
        names += rising(term.get('terms', {}), f'{group}{key}_')
        if 'type' in term:
            kind = find(term, f'The term {key!r}')
            names += [f'{group}{key}_{part}' for part in kind.from_nothing]
    return names


# --------------------------------------------------------------- the trainings


class Training(Run):
    """A run that ends with its last checkpoint; no test follows."""

    @property
    def done(self) -> bool:
        return self.final.is_file() and not self.changed()

    @property
    def failed(self) -> bool:
        """Whether it ended badly; one that the reader broke off did not."""
        return (self.folder / 'failed').is_file() and not self.changed()

    def start(self) -> None:
        (self.folder / 'failed').unlink(missing_ok=True)
        super().start()

    def _end(self, status: str, reason: str | None = None) -> None:
        super()._end(status, reason)
        if status != DONE:
            (self.folder / 'failed').write_text(str(reason))

    def poll(self) -> bool:
        if self._process is not None and self._process.returncode is None:
            ended, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if ended:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                seconds = usage.ru_utime + usage.ru_stime
                (self.folder / 'processor').write_text(str(seconds))
        if (
            self._process is not None
            and self._process.returncode is not None
            and self.done
        ):
            self._end(DONE)
        return super().poll()

    def processor_seconds(self) -> float:
        """What :meth:`poll` has noted; of a resumed run the last part."""
        return float((self.folder / 'processor').read_text())


class Trial:
    """A tiny config, its teachers, and a training for each seed.

    Its teachers are those of ``model.teachers`` and those that the commands
    of ``prepare`` ask.

    Args:
        path: The config.
        folder: Where everything is written.
        seeds: The seeds.

    Raises:
        ValueError: If a teacher's training ends with another file than the
            config reads, or ``prepare`` is no list of commands.
    """

    def __init__(self, path: Path, folder: Path, seeds: Sequence[int]) -> None:
        self.path, self.folder, self.seeds = path, folder, seeds
        self.name = path.stem
        config = read_config(path)
        terms = config.model.get('terms')
        self.terms = [WHOLE] if terms is None else shares(terms)
        self.rising = rising(terms or {})
        self.preparations = preparations(config, str(path))
        self._teachers = {
            Path(one.config): Path(one.checkpoint)
            for one in (
                *config.model.get('teachers', {}).values(),
                *self.preparations,
            )
        }
        for config, file in self._teachers.items():
            final = Training(config.stem, config, file.parent).final
            if final != file:
                raise ValueError(
                    f'{path} reads {file}, but {config} ends with {final}. '
                    f'Let them agree.'
                )

    def teachers(self) -> list[Training]:
        """Their trainings."""
        return [
            _training(config, file.parent)
            for config, file in self._teachers.items()
        ]

    def runs(self) -> list[Training]:
        """One training a seed; none before its teachers are trained and
        have said what they are asked."""
        teachers = self.teachers()
        if not all(one.done for one in (*teachers, *self.preparations)):
            return []
        keys = {one.folder.name: file_digest(one.final) for one in teachers}
        keys |= {str(one.out): one.digest() for one in self.preparations}
        return [
            _training(
                self.path, self.folder / self.name / f'seed{seed}', seed, keys
            )
            for seed in self.seeds
        ]

    def finding(self) -> Finding:
        """What its trainings have shown up to now."""
        runs = self.runs()
        outcomes = [
            Outcome.of(run.log(), run.processor_seconds(), self.terms)
            for run in runs
            if run.done
        ]
        problems = ['a training stopped early' for run in runs if run.failed]
        for outcome in outcomes:
            problems += outcome.problems(self.terms, self.rising)
        return Finding(
            self.path,
            outcomes,
            list(dict.fromkeys(problems)),
            complete=len(outcomes) == len(self.seeds),
            rising=self.rising,
        )


def _training(
    config: Path,
    folder: Path,
    seed: int | None = None,
    keys: Mapping[str, str] | None = None,
) -> Training:
    settings = read_config(config)
    data = data_digest(settings)
    return Training(
        name=folder.name if seed is None else f'{config.stem}, seed {seed}',
        config=config,
        folder=folder,
        options=() if seed is None else (f'randomness.seed={seed}',),
        guess=0.15,
        keys=dict(keys or {}, code=code_digest(settings), data=data['train']),
        timeout=60 * TIMEOUT,
    )


def train(trials: Sequence[Trial], jobs: int) -> None:
    """Draw the pictures, then train whatever is not done.

    Between teachers and students each command of ``prepare`` runs once.

    Args:
        trials: The configs to train.
        jobs: Trainings at a time.

    Raises:
        RuntimeError: If a teacher cannot be trained, or a command fails.
    """
    prepare_shapes(**TINY)
    teachers = {
        run.folder: run for trial in trials for run in trial.teachers()
    }
    carry_out(list(teachers.values()), jobs)
    for run in teachers.values():
        if not run.done:
            raise RuntimeError(run.reason)
    asked = [one for trial in trials for one in trial.preparations]
    for preparation in dict.fromkeys(asked):
        preparation.carry_out()
    carry_out(
        [run for trial in trials for run in trial.runs()], jobs, ended=_explain
    )


def _explain(run: Run) -> None:
    if run.reason:
        print(run.reason, file=sys.stderr)


# ---------------------------------------------------------------- the outcomes


@dataclass(frozen=True)
class Outcome:
    """What one training's log says of its terms.

    Attributes:
        shares: Mean of each share of the loss over the first and over the
            last quarter of its logged values.
        finite: Whether every logged number is finite.
        seconds: Processor time from start to end, since on a machine that
            does other work the clock says little.
    """

    shares: Mapping[str, tuple[float, float]]
    finite: bool
    seconds: float

    @classmethod
    def of(
        cls,
        log: Iterable[Mapping],
        seconds: float,
        terms: Sequence[str] = (),
    ) -> Outcome:
        """Read a log.

        A share that is 0 in a line was idle and says nothing. One whose
        weight follows from gradients is divided by it, because the weight
        grows as the term is fulfilled.

        Args:
            log: Its training lines, in order.
            seconds: Processor time of the training.
            terms: Names of the terms; ``loss`` alone, where there are none,
                stands for the loss as a whole.

        Example:
            >>> log = [{'loss_kd_at': value} for value in (8, 6, 5, 4)]
            >>> Outcome.of(log, 9.0).shares
            {'at': (8.0, 4.0)}
        """
        values: dict[str, list[float]] = {}
        finite = True
        for line in log:
            for key, value in line.items():
                if isinstance(value, (int, float)):
                    finite &= math.isfinite(value)
                whole = key == WHOLE and WHOLE in terms
                if (key.startswith(SHARE) or whole) and value:
                    name = key.removeprefix(SHARE)
                    weight = _weight(line, name)
                    values.setdefault(name, []).append(value / weight)
        quarters = {
            name: (
                fmean(found[: _quarter(found)]),
                fmean(found[-_quarter(found) :]),
            )
            for name, found in values.items()
        }
        return cls(quarters, finite, seconds)

    def problems(
        self, terms: Iterable[str], rising: Collection[str] = ()
    ) -> list[str]:
        """What is not as it should be.

        Args:
            terms: Names that must be in the log, or begin one that is.
            rising: Patterns of shares that begin near 0 and need not fall,
                but are logged and above 0.
        """
        found = [] if self.finite else ['a number is not finite']
        found += [
            f'{name} is not logged'
            for name in terms
            if not any(_begins(key, name) for key in self.shares)
        ]
        found += [
            f'{name} is not logged'
            for name in rising
            if not fnmatch.filter(self.shares, name)
        ]
        found += [
            f'{name} does not fall'
            for name, (first, last) in self.shares.items()
            if not _matches(name, rising) and not last < first
        ]
        found += [
            f'{name} is not above 0'
            for name, quarters in self.shares.items()
            if _matches(name, rising) and not all(one > 0 for one in quarters)
        ]
        if self.seconds >= SECONDS:
            found.append(f'longer than {SECONDS:.0f} s')
        return found


def _matches(share: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(share, one) for one in patterns)


def _begins(share: str, term: str) -> bool:
    return f'{share}_'.startswith(f'{term}_')


def _quarter(values: Sequence[float]) -> int:
    return max(len(values) // 4, 1)


def _weight(line: Mapping, name: str) -> float:
    """The weight by gradient of a share; 1 where it has none.

    :class:`mmkd.terms.balanced.BalancedTerm` logs that of the term ``at`` in
    the group ``both`` as ``kd_both_weight_at``.
    """
    parts = name.split('_')
    for end in range(1, len(parts)):
        group = '_'.join(parts[:end])
        for last in range(len(parts), end, -1):
            term = '_'.join(parts[end:last])
            weight = line.get(f'kd_{group}_weight_{term}')
            if weight:
                return weight
    return 1.0


@dataclass(frozen=True)
class Finding:
    """What the trainings of a tiny config have shown.

    Attributes:
        path: The config.
        outcomes: Of the seeds that were trained to the end.
        problems: What speaks against it, each once.
        complete: Whether every seed was.
        rising: Patterns of its shares that begin near 0.
    """

    path: Path
    outcomes: Sequence[Outcome]
    problems: Sequence[str]
    complete: bool
    rising: Collection[str] = ()

    @property
    def verdict(self) -> str:
        if self.problems:
            return FAILED
        return PASSED if self.complete else NOT_RUN


# -------------------------------------------------------------------- the page

HEAD = """\
# Tiny trainings

<!-- Written by `make test-all`. -->

Every method of the catalogue has a tiny config, `configs/*/tiny/*_tiny.py`: a
ResNet-18 of an eighth of the width learns from one twice as wide, for
160 steps of 8 generated pictures of 96 pixels, on one thread of a CPU. What is
checked is that the method does its work, not that it helps: every term is
logged and finite, the mean of its last quarter is below that of its first in
every seed, and a training takes less than a minute of processor time, start
and end included. Nothing here is to be read as a comparison of methods; for
that there is [the laboratory](laboratory.md).

Two kinds are judged otherwise. Where the teacher speaks before the training
and the student learns by other data, there is no term: what the config names
under `prepare` is run first, and the `loss` of the detector is what must fall.
A share *from 0* compares parts of one model that begin alike; it rises while
they learn, and must be above 0.

`make test-all` repeats it and can be stopped at any time; a training is done
again when its code, its config, its pictures, its teacher or what that has
said before change. A config that is *not run* has not been trained with the
present code. *First* and
*last* are means over seeds {seeds}; shares that are weighed by gradients are
shown without that weight.
"""


def page(findings: Sequence[Finding], seeds: Sequence[int]) -> str:
    """The text of ``docs/tiny.md``.

    Args:
        findings: Of every tiny config.
        seeds: Their seeds.
    """
    verdicts = [one.verdict for one in findings]
    counts = ', '.join(
        f'{verdicts.count(one)} {one}'
        for one in (PASSED, FAILED, NOT_RUN)
        if one in verdicts
    )
    table = [
        '| config | share of the loss | first | last | seconds | |',
        '|---|---|---|---|---|---|',
        *(row for one in findings for row in _rows(one)),
    ]
    said = ', '.join(f'{name} {value}' for name, value in versions().items())
    parts = [
        HEAD.format(seeds=', '.join(map(str, seeds))),
        f'{len(findings)} configs: {counts}.',
        '\n'.join(table),
        f'({said})',
    ]
    return '\n\n'.join(part.strip() for part in parts) + '\n'


def _rows(finding: Finding) -> Iterator[str]:
    """One for each share of the loss; the first has what holds for all."""
    link = f'[{finding.path.stem}](../{finding.path.as_posix()})'
    verdict = finding.verdict
    if finding.problems:
        verdict += f': {", ".join(finding.problems)}'
    found: dict[str, list[tuple[float, float]]] = {}
    for outcome in finding.outcomes:
        for name, quarters in outcome.shares.items():
            found.setdefault(name, []).append(quarters)
    if not found:
        yield f'| {link} | | | | | {verdict} |'
    seconds = max((one.seconds for one in finding.outcomes), default=0)
    for number, (name, quarters) in enumerate(found.items()):
        first, last = (fmean(values) for values in zip(*quarters))
        if _matches(name, finding.rising):
            name += ' (from 0)'
        cells = (name, f'{first:.3g}', f'{last:.3g}')
        if number:
            cells = ('', *cells, '', '')
        else:
            cells = (link, *cells, f'{seconds:.0f}', verdict)
        yield f'| {" | ".join(cells)} |'

"""The command that finds out whether a teacher helps.

Trains a student alone, alone for as long as distillation takes, distilled, and
distilled from a sham teacher, for several seeds, and writes one report.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from mmkd.analysis.cost import gflops, parameters, quiet
from mmkd.analysis.report import diff, write_report
from mmkd.checks import check_name, check_once, suggest
from mmkd.compat.checkpoint import add_trust_option, check_file, trusting
from mmkd.configs import read_config, student_config
from mmkd.files import whole
from mmkd.laboratory import arms as build
from mmkd.laboratory.arms import Arm
from mmkd.laboratory.digests import (
    code_digest,
    config_digest,
    data_digest,
    file_digest,
    folder_digest,
    recipe_digest,
    sources,
)
from mmkd.laboratory.pace import (
    fresh,
    load_batches,
    new_images,
    ratios,
    step_times,
)
from mmkd.laboratory.page import publish
from mmkd.laboratory.results import (
    Trials,
    arm_entry,
    comparisons,
    data_facts,
    machine,
    metrics,
    ranking,
    show_cases,
    versions,
)
from mmkd.laboratory.runs import DONE, Run, carry_out, iterations
from mmkd.laboratory.shuffled import save_shuffled
from mmkd.laboratory.verify import by_code_alone, records, verify
from mmkd.reading import read_json
from mmkd.recipes import DEFAULT, RECIPES, look

ARMS = ('alone', 'time', 'distilled', 'sham')
#: Arms that are trained only where they are asked for.
OPTIONAL = ('shuffled', 'unlabelled')
#: What else has a folder beside those of the methods.
TAKEN = ('alone', 'configs', 'report', 'teacher')
#: Ratios of step times are rounded up to this, so that methods share a
#: control.
GRAIN = 0.1
#: A run is ended after so many times the seconds that it was expected to take.
PATIENCE = 6.0

#: A setting file's ``laboratory``; the command line replaces each.
SETTINGS = dict(
    title='',
    note='',
    student=None,
    teacher=None,
    teacher_checkpoint=None,
    methods=(DEFAULT,),
    arms=ARMS,
    seeds=(0, 1, 2, 3, 4, 5),
    labels=None,
    unlabelled=None,
    cache=1.0,
    share=1.0,
    draws=1000,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``compare.py``.

    Args:
        arguments: Words of the command line; those of the process if None.

    Returns:
        Exit status: 0, 1 after a message on what to do, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    # mmdet 3.3.0 warns of its own attributes at each detector.
    warnings.simplefilter('ignore')
    os.environ.setdefault('PYTHONWARNINGS', 'ignore')
    try:
        if options.diff:
            one, other = (
                read_json(path, '--diff', 'results.json', kind=dict)
                for path in options.diff
            )
            print(diff(one, other))
            return 0
        _check_options(options)
        setting = _setting(options)
        words = _repeatable(arguments or sys.argv[1:])
        command = shlex.join(['python', 'tools/compare.py', *words])
        folder = Path(options.work_dir or setting.folder)
        with sole_user(folder), trusting(*options.trust_checkpoint):
            comparison = Comparison(setting, folder, options, command)
            comparison.run()
            files = comparison.report()
        if options.publish:
            files = {
                **files,
                **publish(files['results.json'], options.publish),
            }
    except KeyboardInterrupt:
        print('\nStopped. The same command goes on from here.')
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f'compare.py: {error}', file=sys.stderr)
        return 1
    for path in files.values():
        print(f'  {path}')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='compare.py',
        description='Does a teacher help this student? Trains all arms for '
        'several seeds and writes one report. What is done is not done again.',
    )
    parser.add_argument(
        'config',
        nargs='?',
        help="a setting (a config with `laboratory`) or the student's config",
    )
    parser.add_argument('--teacher', help="the teacher's config")
    parser.add_argument(
        '--teacher-checkpoint', help='its weights; trained first if not given'
    )
    parser.add_argument(
        '--methods',
        nargs='+',
        metavar='METHOD',
        help=f'recipes ({", ".join(RECIPES)}) or distillation configs',
    )
    parser.add_argument(
        '--arms',
        nargs='+',
        metavar='ARM',
        help=f'of {", ".join(ARMS)} (the default) and {", ".join(OPTIONAL)}',
    )
    parser.add_argument('--seeds', nargs='+', type=int, metavar='SEED')
    parser.add_argument(
        '--labels',
        type=int,
        help='train the student on so many images, another choice each seed',
    )
    parser.add_argument(
        '--unlabelled',
        metavar='FOLDER',
        help='photographs for the arm "unlabelled"; default: the training '
        "set's own that --labels leaves over",
    )
    parser.add_argument(
        '--cache',
        type=float,
        metavar='GIB',
        help='memory of each distilled training in which its teacher keeps '
        'what it said of an image (default 1.0); 0 for none',
    )
    parser.add_argument(
        '--share',
        type=float,
        help="a method's gradient relative to the detection loss's (default "
        '1.0); 0 keeps published weights',
    )
    parser.add_argument('--draws', type=int, help='of the bootstrap')
    parser.add_argument('--title')
    parser.add_argument('--note')
    parser.add_argument(
        '--jobs',
        type=int,
        default=min(2, os.cpu_count() or 1),
        help='trainings at a time, one thread each',
    )
    parser.add_argument(
        '--budget', type=float, help='minutes after which none is started'
    )
    parser.add_argument(
        '--timeout', type=float, help='minutes after which a run is ended'
    )
    parser.add_argument('--work-dir')
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='write the report of what is there, train nothing',
    )
    parser.add_argument(
        '--verify',
        type=int,
        metavar='STEPS',
        help='train nothing; where only code has changed since, repeat so '
        'many steps of one seed of each arm, and let the results count for '
        'the present code if every number of the log is the same',
    )
    parser.add_argument(
        '--publish',
        metavar='NAME',
        help='also put the numbers into docs/results/NAME.json, from which '
        'docs/results.md is made',
    )
    add_trust_option(parser)
    parser.add_argument(
        '--diff',
        nargs=2,
        metavar='RESULTS_JSON',
        help='compare two reports of one experiment',
    )
    return parser


def _repeatable(words: Sequence[str]) -> list[str]:
    """The words of a command that trains what this one reports.

    Example:
        >>> _repeatable(['quick.py', '--verify', '50', '--labels', '50'])
        ['quick.py', '--labels', '50']
    """
    kept, skip = [], False
    for word in words:
        if not skip and word not in ('--report-only', '--verify'):
            kept.append(word)
        skip = word == '--verify'
    return kept


def _check_options(options: argparse.Namespace) -> None:
    for name in ('jobs', 'budget', 'timeout', 'verify'):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(
                f'compare.py needs --{name} above 0, got {value}. Leave it '
                f'out if you do not need it.'
            )


def _setting(options: argparse.Namespace) -> ConfigDict:
    if options.config is None:
        raise ValueError(
            'which experiment? Name a setting, for instance '
            'configs/laboratory/shapes/quick.py, or a student and --teacher.'
        )
    config = read_config(options.config, 'compare.py')
    given = config.get('laboratory') or dict(student=options.config)
    for name in given:
        check_name(f'laboratory in {options.config}', 'key', name, SETTINGS)
    said = {
        name: value
        for name, value in vars(options).items()
        if name in SETTINGS and value is not None
    }
    setting = ConfigDict({**SETTINGS, **given, **said})
    setting.folder = str(Path('work_dirs', 'laboratory', _name(options)))
    if setting.teacher is None:
        raise ValueError(
            f'{options.config} names no teacher. Add --teacher CONFIG, and '
            f'--teacher-checkpoint FILE if it is trained.'
        )
    if setting.teacher_checkpoint is not None:
        setting.teacher_checkpoint = str(
            check_file(setting.teacher_checkpoint, 'compare.py')
        )
    check_seeds('compare.py', setting.seeds)
    for name in ('cache', 'share', 'draws'):
        if not setting[name] >= 0:
            raise ValueError(
                f'compare.py needs {name} of 0 or more, got {name}='
                f'{setting[name]}. 0 leaves it out.'
            )
    for arm in setting.arms:
        check_name('compare.py', 'arm', arm, (*ARMS, *OPTIONAL))
    if setting.unlabelled is not None and 'unlabelled' not in setting.arms:
        raise ValueError(
            f'compare.py shows the photographs of {setting.unlabelled} to the '
            f'arm "unlabelled" alone, which is not asked for. Add --arms '
            f'{" ".join(setting.arms)} unlabelled'
        )
    for method in setting.methods:
        if method not in RECIPES and not Path(method).is_file():
            raise ValueError(
                f'compare.py has no method {method!r}, and there is no config '
                f'of that name. {suggest(method, RECIPES)}'
            )
    _check_names(setting.methods)
    setting.title = setting.title or _name(options).replace('/', ', ')
    return setting


def check_seeds(who: str, seeds: Any) -> None:
    """Seeds are numbers of which none stands there twice: a training that
    counts twice makes an interval narrower than it is.

    Args:
        who: Who complains.
        seeds: What was given.

    Raises:
        ValueError: If they are anything else.
    """
    numbers = isinstance(seeds, Sequence) and len(seeds) > 0
    if not numbers or any(type(one) is not int or one < 0 for one in seeds):
        raise ValueError(
            f'{who} takes seeds as a list of whole numbers from 0, got '
            f'seeds={seeds!r}. Write for instance seeds=(0, 1, 2), or --seeds '
            f'0 1 2.'
        )
    check_once(who, 'seeds', seeds)


def _check_names(methods: Sequence[str]) -> None:
    """Whether each method can have a folder and a row of its name."""
    named = dict.fromkeys(TAKEN, 'what compare.py writes itself')
    for method in methods:
        name = Path(method).stem
        if name in named:
            raise ValueError(
                f'compare.py calls the method {method} {name!r}, and '
                f'{named[name]} as well. Name it once, or rename the file.'
            )
        named[name] = f'the method {method}'


def _name(options: argparse.Namespace) -> str:
    path = Path(options.config.split('::')[-1])
    return f'{path.parent.name}/{path.stem}' if path.parent.name else path.stem


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keep a second command out of a folder while this one works in it.

    Raises:
        RuntimeError: If another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / 'lock'
    with suppress(OSError, ValueError):
        owner = int(lock.read_text())
        if owner != os.getpid() and _alive(owner):
            raise RuntimeError(
                f'process {owner} is at work in {folder}. Wait for it, or '
                f'stop it (kill {owner}); for another experiment at the same '
                f'time, name another --work-dir.'
            )
    lock.write_text(str(os.getpid()))
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


class Comparison:
    """One experiment, from its setting to its report.

    Args:
        setting: What to compare, keys of :data:`SETTINGS`.
        folder: Where everything is written.
        options: The command line: jobs, budget, timeout, report_only.
        command: How to repeat it.
    """

    def __init__(
        self,
        setting: Mapping,
        folder: Path,
        options: argparse.Namespace,
        command: str,
    ) -> None:
        self.setting, self.folder = setting, folder
        self.options, self.command = options, command
        self.student = read_config(setting.student, 'The student')
        self.student.model = student_config(self.student.model)
        self.data = data_digest(self.student)
        self.photographs = (
            {}
            if setting.unlabelled is None
            else dict(unlabelled=folder_digest(setting.unlabelled))
        )
        self.facts = data_facts(self.student)
        self.teacher = self._teacher_run()
        if setting.labels is not None:
            build.subset(0, setting.labels, self.facts['train_images'])

    def run(self) -> None:
        """Train and test whatever is not done."""
        train = not (self.options.report_only or self.options.verify)
        if train:
            if not self.teacher.done:
                self._taught()  # what does not fit is said before
            carry_out([self.teacher], self.options.jobs)
        if self.options.verify and self.teacher.stale:
            self._verify_teacher()
        self.teacher.status = DONE if self.teacher.done else 'missing'
        if not self.teacher.done:
            raise RuntimeError(
                self.teacher.reason
                or f'{self.teacher.folder} holds no finished teacher; leave '
                f'out --report-only to train it.'
            )
        self.trials = self._trials()
        if self.options.verify:
            self._verify()
        runs = [
            self.trials.runs[arm.name, seed]
            for seed in self.setting.seeds  # so that what there is, is paired
            for arm in self.trials.arms
        ]
        runs = list({run.folder: run for run in runs}.values())
        if not train:
            for run in runs:
                run.status = DONE if run.done else 'missing'
            return
        budget = self.options.budget
        carry_out(
            runs,
            self.options.jobs,
            budget=None if budget is None else 60 * budget,
        )

    def _verify_teacher(self) -> None:
        """Accept a teacher that changed code would train alike.

        Raises:
            RuntimeError: If a repeat differs.
        """
        print(f'teacher: repeating {self.options.verify} steps ...')
        found = verify([self.teacher], self.options.verify)
        if found is not None:
            raise RuntimeError(
                f'the teacher trains otherwise now. {found}. It has as many '
                f'threads as --jobs, and their number changes how sums are '
                f'rounded: it is {self.options.jobs} now, give the number '
                f'that it was trained with. If it is that one already, train '
                f'anew: the same command without --verify.'
            )

    def _verify(self) -> None:
        """Accept results that changed code repeats.

        Raises:
            RuntimeError: If a repeat differs.
        """
        repeats, differ, known = [], [], set()
        with ThreadPoolExecutor(self.options.jobs) as pool:
            for arm in self.trials.arms:
                runs = [
                    self.trials.runs[arm.name, seed]
                    for seed in self.setting.seeds
                ]
                if runs[0].folder in known:  # another arm's runs
                    continue
                known.add(runs[0].folder)
                if any(by_code_alone(run) for run in runs):
                    repeat = copy_context().run, self._repeat, arm, runs
                    repeats.append((arm, pool.submit(*repeat)))
                    continue
                why = {run.why_stale(): None for run in runs if run.stale}
                if why:
                    print(
                        f'{arm.title}: {", and ".join(why)}; a repeat shows '
                        f'nothing where more than code has. The same command '
                        f'without --verify trains it anew.'
                    )
            try:
                for arm, repeat in repeats:
                    if (found := repeat.result()) is None:
                        self._keep_pace(arm)
                    else:
                        differ.append(found)
            except BaseException:  # those at work end, no other begins
                pool.shutdown(cancel_futures=True)
                raise
        if differ:
            raise RuntimeError(
                f'the present code trains otherwise. {"; ".join(differ)}. '
                f'Train anew: the same command without --verify.'
            )

    def _repeat(self, arm: Arm, runs: Sequence[Run]) -> str | None:
        print(f'{arm.title}: repeating {self.options.verify} steps ...')
        return verify(runs, self.options.verify)

    def _keep_pace(self, arm: Arm) -> None:
        path = self.folder / 'pace.json'
        known = json.loads(path.read_text())
        if arm.name in known:  # controls are not timed
            known[arm.name]['key'] = self._pace_key(arm)
        with whole(path) as part:
            part.write_text(json.dumps(known, indent=1))

    def _pace_key(self, arm: Arm) -> str:
        settings = self._seeded(arm, self.setting.seeds[0])
        return f'{config_digest(settings)} {code_digest(settings)}'

    def report(self) -> dict[str, Path]:
        """Write the report, and say in one line what came out."""
        print('Comparing and drawing ...')
        with redirect_stdout(None), quiet():  # mmengine and pycocotools chat
            results = self.results()
            folder = self.folder / 'report'
            best = self._to_show(results)
            if best:
                folder.mkdir(parents=True, exist_ok=True)
                results['cases'] = show_cases(
                    self.trials, best, folder / 'cases.png'
                )
            return write_report(results, folder)

    def results(self) -> dict[str, Any]:
        """All numbers, as :func:`~mmkd.analysis.report.write_report` takes
        them."""
        trials, setting = self.trials, self.setting
        taught = metrics(trials.matches(self.teacher))
        trained = self._trained(trials)
        return dict(
            title=setting.title,
            note=setting.note,
            command=self.command,
            metric='AP',
            teacher=dict(
                title='teacher',
                metrics=taught,
                config=str(setting.teacher),
                checkpoint_sha256=file_digest(self.teacher.final),
                validation=self._validated(taught['AP']),
                **cost(self.teacher.settings),
            ),
            student=dict(config=str(setting.student), **cost(self.student)),
            seeds=list(setting.seeds),
            arms=[arm_entry(trials, arm) for arm in trials.arms],
            comparisons=comparisons(trials, taught['AP'], setting.draws),
            ranking=ranking(trials),
            data=dict(
                name=str(self.student.get('data_root', '')).strip('/'),
                labels=setting.labels,
                sha256=self.data | self.photographs,
                **self.facts,
            ),
            versions=versions(),
            machine=machine(),
            hashes=dict(
                code={
                    'teacher': code_digest(self.teacher.settings),
                    **{
                        name: code_digest(one) for name, one in trained.items()
                    },
                },
                config={
                    arm.name: config_digest(arm.settings)
                    for arm in trials.arms
                },
                recipe={
                    arm.name: recipe_digest(model.terms.to_dict(), one.inherit)
                    for arm in trials.arms
                    if 'terms' in (model := arm.settings.model)
                    for one in model.teachers.values()
                },
                data=self.data | self.photographs,
            ),
            share=setting.share,
            sources={name: sources(one) for name, one in trained.items()},
            verified={
                arm.name: found
                for arm in trials.arms
                if (
                    found := records(
                        trials.runs[arm.name, seed] for seed in trials.seeds
                    )
                )
            },
            stale=[
                f'{name}, seed {seed}: {run.why_stale()}'
                for (name, seed), run in trials.runs.items()
                if run.stale
            ],
        )

    def _trained(self, trials: Trials) -> dict[str, Config]:
        """What was trained of each arm, for one seed: the choice of labels
        brings a data set and a sampler of its own."""
        return {
            arm.name: self._seeded(arm, trials.seeds[0]) for arm in trials.arms
        }

    def _validated(self, tested: float) -> float | None:
        """The teacher's AP on the images that the curves are of, if it is
        known: those of the test, or those it was validated on here."""
        of_curves = _annotations(self.student, 'val_evaluator')
        if of_curves == _annotations(self.student, 'test_evaluator'):
            return tested
        curve = self.teacher.curve()
        theirs = _annotations(self.teacher.settings, 'val_evaluator')
        return curve[-1][1] if curve and theirs == of_curves else None

    # ------------------------------------------------------------- planning

    def _teacher_run(self) -> Run:
        settings = read_config(self.setting.teacher, 'The teacher')
        file = self._write('teacher', settings)
        given = self.setting.teacher_checkpoint
        keys = dict(self.data, code=code_digest(settings))
        if given is not None:
            keys['weights'] = file_digest(Path(given))
        return Run(
            'teacher',
            file,
            self.folder / 'teacher',
            cores=self.options.jobs,
            keys=keys,
            weights=None if given is None else Path(given),
        )

    def _trials(self) -> Trials:
        arms = self._arms()
        runs = {}
        weights = file_digest(self.teacher.final)
        for arm in arms:
            same = next(one for one in arms if one.settings is arm.settings)
            for seed in self.setting.seeds:
                if same is not arm:  # trained once
                    runs[arm.name, seed] = runs[same.name, seed]
                    continue
                settings = self._seeded(arm, seed)
                name = f'{arm.name}_seed{seed}'
                file = self._write(name, settings)
                keys = dict(self.data, code=code_digest(settings))
                if 'teachers' in settings.model:
                    keys['teacher'] = weights
                if 'unlabelled' in settings.train_dataloader.dataset:
                    keys |= self.photographs
                run = Run(
                    f'{arm.title}, seed {seed}',
                    file,
                    self.folder / arm.name / f'seed{seed}',
                    keys=keys,
                    guess=self.seconds * (arm.step_ratio or 1.0),
                )
                limit = self.options.timeout
                run.timeout = (
                    60 * limit
                    if limit
                    else 120 + PATIENCE * run.iterations * run.guess
                )
                runs[arm.name, seed] = run
        return Trials(arms, runs, list(self.setting.seeds), self.teacher)

    def _seeded(self, arm: Arm, seed: int) -> Config:
        return build.seeded(
            arm, seed, self.setting.labels, self.facts['train_images']
        )

    def _taught(self) -> tuple[list[Arm], list[Arm]]:
        """Arms of each method, and those with images without labels."""
        setting = self.setting
        teacher = dict(
            config=str(self.teacher.config),
            checkpoint=str(self.teacher.final),
            cache=setting.cache,
        )
        with redirect_stdout(None), quiet():
            pair = look(self.student, self.teacher.settings)
            taught = [
                build.distilled(
                    self.student, teacher, pair, method, setting.share or None
                )
                for method in setting.methods
            ]
        wanted = 'unlabelled' in setting.arms
        return taught, self._unlabelled(taught) if wanted else []

    def _arms(self) -> list[Arm]:
        wanted = self.setting.arms
        first = build.alone(self.student)
        taught, more = self._taught()
        times = self._times([first, *taught, *more])
        taught, more = (
            [
                replace(arm, step_ratio=round(times[arm.name], 3))
                for arm in group
            ]
            for group in (taught, more)
        )
        trained = [*(taught if 'distilled' in wanted else []), *more]
        arms = [first] if 'alone' in wanted else []
        if 'time' in wanted:
            arms += self._controls(trained)
        arms += trained
        real = [one for one in trained if one.kind == 'distilled']
        if 'sham' in wanted:
            arms += [build.sham(one, 'sham', sham=True) for one in real]
        if 'shuffled' in wanted:
            weights = str(self._shuffled())
            arms += [
                build.sham(one, 'shuffled', checkpoint=weights) for one in real
            ]
        return arms

    def _unlabelled(self, taught: Sequence[Arm]) -> list[Arm]:
        labels, images = self.setting.labels, self.facts['train_images']
        folder = self.setting.unlabelled
        if folder is None and (labels is None or labels >= images):
            raise ValueError(
                f'the arm "unlabelled" needs images without labels: name '
                f'their folder, --unlabelled FOLDER, or set --labels below '
                f'{images}, the number of training images.'
            )
        return [
            build.unlabelled(arm, folder)
            for arm in taught
            if arm.kind == 'distilled'
        ]

    def _shuffled(self) -> Path:
        weights = self.teacher.final
        out = self.folder / 'shuffled' / f'{file_digest(weights)}.pth'
        if not out.is_file():
            with redirect_stdout(None), quiet():
                save_shuffled(
                    self.teacher.settings,
                    weights,
                    load_batches(self.teacher.settings),
                    out,
                )
        return out

    def _controls(self, taught: Sequence[Arm]) -> list[Arm]:
        groups: dict[float, list[str]] = {}
        for arm in taught:
            steps = -(-arm.step_ratio // GRAIN)  # rounded up
            ratio = max(round(steps * GRAIN, 6), 1.0)
            groups.setdefault(ratio, []).append(arm.method)
        return [
            build.same_time(self.student, ratio, methods)
            for ratio, methods in sorted(groups.items())
        ]

    def _times(self, arms: Sequence[Arm]) -> dict[str, float]:
        """Ratios of step times, measured once and kept.

        A teacher with a cache looks at an image once, so the mean step of a
        whole training counts: the ratio holds for the first seed's images.
        """
        path = self.folder / 'pace.json'
        keys = {arm.name: self._pace_key(arm) for arm in arms}
        arms = [
            replace(arm, settings=self._seeded(arm, self.setting.seeds[0]))
            for arm in arms
        ]
        known = json.loads(path.read_text()) if path.is_file() else {}
        missing = [
            arm
            for arm in arms
            if not self._timed(known.get(arm.name), keys[arm.name])
        ]
        if missing:
            print('Timing a training step of each arm ...')
            first = arms[0]
            with redirect_stdout(None), quiet():
                chosen = {arm.name: arm.settings for arm in (first, *missing)}
                times = step_times(chosen)
                new = _new_images(
                    {
                        name: one
                        for name, one in chosen.items()
                        if fresh(name) in times
                    }
                )
            for name, ratio in ratios(times, first.name, new).items():
                known[name] = dict(
                    key=keys[name],
                    ratio=ratio,
                    seconds=min(times[name]),
                    rounds=times[name],
                    new_images=new.get(name),
                    rounds_new=times.get(fresh(name)),
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as part:
                part.write_text(json.dumps(known, indent=1))
        self.seconds = known[arms[0].name]['seconds']
        return {arm.name: known[arm.name]['ratio'] for arm in arms}

    def _timed(self, known: Mapping | None, key: str) -> bool:
        if known is None or not self.options.verify:
            return known is not None and known['key'] == key
        return known['key'].split()[0] == key.split()[0]  # whatever the code

    def _write(self, name: str, settings: Config) -> Path:
        """A config of its own, complete, for each run."""
        path = self.folder / 'configs' / f'{name}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        content = settings.to_dict()
        if not path.is_file() or read_config(path).to_dict() != content:
            with whole(path) as part:  # reading is ten times as fast
                part.write_text(settings.pretty_text)
        return path

    def _to_show(self, results: Mapping) -> str | None:
        """The method that gains most over the student alone."""
        gains = {
            one['arm']: one['mean']
            for one in results['comparisons']
            if one['against'] == 'alone'
        }
        return max(gains, key=gains.get) if gains else None


def _annotations(settings: Config, evaluator: str) -> str | None:
    found = settings.get(evaluator)
    return found.get('ann_file') if isinstance(found, dict) else None


def _new_images(arms: Mapping[str, Config]) -> dict[str, float]:
    """Each arm's share, counted once where arms see the same images."""
    counted: dict[tuple[str, int], float] = {}
    found = {}
    for name, settings in arms.items():
        steps = iterations(settings)
        key = str(settings.train_dataloader), steps
        if key not in counted:
            counted[key] = new_images(settings, steps)
        found[name] = counted[key]
    return found


def cost(settings: Config) -> dict[str, float]:
    """Parameters and multiply-accumulates of a detector, on a test image."""
    init_default_scope(settings.get('default_scope', 'mmdet'))
    detector = MODELS.build(student_config(settings.model))
    content = read_json(
        settings.test_evaluator.ann_file, 'test', 'COCO annotations', kind=dict
    )
    size = (
        max(one['height'] for one in content['images']),
        max(one['width'] for one in content['images']),
    )
    return dict(parameters=parameters(detector), gflops=gflops(detector, size))

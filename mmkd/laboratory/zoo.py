"""The command that lets every detector of mmdet's zoo learn, for two steps.

Each folder of configs is a process of its own, of
:mod:`mmkd.laboratory.zoo_trial`, which may take so much memory and so much
time. What it found is kept, so that the command can be stopped and goes on
later, and is written as one page.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from mmkd.checks import check_name, check_positive
from mmkd.files import whole
from mmkd.laboratory import zoo_trial
from mmkd.laboratory.compare import sole_user
from mmkd.laboratory.digests import source_digest
from mmkd.laboratory.results import versions
from mmkd.laboratory.runs import PACKAGE, listen
from mmkd.laboratory.zoo_pairs import LARGER, folders, zoo
from mmkd.laboratory.zoo_trial import BASE, FAMILIES, STEPS, sources_of

FOLDER = Path('work_dirs/zoo')
PAGE = Path('docs/zoo.md')
#: Gibibytes and minutes of a processor that a folder may take, and how often
#: so long by the clock, as the machine may do other work.
MEMORY, MINUTES, WAIT = 10.0, 10.0, 6.0
#: Seconds that a folder takes until one has been through.
GUESS = 60.0
#: So many families of methods are asked of each detector, and of what share
#: of the detectors.
ASKED, SHARE = 3, 0.95

#: Packages that some folders need and mmkd does not.
OPTIONAL = ('mmpretrain', 'timm', 'scikit-image', 'scikit-learn')

NOT_RUN, PASSED, FAILED = 'not run', 'passed', 'FAILED'
#: Of folders that are no matter of distillation: other tasks, and what plain
#: mmdet does not train here.
OTHER, CANNOT = 'another task', 'not in plain mmdet'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``check_zoo.py``.

    Args:
        arguments: Words of the command line; those of the process if None.

    Returns:
        Exit status: 0, 1 after a failure or a message on what to do, 130
        after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        check_positive('check_zoo.py', **{'--jobs': options.jobs})
        known = folders(zoo())
        for name in options.folders:
            check_name('check_zoo.py', 'folder of the zoo', name, known)
        asked = options.folders or known
        with sole_user(options.work_dir):
            trials = [
                Trial(name, options.work_dir, options.memory, options.minutes)
                for name in known
            ]
            if not options.report_only:
                begin = [one for one in trials if one.folder in asked]
                if options.failed:
                    begin = [x for x in begin if x.verdict in TO_REPEAT]
                else:
                    begin = [one for one in begin if not one.done]
                carry_out(begin, options.jobs)
    except KeyboardInterrupt:
        print('\nStopped. The same command goes on from here.')
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f'check_zoo.py: {error}', file=sys.stderr)
        return 1
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(trials), encoding='utf-8')
    print(f'  {options.page}')
    failed = [
        one.folder
        for one in trials
        if one.folder in asked and one.verdict == FAILED
    ]
    if failed:
        print(f'check_zoo.py: failed: {", ".join(failed)}', file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='check_zoo.py',
        description="Lets a config of every folder of mmdet's zoo learn from "
        'a larger one for two steps, and writes what happened. What is done '
        'is not done again.',
    )
    parser.add_argument(
        'folders',
        nargs='*',
        metavar='FOLDER',
        help='folders of the zoo, for instance retinanet (default: all)',
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='folders at a time, a core each'
    )
    parser.add_argument(
        '--memory',
        type=float,
        default=MEMORY,
        metavar='GIB',
        help='memory that a folder may take',
    )
    parser.add_argument(
        '--minutes',
        type=float,
        default=MINUTES,
        help='processor time that a folder may take',
    )
    parser.add_argument(
        '--failed',
        action='store_true',
        help='go through what failed or has not been run, and not through '
        'what passed with earlier code',
    )
    parser.add_argument('--work-dir', type=Path, default=FOLDER)
    parser.add_argument('--page', type=Path, default=PAGE)
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='write the page of what is there, run nothing',
    )
    return parser


# ---------------------------------------------------------------- the folders


#: A copy of this process, where that is safe, has imported all there is to.
PROCESSES = multiprocessing.get_context(
    'fork' if sys.platform == 'linux' else 'spawn'
)


def _carry_out(folder: str, file: Path) -> None:
    """What a trial's process does."""
    os.setsid()  # Ctrl-C reaches it through us
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with file.with_suffix('.txt').open('w') as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    zoo_trial.main([folder, '--out', str(file)])


@dataclass
class Trial:
    """A folder of the zoo, and what is known of it.

    Attributes:
        folder: Its name.
        work_dir: Where its record lies, and what its process printed.
        memory: Gibibytes that it may take.
        minutes: Processor time that it may take.
    """

    folder: str
    work_dir: Path
    memory: float = MEMORY
    minutes: float = MINUTES
    _process: multiprocessing.Process | None = field(default=None, repr=False)
    _begin: float = field(default=0.0, repr=False)

    @property
    def file(self) -> Path:
        return self.work_dir / f'{self.folder}.json'

    @property
    def record(self) -> dict[str, Any]:
        """What its last process has written; empty if there was none."""
        with suppress(OSError, ValueError):
            return json.loads(self.file.read_text())
        return {}

    @property
    def done(self) -> bool:
        """Whether it was run to its end with the present code and mmdet."""
        record = self.record
        return (
            bool(record.get('finished'))
            and record['versions'].get('mmdet') == versions().get('mmdet')
            and all(
                (PACKAGE / name).is_file()
                and source_digest(PACKAGE / name) == digest
                for name, digest in record['sources'].items()
                if not _beside(name)
            )
        )

    @property
    def verdict(self) -> str:
        return verdict(self.record)

    # ------------------------------------------------------------- a process

    def start(self) -> None:
        """Begin its process."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.file.unlink(missing_ok=True)
        self._begin = time.time()
        self._process = PROCESSES.Process(
            target=_carry_out, args=(self.folder, self.file)
        )
        self._process.start()

    def poll(self) -> bool:
        """Whether its process is still at work; ends one that takes more
        than it may."""
        process = self._process
        if process is None:
            return False
        if process.is_alive():
            reason = self._excess(process.pid)
            if reason is None:
                return True
            self.stop()
            self._tell_end(reason)
        elif not self.record.get('finished'):
            self._tell_end(f'its process ended with status {process.exitcode}')
        self._process = None
        return False

    def _excess(self, process: int) -> str | None:
        waited = (time.time() - self._begin) / 60
        if busy(process) > self.minutes or waited > WAIT * self.minutes:
            return f'longer than {self.minutes:g} minutes'
        if resident(process) > self.memory:
            return f'more than {self.memory:g} GiB of memory'
        return None

    def _tell_end(self, reason: str) -> None:
        """Complete the record of a process that could not."""
        record = self.record or dict(folder=self.folder, steps={})
        steps = record['steps']
        name = next(reversed(steps), STEPS[0])
        steps[name] = dict(error=reason)
        record.update(
            seconds=round(time.time() - self._begin, 1),
            versions=versions(),
            sources=sources_of({}),
            finished=True,
        )
        with whole(self.file, durable=False) as part:
            part.write_text(json.dumps(record, indent=1))

    def stop(self) -> None:
        """End its process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def busy(process: int) -> float:
    """Minutes of a processor that a process has used; 0 if nobody says."""
    with suppress(OSError, ValueError, IndexError):
        # The name, in brackets, may hold blanks.
        text = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2]
        ticks = sum(map(int, text.split()[11:13]))
        return ticks / os.sysconf('SC_CLK_TCK') / 60
    return 0.0


def _beside(name: str) -> bool:
    """Whether a trial imports a module without running anything of it."""
    around = name.startswith(('analysis/', 'engine/', 'laboratory/'))
    return around and 'zoo_' not in name


def resident(process: int) -> float:
    """Gibibytes that a process holds; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f'/proc/{process}/status').read_text().splitlines():
            if line.startswith('VmRSS:'):
                return int(line.split()[1]) / 2**20
    return 0.0


def carry_out(trials: Sequence[Trial], jobs: int) -> None:
    """Run trials, so many at a time, the quickest first.

    A trial that fails is noted, and the next one runs.

    Args:
        trials: What to run.
        jobs: Processes at a time.

    Raises:
        KeyboardInterrupt: If the reader breaks off; what was being run has no
            record then.
    """
    waiting = sorted(trials, key=lambda one: _seconds(one) or GUESS)
    guesses = {one.folder: _seconds(one) for one in trials}
    took: list[float] = []
    running: list[Trial] = []
    for file in PACKAGE.rglob('*.py'):
        source_digest(file)  # as it is now, whatever is edited meanwhile
    sources_of({})  # what imports what, which each process would read again
    gc.freeze()  # and what is imported, which each would look through
    before = listen()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(0.2)
            for trial in [one for one in running if not one.poll()]:
                running.remove(trial)
                took.append(_seconds(trial) or 0.0)
                del guesses[trial.folder]
                usual = fmean(took)
                left = sum(one or usual for one in guesses.values())
                minutes = left / jobs / 60
                more = f', about {minutes:.0f} min left'
                print(
                    f'{trial.folder}: {outcome(trial.record)} '
                    f'in {took[-1]:.0f} s | {len(took)} of {len(trials)}'
                    f'{more if waiting or running else ""}',
                    flush=True,
                )
    finally:
        gc.unfreeze()
        for trial in running:
            trial.stop()
            trial.file.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _seconds(trial: Trial) -> float | None:
    return trial.record.get('seconds')


# ---------------------------------------------------------------- the records


def verdict(record: Mapping) -> str:
    """What a record says in a word."""
    if not record.get('finished'):
        return NOT_RUN
    step, _ = failure(record)
    if step is not None:
        early = STEPS.index(step) <= STEPS.index(BASE)
        return CANNOT if early else FAILED
    if record.get('student') is None:
        return CANNOT if record.get('broken') else OTHER
    return PASSED if not mute(record) else FAILED


#: What ``--failed`` runs again.
TO_REPEAT = (NOT_RUN, FAILED, CANNOT)


def failure(record: Mapping) -> tuple[str | None, str]:
    """The step that failed, and with what; (None, '') if none did."""
    for name, step in record.get('steps', {}).items():
        if step.get('error'):
            return name, step['error']
    return None, ''


def mute(record: Mapping) -> dict[str, str]:
    """What is wrong with the methods that fit and were tried."""
    learn = record['steps'].get('families', {}).get('learn', {})
    return {method: wrong for method, wrong in learn.values() if wrong}


def families(record: Mapping) -> list[str]:
    """Families of which a method was tried and taught."""
    learn = record.get('steps', {}).get('families', {}).get('learn', {})
    return [family for family, (_, wrong) in learn.items() if not wrong]


def fitting_methods(record: Mapping) -> dict[str, bool]:
    """Whether each method fits the folder's pair."""
    fits = record.get('steps', {}).get('methods', {}).get('fits', {})
    return {method: why is None for method, why in fits.items()}


def outcome(record: Mapping) -> str:
    """The verdict, and why where it is none to be glad of."""
    word = verdict(record)
    step, error = failure(record)
    if step is not None:
        return f'{word}: {step}: {error}'
    if word == FAILED:
        said = '; '.join(f'{x}: {wrong}' for x, wrong in mute(record).items())
        return f'{word}: {said}'
    if word in (OTHER, CANNOT):
        reasons = record.get('broken') or record.get('others') or [PARTS]
        return f'{word}: {"; ".join(reasons)}'
    return word


PARTS = 'holds parts of other configs'

# ------------------------------------------------------------------- the page

HEAD = """\
# The zoo

<!-- Written by `make zoo`. -->

Every folder of mmdet's own config zoo, each with one pair of its detectors: a
larger one teaches a smaller one for two steps. What is checked is that the
pair can be planned, trained and deployed, not that it gains: the weights are
random, the pictures generated.

Of each folder, by rule:

- **Which configs.** Those of detectors of boxes or instances, of the make
  (detector, neck, head) that most of the folder have. The student has the
  fewest weights, the teacher the fewest of those that have at least
  {larger:g} times as many and the same number of classes. Where there is none,
  the student's like teaches it: a detector of its own config, with other
  weights.
- **Plain mmdet first.** The student alone is built from its config, trained
  for two steps and asked for a prediction: {batch} pictures padded to
  {first} x {first} pixels, or to the first of {sides} that the detector takes
  (an SSD to its own size), and at most {regions} regions of each for second
  stages; models are not made smaller. Pictures do not go through the config's
  data pipeline, but through its preprocessor. The optimiser is the config's,
  in single precision, at {rate:g} of its learning rate, as warm-ups begin.
  Nothing is downloaded. What fails here is listed below as *not in plain
  mmdet* and tells nothing of mmkd.
- **Then mmkd.** The default method is planned, with a checkpoint file of the
  teacher. Two steps follow, of finite losses; those of the terms must be above
  0 and by themselves give the student's backbone a gradient. Then a
  prediction; and the student's weights, without anything of mmkd, are loaded
  strictly into plain mmdet, whose heads must say the same to the last bit.
- **Methods.** Every recipe is asked whether it fits the pair. One of each
  family that has one that fits is trained for a step, and must give the
  backbone a gradient. Families: {families}.

`make zoo` goes through all of it (an hour or two on one core), can be stopped
at any time, and does again what the present code has not done.
`python tools/check_zoo.py FOLDER` runs one.
"""


def page(trials: Sequence[Trial]) -> str:
    """The text of ``docs/zoo.md``.

    Args:
        trials: Of every folder.
    """
    records = {one.folder: one.record for one in trials}
    words = {name: verdict(one) for name, one in records.items()}
    taught = {
        name: one
        for name, one in records.items()
        if words[name] in (PASSED, FAILED)
    }
    parts = [
        HEAD.format(
            larger=LARGER,
            batch=zoo_trial.BATCH,
            first=zoo_trial.SIDES[0],
            sides=', '.join(map(str, zoo_trial.SIDES[1:])),
            regions=zoo_trial.REGIONS,
            rate=zoo_trial.RATE,
            families=', '.join(FAMILIES),
        ),
        _counts(words, taught, sum(one.done for one in trials)),
        '\n'.join(_taught(taught)),
        '## Methods\n\nOf the pairs above, those that a method fits.',
        '\n'.join(_methods(taught)),
    ]
    for word, text in REST.items():
        rest = {name: records[name] for name in words if words[name] == word}
        if rest:
            parts += [text, '\n'.join(_rest(rest))]
    known = versions()
    for name in OPTIONAL:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    said = ', '.join(f'{name} {value}' for name, value in known.items())
    parts.append(f'({said})')
    return '\n\n'.join(part.strip() for part in parts) + '\n'


REST = {
    CANNOT: '## Not in plain mmdet\n\nWhat mmdet alone does not train here.',
    OTHER: '## Other tasks\n\nFolders without a detector of boxes or '
    'instances in images that is trained with labels.',
    NOT_RUN: '## Not run\n\nNot yet, or broken off.',
}


def _counts(
    words: Mapping[str, str], taught: Mapping[str, Mapping], present: int
) -> str:
    number = Counter(words.values())
    several = [x for x in taught.values() if len(families(x)) >= ASKED]
    enough = len(several) >= SHARE * len(taught)
    lines = [
        f'{len(words)} folders: plain mmdet trains {len(taught)} of them '
        f'here, {number[CANNOT]} it does not, {number[OTHER]} are of another '
        f'task, {number[NOT_RUN]} were not run. Of the {len(taught)}, '
        f'{number[PASSED]} passed and {number[FAILED]} failed; '
        f'{len(several)} learn by methods of {ASKED} families or more '
        f'({"at least" if enough else "less than"} {SHARE:.0%}).',
    ]
    if present < len(words) - number[NOT_RUN]:
        lines.append(
            f'{present} folders were run with exactly the present code, the '
            f'others with an earlier one.'
        )
    return ' '.join(lines)


def _taught(records: Mapping[str, Mapping]) -> Iterator[str]:
    heads = ('folder', 'detector', 'teacher → student', 'side')
    heads += ('default plan', 'methods', '')
    yield f'| {" | ".join(heads)} |'
    yield f'|{"---|" * len(heads)}'
    for name, record in records.items():
        fits = fitting_methods(record)
        methods = (
            f'{sum(fits.values())} of {len(fits)}, '
            f'{len(families(record))} families'
        )
        cells = (
            name,
            record.get('kind', ''),
            _pair(record),
            str(record.get('side', '')),
            _plan(record['steps'].get('plan', {}).get('rows', [])),
            methods if fits else '',
            _cell(outcome(record)),
        )
        yield f'| {" | ".join(cells)} |'


def _pair(record: Mapping) -> str:
    own, other = (
        f'{Path(record[who]).stem} ({weights / 1e6:.1f} M)'
        for who, weights in zip(('student', 'teacher'), record['weights'])
    )
    same = record['student'] == record['teacher']
    return f'{"its like" if same else other} → {own}'


def _plan(rows: Sequence[Sequence[str]]) -> str:
    """The terms of a plan's table: what is compared, where, and by what."""
    terms: list[list] = []
    for row in rows:
        name, own, *_, adapter, loss = row
        if name:
            tap = own.partition('[')[0]
            by = '' if adapter in ('-', '') else f' by {adapter}'
            terms.append([loss.partition(',')[0], tap, by, 0])
        terms[-1][-1] += 1
    return '; '.join(
        f'{loss} on {tap} ({levels} level{"s" * (levels > 1)}){by}'
        for loss, tap, by, levels in terms
    )


def _methods(records: Mapping[str, Mapping]) -> Iterator[str]:
    fits = [fitting_methods(one) for one in records.values()]
    fits = [one for one in fits if one]
    of = {x: family for family, names in FAMILIES.items() for x in names}
    yield '| method | family | pairs |'
    yield '|---|---|---|'
    for method in dict.fromkeys(name for one in fits for name in one):
        number = sum(one.get(method, False) for one in fits)
        yield f'| {method} | {of.get(method, "")} | {number} of {len(fits)} |'


def _rest(records: Mapping[str, Mapping]) -> Iterator[str]:
    yield '| folder | |'
    yield '|---|---|'
    for name, record in records.items():
        word = verdict(record)
        said = '' if word == NOT_RUN else outcome(record)
        yield f'| {name} | {_cell(said.removeprefix(f"{word}: "))} |'


def _cell(text: str, most: int = 240) -> str:
    text = text if len(text) <= most else f'{text[:most]} …'
    return text.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ')

"""Trainings that share a machine, can be broken off, and go on later."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config

from mmkd.analysis.curves import ap_history
from mmkd.compat.checkpoint import trusted_files
from mmkd.files import whole

PACKAGE = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, '-m', 'mmkd.cli']
#: File of a run that says what its results were made with.
STAMP = 'made_with.json'
#: What the digests of an identity are of, where their names do not say it.
OF = dict(
    train='training data',
    test='test data',
    teacher='weights of the teacher',
    unlabelled='photographs without labels',
)
#: Ends of a run, as reports name them.
DONE, FAILED, TIMED_OUT, MISSING = 'done', 'failed', 'timed out', 'missing'


@dataclass
class Run:
    """One training, and the test of its last checkpoint.

    Attributes:
        name: Shown to the reader.
        config: Its config file.
        folder: Where its checkpoints, logs and predictions lie.
        options: Settings that replace the config's, as on a command line.
        guess: Seconds an iteration takes, until the log tells.
        cores: Processor cores it uses.
        needs: Runs whose checkpoints it reads.
        keys: Digests of what else decides its result: code, data, teacher.
        timeout: Seconds after which it is ended; never if None.
        weights: A finished checkpoint, which is then only tested.
        status, reason: How it ended, and why.
    """

    name: str
    config: Path
    folder: Path
    options: tuple[str, ...] = ()
    guess: float = 0.5
    cores: int = 1
    needs: tuple[Run, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    weights: Path | None = None
    status: str = MISSING
    reason: str | None = None
    _process: subprocess.Popen | None = field(default=None, repr=False)
    _stage: str = field(default='', repr=False)
    _begin: float = field(default=0.0, repr=False)

    @cached_property
    def settings(self) -> Config:
        return Config.fromfile(self.config)

    @cached_property
    def iterations(self) -> int:
        return iterations(self.settings)

    @property
    def final(self) -> Path:
        """The last checkpoint."""
        if self.weights is not None:
            return self.weights
        loop = self.settings.train_cfg
        if 'max_epochs' in loop:
            return self.folder / f'epoch_{loop.max_epochs}.pth'
        return self.folder / f'iter_{loop.max_iters}.pth'

    @property
    def predictions(self) -> Path:
        """Detections in the test images, in COCO's result format."""
        return self.folder / 'test' / 'predictions.bbox.json'

    @property
    def done(self) -> bool:
        return (
            self.final.is_file()
            and self.predictions.is_file()
            and not self.changed()
        )

    def identity(self) -> dict[str, str]:
        """Digests of all that decides what the run gives: its settings, and
        its keys."""
        # In the order of the config: it is the order of the terms' sum.
        text = str(self.settings.to_dict()) + ' '.join(self.options)
        return dict(self.keys, settings=_digest(text))

    def fingerprint(self) -> str:
        """One digest of all that decides what the run gives."""
        return _digest(json.dumps(self.identity(), sort_keys=True))

    def sign(self) -> None:
        """Note what the results in its folder are made with."""
        with whole(self.folder / STAMP) as part:
            part.write_text(json.dumps(self.identity(), indent=1))

    def made_with(self) -> dict[str, str]:
        """The identity that its results were made with; empty if nobody
        knows."""
        stamp = self.folder / STAMP
        return json.loads(stamp.read_text()) if stamp.is_file() else {}

    def changed(self) -> list[str]:
        """What is not as it was when its results were made."""
        then, now = self.made_with(), self.identity()
        return sorted(
            name for name in {*then, *now} if then.get(name) != now.get(name)
        )

    def why_stale(self) -> str:
        """The same in words."""
        if not self.made_with():
            return 'nothing says what it was made with'
        changed = [OF.get(name, name) for name in self.changed()]
        return f'it was made with other {" and ".join(changed)}'

    @property
    def stale(self) -> bool:
        """Whether its folder holds results of other settings or code."""
        return self.folder.is_dir() and bool(self.changed())

    def start(self) -> None:
        """Begin, or go on from the last checkpoint."""
        if self.stale:
            self._set_aside()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sign()
        self._begin = time.time()
        self._launch('test' if self.final.is_file() else 'train')

    def _launch(self, stage: str) -> None:
        options = list(self.options)
        if stage == 'train':
            words = [str(self.config), '--work-dir', str(self.folder)]
            words += ['--resume']
        else:
            folder = self.folder / 'test'
            words = [str(self.config), str(self.final)]
            words += ['--work-dir', str(folder)]
            prefix = str(self.predictions).removesuffix('.bbox.json')
            options.append(f'test_evaluator.outfile_prefix={prefix}')
        for file in trusted_files():
            words += ['--trust-checkpoint', file]
        if options:
            words += ['--cfg-options', *options]
        environment = dict(
            os.environ,
            OMP_NUM_THREADS=str(self.cores),
            PYTHONPATH=os.pathsep.join(
                [str(PACKAGE.parent), os.environ.get('PYTHONPATH', '')]
            ),
        )
        self._stage = stage
        with (self.folder / 'output.txt').open('a') as output:
            self._process = subprocess.Popen(
                [*COMMAND, stage, *words],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through us
            )

    def _set_aside(self) -> None:
        """Keep results made with anything else under another name."""
        why = self.why_stale()
        number = 1
        while (aside := Path(f'{self.folder}-{number}')).exists():
            number += 1
        shutil.move(self.folder, aside)
        print(
            f'{self.name}: begins anew, since {why}; what was there is kept '
            f'in {aside}'
        )

    def poll(self) -> bool:
        """Whether it is still running; notes how it ended."""
        if self._process is None:
            return False
        if self._process.poll() is None:
            late = time.time() - self._begin > (self.timeout or math.inf)
            if late:
                self._process.kill()
                self._end(TIMED_OUT, f'after {self.timeout / 60:.0f} minutes')
            return not late
        if self._stage == 'train' and self.final.is_file():
            self._launch('test')
            return True
        if self.done:
            self._end(DONE)
        else:
            self._end(FAILED, self._last_words())
        return False

    def _end(self, status: str, reason: str | None = None) -> None:
        self.status, self.reason, self._process = status, reason, None

    def _last_words(self) -> str:
        lines = (self.folder / 'output.txt').read_text().splitlines()
        return (
            f'The {self._stage} of {self.name!r} stopped early. Its last '
            f'words, from {self.folder / "output.txt"}:\n'
            + '\n'.join(lines[-12:])
        )

    def stop(self, patience: float = 60.0) -> None:
        """Ask it to write a checkpoint and end."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def log(self) -> list[dict]:
        """Training lines of MMEngine's log, those of resumed runs too."""
        return [line for line in log_lines(self.folder) if 'loss' in line]

    def curve(self) -> list[tuple[int, float]]:
        """AP in percent after so many iterations."""
        return ap_history(self.folder)

    def position(self) -> tuple[int, float]:
        """Iterations done, and seconds the others are likely to take."""
        if self.done or self.weights is not None:
            return self.iterations, 0.0
        trained = self.log()
        at = max((line['iter'] for line in trained), default=0)
        if self.stale:  # it begins anew, likely as fast as it was
            at = 0
        times = sorted(line['time'] for line in trained[-8:])
        pace = times[len(times) // 2] if times else self.guess
        return at, (self.iterations - at) * pace

    def seconds(self) -> float:
        """Time of its training steps, loading of data included."""
        total, before = 0.0, 0
        for line in sorted(self.log(), key=lambda line: line['iter']):
            total += line['time'] * max(line['iter'] - before, 0)
            before = max(before, line['iter'])
        return total


def iterations(settings: Config) -> int:
    """Training steps that a config asks for."""
    loop = settings.train_cfg
    if 'max_iters' in loop:
        return loop.max_iters
    from mmengine.registry import init_default_scope

    init_default_scope(settings.get('default_scope', 'mmdet'))
    loader = settings.train_dataloader
    images = len(DATASETS.build(loader.dataset))
    return loop.max_epochs * math.ceil(images / loader.batch_size)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def log_lines(folder: Path) -> list[dict]:
    """Every line of the logs below a folder, an unfinished last one left
    out."""
    lines = []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue  # being written this moment
    return lines


def carry_out(
    runs: Sequence[Run],
    cores: int,
    after: float = 0.0,
    budget: float | None = None,
    ended: Callable[[Run], Any] = lambda run: None,
) -> None:
    """Carry out what is not done yet, as many at a time as cores allow.

    Args:
        runs: In the order of their start. One whose ``needs`` are not done is
            left out.
        cores: Processor cores to use.
        after: Seconds that the steps after the trainings take.
        budget: Seconds after which no further run is started; no end if None.
        ended: Called with each run that has ended, well or not.

    Raises:
        KeyboardInterrupt: If the reader breaks off; the trainings have written
            their checkpoints by then.
    """
    begin = time.time()
    waiting = []
    for run in runs:
        if run.done:
            run.status = DONE
            print(f'{run.name}: done before, {run.folder}')
            ended(run)
        else:
            waiting.append(run)
    running: list[Run] = []
    shown = begin
    live = sys.stdout.isatty()
    before = listen()
    try:
        while True:
            over = budget is not None and time.time() - begin > budget
            if not over:
                _start_what_fits(waiting, running, cores)
            if not running:
                break
            time.sleep(0.5)
            for run in [run for run in running if not run.poll()]:
                running.remove(run)
                _tell_end(run, live)
                ended(run)
            if time.time() - shown >= (1 if live else 15) and running:
                shown = time.time()
                _tell(running, waiting, cores, after, live)
    except BaseException:
        print('\nStopping; each training writes a checkpoint ...')
        for run in running:
            run.stop()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen() -> dict[int, Any]:
    """Let both signals that end a program end the trainings, too.

    A command in a script's background would not hear Ctrl-C's, and one that
    dies of the other would leave its trainings behind.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM)
    }


def _start_what_fits(
    waiting: list[Run], running: list[Run], cores: int
) -> None:
    for run in list(waiting):
        free = cores - sum(one.cores for one in running)
        if run.cores > free and running:
            return  # in order, so that a wide run is not put off for ever
        if any(one in waiting or one in running for one in run.needs):
            continue
        waiting.remove(run)
        broken = [one for one in run.needs if not one.done]
        if broken:
            run.status = MISSING
            run.reason = f'{broken[0].name} is not done'
            continue
        run.start()
        running.append(run)


def _tell(
    running: Sequence[Run],
    waiting: Sequence[Run],
    cores: int,
    after: float,
    live: bool,
) -> None:
    left = (
        sum(run.position()[1] * run.cores for run in (*running, *waiting))
        / cores
    )
    left = max(left, *(run.position()[1] for run in running)) + after
    parts = [
        f'{run.name} {run.position()[0]}/{run.iterations}{_ap(run)}'
        for run in running
    ]
    more = f' | {len(waiting)} to come' if waiting else ''
    text = f'{" | ".join(parts)}{more} | about {left / 60:.1f} min left in all'
    print(f'\r\x1b[K{text}' if live else text, end='' if live else '\n')
    sys.stdout.flush()


def _tell_end(run: Run, live: bool) -> None:
    done = 'trained and tested' if run.weights is None else 'tested'
    words = done if run.status == DONE else run.status
    minutes = (time.time() - run._begin) / 60
    end = '\r\x1b[K' if live else ''
    print(f'{end}{run.name}: {words} in {minutes:.1f} min{_ap(run)}')
    sys.stdout.flush()


def _ap(run: Run) -> str:
    curve = run.curve()
    return f' (AP {curve[-1][1]:.1f})' if curve else ''

"""Trainings that run side by side, can be broken off, and go on later."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

from mmkd.analysis.curves import ap_history

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / 'tools' / 'train.py')]


@dataclass
class Run:
    """One training of the demo.

    Attributes:
        name: Shown to the reader; name of its folder, too.
        config: Its config file.
        folder: Where its checkpoints and logs lie.
        options: Settings that replace the config's, as on a command line.
        guess: Seconds an iteration takes, until the log tells.
    """

    name: str
    config: Path
    folder: Path
    options: tuple[str, ...] = ()
    guess: float = 0.5
    _process: subprocess.Popen | None = field(default=None, repr=False)

    @cached_property
    def settings(self) -> Config:
        return Config.fromfile(self.config)

    @property
    def iterations(self) -> int:
        return self.settings.train_cfg.max_iters

    @property
    def final(self) -> Path:
        return self.folder / f'iter_{self.iterations}.pth'

    @property
    def done(self) -> bool:
        return self.final.is_file() and self._matches()

    def fingerprint(self) -> str:
        """Digest of all that decides what the run gives."""
        text = str(self.settings.to_dict())
        text += ' '.join(self.options)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _matches(self) -> bool:
        stamp = self.folder / 'fingerprint'
        return stamp.is_file() and stamp.read_text() == self.fingerprint()

    def start(self, threads: int) -> None:
        """Begin, or go on from the last checkpoint."""
        if self.folder.is_dir() and not self._matches():
            self._set_aside()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / 'fingerprint').write_text(self.fingerprint())
        command = [*TRAIN, str(self.config), '--work-dir', str(self.folder)]
        command += ['--resume']
        if self.options:
            command += ['--cfg-options', *self.options]
        environment = dict(
            os.environ,
            OMP_NUM_THREADS=str(threads),
            PYTHONPATH=os.pathsep.join(
                [str(ROOT), os.environ.get('PYTHONPATH', '')]
            ),
        )
        with (self.folder / 'output.txt').open('a') as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through us
            )

    def _set_aside(self) -> None:
        """Keep the results of other settings under another name."""
        number = 1
        while (aside := Path(f'{self.folder}-{number}')).exists():
            number += 1
        shutil.move(self.folder, aside)
        print(
            f'{self.name}: the settings have changed; earlier results are '
            f'kept in {aside}'
        )

    def poll(self) -> bool:
        """Whether it is still running.

        Raises:
            RuntimeError: If it ended without its last checkpoint; the message
                ends with what it printed last.
        """
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        if not self.final.is_file():
            lines = (self.folder / 'output.txt').read_text().splitlines()
            raise RuntimeError(
                f'The training of {self.name!r} stopped early. Its last '
                f'words, from {self.folder / "output.txt"}:\n'
                + '\n'.join(lines[-12:])
            )
        return False

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
        lines = []
        for path in sorted(self.folder.glob('*/vis_data/scalars.json')):
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # being written this moment
                if 'loss' in line:
                    lines.append(line)
        return lines

    def curve(self) -> list[tuple[int, float]]:
        """AP in percent after so many iterations."""
        return ap_history(self.folder)

    def position(self) -> tuple[int, float]:
        """Iterations done, and seconds the others are likely to take."""
        if self.done:
            return self.iterations, 0.0
        trained = self.log()
        at = max((line['iter'] for line in trained), default=0)
        times = sorted(line['time'] for line in trained[-8:])
        pace = times[len(times) // 2] if times else self.guess
        return at, (self.iterations - at) * pace


def carry_out(
    groups: Sequence[Sequence[Run]], cores: int, after: float = 0.0
) -> None:
    """Train what is not done yet, each group side by side.

    Args:
        groups: Runs that may share the machine, group after group.
        cores: Processor cores to use.
        after: Seconds that the steps after the trainings take.

    Raises:
        RuntimeError: If a training fails.
        KeyboardInterrupt: If the reader breaks off; the trainings have written
            their checkpoints by then.
    """
    for index, group in enumerate(groups):
        waiting = [run for run in group if not run.done]
        for run in group:
            if run.done:
                print(f'{run.name}: done before, {run.final}')
        if not waiting:
            continue
        for run in waiting:
            run.start(threads=max(1, cores // len(waiting)))
        later = [run for rest in groups[index + 1 :] for run in rest]
        try:
            _watch(waiting, later, after)
        except BaseException:
            print('\nStopping; each training writes a checkpoint ...')
            for run in waiting:
                run.stop()
            raise


def _watch(running: Iterable[Run], later: Iterable[Run], after: float) -> None:
    begin = shown = time.time()
    live = sys.stdout.isatty()
    running = list(running)
    while sum(run.poll() for run in running):  # each is looked at
        time.sleep(0.5)
        if time.time() - shown < (1 if live else 15):
            continue
        shown = time.time()
        places = {run.name: run.position() for run in running}
        left = max(seconds for _, seconds in places.values())
        left += sum(run.position()[1] for run in later) + after
        parts = [
            f'{run.name} {places[run.name][0]}/{run.iterations}{_ap(run)}'
            for run in running
        ]
        text = f'{" | ".join(parts)} | about {left / 60:.1f} min left in all'
        print(f'\r\x1b[K{text}' if live else text, end='' if live else '\n')
        sys.stdout.flush()
    names = ', '.join(run.name for run in running)
    end = '\r\x1b[K' if live else ''
    print(f'{end}{names}: trained in {(time.time() - begin) / 60:.1f} min')


def _ap(run: Run) -> str:
    curve = run.curve()
    return f' (AP {curve[-1][1]:.1f})' if curve else ''

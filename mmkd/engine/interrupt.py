"""Ctrl-C, SIGTERM: finish the iteration, save, say how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A training that was asked to stop and has saved where it stands.

    Attributes:
        checkpoint: What ``--resume`` goes on from.
        iteration: Iterations done.
        number: The signal.
    """

    def __init__(self, checkpoint: Path, iteration: int, number: int) -> None:
        super().__init__(
            f'Stopped after iteration {iteration}; saved {checkpoint}.'
        )
        self.checkpoint, self.iteration = checkpoint, iteration
        self.number = number


class LeaveValidation(KeyboardInterrupt):
    """Ends a validation so that the training can be saved and stopped."""


class Interrupts:
    """Notes the first signal while it is entered; the second one gets through.

    Attributes:
        number: The signal that came, 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        self.number = 0
        # Python hands signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            for one in _SIGNALS:
                self._before[one] = signal.signal(one, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for one, handler in self._before.items():
            # None: installed by C code, which Python cannot put back.
            signal.signal(one, handler or signal.SIG_DFL)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if is_main_process():
            print(
                '\nStopping: this iteration is finished and saved first. '
                'Press Ctrl-C again to stop at once, without saving.',
                file=sys.stderr,
                flush=True,
            )

    def agreed(self) -> int:
        """The signal on any rank, so that all stop in one iteration."""
        if get_world_size() == 1:
            return self.number
        number = torch.tensor([self.number])
        all_reduce(number, 'max')
        return int(number)

    def leave_validation_if_asked(self) -> None:
        if self.number:
            raise LeaveValidation

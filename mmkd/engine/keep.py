"""An old checkpoint goes only once the new one is there.

MMEngine's hook removes first and saves then: with ``max_keep_ckpts=1`` a full
disk or a loss that is not a number leaves nothing to go on from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook


class _Later:
    """A backend of local files that notes what to remove."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend
        self.noted: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.noted[path] = os.stat(path).st_ino

    def catch_up(self) -> None:
        for path, number in self.noted.items():
            # Another number: the new checkpoint has the old one's name.
            if os.stat(path).st_ino == number:
                self.backend.remove(path)


@cache
def keeping_class(plain: type[CheckpointHook]) -> type[CheckpointHook]:
    """The class of a checkpoint hook, extended: it saves, then removes."""

    class Keeping(plain):
        def _save_checkpoint_with_step(self, *arguments: Any, **named: Any):
            with _removing_later(self):
                super()._save_checkpoint_with_step(*arguments, **named)

        def _save_best_checkpoint(self, *arguments: Any, **named: Any):
            with _removing_later(self):
                super()._save_best_checkpoint(*arguments, **named)

    Keeping.__name__ = Keeping.__qualname__ = plain.__name__
    Keeping.__module__ = plain.__module__
    return Keeping


@contextmanager
def _removing_later(hook: CheckpointHook) -> Iterator[None]:
    backend = hook.file_backend
    if not isinstance(backend, LocalBackend):
        yield
        return
    hook.file_backend = later = _Later(backend)
    try:
        yield
    finally:
        hook.file_backend = backend
    later.catch_up()  # only if everything was saved

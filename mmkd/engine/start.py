"""A start that fails leaves the disk as it found it."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger


class Start:
    """Remembers what a work directory looked like before a run.

    MMEngine creates it, a log folder and a copy of the config before it
    builds the model. Until :meth:`commit`, :meth:`undo` removes exactly that.

    Args:
        work_dir: Folder of the run.
        config: File name of the config's copy, None if not known yet.
    """

    def __init__(self, work_dir: str | Path, config: str | None) -> None:
        self.work_dir = Path(os.path.abspath(work_dir))
        self.made = [
            one
            for one in (self.work_dir, *self.work_dir.parents)
            if not one.exists()
        ]
        self.config = self.work_dir / config if config else None
        self.before = (
            self.config.read_bytes()
            if self.config and self.config.is_file()
            else None
        )
        self.failed = True

    def commit(self) -> None:
        """The run has done its first step: what it wrote is to be kept."""
        self.failed = False

    def undo(self, log_dir: str | None, timestamp: str | None) -> None:
        """Remove what the run wrote, if it failed before its first step.

        Args:
            log_dir: The run's own log folder, if it came that far.
            timestamp: Name of the config's copy where it has no other.
        """
        if not self.failed or not is_main_process():
            return
        if log_dir is not None:
            _close_logs(log_dir)
            shutil.rmtree(log_dir, ignore_errors=True)
        self._put_config_back(timestamp)
        for one in self.made:
            # Not empty: something else writes there.
            with suppress(OSError):
                one.rmdir()

    def _put_config_back(self, timestamp: str | None) -> None:
        if self.before is not None:
            self.config.write_bytes(self.before)
        elif self.config is not None:
            self.config.unlink(missing_ok=True)
        elif timestamp is not None:
            (self.work_dir / f'{timestamp}.py').unlink(missing_ok=True)


def _close_logs(log_dir: str) -> None:
    logger = MMLogger.get_current_instance()
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler) and (
            handler.baseFilename.startswith(os.path.abspath(log_dir))
        ):
            handler.close()
            logger.removeHandler(handler)

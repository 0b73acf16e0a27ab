"""Cases that take turns: others with each commit, all with the slow tests."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mmkd.laboratory.catalogue import sample


def today() -> str:
    """What chooses the sample: the commit, or the day where there is none."""
    try:
        return subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


TODAY = today()


def marks(paths: Sequence[Path], count: int, what: str = '') -> dict:
    """Marks of each path: slow, unless it is its turn.

    Args:
        paths: What takes turns.
        count: How many have theirs.
        what: Any text; for another one it is the turn of others.
    """
    chosen = sample(paths, f'{TODAY} {what}', count=count)
    return {
        path: () if path in chosen else (pytest.mark.slow,) for path in paths
    }

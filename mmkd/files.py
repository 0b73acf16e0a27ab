"""Files that are whole or absent, and none replaced unasked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """A name to write to; the file gets its own when it is complete.

    Nothing is left of what was not finished.

    Args:
        path: The file.
        durable: Whether to wait until the disk has it; for thousands of small
            files that takes longer than writing them.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'note.txt')
        >>> with whole(path) as part:
        ...     _ = part.write_text('done')
        >>> path.read_text()
        'done'
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.part')
    try:
        yield temporary
        if durable:
            with temporary.open('rb+') as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Wait until the disk has the new name as well."""
    if not hasattr(os, 'O_DIRECTORY'):  # Windows cannot
        return
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_unfinished(folder: str | Path) -> list[Path]:
    """Remove what a killed process has begun to write with :func:`whole`.

    Args:
        folder: Where it is. No other process may be writing there.

    Returns:
        What was removed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / '.note.txt.part').write_text('do')
        >>> [one.name for one in remove_unfinished(folder)]
        ['.note.txt.part']
    """
    unfinished = [one for one in Path(folder).glob('.*.part') if one.is_file()]
    for one in unfinished:
        one.unlink(missing_ok=True)
    return unfinished


def check_free(*paths: str | Path, overwrite: bool = False) -> None:
    """No file may be there already, unless it may be replaced.

    Raises:
        FileExistsError: Names it, and what to type.
    """
    for path in paths:
        if Path(path).exists() and not overwrite:
            raise FileExistsError(
                f'{path} is there already. Name another file to write, or '
                f'add --overwrite.'
            )

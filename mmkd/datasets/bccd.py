"""Blood cells in microscope photographs: red, white, and platelets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from mmkd.checks import suggest
from mmkd.datasets.coco import CocoWriter
from mmkd.datasets.voc import clean_boxes, merged_labels, read_voc

ORIGIN = 'Shenggan/BCCD_Dataset on GitHub'
CLASSES = ('RBC', 'WBC', 'Platelets')
SPLITS = ('train', 'val', 'test')

#: Of the files of the 364 photographs, as :func:`folder_digest` counts them.
SHA256 = 'e3510f4a7a40dab1cedfbcde42233a2cb62efdc83131b923fc7341d730169a08'


def prepare_bccd(
    out: str | Path = 'data/bccd',
    source: str | Path | None = None,
    say: Callable[[str], None] = print,
    sha256: str | None = SHA256,
) -> dict:
    """Write the blood cells as a COCO data set, in the authors' splits.

    Args:
        out: Folder of the data set: ``train/``, ``train.json``, likewise for
            ``val`` and ``test``, and ``card.json``.
        source: The folder ``BCCD`` of the authors' archive, or the one that
            holds it. It is needed until the set is done.
        say: Called with each line of progress.
        sha256: Expected digest of the source; None takes any.

    Returns:
        The data card.

    Raises:
        FileExistsError: If ``out`` holds something else.
        FileNotFoundError: If the source is missing or lacks a file.
        ValueError: If the source is damaged or not the expected one.
    """
    recipe = dict(name='bccd', sha256=sha256)
    writer = CocoWriter(out, recipe, CLASSES)
    card = writer.card()
    if card is not None:
        say(f'{out}: done before')
        return card
    folder = _find(source)
    names = {split: _names(folder, split) for split in SPLITS}
    if sha256 is not None:
        say(f'{out}: comparing the files in {folder}')
        found = folder_digest(folder, names)
        if found != sha256:
            raise ValueError(
                f'The files in {folder} are not those of {ORIGIN}: expected '
                f'a SHA-256 that begins with {sha256[:16]}, got {found[:16]}. '
                f'Fetch the archive again.'
            )
    counts: Counter = Counter()
    for split, members in names.items():
        for name in members:
            counts += _add(writer, split, folder, name)
        say(f'{out}: {split}, {len(members)} photographs')
    return writer.finish(
        title='Blood cells in microscope photographs',
        licence='MIT (Shenggan, BCCD_Dataset)',
        source=ORIGIN,
        seed=None,  # nothing is drawn
        dropped=dict(zero_size=counts['zero_size'], outside=counts['outside']),
        cut_at_the_photograph=counts['cut'],
    )


def folder_digest(folder: Path, names: dict[str, list[str]]) -> str:
    """One digest of every file that is read, whatever else lies there.

    Args:
        folder: The folder ``BCCD``.
        names: Photographs by split.
    """
    digest = hashlib.sha256()
    for split, members in names.items():
        for name in members:
            for path in _files(folder, name):
                one = hashlib.sha256(_read(path)).hexdigest()
                digest.update(f'{split} {path.name} {one}\n'.encode())
    return digest.hexdigest()


def _find(source: str | Path | None) -> Path:
    if source is None:
        raise FileNotFoundError(
            f'BCCD is not on PyPI. Fetch the archive of {ORIGIN}, unpack it, '
            f'and name its folder with --source.'
        )
    for folder in (Path(source), Path(source, 'BCCD')):
        if (folder / 'Annotations').is_dir():
            return folder
    raise FileNotFoundError(
        f'--source {str(source)!r} has no folder Annotations, nor BCCD with '
        f'one. Name the folder BCCD of the archive of {ORIGIN}.'
    )


def _names(folder: Path, split: str) -> list[str]:
    path = folder / 'ImageSets' / 'Main' / f'{split}.txt'
    return _read(path).decode().split()


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return (
        folder / 'Annotations' / f'{name}.xml',
        folder / 'JPEGImages' / f'{name}.jpg',
    )


def _read(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    known = (
        [one.name for one in path.parent.iterdir()]
        if path.parent.is_dir()
        else []
    )
    raise FileNotFoundError(
        f'{path.parent} has no file {path.name!r}. {suggest(path.name, known)}'
    )


def _add(writer: CocoWriter, split: str, folder: Path, name: str) -> Counter:
    annotated, photograph = _files(folder, name)
    data = _read(photograph)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(
            f'{photograph} cannot be decoded. Fetch the archive again.'
        )
    annotation = read_voc(annotated)
    height, width = image.shape[:2]
    labels = np.array(merged_labels(annotation.names, {}, CLASSES), dtype=int)
    boxes, kept, found = clean_boxes(annotation.boxes, width, height)
    writer.add(
        split,
        photograph.name,
        image,
        boxes,
        labels[kept].tolist(),
        encoded=data,
    )
    return found

"""Data sets in the folders that Ultralytics' YOLO reads, and their labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.checks import suggest
from mmkd.reading import read_yaml

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')

#: Shares of an image's side beyond which a number cannot be meant as one.
FARTHEST = 2.0


@dataclass(frozen=True)
class Layout:
    """What a ``data.yaml`` says.

    Attributes:
        names: Class by id.
        images: Image files by split, only of splits that it names.
    """

    names: dict[int, str]
    images: dict[str, list[Path]]


def read_layout(path: str | Path) -> Layout:
    """Read a ``data.yaml``.

    ``path`` in it is relative to the file; where that folder does not exist,
    as after a move, the file's own folder stands in. A split is a folder, a
    text file that lists images, or a list of such.

    Args:
        path: The YAML file, or the folder that holds one.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If the file is no such YAML, or names no classes or images.
    """
    path = _find(Path(path))
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(
            f'{path} should hold names: and train:, got a '
            f'{type(content).__name__}.'
        )
    root = path.parent / str(content.get('path') or '')
    if not root.is_dir():
        root = path.parent
    images = {
        split: _images(root, content[split], f'{split}: of {path}')
        for split in ('train', 'val', 'test')
        if content.get(split)
    }
    if 'train' not in images:
        raise ValueError(
            f'{path} names no images to train on. Add train: images/train, '
            f'or wherever they are.'
        )
    return Layout(_names(content, path), images)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f'There is no folder {str(path)!r}. Name the one that holds '
            f'data.yaml.'
        )
    if (path / 'data.yaml').is_file():
        return path / 'data.yaml'
    found = sorted([*path.glob('*.yaml'), *path.glob('*.yml')])
    if len(found) == 1:
        return found[0]
    names = sorted(one.name for one in path.iterdir())
    raise FileNotFoundError(
        f'{path} has no data.yaml. {suggest("data.yaml", names)} Name the '
        f'file itself, or write one with names: and train:.'
    )


def _names(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    names = content.get('names')
    if isinstance(names, list):
        names = dict(enumerate(names))
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(number, int) for number in names)
        or len({str(name) for name in names.values()}) < len(names)
    ):
        raise ValueError(
            f'{path} should name each class once, as names: [cat, dog] or as '
            f'names: {{0: cat, 1: dog}}, got {names!r}.'
        )
    if content.get('nc', len(names)) != len(names):
        raise ValueError(
            f'{path} has nc: {content["nc"]}, but names {len(names)} classes. '
            f'Correct names: and remove nc:.'
        )
    return {number: str(name) for number, name in sorted(names.items())}


def _images(root: Path, entry: Any, who: str) -> list[Path]:
    images: list[Path] = []
    for one in entry if isinstance(entry, list) else [entry]:
        path = root / str(one)
        if not path.exists() and str(one).startswith('../'):
            # Some exports count from a folder further down.
            path = root / str(one)[3:]
        if path.is_dir():
            images += sorted(
                found
                for found in path.rglob('*')
                if found.suffix.lower() in IMAGE_SUFFIXES
            )
        elif path.is_file():
            images += _listed(root, path)
        else:
            known = [near.name for near in path.parent.glob('*')]
            raise FileNotFoundError(
                f'{who} is {str(one)!r}, but there is no {path}. '
                f'{suggest(path.name, known)}'
            )
    if not images:
        raise ValueError(f'{who} is {entry!r}, where there is no image.')
    return list(dict.fromkeys(images))


def _listed(root: Path, path: Path) -> list[Path]:
    images = []
    for line in path.read_text(encoding='utf-8-sig').splitlines():
        if not line.strip():
            continue
        # What begins with a dot is relative to the list, the rest to root.
        base = path.parent if line.startswith('./') else root
        images.append(base / line.strip())
        if not images[-1].is_file():
            raise FileNotFoundError(
                f'{path} lists {line.strip()!r}, but there is no {images[-1]}.'
            )
    return images


def label_file(image: Path) -> Path:
    """Where the boxes of an image stand.

    Example:
        >>> label_file(Path('a/images/train/b.jpg')).as_posix()
        'a/labels/train/b.txt'
    """
    parts = list(image.with_suffix('.txt').parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == 'images':
            parts[index] = 'labels'
            break
    return Path(*parts)


def read_yolo(
    path: str | Path, names: Mapping[int, str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Read one label file.

    Args:
        path: Text with a line a box: id, centre x and y, width, height, in
            shares of the image's sides; or id and the corners of a polygon,
            which becomes the box around it.
        names: Class by id.

    Returns:
        Class of each box; x1 y1 x2 y2 in shares of the sides, (G, 4).

    Raises:
        ValueError: If a line is nothing of this kind; the message names file
            and line.
    """
    found, boxes = [], []
    text = Path(path).read_text(encoding='utf-8-sig', errors='replace')
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            name, box = _box(line, names, f'line {number} of {path}')
            found.append(name)
            boxes.append(box)
    return tuple(found), np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _box(
    line: str, names: Mapping[int, str], who: str
) -> tuple[str, list[float]]:
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError:
        label, numbers = math.nan, []
    polygon = len(numbers) >= 6 and len(numbers) % 2 == 0
    if not (len(numbers) == 4 or polygon) or not label.is_integer():
        raise ValueError(
            f'read_yolo expects a class id and four numbers, cx cy w h, or '
            f'the corners of a polygon, in {who}, got {line.strip()!r}.'
        )
    if not all(map(math.isfinite, numbers)):
        raise ValueError(
            f'read_yolo expects finite numbers in {who}, got {line.strip()!r}.'
        )
    if max(map(abs, numbers)) > FARTHEST:
        raise ValueError(
            f'read_yolo expects shares of the image, 0 to 1, in {who}, got '
            f'{line.strip()!r}. If these are pixels, divide x and w by the '
            f"image's width, y and h by its height."
        )
    if int(label) not in names:
        known = ', '.join(f'{id_} {name!r}' for id_, name in names.items())
        raise ValueError(
            f'data.yaml has the classes {known}, got the id {int(label)} in '
            f'{who}. Add it to names:, or remove that line.'
        )
    if polygon:
        x, y = numbers[::2], numbers[1::2]
        return names[int(label)], [min(x), min(y), max(x), max(y)]
    x, y, width, height = numbers
    return names[int(label)], [
        x - width / 2,
        y - height / 2,
        x + width / 2,
        y + height / 2,
    ]

"""Where the splits of a data set in COCO's format lie, and its classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.checks import suggest
from mmkd.reading import read_json

#: What folders and files of a split are called.
NAMES = dict(
    train=('train',), val=('val', 'valid', 'validation'), test=('test',)
)
#: Places of the annotations of a split, in the folder of the data set.
ANNOTATIONS = (
    '{name}.json',
    'annotations/{name}.json',
    'annotations/instances_{name}*.json',
    '{name}/_annotations.coco.json',
)
#: Places of its pictures, the first that holds the first of them counts.
#: ``stem`` is the annotations' name without ``instances_``: ``train2017``.
PICTURES = (
    '{stem}',
    'images/{stem}',
    '{name}',
    'images/{name}',
    'images',
    '',
)


@dataclass(frozen=True)
class Split:
    """One split, by paths from the folder of the data set.

    Attributes:
        annotations: The JSON file.
        pictures: The folder from which it names its pictures, ``''`` for
            the data set's own.
        content: What the file holds.
    """

    annotations: str
    pictures: str
    content: Mapping[str, Any]


def find_splits(
    folder: str | Path, who: str, named: Mapping[str, str | Path] | None = None
) -> dict[str, Split]:
    """The splits of a data set, by the layouts that are usual.

    Those are ``train.json`` beside ``train/``, as ``prepare_data.py`` writes
    it; COCO's ``annotations/instances_train2017.json`` beside ``train2017/``;
    and ``train/_annotations.coco.json`` among its pictures. The validation
    split may be called ``valid``, too.

    Args:
        folder: The data set's.
        who: Named in messages.
        named: Annotations of splits that are called otherwise, from the
            folder.

    Returns:
        By ``'train'``, ``'val'`` and, if there is one, ``'test'``.

    Raises:
        FileNotFoundError: If there is no such folder, no ``train`` or no
            ``val`` in it, or the pictures of one are nowhere.
        ValueError: If a split could be one of several files, or a file holds
            no annotations.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{who} has no folder {str(folder)!r}. Name the one that holds '
            f"train and val in COCO's format, as prepare_data.py writes it."
        )
    found = {
        split: read_split(folder, path, name, who)
        for split, (path, name) in annotations(folder, who, named).items()
    }
    absent = [split for split in ('train', 'val') if split not in found]
    if absent:
        raise FileNotFoundError(
            f'{who} found no annotations of {" and of ".join(absent)} in '
            f'{str(folder)!r}. It looks for '
            f'{", ".join(one.format(name=absent[0]) for one in ANNOTATIONS)}; '
            f'for another name add --{absent[0]} FILE. Where there are no '
            f'splits yet they are drawn by: python tools/prepare_data.py '
            f'coco {folder} --out NEW'
        )
    return found


def annotations(
    folder: Path, who: str, named: Mapping[str, str | Path] | None = None
) -> dict[str, tuple[Path, str]]:
    """Files of annotations, and what each split is called, by split.

    Args:
        folder: The data set's.
        who: Named in messages.
        named: As for :func:`find_splits`.

    Raises:
        ValueError: If a split could be one of several files.
    """
    found = {}
    for split, names in NAMES.items():
        places = dict(_places(folder, names))
        if split in (named or {}):
            places = {Path(named[split]): names[0]}
        if len(places) > 1:
            raise ValueError(
                f'{who} found several files that could be {split!r} in '
                f'{str(folder)!r}: {", ".join(map(str, places))}. Say which: '
                f'--{split} {next(iter(places))}'
            )
        for place in places.items():
            found[split] = place
    return found


def _places(folder: Path, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
    for name in names:
        for pattern in ANNOTATIONS:
            for path in sorted(folder.glob(pattern.format(name=name))):
                yield path.relative_to(folder), name


def read_split(folder: Path, path: Path, name: str, who: str) -> Split:
    """Read annotations, and find the pictures that belong to them.

    Args:
        folder: The data set's.
        path: The JSON file, from there.
        name: What its split is called.
        who: Named in messages.

    Raises:
        FileNotFoundError: If there is no such file, or its first picture is
            nowhere.
        ValueError: If it holds no images.
    """
    if not (folder / path).is_file():
        found = [one.relative_to(folder) for one in folder.rglob('*.json')]
        raise FileNotFoundError(
            f'{who} has no file {path.as_posix()!r} in {str(folder)!r}. '
            f'{suggest(path.as_posix(), [one.as_posix() for one in found])}'
        )
    content = read_json(folder / path, who, 'COCO annotations', kind=dict)
    images = content.get('images')
    if not (isinstance(images, list) and images):
        raise ValueError(
            f'{who} expected COCO annotations in {str(folder / path)!r}, '
            f'with images; it lists none.'
        )
    first = images[0].get('file_name') if isinstance(images[0], dict) else None
    if not isinstance(first, str):
        raise ValueError(
            f'{who} expected a file_name of each image in '
            f'{str(folder / path)!r}, the first has {first!r}.'
        )
    stem = path.stem.removeprefix('instances_')
    places = dict.fromkeys(
        [one.format(stem=stem, name=name) for one in PICTURES]
        + [path.parent.as_posix()]
    )
    for place in places:
        if (folder / place / first).is_file():
            return Split(path.as_posix(), place, content)
    raise FileNotFoundError(
        f'{who} found {str(folder / path)!r}, but not its first picture, '
        f'{first!r}: it is in none of '
        f'{", ".join(str(folder / one) for one in places)}.'
    )


def classes_with_boxes(split: Split, who: str) -> tuple[str, ...]:
    """Names of the classes that a split has boxes of, in its file's order.

    mmdet numbers labels by that order. Left out are categories that nothing
    is an example of, as exports list a whole tree of them.

    Args:
        split: The training split.
        who: Named in messages.

    Raises:
        ValueError: If there are none.
    """
    boxes = split.content.get('annotations') or []
    used = {one.get('category_id') for one in boxes if isinstance(one, dict)}
    names = tuple(
        one.get('name')
        for one in split.content.get('categories') or []
        if isinstance(one, dict) and one.get('id') in used
    )
    if not names or not all(isinstance(one, str) for one in names):
        raise ValueError(
            f'{who} expected boxes of named categories in '
            f'{split.annotations!r}, got {names!r}.'
        )
    return names

"""A user's annotations in COCO's format, as labelling tools export them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmkd.datasets.samples import Folder, Sample
from mmkd.datasets.splits import Split, annotations, read_split

#: What is needed of a COCO file, and what it may be.
_KEYS = dict(
    id=(int, str),
    image_id=(int, str),
    category_id=(int, str),
    name=str,
    file_name=str,
    bbox=list,
)


def read_coco_folder(path: Path) -> Folder:
    """Read annotations in COCO's format, as tools for labelling export them.

    Often they are one file for all pictures: ``result.json``, or
    ``annotations/instances_default.json``, with the pictures in ``images``.
    Splits that are called ``train``, ``val`` and ``test`` are kept; ``train``
    alone counts as none. Crowds are ignored, masks left out.

    Args:
        path: The folder, or the single file.

    Raises:
        FileNotFoundError: If there is no such folder, no annotations, more
            than one file that could be meant, or no picture.
        ValueError: If the file lacks what is needed, or contradicts itself.
    """
    who = 'prepare_data.py'
    if path.is_file():
        folder = path.parent
        if folder.name == 'annotations':
            folder = folder.parent
        named = {'train': (path.relative_to(folder), path.stem)}
    else:
        folder = path
        if not folder.is_dir():
            raise FileNotFoundError(
                f'There is no folder {str(path)!r}. Name the one that holds '
                f'the annotations, or their file.'
            )
        named = annotations(folder, who) or {'train': _only(folder)}
    found = Counter()
    read = {
        split: read_split(folder, file, name, who)
        for split, (file, name) in named.items()
    }
    splits: dict[str | None, list[Sample]] = {
        split: list(_coco_samples(folder, one, found))
        for split, one in read.items()
    }
    if splits.keys() == {'train'}:
        splits = {None: splits['train']}
    elif splits.keys() & {'train', 'val'} != {'train', 'val'}:
        raise ValueError(
            f'{path} has annotations of {" and ".join(splits)} alone. Name '
            f'the file of which train, val and test are to be drawn.'
        )
    names = dict.fromkeys(
        category['name']
        for one in read.values()
        for category in one.content['categories']
    )
    used = {
        name
        for members in splits.values()
        for sample in members
        for name in sample.names
    }
    return Folder(
        folder, tuple(name for name in names if name in used), splits, found
    )


def _only(folder: Path) -> tuple[Path, str]:
    """The single file of annotations in a folder, and its name."""
    found = [*folder.glob('*.json'), *folder.glob('annotations/*.json')]
    if len(found) != 1:
        raise FileNotFoundError(
            f'{folder} should hold one JSON file of annotations, or those of '
            f'train, val and test; it holds '
            f'{", ".join(sorted(one.name for one in found)) or "none"}. Name '
            f'the file: prepare_data.py coco FILE.json'
        )
    return found[0].relative_to(folder), found[0].stem


def _coco_samples(
    folder: Path, split: Split, found: Counter
) -> Iterator[Sample]:
    path = folder / split.annotations
    names = {}
    for one in _entries(path, split, 'categories', 'id', 'name'):
        names[one['id']] = one['name']
    boxes: dict = {}
    for one in _entries(
        path, split, 'annotations', 'image_id', 'category_id', 'bbox'
    ):
        if one['category_id'] not in names:
            raise ValueError(
                f'{path} has a box of the category {one["category_id"]!r}, '
                f'which it does not list. Add it to categories.'
            )
        boxes.setdefault(one['image_id'], []).append(one)
        found['masks'] += bool(one.get('segmentation'))
    seen = set()
    for image in _entries(path, split, 'images', 'id', 'file_name'):
        if image['id'] in seen:
            raise ValueError(
                f'{path} has two images of the id {image["id"]!r}, so that '
                f'its boxes could belong to either. Export it again.'
            )
        seen.add(image['id'])
        members = boxes.pop(image['id'], [])
        file = folder / split.pictures / image['file_name']
        if not file.is_file():
            found['without_image'] += 1
            continue
        corner, extent = np.hsplit(_coco_boxes(path, members), 2)
        size = image.get('width'), image.get('height')
        yield Sample(
            file,
            names=tuple(names[one['category_id']] for one in members),
            boxes=np.hstack([corner, corner + extent]),
            ignored=tuple(bool(one.get('iscrowd')) for one in members),
            size=size if all(size) else None,
        )
    if boxes:
        raise ValueError(
            f'{path} has boxes of the image {next(iter(boxes))!r}, which it '
            f'does not list. Export it again.'
        )


def _entries(path: Path, split: Split, what: str, *keys: str) -> list[dict]:
    """One list of a COCO file, each entry with what is needed of it."""
    entries = split.content.get(what)
    if not isinstance(entries, list):
        raise ValueError(
            f'{path} needs a list of {what}, got {entries!r:.60}.'
        )
    for number, one in enumerate(entries):
        if not isinstance(one, dict) or not all(
            isinstance(one.get(key), _KEYS[key]) for key in keys
        ):
            raise ValueError(
                f'{path} needs {", ".join(keys)} in each of its {what}, but '
                f'number {number} is {one!r:.60}.'
            )
    return entries


def _coco_boxes(path: Path, members: Sequence[Mapping]) -> np.ndarray:
    """x y width height in pixels, (G, 4)."""
    try:
        boxes = np.array([one['bbox'] for one in members], float)
        boxes = boxes.reshape(len(members), 4)
    except (TypeError, ValueError):
        boxes = np.array([np.nan])
    if not np.isfinite(boxes).all():
        raise ValueError(
            f'{path} needs bbox=[x, y, width, height] in pixels, got '
            f'{[one["bbox"] for one in members]!r:.100}.'
        )
    return boxes

"""Looks at a data set before anything is trained on it.

mmdet drops what it cannot use without a word, numbers labels by the order of
the annotation file whatever the class list says, and meets a missing picture
hours later in a worker. Here each of these is one error at the start, or a
counted warning where training can rightly go on.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.dataset import BaseDataset

from mmkd.checks import suggest
from mmkd.datasets.photographs import photographs
from mmkd.reading import (
    OversizedError,
    decodes,
    opened_picture,
    read_json,
)

#: Pictures whose bytes are looked at; spread over larger data sets.
SAMPLE = 2000
#: What the fields of a COCO file are.
_TYPES = dict(
    id=(str, int),
    image_id=(str, int),
    category_id=(str, int),
    file_name=(str,),
    height=(float, int),
    width=(float, int),
    area=(float, int),
    bbox=(object,),  # looked at with the others
)
#: Pixels of the greatest object of each size, as COCO tells them apart.
SIZES = {'small': 32**2, 'medium': 96**2, 'large': float('inf')}
#: Last bytes of a complete JPEG and PNG.
_ENDS = {'.jpg': b'\xff\xd9', '.jpeg': b'\xff\xd9', '.png': b'IEND\xaeB`\x82'}


@dataclass
class Report:
    """What is known of a data set once it was looked at.

    Attributes:
        classes: Names by label, None if the set does not say.
        images: Pictures in the annotation file.
        boxes: Boxes that training can use.
        empty: Pictures without any.
        of_classes: Boxes of each class.
        of_sizes: Boxes that are small, medium and large, by :data:`SIZES`.
        pictures: Paths of the pictures.
        warnings: What was found and can be lived with, one sentence each.
        notes: What is to be known and need not be mended.
    """

    classes: tuple[str, ...] | None = None
    images: int = 0
    boxes: int = 0
    empty: int = 0
    of_classes: dict[str, int] = field(default_factory=dict)
    of_sizes: dict[str, int] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_dataset(
    config: Mapping, where: str = 'dataset', training: bool = True
) -> list[Report]:
    """Look at every data set that a config, wrappers included, names.

    Args:
        config: A data set's dict.
        where: Its place in the config, for messages:
            ``'train_dataloader.dataset'``.
        training: Whether it must hold boxes.

    Returns:
        A report for each set.

    Raises:
        FileNotFoundError: If annotations or pictures are missing.
        ValueError: If annotations cannot be read or mean something else than
            the config says, or a picture is damaged.
    """
    return [
        _check_one(one, place, training)
        for one, place in single_sets(config, where)
    ]


def single_sets(config: Mapping, where: str) -> Iterator[tuple[Mapping, str]]:
    """The data sets inside of wrappers, and the place of each.

    Photographs without labels are one of their own: ``dict(photographs=…)``.

    Args:
        config: A data set's dict.
        where: Its place in the config.

    Example:
        >>> one = dict(type='CocoDataset')
        >>> list(single_sets(dict(datasets=[one]), 'dataset'))
        [({'type': 'CocoDataset'}, 'dataset.datasets[0]')]
    """
    if isinstance(config.get('dataset'), Mapping):
        yield from single_sets(config['dataset'], f'{where}.dataset')
        if config.get('unlabelled'):
            folder = dict(photographs=config['unlabelled'])
            yield folder, f'{where}.unlabelled'
    elif isinstance(config.get('datasets'), Sequence):
        for number, one in enumerate(config['datasets']):
            if isinstance(one, Mapping):
                yield from single_sets(one, f'{where}.datasets[{number}]')
    else:
        yield config, where


def _check_one(config: Mapping, where: str, training: bool) -> Report:
    if 'photographs' in config:
        return _check_folder(config['photographs'], where)
    kind = config.get('type')
    if isinstance(kind, str):
        kind = DATASETS.get(kind)
    if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):
        return Report()  # not ours to judge; building it will
    _refuse_pickles(config, where)
    report = Report(classes=named_classes(kind, config))
    root = str(config.get('data_root') or '')
    folders = config.get('data_prefix') or {}
    pictures = _join(
        root, str(folders.get('img', folders.get('img_path', '')))
    )
    if not config.get('ann_file') or config.get('backend_args'):
        return report
    annotations = _join(root, str(config['ann_file']))
    if _is_remote(annotations) or _is_remote(pictures):
        return report
    check_annotation_file(annotations, f'{where}.ann_file')
    if _is_plain_coco(kind):
        coco = _Coco(annotations, where, report, training, config)
        coco.check()
        coco.check_places(pictures, root)
        found = coco.pictures(pictures)
        report.pictures = [path for path, _ in found]
        _check_pictures(found, pictures, where, report)
    return report


def _refuse_pickles(config: Mapping, where: str) -> None:
    """Files of proposals, which mmdet opens without asking.

    Raises:
        ValueError: If one is no JSON.
    """
    path = config.get('proposal_file')
    if path and not str(path).endswith('.json'):
        raise ValueError(
            f'{where}.proposal_file={str(path)!r} is a pickle, which can run '
            f'any code on this machine when mmdet opens it. If you trust '
            f'whoever wrote it, add --no-data-check; else take it out.'
        )


def named_classes(kind: type[BaseDataset], config: Mapping) -> tuple | None:
    """Class names that a dataset's config or its type says.

    None where neither does; a set that joins others has none of its own.

    Raises:
        ValueError: If a single class is written as a string.
    """
    metainfo = config.get('metainfo') or {}
    known = getattr(kind, 'METAINFO', {})
    classes = metainfo.get('classes', known.get('classes'))
    if classes is None:
        return None
    if isinstance(classes, str):
        # mmdet takes a string for a file of names, one a line.
        if os.path.isfile(classes):
            return tuple(Path(classes).read_text().split('\n'))
        raise ValueError(
            f'metainfo.classes must be a tuple of names, got the string '
            f'{classes!r}. For a single class write classes=({classes!r},).'
        )
    return tuple(classes)


def _is_plain_coco(kind: type[BaseDataset]) -> bool:
    """Whether mmdet's own reading of COCO files is what will happen."""
    return issubclass(kind, CocoDataset) and all(
        getattr(kind, name) is getattr(CocoDataset, name)
        for name in ('load_data_list', 'parse_data_info')
    )


def _join(root: str, path: str) -> str:
    if not path or _is_remote(path) or os.path.isabs(path):
        return path or root
    return os.path.join(root, path)


def _is_remote(path: str) -> bool:
    return '://' in path or path.startswith('s3:')


def check_annotation_file(path: str, where: str) -> None:
    """An annotation file must exist.

    Raises:
        FileNotFoundError: The message suggests the nearest name.
    """
    if os.path.isfile(path):
        return
    folder = Path(path).parent
    if folder.is_dir():
        hint = suggest(
            Path(path).name,
            sorted(one.name for one in folder.iterdir() if one.is_file()),
        )
    else:
        hint = f'The folder {str(folder)!r} does not exist either.'
    raise FileNotFoundError(
        f'{where} expected an annotation file at {path!r}, got no such file. '
        f'{hint} Set data_root and ann_file, for instance --cfg-options '
        f'{where}=FILE.json'
    )


# ----------------------------------------------------------- annotation files


class _Coco:
    """One COCO file, as mmdet is going to read it."""

    def __init__(
        self,
        path: str,
        where: str,
        report: Report,
        training: bool,
        config: Mapping,
    ) -> None:
        self.path, self.where, self.report = path, where, report
        self.training, self.config = training, config
        self.who = f'{where}: {path!r}'
        content = self._read()
        self.images: list[dict] = content['images']
        self.categories: list[dict] = content['categories']
        self.annotations: list[dict] = content.get('annotations', [])

    def _read(self) -> dict:
        content = read_json(self.path, self.where, 'COCO annotations')
        needed = ['images', 'categories']
        needed += ['annotations'] if self.training else []
        if not isinstance(content, dict) or any(
            not isinstance(content.get(key), list) for key in needed
        ):
            got = (
                f'the keys {", ".join(map(repr, content)) or "none"}'
                if isinstance(content, dict)
                else f'a {type(content).__name__}'
            )
            raise ValueError(
                f'{self.who} expected COCO annotations, a dict of lists '
                f'{", ".join(map(repr, needed))}; got {got}. Convert it, or '
                f'name the file with the boxes.'
            )
        return content

    def check(self) -> None:
        if not self.images:
            raise ValueError(f'{self.who} names no image.')
        self._require(self.images, 'image', 'id file_name height width')
        self._require(
            self.annotations, 'annotation', 'id image_id category_id bbox area'
        )
        self._require(self.categories, 'category', 'id')
        self._unique(self.images, 'image')
        self._unique(self.annotations, 'annotation')
        self._check_categories()
        self.report.images = len(self.images)
        self._warn_of_repeated_images()
        self._check_boxes()

    def _require(self, entries: list[dict], what: str, keys: str) -> None:
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(
                    f'{self.who}: {what} number {number} is no dict, but '
                    f'{entry!r:.40}. Write it again.'
                )
            for key in keys.split():
                if key not in entry:
                    raise ValueError(
                        f'{self.who}: {what} number {number} (id '
                        f'{entry.get("id")!r}) has no {key!r}, which mmdet '
                        f'reads. Add it to every {what}.'
                    )
                if not isinstance(entry[key], _TYPES[key]):
                    raise ValueError(
                        f'{self.who}: {what} number {number} has '
                        f'{key}={entry[key]!r:.40}, which is no '
                        f'{_TYPES[key][-1].__name__}. Correct it.'
                    )

    def _unique(self, entries: list[dict], what: str) -> None:
        counts = Counter(entry['id'] for entry in entries)
        twice = [one for one, number in counts.items() if number > 1]
        if twice:
            raise ValueError(
                f'{self.who}: {len(twice)} {what} ids occur more than once '
                f'({_few(twice)}). Number the {what}s anew.'
            )

    def _warn_of_repeated_images(self) -> None:
        counts = Counter(entry['file_name'] for entry in self.images)
        twice = [one for one, number in counts.items() if number > 1]
        if twice:
            self.report.warnings.append(
                f'{self.who}: {len(twice)} images stand there more than once '
                f'({_few(map(repr, twice))}); each counts as often. Join '
                f'their boxes under one id.'
            )

    def _check_categories(self) -> None:
        """Labels are places in the file's list, so the lists must agree."""
        classes = self.report.classes
        known = [one.get('name') for one in self.categories]
        if classes is None:
            return
        absent = [one for one in classes if one not in known]
        if absent:
            raise ValueError(
                f'{self.who} has no category {_few(map(repr, absent))}: the '
                f'config expects {len(classes)} classes, the file has '
                f'{len(known)} ({_few(map(repr, known))}). '
                f'{suggest(absent[0], map(str, known))} Write '
                f'metainfo=dict(classes={_tuple(known)}) in the data set, and '
                f'num_classes={len(known)} in the heads.'
            )
        used = [one for one in known if one in classes]
        if used != list(classes):
            raise ValueError(
                f'{self.who} lists its categories as {_few(map(repr, used))}, '
                f'the config as {_few(map(repr, classes))}. mmdet numbers '
                f'labels by the file, so names would be mixed up: write '
                f'metainfo=dict(classes={_tuple(used)}).'
            )

    def _check_boxes(self) -> None:
        classes, warn = self.report.classes, self.report.warnings.append
        names = {one['id']: one.get('name') for one in self.categories}
        sizes = {
            one['id']: (one['width'], one['height']) for one in self.images
        }
        boxes = self._boxes()
        image = [one['image_id'] for one in self.annotations]
        category = [one['category_id'] for one in self.annotations]
        area = np.array([one['area'] for one in self.annotations], float)

        homeless = np.array([one not in sizes for one in image], bool)
        unknown = np.array([one not in names for one in category], bool)
        other = np.array(
            [
                classes is not None and names.get(one) not in classes
                for one in category
            ],
            bool,
        )
        frame = np.array(
            [sizes.get(one, (0, 0)) for one in image], float
        ).reshape(-1, 2)
        corner, extent = boxes[:, :2], boxes[:, 2:]
        empty = (extent < 1).any(1) | ~(area > 0)
        overlap = np.minimum(corner + extent, frame) - np.maximum(corner, 0)
        outside = ~empty & ~homeless & (overlap <= 0).any(1)
        other &= ~unknown
        for mask, what, remedy in (
            (
                homeless,
                'belong to no image of the file',
                'List it under images, or take them out.',
            ),
            (
                unknown,
                'have a category that the file does not list',
                'List it under categories, or take them out.',
            ),
            (
                other,
                'are of categories that are not among the classes',
                'Name them in metainfo.classes if they are to be learnt.',
            ),
            (
                empty,
                'are smaller than a pixel',
                'Correct them: x, y, width, height in pixels; or take them '
                'out.',
            ),
            (
                outside,
                'lie outside of their image',
                'Correct them: x, y, width, height in pixels; or take them '
                'out.',
            ),
        ):
            if mask.any():
                ids = [
                    self.annotations[one]['id'] for one in mask.nonzero()[0]
                ]
                warn(
                    f'{self.who}: {int(mask.sum())} of {len(mask)} boxes '
                    f'{what} (annotation {_few(ids)}); they are left out. '
                    f'{remedy}'
                )
        good = ~(homeless | unknown | other | empty | outside)
        self.report.boxes = int(good.sum())
        self._warn_of_repeated_boxes(boxes, good)
        self._count([names.get(one) for one in category], extent, good)
        if not good.any() and (self.training or len(good)):
            raise ValueError(
                f'{self.who} has no box to train or evaluate on: of '
                f'{len(good)} none is of a known class and inside its image.'
            )
        with_boxes = {one for one, keep in zip(image, good) if keep}
        self._refuse_filtered(with_boxes)
        self._warn_of_bare_images(with_boxes)

    def _warn_of_repeated_boxes(
        self, boxes: np.ndarray, good: np.ndarray
    ) -> None:
        """The same place, image and category: one object counted twice."""
        seen, again = set(), []
        for one, box, keep in zip(self.annotations, boxes.tolist(), good):
            key = one['image_id'], one['category_id'], *box
            if keep and key in seen:
                again.append(one['id'])
            seen.add(key)
        if again:
            self.report.warnings.append(
                f'{self.who}: {len(again)} of {len(boxes)} boxes stand there '
                f'for the second time, of one image, category and place '
                f'(annotation {_few(again)}); each counts as an object of '
                f'its own. Take them out.'
            )

    def _count(
        self, names: Sequence[str], extent: np.ndarray, good: np.ndarray
    ) -> None:
        """Boxes of each class and size; crowds are no objects."""
        crowd = [bool(one.get('iscrowd')) for one in self.annotations]
        good = good & ~np.array(crowd, bool)
        counts = Counter(one for one, keep in zip(names, good) if keep)
        classes = self.report.classes or sorted(counts)
        self.report.of_classes = {one: counts[one] for one in classes}
        place = np.searchsorted(
            list(SIZES.values()), extent.prod(1)[good], side='right'
        )
        self.report.of_sizes = {
            size: int((place == number).sum())
            for number, size in enumerate(SIZES)
        }

    def _boxes(self) -> np.ndarray:
        """All boxes as ``x y width height``, (N, 4), pixels."""
        for one in self.annotations:
            box = one['bbox']
            if (
                not isinstance(box, list)
                or len(box) != 4
                or not all(isinstance(side, (int, float)) for side in box)
                or not np.isfinite(box).all()
            ):
                raise ValueError(
                    f'{self.who}: annotation {one["id"]!r} expected '
                    f'bbox=[x, y, width, height], got {box!r}.'
                )
        boxes = [one['bbox'] for one in self.annotations]
        return np.array(boxes, float).reshape(-1, 4)

    def _refuse_filtered(self, with_boxes: set) -> None:
        filters = self.config.get('filter_cfg') or {}
        smallest = filters.get('min_size', 0)
        left = [
            one['id']
            for one in self.images
            if min(one['width'], one['height']) >= smallest
            and (one['id'] in with_boxes or not filters.get('filter_empty_gt'))
        ]
        if self.training and not left:
            raise ValueError(
                f'{self.who}: filter_cfg={dict(filters)} leaves none of '
                f'{len(self.images)} images. Lower min_size.'
            )

    def _warn_of_bare_images(self, with_boxes: set) -> None:
        bare = [
            one['id'] for one in self.images if one['id'] not in with_boxes
        ]
        self.report.empty = len(bare)
        if not bare or not self.annotations:
            return
        filters = self.config.get('filter_cfg') or {}
        dropped = self.training and filters.get('filter_empty_gt', False)
        fate = 'left out' if dropped else 'kept as background'
        self.report.notes.append(
            f'{self.who}: {len(bare)} of {len(self.images)} images have no '
            f'box (image {_few(bare)}); they are {fate}.'
        )

    def check_places(self, folder: str, root: str) -> None:
        """Whether each picture lies where the config says pictures lie."""
        homes = [one for one in (folder or '.', root) if one]
        outside = [
            one['file_name']
            for one in self.images
            if not _is_inside(one['file_name'], folder, homes)
        ]
        if outside:
            path = os.path.realpath(os.path.join(folder, outside[0]))
            raise ValueError(
                f'{self.who}: {len(outside)} of {len(self.images)} images '
                f'leave the folder {homes[-1]!r}, the first by '
                f'file_name={outside[0]!r}, which is {path!r}. Annotations '
                f'of others must not choose any file of this machine. If '
                f'that is where your images are, set data_root to a folder '
                f'that holds them all, with ann_file and data_prefix from '
                f'there.'
            )

    def pictures(self, folder: str) -> list[tuple[str, tuple[int, int]]]:
        return [
            (
                os.path.join(folder, one['file_name']),
                (one['width'], one['height']),
            )
            for one in self.images
        ]


def _is_inside(name: str, folder: str, homes: Sequence[str]) -> bool:
    """Whether a file that is named from a folder lies in one of others.

    Links inside of a folder are its owner's own, and may lead anywhere, but
    what goes up by ``..`` is followed.
    """
    place = os.path.realpath if '..' in Path(name).parts else os.path.abspath
    path = place(os.path.join(folder, name))
    return any(path.startswith(os.path.join(place(one), '')) for one in homes)


# ------------------------------------------------------------------- pictures


def _check_pictures(
    pictures: list[tuple[str, tuple[int, int]]],
    folder: str,
    where: str,
    report: Report,
) -> None:
    """All must exist; those of a sample must be whole and as large as said."""
    missing = _missing(path for path, _ in pictures)
    if missing:
        raise FileNotFoundError(
            f'{where}: {len(missing)} of {len(pictures)} images do not exist, '
            f'the first at {missing[0]!r}. {_nearest_picture(missing[0])} Set '
            f"data_prefix=dict(img='FOLDER/'), now {folder!r}, to the folder "
            f'that the file names of the annotations start from.'
        )
    sample = _sample(pictures)
    _refuse_broken([path for path, _ in sample], where, 'the annotations')
    differs = [path for path, size in sample if not _has_size(path, size)]
    if differs:
        report.warnings.append(
            f'{where}: {len(differs)} of {len(sample)} images looked at have '
            f'another size than the annotations say '
            f'({_few(map(repr, differs))}); their boxes may be misplaced.'
        )


def _sample(pictures: Sequence) -> Sequence:
    return pictures[:: max(1, -(-len(pictures) // SAMPLE))]


def _refuse_broken(paths: Sequence[str], where: str, source: str) -> None:
    broken = [path for path in paths if not is_whole(path)]
    if broken:
        raise ValueError(
            f'{where}: {len(broken)} of {len(paths)} images looked at are '
            f'damaged or cut off ({_few(map(repr, broken))}). Copy them '
            f'again, or take them out of {source}.'
        )


def _check_folder(folder: str, where: str) -> Report:
    """Photographs without labels; those of a sample must be whole."""
    report = Report(pictures=photographs(folder))
    report.images = len(report.pictures)
    _refuse_broken(_sample(report.pictures), where, 'the folder')
    return report


def _missing(paths: Iterable[str]) -> list[str]:
    # One listing of a folder instead of a question for each of its files:
    # on network disks this is minutes against seconds.
    by_folder = defaultdict(list)
    for path in paths:
        by_folder[os.path.dirname(path)].append(path)
    missing = []
    for folder, members in by_folder.items():
        try:
            present = set(os.listdir(folder or '.'))
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        missing += [
            path for path in members if os.path.basename(path) not in present
        ]
    return missing


def _nearest_picture(path: str) -> str:
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        return f'The folder {folder!r} does not exist.'
    return suggest(os.path.basename(path), sorted(os.listdir(folder)))


def is_whole(path: str | Path) -> bool:
    """Whether a picture can be read to its end.

    Raises:
        OversizedError: If it claims more pixels than Pillow opens.

    OpenCV reads a JPEG that was cut off without complaint and fills the rest
    with grey.
    """
    end = _ENDS.get(Path(path).suffix.lower())
    if end is not None:
        with open(path, 'rb') as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - len(end)))
            if file.read() == end:
                return _opens(path)
    # Some cameras write on after the end, and other formats have none.
    return decodes(path)


def _opens(path: str | Path) -> bool:
    try:
        with opened_picture(path):
            return True
    except OversizedError:
        raise
    except (OSError, ValueError):
        return False


def _has_size(path: str, size: tuple[int, int]) -> bool:
    with opened_picture(path) as image:
        # Either way round: a photograph may carry its rotation beside it.
        return image.size in (tuple(size), tuple(size)[::-1])


def same_pictures(paths: Iterable[str]) -> list[list[str]]:
    """Files of the same bytes, which annotations name as several pictures.

    Only files of one size are read.

    Args:
        paths: Of the pictures; one that stands there twice counts once.

    Returns:
        Groups of two and more.
    """
    by_size = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_size[os.path.getsize(path)].append(path)
    groups = defaultdict(list)
    for size, alike in by_size.items():
        for path in alike if len(alike) > 1 else ():
            digest = hashlib.sha256(Path(path).read_bytes()).digest()
            groups[size, digest].append(path)
    return [one for one in groups.values() if len(one) > 1]


# ------------------------------------------------------------------- in words


def _few(items: Iterable[Any], most: int = 5) -> str:
    items = list(items)
    more = ', …' if len(items) > most else ''
    return ', '.join(str(one) for one in items[:most]) + more


def _tuple(names: Sequence[str]) -> str:
    """How to write class names in a config.

    Example:
        >>> _tuple(['tree'])
        "('tree',)"
    """
    if len(names) > 20:
        return '(…)'
    return repr(tuple(names))

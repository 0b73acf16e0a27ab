"""A user's own pictures: VOC, YOLO or a COCO export to a COCO data set.

Converters on PyPI do not fit: supervision and pylabel bring packages for
video, plotting or statistics along, and globox neither checks boxes nor keeps
images that have no label file.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from mmkd.checks import check_fraction, check_name, suggest
from mmkd.datasets.check import is_whole
from mmkd.datasets.coco import CocoWriter
from mmkd.datasets.coco_folder import read_coco_folder
from mmkd.datasets.samples import Folder, Sample
from mmkd.datasets.voc import clean_boxes, read_voc
from mmkd.datasets.yolo import (
    IMAGE_SUFFIXES,
    label_file,
    read_layout,
    read_yolo,
)

SPLITS = ('train', 'val', 'test')

#: What may be found in data that can be used for all that.
WARNINGS = dict(
    zero_size='boxes have no area and are dropped',
    outside='boxes lie outside of their image and are dropped',
    cut='boxes reach over the edge of their image and are cut there',
    left_out='boxes are of classes that were not asked for',
    without_annotation='images have no annotation file, and so no boxes',
    without_image='annotations have no image and are left out',
    in_no_split='images are in none of the splits and are left out',
    masks='boxes have a mask, which is left out',
)
DROPPED = ('zero_size', 'outside')


def prepare_own(
    source: str | Path,
    out: str | Path,
    kind: str,
    val: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
    outside: bool = False,
) -> dict:
    """Write a folder of annotated images as a COCO data set.

    The folder's own splits are kept. Where it has none they are drawn image
    by image; images that belong together, as frames of a video, are better
    divided by hand.

    Args:
        source: The folder, laid out as :func:`read_voc_folder`,
            :func:`read_yolo_folder` or :func:`read_coco_folder` says.
        out: Folder of the data set: ``train/``, ``train.json``, likewise for
            ``val`` and ``test``, and ``card.json``, which counts what was
            dropped. Images are copied byte for byte.
        kind: ``voc``, ``yolo`` or ``coco``.
        val: Share of the images that becomes ``val`` where splits are drawn.
        test: Likewise ``test``.
        seed: Of that draw.
        classes: Classes to keep, in this order; if None all, sorted or in
            the order of their ids.
        say: Called with each line of progress, warnings among them.
        outside: Whether images may lie outside of the folder, as links and
            a ``data.yaml`` can say.

    Returns:
        The data card.

    Raises:
        FileExistsError: If ``out`` holds something else.
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a file is damaged or says nothing that can be used.
    """
    readers = dict(
        voc=read_voc_folder, yolo=read_yolo_folder, coco=read_coco_folder
    )
    check_name('prepare_own', 'kind', kind, readers)
    folder = readers[kind](Path(source))
    if not outside:
        _check_inside(folder)
    classes = _chosen(folder, classes)
    splits, divided = _divided(folder, val, test, seed)
    recipe = dict(
        name=kind,
        classes=classes,
        splits=divided,
        sha256=_digest(splits),
    )
    writer = CocoWriter(out, recipe, classes)
    card = writer.card()
    if card is not None:
        say(f'{out}: done before')
        return card
    found = Counter(folder.found)
    for split, samples in splits.items():
        for sample in samples:
            found += _add(writer, split, sample)
        say(f'{out}: {split}, {len(samples)} images')
    for key, count in found.items():
        say(f'{out}: warning, {count} {WARNINGS[key]}')
    return writer.finish(
        title=folder.path.resolve().name,
        licence=None,  # the user knows
        source=str(source),
        seed=seed if None in folder.splits else None,
        dropped={key: found[key] for key in DROPPED},
        found={key: found[key] for key in WARNINGS if key not in DROPPED},
    )


def read_voc_folder(path: Path) -> Folder:
    """Read a Pascal VOC folder.

    ``Annotations/*.xml`` belong to the images of the same name in
    ``JPEGImages`` or ``images``. The splits are the lists
    ``ImageSets/Main/{train,val,test}.txt`` where these exist. Corners are
    taken as they stand; objects marked ``difficult`` are ignored.

    Args:
        path: The folder.
    """
    annotated = _subfolder(path, ('Annotations', 'annotations'))
    annotations = {one.stem: one for one in sorted(annotated.glob('*.xml'))}
    pictures = _subfolder(path, ('JPEGImages', 'images'))
    images = _by_stem(pictures)
    lists = _lists(path / 'ImageSets' / 'Main')
    for split, names in lists.items():
        for name in names:
            if name not in images:
                raise FileNotFoundError(
                    f'{split}.txt in {path / "ImageSets/Main"} lists '
                    f'{name!r}, but {pictures} has no such image. '
                    f'{suggest(name, images)}'
                )
    splits = {
        split: [_voc_sample(images[name], annotations) for name in names]
        for split, names in (lists or {None: list(images)}).items()
    }
    used = {sample.image for members in splits.values() for sample in members}
    found = Counter(
        without_annotation=_unannotated(splits),
        without_image=len(annotations.keys() - images.keys()),
        in_no_split=len(images) - len(used),
    )
    names = {
        name
        for members in splits.values()
        for sample in members
        for name in sample.names
    }
    return Folder(path, tuple(sorted(names)), splits, found)


def read_yolo_folder(path: Path) -> Folder:
    """Read a folder as Ultralytics' YOLO takes it.

    The splits are those that ``data.yaml`` names; ``train`` alone counts as
    none. The labels of ``images/a.jpg`` are ``labels/a.txt``.

    Args:
        path: The folder, or its ``data.yaml``.
    """
    layout = read_layout(path)
    splits: dict[str | None, list[Sample]] = {
        split: [_yolo_sample(image, layout.names) for image in images]
        for split, images in layout.images.items()
    }
    if splits.keys() == {'train'}:
        splits = {None: splits['train']}
    found = Counter(without_annotation=_unannotated(splits))
    home = path.parent if path.is_file() else path
    return Folder(home, tuple(layout.names.values()), splits, found)


def _check_inside(folder: Folder) -> None:
    """What is copied must not be chosen by a file that others wrote."""
    home = folder.path.resolve()
    for sample in folder.samples():
        found = sample.image.resolve()
        if home not in found.parents:
            raise ValueError(
                f'{folder.path} would take {str(sample.image)!r} into the '
                f'data set, which is {str(found)!r} and so outside of that '
                f'folder. If that is where your images are, add --outside.'
            )


def _subfolder(path: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (path / name).is_dir():
            return path / name
    if not path.is_dir():
        raise FileNotFoundError(
            f'There is no folder {str(path)!r}. Name the one that holds '
            f'Annotations and JPEGImages.'
        )
    known = sorted(one.name for one in path.iterdir() if one.is_dir())
    raise FileNotFoundError(
        f'{path} has no folder {" or ".join(names)}. '
        f'{suggest(names[0], known)} Name the folder that holds Annotations '
        f'and JPEGImages.'
    )


def _by_stem(folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in images:
            raise ValueError(
                f'{folder} has {images[path.stem].name} and {path.name}, so '
                f'that {path.stem}.xml could belong to either. Remove one.'
            )
        images[path.stem] = path
    if not images:
        raise ValueError(
            f'{folder} has no image, expected files that end on '
            f'{", ".join(IMAGE_SUFFIXES)}.'
        )
    return images


def _lists(folder: Path) -> dict[str | None, list[str]]:
    lists: dict[str | None, list[str]] = {}
    for split in SPLITS:
        path = folder / f'{split}.txt'
        if path.is_file():
            lines = path.read_text(encoding='utf-8-sig').splitlines()
            names = dict.fromkeys(line.strip() for line in lines)
            lists[split] = [name for name in names if name]
    if lists and not lists.get('train'):
        raise ValueError(
            f'{folder} lists images for {", ".join(map(str, lists))}, but '
            f'none in train.txt. Write it, or move the folder ImageSets away '
            f'to have splits drawn.'
        )
    return lists


def _voc_sample(image: Path, annotations: Mapping[str, Path]) -> Sample:
    path = annotations.get(image.stem)
    if path is None:
        return Sample(image)
    annotation = read_voc(path)
    difficult = tuple(
        one.findtext('difficult', default='0').strip() == '1'
        for one in ElementTree.parse(path).iter('object')
    )
    return Sample(
        image,
        path,
        annotation.names,
        annotation.boxes,
        difficult,
        annotation.size,
    )


def _yolo_sample(image: Path, names: Mapping[int, str]) -> Sample:
    path = label_file(image)
    if not path.is_file():
        return Sample(image)
    found, boxes = read_yolo(path, names)
    ignored = (False,) * len(boxes)
    return Sample(image, path, found, boxes, ignored, shares=True)


def _unannotated(splits: Mapping[str | None, Iterable[Sample]]) -> int:
    return sum(
        sample.annotation is None
        for members in splits.values()
        for sample in members
    )


def _chosen(folder: Folder, classes: Sequence[str] | None) -> tuple[str, ...]:
    samples = list(folder.samples())
    if not any(len(sample.boxes) for sample in samples):
        raise ValueError(
            f'{folder.path} has {len(samples)} images, '
            f'{folder.found["without_annotation"]} of them without an '
            f'annotation file, and not a single box. Annotations stand in '
            f'Annotations/NAME.xml (voc), labels/NAME.txt (yolo) or one JSON '
            f'file (coco).'
        )
    for name in classes or ():
        check_name(str(folder.path), 'class', name, folder.classes)
    return tuple(dict.fromkeys(classes or folder.classes))


def _divided(
    folder: Folder, val: float, test: float, seed: int
) -> tuple[dict[str, list[Sample]], dict | str]:
    """Samples by split, and how they came there."""
    if None in folder.splits:
        splits = draw_splits(folder.splits[None], val, test, seed)
        return splits, dict(seed=seed, val=val, test=test)
    for one, other in combinations(folder.splits, 2):
        shared = _files(folder.splits[one]) & _files(folder.splits[other])
        if shared:
            raise ValueError(
                f'{one} and {other} of {folder.path} share {len(shared)} '
                f'images, such as {min(shared)}, so that what is learned '
                f'would be taken for what is found. Take them out of one.'
            )
    return folder.splits, 'as in the folder'


def _files(samples: Iterable[Sample]) -> set[Path]:
    return {sample.image.resolve() for sample in samples}


def draw_splits(
    samples: Sequence[Sample], val: float, test: float, seed: int
) -> dict[str, list[Sample]]:
    """Divide samples at random, the same way on every machine.

    Args:
        samples: Of images with different names.
        val: Share that becomes ``val``, at least one sample unless 0.
        test: Likewise ``test``.
        seed: Another one divides them otherwise.

    Raises:
        ValueError: If nothing would be left to train on.

    Example:
        >>> samples = [Sample(Path(f'{name}.jpg')) for name in 'abcdefgh']
        >>> splits = draw_splits(samples, val=0.25, test=0, seed=0)
        >>> {split: len(members) for split, members in splits.items()}
        {'train': 6, 'val': 2}
    """
    check_fraction('prepare_own', val=val, test=test)
    sizes = {
        split: max(1, round(share * len(samples))) if share else 0
        for split, share in (('val', val), ('test', test))
    }
    if sum(sizes.values()) >= len(samples):
        raise ValueError(
            f'prepare_own needs images to train on, but of {len(samples)} '
            f'images {sizes["val"]} would be val and {sizes["test"]} test. '
            f'Lower --val and --test.'
        )
    shuffled = sorted(
        samples,
        key=lambda one: hashlib.sha256(
            f'{seed} {one.image.name}'.encode()
        ).digest(),
    )
    drawn = {
        'val': shuffled[: sizes['val']],
        'test': shuffled[sizes['val'] : sum(sizes.values())],
        'train': shuffled[sum(sizes.values()) :],
    }
    return {
        split: sorted(drawn[split], key=lambda one: one.image.name)
        for split in SPLITS
        if drawn[split]
    }


def _digest(splits: Mapping[str, Iterable[Sample]]) -> str:
    """Digest of every file, all of which are looked at before any is written.

    Raises:
        ValueError: If an image is cut off, or two would have one name.
    """
    digest = hashlib.sha256()
    for split, samples in splits.items():
        names: dict[str, Path] = {}
        for sample in samples:
            name = sample.image.name
            if name in names:
                raise ValueError(
                    f'{split} has two images of one name, {names[name]} and '
                    f'{sample.image}. Rename one, and its annotation file.'
                )
            names[name] = sample.image
            if not is_whole(sample.image):
                raise ValueError(
                    f'{sample.image} cannot be decoded to its end. Copy it '
                    f'again, or remove it and its annotation file.'
                )
            for path in filter(None, (sample.image, sample.annotation)):
                one = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f'{split} {path.name} {one}\n'.encode())
            if sample.annotation is None and sample.names:
                # They stand in one file for all.
                said = sample.names, sample.boxes.tolist(), sample.ignored
                digest.update(repr(said).encode())
    return digest.hexdigest()


def _add(writer: CocoWriter, split: str, sample: Sample) -> Counter:
    data = sample.image.read_bytes()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(
            f'OpenCV cannot decode {sample.image}. Save it as JPEG or PNG.'
        )
    height, width = image.shape[:2]
    if sample.size not in (None, (width, height)):
        raise ValueError(
            f'{sample.annotation or "A box"} was drawn on an image of '
            f'{sample.size} pixels, but {sample.image} has '
            f'{(width, height)} as it is shown. Annotate it again, or '
            f'correct the size if the boxes fit.'
        )
    boxes = sample.boxes
    if sample.shares:
        # Six decimals of a share leave a box uncertain by some thousandths
        # of a pixel, which must not count as reaching over the edge.
        boxes = (boxes * ([width, height] * 2)).round(2)
    boxes, kept, found = clean_boxes(boxes, width, height)
    asked = np.array(
        [sample.names[index] in writer.classes for index in kept], dtype=bool
    )
    kept = kept[asked]
    found['left_out'] = len(asked) - len(kept)
    writer.add(
        split,
        sample.image.name,
        image,
        boxes[asked],
        [writer.classes.index(sample.names[index]) for index in kept],
        np.array(sample.ignored, dtype=bool)[kept],
        encoded=data,
    )
    return found

"""Pascal VOC annotation files, and the boxes in them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Annotation:
    """What one VOC file says of its image.

    Attributes:
        filename: As written in the file.
        size: (width, height) in pixels, or None where the file has none.
        names: Class of each box.
        boxes: x1 y1 x2 y2 in pixels as they stand in the file, (G, 4).
    """

    filename: str
    size: tuple[int, int] | None
    names: tuple[str, ...]
    boxes: np.ndarray


def read_voc(path: str | Path) -> Annotation:
    """Read one annotation file.

    Args:
        path: An XML file as labelImg and its kin write it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no VOC file, or a coordinate is no number; the
            message names file and object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'read_voc has no annotation file {str(path)!r}. Give the folder '
            f'that holds the XML files.'
        )
    data = path.read_bytes()
    if b'<!DOCTYPE' in data or b'<!ENTITY' in data:
        raise ValueError(
            f'read_voc expects plain XML without a DOCTYPE or entities, got '
            f'one in {path}. Remove that declaration.'
        )
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(
            f'read_voc cannot read {path}: {error}. Expected XML with one '
            f'<object> a box.'
        ) from error
    if root.tag != 'annotation':
        raise ValueError(
            f'read_voc expects <annotation> as the root of {path}, got '
            f'<{root.tag}>.'
        )
    names, boxes = [], []
    for number, item in enumerate(root.iter('object')):
        who = f'object {number} of {path}'
        names.append(_text(item, 'name', who))
        boxes.append(
            [
                _number(item, f'bndbox/{corner}', who)
                for corner in ('xmin', 'ymin', 'xmax', 'ymax')
            ]
        )
    size = None
    if root.find('size') is not None:
        who = f'the size in {path}'
        width = _number(root, 'size/width', who)
        height = _number(root, 'size/height', who)
        # Some tools write zeros for a size they do not know.
        size = (int(width), int(height)) if width and height else None
    return Annotation(
        root.findtext('filename', default='').strip(),
        size,
        tuple(names),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
    )


def _text(item: ElementTree.Element, tag: str, who: str) -> str:
    text = (item.findtext(tag) or '').strip()
    if not text:
        raise ValueError(f'read_voc expects <{tag}> in {who}, found none.')
    return text


def _number(item: ElementTree.Element, tag: str, who: str) -> float:
    text = _text(item, tag, who)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f'read_voc expects a number in <{tag}> of {who}, got {text!r}.'
        )
    return number


def clean_boxes(
    boxes: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, Counter]:
    """Cut boxes at the image, and drop those of which nothing remains.

    Args:
        boxes: x1 y1 x2 y2 in pixels, (G, 4).
        width: Of the image, in pixels.
        height: Of the image, in pixels.

    Returns:
        The boxes that remain, (K, 4); their positions among the given ones,
        (K,); and counts of what was found: ``zero_size`` and ``outside`` are
        dropped, ``cut`` are kept.

    Example:
        >>> boxes = np.array([[-2.0, 0, 5, 5], [3, 3, 3, 9], [20, 0, 25, 5]])
        >>> kept, index, found = clean_boxes(boxes, 10, 10)
        >>> kept.tolist(), index.tolist(), sorted(found.items())
        ([[0.0, 0.0, 5.0, 5.0]], [0], [('cut', 1), ('outside', 1), \
('zero_size', 1)])
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    inside = _clip(boxes, 0, 0, width, height)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    outside = ~empty & (inside[:, 2:] <= inside[:, :2]).any(1)
    keep = ~(empty | outside)
    found = Counter(
        zero_size=int(empty.sum()),
        outside=int(outside.sum()),
        cut=int((inside != boxes).any(1)[keep].sum()),
    )
    return inside[keep], np.flatnonzero(keep), found


def cut_boxes(
    boxes: np.ndarray, window: Sequence[int], min_visible: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes as a window of the image shows them.

    Args:
        boxes: x1 y1 x2 y2 in pixels of the image, (G, 4).
        window: x1 y1 x2 y2 of the window in whole pixels.
        min_visible: Share of a box's area that must lie in the window for the
            box to count.

    Returns:
        Boxes of which anything is visible, cut and in the window's pixels,
        (K, 4); their positions among the given ones, (K,); and whether too
        little of each is visible, (K,).

    Example:
        >>> boxes = np.array([[0.0, 0, 10, 10], [8, 0, 18, 10]])
        >>> cut, index, ignored = cut_boxes(boxes, (0, 0, 10, 10), 0.5)
        >>> cut.tolist(), ignored.tolist()
        ([[0.0, 0.0, 10.0, 10.0], [8.0, 0.0, 10.0, 10.0]], [False, True])
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    cut = _clip(boxes, *window)
    visible = area(cut) / np.maximum(area(boxes), np.finfo(float).tiny)
    index = np.flatnonzero(visible > 0)
    offset = np.array([window[0], window[1]] * 2, dtype=np.float64)
    return cut[index] - offset, index, visible[index] < min_visible


def area(boxes: np.ndarray) -> np.ndarray:
    """Area in square pixels, zero where corners are swapped, (G, 4) → (G,)."""
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)


def _clip(
    boxes: np.ndarray, x1: float, y1: float, x2: float, y2: float
) -> np.ndarray:
    return np.stack(
        [
            boxes[:, 0].clip(x1, x2),
            boxes[:, 1].clip(y1, y2),
            boxes[:, 2].clip(x1, x2),
            boxes[:, 3].clip(y1, y2),
        ],
        axis=1,
    )


def merged_labels(
    names: Iterable[str], merge: Mapping[str, str], classes: Sequence[str]
) -> list[int]:
    """Class indices after some classes became one.

    Args:
        names: Names as annotated.
        merge: Annotated name → name of the class it counts as.
        classes: Names of the classes, in order.

    Raises:
        ValueError: If a name is neither merged nor a class.

    Example:
        >>> merged_labels(['Dead', 'Tree'], {'Dead': 'Tree'}, ['Tree'])
        [0, 0]
    """
    labels = []
    for name in names:
        known = merge.get(name, name)
        if known not in classes:
            raise ValueError(
                f'The data set has the classes {", ".join(classes)}, got an '
                f'object {name!r}. Its files are not those that were '
                f'expected.'
            )
        labels.append(classes.index(known))
    return labels

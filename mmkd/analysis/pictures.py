"""Detections drawn into pictures, side by side.

A picture is a grid of tiles: a row is an image, a column is one detector or
the annotation. Tiles are scaled to one size, so that titles, boxes and scores
stay legible for an image of 64 pixels as for one of 2000.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import mmcv
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from mmkd.files import whole
from mmkd.reading import check_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    'attention_over',
    'grid',
    'instances',
    'mosaic',
    'read_image',
    'side_by_side',
]

#: Boxes (M, 4) as ``x1 y1 x2 y2`` in pixels of the image, scores (M,) or
#: None, labels (M,).
Boxes: TypeAlias = tuple[Any, Any, Any]

#: Okabe and Ito's colours, which colour-blind people tell apart; the bright
#: ones first.
COLOURS = (
    '#56B4E9',
    '#E69F00',
    '#CC79A7',
    '#F0E442',
    '#009E73',
    '#D55E00',
    '#0072B2',
    '#FFFFFF',
)
#: Beyond this number scores would hide what is in the image.
MOST_SCORES = 25

_DPI = 100
_GAP, _TITLE, _LEGEND = 8, 30, 26  # pixels


def side_by_side(
    image: str | Path | np.ndarray,
    panels: Sequence[tuple[str, Any, Any, Any]],
    classes: Sequence[str],
    path: str | Path,
    tile: int = 640,
) -> Path:
    """Draw the same image once a panel, each with its own boxes.

    Args:
        image: A file, or RGB bytes, (H, W, 3).
        panels: Title, boxes (M, 4) as ``x1 y1 x2 y2`` in pixels, scores (M,)
            or None, and labels (M,) of each panel.
        classes: Names of the classes, by label.
        path: The picture to write; its suffix gives the format.
        tile: Longer side of a drawn image, pixels.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: If the image does not exist.
        ValueError: If there is nothing to draw, or the image is damaged.
    """
    titles = [title for title, *_ in panels]
    row = (image, [tuple(boxes) for _, *boxes in panels])
    return grid([row], titles, path, classes, tile=tile)


def grid(
    rows: Sequence[tuple[str | Path | np.ndarray, Sequence[Boxes]]],
    titles: Sequence[str],
    path: str | Path,
    classes: Sequence[str] = (),
    tile: int = 400,
) -> Path:
    """Draw images below each other, and detectors beside each other.

    Args:
        rows: Each an image (a file, or RGB bytes (H, W, 3)) and its boxes,
            scores and labels for each column.
        titles: One a column.
        path: The picture to write; its suffix gives the format.
        classes: Names of the classes, by label.
        tile: Longer side of a drawn image, pixels.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: If an image does not exist.
        ValueError: If there is nothing to draw, a row has another number of
            columns than there are titles, or an image is damaged.
    """
    _check_grid(rows, titles)
    images = [read_image(image) for image, _ in rows]
    cells = [[_arrays(boxes) for boxes in row] for _, row in rows]
    names = _Names(classes, [cell[2] for row in cells for cell in row])
    figure, axes = _canvas(images, len(titles), tile, names.in_legend)
    for row, image, line in zip(cells, images, axes):
        for (boxes, scores, labels), axis in zip(row, line):
            axis.imshow(image)
            _draw(axis, boxes, scores, labels, names)
    for title, axis in zip(titles, axes[0]):
        _write_title(axis, title)
    names.add_legend(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        figure.savefig(part, dpi=_DPI, format=path.suffix[1:] or 'png')
    return path


def mosaic(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    path: str | Path,
    tile: int = 320,
) -> Path:
    """Put pictures below and beside each other.

    Args:
        rows: Pictures of one size in each row, RGB bytes (H, W, 3).
        titles: One a column.
        path: The picture to write; its suffix gives the format.
        tile: Longer side of a drawn picture, pixels.

    Returns:
        ``path``.

    Raises:
        ValueError: If there is nothing to draw, or a row has another number
            of pictures than there are titles.
    """
    _check_grid([(None, row) for row in rows], titles)
    figure, axes = _canvas([row[0] for row in rows], len(titles), tile, False)
    for row, line in zip(rows, axes):
        for picture, axis in zip(row, line):
            axis.imshow(picture)
    for title, axis in zip(titles, axes[0]):
        _write_title(axis, title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        figure.savefig(part, dpi=_DPI, format=path.suffix[1:] or 'png')
    return path


def instances(sample: Any, score_thr: float = 0.0) -> Boxes:
    """Boxes, scores and labels of a sample, or of its instances.

    Args:
        sample: mmdet's ``DetDataSample`` with predictions, or the
            ``InstanceData`` of predictions or annotations.
        score_thr: Predictions below it are left out.

    Returns:
        Arrays of shape (M, 4), (M,) and (M,); None in place of the scores of
        annotations.
    """
    found = sample.pred_instances if 'pred_instances' in sample else sample
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    scores = found.scores if 'scores' in found else None
    boxes, scores, labels = _arrays((boxes, scores, found.labels))
    if scores is None:
        return boxes, scores, labels
    kept = scores >= score_thr
    return boxes[kept], scores[kept], labels[kept]


def read_image(image: str | Path | np.ndarray) -> np.ndarray:
    """RGB bytes of an image, (H, W, 3).

    Args:
        image: A file, or an image already read, which is returned.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no image, or a damaged one.
    """
    if isinstance(image, np.ndarray):
        return image
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f'There is no image {str(path)!r}.')
    check_picture(path)
    pixels = mmcv.imread(str(path))
    if pixels is None:
        raise ValueError(
            f'{str(path)!r} of {path.stat().st_size} bytes is no image, or a '
            f'damaged one. Copy it again, or name another.'
        )
    return np.ascontiguousarray(pixels[..., ::-1])


def attention_over(
    image: np.ndarray,
    feature: Tensor,
    strength: float = 0.6,
    from_zero: bool = False,
) -> np.ndarray:
    """Colour an image by where a feature map is strong.

    The mean of the activations' magnitude over the channels, from its
    smallest value (dark) to its largest (yellow).

    Args:
        image: RGB bytes, (H, W, 3).
        feature: The image's map of one level, (C, h, w).
        strength: Share of the colour, 0 leaves the image as it is.
        from_zero: Let 0 be dark, not the smallest value, so that a map that
            is the same everywhere is yellow.

    Returns:
        RGB bytes, (H, W, 3).
    """
    from matplotlib import colormaps

    heat = feature.detach().float().cpu().abs().mean(0)
    least = heat.new_zeros(()) if from_zero else heat.min()
    heat = (heat - least) / (heat.max() - least).clamp(min=1e-12)
    heat = F.interpolate(
        heat[None, None],
        image.shape[:2],
        mode='bilinear',
        align_corners=False,
    )[0, 0]
    colour = 255 * colormaps['inferno'](heat.numpy())[..., :3]  # H, W, 3
    mixed = (1 - strength) * image + strength * colour
    return mixed.round().clip(0, 255).astype(np.uint8)


class _Names:
    """Colours of the labels, and where their names are written.

    A few classes stand in a legend; where there are more than colours, each
    box says its own.
    """

    def __init__(
        self, classes: Sequence[str], labels: Sequence[np.ndarray]
    ) -> None:
        self.classes = classes
        self.present = sorted({int(one) for some in labels for one in some})
        few = len(self.present) <= len(COLOURS)
        # By label where that suffices: a class keeps its colour from one
        # picture to the next.
        keep = len(classes) <= len(COLOURS) or not few
        self.colours = {
            label: COLOURS[(label if keep else rank) % len(COLOURS)]
            for rank, label in enumerate(self.present)
        }
        self.in_legend = few and len(self.present) > 1

    def of(self, label: int) -> str:
        if label < len(self.classes):
            return str(self.classes[label])
        return f'class {label}'

    def caption(self, label: int, score: float | None) -> str:
        each = not self.in_legend and len(self.present) > 1
        parts = [self.of(label)] if each else []
        return ' '.join(
            parts if score is None else [*parts, f'{100 * score:.0f}']
        )

    def add_legend(self, figure: Figure) -> None:
        if not self.in_legend:
            return
        from matplotlib.patches import Patch

        figure.legend(
            handles=[
                Patch(
                    facecolor=self.colours[label],
                    edgecolor='black',
                    linewidth=0.5,
                    label=self.of(label),
                )
                for label in self.present
            ],
            loc='lower center',
            ncols=len(self.present),
            frameon=False,
            fontsize=10,
            borderaxespad=0.1,
        )


def _check_grid(rows: Sequence, titles: Sequence[str]) -> None:
    if not rows or not titles:
        raise ValueError(
            f'A picture needs rows and columns, got {len(rows)} images and '
            f'{len(titles)} titles.'
        )
    for index, (_, cells) in enumerate(rows):
        if len(cells) != len(titles):
            raise ValueError(
                f'Row {index} has boxes for {len(cells)} columns, but there '
                f'are {len(titles)} titles. Give one entry a title; without '
                f'boxes it is ([], None, []).'
            )


def _arrays(cell: Boxes) -> Boxes:
    boxes, scores, labels = (
        one.detach().cpu().numpy() if isinstance(one, Tensor) else one
        for one in cell
    )
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    labels = np.asarray(labels, dtype=int).reshape(-1)
    if scores is not None:
        scores = np.asarray(scores, dtype=float).reshape(-1)
    for what, some in (('labels', labels), ('scores', scores)):
        if some is not None and len(some) != len(boxes):
            raise ValueError(
                f'A tile has {len(boxes)} boxes and {len(some)} {what}; '
                f'there must be one for each box.'
            )
    return boxes, scores, labels


def _canvas(
    images: Sequence[np.ndarray], columns: int, tile: int, legend: bool
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with one axis a tile, placed to the pixel."""
    # Not pyplot: it keeps every figure and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = [_fit(image, tile) for image in images]
    width = max(size[1] for size in sizes)
    total_width = _GAP + columns * (width + _GAP)
    total_height = (
        _TITLE
        + sum(size[0] + _GAP for size in sizes)
        + (_LEGEND if legend else 0)
    )
    figure = Figure(
        figsize=(total_width / _DPI, total_height / _DPI), facecolor='white'
    )
    FigureCanvasAgg(figure)
    axes, top = [], _TITLE
    for height, own_width in sizes:
        line = []
        for column in range(columns):
            left = _GAP + column * (width + _GAP) + (width - own_width) / 2
            bottom = total_height - top - height
            axis = figure.add_axes(
                (
                    left / total_width,
                    bottom / total_height,
                    own_width / total_width,
                    height / total_height,
                )
            )
            axis.set_axis_off()
            line.append(axis)
        axes.append(line)
        top += height + _GAP
    return figure, axes


def _fit(image: np.ndarray, tile: int) -> tuple[int, int]:
    scale = tile / max(image.shape[:2])
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    return height, width


def _write_title(axis: Axes, title: str) -> None:
    text = axis.set_title(title, fontsize=12, pad=6)
    room = axis.get_window_extent().width / text.get_window_extent().width
    if room < 1:
        text.set_fontsize(max(7, 12 * room))


def _draw(
    axis: Axes,
    boxes: np.ndarray,
    scores: np.ndarray | None,
    labels: np.ndarray,
    names: _Names,
) -> None:
    from matplotlib.patches import Rectangle

    captions = len(boxes) <= MOST_SCORES
    # The best on top.
    order = range(len(boxes)) if scores is None else np.argsort(scores)
    for index in order:
        # A pixel's centre has whole coordinates in matplotlib, its corner in
        # mmdet.
        left, top, right, bottom = boxes[index] - 0.5
        colour = names.colours[int(labels[index])]
        # A dark rim makes a light line visible on light ground.
        for line, width, alpha in (('black', 2.6, 0.5), (colour, 1.4, 1)):
            axis.add_patch(
                Rectangle(
                    (left, top),
                    right - left,
                    bottom - top,
                    fill=False,
                    edgecolor=line,
                    linewidth=width,
                    alpha=alpha,
                    joinstyle='miter',
                )
            )
        score = None if scores is None else float(scores[index])
        text = names.caption(int(labels[index]), score)
        if captions and text:
            _write_caption(axis, (left, top), text, colour)


def _write_caption(
    axis: Axes, corner: tuple[float, float], text: str, colour: str
) -> None:
    """Above the box's corner, or inside it at the top of the image."""
    left, top = corner
    pixels = axis.get_window_extent().height / axis.get_ylim()[0]
    axis.text(
        max(left, 0),
        max(top, 0),
        text,
        fontsize=7,
        color='black' if colour != '#0072B2' else 'white',
        va='bottom' if top * pixels > 14 else 'top',
        clip_on=True,
        bbox=dict(facecolor=colour, edgecolor='none', alpha=0.85, pad=0.6),
    )

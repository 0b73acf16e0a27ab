"""Generated pictures of six shapes: a laboratory that fits on a laptop.

Meant for trying what a large detector can teach a small one: the images are
small and quickly made, and too hard for a small detector to find everything.
The classes differ in form. As with real things, a colour is a hint and no
proof: three of four shapes have the colour of their class, the others any, and
so has what is no class. Texture, size and place say nothing of the class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import mul
from pathlib import Path
from typing import TypeVar

import numpy as np

from mmkd.checks import check_name
from mmkd.datasets.coco import CocoWriter

T = TypeVar('T')

CLASSES = ('disc', 'square', 'triangle', 'plus', 'star', 'crescent')
SPLITS = ('train', 'val', 'test')
COUNTS = {'train': 1200, 'val': 150, 'test': 400}
#: Arguments for a set that is drawn in a second, for tiny trainings.
TINY = dict(
    out='data/shapes_tiny',
    size=96,
    counts={'train': 64, 'val': 16, 'test': 16},
)

#: Part of the recipe; counts up whenever a pixel or a box would change.
DRAWING = 2

#: Radii of the circle around a shape: 8 to 35 pixels in steps of 5 %, so
#: that a uniform choice among them is uniform in the logarithm.
RADII = tuple(accumulate(repeat(1.05, 30), mul, initial=8.0))

#: Colours of the classes, BGR, and the share of shapes that have theirs.
COLOURS = dict(
    disc=(60, 60, 220),
    square=(60, 200, 60),
    triangle=(220, 90, 40),
    plus=(40, 210, 230),
    star=(220, 60, 210),
    crescent=(225, 220, 60),
)
HINTED = 0.75

#: Shares of the images: without objects; with a cluster of one class; and of
#: the clusters, how many are too dense to count.
EMPTY, CLUSTERED, UNCOUNTED = 0.08, 0.2, 0.4

#: Share of a shape that must be visible for its box to count.
MIN_VISIBLE = 0.5

#: Cosines and sines of 36 and 72 degrees, from roots.
_COS36, _COS72 = (math.sqrt(5) + 1) / 4, (math.sqrt(5) - 1) / 4
_SIN36, _SIN72 = math.sqrt(1 - _COS36 * _COS36), math.sqrt(1 - _COS72 * _COS72)

#: Outward normals of the five lines that a star's edges lie on.
_STAR = (
    (0, -1),
    (_SIN72, -_COS72),
    (-_SIN72, -_COS72),
    (_SIN36, _COS36),
    (-_SIN36, _COS36),
)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v <= 1


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) <= math.sqrt(0.5)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (v >= -0.5) & (math.sqrt(3) * abs(u) + v <= 1)


def _plus(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    small, large = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    return (small <= 0.3) & (large <= 0.95)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A point is in a five-pointed star if it is beyond one line at most.
    beyond = [x * u + y * v > _COS72 for x, y in _STAR]
    return np.sum(beyond, axis=0) <= 1


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _disc(u, v) & ((u - 0.5) * (u - 0.5) + v * v > 0.64)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _disc(u, v) & ~_disc(u / 0.55, v / 0.55)


def _frame(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _square(u, v) & ~_square(u / 0.5, v / 0.5)


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (abs(u) <= 0.97) & (abs(v) <= 0.2)


def _corner(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _square(u, v) & ((u < -0.3) | (v < -0.3))


#: Whether points in the unit circle belong to a form, (H, W) → (H, W). Forms
#: that are no class stand for what resembles one and is none.
FORMS = dict(
    disc=_disc,
    square=_square,
    triangle=_triangle,
    plus=_plus,
    star=_star,
    crescent=_crescent,
    ring=_ring,
    frame=_frame,
    bar=_bar,
    corner=_corner,
)
DISTRACTORS = tuple(name for name in FORMS if name not in CLASSES)


def prepare_shapes(
    out: str | Path = 'data/shapes',
    seed: int = 0,
    size: int = 128,
    counts: Mapping[str, int] = COUNTS,
    say: Callable[[str], None] = print,
) -> dict:
    """Write generated pictures of shapes as a COCO data set.

    Args:
        out: Folder of the data set: ``train/``, ``train.json``, likewise for
            ``val`` and ``test``, and ``card.json``.
        seed: Of everything that is drawn. Each image has a stream of its own,
            so that more images of one split change no other image.
        size: Width and height of the images, pixels.
        counts: Images by split: ``train``, ``val``, ``test``.
        say: Called with each line of progress.

    Returns:
        The data card.

    Raises:
        FileExistsError: If ``out`` holds something else.
        ValueError: If a split is unknown, or a number too small.
    """
    for split in counts:
        check_name('shapes', 'split', split, SPLITS)
    if min(counts.values(), default=0) < 0 or not sum(counts.values()):
        raise ValueError(
            f'shapes needs at least one image in all and none below 0 in a '
            f'split, got {dict(counts)}.'
        )
    if size < 2 * RADII[-1] or seed < 0:
        raise ValueError(
            f'shapes needs size >= {math.ceil(2 * RADII[-1])}, so that the '
            f'largest fits, and seed >= 0; got size={size}, seed={seed}.'
        )
    recipe = dict(
        name='shapes',
        drawing=DRAWING,
        seed=seed,
        size=size,
        counts=dict(counts),
    )
    writer = CocoWriter(out, recipe, CLASSES)
    card = writer.card()
    if card is not None:
        say(f'{out}: done before')
        return card
    for split, count in counts.items():
        for number in range(count):
            scene = draw_scene((seed, SPLITS.index(split), number), size)
            writer.add(
                split,
                f'{number:05d}.png',
                scene.image,
                scene.boxes,
                scene.labels,
                scene.ignored,
            )
        say(f'{out}: {split}, {count} images')
    return writer.finish(
        title='Generated pictures of six shapes',
        licence='as mmkd; everything is drawn',
        source='mmkd.datasets.shapes',
        seed=seed,
    )


@dataclass(frozen=True)
class Shape:
    """One thing to paint.

    Attributes:
        form: Key of ``FORMS``.
        x: Of the centre, in pixels; the first pixel reaches from 0 to 1.
        y: Likewise.
        radius: Of the circle around the form, pixels.
        turn: Cosine and sine of its rotation.
        stretch: Its axes are ``radius`` times and divided by this.
        crowd: Whether it is one of those nobody counts.
    """

    form: str
    x: float
    y: float
    radius: float
    turn: tuple[float, float] = (1.0, 0.0)
    stretch: float = 1.0
    crowd: bool = False

    def mask(self) -> tuple[int, int, np.ndarray]:
        """Column and row of a window around the shape, and its pixels there.

        The window may leave the image. A pixel belongs to the shape if its
        centre does.
        """
        reach = math.ceil(self.radius * max(self.stretch, 1 / self.stretch))
        left = math.floor(self.x) - reach - 1
        top = math.floor(self.y) - reach - 1
        steps = np.arange(2 * reach + 3) + 0.5
        x = (steps + (left - self.x))[None, :]
        y = (steps + (top - self.y))[:, None]
        cos, sin = self.turn
        u = (cos * x + sin * y) / (self.radius * self.stretch)
        v = (cos * y - sin * x) / (self.radius / self.stretch)
        return left, top, FORMS[self.form](u, v)


@dataclass(frozen=True)
class Scene:
    """A picture and what is to be found in it.

    Attributes:
        image: BGR bytes, (H, W, 3).
        boxes: x1 y1 x2 y2 in pixels, (G, 4): tight around the pixels of a
            shape that lie in the image, whether another shape hides them
            or not.
        labels: Indices of ``CLASSES``, (G,).
        ignored: Shapes of which others and the border hide more than half,
            and clusters too dense to count, as one box, (G,). Shapes of
            which nothing is visible have no box.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: list[int]
    ignored: np.ndarray


class Dice:
    """Random numbers that are the same on every machine.

    They need no more of numpy than the raw stream of PCG64, which its
    versions promise to keep; the methods of its ``Generator`` may change.

    Args:
        key: Whole numbers; other keys give unrelated streams.
    """

    def __init__(self, key: Sequence[int]) -> None:
        self._stream = np.random.PCG64(list(key))

    def field(self, *shape: int) -> np.ndarray:
        """Uniform numbers in [0, 1)."""
        return (self._stream.random_raw(shape) >> np.uint64(11)) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.field(1)[0])

    def below(self, count: int) -> int:
        return int(self.between(0, count))

    def happens(self, share: float) -> bool:
        return self.between(0, 1) < share

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def direction(self) -> tuple[float, float]:
        """A point on the unit circle, without the sine of any library."""
        while True:
            x, y = self.between(-1, 1), self.between(-1, 1)
            square = x * x + y * y
            if 0.01 < square <= 1:
                return x / math.sqrt(square), y / math.sqrt(square)


def draw_scene(key: Sequence[int], size: int) -> Scene:
    """Draw one image.

    Only sums, products, quotients and roots are used, whose rounding is
    fixed, so that the bytes do not depend on the machine.

    Args:
        key: Seed, number of the split, number of the image.
        size: Width and height, pixels.
    """
    dice = Dice(key)
    shapes = compose(dice, size)
    image = _background(dice, size)
    for _ in range(dice.below(5)):
        _paint_line(dice, image)
    for shape in shapes:
        _paint(dice, image, shape)
    for _ in range(dice.below(3)):
        _paint_line(dice, image)
    return Scene(_photograph(dice, image), *annotate(shapes, size))


def compose(dice: Dice, size: int) -> list[Shape]:
    """What an image shows, from the rearmost to the foremost."""
    empty = dice.happens(EMPTY)
    shapes = []
    if not empty and dice.happens(CLUSTERED):
        shapes += _cluster(dice, size)
    objects = 0 if empty else 1 + dice.below(6)
    for _ in range(objects):
        _place(dice, size, shapes, CLASSES)
        if dice.happens(0.4):
            _place(dice, size, shapes, DISTRACTORS)
    for _ in range(dice.below(4)):
        _place(dice, size, shapes, DISTRACTORS)
    return shapes


def annotate(
    shapes: Sequence[Shape], size: int
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Boxes, labels and what is ignored, as :class:`Scene` has them.

    Args:
        shapes: From the rearmost to the foremost.
        size: Width and height of the image, pixels.
    """
    owner = np.full((size, size), -1)
    spots = [_spot(shape, size) for shape in shapes]
    for number, (rows, columns, _) in enumerate(spots):
        owner[rows, columns] = number
    boxes, labels, ignored, crowd = [], [], [], []
    for number, (shape, (rows, columns, whole)) in enumerate(
        zip(shapes, spots)
    ):
        visible = int((owner == number).sum())
        if shape.form in DISTRACTORS or not visible:
            continue
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        if shape.crowd:
            crowd.append((box, CLASSES.index(shape.form)))
            continue
        boxes.append(box)
        labels.append(CLASSES.index(shape.form))
        ignored.append(visible < MIN_VISIBLE * whole)
    if crowd:
        corners = np.array([box for box, _ in crowd])
        boxes.append([*corners[:, :2].min(0), *corners[:, 2:].max(0)])
        labels.append(crowd[0][1])
        ignored.append(True)
    return (
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels,
        np.array(ignored, dtype=bool),
    )


def _spot(shape: Shape, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows and columns of a shape in the image, and its pixels in all."""
    left, top, mask = shape.mask()
    rows, columns = np.nonzero(mask)
    rows, columns = rows + top, columns + left
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    return rows[inside], columns[inside], len(rows)


def _place(
    dice: Dice, size: int, shapes: list[Shape], forms: Sequence[str]
) -> None:
    """Add a shape that may overlap others, but not cover their centres."""
    radius, turn = dice.one_of(RADII), dice.direction()
    stretch, form = dice.between(0.88, 1.14), dice.one_of(forms)
    for _ in range(20):
        x, y = dice.between(0, size), dice.between(0, size)
        if all(
            (x - other.x) * (x - other.x) + (y - other.y) * (y - other.y)
            > 0.5 * (radius + other.radius) * (radius + other.radius)
            for other in shapes
        ):
            shapes.append(Shape(form, x, y, radius, turn, stretch))
            return


def _cluster(dice: Dice, size: int) -> list[Shape]:
    """Small shapes of one class in rows, countable or too dense for it."""
    crowd = dice.happens(UNCOUNTED)
    radius, form = dice.between(6, 9), dice.one_of(CLASSES)
    step = radius * (dice.between(1.1, 1.4) if crowd else dice.between(1.8, 2))
    columns, rows = 3 + dice.below(3 + crowd), 2 + dice.below(3 + crowd)
    left, top = dice.between(0, size / 2), dice.between(0, size / 2)
    jitter = 0.25 * step
    return [
        Shape(
            form,
            left + (column + 0.5 * (row % 2)) * step + dice.between(0, jitter),
            top + row * step + dice.between(0, jitter),
            radius * dice.between(0.9, 1.1),
            dice.direction(),
            dice.between(0.9, 1.1),
            crowd,
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _background(dice: Dice, size: int) -> np.ndarray:
    """Two or three layers of texture, (size, size, 3)."""
    texture = _texture(dice, size, size)
    image = _mix(texture, dice.field(3) * 255, dice.field(3) * 255)
    for _ in range(1 + dice.below(2)):
        layer = _texture(dice, size, size)[..., None]
        colour = dice.field(3) * 255
        image = image + (colour - image) * layer * dice.between(0.1, 0.5)
    return image


def _mix(texture: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return one + (two - one) * texture[..., None]


def _texture(dice: Dice, height: int, width: int) -> np.ndarray:
    """Numbers in [0, 1], (height, width)."""
    kind = dice.below(5)
    if kind == 0:
        return _ramp(dice, height, width, 1)
    if kind == 1:
        ramp = _ramp(dice, height, width, dice.between(2, 12)) % 1
        return abs(2 * ramp - 1)
    if kind == 2:
        ramp = _ramp(dice, height, width, dice.between(2, 12)) % 1
        return (ramp < 0.5).astype(float)
    cell = dice.between(3, 6 + max(height, width) / 3)
    noise = _value_noise(dice, height, width, cell)
    if kind == 3:
        fine = _value_noise(dice, height, width, max(cell / 3, 2))
        return (2 * noise + fine) / 3
    return ((noise - 0.5) * 6 + 0.5).clip(0, 1)


def _ramp(dice: Dice, height: int, width: int, periods: float) -> np.ndarray:
    """Rises along a random direction by ``periods`` at most."""
    cos, sin = dice.direction()
    x = (np.arange(width) / width)[None, :]
    y = (np.arange(height) / height)[:, None]
    return ((cos * x + sin * y) / 3 + 0.5) * periods


def _value_noise(
    dice: Dice, height: int, width: int, cell: float
) -> np.ndarray:
    """Random values on a grid, and smooth steps between them."""
    x, y = np.arange(width) / cell, np.arange(height) / cell
    grid = dice.field(int(y[-1]) + 2, int(x[-1]) + 2)
    column, row = x.astype(int), y.astype(int)
    x, y = x - column, (y - row)[:, None]
    x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    above, below = grid[row], grid[row + 1]
    above = above[:, column] * (1 - x) + above[:, column + 1] * x
    below = below[:, column] * (1 - x) + below[:, column + 1] * x
    return above * (1 - y) + below * y


def _paint(dice: Dice, image: np.ndarray, shape: Shape) -> None:
    """Fill a shape with a texture of its own, in sight of what is there."""
    left, top, mask = shape.mask()
    fill = _texture(dice, *mask.shape)
    rows, columns, _ = _spot(shape, len(image))
    if not len(rows):
        return
    one = _colour(dice, shape.form, image[rows, columns])
    two = one + (dice.field(3) - 0.5) * 60
    image[rows, columns] = _mix(fill[rows - top, columns - left], one, two)


def _colour(dice: Dice, form: str, pixels: np.ndarray) -> np.ndarray:
    """A shape's colour, often that of its class; of no class, of any."""
    if not dice.happens(HINTED):
        return _against(dice, pixels)
    known = form if form in COLOURS else dice.one_of(CLASSES)
    return np.array(COLOURS[known]) + (dice.field(3) - 0.5) * 60


def _against(dice: Dice, pixels: np.ndarray) -> np.ndarray:
    """A colour that stands out from pixels, (N, 3) → (3,)."""
    mean = pixels.astype(int).sum(0) / len(pixels)
    offset = 2 * dice.field(3) - 1
    offset = offset / abs(offset).max() * dice.between(40, 110)
    fits = (mean + offset >= 0) & (mean + offset <= 255)
    return mean + np.where(fits, offset, -offset)


def _paint_line(dice: Dice, image: np.ndarray) -> None:
    """A thin line from border to border."""
    cos, sin = dice.direction()
    steps = np.arange(len(image)) + 0.5
    x = (steps - dice.between(0, len(image)))[None, :]
    y = (steps - dice.between(0, len(image)))[:, None]
    line = abs(cos * x + sin * y) <= dice.between(0.5, 1.2)
    image[line] = _against(dice, image[line])


def _photograph(dice: Dice, image: np.ndarray) -> np.ndarray:
    """Unsharpness, noise of the sensor, and whole numbers."""
    for _ in range(dice.below(3)):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode='edge')
        rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        image = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
    deviation = dice.between(3, 14)
    # The sum of three uniform numbers has the variance 1/4.
    noise = dice.field(3, *image.shape)
    noise = noise[0] + noise[1] + noise[2] - 1.5
    image = image + 2 * deviation * noise
    return np.rint(image.clip(0, 255)).astype(np.uint8)

"""What a user's folder says: images, and what is annotated on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One image and what is annotated on it.

    Attributes:
        image: The file.
        annotation: Likewise; None where there is none.
        names: Class of each box.
        boxes: x1 y1 x2 y2, (G, 4).
        ignored: Boxes that neither count nor may be punished, (G,).
        size: (width, height) in pixels as annotated, or None.
        shares: Whether the boxes are shares of the image's sides.
    """

    image: Path
    annotation: Path | None = None
    names: tuple[str, ...] = ()
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    ignored: tuple[bool, ...] = ()
    size: tuple[int, int] | None = None
    shares: bool = False


@dataclass(frozen=True)
class Folder:
    """A user's folder, read but for its images.

    Attributes:
        path: As the user named it.
        classes: Names, in the folder's order.
        splits: Samples by split; by None where the folder does not divide
            them.
        found: Counts of what is odd, by key of
            :data:`mmkd.datasets.own.WARNINGS`.
    """

    path: Path
    classes: tuple[str, ...]
    splits: dict[str | None, list[Sample]]
    found: Counter

    def samples(self) -> Iterator[Sample]:
        for members in self.splits.values():
            yield from members

"""A COCO data set on disk, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmkd.datasets.voc import area
from mmkd.files import whole
from mmkd.reading import read_json
from mmkd.version import __version__

#: The data card: what is there, where it is from, how it was made.
CARD = 'card.json'


class CocoWriter:
    """Writes images, one JSON file a split, and the card that ends the work.

    Everything goes to a folder beside the final one, which takes its name
    last. A call that was broken off leaves that folder behind; the next one
    goes on in it.

    Args:
        out: Final folder.
        recipe: All that decides the content: sources, sizes, splits. What
            lies in ``out`` is taken as done if its card has the same recipe.
        classes: Names of the classes; category ids count from 1.

    Raises:
        FileExistsError: If ``out`` holds anything else.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / 'set'
        >>> writer = CocoWriter(folder, dict(size=8), ['Tree'])
        >>> image = np.zeros((8, 8, 3), np.uint8)
        >>> _ = writer.add('train', 'a.png', image, np.ones((0, 4)), [])
        >>> card = writer.finish(title='Example')
        >>> card['splits']['train']['images']
        1
        >>> CocoWriter(folder, dict(size=8), ['Tree']).card() == card
        True
    """

    def __init__(
        self, out: str | Path, recipe: Mapping, classes: Sequence[str]
    ) -> None:
        self.out = Path(out)
        self.recipe = json.loads(json.dumps(recipe))
        self.classes = tuple(classes)
        digest = hashlib.sha256(_dump(self.recipe).encode()).hexdigest()
        self.part = self.out.with_name(f'.{self.out.name}.{digest[:12]}.part')
        self._splits: dict[str, dict[str, Any]] = {}
        self._check_out()

    def _check_out(self) -> None:
        if not self.out.exists() or self.card() is not None:
            return
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()
            return
        raise FileExistsError(
            f'{self.out} holds something else than what is to be prepared: '
            f'{self._difference()}. Move it away or remove it (rm -r '
            f'{self.out}), or choose another folder with --out.'
        )

    def _difference(self) -> str:
        card = _read_card(self.out)
        if card is None:
            return f'it has no {CARD} of this tool'
        theirs = card.get('recipe') or {}
        keys = [
            key
            for key in sorted({*theirs, *self.recipe})
            if theirs.get(key) != self.recipe.get(key)
        ]
        return f'its recipe differs in {", ".join(keys)}'

    def card(self) -> dict | None:
        """The card of the finished set, or None while there is none."""
        card = _read_card(self.out)
        if card is None or card.get('recipe') != self.recipe:
            return None
        return card

    def add(
        self,
        split: str,
        name: str,
        image: np.ndarray,
        boxes: np.ndarray,
        labels: Sequence[int],
        ignored: np.ndarray | None = None,
        encoded: bytes | None = None,
        **about: Any,
    ) -> bool:
        """Write one image and note its boxes.

        Args:
            split: Name of the split.
            name: File name, unique in its split.
            image: BGR bytes, (H, W, 3).
            boxes: x1 y1 x2 y2 in pixels, (G, 4).
            labels: Class indices, (G,).
            ignored: Boxes that neither count nor may be punished, (G,).
            encoded: The image file where there is one already, so that it
                is not compressed twice.
            **about: Further fields of the image's entry.

        Returns:
            False if the file was there already, from a call broken off.
        """
        if Path(name).name != name:
            raise ValueError(
                f'CocoWriter needs a plain file name, got {name!r}.'
            )
        entry = self._splits.setdefault(
            split, dict(images=[], annotations=[], digests=[])
        )
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        if ignored is None:
            ignored = np.zeros(len(boxes), dtype=bool)
        height, width = image.shape[:2]
        number = len(entry['images']) + 1
        entry['images'].append(
            dict(id=number, file_name=name, width=width, height=height) | about
        )
        for box, size, label, ignore in zip(
            boxes.tolist(), area(boxes).tolist(), labels, ignored.tolist()
        ):
            x1, y1, x2, y2 = box
            entry['annotations'].append(
                dict(
                    id=len(entry['annotations']) + 1,
                    image_id=number,
                    category_id=int(label) + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=size,
                    iscrowd=int(ignore),
                )
            )
        entry['digests'].append(pixel_digest(image))
        path = self.part / split / name
        if path.is_file():
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        if encoded is None:
            encoded = cv2.imencode(path.suffix, image)[1].tobytes()
        with whole(path, durable=False) as part:
            part.write_bytes(encoded)
        return True

    def finish(self, **about: Any) -> dict:
        """Write the JSON files and the card, and give the set its name.

        Args:
            **about: Further fields of the card: title, licence, source.

        Returns:
            The card.
        """
        splits = {}
        for split, entry in self._splits.items():
            text = _dump(
                dict(
                    info=dict(description=about.get('title', self.out.name)),
                    images=entry['images'],
                    annotations=entry['annotations'],
                    categories=[
                        dict(id=index + 1, name=name)
                        for index, name in enumerate(self.classes)
                    ],
                )
            )
            with whole(self.part / f'{split}.json') as part:
                part.write_text(text, encoding='utf-8')
            splits[split] = self._summary(entry) | dict(
                json_sha256=hashlib.sha256(text.encode()).hexdigest()
            )
        card = about | dict(
            classes=list(self.classes),
            splits=splits,
            recipe=self.recipe,
            versions=dict(
                mmkd=__version__,
                python=platform.python_version(),
                numpy=np.__version__,
                opencv=cv2.__version__,
            ),
        )
        with whole(self.part / CARD) as part:
            part.write_text(json.dumps(card, indent=2) + '\n')
        os.rename(self.part, self.out)
        return card

    def _summary(self, entry: Mapping[str, Any]) -> dict:
        counted = [one for one in entry['annotations'] if not one['iscrowd']]
        by_class = Counter(one['category_id'] for one in counted)
        with_boxes = {one['image_id'] for one in counted}
        digest = hashlib.sha256(''.join(entry['digests']).encode())
        return dict(
            images=len(entry['images']),
            images_without_boxes=len(entry['images']) - len(with_boxes),
            boxes=len(counted),
            boxes_by_class={
                name: by_class[index + 1]
                for index, name in enumerate(self.classes)
            },
            boxes_ignored=len(entry['annotations']) - len(counted),
            pixels_sha256=digest.hexdigest(),
        )


def pixel_digest(image: np.ndarray) -> str:
    """Digest of what is seen, whatever the file format.

    Args:
        image: Bytes, (H, W, C).
    """
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def _read_card(folder: Path) -> dict | None:
    try:
        return read_json(folder / CARD, 'CocoWriter', kind=dict)
    except (OSError, ValueError):
        return None


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(',', ':'))

"""Tree crowns in aerial photographs, from a package on PyPI."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmkd.datasets.coco import CocoWriter, pixel_digest
from mmkd.datasets.sources import Recorded, gather
from mmkd.datasets.tiles import windows
from mmkd.datasets.voc import clean_boxes, cut_boxes, merged_labels, read_voc

REQUIREMENT = 'deepforest==2.1.0'
FOLDER = 'deepforest/data'
CLASSES = ('Tree',)

#: One photograph tells dead from living trees; the others do not.
MERGE = {'Dead': 'Tree', 'Alive': 'Tree'}

SHA256 = {
    '2019_YELL_2_528000_4978000_image_crop2.png': (
        'a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767'
    ),
    '2019_YELL_2_528000_4978000_image_crop2.xml': (
        'bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11'
    ),
    '2019_YELL_2_541000_4977000_image_crop.png': (
        '178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131'
    ),
    '2019_YELL_2_541000_4977000_image_crop.xml': (
        'cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631'
    ),
    'OSBS_029.png': (
        'd9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee'
    ),
    'OSBS_029.xml': (
        '1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c'
    ),
    'SOAP_061.png': (
        '256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424'
    ),
    'SOAP_061.xml': (
        '4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c'
    ),
}

#: Bytes of each.
SIZE = {
    '2019_YELL_2_528000_4978000_image_crop2.png': 15333493,
    '2019_YELL_2_528000_4978000_image_crop2.xml': 193359,
    '2019_YELL_2_541000_4977000_image_crop.png': 2889166,
    '2019_YELL_2_541000_4977000_image_crop.xml': 93452,
    'OSBS_029.png': 412520,
    'OSBS_029.xml': 20526,
    'SOAP_061.png': 369701,
    'SOAP_061.xml': 12556,
}
#: Of all of them together with what is not read, as PyPI has it.
WHEEL = Recorded(
    '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54',
    20639595,
)

#: Regions x1 y1 x2 y2 of each photograph by split. They share no pixel. The
#: two large photographs give all three splits; the small ones, of other
#: forests, only train.
REGIONS = {
    '2019_YELL_2_528000_4978000_image_crop2': dict(
        train=(0, 0, 2299, 1480),
        val=(0, 1480, 2299, 1976),
        test=(0, 1976, 2299, 2472),
    ),
    '2019_YELL_2_541000_4977000_image_crop': dict(
        train=(0, 0, 625, 1035),
        val=(625, 0, 937, 1035),
        test=(937, 0, 1249, 1035),
    ),
    'OSBS_029': dict(train=(0, 0, 400, 400)),
    'SOAP_061': dict(train=(0, 0, 400, 400)),
}

SPLITS = ('train', 'val', 'test')


def prepare_trees(
    out: str | Path = 'data/trees',
    source: str | Path | None = None,
    tile: int = 256,
    overlap: int = 128,
    eval_tile: int = 512,
    min_visible: float = 0.5,
    say: Callable[[str], None] = print,
    regions: Mapping[str, Mapping] = REGIONS,
    sha256: Mapping[str, str] = SHA256,
) -> dict:
    """Write tree crowns as a COCO data set of tiles.

    The splits are disjoint regions of the photographs. Tiles of ``train``
    overlap, so that a crown cut by one is whole in the next; those of ``val``
    and ``test`` do not, so that every crown is asked for once. A crown of
    which a tile shows less than ``min_visible`` is marked as a crowd, which
    COCO's evaluation neither asks for nor punishes.

    Args:
        out: Folder of the data set: ``train/``, ``train.json``, likewise for
            ``val`` and ``test``, and ``card.json``.
        source: Folder or wheel with the photographs; PyPI if None.
        tile: Longest side of a tile of ``train``, pixels.
        overlap: Pixels that neighbouring tiles of ``train`` share.
        eval_tile: Longest side of a tile of ``val`` and ``test``, pixels.
            Larger tiles cut fewer crowns.
        min_visible: Share of a crown's box that must be visible.
        say: Called with each line of progress.
        regions: Regions by split, by photograph.
        sha256: Expected SHA-256 of each file.

    Returns:
        The data card.

    Raises:
        FileExistsError: If ``out`` holds something else.
        FileNotFoundError: If the source lacks a file.
        ValueError: If a file is damaged or not the expected one.
    """
    recipe = dict(
        name='trees',
        requirement=REQUIREMENT,
        sha256=dict(sha256),
        regions=regions,
        tile=tile,
        overlap=overlap,
        eval_tile=eval_tile,
        min_visible=min_visible,
        merge=MERGE,
    )
    writer = CocoWriter(out, recipe, CLASSES)
    card = writer.card()
    if card is not None:
        say(f'{out}: done before')
        return card
    say(f'{out}: taking the photographs from {source or REQUIREMENT}')
    files = gather(
        {f'{FOLDER}/{name}': digest for name, digest in sha256.items()},
        source,
        REQUIREMENT,
        writer.part / 'wheel',
        {f'{FOLDER}/{name}': size for name, size in SIZE.items()},
        WHEEL,
    )
    found: Counter = Counter()
    photographs = {}
    for name, splits in regions.items():
        photograph, counts = _read(name, files)
        found += counts
        photographs[name] = dict(
            boxes=len(photograph.boxes),
            pixels_sha256=pixel_digest(photograph.image),
        )
        for split in SPLITS:
            if split not in splits:
                continue
            views = (
                windows(splits[split], tile, overlap)
                if split == 'train'
                else windows(splits[split], eval_tile)
            )
            for number, view in enumerate(views):
                _add_tile(writer, split, number, photograph, view, min_visible)
            say(f'{out}: {split}, {len(views)} tiles of {name}')
    for wheel in (writer.part / 'wheel').glob('*'):
        wheel.unlink()
    if (writer.part / 'wheel').is_dir():
        (writer.part / 'wheel').rmdir()
    card = writer.finish(
        title='Tree crowns in aerial photographs',
        licence='MIT (deepforest 2.1.0, Weinstein et al.)',
        source=REQUIREMENT,
        seed=None,  # nothing is drawn
        photographs=photographs,
        dropped=dict(zero_size=found['zero_size'], outside=found['outside']),
        cut_at_the_photograph=found['cut'],
    )
    for split, counts in card['splits'].items():
        say(
            f'{out}: {split} has {counts["images"]} images, '
            f'{counts["boxes"]} boxes, {counts["boxes_ignored"]} ignored'
        )
    return card


@dataclass(frozen=True)
class _Photograph:
    """Pixels (H, W, 3), boxes x1 y1 x2 y2 (G, 4) and class indices (G,)."""

    name: str
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def _read(
    name: str, files: Mapping[str, bytes]
) -> tuple[_Photograph, Counter]:
    data = np.frombuffer(files[f'{name}.png'], np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(
            f'{name}.png cannot be decoded. Leave --source out to take it '
            f'from PyPI.'
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f'{name}.xml')
        path.write_bytes(files[path.name])
        annotation = read_voc(path)
    height, width = image.shape[:2]
    if annotation.size not in (None, (width, height)):
        raise ValueError(
            f'{name}.xml was drawn on an image of {annotation.size} pixels, '
            f'but {name}.png has {(width, height)}.'
        )
    labels = merged_labels(annotation.names, MERGE, CLASSES)
    boxes, kept, found = clean_boxes(annotation.boxes, width, height)
    labels = np.array(labels, dtype=int)[kept]
    return _Photograph(name, image, boxes, labels), found


def _add_tile(
    writer: CocoWriter,
    split: str,
    number: int,
    photograph: _Photograph,
    view: tuple[int, int, int, int],
    min_visible: float,
) -> None:
    x1, y1, x2, y2 = view
    shown, index, ignored = cut_boxes(photograph.boxes, view, min_visible)
    writer.add(
        split,
        f'{photograph.name}_{number:03d}.png',
        photograph.image[y1:y2, x1:x2],
        shown,
        photograph.labels[index].tolist(),
        ignored,
        photograph=photograph.name,
        window=list(view),
    )

"""Pictures with a box each, on disk, as COCO."""

import json

import cv2
import numpy as np

CLASSES = ('a', 'b', 'c')


def draw(folder, sizes):
    """Write ``pictures.json`` and one picture of each size.

    Args:
        folder: Where to.
        sizes: Height and width of each.
    """
    random = np.random.default_rng(0)
    images, boxes = [], []
    for number, (height, width) in enumerate(sizes):
        name = f'{number}.png'
        picture = random.integers(0, 255, (height // 8, width // 8, 3))
        picture = cv2.resize(picture.astype(np.uint8), (width, height))
        cv2.imwrite(str(folder / name), picture)
        images.append(
            dict(id=number, file_name=name, height=height, width=width)
        )
        boxes.append(
            dict(
                id=number,
                image_id=number,
                category_id=number % 3,
                bbox=[8 + number, 16, 40, 48],
                area=1920,
                iscrowd=0,
            )
        )
    kinds = [dict(id=one, name=name) for one, name in enumerate(CLASSES)]
    text = json.dumps(dict(images=images, annotations=boxes, categories=kinds))
    (folder / 'pictures.json').write_text(text)


def dataset(folder, *transforms, last=()):
    """Config of the data set, its pipeline and what stands behind it."""
    return dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='pictures.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=CLASSES),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            *transforms,
            dict(type='PackDetInputs'),
            *last,
        ],
    )

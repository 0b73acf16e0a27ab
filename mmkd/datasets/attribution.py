"""Integrated gradients: what a teacher looks at, laid over the images.

``tools/attribute.py`` writes one map an image; :class:`LoadIGMap` reads it
before the transforms that move pixels, :class:`IGOverlay` lays it over the
image behind them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from mmkd.checks import check_fraction
from mmkd.pixels import KEPT
from mmkd.reading import check_picture, read_json
from mmkd.registry import TRANSFORMS

#: The file of a folder of maps that says how they were made.
INDEX = 'index.json'
#: Where the pipeline keeps the map: what moves pixels moves this as well.
MAP = 'gt_seg_map'


def map_file(folder: str | Path, image_id: int | str) -> Path:
    """Where the map of an image lies.

    Example:
        >>> map_file('maps', 'a/b').as_posix()
        'maps/a%2Fb.png'
    """
    return Path(folder, f'{quote(str(image_id), safe="")}.png')


def spread(heat: np.ndarray, power: float = 1.0) -> np.ndarray:
    """A map raised to a power, its least value 0 and its largest 1.

    A map of one value is 0 everywhere.

    Example:
        >>> spread(np.array([1.0, 2.0, 3.0]), power=2).tolist()
        [0.0, 0.375, 1.0]
    """
    heat = heat**power
    low, high = heat.min(), heat.max()
    if high <= low:
        return np.zeros_like(heat)
    return (heat - low) / (high - low)


@TRANSFORMS.register_module()
class LoadIGMap(BaseTransform):
    """Load the teacher's attribution map of an image, by the image's id.

    It becomes the image's ``gt_seg_map``, float32 in [0, 1], enlarged to its
    size, so that ``Resize``, ``RandomFlip``, ``RandomCrop``, ``Pad`` and other
    transforms that know semantic maps move it with the image. It stands behind
    ``LoadImageFromFile`` and before those; :class:`IGOverlay` takes it away.

    Args:
        ig_dir: The folder that ``tools/attribute.py`` wrote.

    Raises:
        FileNotFoundError: If there is no such folder or, later, no map of an
            image.
        ValueError: If it is not complete or, later, an image has a semantic
            map already.
    """

    def __init__(self, ig_dir: str | Path) -> None:
        self.ig_dir = Path(ig_dir)
        self._make = (
            f'Type python tools/attribute.py CONFIG CHECKPOINT --out {ig_dir}'
        )
        index = self.ig_dir / INDEX
        if not index.is_file():
            raise FileNotFoundError(
                f'LoadIGMap needs a folder of attribution maps, but found no '
                f'{str(index)!r}. {self._make}'
            )
        known = read_json(index, 'LoadIGMap', 'an index', self._make, dict)
        if not known.get('complete'):
            raise ValueError(
                f'LoadIGMap needs the maps of all images, but those in '
                f'{str(ig_dir)!r} were interrupted. Repeat the command, and '
                f'it goes on. {self._make}'
            )

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if results.get(MAP) is not None:
            raise ValueError(
                f'LoadIGMap needs {MAP!r} for its own map, but image '
                f'{results["img_id"]} has a semantic map there. Set '
                f'with_seg=False in LoadAnnotations.'
            )
        file = map_file(self.ig_dir, results['img_id'])
        if not file.is_file():
            raise FileNotFoundError(
                f'LoadIGMap found no map {str(file)!r} of image '
                f'{results["img_id"]}. Make the maps from the set that is '
                f'trained on: --ann-file and --img-prefix name another. '
                f'{self._make}'
            )
        check_picture(file)
        heat = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        if heat is None:
            raise ValueError(
                f'LoadIGMap cannot decode the map {str(file)!r}. {self._make}'
            )
        height, width = results['img_shape'][:2]
        heat = heat.astype(np.float32) / 255
        results[MAP] = cv2.resize(heat, (width, height))  # bilinear
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(ig_dir={str(self.ig_dir)!r})'


@TRANSFORMS.register_module()
class IGOverlay(BaseTransform):
    r"""Lay the attribution map over some of the images.

    .. math:: x \leftarrow (1 - \alpha) x
        + 255 \alpha \frac{m^p - \min m^p}{\max m^p - \min m^p}

    with a probability, all channels alike and the boxes as they were. It
    stands behind what moves pixels and before ``PackDetInputs``.

    Args:
        prob: Share of the visits that show the map. 0 changes nothing and
            draws nothing.
        alpha: The formula's; the map's share of a pixel.
        power: Bounds of p, drawn log-uniformly with each overlay.
        keep_clean: Keep the image without the map for the teachers, see
            :class:`mmkd.KeepForTeacher`; needs ``'teacher_img'`` among the
            ``meta_keys`` of ``PackDetInputs``. What was kept before stays.

    Raises:
        ValueError: If a setting makes no sense or, later, there is no map or
            one of another size than the image.

    Reference:
        Hernandez et al., "Knowledge Distillation: Enhancing Neural Network
        Compression with Integrated Gradients", 2025, arXiv:2503.13008, for
        classifiers. Read: what the authors' code does
        (https://github.com/nordlinglab/ModelCompression-IntegratedGradients)
        in a summary of it, from which all defaults are; not the paper. Ours
        are what is explained of a detector, that the teacher sees the image
        without the map, and a map of one value, which is black.

    Example:
        >>> image = np.full((1, 2, 3), 100, np.uint8)
        >>> heat = np.array([[0.0, 0.5]], np.float32)
        >>> overlay = IGOverlay(prob=1.0)
        >>> found = overlay(dict(img=image, gt_seg_map=heat))
        >>> found['img'][..., 0].tolist(), found['teacher_img'] is image
        ([[50, 178]], True)
    """

    def __init__(
        self,
        prob: float = 0.1,
        alpha: float = 0.5,
        power: tuple[float, float] = (1.0, 2.0),
        keep_clean: bool = True,
    ) -> None:
        check_fraction('IGOverlay', prob=prob, alpha=alpha)
        low, high = power
        if not 0 < low <= high:
            raise ValueError(
                f'IGOverlay needs power=(low, high) with 0 < low <= high, '
                f'got {tuple(power)}. The paper takes (1, 2).'
            )
        self.prob, self.alpha, self.power = prob, alpha, (low, high)
        self.keep_clean = keep_clean

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        heat, image = results.pop(MAP, None), results['img']
        if heat is None:
            raise ValueError(
                'IGOverlay found no map. Put '
                "dict(type='mmkd.LoadIGMap', ig_dir=…) behind "
                'LoadImageFromFile.'
            )
        if heat.shape != image.shape[:2]:
            raise ValueError(
                f'IGOverlay needs a map of the size of the image, '
                f'{image.shape[:2]}, got {heat.shape}: some transform moved '
                f'the image alone. Mosaic, MixUp, RandomAffine and others '
                f'that know no semantic maps do not go with it.'
            )
        if not self.prob or np.random.rand() >= self.prob:
            return results
        if self.keep_clean:
            results.setdefault(KEPT, image)
        low, high = map(math.log, self.power)
        heat = np.where(heat > 1, 0, heat)  # borders are 255 in such maps
        heat = spread(heat, math.exp(np.random.uniform(low, high)))
        mixed = (1 - self.alpha) * image + 255 * self.alpha * heat[..., None]
        if np.issubdtype(image.dtype, np.integer):
            mixed = mixed.round()
        results['img'] = mixed.astype(image.dtype)
        return results

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(prob={self.prob}, alpha={self.alpha}, '
            f'power={self.power}, keep_clean={self.keep_clean})'
        )

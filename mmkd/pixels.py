"""Image normalisation: show one batch to a detector that expects another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn

from mmkd.structures.constants import constant

#: Where a sample's metainfo keeps pixels for the teachers, see :func:`kept`.
KEPT = 'teacher_img'


@dataclass(frozen=True)
class Pixels:
    """How a detector wants its images.

    Attributes:
        mean: Subtracted from each channel, in the detector's channel order.
        std: Each channel is divided by it.
        swapped: Whether the channels are the reverse of the loaded ones.
        pad_value: Value of the border after normalisation.
        divisor: Height and width are multiples of it.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    swapped: bool
    pad_value: float
    divisor: int

    @classmethod
    def of(cls, detector: nn.Module, who: str) -> Pixels:
        """Read the settings off a detector's data preprocessor.

        Raises:
            TypeError: If the preprocessor is not an image preprocessor.
        """
        processor = detector.data_preprocessor
        processor = getattr(processor, 'data_preprocessor', processor)
        if not isinstance(processor, ImgDataPreprocessor):
            raise TypeError(
                f'{who} normalises its images with '
                f'{type(processor).__name__}; distillation needs a '
                f'DetDataPreprocessor or another ImgDataPreprocessor, so '
                f'that each detector sees images in its own normalisation.'
            )
        mean, std = (0.0,) * 3, (1.0,) * 3
        if processor._enable_normalize:
            mean = tuple(processor.mean.flatten().expand(3).tolist())
            std = tuple(processor.std.flatten().expand(3).tolist())
        return cls(
            mean,
            std,
            bool(processor._channel_conversion),
            float(processor.pad_value),
            int(processor.pad_size_divisor),
        )

    def normalised(self, image: Tensor) -> Tensor:
        """An image as loaded, as the preprocessor hands it on.

        Args:
            image: Of 0 to 255 in the order it was loaded in, (3, H, W).
        """
        image = image.flip(0) if self.swapped else image
        settings = constant([self.mean, self.std], image, torch.float32)
        mean, std = settings[..., None, None]
        return (image - mean) / std


def kept(
    images: Tensor, samples: Sequence[Any], pixels: Pixels
) -> Tensor | None:
    """A batch with the pixels that its samples keep for the teachers.

    A transform keeps them in ``results['teacher_img']`` as they were at some
    point of the pipeline, (H, W, 3), and ``PackDetInputs`` hands them on if
    ``'teacher_img'`` is among its ``meta_keys``.

    Args:
        images: The batch as the student sees it, (N, 3, H, W).
        samples: mmdet's sample of each image.
        pixels: How the student's images were normalised.

    Returns:
        A batch of the same shape and border; None if no sample keeps any.

    Raises:
        ValueError: If an image has another size than the student's.
    """
    batch = None
    for index, sample in enumerate(samples):
        picture = sample.metainfo.get(KEPT)
        if picture is None:
            continue
        height, width = picture.shape[:2]
        size = tuple(sample.metainfo.get('img_shape', images.shape[-2:])[:2])
        if size != (height, width):
            raise ValueError(
                f'The distiller needs {KEPT!r} of the size of what the '
                f'student sees, {size[0]} x {size[1]}, got {height} x '
                f'{width}. Put KeepForTeacher behind the transforms that '
                f'resize, crop, pad, flip or mix images, and take out '
                f'batch_augments that do.'
            )
        batch = images.clone() if batch is None else batch
        picture = torch.from_numpy(np.ascontiguousarray(picture))
        picture = picture.to(images.device, non_blocking=True)
        batch[index, :, :height, :width] = pixels.normalised(
            picture.permute(2, 0, 1)
        )
    return batch


def translate(
    images: Tensor,
    shapes: Sequence[tuple[int, int]],
    source: Pixels,
    target: Pixels,
) -> Tensor:
    """A batch as another detector's preprocessor would have made it.

    Args:
        images: Normalised and padded batch, (N, 3, H, W).
        shapes: Height and width of each image before padding.
        source: Settings that made ``images``.
        target: Settings wanted.

    Returns:
        (N, 3, H', W'), the border set to the target's value; H' and W' grow
        to multiples of the target's divisor. ``images`` itself where nothing
        differs.
    """
    height, width = images.shape[-2:]
    full = all(tuple(shape) == (height, width) for shape in shapes)
    same = (source.mean, source.std, source.swapped) == (
        target.mean,
        target.std,
        target.swapped,
    )
    if not same:
        images = _renormalise(images, source, target)
    if not full and not (same and source.pad_value == target.pad_value):
        inside = valid_area(shapes, (height, width), images.device)
        images = torch.where(inside, images, target.pad_value)
    bottom, right = -height % target.divisor, -width % target.divisor
    if bottom or right:
        images = F.pad(images, (0, right, 0, bottom), value=target.pad_value)
    return images


def _renormalise(images: Tensor, source: Pixels, target: Pixels) -> Tensor:
    mean, std = constant([source.mean, source.std], images).unbind()
    if source.swapped != target.swapped:
        images, mean, std = images.flip(1), mean.flip(0), std.flip(0)
    to_mean, to_std = constant([target.mean, target.std], images).unbind()
    scale, shift = std / to_std, (mean - to_mean) / to_std
    return images * scale[:, None, None] + shift[:, None, None]


def valid_area(
    shapes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    device: torch.device | None = None,
) -> Tensor:
    """Where each image of a padded batch has pixels, (N, 1, H, W), bool.

    Args:
        shapes: Height and width of each image before padding.
        size: Height and width of the batch.
        device: Device of the result.

    Example:
        >>> valid_area([(1, 2)], (2, 2)).int().tolist()
        [[[[1, 1], [0, 0]]]]
    """
    bounds = torch.tensor([list(shape[:2]) for shape in shapes])
    bounds = bounds.to(device, non_blocking=True)
    rows = torch.arange(size[0], device=device) < bounds[:, :1]  # (N, H)
    columns = torch.arange(size[1], device=device) < bounds[:, 1:]  # (N, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None]

"""Images that a student finds hard, kept to learn from its mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.checks import check_positive
from mmkd.structures import GroundTruth

#: Images whose losses the running median is taken of.
WINDOW = 256


class HardImages:
    """A store of images whose loss is above the running median.

    It lies in main memory, without the padded border and in half precision:
    6 MB for an image of 800 x 1333. What is put in is looked at when the next
    images come, so that nobody waits for the device. A full store puts a new
    image in the place of one chosen at random.

    Args:
        size: Most images it holds.

    Raises:
        ValueError: If that is none.
    """

    def __init__(self, size: int) -> None:
        check_positive('HardImages', size=size)
        self.size = size
        self._images: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self._waiting: tuple | None = None

    def __len__(self) -> int:
        self.settle()
        return len(self._images)

    def watch(
        self, images: Tensor, samples: Sequence[Any], losses: Tensor
    ) -> None:
        """Take note of a batch.

        Args:
            images: As the student sees them, (N, 3, H, W).
            samples: mmdet's sample of each image.
            losses: Loss of each image, (N,), without gradient.
        """
        self.settle()
        slots = torch.randint(self.size, (len(samples),)).tolist()
        self._waiting = (images, list(samples), losses, slots)

    def settle(self) -> None:
        """Keep of the batch that waits what is hard."""
        if self._waiting is None:
            return
        images, samples, losses, slots = self._waiting
        self._waiting = None
        found = losses.tolist()
        self._losses = [*self._losses, *found][-WINDOW:]
        limit = median(self._losses)
        hard = [index for index, loss in enumerate(found) if loss >= limit]
        for index in hard:
            kept = _packed(images[index : index + 1], samples[index])
            if len(self._images) < self.size:
                self._images.append(kept)
            else:
                self._images[slots[index]] = kept

    def draw(
        self, count: int, like: Tensor, divisor: int = 32
    ) -> tuple[Tensor, list[DetDataSample]]:
        """Some of the images, chosen at random, as a batch.

        Args:
            count: How many; all if there are fewer.
            like: Gives device and precision.
            divisor: Of height and width of the batch.
        """
        self.settle()
        chosen = [
            self._images[index]
            for index in torch.randperm(len(self._images))[:count].tolist()
        ]
        height, width = (
            -(-max(one['image'].shape[axis] for one in chosen) // divisor)
            * divisor
            for axis in (1, 2)
        )
        images = torch.stack(
            [
                F.pad(
                    one['image'].to(like),
                    (
                        *(0, width - one['image'].shape[2]),
                        *(0, height - one['image'].shape[1]),
                    ),
                )
                for one in chosen
            ]
        )
        size = height, width
        return images, [_sample(one, size, like.device) for one in chosen]

    def state(self) -> dict[str, Any]:
        """All that it holds, of tensors and numbers."""
        self.settle()
        return dict(images=list(self._images), losses=list(self._losses))

    def load_state(self, state: dict[str, Any]) -> None:
        """Hold what :meth:`state` returned."""
        self._waiting = None
        self._images = list(state['images'])[: self.size]
        self._losses = list(state['losses'])


def _packed(image: Tensor, sample: Any) -> dict[str, Any]:
    gt = GroundTruth.from_samples([sample], image)
    ((height, width),) = gt.image_shapes
    image = image[0, :, :height, :width]
    return dict(
        image=image.detach().to('cpu', torch.float16, copy=True),
        boxes=gt.boxes.cpu(),
        labels=gt.labels.cpu(),
        ignored=gt.ignored.cpu(),
    )


def _sample(
    kept: dict[str, Any], size: tuple[int, int], device: torch.device
) -> DetDataSample:
    shape = tuple(kept['image'].shape[1:])
    sample = DetDataSample(
        metainfo=dict(
            img_shape=shape,
            ori_shape=shape,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
            flip=False,
        )
    )
    boxes, labels, ignored = (
        kept[key].to(device, non_blocking=True)
        for key in ('boxes', 'labels', 'ignored')
    )
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    sample.ignored_instances = InstanceData(
        bboxes=ignored, labels=labels.new_zeros(len(ignored))
    )
    return sample

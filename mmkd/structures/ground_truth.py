"""Annotations of one batch, laid flat so that no code loops over boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.structures.constants import constant


@dataclass(frozen=True)
class GroundTruth:
    """Boxes of all images of a batch in one tensor.

    Attributes:
        boxes: ``x1 y1 x2 y2`` in pixels of the padded input, (M, 4).
        labels: Class of each box, (M,).
        image: Index of the image each box belongs to, (M,).
        shape: Height and width of the padded batch, pixels.
        image_shapes: Height and width of each image before padding.
        ignored: Boxes that neither count as object nor as background,
            (K, 4).
        ignored_image: Index of the image of each ignored box, (K,).
        ids: The data set's identifier of each image, None where it has none.
        samples: mmdet's own samples, for what is not laid out here (masks,
            flips, paths).
        counts: Boxes of each image, known without asking the device; counted
            there if None.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    shape: tuple[int, int]
    image_shapes: tuple[tuple[int, int], ...]
    ignored: Tensor
    ignored_image: Tensor
    ids: tuple[int | str | None, ...] = ()
    samples: tuple = ()
    counts: tuple[int, ...] | None = None

    @property
    def num_images(self) -> int:
        return len(self.image_shapes)

    @cached_property
    def most(self) -> int:
        """Boxes of the image that has most, at least 1."""
        counts = self.counts
        if counts is None:
            counts = self.image.bincount(minlength=1).tolist()
        return max(1, *counts)

    @cached_property
    def place(self) -> Tensor:
        """How many boxes of the same image stand before each, (M,)."""
        return (self.image[:, None] == self.image).tril(-1).sum(1)

    @cached_property
    def image_sizes(self) -> Tensor:
        """Width and height of each image before padding, (N, 2)."""
        sizes = [(width, height) for height, width in self.image_shapes]
        return constant(sizes, self.boxes, torch.long)

    def spread(self, values: Tensor) -> Tensor:
        """Image by image what is said of each box, (M, …) → (N, most, …).

        Zero where an image has fewer boxes.

        Example:
            >>> gt = GroundTruth.from_boxes(
            ...     [torch.zeros(1, 4), torch.zeros(2, 4)], shape=(8, 8)
            ... )
            >>> gt.spread(torch.tensor([1, 2, 3])).tolist()
            [[1, 0], [2, 3]]
        """
        shape = self.num_images, self.most, *values.shape[1:]
        found = values.new_zeros(shape)
        found[self.image, self.place] = values
        return found

    def of_classes(self, kept: Sequence[int]) -> GroundTruth:
        """The same boxes, labelled by the place of their class among some.

        Args:
            kept: The classes; a box of another gets the label -1.

        Example:
            >>> gt = GroundTruth.from_boxes(
            ...     [torch.zeros(3, 4)], (8, 8), [torch.tensor([2, 0, 1])]
            ... )
            >>> gt.of_classes((1, 2)).labels
            tensor([ 1, -1,  0])
        """
        return replace(self, labels=places(self.labels, kept))

    @classmethod
    def from_samples(cls, samples: Sequence, images: Tensor) -> GroundTruth:
        """Lay out what mmdet attaches to a batch.

        Args:
            samples: ``DetDataSample`` of each image.
            images: The padded batch, (N, 3, H, W): gives size and device.
        """
        shape = tuple(images.shape[-2:])
        boxes, labels, image, counts = _flatten(
            [sample.get('gt_instances') for sample in samples], images
        )
        ignored, _, ignored_image, _ = _flatten(
            [sample.get('ignored_instances') for sample in samples], images
        )
        return cls(
            boxes=boxes,
            labels=labels,
            image=image,
            shape=shape,
            image_shapes=tuple(
                tuple(sample.metainfo.get('img_shape', shape)[:2])
                for sample in samples
            ),
            ignored=ignored,
            ignored_image=ignored_image,
            ids=tuple(sample.metainfo.get('img_id') for sample in samples),
            samples=tuple(samples),
            counts=counts,
        )

    @classmethod
    def from_boxes(
        cls,
        boxes: Sequence[Tensor],
        shape: tuple[int, int],
        labels: Sequence[Tensor] | None = None,
        image_shapes: Sequence[tuple[int, int]] | None = None,
        ignored: Sequence[Tensor] | None = None,
    ) -> GroundTruth:
        """Build from one box tensor an image, as a test or a tool needs it.

        Args:
            boxes: Boxes of each image, (M_n, 4).
            shape: Height and width of the padded batch, pixels.
            labels: Classes of each image's boxes, (M_n,); 0 if None.
            image_shapes: Sizes before padding; ``shape`` if None.
            ignored: Ignored boxes of each image, (K_n, 4); none if None.

        Example:
            >>> gt = GroundTruth.from_boxes(
            ...     [torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)],
            ...     shape=(32, 32),
            ... )
            >>> gt.image.tolist(), gt.num_images
            ([0], 2)
        """
        if ignored is None:
            ignored = [one.new_zeros(0, 4) for one in boxes]
        if labels is None:
            labels = [
                torch.zeros(len(one), dtype=torch.long, device=one.device)
                for one in boxes
            ]
        return cls(
            boxes=torch.cat(list(boxes)),
            labels=torch.cat(list(labels)),
            image=_owners(boxes),
            shape=tuple(shape),
            image_shapes=tuple(image_shapes or [tuple(shape)] * len(boxes)),
            ignored=torch.cat(list(ignored)),
            ignored_image=_owners(ignored),
            counts=tuple(len(one) for one in boxes),
        )


def places(labels: Tensor, kept: Sequence[int], other: int = -1) -> Tensor:
    """Place of each label among some classes.

    Args:
        labels: (M,).
        kept: The classes.
        other: For a label that is none of them.

    Example:
        >>> places(torch.tensor([5, 3, 4]), (3, 5), other=9)
        tensor([1, 0, 9])
    """
    match = labels[:, None] == constant(kept, labels)
    # Not argmax of all, which is the first where none matches.
    return torch.where(match.any(1), match.int().argmax(1), other)


def labelled(sample: Any) -> bool:
    """Whether an image was annotated, be it with no object at all."""
    instances = sample.get('gt_instances')
    return instances is not None and 'bboxes' in instances


def _flatten(
    instances: Sequence[InstanceData | None], images: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    nothing = images.new_zeros(0, 4, dtype=torch.float32)
    boxes, labels = [nothing], [nothing.new_zeros(0, dtype=torch.long)]
    for one in instances:
        here = nothing if one is None or 'bboxes' not in one else one.bboxes
        here = getattr(here, 'tensor', here)  # mmdet's box types
        boxes.append(here.to(images.device, torch.float32).reshape(-1, 4))
        known = one is not None and 'labels' in one
        labels.append(
            one.labels.to(images.device)
            if known
            else labels[0].new_zeros(len(here))
        )
    counts = tuple(len(one) for one in boxes[1:])
    return torch.cat(boxes), torch.cat(labels), _owners(boxes[1:]), counts


def _owners(boxes: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [
            one.new_full((len(one),), index, dtype=torch.long)
            for index, one in enumerate(boxes)
        ]
    )

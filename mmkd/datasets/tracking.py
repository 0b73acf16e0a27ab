"""Predictions that come with an image, wherever its pixels are moved.

A teacher's predictions are kept for the image as it is stored. What a pipeline
then does to it, MMDetection does to the boxes of its annotations as well, by
the methods of their class; so a class of boxes that notes what is done to it
knows where each pixel went, through flips, crops, mosaics and whatever a
transform of tomorrow does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.structures.bbox import (
    HorizontalBoxes,
    get_box_tensor,
    register_box,
    register_box_converter,
)
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.ops.edges import bin_places
from mmkd.registry import TRANSFORMS
from mmkd.store import PREDICTING, PREDICTIONS, Store

#: What MMDetection calls the class of boxes.
TRACKED = 'mmkd_tracked'
#: Where each corner of a box is, x and y of x1 y1 x2 y2.
CORNERS = ((0, 1), (2, 1), (2, 3), (0, 3))
#: What is kept of the distributions of edges.
EDGES = ('edges', 'origins', 'steps')
#: Pixels by which a line that was upright may lean, over the length of a side
#: of an image.
LEAN = 0.01


class Part(NamedTuple):
    """An image that has become a part of another.

    Attributes:
        image: Its identifier.
        matrix: From its pixels as stored to those of now, (3, 3).
        annotated: Whether it came with annotations.
    """

    image: int | str
    matrix: np.ndarray
    annotated: bool


@register_box(TRACKED, force=True)
class TrackedBoxes(HorizontalBoxes):
    """Boxes that remember what was done to them.

    Attributes:
        parts: The images that they are of, and where each is.
    """

    parts: tuple[Part, ...] = ()

    def _of(self, boxes: TrackedBoxes) -> TrackedBoxes:
        self.parts = boxes.parts
        return self

    def _moved(self, matrix: np.ndarray) -> None:
        matrix = np.asarray(matrix, dtype=np.float64)
        self.parts = tuple(
            part._replace(matrix=matrix @ part.matrix) for part in self.parts
        )

    def __getitem__(self, index: Any) -> TrackedBoxes:
        return super().__getitem__(index)._of(self)

    def __deepcopy__(self, memo: dict) -> TrackedBoxes:
        return self.clone()

    def clone(self) -> TrackedBoxes:
        return super().clone()._of(self)

    def detach(self) -> TrackedBoxes:
        return super().detach()._of(self)

    def to(self, *args: Any, **kwargs: Any) -> TrackedBoxes:
        return super().to(*args, **kwargs)._of(self)

    @classmethod
    def cat(cls, box_list: Sequence, dim: int = 0) -> TrackedBoxes:
        found = super().cat(box_list, dim)
        found.parts = tuple(part for one in box_list for part in one.parts)
        return found

    def flip_(
        self, img_shape: tuple[int, int], direction: str = 'horizontal'
    ) -> None:
        super().flip_(img_shape, direction)
        matrix = np.eye(3)
        if direction != 'vertical':
            matrix[0] = -1, 0, img_shape[1]
        if direction != 'horizontal':
            matrix[1] = 0, -1, img_shape[0]
        self._moved(matrix)

    def translate_(self, distances: tuple[float, float]) -> None:
        super().translate_(distances)
        matrix = np.eye(3)
        matrix[:2, 2] = [float(one) for one in distances]
        self._moved(matrix)

    def rescale_(self, scale_factor: tuple[float, float]) -> None:
        super().rescale_(scale_factor)
        self._moved(np.diag([*map(float, scale_factor), 1.0]))

    def rotate_(self, center: tuple[float, float], angle: float) -> None:
        super().rotate_(center, angle)
        turned = cv2.getRotationMatrix2D(center, -angle, 1)
        self._moved(np.vstack([turned, [0, 0, 1]]))

    def project_(self, homography_matrix: Tensor | np.ndarray) -> None:
        super().project_(homography_matrix)
        self._moved(np.asarray(homography_matrix))


for one, other in (('hbox', TRACKED), (TRACKED, 'hbox')):
    register_box_converter(one, other, lambda boxes: boxes, force=True)


@TRANSFORMS.register_module()
class TrackPixels(BaseTransform):
    """Begin to note where the pixels of an image go.

    It stands behind ``LoadAnnotations``, or ``LoadImageFromFile`` where there
    are none, before every transform that moves pixels; with
    ``MultiImageMixDataset`` in the pipeline of the single images.
    :class:`LoadPredictions` ends it.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        annotated = 'gt_bboxes' in results
        given = results.get('gt_bboxes', np.zeros((0, 4), np.float32))
        boxes = TrackedBoxes(get_box_tensor(given))
        boxes.parts = (Part(results['img_id'], np.eye(3), annotated),)
        results['gt_bboxes'] = boxes
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'


@TRANSFORMS.register_module()
class LoadPredictions(BaseTransform):
    """Load what a teacher predicts on an image, moved as its pixels were.

    They become the sample's ``teacher_predictions``, see
    :func:`moved`; those whose cell has left the image are dropped. Their
    classes stand in its metainfo, ``teacher_classes``. It stands behind
    ``PackDetInputs``. Images are found by their identifier.

    Args:
        folder: What ``tools/cache_predictions.py`` wrote.
        clip: Whether boxes are cut off at the border of the image, as
            MMDetection's transforms do with annotations.
        edges: Whether the distributions of their edges come with them. Only
            where the pipeline leaves boxes upright: flips, resizing, crops,
            shifts, padding, mosaics, quarter turns.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not complete, or holds no distributions that are
            asked for; later, if it lacks an image, or a transform has lost
            track of the pixels, or turned boxes with distributions.
    """

    def __init__(
        self, folder: str | Path, clip: bool = True, edges: bool = False
    ) -> None:
        self.folder, self.clip, self.edges = str(folder), clip, edges
        self.store = Store(folder, 'LoadPredictions', tool=PREDICTING)
        self.store.check({}, [PREDICTIONS])
        self.classes = tuple(self.store.about.get('classes') or ())
        if edges and not self.store.about.get('edges'):
            raise ValueError(
                f'LoadPredictions(edges=True): {folder} holds no '
                f'distributions of edges. Make it anew from a teacher with a '
                f'head of distributions, such as GFL: {self.store.command} '
                f'--edges --overwrite'
            )
        self.store.close()
        if not all(isinstance(one, str) for one in self.classes):
            raise ValueError(
                f'LoadPredictions: {folder} names classes that are no text. '
                f'Make it anew: {self.store.command} --overwrite'
            )

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        sample = results['data_samples']
        boxes = sample.gt_instances.get('bboxes')
        parts = getattr(boxes, 'parts', ())
        if not parts:
            raise ValueError(
                'LoadPredictions does not know where the pixels of image '
                f'{sample.metainfo.get("img_id")} went. Put TrackPixels '
                f'behind LoadAnnotations, LoadPredictions behind '
                f'PackDetInputs, and take out transforms between them that '
                f'replace the class of gt_bboxes, such as Albu.'
            )
        size = sample.metainfo['img_shape'][:2]
        found = [self._of(part, size) for part in parts]
        sample.teacher_predictions = InstanceData.cat(found)
        sample.set_metainfo(dict(teacher_classes=self.classes))
        if any(part.annotated for part in parts):
            for name in ('gt_instances', 'ignored_instances'):
                given = getattr(sample, name, {})
                if 'bboxes' in given:
                    given.bboxes = HorizontalBoxes(given.bboxes.tensor)
        else:
            del sample.gt_instances, sample.ignored_instances
        return results

    def _of(self, part: Part, size: tuple[int, int]) -> InstanceData:
        name = str(part.image).encode()
        entry = self.store.read(name, [PREDICTIONS], 'cpu')
        if entry is None:
            raise ValueError(
                f'LoadPredictions: {self.folder} has no predictions on image '
                f'{part.image}. Make them of the set that is trained on: '
                f'{self.store.command}'
            )
        if self.edges:
            check_upright(part.matrix, size)
        try:
            return moved(
                entry[PREDICTIONS], part.matrix, size, self.clip, self.edges
            )
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f'LoadPredictions: what {self.folder} holds of image '
                f'{part.image} are no predictions ({error}). Make it anew: '
                f'{self.store.command} --overwrite'
            ) from error

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(folder={self.folder!r}, '
            f'clip={self.clip}, edges={self.edges})'
        )


def moved(
    predictions: dict[str, Tensor],
    matrix: np.ndarray,
    size: Sequence[int],
    clip: bool = True,
    edges: bool = False,
) -> InstanceData:
    """Predictions where the pixels of their image are now.

    Args:
        predictions: ``points`` (M, 2), the centre of the cell that predicts,
            ``strides`` (M,), the side of the cell, ``bboxes`` (M, 4), all in
            pixels of the image as stored; ``labels`` and ``logits`` (M, C),
            of the classes that it gives the greatest probabilities. With
            distributions also ``edges`` (M, 4, B), logits of left, top, right
            and bottom, ``origins`` (M, 2), from where they are measured, and
            ``steps`` (M, 2), pixels from bin to bin along x and y.
        matrix: From those pixels to the image of now, (3, 3).
        size: Its height and width.
        clip: Whether boxes are cut off at its border.
        edges: Whether distributions are wanted. The matrix must leave boxes
            upright, see :func:`check_upright`.

    Returns:
        The same in pixels of now, of what has its point in the image. Boxes
        are those around the moved corners; a stride grows as the root of the
        area. Distributions are ``edges`` (M, 4, B) as before, of which two
        have changed places where the image is mirrored, and ``places``
        (M, 4, B), the coordinate that each bin stands for.
    """
    turn = matrix
    matrix = torch.from_numpy(matrix)
    points = _projected(predictions['points'], matrix)
    boxes = predictions['bboxes']
    corners = torch.stack([boxes[:, list(one)] for one in CORNERS], 1)
    corners = _projected(corners.flatten(0, 1), matrix).view(-1, 4, 2)
    limits = corners.new_tensor([size[1], size[0]])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    if clip:
        boxes = boxes.clamp(min=0).minimum(limits.repeat(2))
    growth = torch.linalg.det(matrix[:2, :2]).abs().sqrt()
    inside = ((points >= 0) & (points < limits)).all(1)
    found = InstanceData(
        points=points,
        strides=predictions['strides'] * growth.float(),
        bboxes=boxes,
        labels=predictions['labels'].long(),
        logits=predictions['logits'].float(),
    )
    if edges:
        logits, places = _moved_edges(predictions, turn)
        if clip:
            places = places.clamp(min=0).minimum(
                limits.repeat(2)[:, None].to(places)
            )
        found.edges, found.places = logits, places
    return found[inside]


def check_upright(matrix: np.ndarray, size: Sequence[int]) -> None:
    """Boxes must be upright where they have been moved to.

    An edge then comes from one edge, and its distribution with it. A turned
    box has edges that depend on all four, of which nothing is said together.

    Args:
        matrix: From pixels as stored to those of now, (3, 3).
        size: Height and width of the image of now.

    Raises:
        ValueError: If one is turned, sheared or in perspective.
    """
    linear = np.abs(matrix[:2, :2])
    shares = linear / linear.max(1, keepdims=True)
    length = max(size[:2])
    straight = min(max(shares[0, one], shares[1, 1 - one]) for one in (0, 1))
    tilt = np.abs(matrix[2, :2]).max() * length / abs(matrix[2, 2])
    if max(straight, tilt) * length > LEAN:
        raise ValueError(
            'LoadPredictions(edges=True) moves distributions of edges with '
            'flips, resizing, crops, shifts, padding, mosaics and quarter '
            'turns, after which a box is still upright; this pipeline turns '
            'or shears it. Set RandomAffine(max_rotate_degree=0.0, '
            'max_shear_degree=0.0), take out Rotate, ShearX and ShearY, or '
            'leave distributions out: edges=False here and edge_weight=0 of '
            'StoredPredictionTerm.'
        )


def _moved_edges(
    predictions: dict[str, Tensor], matrix: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Distributions after an upright move, and where their bins are."""
    logits = predictions['edges'].float()
    places = bin_places(
        predictions['origins'], predictions['steps'], logits.shape[2]
    ).double()
    matrix = matrix / matrix[2, 2]
    order, factors, shifts = [], [], []
    for axis in (0, 1):  # where x and y of now come from
        source = int(np.abs(matrix[axis, :2]).argmax())
        factor = matrix[axis, source]
        low, high = source, source + 2
        order.append((low, high) if factor > 0 else (high, low))
        factors.append(factor)
        shifts.append(matrix[axis, 2])
    index = [one[side] for side in (0, 1) for one in order]
    factor, shift = (
        places.new_tensor(one).repeat(2)[:, None] for one in (factors, shifts)
    )
    return logits[:, index], (places[:, index] * factor + shift).float()


def _projected(points: Tensor, matrix: Tensor) -> Tensor:
    """Points under a homography, (M, 2) → (M, 2)."""
    full = torch.cat([points, torch.ones_like(points[:, :1])], 1).double()
    found = full @ matrix.T
    return (found[:, :2] / found[:, 2:]).float()

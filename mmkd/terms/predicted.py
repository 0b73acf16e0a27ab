"""Predicted: what the teacher detects is what the student is trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmdet.models.dense_heads import SSDHead
from mmdet.structures.bbox import bbox_overlaps
from mmdet.structures.mask import BitmapMasks
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.checks import check_fraction, check_name
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.structures.constants import constant
from mmkd.structures.ground_truth import labelled
from mmkd.teachers import detections, fed, still_statistics
from mmkd.terms.balanced import detection_loss
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Least width and height of an object, pixels, as of mmdet's annotations.
PIXEL = 1
#: Steps without an image to learn from after which that is told.
PATIENCE = 50
#: Images that are learnt from.
WHERE = ('all', 'unlabelled')


@MODELS.register_module()
class PredictedBoxTerm(Term):
    r"""The student's own detection loss, with the teacher's boxes as labels.

    .. math:: L = \lambda \, L_{det}(S(x), \hat y), \qquad
              \hat y = \{ (b, c) \in T(x) : score \ge \tau \}

    T(x) is what the teacher deploys: its heads and its own post-processing, on
    the images of the step. The student's heads run once more, from the maps
    that it has made, and its own assigner and losses do the rest. So nothing
    needs to be alike: a detector of queries teaches a dense one, a dense one
    one of two stages, and the other way round.

    Boxes, classes and, for students of instance segmentation, masks are taken
    as if they were annotated: mmdet's losses know no score, so that a
    threshold decides and a box above it counts in full. A teacher of other
    classes says what is of the student's, by ``classes`` of the teacher. An
    image in which nothing is found is one without objects; boxes are cut off
    at its edges, and dropped where less than a pixel wide or high is left, as
    annotations are. What is annotated as ignored stays so, and images without
    labels are no exception.

    Batch normalisations in the student's heads do not remember the second
    pass; other state that a head keeps of its labels, as the counts of
    SeesawLoss, sees both. A step waits for the device once for what is above
    the threshold, besides what post-processing and assignment wait for.

    Args:
        teacher: Name of the teacher.
        score_thr: Least score τ of a box that counts, on top of the
            teacher's own ``test_cfg``. Scores of focal losses are lower than
            those of a softmax.
        union: Train on the annotations as well, in one with the boxes, and
            leave out boxes that lie on an annotated one of their class. Else
            on the boxes alone, beside the loss on the annotations that the
            student has anyway.
        iou_thr: Overlap from which on a box lies on an annotated one.
        where: ``'all'`` images, or ``'unlabelled'`` ones alone, those whose
            pipeline has no ``LoadAnnotations``: the second pass then costs
            what these are of the batch.
        loss_weight: The factor λ.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``task``, the loss, 0 where no image is one of those; ``watch_found``,
        boxes of an image that count.

    Raises:
        ValueError: If the teacher predicts no boxes, or the student needs
            masks and the teacher predicts none, while the model is built.

    Reference:
        Sohn et al., "A Simple Semi-Supervised Learning Framework for Object
        Detection", 2020, arXiv:2005.04757, of images without labels, whose
        boxes come from a teacher before the training and are learnt under
        strong augmentation; and, of sentences, Kim and Rush, "Sequence-Level
        Knowledge Distillation", EMNLP 2016, arXiv:1606.07947. Known by their
        abstracts. That it is a term of the same step, beside labels and from
        maps that are there, ``union``, ``where='all'`` and the defaults are
        ours.
    """

    def __init__(
        self,
        teacher: str,
        score_thr: float = 0.3,
        union: bool = False,
        iou_thr: float = 0.5,
        where: str = 'all',
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_fraction(
            'PredictedBoxTerm', score_thr=score_thr, iou_thr=iou_thr
        )
        check_name('PredictedBoxTerm', 'where', where, WHERE)
        self.teacher, self.score_thr = teacher, score_thr
        self.where = where
        self._alone: int | None = 0  # steps without such images
        self.union, self.iou_thr = union, iou_thr
        self.loss_weight = loss_weight

    def silent(self) -> bool:
        return not self.loss_weight

    def compares_classes(self) -> bool:
        return True

    def takes_some_classes(self) -> bool:
        return True

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        self.shared, self.sham = teacher.shared, teacher.sham
        _check_predicts(student, teacher.detector)
        self.masks = student.with_mask
        self.path, self.their_path = (
            'neck' if one.with_neck else 'backbone'
            for one in (student, teacher.detector)
        )
        self.tap(student, self.path)
        teacher.tap(self.their_path)

    def checkable(self, step: Step) -> bool:
        """False: before there are weights nothing is predicted."""
        return False

    def forward(self, step: Step) -> dict[str, Tensor]:
        images, samples = step.once
        wanted = [
            index
            for index, one in enumerate(samples)
            if self.where == 'all' or not labelled(one)
        ]
        self._tell(bool(wanted))
        if not wanted:
            nothing = step.images.new_zeros(())
            return dict(task=nothing, watch_found=nothing)
        maps = step.student.at(self.path)
        if len(wanted) < len(images):
            maps, images = _picked(maps, images, wanted)
        found = self.found(step, wanted)
        samples = [
            self._labelled(samples[index], one, images)
            for index, one in zip(wanted, found)
        ]
        detector = step.student.detector
        with fed(detector, maps), still_statistics(detector):
            losses = detector.student_class.loss(detector, images, samples)
        count = sum(map(len, found)) / len(found)
        return dict(
            task=self.loss_weight * detection_loss(losses),
            watch_found=step.images.new_full((), count),
        )

    def _tell(self, some: bool) -> None:
        """Warn, once, of a training in which nothing is unlabelled."""
        if some or self._alone is None:
            self._alone = None
            return
        self._alone += 1
        if self._alone == PATIENCE:
            self._alone = None
            print_log(
                f"PredictedBoxTerm with where='unlabelled' has learnt nothing "
                f'in {PATIENCE} steps: every image has labels. Give each '
                f'batch some without (mmkd.PartlyLabelledDataset and '
                f"mmkd.PartlyLabelledBatchSampler), or set where='all'.",
                logger='current',
                level=logging.WARNING,
            )

    @torch.no_grad()
    def found(
        self, step: Step, wanted: Sequence[int] | None = None
    ) -> list[InstanceData]:
        """What the teacher detects and counts, image by image.

        Args:
            step: The step.
            wanted: Places of the images in the batch; all if None.

        Returns:
            ``bboxes`` in pixels of the student's images, ``labels`` of the
            student's classes, ``scores`` and, if wanted, ``masks``.
        """
        shown = step.teacher(self.teacher)
        maps, images = shown.at(self.their_path), step.shown
        own = theirs = list(step.samples)
        if self.sham:  # it was shown the next image of the batch
            theirs = [*theirs[1:], *theirs[:1]]
        if wanted is not None and len(wanted) < len(own):
            maps, images = _picked(maps, images, wanted)
            own, theirs = ([x[i] for i in wanted] for x in (own, theirs))
        every = detections(shown.detector, maps, theirs, images, shown.size)
        for one, sample in zip(every, own):
            one.bboxes = _inside(one.bboxes, sample, step.images)
            if self.shared is not None:
                one.labels = constant(self.shared, one.labels)[one.labels]
        counted = [
            self._counts(one, sample) for one, sample in zip(every, own)
        ]
        # One wait for all images, where a mask's index would take one each.
        numbers = torch.stack([one.sum() for one in counted]).tolist()
        return [
            one[(~counts).int().argsort(stable=True)[:number]]
            for one, counts, number in zip(every, counted, numbers)
        ]

    def _counts(self, found: InstanceData, sample: Any) -> Tensor:
        """Which boxes of an image count, (M,)."""
        sides = found.bboxes[:, 2:] - found.bboxes[:, :2]
        counts = (found.scores >= self.score_thr) & (sides >= PIXEL).all(1)
        if self.union and labelled(sample):
            gt = sample.gt_instances
            overlap = bbox_overlaps(found.bboxes, _corners(gt.bboxes))
            same = found.labels[:, None] == gt.labels
            counts &= ~((overlap >= self.iou_thr) & same).any(1)
        return counts

    def _labelled(
        self, sample: Any, found: InstanceData, images: Tensor
    ) -> Any:
        """A sample with what was found as its annotations."""
        gt = InstanceData(bboxes=found.bboxes, labels=found.labels)
        size = tuple(images.shape[-2:])
        if self.masks:
            gt.masks = _bitmaps(found.masks, size)
        known = self.union and labelled(sample)
        if known:
            own = sample.gt_instances
            gt = InstanceData(
                bboxes=torch.cat([_corners(own.bboxes), found.bboxes]),
                labels=torch.cat([own.labels, found.labels]),
            )
            if self.masks:
                masks = own.masks
                if not isinstance(masks, BitmapMasks):
                    masks = masks.to_bitmap()
                gt.masks = BitmapMasks.cat(
                    [masks.pad(size), _bitmaps(found.masks, size)]
                )
        other = sample.new()
        other.gt_instances = gt
        # An image without labels comes with ignored ones that have no boxes.
        if 'bboxes' not in other.get('ignored_instances', ()):
            other.ignored_instances = gt[:0]
        return other


def _picked(
    maps: Sequence[Tensor], images: Tensor, wanted: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Some images of a batch, and what was made of them."""
    first, last = wanted[0], wanted[-1] + 1
    # Side by side, as a rule: a slice needs no copy.
    near = len(wanted) == last - first
    part = (
        slice(first, last)
        if near
        else constant(list(wanted), images, torch.long)
    )
    return tuple(one[part] for one in maps), images[part]


def _inside(boxes: Tensor, sample: Any, images: Tensor) -> Tensor:
    """Boxes cut off at the edges of the image, as annotations are."""
    shape = sample.metainfo.get('img_shape', images.shape[-2:])
    height, width = shape[:2]
    most = constant((width, height, width, height), boxes)
    return torch.minimum(boxes.clamp(min=0), most)


def _corners(boxes: Any) -> Tensor:
    return getattr(boxes, 'tensor', boxes)  # mmdet's box types


def _bitmaps(masks: Tensor, size: tuple[int, int]) -> BitmapMasks:
    """Masks (M, H, W) in the form of annotations, padded as the batch."""
    pixels = masks.cpu().numpy().astype('uint8')
    return BitmapMasks(pixels, *pixels.shape[1:]).pad(size)


def _check_predicts(student: nn.Module, teacher: nn.Module) -> None:
    for detector, side in ((student, 'student'), (teacher, 'teacher')):
        heads = [
            getattr(detector, name, None) for name in ('bbox_head', 'roi_head')
        ]
        if not any(heads):
            raise ValueError(
                f'PredictedBoxTerm takes the boxes of classes that the '
                f'teacher predicts, but the {side} '
                f'({type(detector).__name__}) has no bbox_head or roi_head '
                f"that does. Use a feature term (tap='neck')."
            )
    head = getattr(teacher, 'bbox_head', None)
    # What MMDetection's own prediction with it asks for in vain.
    if isinstance(head, SSDHead) and not hasattr(head, 'loss_cls'):
        raise ValueError(
            f'PredictedBoxTerm lets the teacher predict, which '
            f'{type(head).__name__} cannot in this release of '
            f"MMDetection. Use a feature term (tap='neck')."
        )
    if student.with_mask and not teacher.with_mask:
        raise ValueError(
            f'PredictedBoxTerm needs masks as labels of the student '
            f'({type(student).__name__}), but the teacher '
            f'({type(teacher).__name__}) predicts none. Use a teacher of '
            f"instance segmentation, or a feature term (tap='neck')."
        )

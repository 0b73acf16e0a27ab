"""Stored: the student learns what a teacher predicted before the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from mmdet.models.dense_heads import YOLOXHead
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.classes import a_few, training_classes
from mmkd.ops.numeric import as_float
from mmkd.ops.scores import bernoulli_divergence
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of, resolve
from mmkd.terms.decoding import (
    anchors_of,
    check_decodable,
    decode,
    giou_error,
    stride_of,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Least sum of weights; none of a batch may be sure of anything.
EPS = 1e-4


@MODELS.register_module()
class StoredPredictionTerm(Term):
    r"""Class scores and boxes of the cells that a teacher is surest of.

    .. math:: L = \lambda \, \frac{\sum_m w_m \big[ \lambda_c \sum_{k \in C_m}
              D(p_{mk} \,\|\, q_{mk}) + \lambda_b (1 - GIoU(b_m, \hat b_m))
              \big]} {\sum_m w_m}

    over the predictions m that come with the images, where the teacher gives
    the classes C_m the probabilities p and the object the box b. q and
    :math:`\hat b` are what the student says in the cell in which the point of
    the prediction lies, of the level whose stride is nearest to that of the
    teacher's cell; of several anchors, in that which overlaps b most. D is the
    divergence of two coins, w the teacher's greatest probability.

    No teacher runs and none is loaded: ``tools/cache_predictions.py`` asks it
    before the training, once an image, and the pipeline moves what it said as
    it moves the pixels, through mosaics and crops, see
    :class:`mmkd.datasets.tracking.LoadPredictions`. A prediction was made on
    the whole image and not on the view; that is what it costs.

    Args:
        class_weight: The factor λ_c; 0 leaves classes out.
        box_weight: The factor λ_b; 0 leaves boxes out.
        tap: The dense head of the student.
        loss_weight: The factor λ.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``class`` and ``box``, of those whose factor is not 0.

    Raises:
        ValueError: If the student has no dense head with a sigmoid for each
            class and boxes that can be read, while the model is built; in
            the first step, if the predictions are of other classes.

    Reference:
        The idea of keeping a teacher's sparse answers is from Shen and Xing,
        "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV
        2022, arXiv:2112.01528, for classification. The form for detectors is
        ours.
    """

    def __init__(
        self,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        tap: str = 'bbox_head',
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        for name, one in (('class', class_weight), ('box', box_weight)):
            if one:
                check_positive(
                    'StoredPredictionTerm', **{f'{name}_weight': one}
                )
        self.class_weight, self.box_weight = class_weight, box_weight
        self.head, self.loss_weight = tap, loss_weight
        self._checked = False

    def silent(self) -> bool:
        return not self.loss_weight * (self.class_weight + self.box_weight)

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        own, _ = resolve(student, self.head)
        check_decodable('StoredPredictionTerm', own, 'student')
        sigmoid = getattr(own, 'use_sigmoid_cls', False)
        if isinstance(own, YOLOXHead) or not sigmoid:
            raise ValueError(
                f'StoredPredictionTerm needs a head with one probability for '
                f'each class of a cell, by a sigmoid, and {type(own).__name__}'
                f' is none. Use PredictedBoxTerm, or the data set of '
                f'tools/make_hypotheses.py, for this student.'
            )
        self.tap(student, self.head)

    def checkable(self, step: Step) -> bool:
        return False  # no image of the check comes with predictions

    def forward(self, step: Step) -> dict[str, Tensor]:
        head, _ = resolve(step.student.detector, self.head)
        self._check_classes(head, step)
        outputs = step.student.at(self.head)
        logits, boxes = (
            maps_of(outputs, 'StoredPredictionTerm', place) for place in (0, 1)
        )
        given, image = self._given(step)
        cells = self._cells(head, logits, given)
        rows = image, cells
        corners = torch.cat(
            [
                one.flatten(3).permute(0, 3, 1, 2)
                for one in decode(head, boxes)
            ],
            1,
        )[rows]  # M, A, 4
        scores = torch.cat(
            [
                one.unflatten(1, (anchors_of(head, level), -1))
                .flatten(3)
                .permute(0, 3, 1, 2)
                for level, one in enumerate(logits)
            ],
            1,
        )[rows]  # M, A, K
        chosen = self._anchor(head, logits, given, cells)
        corners = _take(corners, chosen)
        scores = as_float(_take(scores, chosen)).gather(1, given.labels)
        weight = given.logits.amax(1).sigmoid()
        total = weight.sum().clamp(min=EPS)
        shares = {}
        if self.class_weight:
            distance = bernoulli_divergence(scores, given.logits).sum(1)
            share = (weight * distance).sum() / total
            shares['class'] = self.loss_weight * self.class_weight * share
        if self.box_weight:
            distance = giou_error(corners, given.bboxes)
            share = (weight * distance).sum() / total
            shares['box'] = self.loss_weight * self.box_weight * share
        return shares

    def _check_classes(self, head: nn.Module, step: Step) -> None:
        """What the predictions are of, once: their order is all there is."""
        if self._checked:
            return
        self._checked = True
        theirs = step.samples[0].metainfo.get('teacher_classes')
        if theirs is None:
            return
        own = training_classes()
        if head.num_classes != len(theirs):
            raise ValueError(
                f'StoredPredictionTerm: the predictions are of {len(theirs)} '
                f'classes, the student has {head.num_classes}. Make them '
                f'with a teacher of the same.'
            )
        if own and own != tuple(theirs):
            raise ValueError(
                f'StoredPredictionTerm: the predictions are of the classes '
                f'{a_few(theirs)}, those of the data set are {a_few(own)}. '
                f'Make them with a teacher of the same classes in the same '
                f'order.'
            )

    def _given(self, step: Step) -> tuple[InstanceData, Tensor]:
        """All predictions of the batch, and the image of each, (M,)."""
        found = [one.get('teacher_predictions') for one in step.samples]
        if any(one is None for one in found):
            raise ValueError(
                'StoredPredictionTerm finds no predictions with the images. '
                'Put TrackPixels behind LoadAnnotations in the '
                'train_pipeline, and LoadPredictions behind PackDetInputs.'
            )
        image = torch.cat(
            [
                torch.full((len(one),), index, dtype=torch.long)
                for index, one in enumerate(found)
            ]
        )
        device = step.images.device
        given = InstanceData.cat(found).to(device)
        return given, image.to(device)

    def _cells(
        self, head: nn.Module, maps: Sequence[Tensor], given: InstanceData
    ) -> Tensor:
        """The cell of each prediction, counted over all levels, (M,)."""
        strides = given.points.new_tensor(
            [stride_of(head, level) for level in range(len(maps))]
        )
        sizes = given.labels.new_tensor(
            [tuple(one.shape[-2:])[::-1] for one in maps]
        )
        first = sizes.prod(1).cumsum(0) - sizes.prod(1)
        apart = given.strides.log()[:, None] - strides.log()
        near = apart.abs().argmin(1)
        cell = (given.points / strides[near, None]).long()
        cell = torch.minimum(cell, sizes[near] - 1)
        return first[near] + cell[:, 1] * sizes[near, 0] + cell[:, 0]

    def _anchor(
        self,
        head: nn.Module,
        maps: Sequence[Tensor],
        given: InstanceData,
        cells: Tensor,
    ) -> Tensor:
        """The anchor of each prediction's cell, (M,)."""
        count = anchors_of(head, 0)
        if count == 1:
            return torch.zeros_like(cells)
        priors = head.prior_generator.grid_priors(
            [tuple(one.shape[-2:]) for one in maps], device=cells.device
        )
        priors = torch.cat([get_box_tensor(one) for one in priors])
        priors = priors.view(-1, count, 4)[cells]
        boxes = given.bboxes[:, None].expand_as(priors)
        overlap = bbox_overlaps(
            priors.reshape(-1, 4), boxes.reshape(-1, 4), is_aligned=True
        )
        return overlap.view(-1, count).argmax(1)


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    """One of each row's, (M, A, D), (M,) → (M, D)."""
    index = chosen[:, None, None].expand(-1, 1, values.shape[-1])
    return values.gather(1, index).squeeze(1)

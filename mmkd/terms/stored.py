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
from mmkd.ops.boxes import giou_error
from mmkd.ops.edges import on_bins, tempered_divergence
from mmkd.ops.numeric import as_float
from mmkd.ops.scores import bernoulli_divergence
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.structures.constants import constant
from mmkd.taps import maps_of, resolve
from mmkd.terms.decoding import (
    anchors_of,
    check_decodable,
    decode,
    edge_bins,
    edge_origins,
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
              D(p_{mk} \,\|\, q_{mk}) + \lambda_b (1 - GIoU(b_m,
              \hat b_m)) + \lambda_e E_m \big]} {\sum_m w_m}

    over the predictions m that come with the images, where the teacher gives
    the classes C_m the probabilities p and the object the box b. q and
    :math:`\hat b` are what the student says in the cell in which the point of
    the prediction lies, of the level whose stride is nearest to that of the
    teacher's cell; of several anchors, in that which overlaps b most. D is the
    divergence of two coins, w the teacher's greatest probability.

    With ``edge_weight`` E compares the edges of the box as distributions,
    which GFL's heads give,

    .. math:: E = \frac{\tau^2}{4 B} \sum_{e=1}^{4} \sum_{b=1}^{B}
              P_{eb} \log \frac{P_{eb}}{Q_{eb}},

    both softened by the temperature :math:`\tau`. The teacher's bins lie
    where its anchor and stride put them and the image has been moved since;
    they are first shared out among the bins of the student's anchor so that
    the mean stays, and what is beyond the last one goes there. Where both
    heads have the same anchors and the image is as it was, it is LD.

    No teacher runs and none is loaded: ``tools/cache_predictions.py`` asks it
    before the training, once an image, and the pipeline moves what it said as
    it moves the pixels, through mosaics and crops, see
    :class:`mmkd.datasets.tracking.LoadPredictions`. A prediction was made on
    the whole image and not on the view; that is what it costs.

    Args:
        class_weight: The factor λ_c; 0 leaves classes out.
        box_weight: The factor λ_b; 0 leaves boxes out.
        edge_weight: The factor λ_e. Student and teacher have a head of
            distributions, and the pipeline ``LoadPredictions(edges=True)``.
        temperature: τ, of the distributions of edges. LD publishes 10.
        tap: The dense head of the student.
        loss_weight: The factor λ.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``class``, ``box`` and ``edge``, of those whose factor is not 0.

    Raises:
        ValueError: If the student has no dense head with a sigmoid for each
            class and boxes that can be read, or no distributions that are to
            be compared, while the model is built; in the first step, if the
            predictions are of other classes, or lack what is compared.

    Reference:
        The idea of keeping a teacher's sparse answers is from Shen and Xing,
        "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV
        2022, arXiv:2112.01528, for classification. The form for detectors is
        ours; that of the edges is LD's, see :class:`mmkd.losses.ld.LDLoss`.
    """

    def __init__(
        self,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        edge_weight: float = 0.0,
        temperature: float = 1.0,
        tap: str = 'bbox_head',
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        for name, one in (
            ('class', class_weight),
            ('box', box_weight),
            ('edge', edge_weight),
        ):
            if one:
                check_positive(
                    'StoredPredictionTerm', **{f'{name}_weight': one}
                )
        check_positive('StoredPredictionTerm', temperature=temperature)
        self.class_weight, self.box_weight = class_weight, box_weight
        self.edge_weight, self.temperature = edge_weight, temperature
        self.head, self.loss_weight = tap, loss_weight
        self._checked = False

    def silent(self) -> bool:
        inner = self.class_weight + self.box_weight + self.edge_weight
        return not self.loss_weight * inner

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
        if self.edge_weight and not edge_bins(own):
            raise ValueError(
                f'StoredPredictionTerm with edge_weight={self.edge_weight:g} '
                f'compares the edges of boxes as distributions, and '
                f'{type(own).__name__} gives none. Set edge_weight=0, or take '
                f'a student with a head of distributions, such as GFL.'
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
        if self.edge_weight:
            distance = self._edge_distance(head, boxes, given, rows, chosen)
            share = (weight * distance).sum() / total
            shares['edge'] = self.loss_weight * self.edge_weight * share
        return shares

    def _edge_distance(
        self,
        head: nn.Module,
        maps: Sequence[Tensor],
        given: InstanceData,
        rows: tuple[Tensor, Tensor],
        chosen: Tensor,
    ) -> Tensor:
        """Of each prediction, the mean over its edges, (M,)."""
        if 'edges' not in given:
            raise ValueError(
                f'StoredPredictionTerm with edge_weight={self.edge_weight:g} '
                f'finds no distributions of edges with the predictions. Set '
                f'LoadPredictions(edges=True) in the train_pipeline.'
            )
        bins = edge_bins(head)
        logits = torch.cat(
            [
                one.unflatten(1, (anchors_of(head, level), -1))
                .flatten(3)
                .permute(0, 3, 1, 2)
                for level, one in enumerate(maps)
            ],
            1,
        )[rows]  # M, A, 4·B
        logits = as_float(_take(logits, chosen)).unflatten(1, (4, bins))
        priors = _take(self._priors(head, maps, rows[1]), chosen)
        near, strides = self._levels(head, len(maps), given)
        target = on_bins(
            given.edges.softmax(2),
            given.places,
            edge_origins(head, priors),
            strides[near],
            bins,
        )
        return tempered_divergence(logits, target, self.temperature).mean(1)

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
        given = InstanceData.cat(found).to(device, non_blocking=True)
        return given, image.to(device, non_blocking=True)

    def _cells(
        self, head: nn.Module, maps: Sequence[Tensor], given: InstanceData
    ) -> Tensor:
        """The cell of each prediction, counted over all levels, (M,)."""
        near, strides = self._levels(head, len(maps), given)
        sizes = constant(
            [tuple(one.shape[-2:])[::-1] for one in maps], given.labels
        )
        first = sizes.prod(1).cumsum(0) - sizes.prod(1)
        cell = (given.points / strides[near, None]).long()
        cell = torch.minimum(cell, sizes[near] - 1)
        return first[near] + cell[:, 1] * sizes[near, 0] + cell[:, 0]

    def _levels(
        self, head: nn.Module, count: int, given: InstanceData
    ) -> tuple[Tensor, Tensor]:
        """The level of each prediction, (M,), and the stride of each level."""
        strides = constant(
            [stride_of(head, level) for level in range(count)], given.points
        )
        apart = given.strides.log()[:, None] - strides.log()
        return apart.abs().argmin(1), strides

    def _priors(
        self, head: nn.Module, maps: Sequence[Tensor], cells: Tensor
    ) -> Tensor:
        """The anchors of each prediction's cell, (M, A, 4)."""
        priors = head.prior_generator.grid_priors(
            [tuple(one.shape[-2:]) for one in maps], device=cells.device
        )
        priors = torch.cat([get_box_tensor(one) for one in priors])
        return priors.view(-1, anchors_of(head, 0), 4)[cells]

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
        priors = self._priors(head, maps, cells)
        boxes = given.bboxes[:, None].expand_as(priors)
        overlap = bbox_overlaps(
            priors.reshape(-1, 4), boxes.reshape(-1, 4), is_aligned=True
        )
        return overlap.view(-1, count).argmax(1)


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    """One of each row's, (M, A, D), (M,) → (M, D)."""
    index = chosen[:, None, None].expand(-1, 1, values.shape[-1])
    return values.gather(1, index).squeeze(1)

"""Proposal: the teacher's second stage judges the student's proposals."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_name
from mmkd.ops.boxes import giou_error
from mmkd.ops.numeric import as_float, zero_of
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Outputs, Step
from mmkd.structures.constants import constant
from mmkd.structures.ground_truth import places
from mmkd.taps import maps_of
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: The mean divergence of the softmaxes, which is DeFeat's.
SOFT_TARGETS = dict(
    type='mmkd.SoftTargetLoss', activation='softmax', weight_by='uniform'
)
#: Arguments of a RoI head's forward that a term can give or leave out.
ARGUMENTS = ('stage', 'x', 'rois', 'pos_inds', 'bbox_feats')


class SecondStageTerm(Term):
    """What terms on a second stage share: the teacher sees the student's RoIs.

    The student's own loss is tapped, with the RoIs that it sampled and the
    labels that it gave them; nothing is assigned or sampled twice. The
    teacher runs as far as its maps, and its head on the student's RoIs.

    Args:
        teacher: Name of the teacher.
        stage: Which of the student's stages, if it is a cascade; -1 is the
            last.
        teacher_stage: The same for the teacher.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a detector has no such head, classes differ in number,
            or the teacher's maps are not of the strides that its head
            expects, while the model is built.
    """

    #: The part of a RoI head that is compared.
    part: ClassVar[str]
    #: The method of a RoI head that runs it.
    runs: ClassVar[str]

    def __init__(
        self,
        teacher: str,
        stage: int = 0,
        teacher_stage: int = -1,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        self.teacher = teacher
        self.stage, self.teacher_stage = stage, teacher_stage
        #: Of the student's classes those that the teacher has; None if all.
        self.shared: tuple[int, ...] | None = None

    def compares_classes(self) -> bool:
        return True

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        self.shared = teacher.shared
        own = self.heads(student, 'student')
        other = self.heads(teacher.detector, 'teacher')
        self.stage = self._index('stage', self.stage, own)
        self.teacher_stage = self._index(
            'teacher_stage', self.teacher_stage, other
        )
        path = f'roi_head.{self.part}'
        if isinstance(getattr(student.roi_head, self.part), nn.ModuleList):
            path = f'{path}.{self.stage}'
        self.path = f'{path}.loss_and_target'
        self.tap(student, self.path)
        self.maps_path = 'neck' if teacher.detector.with_neck else 'backbone'
        teacher.tap(self.maps_path)
        self._check_call(teacher.detector.roi_head)
        self.check_heads(own[self.stage], other[self.teacher_stage])

    def pair(self, step: Step) -> tuple[nn.Module, nn.Module]:
        """The two heads that are compared, the student's and the teacher's."""
        teacher = step.teacher(self.teacher).detector
        return (
            self.heads(step.student.detector, 'student')[self.stage],
            self.heads(teacher, 'teacher')[self.teacher_stage],
        )

    def heads(self, detector: nn.Module, side: str) -> Sequence[nn.Module]:
        """The heads of all stages of a detector.

        Raises:
            ValueError: If it has none; the message names the side.
        """
        heads = getattr(getattr(detector, 'roi_head', None), self.part, None)
        if heads is None:
            raise ValueError(
                f'{type(self).__name__} compares second stages, but the '
                f'{side} ({type(detector).__name__}) has no '
                f'roi_head.{self.part}. Choose a term on features for this '
                f"pair: type='mmkd.FeatureTerm', tap='neck'."
            )
        return heads if isinstance(heads, nn.ModuleList) else [heads]

    def check_heads(self, own: nn.Module, other: nn.Module) -> None:
        """Whether what two heads say can be compared.

        Raises:
            ValueError: If it cannot.
        """
        counts = own.num_classes, other.num_classes
        if self.shared is None and counts[0] != counts[1]:
            raise ValueError(
                f'{type(self).__name__} compares class by class, but the '
                f"student's head has {counts[0]} classes and the teacher's "
                f'{counts[1]}. Use a teacher of the same classes, or a '
                f"feature term (tap='neck')."
            )

    def _index(self, name: str, stage: int, heads: Sequence) -> int:
        count = len(heads)
        if not -count <= stage < count:
            raise ValueError(
                f'{type(self).__name__} has {name}={stage}, but that detector '
                f'has {count} stage{"s" * (count > 1)}, 0 to {count - 1}. Set '
                f'{name} to one of them, or to -1 for the last.'
            )
        return stage % count

    def _check_call(self, roi_head: nn.Module) -> None:
        arguments = inspect.signature(getattr(roi_head, self.runs)).parameters
        unknown = [name for name in arguments if name not in ARGUMENTS]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} runs the teacher's head on RoIs "
                f'alone, but {type(roi_head).__name__} also needs '
                f'{", ".join(unknown)}. Use a teacher with StandardRoIHead '
                f'or CascadeRoIHead, or a feature term.'
            )

    def checkable(self, step: Step) -> bool:
        """False: a dry pass samples no RoIs. The teacher's maps are checked.

        Raises:
            ValueError: If they do not fit the teacher's head.
        """
        self.maps(step.teacher(self.teacher))
        return False

    def maps(self, shown: Outputs) -> tuple[Tensor, ...]:
        """The teacher's maps, whole: RoIs are in pixels from the corner.

        Raises:
            ValueError: If they have not the strides that its head expects.
        """
        path = self.maps_path
        maps = maps_of(shown.at(path), f'The tap {path!r}')
        name = self.part.replace('head', 'roi_extractor')
        extractor = getattr(shown.detector.roi_head, name)
        if isinstance(extractor, nn.ModuleList):
            extractor = extractor[self.teacher_stage]
        strides = list(extractor.featmap_strides)
        found = [tuple(one.shape[-2:]) for one in maps]
        fits = len(maps) >= len(strides) and all(
            abs(cells - pixels / stride) < 1  # whichever way it is rounded
            for size, stride in zip(found, strides)
            for cells, pixels in zip(size, shown.size)
        )
        if not fits:
            raise ValueError(
                f'Teacher {self.teacher!r}: its roi_head reads maps of '
                f'strides {strides}, but its {path} makes maps of {found} '
                f'cells from {tuple(shown.size)} pixels. Set featmap_strides '
                f"in that teacher's roi_head.{name} to those of its maps."
            )
        return maps

    def seen(self, step: Step) -> dict[str, Any] | None:
        """What the student's loss was given, by name, and its targets.

        Returns:
            None where a cascade stopped before this stage for want of
            proposals.
        """
        if self.stage and not step.student.has(self.path):
            return None
        _, given = step.student.inputs(self.path)
        return {**given, **step.student.at(self.path)}

    @torch.no_grad()
    def judge(self, step: Step, rois: Tensor) -> dict[str, Any]:
        """What the teacher's head makes of RoIs of the student.

        Args:
            rois: Index of the image and x1 y1 x2 y2 in pixels, (M, 5).
        """
        shown = step.teacher(self.teacher)
        roi_head = shown.detector.roi_head
        maps = self.maps(shown)
        forward = getattr(roi_head, self.runs)
        if isinstance(getattr(roi_head, self.part), nn.ModuleList):
            return forward(self.teacher_stage, maps, rois)
        return forward(maps, rois)


@MODELS.register_module()
class ProposalTerm(SecondStageTerm):
    r"""Classes and boxes of the student's proposals, as the teacher sees them.

    .. math::
        L = \frac{w_+}{|P|} \sum_{i \in P} D(z^S_i, z^T_i)
          + \frac{w_-}{|N|} \sum_{i \in N} D(z^S_i, z^T_i)
          + \frac{w_{box}}{|P|} \sum_{i \in P} (1 - GIoU(b^S_i, b^T_i))

    P and N are the proposals that the student sampled, positive and negative
    by its own assignment, z the class scores that both heads give them, with
    the background's, and b the boxes of the target class, each decoded by its
    own head. D is ``cls_loss``, by default the divergence of the softmaxes.

    Of a teacher that lacks classes of the student the others are compared
    alone: the student's scores of these and of the background, so that both
    sides are given that an object is of none of the classes left out. A
    proposal of a class that is left out has the label of the background, and
    no box.

    A class loss sees the proposals of a group as the cells of one row,
    (1, C + 1, 1, M), and the label of each as a box over its cell, where the
    background is the label C. So losses of dense heads serve here: with
    ``SoftTargetLoss`` and ``weight_by='uniform'`` a group's share is its mean
    divergence, with ``DKDLoss`` and ``NKDLoss`` the target of a proposal is
    its label.

    Args:
        teacher: Name of the teacher.
        cls_loss: Config of the loss of class scores, with no ``num_classes``;
            None for boxes alone.
        positive_weight, negative_weight: Factors of ``positive`` and
            ``negative``. Published: 2 and 2.
        box_weight: Factor of ``box``.
        decoupled: Positive and negative proposals by themselves; else all
            together, as ``cls``, without these two factors.
        stage: Which of the student's stages, if it is a cascade; -1 is the
            last.
        teacher_stage: The same for the teacher.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``positive`` and ``negative``, or ``cls``, and, if weighted, ``box``.
        The parts of a loss that has several follow its group's name:
        ``positive_target``.

    Raises:
        ValueError: If a detector has no second stage, classes differ in
            number, a head predicts no boxes, or the teacher's maps are not of
            the strides that its head expects, while the model is built; if
            scores are not those of C classes and the background, in the first
            step.

    Reference:
        Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR
        2021, arXiv:2103.14475. Read: the authors' loss and config
        (https://github.com/ggjy/DeFeat.pytorch), not the paper. Their default
        is to score the teacher's proposals; to score the student's is an
        option of theirs. The config that they released names the two weights
        and a temperature of 1, and does not switch this part on. The part on
        boxes is ours.
    """

    part = 'bbox_head'
    runs = '_bbox_forward'

    def __init__(
        self,
        teacher: str,
        cls_loss: Mapping | None = SOFT_TARGETS,
        positive_weight: float = 1.0,
        negative_weight: float = 1.0,
        box_weight: float = 0.0,
        decoupled: bool = True,
        stage: int = 0,
        teacher_stage: int = -1,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(teacher, stage, teacher_stage, schedule)
        self.loss = None if cls_loss is None else build(cls_loss, 'cls_loss')
        self.decoupled = decoupled
        self.weights = (
            dict(positive=positive_weight, negative=negative_weight)
            if decoupled
            else dict(cls=1.0)
        )
        self.box_weight = box_weight

    def silent(self) -> bool:
        classes = self.loss is not None and any(self.weights.values())
        return not (classes or self.box_weight)

    def takes_some_classes(self) -> bool:
        return True

    def check_heads(self, own: nn.Module, other: nn.Module) -> None:
        super().check_heads(own, other)
        for head, side in ((own, 'student'), (other, 'teacher')):
            if self.box_weight and not hasattr(head, 'fc_reg'):
                raise ValueError(
                    f'ProposalTerm compares boxes, but the {side} has a '
                    f'{type(head).__name__}, which does not regress the four '
                    f'numbers of a box. Set box_weight=0.'
                )
            if isinstance(getattr(head, 'fc_cls', None), nn.ModuleList):
                raise ValueError(
                    f'ProposalTerm compares one object a proposal, but the '
                    f'{side} has a {type(head).__name__}, which finds '
                    f'{len(head.fc_cls)}. Use another detector, or a feature '
                    f"term (tap='neck')."
                )
            if getattr(head, 'custom_cls_channels', False):
                raise ValueError(
                    f'ProposalTerm compares one score a class and one of the '
                    f'background, but the {side} has other outputs besides, '
                    f'by its {type(head.loss_cls).__name__}. Use a head with '
                    f"another loss, or a feature term (tap='neck')."
                )

    def forward(self, step: Step) -> Tensor | dict[str, Tensor]:
        seen = self.seen(step)
        if seen is None:
            return step.images.new_zeros(())
        given = self.judge(step, seen['rois'])
        labels = seen['bbox_targets'][0]
        sizes = sizes_of(seen['sampling_results'])
        shares: dict[str, Tensor] = {}
        if self.loss is not None:
            own, other = self.pair(step)
            scores = seen['cls_score'], given['cls_score']
            self._check_scores(*scores, own, other)
            samples = self._shared(*scores, labels, own.num_classes)
            groups = (
                zip(*(halves(one, sizes) for one in samples))
                if self.decoupled
                else [samples]
            )
            for (name, weight), group in zip(self.weights.items(), groups):
                shares |= self._classes(name, weight, *group)
        if self.box_weight:
            deltas = seen['bbox_pred'], given['bbox_pred']
            rois, labels, *deltas = (
                halves(one, sizes)[0]
                for one in (seen['rois'], labels, *deltas)
            )
            theirs, count = labels, max(len(rois), 1)
            known = torch.ones_like(labels)
            if self.shared is not None:
                theirs = places(labels, self.shared)
                known = (theirs >= 0).to(labels)
                theirs, count = theirs.clamp(min=0), known.sum().clamp(min=1)
            boxes = (
                decode(head, rois, one, label)
                for head, one, label in zip(
                    self.pair(step), deltas, (labels, theirs)
                )
            )
            error = known * giou_error(*boxes)
            share = error.sum() / count + zero_of(deltas[0])
            shares['box'] = self.box_weight * share
        return shares

    def _shared(
        self, student: Tensor, teacher: Tensor, labels: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the classes that both have, and labels among these.

        A proposal of another class is one of the background.
        """
        if self.shared is None:
            return student, teacher, labels
        kept = constant([*self.shared, count], labels)
        background = len(self.shared)
        return (
            student.index_select(1, kept),
            teacher,
            places(labels, self.shared, background),
        )

    def _check_scores(
        self,
        student: Tensor,
        teacher: Tensor,
        head: nn.Module,
        other: nn.Module,
    ) -> None:
        found = [one.shape[1] for one in (student, teacher)]
        if found != [head.num_classes + 1, other.num_classes + 1]:
            raise ValueError(
                f'ProposalTerm compares the scores of {head.num_classes} '
                f'classes and the background, got {found[0]} of the student '
                f'and {found[1]} of the teacher. Use heads with a plain '
                f'softmax, or cls_loss=None.'
            )

    def _classes(
        self,
        name: str,
        weight: float,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """The class loss of a group of proposals, by names of its parts."""
        if not len(labels):  # one that does not count, so that parts are named
            weight = 0.0
            student = student.new_zeros(1, student.shape[1]) + zero_of(student)
            teacher, labels = torch.zeros_like(student), labels.new_zeros(1)
        maps = [row_of(one) for one in (student, teacher)]
        if getattr(self.loss, 'scope', 'level') == 'levels':
            maps = [(one,) for one in maps]
        loss = self.loss(*maps, row_labels(labels))
        if not isinstance(loss, Mapping):
            return {name: weight * loss}
        shares = {}
        for part, value in loss.items():
            if part.startswith('watch_'):
                shares[f'watch_{name}_{part[6:]}'] = value
            else:
                shares[f'{name}_{part}'] = weight * value
        return shares


def sizes_of(sampled: Sequence) -> list[int]:
    """Numbers of positive and negative proposals, image by image.

    In MMDetection the positive ones of an image come before its negative
    ones, so that these numbers, which the host knows, tell them apart.

    Args:
        sampled: mmdet's sampling result of each image.
    """
    return [
        len(group)
        for one in sampled
        for group in (one.pos_priors, one.neg_priors)
    ]


def halves(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of all positive proposals, and of all negative ones.

    Args:
        rows: One row a proposal, (M, ...).
        sizes: As :func:`sizes_of` returns them.

    Example:
        >>> halves(torch.arange(5), [1, 2, 2, 0])
        (tensor([0, 3, 4]), tensor([1, 2]))
    """
    parts = rows.split(sizes)
    return torch.cat(parts[0::2]), torch.cat(parts[1::2])


def row_of(scores: Tensor) -> Tensor:
    """Scores of proposals as a map of one row, (M, C) → (1, C, 1, M)."""
    return scores.T[None, :, None]


def row_labels(labels: Tensor) -> GroundTruth:
    """Labels of proposals as boxes, each over its cell of the row.

    Args:
        labels: Class of each proposal, (M,).
    """
    count = len(labels)
    cell = torch.arange(count, device=labels.device, dtype=torch.float32)
    # Well inside of the cell: its edges would be rounded in a long row.
    edges = [cell + 0.25, torch.full_like(cell, 0.25)]
    boxes = torch.stack([*edges, *(edge + 0.5 for edge in edges)], 1)
    return GroundTruth(
        boxes=boxes,
        labels=labels,
        image=torch.zeros_like(labels),
        shape=(1, count),
        image_shapes=((1, count),),
        ignored=boxes[:0],
        ignored_image=labels[:0],
    )


def of_class(values: Tensor, labels: Tensor, agnostic: bool) -> Tensor:
    """What a head says of each row for the class of the row.

    Args:
        values: (M, C, ...), or (M, 1, ...) of a head that knows no classes.
        labels: Class of each row, (M,).
        agnostic: Whether the head knows no classes.

    Returns:
        (M, ...).
    """
    rows = torch.arange(len(labels), device=labels.device)
    return values[rows, torch.zeros_like(labels) if agnostic else labels]


def decode(
    head: nn.Module, rois: Tensor, deltas: Tensor, labels: Tensor
) -> Tensor:
    """Boxes that a second stage predicts for the classes of its RoIs.

    Args:
        head: mmdet's box head, which knows the coder.
        rois: Index of the image and x1 y1 x2 y2 in pixels, (M, 5).
        deltas: What the head predicts, (M, C * 4), or (M, 4) if it knows no
            classes.
        labels: Class of each RoI, (M,).

    Returns:
        x1 y1 x2 y2 in pixels, (M, 4), float32.
    """
    deltas = as_float(deltas).unflatten(1, (-1, 4))
    deltas = of_class(deltas, labels, head.reg_class_agnostic)
    rois = rois[:, 1:].detach()
    return get_box_tensor(head.bbox_coder.decode(rois, deltas))

"""LGD: labels and the student's own maps make the knowledge it learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_channels, check_fraction, check_positive
from mmkd.classes import check_num_classes
from mmkd.ops.masks import box_spans, valid_mask
from mmkd.ops.numeric import as_float, one_hot
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Step
from mmkd.structures.constants import constant
from mmkd.structures.ground_truth import labelled
from mmkd.taps import maps_of
from mmkd.teachers import fed, still_statistics
from mmkd.terms.balanced import detection_loss
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Widths of the layers that encode labels.
LOCAL, WIDE = 64, (128, 1024)


@MODELS.register_module()
class LabelGuidedTerm(Term):
    r"""Distance to maps that know the labels, and make the heads' loss low.

    There is no teacher. An :class:`Instructor` makes of the student's maps F
    and the annotations y maps of the same form, which the student's own heads
    must be able to detect by:

    .. math:: task = \lambda \, L_{det}(heads(I(F, y)), y)

    and which the student's maps imitate, after three convolutions g of their
    own:

    .. math::
        distil = \frac{w}{C \, |valid|} \sum_l \sum_{valid}
            \left\| IN(g(F_l)) - IN(I_l) \right\|^2

    IN is an instance norm without weights. The instructor gets no gradient
    of ``distil``, and the student none before ``begin``: until then g alone
    learns by it. Nothing of all this is deployed.

    Images without annotations are left out. Cells of the padded border do not
    count, but the convolutions see them. Batch statistics of the heads stay
    those of the student's maps.

    Args:
        num_classes: Of the data set.
        channels: Of the student's maps, the same at each level.
        tap: Where the student's heads begin.
        heads: Of the attention, a divisor of ``channels``.
        context: Let the whole image be an object as well. Published: yes for
            RetinaNet and FCOS, no for Faster R-CNN with several scales.
        detach: Keep the gradient of ``task`` from the student's maps.
        begin: Progress of the training before which the student does not
            imitate. Published: 30000 of 180000 steps.
        loss_weight: Factor w.
        task_weight: Factor of ``task``.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``distil`` and ``task``.

    Raises:
        ValueError: If channels, heads or classes do not fit.

    Reference:
        Zhang et al., "LGD: Label-Guided Self-Distillation for Object
        Detection", AAAI 2022, arXiv:2109.11496. Read: the abstract, and the
        authors' code and configs (https://github.com/megvii-research/LGD) for
        facts. There the student's backbone is frozen for the first 20000 to
        70000 steps, which a config can do by a hook, not this term; a cell is
        in a box if its corner is, here if the box reaches into it, so that
        small objects have one; an image without objects gets one of the first
        class in its corner; and the border counts.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        tap: str = 'neck',
        heads: int = 8,
        context: bool = True,
        detach: bool = False,
        begin: float = 1 / 6,
        loss_weight: float = 1.0,
        task_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive('LabelGuidedTerm', num_classes=num_classes, heads=heads)
        check_fraction('LabelGuidedTerm', begin=begin)
        self.num_classes, self.channels, self.path = num_classes, channels, tap
        self.detach, self.begin = detach, begin
        self.loss_weight, self.task_weight = loss_weight, task_weight
        self.instructor = Instructor(num_classes, channels, heads, context)
        self.adapter = _convolutions(channels, nn.ReLU)

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.tap(student, self.path)
        check_num_classes('LabelGuidedTerm', student, self.num_classes)

    def silent(self) -> bool:
        return not (self.loss_weight or self.task_weight)

    def forward(self, step: Step) -> dict[str, Tensor]:
        maps = maps_of(step.student.at(self.path), f'The tap {self.path!r}')
        for one in maps:
            check_channels('LabelGuidedTerm', one, self.channels)
        # The distiller puts annotated images first.
        known = sum(labelled(one) for one in step.samples)
        images, samples = step.images[:known], list(step.samples[:known])
        maps, gt = tuple(one[:known] for one in maps), step.gt
        if known < len(step.samples):
            gt = GroundTruth.from_samples(samples, images)
        seen = [one.detach() for one in maps] if self.detach else maps
        knowledge = self.instructor(seen, gt)
        task = step.images.new_zeros(())
        if not step.dry:
            detector, once = step.student.detector, known // step.copies
            with fed(detector, knowledge), still_statistics(detector):
                losses = detector.student_class.loss(
                    detector, images[:once], samples[:once]
                )
            task = detection_loss(losses)
        if step.progress < self.begin:
            maps = [one.detach() for one in maps]
        distil = instructed_distance(
            [self.adapter(one) for one in maps],
            [one.detach() for one in knowledge],
            [valid_mask(gt, tuple(one.shape[-2:])) for one in maps],
        )
        return dict(
            distil=self.loss_weight * distil, task=self.task_weight * task
        )


def instructed_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    valid: Sequence[Tensor],
) -> Tensor:
    """Mean squared difference of maps that are normalised one by one.

    Args:
        student, teacher: Maps of each level, (N, C, H, W).
        valid: 1 at the cells that count, (N, 1, H, W).

    Returns:
        Mean over channels and over the cells of all levels, in float32.

    Example:
        >>> one = torch.tensor([[[[1.0, 3.0]]]])
        >>> count = [torch.ones(1, 1, 1, 2)]
        >>> round(instructed_distance([one], [-7 * one], count).item(), 3)
        4.0
    """
    total = sum(
        (count * (_normal(one, count) - _normal(other, count)).square()).sum()
        for one, other, count in zip(student, teacher, valid)
    )
    cells = sum(count.sum() for count in valid)
    return total / (student[0].shape[1] * cells).clamp(min=1)


def _normal(feature: Tensor, count: Tensor) -> Tensor:
    """Zero mean and unit variance over the cells that count."""
    feature = as_float(feature)
    # An ignored box may hide an image from end to end.
    total = count.sum((2, 3), keepdim=True).clamp(min=1)
    mean = (count * feature).sum((2, 3), keepdim=True) / total
    centred = feature - mean
    variance = (count * centred.square()).sum((2, 3), keepdim=True) / total
    return centred * (variance + 1e-5).rsqrt()


# The knowledge ---------------------------------------------------------------


class Instructor(nn.Module):
    """Maps of what the labels say, told in terms of what the student sees.

    An object is encoded by its label and by what the student's map shows
    inside of its box; the latter asks all labels of its image, and the answer
    is written into the box. The same layers serve all levels.

    Args:
        num_classes: Of the data set.
        channels: Of the maps, C.
        heads: Of the attention.
        context: Let the whole image be an object as well.
    """

    def __init__(
        self, num_classes: int, channels: int, heads: int, context: bool
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f'LabelGuidedTerm shares its channels among heads, got '
                f'channels={channels} and heads={heads}. Set heads to a '
                f'divisor of {channels}.'
            )
        self.num_classes = num_classes
        self.encoder = LabelEncoder(4 + num_classes, channels)
        self.label = nn.Linear(channels, channels)
        self.appearance = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = nn.MultiheadAttention(
            channels, heads, batch_first=True
        )
        self.object = nn.Linear(channels, channels)
        self.written = nn.Conv2d(channels, channels, 3, padding=1)
        self.context = nn.Linear(channels, channels) if context else None
        self.refine = _convolutions(channels, _NormReLU, last=_Norm)

    def forward(
        self, maps: Sequence[Tensor], gt: GroundTruth
    ) -> tuple[Tensor, ...]:
        """Maps of the same shapes, (N, C, H, W) each."""
        told, there = describe(gt, self.num_classes, self.context is not None)
        label = self.label(self.encoder(told, there))
        label = F.layer_norm(label, label.shape[-1:]).relu()
        # Of an image without objects the answer is written nowhere.
        unknown = ~(there | ~there.any(1, keepdim=True))
        return tuple(self._level(one, gt, label, unknown) for one in maps)

    def _level(
        self, feature: Tensor, gt: GroundTruth, label: Tensor, unknown: Tensor
    ) -> Tensor:
        size = tuple(feature.shape[-2:])
        mask = object_masks(gt, size, self.context is not None).to(feature)
        flat = mask.flatten(2)  # N, K, H·W
        seen = F.group_norm(self.appearance(feature), 1).relu().flatten(2)
        count = flat.sum(2, keepdim=True).clamp(min=1)
        answer, _ = self.attention(
            (flat @ seen.mT) / count,
            label,
            label,
            key_padding_mask=unknown,
            need_weights=False,
        )
        if self.context is None:
            around = 0
        else:  # it stands last
            around = self.context(answer[:, -1])[:, :, None, None]
            answer, flat = answer[:, :-1], flat[:, :-1]
        written = self.object(answer).mT @ flat  # N, C, H·W
        written = self.written(written.unflatten(2, size))
        return self.refine((written + around).relu())


class LabelEncoder(nn.Module):
    """A vector for each object, that knows of the others of its image.

    Args:
        told: Numbers that an object is told by.
        channels: Of its vector.

    Reference:
        Qi et al., "PointNet: Deep Learning on Point Sets for 3D Classification
        and Segmentation", CVPR 2017, arXiv:1612.00593, with layer norms.
    """

    def __init__(self, told: int, channels: int) -> None:
        super().__init__()
        self.turn_told, self.turn_local = Turn(told), Turn(LOCAL)
        self.local = nn.Linear(told, LOCAL)
        self.wide = nn.ModuleList(
            nn.Linear(before, after)
            for before, after in pairwise((LOCAL, *WIDE))
        )
        self.fuse = nn.Linear(LOCAL + WIDE[-1], channels)

    def forward(self, told: Tensor, there: Tensor) -> Tensor:
        """(N, K, told) and which of them are there, (N, K) → (N, K, C)."""
        local = self.turn_local(_rectified(self.local(self.turn_told(told))))
        wide = local
        for layer in self.wide:
            wide = _rectified(layer(wide))
        # At least 0, so that what is not there is never the largest.
        every = (there[..., None] * wide).amax(1, keepdim=True)
        every = every.expand(-1, local.shape[1], -1)
        return _rectified(self.fuse(torch.cat([local, every], 2)))


class Turn(nn.Module):
    """Multiply a vector by a matrix that it chooses; the identity at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        widths = (size, LOCAL, *WIDE, 512, 256)
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in pairwise(widths)
        )
        self.matrix = nn.Linear(256, size * size)
        nn.init.zeros_(self.matrix.weight)
        nn.init.zeros_(self.matrix.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        chosen = vectors
        for layer in self.layers:
            chosen = _rectified(layer(chosen))
        size = vectors.shape[-1]
        matrix = self.matrix(chosen).unflatten(-1, (size, size))
        return vectors + (vectors[..., None, :] @ matrix)[..., 0, :]


def _rectified(vectors: Tensor) -> Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:]).relu()


class _Norm(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, affine=False)


class _NormReLU(_Norm):
    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature).relu()


def _convolutions(
    channels: int, between: type, last: type | None = None
) -> nn.Sequential:
    """Three of 3x3, with something between them and after the last."""
    layers: list[nn.Module] = []
    for kind in (between, between, last):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        if kind is not None:
            layers.append(kind() if kind is nn.ReLU else kind(channels))
    return nn.Sequential(*layers)


# Objects ---------------------------------------------------------------------


def describe(
    gt: GroundTruth, num_classes: int, context: bool
) -> tuple[Tensor, Tensor]:
    """What each object is told by: its sides and its class, in [-1, 1].

    Args:
        gt: Boxes of the batch.
        num_classes: Of the data set.
        context: Add the whole image, of no class, as the last one.

    Returns:
        (N, K, 4 + classes), sides as shares of the image, and which of the K
        places are taken, (N, K).
    """
    scale = gt.image_sizes.to(gt.boxes).repeat(1, 2)
    sides = gt.spread(gt.boxes / scale[gt.image]).clamp(0, 1)
    classes = gt.spread(one_hot(gt.labels, num_classes))
    there = gt.spread(torch.ones_like(gt.image, dtype=torch.bool))
    told = torch.cat([sides, classes], 2)
    if context:
        every = F.pad(constant([[[0.0, 0, 1, 1]]], told), (0, num_classes))
        told = torch.cat([told, every.expand(len(told), -1, -1)], 1)
        there = F.pad(there, (0, 1), value=True)
    return 2 * told - 1, there


def object_masks(
    gt: GroundTruth, size: tuple[int, int], context: bool
) -> Tensor:
    """1 at the cells that an object's box reaches into, (N, K, H, W).

    Args:
        gt: Boxes of the batch.
        size: Rows and columns of the map.
        context: Add the image without its border as the last one.
    """
    rows, columns, _ = box_spans(gt.boxes, gt.shape, size, inclusive=False)
    rows, columns = gt.spread(rows), gt.spread(columns)
    masks = rows[..., :, None] * columns[..., None, :]
    if context:
        whole = valid_mask(gt, size, keep_ignored=True)
        masks = torch.cat([masks, whole], 1)
    return masks

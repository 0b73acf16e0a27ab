"""BSS: objects moved to the teacher's boundary between two classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.losses.soft_target import soft_target_loss
from mmkd.ops.ascent import NORMS, ascend
from mmkd.ops.numeric import zero_of
from mmkd.ops.scores import check_class_maps, class_probs
from mmkd.pixels import Pixels
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Step
from mmkd.taps import resolve
from mmkd.terms.decoding import check_decodable, check_same_anchors
from mmkd.terms.showing import (
    SCORES,
    Seen,
    changed,
    room,
    seen,
    student_shown,
    teacher_shown,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

RIVALS = ('sampled', 'second')


@MODELS.register_module()
class BoundaryTerm(Term):
    r"""Soft targets for objects that the teacher is about to mistake.

    .. math::
        x_{k+1} = x_k + \eta \frac{\nabla J}{\|\nabla J\|}, \quad
        J(x) = \sum_{m \in A} z^T_{m r} - z^T_{m c} - o

    An object m is a ground-truth box; its logits z are those of the anchor at
    which the teacher scores its class best, among the cells that the box
    overlaps. c is the class that the teacher gives it and r a rival. A are the
    objects whose class has not yet turned, by o at least, so that one that has
    is no longer pushed; a step is no longer than what brings an image there to
    first order. Student and teacher are then compared, by
    :func:`mmkd.losses.soft_target.soft_target_loss`, on the images that were
    moved, at these anchors alone. Objects that the teacher takes for something
    else to begin with do not count, and the mean is over those that do.

    Both networks are in eval mode wherever they see such an image; pixels
    stay between 0 and 255, and the padded border as it is. What the two say
    of the batch as it is belongs to a term of its own.

    Args:
        teacher: Name of the teacher.
        tap: The dense head of both.
        num_steps: Steps at most.
        step_size: The :math:`\eta`, in values of pixels, 0 to 255.
        norm: What a step is measured by, see :func:`mmkd.ops.ascent.ascend`.
        rival: ``'sampled'``, a class other than c, by the teacher's
            probabilities, or ``'second'``, the most probable one.
        overshoot: By how much the rival is to be ahead, in logits, o.
        temperature: Of both sides, where they are compared.
        interval: Iterations from one ascent to the next; between them the
            term says nothing.
        loss_weight: The outer factor.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``samples``; ``watch_turned`` is the share of the objects whose class
        turned.

    Raises:
        ValueError: If a setting is unknown, the head has a single class, or
            the heads do not pair anchor by anchor, while the model is built.

    Reference:
        Heo et al., "Knowledge Distillation with Adversarial Samples Supporting
        Decision Boundary", AAAI 2019, arXiv:1805.05532, known second-hand, for
        one label an image. Sarfraz et al., "Knowledge Distillation Beyond
        Model Compression", arXiv:2007.01922, compare it with eight others.
        What is an object's logit, the norm, and all that concerns detectors
        is ours.
    """

    def __init__(
        self,
        teacher: str,
        tap: str = 'bbox_head',
        num_steps: int = 10,
        step_size: float = 2.0,
        norm: str = 'linf',
        rival: str = 'sampled',
        overshoot: float = 0.1,
        temperature: float = 1.0,
        interval: int = 1,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        who = 'BoundaryTerm'
        check_name(who, 'norm', norm, NORMS)
        check_name(who, 'rival', rival, RIVALS)
        check_positive(
            who,
            num_steps=num_steps,
            step_size=step_size,
            temperature=temperature,
            interval=interval,
        )
        self.teacher, self.path = teacher, tap
        self.num_steps, self.step_size = num_steps, step_size
        self.norm, self.rival, self.overshoot = norm, rival, overshoot
        self.temperature, self.interval = temperature, interval
        self.loss_weight = loss_weight

    def silent(self) -> bool:
        return not self.loss_weight

    def compares_classes(self) -> bool:
        return True

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        who = 'BoundaryTerm'
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        self.tap(student, self.path)
        teacher.tap(self.path)
        self.pixels = Pixels.of(student, f'Student {type(student).__name__}')
        own, _ = resolve(student, self.path)
        other, _ = resolve(teacher.detector, self.path)
        for head, side in ((own, 'student'), (other, 'teacher')):
            check_decodable(who, head, side)
        check_same_anchors(who, own, other)
        if other.num_classes < 2:
            raise ValueError(
                f'{who} moves objects from one class to another, but the '
                f"teacher's {type(other).__name__} has one class. Take "
                f'BackwardPassTerm, which needs no second.'
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        zero = step.images.new_zeros(())
        if step.dry:
            own = seen(step, step.student, self.path)
            check_class_maps(
                'BoundaryTerm',
                own.maps(SCORES),
                self._clean(step).maps(SCORES),
            )
        if step.dry or step.iteration % self.interval:
            return dict(samples=zero, watch_turned=zero)
        objects = self.objects(step)
        images = self.moved(step, objects)
        other = teacher_shown(step, self.teacher, images, self.path)
        given = objects.logits(other).detach()
        with student_shown(step, images, self.path) as own:
            said = objects.logits(own)
        loss = zero_of(said) + soft_target_loss(
            said,
            given,
            objects.counts[:, None],
            other.activation,
            self.temperature,
        )
        turned = objects.counts * (objects.margin(given) >= 0)
        return dict(
            samples=self.loss_weight * loss,
            watch_turned=turned.sum() / objects.counts.sum().clamp(min=1),
        )

    def objects(self, step: Step) -> Objects:
        """The objects of a batch, with their rivals, as the teacher sees it.

        Args:
            step: One that is no dry one.
        """
        clean = self._clean(step)
        scores = [one.detach() for one in clean.logits()]
        site = best_anchors(scores, step.gt)
        objects = Objects(step.gt.image, site)
        count = clean.part.num_classes  # a background comes after them
        logits = objects.logits(clean).detach()
        probs = class_probs(logits, clean.activation)[:, :count]
        objects.current = probs.argmax(1)
        rivals = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
        if self.rival == 'sampled':
            # The largest of logarithms with Gumbel's noise is a draw.
            noise = torch.rand_like(rivals).clamp(min=1e-20)
            rivals = rivals - (-noise.log()).clamp(min=1e-20).log()
        own = objects.current[:, None]
        objects.other = rivals.scatter(1, own, -torch.inf).argmax(1)
        objects.counts = (objects.current == step.gt.labels).to(probs)
        return objects

    def moved(self, step: Step, objects: Objects) -> Tensor:
        """The batch, its objects moved to their rivals, without gradient.

        Args:
            step: One that is no dry one.
            objects: Those of the batch.
        """

        def lead(change: Tensor) -> Tensor:
            images = changed(step.images, change, self.pixels)
            shown = teacher_shown(step, self.teacher, images, self.path)
            margin = objects.margin(objects.logits(shown)) - self.overshoot
            pushed = objects.counts * (margin.detach() < 0)
            # Depends on every image, those without an object too.
            start = (0.0 * change).flatten(1).sum(1)
            return start.index_add(0, objects.image, pushed * margin)

        change = ascend(
            lead,
            *room(step, self.pixels),
            self.num_steps,
            self.step_size,
            self.norm,
            ceiling=0.0,
        )
        return changed(step.images, change, self.pixels)

    def _clean(self, step: Step) -> Seen:
        return seen(step, step.teacher(self.teacher), self.path)


class Objects:
    """Where the objects of a batch are read off a head, and what they are.

    Attributes:
        image: Index of the image of each, (M,).
        site: Index of its anchor, by level, anchor, row and column, (M,).
        current: The class that the teacher gives it, (M,).
        other: The rival, (M,).
        counts: 1 for those that count, (M,).
    """

    current: Tensor
    other: Tensor
    counts: Tensor

    def __init__(self, image: Tensor, site: Tensor) -> None:
        self.image, self.site = image, site

    def logits(self, side: Seen) -> Tensor:
        """Class scores of each object, (M, C)."""
        rows = torch.cat([one.flatten(2) for one in side.logits()], 2)
        return rows[self.image, :, self.site]

    def margin(self, logits: Tensor) -> Tensor:
        """By how much the rival is ahead, (M, C) → (M,)."""
        pair = torch.stack([self.current, self.other], 1)
        current, other = logits.gather(1, pair).unbind(1)
        return other - current


def best_anchors(scores: Sequence[Tensor], gt: GroundTruth) -> Tensor:
    """The anchor that scores the class of each box best, where it lies.

    Args:
        scores: Class scores of each level, (N, C, A, H, W).
        gt: Boxes and labels of the batch.

    Returns:
        Indices among the anchors of an image, by level, anchor, row and
        column, (M,).

    Example:
        >>> gt = GroundTruth.from_boxes(
        ...     [torch.tensor([[0.0, 0, 7, 8], [9, 0, 15, 7]])], shape=(8, 16)
        ... )
        >>> scores = torch.tensor([1.0, 2.0]).view(1, 1, 1, 1, 2)
        >>> best_anchors([scores], gt)
        tensor([0, 1])
    """
    found = []
    for one in scores:
        rows, columns = one.shape[-2:]
        own = one[gt.image, gt.labels]  # M, A, H, W
        inside = (
            _overlap(gt.boxes[:, 1::2], gt.shape[0], rows)[:, :, None]
            & _overlap(gt.boxes[:, 0::2], gt.shape[1], columns)[:, None]
        )
        found.append(own.masked_fill(~inside[:, None], -torch.inf).flatten(1))
    return torch.cat(found, 1).argmax(1)


def _overlap(spans: Tensor, length: int, cells: int) -> Tensor:
    """Which cells of a row some spans overlap, (M, 2) → (M, cells)."""
    edges = torch.arange(cells + 1, device=spans.device) * (length / cells)
    return (spans[:, :1] < edges[1:]) & (spans[:, 1:] > edges[:-1])

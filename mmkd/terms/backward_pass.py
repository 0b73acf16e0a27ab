"""BackwardPass: distil where the student differs most from its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_name, check_positive, check_same_shape
from mmkd.ops.ascent import NORMS, ascend
from mmkd.ops.masks import valid_mask
from mmkd.ops.numeric import as_float
from mmkd.ops.scores import check_class_maps
from mmkd.pixels import Pixels
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.structures.constants import constant
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

#: What is compared: class scores, boxes, both, or maps.
DIVERGENCES = ('cls+box', 'cls', 'box', 'feature')
#: Least sum of an image's weights.
EPS = 1e-6


@MODELS.register_module()
class BackwardPassTerm(Term):
    r"""The gap to the teacher, on the batch and on images that widen it.

    .. math::
        L &= w_0 \, D(x) + w_1 \, D(x_K), \quad
        x_{k+1} = x_k + \eta \frac{\nabla_x D(x_k)}{\|\nabla_x D(x_k)\|} \\
        D(x) &= \frac{\sum_p w_p (\|\sigma(z^S_p) - \sigma(z^T_p)\|^2 +
                \|b^S_p - b^T_p\|_1)}{\sum_p w_p}, \qquad
        w_p = \max_c \sigma(z^T_{pc})

    The gradient runs through both networks to the image, with their weights
    fixed; the student then learns to agree where it was taken. Boxes b are
    decoded and in fractions of the batch's width and height, and p are the
    anchors of an image that are not on its padded border. The batch is the
    mean of its images. No label is read.

    Pixels stay between 0 and 255, and the border as it is. Both networks are
    in eval mode wherever they see an image that was changed, so that no
    statistic of BatchNorm keeps anything of it, and afterwards each part is
    in the mode it was in. The weights of anchors are the teacher's on the
    unchanged image while it changes, and no part of what is climbed.

    Args:
        teacher: Name of the teacher.
        divergence: ``'cls+box'``; ``'cls'`` or ``'box'``, one summand alone;
            or ``'feature'``, the mean square between maps, for pairs whose
            heads cannot be compared anchor by anchor.
        tap: What is compared: a dense head or an RPN of the student, or, for
            ``'feature'``, what returns its maps. The head, or the neck, if
            None.
        teacher_tap: That of the teacher; as the student's if None.
        align: Config of the neck that brings the student's maps to the
            teacher's, for ``'feature'``. It learns with the student, and is
            fixed while images change.
        num_steps: Steps of ascent, K.
        step_size: The :math:`\eta`, in values of pixels, 0 to 255.
        norm: What a step is measured by, see :func:`mmkd.ops.ascent.ascend`:
            ``'linf'``, ``'l2'``, or ``'raw'`` for the formula without norm.
        interval: Iterations from one ascent to the next; between them the
            images as they are count alone.
        clean_weight: Factor of what the batch itself says, ``clean``.
        aux_weight: Factor of what the changed images say, ``aux``.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``clean`` and ``aux``.

    Raises:
        ValueError: If a setting is unknown, or heads or maps do not pair,
            while the model is built.

    Reference:
        Jafari et al., "Improved Knowledge Distillation by Utilizing Backward
        Pass Knowledge in Neural Networks", arXiv:2301.12006, known
        second-hand, for one label an image: there D is the squared distance
        of the outputs. Step, number of steps and interval are not known; all
        that concerns detectors is ours.
    """

    def __init__(
        self,
        teacher: str,
        divergence: str = 'cls+box',
        tap: str | None = None,
        teacher_tap: str | None = None,
        align: Mapping | None = None,
        num_steps: int = 2,
        step_size: float = 2.0,
        norm: str = 'linf',
        interval: int = 1,
        clean_weight: float = 1.0,
        aux_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        who = 'BackwardPassTerm'
        check_name(who, 'divergence', divergence, DIVERGENCES)
        check_name(who, 'norm', norm, NORMS)
        check_positive(
            who, num_steps=num_steps, step_size=step_size, interval=interval
        )
        self.teacher, self.divergence = teacher, divergence
        default = 'neck' if divergence == 'feature' else 'bbox_head'
        self.path = tap or default
        self.teacher_path = teacher_tap or self.path
        if align is not None and divergence != 'feature':
            raise ValueError(
                f'{who} aligns maps, but with divergence={divergence!r} it '
                f'compares what heads predict. Leave align out, or set '
                f"divergence='feature'."
            )
        self.align = None if align is None else build(align, 'align')
        self.num_steps, self.step_size = num_steps, step_size
        self.norm, self.interval = norm, interval
        self.clean_weight, self.aux_weight = clean_weight, aux_weight

    def silent(self) -> bool:
        return not (self.clean_weight or self.aux_weight)

    def compares_classes(self) -> bool:
        # Proposals are objects of whatever class.
        rpn = self.path.split('.')[0] == 'rpn_head'
        return 'cls' in self.divergence and not rpn

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        self.tap(student, self.path)
        teacher.tap(self.teacher_path)
        self.pixels = Pixels.of(student, f'Student {type(student).__name__}')
        if self.divergence == 'feature':
            return
        own, _ = resolve(student, self.path)
        other, _ = resolve(teacher.detector, self.teacher_path)
        for head, side in ((own, 'student'), (other, 'teacher')):
            check_decodable('BackwardPassTerm', head, side)
        check_same_anchors('BackwardPassTerm', own, other)

    def forward(self, step: Step) -> dict[str, Tensor]:
        zero = step.images.new_zeros(()) + self.touch()
        parts = dict(clean=zero, aux=zero)
        if self.clean_weight or step.dry:
            gap = self._gap(
                step,
                self._own(step),
                self._clean(step),
            )
            parts['clean'] = self.clean_weight * gap.mean()
        due = step.iteration % self.interval == 0
        if self.aux_weight and due and not step.dry:
            images = self.widened(step)
            with self._student_shown(step, images) as own:
                gap = self._gap(step, own, self._shown(step, images))
            parts['aux'] = self.aux_weight * gap.mean()
        return parts

    def widened(self, step: Step) -> Tensor:
        """The batch, moved up the gap, (N, 3, H, W), without gradient.

        Args:
            step: One that is no dry one.
        """
        weights = self._weights(step, self._clean(step))

        def gap(change: Tensor) -> Tensor:
            images = changed(step.images, change, self.pixels)
            other = self._shown(step, images)
            with self._student_shown(step, images) as own:
                return self._gap(step, own, other, weights, climb=True)

        change = ascend(
            gap,
            *room(step, self.pixels),
            self.num_steps,
            self.step_size,
            self.norm,
        )
        return changed(step.images, change, self.pixels)

    def _own(self, step: Step) -> Seen:
        """The student's side of the batch as it is."""
        return seen(step, step.student, self.path)

    def _student_shown(
        self, step: Step, images: Tensor
    ) -> AbstractContextManager[Seen]:
        return student_shown(step, images, self.path)

    def _clean(self, step: Step) -> Seen:
        """The teacher's side of the batch as it is."""
        return seen(step, step.teacher(self.teacher), self.teacher_path)

    def _shown(self, step: Step, images: Tensor) -> Seen:
        return teacher_shown(step, self.teacher, images, self.teacher_path)

    def _gap(
        self,
        step: Step,
        own: Seen,
        other: Seen,
        weights: list[Tensor] | None = None,
        climb: bool = False,
    ) -> Tensor:
        """D of each image, (N,).

        Args:
            step: The step.
            own: What the student says.
            other: What the teacher says of the same images.
            weights: Weights of anchors; as the teacher says if None.
            climb: Keep the graph through the teacher.
        """
        if weights is None:
            weights = self._weights(step, other)
        measure = (
            self._feature_errors
            if self.divergence == 'feature'
            else self._head_errors
        )
        errors = measure(own, other, climb)
        total = count = 0.0
        for weight, error in zip(weights, errors):
            total = total + (weight * error).flatten(1).sum(1)
            count = count + weight.flatten(1).sum(1)
        return total / count.clamp(min=EPS)

    def _weights(self, step: Step, other: Seen) -> list[Tensor]:
        """How much each anchor, or cell, counts, (N, A or 1, H, W) each."""
        if self.divergence == 'feature':
            best = [torch.ones_like(one[:, :1]) for one in other.maps()]
        else:
            best = [one.amax(1) for one in other.probs()]
        return [
            as_float(one.detach())
            * valid_mask(step.gt, tuple(one.shape[-2:]), keep_ignored=True)
            for one in best
        ]

    def _head_errors(
        self, own: Seen, other: Seen, climb: bool
    ) -> list[Tensor]:
        check_class_maps(
            'BackwardPassTerm', own.maps(SCORES), other.maps(SCORES)
        )
        errors: list[Tensor | float] = [0.0] * len(own.maps(SCORES))
        if 'cls' in self.divergence:
            for level, (one, like) in enumerate(
                zip(own.probs(), other.probs())
            ):
                error = one - _target(like, climb)
                errors[level] = errors[level] + error.square().sum(1)
        if 'box' in self.divergence:
            height, width = own.size
            pairs = zip(own.boxes(), other.boxes())
            for level, (one, like) in enumerate(pairs):
                sides = constant([width, height, width, height], one)
                error = (one - _target(like, climb)) / sides[:, None, None]
                errors[level] = errors[level] + error.abs().sum(2)
        return errors

    def _feature_errors(
        self, own: Seen, other: Seen, climb: bool
    ) -> list[Tensor]:
        student, teacher = own.maps(), other.maps()
        if len(student) != len(teacher):
            raise ValueError(
                f'BackwardPassTerm compares {self.path!r} of the student, '
                f'{len(student)} maps, with {self.teacher_path!r} of teacher '
                f'{self.teacher!r}, {len(teacher)}. Choose taps of as many '
                f'levels with tap= and teacher_tap=.'
            )
        if self.align is not None:
            student = self.align(student, teacher)
        errors = []
        for one, like in zip(student, teacher):
            check_same_shape('BackwardPassTerm', one, like)
            error = as_float(one) - as_float(_target(like, climb))
            errors.append(error.square().mean(1, keepdim=True))
        return errors


def _target(value: Tensor, climb: bool) -> Tensor:
    """The teacher's side: it is climbed through, and otherwise fixed."""
    return value if climb else value.detach()

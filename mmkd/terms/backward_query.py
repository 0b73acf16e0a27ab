"""BackwardPass for queries: where two decoders differ most in answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.ops.ascent import evaluating
from mmkd.ops.numeric import as_float
from mmkd.pixels import Pixels
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.backward_pass import EPS, BackwardPassTerm
from mmkd.terms.queries import (
    DECODER,
    HEAD,
    Answers,
    answers,
    bind_queries,
    book_kept,
)
from mmkd.terms.query_pairs import matched
from mmkd.terms.shared_queries import confidence

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: What is compared of two answers.
DIVERGENCES = ('cls+box', 'cls', 'box')


@MODELS.register_module()
class BackwardQueryTerm(BackwardPassTerm):
    r"""The gap between answers, on the batch and on images that widen it.

    As :class:`mmkd.terms.backward_pass.BackwardPassTerm`, with the distance

    .. math::
        D(x) = \frac{\sum_q w_q (\|p^S_q - p^T_q\|^2 +
               \|b^S_q - b^T_q\|_1)}{\sum_q w_q}, \qquad
        w_q = \max_c p^T_{qc}

    over pairs of queries that are matched by what they answer in the last
    layers, see :func:`mmkd.terms.query_pairs.matched_queries`: anew whenever
    an image has moved, for what a query looks for may move with it. p are
    the chances of the classes without background, b boxes in fractions of the
    image. Matching and weights are no part of what is climbed.

    Args:
        teacher: Name of the teacher.
        divergence: ``'cls+box'``, or one summand alone.
        num_steps, step_size, norm, interval, clean_weight, aux_weight: See
            :class:`~mmkd.terms.backward_pass.BackwardPassTerm`.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``clean`` and ``aux``.

    Raises:
        ValueError: If a setting is unknown, or a detector has no queries,
            while the model is built.

    Reference:
        Jafari et al., "Improved Knowledge Distillation by Utilizing Backward
        Pass Knowledge in Neural Networks", arXiv:2301.12006, as the term for
        dense heads has it; what is said of queries is ours.
    """

    def __init__(
        self,
        teacher: str,
        divergence: str = 'cls+box',
        num_steps: int = 2,
        step_size: float = 2.0,
        norm: str = 'linf',
        interval: int = 1,
        clean_weight: float = 1.0,
        aux_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        check_name('BackwardQueryTerm', 'divergence', divergence, DIVERGENCES)
        super().__init__(
            teacher,
            divergence,
            num_steps=num_steps,
            step_size=step_size,
            norm=norm,
            interval=interval,
            clean_weight=clean_weight,
            aux_weight=aux_weight,
            schedule=schedule,
        )

    def compares_classes(self) -> bool:
        return True  # in the matching if nowhere else

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        bind_queries(self, student, teachers, self.teacher)
        self.pixels = Pixels.of(student, f'Student {type(student).__name__}')

    def _own(self, step: Step) -> Answers:
        return answers(step.student)

    @contextmanager
    def _student_shown(self, step: Step, images: Tensor) -> Iterator[Answers]:
        detector = step.student.detector
        with evaluating(detector), book_kept(detector):
            with recording(detector, (DECODER, HEAD), stop=True) as record:
                run_detector(detector, images, step.samples)
            yield answers(record)

    def _clean(self, step: Step) -> Answers:
        return answers(step.teacher(self.teacher))

    def _shown(self, step: Step, images: Tensor) -> Answers:
        return answers(step.show(self.teacher, images, grad=True))

    def _weights(self, step: Step, other: Answers) -> None:
        """Each pair counts as the teacher says wherever it is found."""

    def _gap(
        self,
        step: Step,
        own: Answers,
        other: Answers,
        weights: None = None,
        climb: bool = False,
    ) -> Tensor:
        pairs = matched(own, other if climb else other.detach())
        one, like = pairs.student, pairs.teacher
        weight = confidence(like)
        error = 0.0
        if 'cls' in self.divergence:
            apart = one.chances[-1] - like.chances[-1]
            error = error + apart.square().sum(-1)
        if 'box' in self.divergence:
            apart = as_float(one.boxes[-1]) - as_float(like.boxes[-1])
            error = error + apart.abs().sum(-1)
        return (weight * error).sum(1) / weight.sum(1).clamp(min=EPS)

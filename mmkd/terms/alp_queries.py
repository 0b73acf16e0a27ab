"""ALP for detectors of queries: each attends to all layers of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.losses.alp import BUCKETS, SCALES, check_choice, layer_errors
from mmkd.losses.query import weighted_mean
from mmkd.ops.matching import pick_queries
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.structures.constants import constant
from mmkd.terms.queries import answers, bind_queries, question
from mmkd.terms.query_matching import (
    Objects,
    inside_tokens,
    of_layers,
    queries_of,
    same_form,
)
from mmkd.terms.shared_queries import ask_alike, confidence
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

PARTS = ('decoder', 'encoder')
PAIRS = ('questions', 'objects')


@MODELS.register_module()
class ALPQueryTerm(Term):
    r"""Layers of a transformer imitate mixtures of all of the teacher's.

    .. math:: \frac{w}{m} \sum_j \frac{\sum_q c_q \, mean_d (S_{jq}
        - \sum_k e_{jqk} T_{kq})^2}{\sum_q c_q}, \quad
        e_{jq} = softmax_k(S_{jq} \cdot T_{kq} / \sqrt{d})

    S_j are the states of queries in layer j of the student's decoder, T_k
    those in layer k of the teacher's. Each query attends to the layers by
    itself. Which query is which, ``pair`` says:

    - ``'questions'``: the student's decoder is asked the teacher's queries, in
      a pass of their own. They count by the chance c of a class that the
      teacher's last layer gives them.
    - ``'objects'``: a query is that of an object, on either side the one that
      the last layer's answers are matched by; c is 1 where both sides have
      one. No second pass, and decoders of any two kinds.

    In the encoder there is one vector an image, the mean of the tokens that
    layers return, without the padded border.

    Args:
        teacher: Name of the teacher.
        parts: ``'decoder'``, ``'encoder'`` or both.
        pair: ``'questions'`` or ``'objects'``.
        channels: Width of the states of student and teacher, between which a
            linear layer of each part learns along: it enters weights and
            errors. None if they are of one width.
        student_layers, teacher_layers: Which layers, counted from 0; all if
            None.
        bucket: Which of the teacher's a layer may look at, see
            :func:`mmkd.losses.alp.bucket_of`.
        scale: ``'sqrt_d'`` or None.
        loss_weight: Outer factor w.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``decoder`` and ``encoder``, as far as they are among the parts.

    Raises:
        ValueError: If a side has no queries or no such layer, widths do not
            fit, layers of a decoder go on with other queries, or the decoder
            cannot be asked the teacher's, while the model is built.

    Not kept:
        equality: A layer is compared with a mixture, not with itself.

    Reference:
        Passban et al., "ALP-KD: Attention-Based Layer Projection for
        Knowledge Distillation", AAAI 2021, arXiv:2012.14022. Read: as
        :class:`mmkd.losses.alp.ALPLoss`. Ours: queries in place of the
        summary token, their pairing, and how much each counts.
    """

    def __init__(
        self,
        teacher: str,
        parts: Sequence[str] = ('decoder',),
        pair: str = 'questions',
        channels: tuple[int, int] | None = None,
        student_layers: Sequence[int] | None = None,
        teacher_layers: Sequence[int] | None = None,
        bucket: str | None = None,
        scale: str | None = 'sqrt_d',
        loss_weight: float = 100.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        who = 'ALPQueryTerm'
        self.teacher, self.pair = teacher, pair
        self.parts = (parts,) if isinstance(parts, str) else tuple(parts)
        for part in self.parts:
            check_name(who, 'part', part, PARTS)
        check_name(who, 'pair', pair, PAIRS)
        check_choice(who, 'bucket', bucket, BUCKETS)
        check_choice(who, 'scale', scale, SCALES)
        self.channels = None if channels is None else tuple(channels)
        self.layers = student_layers, teacher_layers
        self.bucket, self.scale = bucket, scale
        self.loss_weight = loss_weight
        self.projections = nn.ModuleDict(
            {part: nn.Linear(*self.channels) for part in self.parts}
            if self.channels
            else {}
        )

    def silent(self) -> bool:
        return self.loss_weight == 0

    def compares_classes(self) -> bool:
        return self.pair == 'objects' and 'decoder' in self.parts

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        teacher = bind_queries(self, student, teachers, self.teacher)
        detectors = student, teacher.detector
        for part in self.parts:
            _check_widths(part, detectors, self.channels)
            for detector, side, layers in zip(
                detectors, ('student', 'teacher'), self.layers
            ):
                _check_layers(part, detector, side, layers)
        if 'encoder' in self.parts:
            for path in _encoder_paths(student, self.layers[0]):
                self.tap(student, path)
            for path in _encoder_paths(teacher.detector, self.layers[1]):
                teacher.tap(path)

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        return {
            part: self._error(part, *getattr(self, f'_{part}')(step, shown))
            for part in self.parts
        }

    def _decoder(
        self, step: Step, shown: Outputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of both sides, (layers, N, Q, d), and weights, (N, Q)."""
        known = answers(shown).detach()
        if self.pair == 'questions':
            _check_form(step.student, shown)
            said = ask_alike(step.student, question(shown))
            states, weight = [said.states, known.states], confidence(known)
        else:
            objects = Objects.of(step.gt)
            states, found = [], []
            for one in (answers(step.student), known):
                query, there = queries_of(of_layers(one, [-1]), objects)
                states.append(pick_queries(one.states, query[0]))
                found.append(there[0])
            weight = found[0] & found[1]
        own, other = (
            one
            if layers is None
            else one[constant(list(layers), one, torch.long)]
            for one, layers in zip(states, self.layers)
        )
        return own, other, weight

    def _encoder(
        self, step: Step, shown: Outputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean tokens of both sides, (layers, N, d), and weights, (N,)."""
        own, other = (
            _mean_tokens(side, layers)
            for side, layers in zip((step.student, shown), self.layers)
        )
        return own, other, own.new_ones(own.shape[1])

    def _error(
        self, part: str, own: Tensor, other: Tensor, weight: Tensor
    ) -> Tensor:
        own = as_float(own)
        with full_precision(own):
            if self.channels:
                own = self.projections[part](own)
            errors = layer_errors(own, other.detach(), self.bucket, self.scale)
        return self.loss_weight * weighted_mean(errors, weight)


def _encoder_paths(
    detector: nn.Module, layers: Sequence[int] | None
) -> list[str]:
    if layers is None:
        layers = range(len(detector.encoder.layers))
    return [f'encoder.layers.{layer}' for layer in layers]


def _mean_tokens(outputs: Outputs, layers: Sequence[int] | None) -> Tensor:
    """Of each layer and image, the border left out, (L, N, d)."""
    inside = inside_tokens(outputs)[..., None]  # N, S, 1
    return torch.stack(
        [
            (as_float(outputs.at(path)) * inside).sum(1) / inside.sum(1)
            for path in _encoder_paths(outputs.detector, layers)
        ]
    )


def _check_form(student: Outputs, shown: Outputs) -> None:
    if not same_form(student, shown):
        raise ValueError(
            f"ALPQueryTerm asks the student's decoder, of "
            f"{type(student.detector).__name__}, the teacher's queries, but "
            f'that of {type(shown.detector).__name__} takes them in another '
            f"form. Set pair='objects' for this pair."
        )


def _check_widths(
    part: str,
    detectors: tuple[nn.Module, nn.Module],
    channels: tuple[int, ...] | None,
) -> None:
    found = tuple(one.get_submodule(part).embed_dims for one in detectors)
    fits = found[0] == found[1] if channels is None else found == channels
    if not fits:
        raise ValueError(
            f'ALPQueryTerm mixes vectors of the width of the student, made '
            f"from channels={channels}, but the student's {part} has "
            f"{found[0]} and the teacher's {found[1]}. Set channels={found}."
        )


def _check_layers(
    part: str, detector: nn.Module, side: str, layers: Sequence[int] | None
) -> None:
    name = type(detector).__name__
    if part == 'decoder' and hasattr(detector, 'cache_dict'):
        raise ValueError(
            f'ALPQueryTerm follows queries through layers, but each layer of '
            f"the {side}'s decoder, {name}, goes on with others. Set "
            f"parts=('encoder',)."
        )
    count = len(detector.get_submodule(part).layers)
    if layers is not None and not all(0 <= one < count for one in layers):
        raise ValueError(
            f'ALPQueryTerm has {side}_layers={tuple(layers)}, but the '
            f"{side}'s {part}, of {name}, has {count}, 0 to {count - 1}. Name "
            f'those that are there, or leave {side}_layers out.'
        )

"""Detectors that ask their image: queries, decoders and what they answer.

Members of the DETR family are told by what they expose, ``pre_decoder``,
``forward_decoder`` and a head of all layers, and not by their names. Query i
of one detector has nothing in common with query i of another; terms of this
family pair them by asking both the same questions (:func:`ask`), by matching
what they answer (:mod:`mmkd.ops.matching`), or through the ground truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.ops.numeric import as_float
from mmkd.structures import Outputs
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: What turns queries into states, and what reads classes and boxes off them.
DECODER, HEAD = 'forward_decoder', 'bbox_head'
#: What makes the memory that the decoder looks at.
ENCODER = 'forward_encoder'
#: What makes up a question: content, position, and where to look first.
QUESTION = ('query', 'query_pos', 'reference_points')


@dataclass(frozen=True)
class Answers:
    """What each layer of a decoder says of each query.

    Attributes:
        logits: (L, N, Q, C); the last of the classes is the background where
            ``softmax``.
        boxes: Centre x, y, width, height, of the image 1, (L, N, Q, 4).
        states: (L, N, Q, D).
        softmax: Whether the classes are those of one distribution.
    """

    logits: Tensor
    boxes: Tensor
    states: Tensor
    softmax: bool

    @property
    def chances(self) -> Tensor:
        """Of each class, without the background, (L, N, Q, K)."""
        logits = as_float(self.logits)
        return (
            logits.softmax(-1)[..., :-1]
            if self.softmax
            else (logits.sigmoid())
        )

    def of(self, queries: slice) -> Answers:
        """Those of some of the queries."""
        return replace(
            self,
            logits=self.logits[:, :, queries],
            boxes=self.boxes[:, :, queries],
            states=self.states[:, :, queries],
        )

    def detach(self) -> Answers:
        return replace(
            self,
            logits=self.logits.detach(),
            boxes=self.boxes.detach(),
            states=self.states.detach(),
        )


def bind_queries(
    term: Term,
    student: nn.Module,
    teachers: Mapping[str, Teacher],
    name: str,
) -> Teacher:
    """Note the decoders and heads of both sides.

    Args:
        term: Which asks.
        student: The student.
        teachers: All there are.
        name: Of the teacher wanted.

    Raises:
        ValueError: If one side is not asked by queries, or the teacher keeps
            what it said, but not what its decoder was given.
    """
    check_name('The distiller', 'teacher', name, teachers)
    teacher = teachers[name]
    who = type(term).__name__
    check_asks(who, student, 'student')
    check_asks(who, teacher.detector, 'teacher')
    if teacher.memory is not None:
        raise ValueError(
            f'{who} shows questions to the decoder of teacher {name!r}, whose '
            f'cache keeps outputs alone. Leave its cache= out.'
        )
    term.teacher_names = [name]
    for path in (DECODER, HEAD):
        term.tap(student, path)
        teacher.tap(path)
    return teacher


def asks(detector: nn.Module) -> bool:
    """Whether a detector finds objects by queries."""
    return (
        callable(getattr(detector, DECODER, None))
        and callable(getattr(detector, 'pre_decoder', None))
        and isinstance(getattr(detector, HEAD, None), nn.Module)
        and hasattr(detector, 'num_queries')
    )


def check_asks(who: str, detector: nn.Module, side: str) -> None:
    """A detector must find objects by queries.

    Raises:
        ValueError: If it does not.
    """
    if not asks(detector):
        raise ValueError(
            f'{who} compares the queries of two detectors, but the {side}, '
            f'{type(detector).__name__}, has none: a transformer with '
            f'pre_decoder, {DECODER} and {HEAD} was expected, as DETR, '
            f'Deformable DETR and DINO have. Choose a term on features or on '
            f'predicted boxes for this pair.'
        )


def answers(outputs: Outputs) -> Answers:
    """What a detector said of its own queries.

    Queries that only a training has (denoising, auxiliary) are left out.
    """
    logits, boxes = outputs.at(HEAD)[:2]
    states = outputs.at(DECODER)['hidden_states']
    detector = outputs.detector
    found = Answers(logits, boxes, states, has_softmax(detector))
    return found.of(own_queries(detector, logits.shape[2]))


def question(outputs: Outputs) -> dict[str, Tensor]:
    """A detector's own queries, as its decoder was given them.

    Returns:
        Those of :data:`QUESTION` that it has, (N, Q, …) each.
    """
    _, given = outputs.inputs(DECODER)
    own = own_queries(outputs.detector, given['query'].shape[1])
    return {
        key: given[key][:, own]
        for key in QUESTION
        if given.get(key) is not None
    }


def ask(outputs: Outputs, asked: Mapping[str, Tensor]) -> Answers:
    """Send questions through the decoder and the head once more.

    Backbone and encoder are not run again: the decoder looks at the memory
    that it was given in this step.

    Args:
        outputs: Of the detector that is asked.
        asked: In the form of :func:`question`.

    Raises:
        ValueError: If the detector is asked in another form.
    """
    detector = outputs.detector
    _, given = outputs.inputs(DECODER)
    own = question(outputs)
    _check_form(detector, own, asked)
    inputs = {**given, **asked}
    if 'dn_mask' in inputs:
        inputs['dn_mask'] = None
    with _no_queries_of_training(detector, asked['query'].shape[1]):
        decoded = getattr(detector, DECODER)(**inputs)
        logits, boxes = getattr(detector, HEAD)(**decoded)[:2]
    return Answers(
        logits, boxes, decoded['hidden_states'], has_softmax(detector)
    )


def drawn(outputs: Outputs, count: int) -> dict[str, Tensor]:
    """Questions at random, in the form that a detector takes.

    Positions are uniform over the image; what a query holds besides is normal
    with the mean and the deviation of the detector's own queries, channel by
    channel, so that content that is zero everywhere stays zero.

    Args:
        outputs: Of the detector whose form they have.
        count: Questions an image.
    """
    detector, own = outputs.detector, question(outputs)
    asked = {key: _like(value, count) for key, value in own.items()}
    places = own.get('reference_points')
    if places is None:
        if _is_box(own['query_pos'], own['query']):
            boxes = torch.rand_like(asked['query_pos'])
            asked['query_pos'] = _logit(boxes)
    elif places.shape[-1] == 2:
        point = detector.reference_points_fc(asked['query_pos'])
        asked['reference_points'] = point.sigmoid()
    else:
        boxes = torch.rand_like(asked['reference_points'])
        asked['reference_points'] = boxes
        if 'query_pos' in own:
            embedded = detector.get_proposal_pos_embed(_logit(boxes))
            both = detector.pos_trans_norm(detector.pos_trans_fc(embedded))
            asked['query_pos'], asked['query'] = both.chunk(2, -1)
    return {key: value.detach() for key, value in asked.items()}


def _like(value: Tensor, count: int) -> Tensor:
    std, mean = torch.std_mean(
        as_float(value), dim=(0, 1), correction=0, keepdim=True
    )
    noise = torch.randn(
        len(value), count, value.shape[-1], device=value.device
    )
    return (mean + std * noise).to(value.dtype)


def _logit(chance: Tensor) -> Tensor:
    return chance.clamp(1e-3, 1 - 1e-3).logit()


def _is_box(position: Tensor, content: Tensor) -> bool:
    return position.shape[-1] in (2, 4) and content.shape[-1] > 4


def _check_form(
    detector: nn.Module, own: Mapping[str, Tensor], asked: Mapping
) -> None:
    forms = [
        {key: value.shape[-1] for key, value in one.items()}
        for one in (own, asked)
    ]
    if forms[0] != forms[1]:
        raise ValueError(
            f'{type(detector).__name__} takes queries of the form '
            f'{_form(forms[0])}, but is asked in that of its teacher, '
            f'{_form(forms[1])}. Shared queries need decoders of one kind and '
            f'width; choose a term that matches answers for this pair, for '
            f'instance mmkd.DETRDistillTerm.'
        )


def _form(sizes: Mapping[str, int]) -> str:
    return ', '.join(f'{key} of {size}' for key, size in sizes.items())


def has_softmax(detector: nn.Module) -> bool:
    """Whether classes and background are one distribution."""
    return not getattr(detector, HEAD).loss_cls.use_sigmoid


def own_queries(detector: nn.Module, total: int) -> slice:
    """Where a detector's own queries are among all of a pass."""
    info = getattr(detector, 'cache_dict', {}).get('dis_query_info')
    if info is not None:  # DDQ: denoising ones before, dense ones after
        return slice(info[0], sum(info))
    patterns = max(getattr(detector, 'num_patterns', 0), 1)
    return slice(total - detector.num_queries * patterns, total)


@contextmanager
def book_kept(detector: nn.Module) -> Iterator[None]:
    """Let DDQ find the book of its queries as it was, whatever it is shown."""
    book = getattr(detector, 'cache_dict', None)
    kept = dict(book or {})
    try:
        yield
    finally:
        if book is not None:
            book.clear()
            book.update(kept)


@contextmanager
def _no_queries_of_training(detector: nn.Module, count: int) -> Iterator[None]:
    """Let DDQ, which keeps book of its queries, see only those asked."""
    book = getattr(detector, 'cache_dict', None)
    if book is None:
        yield
        return
    parts = [detector.decoder, getattr(detector, HEAD)]
    modes = [(one, one.training) for part in parts for one in part.modules()]
    try:
        with book_kept(detector):
            book['dis_query_info'] = [0, count]
            for part in parts:
                part.eval()
            yield
    finally:
        for one, mode in modes:
            one.training = mode

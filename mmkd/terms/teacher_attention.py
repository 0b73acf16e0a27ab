"""HPM-KD's attention: several teachers, fused into one image by image."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.arguments import check_arguments
from mmkd.build import build
from mmkd.checks import (
    check_channels,
    check_name,
    check_once,
    check_positive,
    check_same_shape,
)
from mmkd.ops.masks import equal_weight, valid_mask
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.balanced import detection_loss
from mmkd.terms.decoding import check_same_anchors
from mmkd.terms.seen import dense_head, scores_of
from mmkd.terms.temperature import Temperature
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

_WHO = 'TeacherAttentionTerm'


class TeacherAttention(nn.Module):
    r"""How much each teacher counts for an image.

    .. math:: a(x) = softmax(MLP_2(MLP_1([x; t_1; \dots; t_M])))

    Args:
        channels: Numbers that describe an image, x.
        teachers: M.
        hidden: Width of the layer between, and of each learned embedding t.

    Example:
        >>> attention = TeacherAttention(8, teachers=3)
        >>> log_a = attention(torch.randn(2, 8))
        >>> log_a.shape, log_a.exp().sum(1).allclose(torch.ones(2))
        (torch.Size([2, 3]), True)
    """

    def __init__(
        self, channels: int, teachers: int, hidden: int = 128
    ) -> None:
        super().__init__()
        self.channels = channels
        self.embeddings = nn.Parameter(torch.randn(teachers, hidden))
        self.first = nn.Linear(channels + teachers * hidden, hidden)
        self.last = nn.Linear(hidden, teachers)

    def forward(self, described: Tensor) -> Tensor:
        """Logarithms of the weights, (N, C) → (N, M)."""
        known = self.embeddings.flatten().expand(len(described), -1)
        given = torch.cat([described, known], 1)
        return self.last(F.relu(self.first(given))).log_softmax(1)


def pooled(maps: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Mean over the cells that count, then over levels, (N, C), float32.

    Args:
        maps: Of each level, (N, C, H, W).
        counts: 1 where a cell counts, (N, 1, H, W).

    Example:
        >>> maps = [torch.ones(1, 2, 4, 4), 3 * torch.ones(1, 2, 2, 2)]
        >>> counts = [torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)]
        >>> pooled(maps, counts)
        tensor([[2., 2.]])
    """
    means = [
        (as_float(one) * count).sum((2, 3)) / count.sum((2, 3)).clamp(min=1)
        for one, count in zip(maps, counts)
    ]
    return torch.stack(means).mean(0)


def fused(said: Sequence[Sequence[Tensor]], weights: Tensor) -> list[Tensor]:
    r"""The weighted sum of what teachers say, :math:`\sum_m a_m f_m`.

    Args:
        said: Maps of each level, (N, C, H, W), of each of M teachers.
        weights: (N, M).

    Example:
        >>> one, other = (torch.full((1, 1, 1, 1), x) for x in (1.0, 5.0))
        >>> (found,) = fused([[one], [other]], torch.tensor([[0.25, 0.75]]))
        >>> found.item()
        4.0
    """
    return [
        sum(
            weights[:, index, None, None, None] * as_float(one)
            for index, one in enumerate(level)
        )
        for level in zip(*said)
    ]


def collapse(log_weights: Tensor) -> Tensor:
    r"""How far weights are from equal, :math:`\log M - \overline{H(a)}`.

    Its gradient is that of the negative entropy, and it is 0 at equal
    weights, :math:`\log M` where one teacher has all.

    Args:
        log_weights: (N, M).

    Example:
        >>> collapse(torch.tensor([[0.5, 0.5]]).log()).item()
        0.0
    """
    # Each summand is >= 0, so that none is lost to the others' rounding.
    log_ratio = log_weights + math.log(log_weights.shape[1])
    ratio = log_ratio.exp()
    return (ratio * log_ratio - (ratio - 1)).mean()


@MODELS.register_module()
class TeacherAttentionTerm(Term):
    r"""Several teachers become one, by weights that are learned for an image.

    .. math::

        L = \sum_k loss_k\Big(s_k, \sum_m a_m(x) \, t_{mk}\Big)
            - \beta \, \overline{H(a)}

    t are outputs of the teachers' dense heads before any softmax or decoding,
    so class logits and logits of edge distributions, and s those of the
    student. x is the mean of the student's maps over the cells of the image,
    and a a net of two layers that also knows one learned vector for each
    teacher, see :class:`TeacherAttention`. It is trained jointly with the
    student by this very loss. That favours the teacher who is easiest to
    follow; the entropy H stands against it.

    A loss that takes weights of anchors gets the fused target's largest class
    probability, without gradient.

    Args:
        teachers: Names of two teachers or more, whose strides, anchors and
            classes are the student's.
        channels: Channels of the maps at ``features``.
        losses: By name, ``dict(output=…, loss=…)``: which output of the head
            is compared, 0 for class scores, 1 for boxes, and the config of a
            loss that sees all levels. ``mmkd.SoftTargetLoss`` on class scores
            if None.
        attn: Settings of the attention: ``hidden``, its width, 128;
            ``entropy_weight``, the factor :math:`\beta`, 0.1.
        temperature: Settings of a
            :class:`~mmkd.terms.temperature.Temperature` that all losses with
            a temperature then follow; they keep their own if None.
        features: Tap of the maps.
        head: Dense head of student and teachers.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        One part a loss, and ``entropy``, :math:`\beta (\log M - H)`, which is
        0 at equal weights. ``watch_attention_<teacher>`` is a teacher's mean
        weight, ``watch_temperature`` the temperature.

    Raises:
        ValueError: If there is one teacher, heads or maps do not fit, or no
            loss has a temperature to follow, while the model is built.

    Reference:
        Haase and da Silva, "HPM-KD: Hierarchical Progressive Multi-Teacher
        Knowledge Distillation", arXiv:2512.09886, known second-hand, for
        classifiers. What describes an image, that heads are fused output by
        output before softmax, weights of anchors, the entropy's factor and
        its constant are ours. The paper's chain of students is
        ``tools/chain.py``.
    """

    #: All teachers count almost alike at first.
    from_nothing: ClassVar[tuple[str, ...]] = ('entropy',)

    def __init__(
        self,
        teachers: Sequence[str],
        channels: int,
        losses: Mapping[str, Mapping] | None = None,
        attn: Mapping[str, Any] | None = None,
        temperature: Mapping[str, Any] | None = None,
        features: str = 'neck',
        head: str = 'bbox_head',
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        self.teachers = (
            (teachers,) if isinstance(teachers, str) else tuple(teachers)
        )
        if len(set(self.teachers)) < 2:
            raise ValueError(
                f'{_WHO} weighs two teachers or more against each other, got '
                f'{self.teachers}. Name more of those of the distiller, or '
                f'take mmkd.FeatureTerm for a single one.'
            )
        check_once(_WHO, 'teachers', self.teachers)
        settings = {'hidden': 128, 'entropy_weight': 0.1}
        for name in attn or {}:
            check_name(_WHO, 'setting in attn', name, settings)
        settings.update(attn or {})
        check_positive(_WHO, channels=channels, hidden=settings['hidden'])
        if settings['entropy_weight'] < 0:
            raise ValueError(
                f'{_WHO} needs entropy_weight >= 0, got '
                f'{settings["entropy_weight"]}: below, weights collapse.'
            )
        self.entropy_weight = settings['entropy_weight']
        self.attention = TeacherAttention(
            channels, len(self.teachers), settings['hidden']
        )
        if losses is None:
            losses = dict(
                scores=dict(output=0, loss=dict(type='mmkd.SoftTargetLoss'))
            )
        self.outputs, self.losses = {}, nn.ModuleDict()
        for name, one in losses.items():
            if not isinstance(one, Mapping) or set(one) != {'output', 'loss'}:
                raise ValueError(
                    f'{_WHO} takes losses={{{name!r}: dict(output=…, '
                    f'loss=dict(type=…))}}, got {one!r}. Give both.'
                )
            if type(one['output']) is not int or one['output'] < 0:
                raise ValueError(
                    f'{_WHO} takes output of {name!r} as the position of one '
                    f"of a head's outputs, 0 for the first; got "
                    f'output={one["output"]!r}. Write for instance output=0.'
                )
            self.outputs[name] = one['output']
            self.losses[name] = build(one['loss'], f'the loss {name!r}')
            if getattr(self.losses[name], 'scope', 'level') != 'levels':
                raise ValueError(
                    f'{_WHO} compares all levels at once, which '
                    f'{one["loss"]["type"]} does not. Choose a loss on '
                    f'outputs of heads, such as mmkd.SoftTargetLoss.'
                )
        self.temperature = None
        if temperature is not None:
            check_arguments(f'{_WHO}: temperature', Temperature, temperature)
            self.temperature = Temperature(**temperature)
        if self.temperature is not None and not self._warm():
            raise ValueError(
                f'{_WHO} has a temperature to follow, but none of its losses '
                f'has one. Choose a loss that does, such as '
                f'mmkd.SoftTargetLoss, or leave temperature out.'
            )
        self.features, self.head = features, head
        self.anchor_weighted = {
            name: 'weight' in inspect.signature(one.forward).parameters
            for name, one in self.losses.items()
        }

    @property
    def needs_detection(self) -> bool:
        """Whether no phase without the detection loss can have it."""
        return self.temperature is not None and self.temperature.listens

    def _warm(self) -> list[nn.Module]:
        """The losses that have a temperature."""
        return [
            one for one in self.losses.values() if hasattr(one, 'temperature')
        ]

    def silent(self) -> bool:
        return all(
            getattr(one, 'loss_weight', None) == 0
            for one in self.losses.values()
        )

    def compares_classes(self) -> bool:
        return True

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.tap(student, self.features)
        self.tap(student, self.head)
        own = dense_head(_WHO, student, self.head, 'student')
        for name in self.teachers:
            check_name('The distiller', 'teacher', name, teachers)
            teachers[name].tap(self.head)
            other = dense_head(
                _WHO, teachers[name].detector, self.head, f'teacher {name!r}'
            )
            check_same_anchors(_WHO, own, other)
        self.teacher_names = list(self.teachers)

    def forward(self, step: Step) -> dict[str, Tensor]:
        more: dict[str, Tensor] = {}
        if self.temperature is not None:
            more['watch_temperature'] = self._adjust(step)
        log_weights = self._weigh(step)
        weights = log_weights.exp()
        said = {
            output: self._said(step, output)
            for output in {0, *self.outputs.values()}
        }
        parts = {}
        with full_precision(step.images):
            targets = {
                output: fused(others, weights)
                for output, (_, others) in said.items()
            }
            anchors = self._anchor_weights(step, targets[0])
            for name, loss in self.losses.items():
                output = self.outputs[name]
                given = (anchors,) if self.anchor_weighted[name] else ()
                own = [as_float(one) for one in said[output][0]]
                parts[name] = loss(own, targets[output], step.gt, *given)
            parts['entropy'] = self.entropy_weight * collapse(log_weights)
        for name, value in zip(self.teachers, weights.detach().mean(0)):
            parts[f'watch_attention_{name}'] = value
        return {**parts, **more}

    def _adjust(self, step: Step) -> Tensor:
        """Give the losses the temperature of this step."""
        if self.temperature.listens and step.losses and not step.dry:
            self.temperature.observe(
                step.progress, detection_loss(step.losses)
            )
        now = self.temperature(step.progress)
        for loss in self._warm():
            loss.temperature = now
        return step.images.new_full((), now)

    def _weigh(self, step: Step) -> Tensor:
        """Logarithms of the teachers' weights, (N, M)."""
        maps = maps_of(
            step.student.at(self.features), f'Tap {self.features!r}'
        )
        for one in maps:
            check_channels(_WHO, one, self.attention.channels)
        with full_precision(step.images):
            described = pooled(
                maps, [equal_weight(step.gt, one) for one in maps]
            )
            return self.attention(described)

    def _said(
        self, step: Step, output: int
    ) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        """Maps of the student's head, and of each teacher's."""
        own = self._maps(step.student, output)
        others = []
        for name in self.teachers:
            shown = step.teacher(name)
            maps = tuple(one.detach() for one in self._maps(shown, output))
            maps = crop(maps, shown.size, step.images.shape[-2:])
            if len(maps) != len(own):
                raise ValueError(
                    f'{_WHO} fuses heads of the same levels: the student has '
                    f'{len(own)}, teacher {name!r} has {len(maps)}. Choose '
                    f'teachers of one pyramid.'
                )
            for one, other in zip(own, maps):
                check_same_shape(_WHO, one, other)
            others.append(maps)
        return own, others

    def _maps(self, outputs: Outputs, output: int) -> tuple[Tensor, ...]:
        return maps_of(outputs.at(self.head), f'Tap {self.head!r}', output)

    def _anchor_weights(
        self, step: Step, scores: Sequence[Tensor]
    ) -> list[Tensor]:
        """Largest class probability of each anchor, (N, A, H, W) a level."""
        head, _ = resolve(step.student.detector, self.head)
        classes = scores_of(head)
        return [
            one.detach().unflatten(1, (-1, classes)).sigmoid().amax(2)
            * valid_mask(step.gt, tuple(one.shape[-2:]))
            for one in scores
        ]

    # ------------------------------------------------------------- resuming

    def run_state(self) -> dict[str, Any]:
        """What a stopped run needs besides weights: the losses so far."""
        return {} if self.temperature is None else self.temperature.state()

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`run_state` returned."""
        if self.temperature is not None and state:
            device = self.attention.embeddings.device
            self.temperature.load_state(state, device)

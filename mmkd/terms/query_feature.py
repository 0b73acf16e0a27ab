"""Query features: what paired queries of two decoders hold or say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_name
from mmkd.ops.numeric import as_float, zero_of
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Step
from mmkd.terms.classifier import classifier_weight, readers
from mmkd.terms.proposal import row_labels
from mmkd.terms.queries import bind_queries
from mmkd.terms.query_matching import class_logits, of_layers
from mmkd.terms.query_pairs import PAIRINGS, Pairs, pair_queries
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: What of a query can be compared.
COMPARED = ('states', 'logits')


@MODELS.register_module()
class QueryFeatureTerm(Term):
    r"""The vectors of queries that belong together, by any loss of maps.

    .. math:: L = loss(align(f^S_q), f^T_{\pi(q)})

    f is what a layer of the decoder makes of a query (``states``), or its
    class scores (``logits``), and :math:`\pi` pairs the queries of the two
    detectors, see :func:`mmkd.terms.query_pairs.pair_queries`: by the objects
    that they answer for, by their answers, or by asking both the same. How
    many queries either side has, and in which order, does not matter.

    A loss sees the queries as the cells of a row: one of the whole batch by
    ``'objects'``, (1, D, 1, M), with the label of each as a box over its
    cell; one an image otherwise, (N, D, 1, Q). So losses of maps serve here,
    for instance ``LSHLoss`` with ``unfold=1`` on states, ``CMKDLoss`` on
    logits. A loss of objects (one that has ``compare_objects``, as
    ``DLKDLoss``) gets the states of each object's queries.

    Args:
        teacher: Name of the teacher.
        loss: Config of the loss.
        compare: ``'states'`` or ``'logits'``. Of a softmax these have the
            background's; if one side has a softmax and the other sigmoids,
            the softmax is told by the logits of its chances.
        pairing: ``'objects'``, ``'answers'`` or ``'questions'``.
        layer, teacher_layer: Of the decoders; -1 is the last.
        align: Config of the neck that brings the student's vectors to the
            teacher's width: ``ConvAdapt`` is a linear layer of a row. None if
            they are as wide.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a detector has no queries or not so many layers, the
            vectors differ in width, or the loss is one for other heads, while
            the model is built.

    Reference:
        Ours. It is how papers on vectors of samples (LSH, DLKD, CMKD) are
        told to detectors whose samples are queries.
    """

    def __init__(
        self,
        teacher: str,
        loss: Mapping,
        compare: str = 'states',
        pairing: str = 'objects',
        layer: int = -1,
        teacher_layer: int = -1,
        align: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_name('QueryFeatureTerm', 'compare', compare, COMPARED)
        check_name('QueryFeatureTerm', 'pairing', pairing, PAIRINGS)
        self.teacher = teacher
        self.compare, self.pairing = compare, pairing
        self.layer, self.teacher_layer = layer, teacher_layer
        self.loss = build(loss, 'loss')
        self.align = (
            None if align is None else build(align, 'align', num_levels=1)
        )
        if self.of_objects and not (
            align is None and compare == 'states' and pairing == 'objects'
        ):
            raise ValueError(
                f'QueryFeatureTerm gives {type(self.loss).__name__} the '
                f'states of objects, got compare={compare!r}, '
                f'pairing={pairing!r} and align={align}. Leave them out.'
            )
        self._introduced = False

    @property
    def of_objects(self) -> bool:
        """Whether the loss is one of objects and their views."""
        return hasattr(self.loss, 'compare_objects')

    def silent(self) -> bool:
        return getattr(self.loss, 'loss_weight', None) == 0

    def compares_classes(self) -> bool:
        return True  # queries are matched by class, too

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        teacher = bind_queries(self, student, teachers, self.teacher)
        for side, detector, layer, setting in (
            ('student', student, self.layer, 'layer'),
            ('teacher', teacher.detector, self.teacher_layer, 'teacher_layer'),
        ):
            count = detector.decoder.num_layers
            if not -count <= layer < count:
                raise ValueError(
                    f'QueryFeatureTerm has {setting}={layer}, but the '
                    f"{side}'s decoder has {count} layers. Set {setting}= to "
                    f'at most {count - 1}, or to -1 for the last.'
                )
        for loss in readers([self.loss]):
            classifier_weight(
                type(loss).__name__, teacher.detector
            )  # raises if there is none

    def forward(self, step: Step) -> Tensor | dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        self._introduce(step)
        pairs = pair_queries(
            self.pairing,
            step.student,
            shown,
            step.gt,
            views=getattr(self.loss, 'num_views', 0) if self.of_objects else 0,
            jitter=getattr(self.loss, 'jitter', 0.0),
        )
        own, other = self._vectors(pairs)
        if self.of_objects:
            return self.loss.compare_objects(own, other, pairs.labels)
        if pairs.labels is None:
            nothing = [own.new_zeros(0, 4)] * len(own)
            cells = GroundTruth.from_boxes(nothing, (1, own.shape[1]))
        else:  # a row of all objects
            own, other = (one.transpose(0, 1) for one in (own, other))
            cells = row_labels(pairs.labels)
        return self._compare(own, other, cells)

    def _introduce(self, step: Step) -> None:
        """Show the teacher's classifier to a loss that asks for it, once."""
        if self._introduced:
            return
        for loss in readers([self.loss]):
            detector = step.teacher(self.teacher).detector
            weight = classifier_weight(type(loss).__name__, detector)
            loss.read_classifier(weight)
        # It is not loaded before the training starts.
        self._introduced = not step.dry

    def _vectors(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What is compared of both sides, (A, B, D)."""
        own = of_layers(pairs.student, [self.layer])
        other = of_layers(pairs.teacher, [self.teacher_layer])
        if self.compare == 'states':
            return as_float(own.states[0]), as_float(other.states[0])
        (own,), (other,), softmax = class_logits(own, other)
        wanted = 'softmax' if softmax else 'sigmoid'
        given = getattr(self.loss, 'activation', wanted)
        if given != wanted:
            raise ValueError(
                f'QueryFeatureTerm compares scores of a {wanted}, but '
                f'{type(self.loss).__name__} is told of a {given}. Set '
                f"activation='{wanted}' of the loss."
            )
        return own, other

    def _compare(
        self, own: Tensor, other: Tensor, gt: GroundTruth
    ) -> Tensor | dict[str, Tensor]:
        given = own.shape[1]
        if not given:  # one that does not count, so that parts are named
            own = own.new_zeros(1, 1, own.shape[2]) + zero_of(own)
            other = other.new_zeros(1, 1, other.shape[2])
            gt = row_labels(own.new_zeros(1).long())
        rows = [(one.mT[:, :, None],) for one in (own, other)]
        if self.align is not None:
            rows[0] = self.align(*rows)
        self._check_widths(rows[0][0], rows[1][0])
        if getattr(self.loss, 'scope', 'level') != 'levels':
            rows = [one for (one,) in rows]
        loss = self.loss(*rows, gt)
        if given:
            return loss
        if not isinstance(loss, Mapping):
            return 0 * loss
        return {name: 0 * value for name, value in loss.items()}

    def _check_widths(self, own: Tensor, other: Tensor) -> None:
        widths = own.shape[1], other.shape[1]
        if widths[0] != widths[1]:
            advice = (
                f"Add align=dict(type='mmkd.ConvAdapt', "
                f'in_channels={widths[0]}, out_channels={widths[1]}) to this '
                f'term.'
                if self.compare == 'states'
                else 'Choose a teacher of the same classes, or '
                "compare='states'."
            )
            raise ValueError(
                f'QueryFeatureTerm compares vectors of one width, but the '
                f"student's have {widths[0]} numbers and the teacher's "
                f'{widths[1]}. {advice}'
            )

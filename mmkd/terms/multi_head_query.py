"""MHKD of queries: what each layer of two decoders says is compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmkd.checks import check_fraction, check_name, check_positive
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.terms.queries import bind_queries
from mmkd.terms.query_matching import of_layers
from mmkd.terms.query_pairs import pair_queries
from mmkd.terms.shared_queries import answer_distances, confidence
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: How pairs of queries are found; each is one of many in an image.
PAIRINGS = ('answers', 'questions')


@MODELS.register_module()
class MultiHeadQueryTerm(Term):
    r"""What the decoder says after each of its layers, and after the last.

    The layers of a decoder of DETR's kind have heads already, which learn
    from the labels in the detector's own loss: the student's as it learns,
    the teacher's in its training. So nothing is added and nothing is prepared;
    student's layer i and teacher's layer m(i) of that depth are compared.

    .. math::
        L = \alpha \left[ \beta \sum_{i < n} D(h^S_i, h^T_{m(i)})
            + D(h^S_n, h^T_{m(n)}) \right], \qquad
        D = \frac{\sum_q w_q \left( \tau^2 KL(p^T_q \| p^S_q)
            + \lambda (5 \lVert b^S_q - b^T_q \rVert_1
            + 2 (1 - GIoU(b^S_q, b^T_q))) \right)}{\sum_q w_q}

    over pairs of queries that belong together, see
    :func:`mmkd.terms.query_pairs.pair_queries`, found by the last layers, or
    made by asking the student what the teacher asks. w is the largest chance
    of a class in the teacher's last layer. KL is that of classes softened by
    the temperature, of two Bernoulli distributions a class for sigmoids.

    Args:
        teacher: Name of the teacher.
        pairing: ``'answers'``, or ``'questions'`` for decoders of one form.
        head_weight: The formula's beta.
        mix: The formula's alpha, the share of imitation.
        temperature: The formula's tau.
        box_weight: The formula's lambda.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``final_cls`` and ``final_box``, and ``cls`` and ``box`` of the layers
        before the last where there are some.

    Raises:
        ValueError: If a detector has no queries, or their classes differ in
            number, while the model is built.

    Reference:
        Wang et al., "Multi-head Knowledge Distillation for Model
        Compression", arXiv:2012.02911, see
        :class:`mmkd.terms.multi_head.MultiHeadTerm`. That the layers of a
        decoder are its heads is ours.
    """

    def __init__(
        self,
        teacher: str,
        pairing: str = 'answers',
        head_weight: float = 0.5,
        mix: float = 0.1,
        temperature: float = 4.0,
        box_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_name('MultiHeadQueryTerm', 'pairing', pairing, PAIRINGS)
        check_positive('MultiHeadQueryTerm', temperature=temperature)
        check_fraction('MultiHeadQueryTerm', mix=mix)
        self.teacher, self.pairing = teacher, pairing
        self.head_weight, self.mix = head_weight, mix
        self.temperature, self.box_weight = temperature, box_weight

    def silent(self) -> bool:
        return not self.mix

    def compares_classes(self) -> bool:
        return True

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        bind_queries(self, student, teachers, self.teacher)

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        found = pair_queries(self.pairing, step.student, shown, step.gt)
        weight, pairs = confidence(found.teacher), found.by_layer()
        layers = [*range(len(pairs.student.states))]
        parts = {}
        for name, factor, some in (
            ('', self.head_weight, layers[:-1]),
            ('final_', 1.0, layers[-1:]),
        ):
            if not some:
                continue
            cls, l1, giou = answer_distances(
                of_layers(pairs.student, some),
                of_layers(pairs.teacher, some),
                weight,
                self.temperature,
            ).values()
            share = self.mix * factor
            parts[f'{name}cls'] = share * cls
            parts[f'{name}box'] = share * self.box_weight * (5 * l1 + 2 * giou)
        return parts

"""MaKD: imitate each matrix of the attention and of the network behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.backbones.swin import WindowMSA
from mmdet.models.layers.transformer.utils import ConditionalAttention
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.ops.heads import attention_rows, heads_of, projected
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.taps import recording
from mmkd.terms.queries import asks, bind_queries, question
from mmkd.terms.shared_queries import ask_alike
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Outputs of single matrices, rows of attention, outputs of whole blocks.
ASPECTS = ('q', 'k', 'v', 'o', 'ffn1', 'ffn2', 'attn', 'hidden')


@MODELS.register_module()
class MultiAspectTerm(Term):
    r"""Each matrix of a factorized network keeps the output of the whole one.

    .. math:: \sum_a w_a \frac{1}{|L_a|} \sum_{l \in L_a} d_a(S_l, T_l)

    over the aspects :math:`a`: the outputs of the query, key, value and output
    matrices and of the two matrices of the network behind them, and those of
    whole blocks, by the mean squared difference; and the rows of attention,
    :math:`\sum_j T_j \log (T_j / S_j)`, averaged. The student has the layers
    of the teacher (:func:`mmkd.detectors.factorized.factorized`), so that
    nothing is projected. In deformable attention the weights of the points
    stand for a row, and there are neither queries nor keys.

    Queries of a DETR's decoder are compared index by index, for the student
    begins with the teacher's. Where they are chosen among the cells of the
    image (two-stage Deformable DETR, DINO), a thin network soon chooses
    others: its decoder is then asked the teacher's, in a pass of their own.

    Args:
        teacher: Name of the teacher.
        aspects: Which, a few of ``ASPECTS``; or their weights by name. All
            that the network has, with weight 1, if None.
        parts: Where layers of attention are looked for; ``('encoder',
            'decoder')`` of a DETR.
        loss_weight: Factor of all.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If an aspect is unknown or nowhere in the student, a layer
            is missing on the other side, two outputs differ in shape, or the
            layers of a decoder do not go on with the same queries.

    Reference:
        Liu et al., "Multi-Aspect Knowledge Distillation for Language Model
        with Low-rank Factorization", arXiv:2604.03110. Its aspects on layers
        of detectors, and their weights, are ours; so is that predictions,
        which the paper compares as well, are a term of their own
        (``SoftTargetLoss`` on the head, ``SharedQueryTerm`` of a DETR), whose
        schedule lets the matrices go first; and the pass for queries that are
        chosen.
    """

    def __init__(
        self,
        teacher: str,
        aspects: Mapping[str, float] | Sequence[str] | None = None,
        parts: Sequence[str] = ('backbone',),
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        self.teacher = teacher
        self.weights = _weights(aspects)
        self.parts = (parts,) if isinstance(parts, str) else tuple(parts)
        self.loss_weight = loss_weight
        self.sites: dict[str, list[Site]] = {}
        self.asks = False
        self._named = aspects is not None

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        self.teacher_names = [self.teacher]
        self.sites = {}
        for part in self.parts:
            for aspect, path, read in _sites(student, part):
                if aspect not in self.weights:
                    continue
                self.sites.setdefault(aspect, []).append((path, read))
                self.tap(student, path)
                teachers[self.teacher].tap(path)
        missing = [one for one in self.weights if one not in self.sites]
        if not self.sites or (self._named and missing):
            raise ValueError(
                f'MultiAspectTerm finds no {", ".join(missing)} in '
                f'{", ".join(self.parts)} of {type(student).__name__}. It '
                f'reads layers of attention (Swin, DETR and its kind): '
                f'name parts= that have them, or take aspects= of '
                f'{", ".join(self.sites) or "another detector"}.'
            )
        decodes = any(map(_in_decoder, self.parts)) and asks(student)
        if decodes and hasattr(student, 'cache_dict'):
            raise ValueError(
                f'MultiAspectTerm compares queries index by index, but each '
                f'layer of the decoder of {type(student).__name__} goes on '
                f"with others. Set parts=('encoder',)."
            )
        self.asks = decodes and getattr(student, 'as_two_stage', False)
        if self.asks:
            bind_queries(self, student, teachers, self.teacher)

    def silent(self) -> bool:
        return self.loss_weight == 0

    def forward(self, step: Step) -> dict[str, Tensor]:
        teacher = step.teacher(self.teacher)
        asked = step.student
        if self.asks:
            paths = [
                path
                for sites in self.sites.values()
                for path, _ in sites
                if _in_decoder(path)
            ]
            with recording(step.student.detector, paths) as asked:
                ask_alike(step.student, question(teacher))
        return {
            aspect: self.loss_weight
            * self.weights[aspect]
            * torch.stack(
                [
                    _distance(aspect, path, *pair)
                    for path, read in sites
                    for pair in zip(
                        read(
                            asked if _in_decoder(path) else step.student, path
                        ),
                        read(teacher, path),
                    )
                ]
            ).mean()
            for aspect, sites in self.sites.items()
        }


#: What a tap says of an aspect, call by call.
Reading = Callable[[Outputs, str], list[Tensor]]
#: A tap, and how it is read.
Site = tuple[str, Reading]


def _in_decoder(path: str) -> bool:
    return path.partition('.')[0] == 'decoder'


def _weights(
    aspects: Mapping[str, float] | Sequence[str] | None,
) -> dict[str, float]:
    if aspects is None:
        aspects = ASPECTS
    elif isinstance(aspects, str):
        aspects = (aspects,)
    if not isinstance(aspects, Mapping):
        aspects = dict.fromkeys(aspects, 1.0)
    for aspect in aspects:
        check_name('MultiAspectTerm', 'aspect', aspect, ASPECTS)
    return dict(aspects)


def _sites(
    student: nn.Module, part: str
) -> Iterator[tuple[str, str, Reading]]:
    """Aspect, path and reading of every output below a part."""
    check_name(
        'MultiAspectTerm',
        'part',
        part,
        [name for name, _ in student.named_modules() if name],
    )
    for name, module in student.get_submodule(part).named_modules(prefix=part):
        if isinstance(module, WindowMSA):
            for index, aspect in enumerate('qkv'):
                third = partial(_third, index=index)
                yield aspect, f'{name}.qkv', partial(_returned, take=third)
            yield 'o', f'{name}.proj', _returned
            yield 'attn', f'{name}.softmax', _returned
        elif isinstance(module, MultiScaleDeformableAttention):
            yield 'v', f'{name}.value_proj', _returned
            yield 'o', f'{name}.output_proj', _returned
            rows = partial(_rows, length=module.num_levels * module.num_points)
            path = f'{name}.attention_weights'
            yield 'attn', path, partial(_returned, take=rows)
        elif hasattr(module, 'in_proj_weight'):  # nn.MultiheadAttention's
            for one in ('query', 'key', 'value'):
                yield one[0], name, partial(_projected, which=one)
            yield 'o', name, partial(_returned, take=_first)
            yield 'attn', name, _looked
        elif isinstance(module, ConditionalAttention):
            for aspect, path in CONDITIONAL:
                if getattr(module, path, None) is not None:
                    yield aspect, f'{name}.{path}', _returned
            yield 'attn', f'{name}.forward_attn', _compared
        elif isinstance(module, FFN):
            layer = name.rpartition('.')[0]
            lost = getattr(module.layers[0][1], 'inplace', False)
            yield (
                'ffn1',
                f'{name}.layers.0.0',
                (_once_more if lost else _returned),
            )
            yield 'ffn2', f'{name}.layers.{module.num_fcs - 1}', _returned
            yield 'hidden', layer, partial(_returned, take=_first)


#: Matrices of the attention of Conditional and DAB-DETR.
CONDITIONAL = (
    ('q', 'qcontent_proj'),
    ('q', 'qpos_proj'),
    ('q', 'qpos_sine_proj'),
    ('k', 'kcontent_proj'),
    ('k', 'kpos_proj'),
    ('v', 'v_proj'),
    ('o', 'out_proj'),
)


def _returned(
    outputs: Outputs, path: str, take: Callable[[Any], Tensor] = as_float
) -> list[Tensor]:
    return [take(one) for one in outputs.outputs(path)]


def _once_more(outputs: Outputs, path: str) -> list[Tensor]:
    """What a matrix returned before its ReLU overwrote it."""
    (x, *_), _ = outputs.inputs(path)
    layer = outputs.detector.get_submodule(path)
    with full_precision(x):
        return [F.linear(as_float(x), as_float(layer.weight), layer.bias)]


def _projected(outputs: Outputs, path: str, which: str) -> list[Tensor]:
    """Queries, keys or values, which are no output of any module."""
    attention = outputs.detector.get_submodule(path)
    return [projected(attention, *outputs.inputs(path), which)]


def _looked(outputs: Outputs, path: str) -> list[Tensor]:
    """Rows of attention, head by head, without dropout."""
    attention = outputs.detector.get_submodule(path)
    return [heads_of(attention, *outputs.inputs(path))[1]]


def _compared(outputs: Outputs, path: str) -> list[Tensor]:
    """The same where queries and keys are handed over projected."""
    attention = outputs.detector.get_submodule(path.rpartition('.')[0])
    _, given = outputs.inputs(path)
    query, key = (as_float(given[name]) for name in ('query', 'key'))
    with full_precision(query):
        return [attention_rows(query, key, attention.num_heads, given)]


def _third(output: Tensor, index: int) -> Tensor:
    """Queries, keys or values, (..., 3 C) → (..., C)."""
    return as_float(output).chunk(3, dim=-1)[index]


def _rows(logits: Tensor, length: int) -> Tensor:
    """Weights that sum to 1, (..., heads * length) → (..., heads, length)."""
    return as_float(logits).unflatten(-1, (-1, length)).softmax(-1)


def _first(output: Tensor | Sequence[Tensor]) -> Tensor:
    """What a block hands on, of blocks that return more beside it."""
    return as_float(output if isinstance(output, Tensor) else output[0])


def _distance(
    aspect: str, path: str, student: Tensor, teacher: Tensor
) -> Tensor:
    teacher = teacher.detach()
    if student.shape != teacher.shape:
        raise ValueError(
            f'MultiAspectTerm compares outputs of one shape, got '
            f'{tuple(student.shape)} of the student and '
            f'{tuple(teacher.shape)} of the teacher at {path!r}. Use a '
            f'student with the architecture and data_preprocessor of the '
            f"teacher (type='mmkd.Factorized')."
        )
    if aspect == 'attn':
        return rows_divergence(student, teacher)
    return F.mse_loss(student, teacher)


def rows_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Divergence of rows that sum to 1, :math:`\sum_j T_j \log (T_j / S_j)`.

    Args:
        student, teacher: Probabilities, (..., n).

    Returns:
        Scalar, the mean over rows.

    Example:
        >>> one, other = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
        >>> round(rows_divergence(one, other).item(), 4)
        0.6931
    """
    tiny = torch.finfo(student.dtype).tiny
    cross = torch.xlogy(teacher, student.clamp(min=tiny))
    return (torch.xlogy(teacher, teacher) - cross).sum(-1).mean()

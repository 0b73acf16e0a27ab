"""MaKD: imitate each matrix of the attention and of the network behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.backbones.swin import WindowMSA
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import Step
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

    Args:
        teacher: Name of the teacher.
        aspects: Which, a few of ``ASPECTS``; or their weights by name. All
            that the network has, with weight 1, if None.
        parts: Where layers of attention are looked for.
        loss_weight: Factor of all.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If an aspect is unknown or nowhere in the student, a layer
            is missing on the other side, or two outputs differ in shape.

    Reference:
        Liu et al., "Multi-Aspect Knowledge Distillation for Language Model
        with Low-rank Factorization", arXiv:2604.03110. Its aspects on layers
        of detectors, and their weights, are ours; so is that predictions,
        which the paper compares as well, are a term of their own
        (``SoftTargetLoss`` on the head), whose schedule lets the matrices go
        first.
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
                f'reads layers of attention (Swin, deformable attention): '
                f'name parts= that have them, or take aspects= of '
                f'{", ".join(self.sites) or "another detector"}.'
            )

    def silent(self) -> bool:
        return self.loss_weight == 0

    def forward(self, step: Step) -> dict[str, Tensor]:
        teacher = step.teacher(self.teacher)
        return {
            aspect: self.loss_weight
            * self.weights[aspect]
            * torch.stack(
                [
                    _distance(aspect, path, read, *pair)
                    for path, read in sites
                    for pair in zip(
                        step.student.outputs(path), teacher.outputs(path)
                    )
                ]
            ).mean()
            for aspect, sites in self.sites.items()
        }


#: Path of an output, and what is taken of it.
Site = tuple[str, Callable[[Tensor], Tensor]]


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
) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]:
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
                yield aspect, f'{name}.qkv', partial(_third, index=index)
            yield 'o', f'{name}.proj', as_float
            yield 'attn', f'{name}.softmax', as_float
        elif isinstance(module, MultiScaleDeformableAttention):
            yield 'v', f'{name}.value_proj', as_float
            yield 'o', f'{name}.output_proj', as_float
            points = module.num_levels * module.num_points
            yield (
                'attn',
                f'{name}.attention_weights',
                partial(_rows, length=points),
            )
        elif isinstance(module, FFN):
            yield 'ffn1', f'{name}.layers.0.0', as_float
            yield 'ffn2', f'{name}.layers.{module.num_fcs - 1}', as_float
            yield 'hidden', name.rpartition('.')[0], _first


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
    aspect: str,
    path: str,
    read: Callable[[Tensor], Tensor],
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
) -> Tensor:
    student, teacher = read(student), read(teacher).detach()
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

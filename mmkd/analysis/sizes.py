"""How large the maps are that a term compares, where that matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkd.structures import GroundTruth, Step
from mmkd.terms.feature import FeatureTerm

#: Times that a teacher's maps are as large as the student's, from which on
#: it is worth a word: on tree crowns a hundred harmed, on shapes three did
#: not; see docs/laboratory.md.
LARGE = 10.0
#: Factor of the student's maps by which a loss is tried, and the share of it
#: that counts as no change.
FACTOR, SAME = 2.0, 1e-3
HEAD = 'bbox_head'


@dataclass(frozen=True)
class Sizes:
    """Mean absolute values of the maps that a term compares.

    Attributes:
        term: Its name.
        student: Level by level, behind what aligns them.
        teacher: Likewise.
    """

    term: str
    student: tuple[float, ...]
    teacher: tuple[float, ...]

    def largest(self) -> int:
        """The level at which the teacher's maps are largest beside these."""
        times = [
            other / max(own, 1e-12)
            for own, other in zip(self.student, self.teacher)
        ]
        return times.index(max(times))

    def times(self) -> float:
        """How often as large the teacher's maps are there."""
        level = self.largest()
        return self.teacher[level] / max(self.student[level], 1e-12)


@torch.no_grad()
def compared_sizes(
    terms: Mapping[str, nn.Module], step: Step, prefix: str = ''
) -> list[Sizes]:
    """Sizes of maps, for terms whose loss changes with the student's.

    Left out are terms on heads, whose numbers are scores, those that weigh
    cells or compare several levels at once, and those of whose tap the step
    has nothing.

    Args:
        terms: By name, those of groups with them.
        step: That was made.
        prefix: Before their names.
    """
    found = []
    for name, term in terms.items():
        if getattr(term, 'transparent', False):
            found += compared_sizes(term.terms, step, f'{prefix}{name}.')
            continue
        if not _by_level(term) or not all(map(step.student.has, term.taps)):
            continue
        own, other = term.maps(step)
        if term.align is not None:
            own = term.align(own, other)
        if term.teacher_align is not None:
            other = term.teacher_align(other, own)
        if not _depends(term.losses[0], own[0], other[0], step.gt):
            continue
        sizes = [
            tuple(float(one.float().abs().mean()) for one in maps)
            for maps in (own, other)
        ]
        found.append(Sizes(prefix + name, *sizes))
    return found


def _by_level(term: nn.Module) -> bool:
    return (
        isinstance(term, FeatureTerm)
        and not term.joint
        and term.weight is None
        and not any(tap.split('.')[0] == HEAD for tap in term.taps)
    )


def _depends(
    loss: nn.Module, student: Tensor, teacher: Tensor, gt: GroundTruth
) -> bool:
    """Whether larger maps of the student's make another loss."""
    before, after = (
        _whole(loss(factor * student, teacher, gt)) for factor in (1.0, FACTOR)
    )
    return bool((after - before).abs() > SAME * before.abs())


def _whole(value: Tensor | Mapping[str, Tensor]) -> Tensor:
    return sum(value.values()) if isinstance(value, Mapping) else value

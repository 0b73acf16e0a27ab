"""Group: a term that holds terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from mmkd.structures import Step
from mmkd.terms.term import Term, build_term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

Share = Tensor | Mapping[str, Tensor]


class GroupTerm(Term):
    """What every group shares: its terms, and their parts under one name.

    A subclass changes what its terms are weighed by, what they are shown, or
    who teaches them. They log under ``loss_kd_<group>_<term>``.

    Args:
        terms: Configs of the terms by name.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If there are none.

    Attributes:
        transparent: Whether its terms see the same student and the same
            teachers as the group does, so that who looks at a step may look
            at them one by one.
        needs_terms: Whether it is nothing without terms.
    """

    transparent: ClassVar[bool] = True
    needs_terms: ClassVar[bool] = True

    def __init__(
        self,
        terms: Mapping[str, Mapping] | None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        who = type(self).__name__
        if terms is not None and not isinstance(terms, Mapping):
            raise ValueError(
                f'{who} takes terms as a dict of terms by name, got '
                f'terms={terms!r}. Write for instance '
                f"terms=dict(pkd=dict(type='mmkd.FeatureTerm', …))."
            )
        if self.needs_terms and not terms:
            raise ValueError(f'{who} needs at least one term.')
        self.terms = nn.ModuleDict(
            {
                name: build_term(config, f'the term {name!r} in {who}')
                for name, config in (terms or {}).items()
            }
        )

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.bind_terms(student, teachers)
        for term in self.terms.values():
            for path in term.student_paths:
                self.tap(student, path)

    def bind_terms(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        """Bind the terms, and note which teachers they name."""
        for name, term in self.terms.items():
            term.name = name
            term.bind(student, teachers)
        self.teacher_names = list(
            dict.fromkeys(
                name
                for term in self.terms.values()
                for name in term.teacher_names
            )
        )

    def initialise(self) -> None:
        for term in self.terms.values():
            term.initialise()

    def speaking(self) -> dict[str, bool]:
        """Which terms have anything to say."""
        return {name: not term.silent() for name, term in self.terms.items()}

    def silent(self) -> bool:
        return not any(self.speaking().values())

    def compares_classes(self) -> bool:
        return any(term.compares_classes() for term in self.terms.values())

    def takes_some_classes(self) -> bool:
        return all(
            term.takes_some_classes()
            for term in self.terms.values()
            if term.compares_classes()
        )

    def checkable(self, step: Step) -> bool:
        return all(term.checkable(step) for term in self.terms.values())

    def factors(self, step: Step) -> dict[str, float]:
        """Factors of the terms' own schedules; 0 where one says nothing."""
        return {
            name: self.terms[name].schedule(step.progress) if heard else 0.0
            for name, heard in self.speaking().items()
        }

    def shares(
        self, step: Step, factors: Mapping[str, float]
    ) -> dict[str, Share | float]:
        """What the terms say of a step; nothing where the factor is 0."""
        return {
            name: term(step) if factors[name] else term.idle()
            for name, term in self.terms.items()
        }

    def forward(self, step: Step) -> dict[str, Tensor]:
        return self.said(step, self.factors(step))

    def said(
        self, step: Step, factors: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """All parts, each times its term's factor."""
        zero = step.images.new_zeros(())
        parts: dict[str, Tensor] = {}
        for name, share in self.shares(step, factors).items():
            parts.update(parts_of(name, share, factors[name], zero))
        return parts


def parts_of(
    name: str,
    share: Share | float,
    factor: Tensor | float | None,
    zero: Tensor,
) -> dict[str, Tensor]:
    """A term's parts as those of its group.

    Args:
        name: The term's.
        share: What it said.
        factor: Of what is summed, not of what is watched; None or 0 if it
            said nothing.
        zero: A scalar on the device.

    Example:
        >>> import torch
        >>> said = dict(near=torch.tensor(2.0), watch_peak=torch.tensor(5.0))
        >>> parts_of('a', said, 3.0, torch.zeros(()))
        {'a_near': tensor(6.), 'watch_a_peak': tensor(5.)}
    """
    parts = {}
    for part, value in (
        share.items() if isinstance(share, Mapping) else [('', share)]
    ):
        if part.startswith('watch_'):
            parts[f'watch_{name}_{part.removeprefix("watch_")}'] = value
            continue
        key = f'{name}_{part}' if part else name
        silent = factor is None or (isinstance(factor, float) and not factor)
        parts[key] = zero + value if silent else factor * value
    return parts

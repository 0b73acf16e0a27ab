"""Prepared: what terms share whose teacher's side must learn beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.compat.checkpoint import read_checkpoint, state_dict_of
from mmkd.structures import Step
from mmkd.terms.term import Term


class PreparedTerm(Term):
    """A term with modules on the teacher's side, which learn before it counts.

    A subclass names two of its modules: ``given``, on the teacher's side, and
    ``learner``, on the student's. Which of them learn is what ``phases`` say
    by ``freeze``; a file of an earlier training makes the first phase
    unneeded.

    Args:
        checkpoint: File of an earlier training with such a term, whose
            modules on the teacher's side are taken; they learn no more.
        schedule: Factor over the training; constant 1 if None.
    """

    #: Names of the modules on the teacher's and on the student's side.
    given: ClassVar[str]
    learner: ClassVar[str]
    #: The argument that names the file.
    setting: ClassVar[str] = 'checkpoint'

    def __init__(
        self,
        checkpoint: str | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        self.checkpoint = checkpoint
        #: Steps in which the teacher's side learned.
        self.register_buffer('taught', torch.zeros((), dtype=torch.long))
        self._ready = False

    def hold(self) -> None:
        """Keep the teacher's side as it is in the file; call it once built."""
        if self.checkpoint:
            self._side.requires_grad_(False)

    @property
    def _side(self) -> nn.Module:
        return getattr(self, self.given)

    def train(self, mode: bool = True) -> PreparedTerm:
        super().train(mode)
        if self.checkpoint:  # statistics that were loaded stay as they are
            for one in self._side.modules():
                if isinstance(one, nn.modules.batchnorm._NormBase):
                    one.eval()
        return self

    def prepare(self, step: Step) -> None:
        """Load the teacher's side, once; see that it is not untrained.

        Raises:
            ValueError: If it neither learns nor ever did, or the file does
                not fit.
        """
        if self._ready or step.dry:
            return
        if self.checkpoint and not self.taught:
            self._load()
        if not (learns(self._side) or self.taught):
            raise ValueError(
                f'{self._who}: its {self.given} neither learn nor ever did, '
                f'and untrained ones teach nothing. Let them learn in a phase '
                f"before this one, freeze='terms.{self.name}.{self.learner}', "
                f'or set {self.setting}=FILE.'
            )
        self._ready = not learns(self._side)

    def count_lesson(self, step: Step) -> None:
        """Note that the teacher's side learns in this step."""
        if self.training and not step.dry:
            self.taught += 1

    @property
    def _who(self) -> str:
        return f'{type(self).__name__} {self.name!r}'

    def _load(self) -> None:
        state = state_dict_of(read_checkpoint(self.checkpoint))
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            owner, found, rest = key.partition(f'{self.given}.')
            if found:
                groups.setdefault(owner, {})[rest] = value
        own = f'terms.{self.name}.'
        if own not in groups and len(groups) == 1:
            own = next(iter(groups))
        if own not in groups:
            raise ValueError(
                f'{self._who}: {self.checkpoint} holds {self.given} of '
                f'{sorted(groups) or "no term"}, and {own}{self.given} are '
                f'needed. Name a file of a training with this term, or leave '
                f'{self.setting} out and give them a phase.'
            )
        try:
            self._side.load_state_dict(groups[own])
        except RuntimeError as error:
            raise ValueError(
                f'{self._who}: {self.given} of {self.checkpoint} are others. '
                f'Set what they are built by as it was there. {error}'
            ) from error
        self.taught += 1


def learns(module: nn.Module) -> bool:
    """Whether any of its parameters does.

    Example:
        >>> learns(nn.Linear(2, 2).requires_grad_(False))
        False
    """
    return any(one.requires_grad for one in module.parameters())

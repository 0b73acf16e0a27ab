"""Phases: what is trained, by which terms, from when to when.

Phases follow each other and are a function of the progress of the training
alone, so that a resumed training is where the uninterrupted one was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from mmkd.arguments import check_arguments
from mmkd.checks import check_name, check_names, check_positive, suggest
from mmkd.taps import in_forward

#: Where the parameters of terms stand in a distilled student.
TERMS = 'terms'


@dataclass(frozen=True)
class Phase:
    """One of several parts of a training.

    Attributes:
        length: How long it lasts, relative to the other phases: epochs, if
            the lengths of all add up to the epochs of the training.
        train: Parts of the student that learn, as paths of submodules or
            parameters (``'backbone.layer1'``); None for all. What belongs to
            the phase's terms learns with them.
        freeze: Parts of these, or of the terms (``'terms.a.losses'``), that
            do not.
        terms: Names of the terms that count; None for all.
        supervised: Whether the detection loss counts. Without it no label is
            read by the student, and it runs only as far as the taps ask.
    """

    length: float = 1.0
    train: tuple[str, ...] | None = None
    freeze: tuple[str, ...] = ()
    terms: tuple[str, ...] | None = None
    supervised: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], number: int) -> Phase:
        """Read one entry of ``phases``.

        Raises:
            ValueError: If a setting is unknown or the length is not positive.
        """
        who = f'Phase {number}'
        known = [one.name for one in fields(cls)]
        for setting in config:
            check_name(who, 'setting', setting, known)
        lists = {
            name: check_names(who, name, config[name])
            for name in ('train', 'freeze', 'terms')
            if name in config and config[name] is not None
        }
        phase = cls(**{**config, 'freeze': (), **lists})
        numbers = dict(length=phase.length, supervised=phase.supervised)
        check_arguments(who, cls, numbers)
        check_positive(who, length=phase.length)
        return phase

    def counts(self, term: str) -> bool:
        return self.terms is None or term in self.terms

    def trains(self, path: str) -> bool:
        """Whether a part of the distilled student learns, by its path."""
        if _inside(path, self.freeze):
            return False
        top, _, rest = path.partition('.')
        if top == TERMS:
            return self.counts(rest.partition('.')[0])
        return self.train is None or _inside(path, self.train)

    def __str__(self) -> str:
        trained = 'all' if self.train is None else ', '.join(self.train)
        frozen = f' without {", ".join(self.freeze)}' if self.freeze else ''
        terms = 'all terms' if self.terms is None else ', '.join(self.terms)
        loss = ['the detection loss'] if self.supervised else []
        return (
            f'trains {trained or "nothing of the student"}{frozen} by '
            f'{" and ".join([*loss, *([terms] if terms else [])])}'
        )


class Phases:
    """The phases of a training, one after the other.

    Args:
        configs: Arguments of :class:`Phase` of each, in their order; one phase
            in which everything counts if None.

    Attributes:
        given: Whether any were named.
        now: The present one; None before the first step.

    Raises:
        ValueError: If there is none, or a setting is unknown.

    Example:
        >>> phases = Phases([dict(length=1, train='neck'), dict(length=3)])
        >>> phases.at(0.2).train, phases.at(0.25).train
        (('neck',), None)
    """

    def __init__(self, configs: Sequence[Mapping] | None = None) -> None:
        if configs is not None and not _is_list(configs):
            raise ValueError(
                f'Distiller takes phases as a list of dicts, one a phase, got '
                f'phases={configs!r}. Write for instance '
                f"phases=[dict(train='backbone'), dict(train='neck')]."
            )
        if configs is not None and not configs:
            raise ValueError(
                'Distiller got phases=[], a training without a phase. Leave '
                'phases out, or name at least one.'
            )
        self.phases = [
            Phase.of(config, number)
            for number, config in enumerate(configs or [{}], 1)
        ]
        self.given = configs is not None
        self.now: Phase | None = None
        self._trainable: dict[str, bool] = {}

    def __len__(self) -> int:
        return len(self.phases)

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    def at(self, progress: float) -> Phase:
        """The phase at a progress of the training in [0, 1]."""
        total = sum(phase.length for phase in self.phases)
        ends = itertools.accumulate(phase.length for phase in self.phases)
        for phase, end in zip(self.phases, ends):
            if progress < end / total:
                return phase
        return self.phases[-1]

    @property
    def number(self) -> int:
        """That of the present phase, from 1."""
        return 1 + next(
            index for index, one in enumerate(self.phases) if one is self.now
        )

    def check(self, model: nn.Module) -> None:
        """All names must be known, and each phase must have what it needs.

        Args:
            model: The distilled student, with its terms.

        Raises:
            ValueError: If a part or a term is unknown, a term counts in no
                phase, or a phase has nothing to train or to train it by.
        """
        terms = dict(model.terms.items())
        parts = [name for name, _ in model.named_modules()]
        parts += [name for name, _ in model.named_parameters()]
        for number, phase in enumerate(self.phases, 1):
            who = f'Phase {number}'
            for path in (*(phase.train or ()), *phase.freeze):
                if path not in parts:
                    raise ValueError(
                        f'{who}: {type(model).__name__} has no part {path!r} '
                        f'to train or freeze. {suggest(path, parts)}'
                    )
            for name in phase.terms or ():
                check_name(f'{who}: the distiller', 'term', name, terms)
            self._check_purpose(who, phase, model)
        unused = [
            name
            for name in terms
            if not any(phase.counts(name) for phase in self.phases)
        ]
        if unused:
            raise ValueError(
                f'Term {unused[0]!r} counts in none of the {len(self)} '
                f'phases. Name it under terms= of one, or leave it out.'
            )

    def _check_purpose(self, who: str, phase: Phase, model: nn.Module) -> None:
        trained = [
            name
            for name, one in model.named_parameters()
            if one.requires_grad and phase.trains(name)
        ]
        for path in phase.train or ('',):
            if not any(_inside(name, (path,)) for name in trained):
                raise ValueError(
                    f'{who} {phase}, but no parameter'
                    f'{" of " + path if path else ""} can be trained. The '
                    f'detector may freeze them itself '
                    f'(model.backbone.frozen_stages), or freeze= names them.'
                )
        if phase.supervised:
            return
        counting = {
            name: term
            for name, term in model.terms.items()
            if phase.counts(name)
        }
        if not counting:
            raise ValueError(
                f'{who} has supervised=False and no term: nothing is left to '
                f'learn by. Name its terms, or leave supervised out.'
            )
        for name, term in counting.items():
            if any(
                getattr(one, 'needs_detection', False)
                for one in term.modules()
            ):
                raise ValueError(
                    f'{who} has supervised=False, but term {name!r} weighs '
                    f'itself by the detection loss. Weigh its terms by '
                    f'loss_weight, outside of it.'
                )
            late = [
                one for one in term.student_paths if not in_forward(model, one)
            ]
            if late:
                raise ValueError(
                    f'{who} has supervised=False, but term {name!r} taps '
                    f'{late[0]!r}, which only the detection loss calls. Leave '
                    f'supervised out, or tap a part that the forward runs.'
                )

    def enter(self, progress: float, model: nn.Module) -> bool:
        """Move on to the phase at a progress; whether it is another.

        What is not trained loses its gradient, so that no optimiser touches
        it.
        """
        phase = self.at(progress)
        if phase is self.now:
            return False
        for name, one in model.named_parameters():
            allowed = self._trainable.setdefault(name, one.requires_grad)
            one.requires_grad_(allowed and phase.trains(name))
            if not one.requires_grad:
                one.grad = None
        self.now = phase
        return True

    def check_reach(self, losses: Mapping[str, Any]) -> None:
        """What counts must depend on what is trained.

        Args:
            losses: Of a step.

        Raises:
            RuntimeError: If no loss has a gradient.
        """
        if torch.is_grad_enabled() and not any(
            one.requires_grad
            for loss in losses.values()
            for one in (loss if isinstance(loss, (list, tuple)) else [loss])
        ):
            raise RuntimeError(
                f'Phase {self.number} {self.now}, but none of its losses '
                f'depends on what it trains. Train a part before the taps of '
                f'its terms, or name terms that tap after it.'
            )

    def rest(self, model: nn.Module) -> None:
        """Keep the statistics of what is not trained as they are.

        Only what has no parts of its own is put into evaluation: heads may
        compute another thing there.
        """
        if self.now is None:
            return
        for name, module in model.named_modules():
            if name and _is_leaf(module) and not self.now.trains(name):
                module.training = False  # what it holds may be trained


def _is_list(configs: Any) -> bool:
    return isinstance(configs, (list, tuple)) and all(
        isinstance(one, Mapping) for one in configs
    )


def _inside(path: str, parts: Sequence[str]) -> bool:
    return any(
        not one or path == one or path.startswith(f'{one}.') for one in parts
    )


def _is_leaf(module: nn.Module) -> bool:
    own = type(module).__module__.startswith('torch.nn.')
    return own or not any(True for _ in module.children())

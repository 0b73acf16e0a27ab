"""What each term does in a step: its share, its push, whether it has one.

A term that is not a number, that the student cannot follow, or that drowns
everything else is seen in the first step in which it counts, and not after a
night.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.distillers.distiller import Observer, position
from mmkd.engine.diagnostics import by_term
from mmkd.engine.findings import Finding
from mmkd.engine.resume import plain_model
from mmkd.ops.gradients import gradient
from mmkd.registry import HOOKS
from mmkd.structures import Step
from mmkd.teachers import still_statistics
from mmkd.terms.balanced import detection_loss
from mmkd.terms.self_teaching import SelfTerm

#: What the detector's own losses are called beside the terms.
DETECTION = 'detection'
#: A term that pushes so many times as much as all others is named.
TOO_MUCH = 100.0


@dataclass(frozen=True)
class Push:
    """What one summand of the loss does in a step.

    Attributes:
        name: Of the term, ``<group>_<term>`` inside of a group, or
            :data:`DETECTION`.
        value: Its part of the loss.
        share: The same as a fraction of all parts' absolute values.
        gradient: Length of its gradient to the student's parameters; None if
            it depends on none that is trained.
        part: The same as a fraction of all summands' lengths.
        cosine: Between its gradient and that of the detection loss; None
            where there is none of either.
        broken: Logged losses that are not finite, ``'loss_kd_a = nan'``.
    """

    name: str
    value: float
    share: float
    gradient: float | None
    part: float
    cosine: float | None
    broken: tuple[str, ...] = ()


def counting(model: nn.Module, progress: float) -> dict[str, bool]:
    """Which terms count at a progress, groups and those inside of them.

    Args:
        model: A distilled student.
        progress: Position in the training, [0, 1].
    """
    phase, found = model.phases.at(progress), {}
    for name, term in model.terms.items():
        counts = (
            phase.counts(name)
            and not term.silent()
            and bool(term.schedule(progress))
        )
        found[name] = counts
        for child, one in (getattr(term, 'terms', None) or {}).items():
            heard = not one.silent() and bool(one.schedule(progress))
            found[f'{name}_{child}'] = counts and heard
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The student's parameters that learn now, without those of terms."""
    return [
        one
        for name, one in model.named_parameters()
        if one.requires_grad and not name.startswith('terms.')
    ]


def measure(
    model: nn.Module,
    own: Mapping[str, Any],
    losses: Mapping[str, Any],
    names: Sequence[str] | None = None,
    alone: bool = False,
) -> list[Push]:
    """What the summands of a step do; its graph is kept.

    Args:
        model: The detector, distilled or not.
        own: The detector's own losses; none in a phase without them.
        losses: All of the step.
        names: Terms that count in it; all if None.
        alone: Whether nobody else needs the gradients that parameters hold,
            so that a whole backward pass may be made where activations are
            checkpointed in a way that allows no other.

    Returns:
        The detection loss first, if there is one.

    Raises:
        RuntimeError: If they are and it may not.
    """
    parts = by_term(getattr(model, 'terms', {}), losses)
    parts = {
        name: one
        for name, one in parts.items()
        if names is None or name in names
    }
    if own:
        parts = {DETECTION: own, **parts}
    totals = {name: detection_loss(one) for name, one in parts.items()}
    parameters = trained(model)
    pushes, first, rows = {}, None, []
    # What is computed a second time, of checkpointed activations, must not
    # be counted by statistics twice.
    with still_statistics(model):
        for name, total in totals.items():
            found = _gradient(total, parameters, alone)
            cosine = None
            if found is not None and first is not None and name != DETECTION:
                cosine = float(torch.cosine_similarity(first, found, 0))
            first = found if name == DETECTION else first
            norm = None if found is None else float(found.norm())
            pushes[name] = norm, cosine
    value = {name: float(one.detach()) for name, one in totals.items()}
    whole = sum(abs(one) for one in value.values() if math.isfinite(one))
    norms = sum(
        norm for norm, _ in pushes.values() if norm and math.isfinite(norm)
    )
    for name, (norm, cosine) in pushes.items():
        rows.append(
            Push(
                name,
                value[name],
                abs(value[name]) / whole if whole else 0.0,
                norm,
                (norm or 0.0) / norms if norms else 0.0,
                cosine,
                _broken(parts[name]),
            )
        )
    return rows


def _gradient(
    loss: Tensor, parameters: Sequence[nn.Parameter], alone: bool
) -> Tensor | None:
    if not parameters:
        return None
    try:
        return gradient(loss, parameters)
    except RuntimeError as error:
        if not alone or 'use_reentrant' not in str(error):
            raise
    for one in parameters:
        one.grad = None
    loss.backward(retain_graph=True)
    found = [one.grad for one in parameters]
    for one in parameters:
        one.grad = None
    if all(one is None for one in found):
        return None
    return torch.cat(
        [
            (torch.zeros_like(like) if one is None else one).flatten().float()
            for one, like in zip(found, parameters)
        ]
    )


def _broken(losses: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    for name, value in losses.items():
        if 'loss' not in name:
            continue
        several = value if isinstance(value, (list, tuple)) else [value]
        for level, one in enumerate(several):
            number = float(one.detach().float().mean())
            if not math.isfinite(number):
                place = f'[{level}]' if len(several) > 1 else ''
                found.append(f'{name}{place} = {number:g}')
    return tuple(found)


def judged(
    pushes: Sequence[Push],
    model: nn.Module,
    terms: Mapping[str, Any],
    again: bool = False,
) -> list[Finding]:
    """What there is to say of a step.

    Args:
        pushes: From :func:`measure`.
        model: The detector.
        terms: ``model.terms`` of the config, for what to type.
        again: Whether several batches said the same, so that a term of zero
            is no accident of one.

    Returns:
        What is not as it should be; nothing for a sound step.
    """
    resting = not trained(model)
    found = [_judged(push, model, terms, resting, again) for push in pushes]
    return [
        *(one for one in found if one is not None),
        *_of_weight(pushes, terms),
    ]


def _judged(
    push: Push,
    model: nn.Module,
    terms: Mapping[str, Any],
    resting: bool,
    again: bool,
) -> Finding | None:
    own, about = push.name == DETECTION, push.name
    who = 'The detection loss' if own else f'Term {push.name!r}'
    if push.broken or not math.isfinite(push.gradient or 0.0):
        said = ', '.join(push.broken) or (
            f'a gradient of length {push.gradient:g}'
        )
        return Finding(
            'fail',
            f'{who} is not finite: {said}.',
            'Lower the learning rate, clip gradients, or leave --amp out.'
            if own
            else _lower(push.name, terms, 10.0),
            about,
        )
    if resting:
        return Finding(
            'note',
            f'{who} moves no part of the student in this phase.',
            about=about,
        )
    if push.gradient is None:
        return Finding(
            'fail',
            f'{who} does not move the student: it depends on none of its '
            f'parameters that are trained. Its tap may lie in a part that is '
            f'frozen, or the loss detaches the student.',
            'Tap a part that is trained, as the neck, or train more: '
            '--cfg-options model.backbone.frozen_stages=-1',
            about,
        )
    if push.gradient:
        return None
    if not own and _begins_alike(push.name, model):
        return Finding(
            'note',
            f'{who} is {push.value:g}: what it compares begins alike.',
            about=about,
        )
    return Finding(
        'fail' if again else 'warn',
        f'{who} is {push.value:g}, and its gradient to the student is 0'
        f'{" in every batch looked at" if again else " in this batch"}.',
        'See that batches have boxes.'
        if own
        else 'Give it another tap or weight, or leave it out.',
        about,
    )


def _begins_alike(label: str, model: nn.Module) -> bool:
    """Whether a term says of itself that it begins at zero."""
    for name, term in model.terms.items():
        if label == name or label.startswith(f'{name}_'):
            return any(
                isinstance(one, SelfTerm) or getattr(one, 'from_nothing', ())
                for one in term.modules()
            )
    return False


def _of_weight(
    pushes: Sequence[Push], terms: Mapping[str, Any]
) -> list[Finding]:
    """Terms that are so many times all the rest."""
    found = []
    for push in pushes:
        if push.name == DETECTION or len(pushes) == 1:
            continue
        pushed, shared = _times(push.part), _times(push.share)
        who = f'Term {push.name!r} is'
        if pushed >= TOO_MUCH:
            found.append(
                Finding(
                    'warn',
                    f'{who} {pushed:.3g} times the rest of the gradient: the '
                    f'student follows it alone.',
                    _lower(push.name, terms, pushed),
                    push.name,
                )
            )
        elif shared >= TOO_MUCH:
            found.append(
                Finding(
                    'note',
                    f'{who} {shared:.3g} times the rest of the loss, and '
                    f'{pushed:.3g} times that of the gradient: in the logged '
                    f'sum nothing else is seen.',
                    about=push.name,
                )
            )
    return found


def _times(fraction: float) -> float:
    """How many times all else.

    Example:
        >>> _times(0.75)
        3.0
    """
    return fraction / (1 - fraction) if fraction < 1 else math.inf


def _lower(label: str, terms: Mapping[str, Any], ratio: float) -> str:
    """How a term's weight is divided by a number."""
    for place, weight in _weights(terms, 'model.terms', ''):
        name, where = place
        if name == label and weight:
            lower = weight / ratio if math.isfinite(ratio) else 1.0
            return f'Type: --cfg-options {where}={lower:.2g}'
    return f'Lower the weight of {label} in model.terms.'


def _weights(terms: Mapping[str, Any], where: str, prefix: str) -> list:
    found = []
    for name, config in terms.items():
        label, place = f'{prefix}{name}', f'{where}.{name}'
        if not isinstance(config, Mapping):
            continue
        loss = config.get('loss')
        if isinstance(loss, Mapping):
            # What a config leaves out has its default, 1 in most losses.
            weight = loss.get('loss_weight', 1.0)
            found.append(((label, f'{place}.loss.loss_weight'), weight))
        elif isinstance(config.get('loss_weight'), (int, float)):
            found.append(
                ((label, f'{place}.loss_weight'), config['loss_weight'])
            )
        children = config.get('terms')
        if isinstance(children, Mapping):
            found += _weights(children, f'{place}.terms', f'{label}_')
    return found


def in_words(push: Push) -> str:
    """One line of a log."""
    told = f'{push.share:.1%} of the loss'
    if push.gradient is not None:
        told += f', {push.part:.1%} of the gradient'
    if push.cosine is not None:
        told += f', cosine to the detection loss {push.cosine:.2f}'
    return f'{push.name}: {told}'


# ------------------------------------------------------------------- training


@HOOKS.register_module()
class FirstStepHook(Hook):
    """Looks at the first step in which each term counts.

    It takes no part in the training: with or without it, every weight is the
    same. What it finds are warnings; a loss that is not a number stops the
    training anyway.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._due: list[str] = []
        self._watched = False

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look at this step if a term counts that did not before."""
        model = plain_model(runner)
        if not hasattr(model, 'terms'):
            return
        counts = counting(model, position()[1])
        self._due = [
            name
            for name, now in counts.items()
            if now and name not in self._seen
        ]
        if self._due:
            self._watched = True
            terms = runner.cfg.model.get('terms', {})
            model.observer = _Both(
                model.observer,
                lambda step, losses: self._look(model, terms, step, losses),
            )

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Let go of the model."""
        if self._watched:
            self._watched = False
            model = plain_model(runner)
            model.__dict__.pop('observer', None)

    def _look(
        self,
        model: nn.Module,
        terms: Mapping[str, Any],
        step: Step,
        losses: Mapping[str, Tensor],
    ) -> None:
        self._seen.update(self._due)
        counts = counting(model, step.progress)
        now = [name for name, counts in counts.items() if counts]
        try:
            pushes = measure(model, step.losses, losses, now)
        except RuntimeError as error:  # of a graph that is read once
            _say('INFO', f'The terms could not be measured: {error}')
            return
        for one in judged(pushes, model, terms):
            if one.about in self._due:
                _say('INFO' if one.mark == 'note' else 'WARNING', str(one))
        for push in pushes:
            _say('INFO', f'Iteration {step.iteration + 1}, {in_words(push)}.')


def _say(level: str, text: str) -> None:
    if is_main_process():
        print_log(text, logger='current', level=logging.getLevelName(level))


class _Both:
    """Two observers of one step."""

    def __init__(
        self,
        first: Observer | None,
        second: Callable[[Step, Mapping[str, Any]], None],
    ) -> None:
        self.first, self.second = first, second
        self.paths = () if first is None else first.paths

    def __call__(self, step: Step, losses: Mapping[str, Any]) -> None:
        if self.first is not None:
            self.first(step, losses)
        self.second(step, losses)

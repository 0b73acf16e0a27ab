"""What distillation does to a training: shares, directions, agreement."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.losses.pkd import pkd_loss
from mmkd.ops.gradients import gradient
from mmkd.registry import HOOKS
from mmkd.structures import Step
from mmkd.taps import maps_of
from mmkd.terms.balanced import detection_loss
from mmkd.terms.feature import FeatureTerm

#: Its lines, one JSON object a measurement, in the work directory.
FILE = 'diagnostics.json'


@HOOKS.register_module()
class DiagnosticsHook(Hook):
    """Measures every term now and then, and hands it to the visualiser.

    It takes no part in the training: with or without it, every weight is the
    same. Of each term, where it applies:

    - ``share``: its part of the whole loss;
    - ``gradient``: length of its gradient relative to the detection loss's, at
      the student's ``anchor``;
    - ``cosine``: between these two gradients; negative where they quarrel;
    - ``agreement_<level>``: correlation of the student's and teacher's maps
      (as PKD measures it: 1 for one pattern, 0 for unrelated ones).

    And of each teacher ``scores``: the correlation of both detectors' class
    probabilities, where their heads give maps of one shape.

    Values appear in every visualiser backend (``scalars.json``, TensorBoard,
    W&B …) as ``diagnostics/<term>_<name>``, and in ``diagnostics.json`` of the
    work directory.

    Args:
        interval: Iterations between measurements; each costs about one more
            step.
        anchor: Tap of the student at which gradients are measured.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 50, anchor: str = 'backbone') -> None:
        check_positive('DiagnosticsHook', interval=interval)
        self.interval, self.anchor = interval, anchor
        self._found: dict[str, float] = {}

    def before_run(self, runner: Any) -> None:
        if not hasattr(_plain(runner.model), 'terms'):
            print_log(
                'DiagnosticsHook: this model distils nothing, so there is '
                'nothing to measure.',
                logger='current',
                level=logging.WARNING,
            )

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        model = _plain(runner.model)
        if hasattr(model, 'terms') and runner.iter % self.interval == 0:
            model.observer = _Observer(self.anchor, model, self._found)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        _plain(runner.model).observer = None
        if not self._found:
            return
        found = dict(self._found)
        self._found.clear()
        if not is_main_process():
            return
        step = runner.iter + 1
        runner.visualizer.add_scalars(
            {f'diagnostics/{name}': value for name, value in found.items()},
            step=step,
        )
        path = Path(runner.work_dir, FILE)
        with path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(dict(iteration=step, **found)) + '\n')


class _Observer:
    """Looks at one step."""

    def __init__(
        self, anchor: str, model: nn.Module, found: dict[str, float]
    ) -> None:
        self.anchor, self.model, self.found = anchor, model, found
        self.paths = [anchor]
        if isinstance(getattr(model, 'bbox_head', None), nn.Module):
            self.paths.append('bbox_head')

    def __call__(self, step: Step, losses: Mapping[str, Any]) -> None:
        found: dict[str, Tensor] = {}
        found |= self._losses(step, losses)
        with torch.no_grad():
            for name, term in _features(self.model.terms):
                found |= _agreement(name, term, step)
            for name in self.model.teachers:
                found |= self._scores(name, step)
        self.found.update(
            {name: float(value) for name, value in found.items()}
        )

    def _losses(
        self, step: Step, losses: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not step.losses:
            return {}  # a phase without them: nothing to compare with
        detection = detection_loss(step.losses)
        total = detection_loss(losses).detach()
        maps = [
            one
            for one in maps_of(step.student.at(self.anchor), 'The anchor')
            if one.requires_grad
        ]
        own = gradient(detection, maps) if maps else None
        found = {}
        for name, parts in by_term(self.model.terms, losses).items():
            loss = sum(parts.values())
            found[f'{name}_share'] = loss.detach() / total
            push = gradient(loss, maps) if maps else None
            if own is None or push is None or not push.any():
                continue
            found[f'{name}_gradient'] = push.norm() / own.norm()
            found[f'{name}_cosine'] = torch.cosine_similarity(own, push, 0)
        return found

    def _scores(self, name: str, step: Step) -> dict[str, Tensor]:
        teacher = self.model.teachers[name]
        head = getattr(teacher.detector, 'bbox_head', None)
        if len(self.paths) < 2 or not isinstance(head, nn.Module):
            return {}
        shown = teacher.run(
            step.images, step.samples, self.model._pixels, ['bbox_head']
        )
        try:
            own, other = (
                maps_of(record.at('bbox_head'), 'The head', 0)
                for record in (step.student, shown)
            )
        except (ValueError, RuntimeError):  # a head of another kind
            return {}
        if [one.shape for one in own] != [one.shape for one in other]:
            return {}
        both = torch.stack(
            [
                torch.cat([one.float().sigmoid().flatten() for one in maps])
                for maps in (own, other)
            ]
        )
        return {f'{name}_scores': torch.corrcoef(both)[0, 1]}


def by_term(
    terms: Mapping[str, nn.Module], losses: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Logged losses of each term by its name; a group's terms apart.

    A loss belongs to the term whose name is the longest that it begins with.

    Args:
        terms: By name.
        losses: Of a step.

    Example:
        >>> terms = dict(kd=nn.Module(), kd_box=nn.Module())
        >>> by_term(terms, dict(loss_kd_kd=1, loss_kd_kd_box_near=2))
        {'kd': {'loss_kd_kd': 1}, 'kd_box': {'loss_kd_kd_box_near': 2}}
    """
    names = [
        label
        for name, term in terms.items()
        for label in (name, *(f'{name}_{one}' for one in _children(term)))
    ]
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in losses.items():
        own = key.removeprefix('loss_kd_')
        fits = [
            name
            for name in names
            if own != key and (own == name or own.startswith(f'{name}_'))
        ]
        if fits:
            found[max(fits, key=len)][key] = value
    return {name: parts for name, parts in found.items() if parts}


def _children(term: nn.Module) -> Iterable[str]:
    return getattr(term, 'terms', None) or ()


def _features(
    terms: Mapping[str, nn.Module], prefix: str = ''
) -> Iterator[tuple[str, FeatureTerm]]:
    for name, term in terms.items():
        if isinstance(term, FeatureTerm):
            yield prefix + name, term
        elif getattr(term, 'transparent', False):
            yield from _features(term.terms, f'{prefix}{name}_')


def _agreement(name: str, term: FeatureTerm, step: Step) -> dict[str, Tensor]:
    if not all(step.student.has(path) for path in term.taps):
        return {}  # idle in this step
    own, other = term.maps(step)
    if term.align is not None:
        own = term.align(own, other)
    return {
        f'{name}_agreement_{level}': 1 - pkd_loss(one, like)
        for level, (one, like) in enumerate(zip(own, other))
        if one.shape == like.shape
    }


def _plain(model: nn.Module) -> nn.Module:
    return getattr(model, 'module', model)

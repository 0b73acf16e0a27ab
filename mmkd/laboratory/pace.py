"""How long a training step takes, one arm relative to another."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmkd.engine.random_state import keyed
from mmkd.memory import digest
from mmkd.randomness import preserved
from mmkd.teachers import Teachers

#: Different batches that the steps go through.
BATCHES = 4


def step_times(
    arms: Mapping[str, Config], rounds: int = 8
) -> dict[str, list[float]]:
    """Seconds of training steps, the arms taking turns.

    A B C A B C …, so that a machine that slows down slows all of them; each
    turn is one step on each of :data:`BATCHES` batches, which are loaded
    beforehand and the same for every arm with the same data. One round is not
    counted.

    An arm whose teacher has a cache is timed twice: under its name with every
    image known, and under :func:`fresh` of it with every image new.

    Args:
        arms: Training configs by name.
        rounds: Turns of each.

    Returns:
        Seconds a step in each round, by arm.
    """
    with preserved(0):
        loaded: dict[str, list] = {}
        turns: dict[str, Callable[[], None]] = {}
        for name, settings in arms.items():
            key = str(settings.get('train_dataloader'))
            if key not in loaded:
                loaded[key] = load_batches(settings)
            steps = _Steps(settings)
            turns[name] = partial(steps, loaded[key])
            if steps.cached:
                turns[fresh(name)] = partial(
                    _Steps(settings), loaded[key], forget=True
                )
        times: dict[str, list[float]] = {name: [] for name in turns}
        with _no_collection():
            for turn in range(rounds + 1):
                for name, take in turns.items():
                    begin = time.perf_counter()
                    take()
                    if turn:
                        seconds = time.perf_counter() - begin
                        times[name].append(seconds / BATCHES)
    return times


def fresh(arm: str) -> str:
    """The name of an arm's steps on images that its teacher has not seen."""
    return f'{arm}, new images'


def ratios(
    times: Mapping[str, list[float]],
    base: str = 'alone',
    new: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Medians of the rounds' ratios to one arm.

    Args:
        times: As :func:`step_times` returns them.
        base: The arm whose steps are 1.
        new: Share of images that an arm's teacher has not seen before, by
            arm, where it is timed with and without.

    Example:
        >>> times = dict(alone=[1.0, 2.0, 4.0], pkd=[1.5, 3.0, 8.0])
        >>> ratios(times)
        {'alone': 1.0, 'pkd': 1.5}
        >>> ratios({**times, fresh('pkd'): [2.5, 5.0, 9.0]}, new=dict(pkd=0.1))
        {'alone': 1.0, 'pkd': 1.6}
    """
    found = {}
    for name, taken in times.items():
        if name in map(fresh, times):
            continue
        share = (new or {}).get(name, 0.0)
        others = times.get(fresh(name), taken)
        found[name] = statistics.median(
            ((1 - share) * known + share * first) / one
            for known, first, one in zip(taken, others, times[base])
        )
    return found


def new_images(settings: Config, steps: int, most: int = 6000) -> float:
    """Share of a training's images that are unlike every one before.

    Its images are loaded and augmented as they will be, in their order, until
    the training or ``most`` of them are through. Of a longer training the
    share is smaller still.

    Args:
        settings: A training config.
        steps: Iterations of the training.
        most: Images looked at.
    """
    seen: set[tuple] = set()
    shown = 0
    with preserved(0), keyed(0):
        for batch in islice(_batches(settings), steps):
            images = batch['inputs']
            size = max(one.shape[-2:] for one in images)
            seen |= {(digest(one), size) for one in images}
            shown += len(images)
            if shown >= most:
                break
    return len(seen) / shown


class _Steps:
    """Training steps of one arm."""

    def __init__(self, settings: Config) -> None:
        init_default_scope(settings.get('default_scope', 'mmdet'))
        self.model = MODELS.build(settings.model)
        self.model.init_weights()
        self.model.train()
        self.wrapper = build_optim_wrapper(self.model, settings.optim_wrapper)
        self.iteration = 0
        self.teachers = getattr(self.model, 'teachers', Teachers())

    @property
    def cached(self) -> bool:
        return any(one.memory is not None for one in self.teachers.values())

    def __call__(self, batches: list[Any], forget: bool = False) -> None:
        # What a term does at intervals it must not do at every step.
        hub = MessageHub.get_current_instance()
        for batch in batches:
            if forget:
                self.teachers.forget()
            hub.update_info('iter', self.iteration)
            self.model.train_step(batch, self.wrapper)
            self.iteration += 1
        hub.update_info('iter', 0)


def load_batches(
    settings: Config, count: int = BATCHES, seed: int = 0
) -> list[Any]:
    """The first batches of a training set, for a seed always the same."""
    with keyed(seed):
        return list(islice(_batches(settings), count))


def _batches(settings: Config) -> Iterator[Any]:
    """Batches of a training, without end."""
    init_default_scope(settings.get('default_scope', 'mmdet'))
    loader = dict(settings.train_dataloader, num_workers=0)
    loader['persistent_workers'] = False
    loader = Runner.build_dataloader(loader, seed=0)
    while True:
        yield from loader


@contextmanager
def _no_collection() -> Any:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if was:
            gc.enable()

"""How long a training step takes, one arm relative to another."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmkd.engine.random_state import keyed
from mmkd.randomness import preserved

#: Different batches that the steps go through.
BATCHES = 4


def step_times(
    arms: Mapping[str, Config], rounds: int = 8
) -> dict[str, list[float]]:
    """Seconds of training steps, the arms taking turns.

    A B C A B C …, so that a machine that slows down slows all of them; each
    turn is one step on each of :data:`BATCHES` batches, which are the same for
    every arm and loaded beforehand. One round is not counted.

    Args:
        arms: Training configs by name, of one data set.
        rounds: Turns of each.

    Returns:
        Seconds a step in each round, by arm.
    """
    with preserved(0):
        batches = load_batches(next(iter(arms.values())))
        steps = {name: _Steps(one) for name, one in arms.items()}
        times: dict[str, list[float]] = {name: [] for name in arms}
        with _no_collection():
            for turn in range(rounds + 1):
                for name, step in steps.items():
                    begin = time.perf_counter()
                    for batch in batches:
                        step(batch)
                    if turn:
                        seconds = time.perf_counter() - begin
                        times[name].append(seconds / len(batches))
    return times


def ratios(
    times: Mapping[str, list[float]], base: str = 'alone'
) -> dict[str, float]:
    """Medians of the rounds' ratios to one arm.

    Example:
        >>> ratios(dict(alone=[1.0, 2.0, 4.0], pkd=[1.5, 3.0, 8.0]))
        {'alone': 1.0, 'pkd': 1.5}
    """
    return {
        name: statistics.median(
            one / other for one, other in zip(taken, times[base])
        )
        for name, taken in times.items()
    }


class _Steps:
    """Training steps of one arm."""

    def __init__(self, settings: Config) -> None:
        init_default_scope(settings.get('default_scope', 'mmdet'))
        self.model = MODELS.build(settings.model)
        self.model.init_weights()
        self.model.train()
        self.wrapper = build_optim_wrapper(self.model, settings.optim_wrapper)
        self.iteration = 0

    def __call__(self, batch: Any) -> None:
        # What a term does at intervals it must not do at every step.
        hub = MessageHub.get_current_instance()
        hub.update_info('iter', self.iteration)
        self.model.train_step(batch, self.wrapper)
        self.iteration += 1
        hub.update_info('iter', 0)


def load_batches(settings: Config) -> list[Any]:
    """The first :data:`BATCHES` batches of a training set, always the same."""
    init_default_scope(settings.get('default_scope', 'mmdet'))
    loader = settings.train_dataloader
    dataset = DATASETS.build(loader.dataset)
    size = loader.batch_size
    with keyed(0):
        return [
            pseudo_collate(
                [
                    dataset[(start + index) % len(dataset)]
                    for index in range(size)
                ]
            )
            for start in range(0, BATCHES * size, size)
        ]


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

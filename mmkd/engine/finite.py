"""Stops a training whose loss is not a number, plain students included."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner

from mmkd.distillers.guard import Guard
from mmkd.registry import HOOKS


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Looks at every loss before the next step, and before weights are saved.

    A distilled student looks by itself. In mixed precision with a dynamic
    scale a step whose loss overflows is skipped, so nothing is looked at.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._guard = Guard()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look at the losses of the step before."""
        self._guard.check()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Remember the losses of this step."""
        if isinstance(runner.optim_wrapper, AmpOptimWrapper):
            return
        losses = {
            name: value
            for name, value in (outputs or {}).items()
            if 'loss' in name
        }
        if losses:
            self._guard.watch(losses, runner.iter)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Never save what a broken step left."""
        self._guard.check()

"""A stopped training goes on as if it had not been stopped.

MMEngine saves weights, optimiser, schedulers, averages and logs. This hook
adds what it leaves out: the random state and the place in the data of every
rank, gradients that wait for their step, plain attributes of modules, what
modules hand over themselves (``run_state``, ``load_run_state``), and whether
the validation that was due has been done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from mmkd.engine.attributes import (
    changed_attributes,
    plain_attributes,
    set_attributes,
)
from mmkd.engine.draws import Place
from mmkd.engine.fit import drop_terms
from mmkd.engine.random_state import capture, restore
from mmkd.registry import HOOKS

#: Where a checkpoint holds what this hook adds.
KEY = 'mmkd_resume'


@HOOKS.register_module()
class ResumeHook(Hook):
    """Adds to checkpoints what an exact resumption needs, and takes it back.

    :class:`mmkd.engine.trainer.Trainer` registers it; a config need not.

    Attributes:
        validating: Whether a validation is under way.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.validating = False
        self._loaded: dict[str, Any] | None = None
        self._ranks: list[dict] | None = None
        self._outside: dict | None = None
        self._built: dict[str, dict] = {}

    # ------------------------------------------------------------- saving

    def collect(self, runner: Runner) -> None:
        """Bring every rank's state together; all ranks call it."""
        self._ranks = all_gather_object(self._own(runner))

    def _own(self, runner: Runner) -> dict:
        state = dict(random=self._outside or capture())
        place = getattr(runner.train_dataloader, 'place', None)
        if place is not None:
            state['place'] = place.to_dict()
        waiting = {
            name: one.grad.cpu()
            for name, one in plain_model(runner).named_parameters()
            if one.grad is not None
        }
        if waiting:
            state['gradients'] = waiting
        kept = {
            name: module.run_state()
            for name, module in plain_model(runner).named_modules()
            if hasattr(module, 'run_state')
        }
        if kept:
            state['modules'] = kept
        return state

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the state that :meth:`collect` brought together."""
        checkpoint[KEY] = dict(
            version=1,
            ranks=self._ranks or [self._own(runner)],
            attributes=changed_attributes(plain_model(runner), self._built),
            validated=self.validating,
        )
        self._ranks = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Validate inside: what it draws leaves the training's numbers alone.

        A checkpoint written meanwhile holds the state from outside.
        """
        self._outside, self.validating = capture(), True
        try:
            yield
        finally:
            restore(self._outside)
            self._outside, self.validating = None, False

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Leave a validation when asked to stop."""
        # Ranks may have unequal shares of the validation data, so that they
        # cannot agree inside of it.
        if self.validating and get_world_size() == 1:
            runner.interrupts.leave_validation_if_asked()

    # ------------------------------------------------------------ resuming

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember what the checkpoint holds until the loop starts."""
        if runner._resume:
            self._loaded = checkpoint.get(KEY, {})
            return
        dropped = drop_terms(plain_model(runner), checkpoint)
        if dropped:
            runner.logger.info(
                f'{dropped} tensors of distillation terms were passed over: '
                f'this config has no terms.'
            )

    def take_up(self, runner: Runner) -> bool:
        """Put everything back; a loop calls it just before its first step.

        Returns:
            Whether the run that was stopped may still owe a validation.
        """
        model = plain_model(runner)
        self._built = plain_attributes(model)
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return False
        ranks = loaded.get('ranks', [])
        if len(ranks) != get_world_size():
            _go_on_roughly(runner, ranks)
            return False
        own = ranks[get_rank()]
        set_attributes(model, loaded['attributes'])
        _set_gradients(model, own.get('gradients', {}))
        modules = dict(model.named_modules())
        for name, state in own.get('modules', {}).items():
            modules[name].load_run_state(state)
        if 'place' in own:
            runner.train_dataloader.go_to(Place(**own['place']))
        restore(own['random'])
        return not loaded['validated']


def plain_model(runner: Runner) -> nn.Module:
    """The detector inside of DDP's wrapper, if there is one."""
    model = runner.model
    return model.module if is_model_wrapper(model) else model


def _set_gradients(model: nn.Module, gradients: dict) -> None:
    parameters = dict(model.named_parameters())
    for name, value in gradients.items():
        parameters[name].grad = value.to(parameters[name].device)


def _go_on_roughly(runner: Runner, ranks: list) -> None:
    """Resume where random state and place are not known for every rank."""
    loader, loop = runner.train_dataloader, runner.train_loop
    batches = loop.iter - loop.epoch * len(loader)
    if isinstance(loop, EpochBasedTrainLoop) and batches not in range(
        len(loader) + 1
    ):
        batches = 0  # the data set has changed its size
    loader.go_to(Place(loop.epoch, batches))
    reason = (
        f'was written on {len(ranks)} ranks and goes on with '
        f'{get_world_size()}'
        if ranks
        else 'was not written by mmkd and holds no random state'
    )
    runner.logger.warning(
        f'The checkpoint {reason}: training goes on from its weights, '
        f'optimiser and iteration, but not bit for bit as if it had never '
        f'stopped.'
    )

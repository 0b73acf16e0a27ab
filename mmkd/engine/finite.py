"""A loss or gradient that is not a number ends a training, or its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.distillers.guard import Guard, advice, describe
from mmkd.engine.replay import blame, save_batch
from mmkd.engine.resume import plain_model
from mmkd.registry import HOOKS

POLICIES = ('stop', 'skip')
#: Where a checkpoint says how many steps in a row were skipped.
IN_A_ROW = 'non_finite_in_a_row'


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Looks at every loss and every gradient, plain students included.

    A message names loss, level or parameter, and iteration. The trainer
    registers this hook; name it in ``custom_hooks`` to set it otherwise.

    ``policy='stop'`` looks one step late, so that nothing waits for the
    device, and before weights are saved. The weights of the run are broken by
    then; those of the last checkpoint are not.

    ``policy='skip'`` looks before the optimiser steps, which waits for the
    device once a step, and leaves a broken step out: weights, optimiser,
    averages, buffers and learning rate stay as they were; data and iteration
    go on. It also tries which loss has the broken gradient.

    Of a loss scaler (``--amp``) an overflow is no fault: it skips the step
    and lowers its scale, here as without this hook. A loss that is no number
    has not been scaled, and counts.

    Args:
        policy: ``'stop'`` or ``'skip'``.
        limit: Most steps in a row that are skipped; one more stops.
        batches: Most batches that led there to write into the work
            directory, for :func:`mmkd.engine.replay.load_batch`; 0 for none.

    Raises:
        ValueError: If an argument is out of range.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self, policy: str = 'stop', limit: int = 5, batches: int = 1
    ) -> None:
        check_name('FiniteLossHook', 'policy', policy, POLICIES)
        for name, value, least in (
            ('limit', limit, 1),
            ('batches', batches, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f'FiniteLossHook expected {name} to be a whole number of '
                    f'at least {least}, got {value!r}.'
                )
        self.policy, self.limit, self.batches = policy, limit, batches
        self.guard = Guard()
        self.skipped = False
        self._runner: Runner | None = None
        self._batch: Any = None
        self._gradients: list[tuple[str, nn.Parameter]] = []
        self._kept: _Kept | None = None
        #: What was broken in a step whose gradients only add up.
        self._earlier: tuple[list[str], list[str]] = ([], [])

    # ------------------------------------------------------------- begin, end

    def before_train(self, runner: Runner) -> None:
        """Find where to look; a distilled student has a guard of its own."""
        self._runner, model = runner, plain_model(runner)
        own = getattr(model, '_guard', None)
        if own is None:
            self.guard = Guard()
            model.parse_losses = _watching(model.parse_losses, self)
        else:
            self.guard = own
        self.guard.witness = self._witness
        self._gradients = list(model.named_parameters())
        for one in _wrappers(runner):
            # Schedulers have set such an attribute, too, to count the steps.
            one.step = _asking(one, one.step, self.may_step)
        if self.policy == 'skip':
            self._kept = _Kept(model, _wrappers(runner))
            for hook in runner.hooks:
                if isinstance(hook, (EMAHook, ParamSchedulerHook)):
                    hook.__class__ = resting_class(type(hook))
                    hook.rests = lambda: self.skipped

    def after_train(self, runner: Runner) -> None:
        """Look at the last step; leave nothing behind in the model."""
        if self.policy == 'stop':
            self.guard.check()
        self.guard.witness = None
        vars(plain_model(runner)).pop('parse_losses', None)
        for one in _wrappers(runner):
            one.step = one.step.plain

    # -------------------------------------------------------------- each step

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look at the step before, which the device has finished."""
        self.skipped = False
        if self.policy == 'stop':
            self.guard.check()
        else:
            self._kept.keep_once()
        self._batch = data_batch

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Of a step after which the optimiser waits, note what it was."""
        if self.policy == 'skip':
            then = f'in iteration {runner.iter + 1}'
            for found, now in zip(self._earlier, self.guard.look()):
                found.extend(f'{one} {then}' for one in now)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Never save what a broken step left."""
        if self.policy == 'stop':
            self.guard.check()

    def may_step(self, wrapper: OptimWrapper) -> bool:
        """Whether the optimiser may step with the gradients there are."""
        scaled = (
            isinstance(wrapper, AmpOptimWrapper)
            and wrapper.loss_scaler.is_enabled()
        )
        names, sizes = largest(self._gradients)
        if names:
            self.guard.watch_gradients(names, sizes, scaled)
        return self.policy == 'stop' or self._judge(scaled)

    def _judge(self, scaled: bool) -> bool:
        losses, gradients = self.guard.look()
        losses, gradients = (
            self._earlier[0] + losses,
            [*dict.fromkeys(self._earlier[1] + gradients)],
        )
        self._earlier = ([], [])
        overflow = scaled and bool(self.guard.overflows)
        if not _on_any_rank(bool(losses or gradients)):
            if overflow:  # the scaler skips this step by itself
                self._kept.put_back()
                self.skipped = True
            else:
                self._count(0)
            self._kept.forget()
            return True
        self._kept.put_back()
        self._kept.forget()
        self._skip(losses, gradients)
        return False

    def _skip(self, losses: list[str], gradients: list[str]) -> None:
        runner = self._runner
        what = describe(losses, gradients)
        if not losses and not gradients:
            what = 'A loss or gradient of another rank is not finite'
        elif not losses and get_world_size() == 1:
            what += f' ({self._blame()})'
        what += f' at iteration {runner.iter + 1}.'
        row = runner.message_hub.get_info(IN_A_ROW, 0) + 1
        if row > self.limit:
            self.guard.stop(
                f'{what} {self.limit} steps before it were skipped, which is '
                f'the limit. The weights are those before them.',
                advice(losses, gradients),
            )
        self._count(row)
        self.skipped = True
        runner.logger.warning(
            f'{what} The step is skipped, number {row} in a row of at most '
            f'{self.limit}. {self._witness(what)}'.rstrip()
        )

    def _count(self, row: int) -> None:
        hub = self._runner.message_hub
        if hub.get_info(IN_A_ROW, 0) != row:
            hub.update_info(IN_A_ROW, row)

    def _blame(self) -> str:
        """Which losses have a gradient that is no number, tried one by one."""
        runner, model = self._runner, plain_model(self._runner)
        self._kept.keep()
        try:
            with runner.optim_wrapper.optim_context(model):
                found = blame(model, self._batch)
        finally:
            self._kept.put_back()
            self.guard.forget()
        if not found:
            return 'no loss alone has such a one'
        return f'that of {", ".join(found)}'

    # ---------------------------------------------------------------- witness

    def _witness(self, what: str) -> str:
        """Write down the batch that led there, if any more may be written."""
        if not self.batches or self._batch is None:
            return ''
        self.batches -= 1
        iteration = self.guard._iteration + 1
        rank = f'_rank{get_rank()}' if get_world_size() > 1 else ''
        path = Path(
            self._runner.work_dir, f'non_finite_iter_{iteration}{rank}.pth'
        )
        try:
            save_batch(path, self._batch, iteration=iteration, what=what)
        except (OSError, RuntimeError) as error:  # what is broken matters more
            return f'Its batch could not be written ({error}).'
        return f'Its batch is in {path}.'


def largest(
    parameters: Sequence[tuple[str, nn.Parameter]],
) -> tuple[list[str], Tensor]:
    """Largest absolute value of each gradient there is; NaN where it has one.

    Nothing waits for the device.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.tensor([-3.0, 1.0])
        >>> largest([('w', weight)])
        (['w'], tensor([3.]))
    """
    there = [
        (name, one.grad)
        for name, one in parameters
        if one.grad is not None
        and one.grad.numel()
        and one.grad.layout is torch.strided
    ]
    if not there:
        return [], torch.zeros(0)
    names, gradients = zip(*there)
    # A norm by the maximum cannot overflow where no value does.
    sizes = torch._foreach_norm(gradients, float('inf'))
    return list(names), torch.stack([one.float() for one in sizes])


def _on_any_rank(broken: bool) -> bool:
    if get_world_size() == 1:
        return broken
    flag = torch.tensor([int(broken)])
    all_reduce(flag, 'max')
    return bool(flag)


class _Kept:
    """What a step changes beside the parameters that the optimiser has.

    Buffers, as statistics of BatchNorm; what terms teach by themselves; and
    what modules hand over for a resumption.
    """

    def __init__(
        self, model: nn.Module, wrappers: Sequence[OptimWrapper]
    ) -> None:
        learnt = {
            id(one)
            for wrapper in wrappers
            for group in wrapper.param_groups
            for one in group['params']
        }
        self._now = [
            one
            for one in (*model.parameters(), *model.buffers())
            if id(one) not in learnt
        ]
        self._modules = [
            one for one in model.modules() if hasattr(one, 'run_state')
        ]
        self._then: list[Tensor] | None = None
        self._states: list[Any] = []

    def keep(self) -> None:
        with torch.no_grad():
            self._then = [one.detach().clone() for one in self._now]
        self._states = [one.run_state() for one in self._modules]

    def keep_once(self) -> None:
        if self._then is None:
            self.keep()

    @torch.no_grad()
    def put_back(self) -> None:
        for one, then in zip(self._now, self._then):
            one.copy_(then)
        for one, state in zip(self._modules, self._states):
            one.load_run_state(state)

    def forget(self) -> None:
        self._then = None


def _wrappers(runner: Runner) -> list[OptimWrapper]:
    one = runner.optim_wrapper
    return [*one.values()] if isinstance(one, OptimWrapperDict) else [one]


# ------------------------------------------------------------ what is changed


def _watching(parse: Callable, hook: FiniteLossHook) -> Callable:
    """``parse_losses`` of a plain student, whose losses are remembered."""

    def watching(losses: Mapping) -> Any:
        found = {key: one for key, one in losses.items() if 'loss' in key}
        if found:
            hook.guard.watch(found, hook._runner.iter)
        return parse(losses)

    return watching


def _asking(
    wrapper: OptimWrapper,
    step: Callable[..., None],
    ask: Callable[[OptimWrapper], bool],
) -> Callable[..., None]:
    """``step`` of an optimiser wrapper that asks first."""

    def asking(**named: Any) -> None:
        if ask(wrapper):
            step(**named)

    asking.plain = step
    asking._with_counter = getattr(step, '_with_counter', False)
    return asking


@cache
def resting_class(plain: type[Hook]) -> type[Hook]:
    """The class of a hook that rests after a step that was skipped."""
    if hasattr(plain, 'rests'):
        return plain

    class Resting(plain):
        rests: Callable[[], bool] = staticmethod(lambda: False)

        def after_train_iter(self, *arguments: Any, **named: Any) -> None:
            if not self.rests():
                super().after_train_iter(*arguments, **named)

    Resting.__name__ = Resting.__qualname__ = plain.__name__
    Resting.__module__ = plain.__module__
    return Resting

"""MMEngine's two training loops, able to go on in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EMAHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from mmkd.engine.draws import replayable
from mmkd.engine.interrupt import LeaveValidation

_NOTHING = (
    'The training data makes no batch: {images} images are left for batches '
    'of {batch}. Check train_dataloader.dataset (ann_file, classes, '
    'filter_cfg, indices), or lower train_dataloader.batch_size.'
)


class Resumable(BaseLoop):
    """What both loops gain: exact data, owed validations, an orderly stop."""

    def __init__(
        self, runner: Any, dataloader: DataLoader | dict, **settings: Any
    ) -> None:
        if isinstance(dataloader, dict):
            dataloader = _build(runner, dataloader)
        dataloader = replayable(dataloader, runner.seed, get_rank())
        _refuse_nothing(dataloader)
        super().__init__(runner, dataloader, **settings)

    def begin(self) -> None:
        """Put back a stopped run's state, and validate if it still owes it."""
        owes = self.runner.resume_hook.take_up(self.runner)
        if owes and self.at_a_boundary():
            self._decide_current_val_interval()
            if self.validation_is_due():
                self.runner.logger.info(
                    'The run that was stopped still owes a validation.'
                )
                self.validate()

    def at_a_boundary(self) -> bool:
        """Whether a validation may come before the next step."""
        return self._iter > 0

    def validation_is_due(self) -> bool:
        """Whether to validate after the present number of steps or epochs."""
        raise NotImplementedError

    def validate(self) -> None:
        """Validate, without moving the random state of the training."""
        try:
            with self.runner.resume_hook.aside():
                self.runner.val_loop.run()
        except LeaveValidation:
            # The weights were exchanged for their average meanwhile.
            for hook in self.runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(self.runner)
            self.stop()

    def stop_if_asked(self) -> None:
        if self.runner.interrupts.agreed():
            self.stop()

    def stop(self) -> None:
        self.runner.save_and_stop(self._epoch, self._iter)


class ResumableEpochLoop(Resumable, EpochBasedTrainLoop):
    """Trains for epochs; goes on inside of one."""

    def run(self) -> Any:
        """Launch training."""
        self.runner.call_hook('before_train')
        self.begin()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self.validation_is_due():
                self.validate()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Iterate what is left of one epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self.dataloader.place.batches
        for index, data_batch in enumerate(self.dataloader, start=done):
            self.run_iter(index, data_batch)
            self.stop_if_asked()
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def at_a_boundary(self) -> bool:
        return self._epoch > 0 and not self.dataloader.place.batches

    def validation_is_due(self) -> bool:
        return (
            self.runner.val_loop is not None
            and self._epoch >= self.val_begin
            and (
                self._epoch % self.val_interval == 0
                or self._epoch == self._max_epochs
            )
        )


class ResumableIterLoop(Resumable, IterBasedTrainLoop):
    """Trains for iterations, over and over the data."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # MMEngine's own waits two seconds at the end of each pass.
        self.dataloader_iterator = self._batches()

    def _batches(self) -> Iterator[Any]:
        while True:
            if self.dataloader.place.epoch:
                _shuffle_anew(self.dataloader, self.dataloader.place.epoch)
            yield from self.dataloader

    def run(self) -> Any:
        """Launch training."""
        self.runner.call_hook('before_train')
        # The whole training counts as one epoch here.
        self.runner.call_hook('before_train_epoch')
        self.begin()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            self.stop_if_asked()
            if self.validation_is_due():
                self.validate()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def validation_is_due(self) -> bool:
        return (
            self.runner.val_loop is not None
            and self._iter >= self.val_begin
            and (
                self._iter % self.val_interval == 0
                or self._iter == self._max_iters
            )
        )


def _shuffle_anew(loader: DataLoader, epoch: int) -> None:
    for sampler in (
        loader.sampler,
        getattr(loader.batch_sampler, 'sampler', None),
    ):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            return


def _build(runner: Any, config: dict) -> DataLoader:
    try:
        return runner.build_dataloader(
            config,
            seed=runner.seed,
            diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False),
        )
    except ValueError as error:
        # NumPy's words, when MMEngine packs an empty list of images.
        if 'need at least one array' in str(error):
            raise ValueError(_NOTHING.format(images=0, batch='any')) from error
        raise


def _refuse_nothing(loader: DataLoader) -> None:
    try:
        batches = len(loader)
    except TypeError:  # a stream, whose length nobody knows
        return
    if not batches:
        raise ValueError(
            _NOTHING.format(
                images=len(loader.dataset),
                batch=f'{loader.batch_sampler.batch_size} x '
                f'{get_world_size()}',
            )
        )

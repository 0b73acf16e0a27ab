"""The runner behind ``mmkd train`` and ``mmkd test``.

MMEngine's own, with seven differences: a resumed run equals one that never
stopped, checkpoints appear whole or not at all and old ones go last, a start
that fails leaves nothing behind, Ctrl-C leaves a checkpoint, a loss or a
gradient that is not a number stops the run, a checkpoint of another detector
is an error instead of a warning, and what is compiled or computed twice is
still tapped.
"""

from __future__ import annotations

import copy
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import LOOPS
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
    find_latest_checkpoint,
)
from torch import nn
from torch.utils.data import DataLoader

from mmkd.compat.checkpoint import check_file, read_checkpoint
from mmkd.engine.draws import patient
from mmkd.engine.finite import FiniteLossHook
from mmkd.engine.fit import Fit
from mmkd.engine.forward import (
    checkpointing_kept_in_the_graph,
    compile_parts,
)
from mmkd.engine.interrupt import Interrupted, Interrupts
from mmkd.engine.keep import keeping_class
from mmkd.engine.loops import ResumableEpochLoop, ResumableIterLoop
from mmkd.engine.resume import ResumeHook, plain_model
from mmkd.engine.start import Start
from mmkd.files import remove_unfinished, whole

#: Name of the checkpoint that Ctrl-C leaves.
INTERRUPTED = 'interrupted.pth'
_LOOPS = {
    EpochBasedTrainLoop: ResumableEpochLoop,
    IterBasedTrainLoop: ResumableIterLoop,
}
#: Data transforms that remember earlier images or own a random state.
_REMEMBERING = ('CachedMosaic', 'CachedMixUp', 'Albu')
#: What the system says of a disk that takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: What gloo and NCCL say when another process is there no more.
_LOST = re.compile(
    'connection (closed|reset|refused)|broken pipe|remote process exited'
    '|timed out waiting',
    re.IGNORECASE,
)


class Trainer(Runner):
    """MMEngine's runner, exact and careful.

    Takes the arguments of :class:`mmengine.runner.Runner`; a config is turned
    into one by :meth:`from_cfg`.

    Attributes:
        resume_hook: Keeps the state MMEngine does not.
        interrupts: Notes Ctrl-C during :meth:`train`.
    """

    def __init__(
        self, model: nn.Module | dict, work_dir: str, *args: Any, **kwargs: Any
    ) -> None:
        config = kwargs.get('cfg')
        filename = getattr(config, 'filename', None)
        self._start = Start(work_dir, filename and os.path.basename(filename))
        self.resume_hook = ResumeHook()
        self.interrupts = Interrupts()
        self._log_dir = self._timestamp = None
        with self.undone_on_failure():
            super().__init__(model, work_dir, *args, **kwargs)
            self.register_hook(self.resume_hook)
            if not any(isinstance(one, FiniteLossHook) for one in self.hooks):
                self.register_hook(FiniteLossHook())
            for hook in self.hooks:
                if isinstance(hook, CheckpointHook):
                    hook.__class__ = keeping_class(type(hook))

    @classmethod
    def from_cfg(cls, cfg: Config) -> Trainer:
        """Build a trainer; of a run to be resumed, with that run's seed."""
        cfg = copy.deepcopy(cfg)
        wanted = bool(cfg.get('resume'))
        path = prepare_resume(cfg) if wanted else cfg.get('load_from')
        trainer = super().from_cfg(cfg)
        # Not by the config, whose copy in the work directory is to say what
        # the user said.
        trainer._load_from = path
        if wanted and path is None:
            trainer.logger.info(
                f'{cfg.work_dir} holds no checkpoint to resume: starting '
                f'from the beginning.'
            )
        return trainer

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Remove what the run wrote if it fails before its first step."""
        try:
            yield
        except BaseException:
            self._start.undo(self._log_dir, self._timestamp)
            raise

    def setup_env(self, env_cfg: dict) -> None:
        """Also start distributed runs on machines without a GPU."""
        if self.distributed and self._launcher == 'pytorch':
            start_without_gpu((env_cfg.get('dist_cfg') or {}).get('timeout'))
        super().setup_env(env_cfg)

    def wrap_model(
        self, model_wrapper_cfg: dict | None, model: nn.Module
    ) -> nn.Module:
        """Wrap for DDP, on the CPU without device numbers."""
        if (
            self.distributed
            and model_wrapper_cfg is None
            and not torch.cuda.is_available()
        ):
            model_wrapper_cfg = dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get(
                    'find_unused_parameters', False
                ),
            )
        return super().wrap_model(model_wrapper_cfg, model)

    # ------------------------------------------------------------ running

    def train(self) -> nn.Module:
        """Launch training.

        Raises:
            Interrupted: If a signal asked to stop; the run was saved.
            OSError: If the disk takes no more.
            RuntimeError: If another process of the training has ended. Both
                say what is the last whole checkpoint.
        """
        with (
            self.undone_on_failure(),
            self.interrupts,
            self.failures_told(),
            checkpointing_kept_in_the_graph(),
        ):
            if is_main_process():
                remove_unfinished(self.work_dir)
            return super().train()

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Say of a full disk and of a lost rank what is left to go on from."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            where = error.filename or self.work_dir
            free = shutil.disk_usage(_existing(where)).free / 2**20
            raise OSError(
                error.errno,
                f'{error.strerror} at {where}, where {free:.0f} MiB are free. '
                f'{self._what_is_left("Make room there and ")}',
            ) from error
        except RuntimeError as error:
            if not self.distributed or not _LOST.search(str(error)):
                raise
            raise RuntimeError(
                f'Another rank has ended, so that rank {get_rank()} waited in '
                f'vain; the other has said why. {self._what_is_left()}'
            ) from error

    def _what_is_left(self, first: str = '') -> str:
        ended = f'The training ended in iteration {self.iter + 1}.'
        last = latest_checkpoint(self.work_dir)
        then = (
            f'{first}go on with --resume' if last else f'{first}start it again'
        )
        kept = (
            f'The last whole checkpoint is {last}.'
            if last
            else 'There is no checkpoint yet.'
        )
        return f'{ended} {kept} {then[0].upper()}{then[1:]}.'

    def _maybe_compile(self, target: str) -> None:
        """Compile a distilled student's parts, any other model's step."""
        settings, model = self.cfg.get('compile'), plain_model(self)
        if not settings or not hasattr(model, 'terms'):
            super()._maybe_compile(target)
            return
        if settings is True:
            settings = {}
        parts = compile_parts(model, settings)
        self.logger.info(
            f'compile: {" and ".join(parts) or "nothing"} of '
            f'{type(model).__name__}, as far as no term taps a layer inside; '
            f'the first iterations are slow.'
        )

    def test(self) -> dict:
        """Launch test."""
        with self.undone_on_failure():
            return super().test()

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call all hooks; after the first step a start has not failed."""
        super().call_hook(fn_name, **kwargs)
        if fn_name in ('after_train_iter', 'after_test_iter'):
            self._start.commit()

    def build_train_loop(self, loop: Any) -> Any:
        """Build MMEngine's loops as those that can go on in the middle."""
        if isinstance(loop, Mapping):
            loop = dict(loop)
            kind = loop.pop('type', None)
            if kind is None:
                by_epoch = loop.pop('by_epoch')
                kind = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
            elif isinstance(kind, str):
                kind = LOOPS.get(kind) or kind
            if kind not in _LOOPS:
                self.logger.warning(
                    f'{kind} is a training loop of its own: a run that is '
                    f'stopped and resumed will differ from one that is not.'
                )
                return super().build_train_loop(dict(loop, type=kind))
            # MMEngine notes there from which package a config inherits it.
            loop.pop('_scope_', None)
            loop = _LOOPS[kind](
                runner=self, dataloader=self._train_dataloader, **loop
            )
            self._warn_of_memories()
        return super().build_train_loop(loop)

    def _warn_of_memories(self) -> None:
        found = {
            one
            for one in _REMEMBERING
            if f"'{one}'" in repr(self._train_dataloader)
        }
        if found:
            self.logger.warning(
                f'{", ".join(sorted(found))} keeps images or random numbers '
                f'of its own in each worker, which no checkpoint holds: a '
                f'resumed run will differ slightly from one that never '
                f'stopped.'
            )

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict,
        seed: int | None = None,
        diff_rank_seed: bool = False,
    ) -> DataLoader:
        """Build a data loader whose workers leave Ctrl-C to this process."""
        return patient(
            Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        )

    def save_and_stop(self, epoch: int, iteration: int) -> None:
        """Leave a checkpoint between two steps, and the training.

        Raises:
            Interrupted: Always.
        """
        self.save_checkpoint(
            self.work_dir,
            INTERRUPTED,
            meta=dict(epoch=epoch, iter=iteration),
            by_epoch=False,
        )
        path = Path(self.work_dir, INTERRUPTED)
        if is_main_process():
            pointer = Path(self.work_dir, 'last_checkpoint')
            with whole(pointer) as temporary:
                temporary.write_text(str(path))
        number = self.interrupts.agreed()
        self.logger.info(f'Stopped after iteration {iteration}.')
        raise Interrupted(path, iteration, number)

    # -------------------------------------------------------- checkpoints

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, **kwargs: Any
    ) -> None:
        """Save a checkpoint with every rank's state, whole or not at all."""
        self.resume_hook.collect(self)
        backend = get_file_backend(
            out_dir, backend_args=kwargs.get('backend_args')
        )
        if not isinstance(backend, LocalBackend) or not is_main_process():
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        with whole(Path(out_dir, filename)) as temporary:
            super().save_checkpoint(
                str(temporary.parent), temporary.name, *args, **kwargs
            )

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: list = [(r'^module.', '')],  # noqa: B006 - MMEngine's
    ) -> dict:
        """Load weights, and refuse those of another detector.

        A run that is resumed and a detector that is tested must get every
        weight; one that starts from a file (``load_from``) at least some.

        Raises:
            ValueError: If the file does not fit.
        """
        testing = self._train_loop is None or isinstance(
            self._train_loop, Mapping
        )
        model = plain_model(self)
        with Fit(model) as fit:
            checkpoint = super().load_checkpoint(
                filename, map_location, strict, revise_keys
            )
        fit.compare(checkpoint)
        if self._resume:
            fit.refuse_differences(
                '--resume',
                filename,
                'Resume with the config the run was started with; to start '
                'from these weights: --cfg-options load_from=FILE',
            )
        elif testing:
            fit.refuse_gaps(
                'mmkd test',
                filename,
                'Name the config this checkpoint was trained with.',
            )
        else:
            fit.refuse_strangers(
                'load_from',
                filename,
                'Name a checkpoint of this detector.',
            )
            self.logger.info(f'load_from {filename}: {fit.summary()}')
        return checkpoint


def _existing(path: str | Path) -> Path:
    """The path, or the folder nearest to it that is there."""
    path = Path(path).absolute()
    return next(one for one in (path, *path.parents) if one.exists())


# ------------------------------------------------------------------- resuming


def prepare_resume(cfg: Config) -> str | None:
    """Find the checkpoint to resume, and take over its seed.

    Args:
        cfg: Its ``randomness`` becomes that of the checkpoint; ``resume``
            becomes False if there is nothing to resume yet.

    Returns:
        The checkpoint, None if there is none.

    Raises:
        FileNotFoundError: If the checkpoint named does not exist.
        ValueError: If it cannot be resumed.
    """
    path = cfg.get('load_from') or latest_checkpoint(cfg.work_dir)
    if path is None:
        cfg.resume = False
        return None
    checkpoint = read_checkpoint(path)
    check_resumable(checkpoint, path)
    seed = checkpoint['meta'].get('seed')
    if seed is not None:
        # Samplers are built with it before MMEngine would have read it.
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    return str(path)


def check_resumable(checkpoint: Mapping, path: str | Path) -> None:
    """A checkpoint to resume must hold more than weights.

    Raises:
        ValueError: Says what is missing.
    """
    meta = checkpoint.get('meta')
    known = set(meta) if isinstance(meta, Mapping) else set()
    absent = [f'meta.{key}' for key in ('epoch', 'iter') if key not in known]
    absent += [
        key
        for key in ('state_dict', 'optimizer', 'message_hub')
        if key not in checkpoint
    ]
    if absent:
        raise ValueError(
            f'--resume expected a training checkpoint, {str(path)!r} has no '
            f'{", ".join(absent)}. To start from its weights: --cfg-options '
            f'load_from={path}'
        )


def latest_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint a run left last, None if there is none.

    MMEngine writes its path beside it. Where that points nowhere, because the
    folder was moved or the machine crashed, the newest file is taken.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        return None
    named = None
    if (work_dir / 'last_checkpoint').is_file():
        named = find_latest_checkpoint(str(work_dir))
    if named and '://' in named:
        return named
    candidates = [
        one
        for pattern in ('epoch_*.pth', 'iter_*.pth', INTERRUPTED)
        for one in work_dir.glob(pattern)
    ]
    candidates.sort(key=lambda one: one.stat().st_mtime, reverse=True)
    if named:
        candidates[:0] = [Path(named), work_dir / Path(named).name]
    for one in candidates:
        try:
            return str(check_file(one))
        except (FileNotFoundError, ValueError):
            continue
    return None


# ---------------------------------------------------------------- distributed


def start_without_gpu(timeout: int | None = None) -> None:
    """Join the process group by gloo where there is no GPU for NCCL.

    MMEngine's start would ask for a CUDA device.

    Args:
        timeout: Seconds to wait for a rank that hangs; gloo's own if None.
    """
    if torch.cuda.is_available() or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        'gloo', timeout=timeout and timedelta(seconds=timeout)
    )

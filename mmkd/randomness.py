"""Random numbers that leave the student's own stream as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved(seed: int | None = None) -> Iterator[None]:
    """Run a block and put every global random state back afterwards.

    Teachers and terms are built and evaluated inside, so that the student
    draws the numbers it would have drawn alone.

    Args:
        seed: Seeds torch inside the block; None goes on from the present
            state.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with preserved():
        ...     _ = torch.rand(3)
        >>> after = torch.rand(1)
        >>> _ = torch.manual_seed(0)
        >>> bool(after == torch.rand(1))
        True
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        devices = _cuda_devices()
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                # Not torch.manual_seed, which also notes the whole call
                # stack where CUDA is there and was never used: milliseconds.
                torch.default_generator.manual_seed(seed)
                for device in devices:
                    torch.cuda.default_generators[device].manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _cuda_devices() -> list[int]:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return []
    return [torch.cuda.current_device()]


def stream_seed(seed: int, iteration: int, rank: int) -> int:
    """Seed of the terms' own stream in one iteration, 63 bits.

    It depends on nothing that a checkpoint would have to store, so a resumed
    run draws what the uninterrupted one drew.
    """
    mixed = np.random.SeedSequence([seed % 2**63, iteration, rank])
    return int(mixed.generate_state(1, np.uint64)[0] >> 1)

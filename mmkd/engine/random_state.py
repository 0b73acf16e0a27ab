"""The random numbers of a training: kept, put back, and drawn by key."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def capture() -> dict:
    """The random state of this process: Python, NumPy, torch, CUDA.

    Tensors and plain numbers alone, so that it is read back safely.
    """
    version, numbers, last = random.getstate()
    _, words, position, has_gauss, gauss = np.random.get_state()
    state = dict(
        python=(version, torch.tensor(numbers), last),
        numpy=(
            torch.from_numpy(words.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore(state: dict) -> None:
    """Put back what :func:`capture` returned.

    Example:
        >>> state = capture()
        >>> first = torch.rand(2), np.random.rand(), random.random()
        >>> restore(state)
        >>> again = torch.rand(2), np.random.rand(), random.random()
        >>> bool((first[0] == again[0]).all()), first[1:] == again[1:]
        (True, True)
    """
    version, numbers, last = state['python']
    random.setstate((version, tuple(numbers.tolist()), last))
    words, position, has_gauss, gauss = state['numpy']
    np.random.set_state(
        (
            'MT19937',
            words.cpu().numpy().astype(np.uint32),
            position,
            has_gauss,
            gauss,
        )
    )
    # A resumed checkpoint was mapped to the device, generators live on the
    # host.
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@contextmanager
def keyed(*key: int) -> Iterator[None]:
    """Draw from a stream of this key inside; outside, nothing happened.

    Python, NumPy and torch on the host; a data pipeline uses no other. The
    streams depend on the key alone, not on the process or on what was drawn
    before.

    Args:
        *key: Whole numbers, not negative.

    Example:
        >>> with keyed(0, 7):
        ...     first = np.random.rand()
        >>> with keyed(0, 7):
        ...     first == np.random.rand()
        True
    """
    words = np.random.SeedSequence(key)
    seeds = words.generate_state(2, np.uint64)
    python, host = random.getstate(), torch.get_rng_state()
    # Swapping NumPy's generator is a hundred times faster than saving the
    # state of the present one.
    numpy = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(words))
        random.seed(int(seeds[0]))
        # torch.manual_seed would reseed the GPU's generators as well.
        torch.default_generator.manual_seed(int(seeds[1]) >> 1)
        yield
    finally:
        np.random.set_bit_generator(numpy)
        random.setstate(python)
        torch.set_rng_state(host)

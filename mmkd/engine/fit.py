"""How a checkpoint fits the detector it is loaded into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.model import BaseTTAModel
from torch import nn

from mmkd.compat.checkpoint import (
    TERM_PREFIX,
    check_file,
    read_checkpoint,
    state_dict_of,
)


class Fit:
    """Watches one loading and says what was missing, left over, misshapen.

    MMEngine only warns of these. Its keys are compared after each module has
    renamed those of older files.

    Args:
        model: The detector, without DDP's wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.module if isinstance(model, BaseTTAModel) else model
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.total = 0

    def __enter__(self) -> Fit:
        self._handle = self.model.register_load_state_dict_post_hook(
            self._note
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _note(self, module: nn.Module, keys: Any) -> None:
        self.missing = [
            key
            for key in keys.missing_keys
            if 'num_batches_tracked' not in key
        ]
        self.unexpected = list(keys.unexpected_keys)

    def compare(self, checkpoint: Mapping) -> None:
        """Compare shapes, which torch reports in words only."""
        state = state_dict_of(checkpoint)
        own = self.model.state_dict()
        self.total = len(own)
        self.misshapen = [
            f'{key} {tuple(state[key].shape)} for {tuple(one.shape)}'
            for key, one in own.items()
            if key in state and state[key].shape != one.shape
        ]

    def refuse_gaps(self, who: str, file: str, advice: str) -> None:
        """Every weight of the detector must have come from the file.

        Raises:
            ValueError: Counts and names those that did not.
        """
        if self.missing or self.misshapen:
            raise ValueError(self._complaint(who, file, advice))

    def refuse_differences(self, who: str, file: str, advice: str) -> None:
        """Like :meth:`refuse_gaps`, and the file must hold nothing else."""
        if self.missing or self.misshapen or self.unexpected:
            raise ValueError(self._complaint(who, file, advice))

    def refuse_strangers(self, who: str, file: str, advice: str) -> None:
        """At least one weight must have come from the file."""
        if len(self.missing) + len(self.misshapen) >= self._weights():
            raise ValueError(self._complaint(who, file, advice))

    def _weights(self) -> int:
        return sum(
            'num_batches_tracked' not in key for key in self.model.state_dict()
        )

    def _complaint(self, who: str, file: str, advice: str) -> str:
        return (
            f'{who}: {file} does not fit {type(self.model).__name__}. Of '
            f'{self.total} tensors {len(self.missing)} are missing'
            f'{some(self.missing)} and {len(self.misshapen)} have another '
            f'shape{some(self.misshapen)}; {len(self.unexpected)} are left '
            f'over{some(self.unexpected)}. {advice}'
        )

    def summary(self) -> str:
        """What was taken, in one line."""
        taken = self.total - len(self.missing) - len(self.misshapen)
        return (
            f'{taken} of {self.total} tensors taken, {len(self.missing)} '
            f'missing{some(self.missing)}, {len(self.misshapen)} of another '
            f'shape{some(self.misshapen)}, {len(self.unexpected)} left over'
            f'{some(self.unexpected)}.'
        )


def load_strictly(
    detector: nn.Module, file: str | Path, who: str, ema: bool = True
) -> dict:
    """Fill a detector from a checkpoint that must be its own.

    Weights of terms, which stand beside the student's, are left out.

    Args:
        detector: A plain detector.
        file: A file, or an address.
        who: Named in the messages.
        ema: Take the averaged weights where the file has them.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another detector's.
    """
    if '://' not in str(file):
        check_file(file, who)
    checkpoint = read_checkpoint(file)
    state = state_dict_of(checkpoint, prefer_ema=ema)
    for key in [key for key in state if key.startswith(TERM_PREFIX)]:
        del state[key]
    # A tensor of another shape raises in any case; Fit says it better.
    with Fit(detector) as fit, suppress(RuntimeError):
        detector.load_state_dict(state, strict=False)
    fit.compare(dict(state_dict=state))
    fit.refuse_differences(
        who, str(file), 'Name the config it was trained with.'
    )
    return checkpoint


def drop_terms(model: nn.Module, checkpoint: dict) -> int:
    """Take the terms' weights out where the plain student is loaded.

    Returns:
        How many tensors were dropped.
    """
    if isinstance(model, BaseTTAModel):
        model = model.module
    state = checkpoint.get('state_dict')
    if not isinstance(state, Mapping) or hasattr(model, 'terms'):
        return 0
    surplus = [
        key
        for key in state
        if key.removeprefix('module.').startswith(TERM_PREFIX)
    ]
    for key in surplus:
        del state[key]
    return len(surplus)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names in brackets, nothing for none.

    Example:
        >>> some(['a', 'b', 'c', 'd'])
        ' (a, b, c, …)'
    """
    names: Sequence[str] = list(names)
    if not names:
        return ''
    more = ', …' if len(names) > most else ''
    return f' ({", ".join(names[:most])}{more})'

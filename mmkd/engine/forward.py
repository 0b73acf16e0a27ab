"""How a student's parts run while it learns: compiled, or twice.

MMEngine offers both by ``compile=`` and ``activation_checkpointing=`` of a
config. What taps record must survive them, so that a distilled student gets
its own forms of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from mmengine.runner import runner as mmengine_runner
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmkd.checks import suggest
from mmkd.fast import PARTS


def compile_parts(model: nn.Module, settings: Mapping[str, Any]) -> list[str]:
    """Compile backbone and neck where nothing inside of them is tapped.

    A compiled part does not call what is hooked to the layers in it. What
    surrounds it, terms and label assignment among it, runs as it is written.

    Args:
        model: A distilled student.
        settings: Arguments of ``torch.compile``.

    Returns:
        The parts that were compiled.
    """
    tapped = {
        path for term in model.terms.values() for path in term.student_paths
    }
    found = []
    for name in PARTS:
        part = getattr(model, name, None)
        inside = any(path.startswith(f'{name}.') for path in tapped)
        if isinstance(part, nn.Module) and not inside:
            part.forward = torch.compile(part.forward, **settings)
            found.append(name)
    return found


def turn_on_activation_checkpointing(
    model: nn.Module, modules: Sequence[str] | str
) -> None:
    """Let parts forget what they computed, and compute it once more.

    As MMEngine's function of this name, by the way of it that gives weights
    their gradient where the images that enter have none, and layers inside
    of a part theirs where they are tapped.

    Args:
        model: The detector.
        modules: Names of its parts, joined by dots.

    Raises:
        ValueError: If there is no such part.
    """
    for name in [modules] if isinstance(modules, str) else modules:
        try:
            part = attrgetter(name)(model)
        except AttributeError:
            known = [one for one, _ in model.named_modules() if one]
            raise ValueError(
                f'activation_checkpointing expected parts of '
                f'{type(model).__name__}, got {name!r}. '
                f'{suggest(name, known)}'
            ) from None
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)


@contextmanager
def checkpointing_kept_in_the_graph() -> Iterator[None]:
    """MMEngine's runner checkpoints by the function of this module inside."""
    theirs = mmengine_runner.turn_on_activation_checkpointing
    ours = turn_on_activation_checkpointing
    mmengine_runner.turn_on_activation_checkpointing = ours
    try:
        yield
    finally:
        mmengine_runner.turn_on_activation_checkpointing = theirs

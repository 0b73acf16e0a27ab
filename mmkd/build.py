"""Components from their dicts, with messages that say where the dict is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmkd.checks import check_name
from mmkd.registry import MODELS, SharedRegistry


def build(
    config: Mapping,
    role: str,
    registry: SharedRegistry | None = None,
    **defaults,
) -> Any:
    """Build a component of mmkd or of the user's.

    Args:
        config: The component's dict, with ``type``.
        role: Where it stands, for instance ``'terms.pkd.loss'``.
        registry: Its registry; models if None.
        **defaults: Arguments to add where the config has none.

    Raises:
        ValueError: If there is no such component or it refuses its
            arguments.
    """
    registry = registry or MODELS
    if not isinstance(config, Mapping) or 'type' not in config:
        raise ValueError(
            f"{role} must be a dict with a 'type', got {config!r}."
        )
    registry.import_from_location()
    kind = config['type']
    if isinstance(kind, str) and kind.split('.')[0] == 'mmkd':
        known = [f'mmkd.{name}' for name in registry.module_dict]
        check_name(role, 'type', kind, known)
    try:
        return registry.build({**defaults, **config})
    except TypeError as error:
        raise ValueError(f'{role} of type {kind!r}: {error}') from error

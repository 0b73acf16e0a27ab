"""Components from their dicts, with messages that say where the dict is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mmkd.arguments import check_arguments
from mmkd.checks import check_name
from mmkd.registry import MODELS, SharedRegistry

#: Where components of a role stand; those of others may be anywhere.
FAMILIES = {
    'loss': ('mmkd.losses',),
    'align': ('mmkd.necks',),
    'teacher_align': ('mmkd.necks',),
    'weight': ('mmkd.terms.weights',),
    'term': ('mmkd.terms',),
}


def find(
    config: Mapping, role: str, registry: SharedRegistry | None = None
) -> Any:
    """The class that a component's dict stands for.

    Args:
        config: The component's dict, with ``type``.
        role: Where it stands, for instance ``'terms.pkd.loss'``.
        registry: Its registry; models if None.

    Raises:
        ValueError: If there is no such component; the message suggests the
            nearest.
    """
    registry = registry or MODELS
    if not isinstance(config, Mapping) or 'type' not in config:
        raise ValueError(
            f"{role} must be a dict with a 'type', got {config!r}."
        )
    registry.import_from_location()
    kind = config['type']
    if not isinstance(kind, str):
        return kind
    if kind.split('.')[0] == 'mmkd':
        known = [f'mmkd.{name}' for name in registry.module_dict]
        check_name(role, 'type', kind, known)
    # mmdet's own, and the user's; an unknown name raises or gives None.
    with suppress(KeyError, RuntimeError):
        if (found := (registry.peer or registry).get(kind)) is not None:
            return found
    peer = registry.peer.module_dict if registry.peer else ()
    check_name(role, 'type', kind, [*registry.module_dict, *peer])
    return registry.get(kind)


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
    kind = find(config, role, registry)
    _check_family(role, kind)
    who = f'{role} of type {config["type"]!r}'
    given = {
        key: config[key] for key in config if key not in ('type', '_scope_')
    }
    check_arguments(who, kind, given)
    arguments = {**defaults, **config, 'type': kind}
    try:
        # Its class is known, so that any registry would do; one without
        # kin in mmdet would only warn of mmdet's scope.
        return MODELS.build(arguments)
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'{who}: {error}') from error


def _check_family(role: str, kind: Any) -> None:
    """What is one of mmkd's must be meant for the role it is given."""
    wanted = FAMILIES.get(role.rpartition('.')[2].rpartition(' ')[2])
    home = getattr(kind, '__module__', '')
    if wanted is None or not home.startswith('mmkd.'):
        return
    if not f'{home}.'.startswith(tuple(f'{one}.' for one in wanted)):
        raise ValueError(
            f'{role} must be one of {" or ".join(wanted)}, got '
            f'{kind.__name__} of {home}. Name another type, or move it to '
            f'the key that takes it.'
        )

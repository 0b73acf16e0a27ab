"""Registries of scope ``mmkd`` whose entries mmdet's registries hold as well.

``type='mmkd.PKDLoss'`` resolves in any config with nothing imported;
``mmdet.registry.MODELS.get('PKDLoss')`` resolves after ``import mmkd``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import mmdet.registry
import mmengine.registry

from mmkd.arguments import checked

__all__ = [
    'DATASETS',
    'DATA_SAMPLERS',
    'DETECTORS',
    'HOOKS',
    'METRICS',
    'MODELS',
    'SCHEDULES',
    'TRANSFORMS',
    'discover',
]


class SharedRegistry(mmengine.registry.Registry):
    """A registry that hands each of its entries to a peer as well.

    Args:
        name: Name of the registry, as in MMEngine.
        peer: mmdet's registry of the same kind, or None for a kind that only
            mmkd has.
        locations: Packages that are imported at the first look-up.
        checks: Whether its classes, which others build, are to hold what they
            are given against their annotations; what :func:`mmkd.build.build`
            builds it checks itself.
    """

    def __init__(
        self,
        name: str,
        peer: mmengine.registry.Registry | None,
        parent: mmengine.registry.Registry | None,
        locations: list[str],
        checks: bool = False,
    ) -> None:
        super().__init__(
            name, parent=parent, scope='mmkd', locations=locations
        )
        self.peer, self.checks = peer, checks

    def _register_module(
        self,
        module: type | Callable,
        module_name: str | list[str] | None = None,
        force: bool = False,
    ) -> None:
        names = module_name or module.__name__
        names = [names] if isinstance(names, str) else names
        if self.peer is not None:
            for name in names:
                self._refuse_taken_name(name, module, force)
        if self.checks and isinstance(module, type):
            checked(module)
        super()._register_module(module, names, force)
        if self.peer is not None:
            self.peer.register_module(name=names, force=force, module=module)

    def _refuse_taken_name(self, name: str, module: Any, force: bool) -> None:
        other = self.peer._module_dict.get(name)
        if other is None or force:
            return
        raise KeyError(
            f'{name!r} of {module.__module__} cannot be registered: '
            f'{other.__module__} already owns that name in the registry '
            f'{self.peer.scope}::{self.peer.name}. Rename one of the two, or '
            f'import only one of the packages.'
        )


def _shared(kind: str, name: str, *packages: str) -> SharedRegistry:
    return SharedRegistry(
        name,
        peer=getattr(mmdet.registry, kind),
        parent=getattr(mmengine.registry, kind),
        locations=[f'mmkd.{package}' for package in packages],
        checks=kind != 'MODELS',
    )


MODELS = _shared(
    'MODELS',
    'model',
    'losses',
    'necks',
    'backbones',
    'terms',
    'distillers',
    'detectors',
)
HOOKS = _shared('HOOKS', 'hook', 'engine')
DATASETS = _shared('DATASETS', 'dataset', 'datasets')
TRANSFORMS = _shared('TRANSFORMS', 'transform', 'datasets')
DATA_SAMPLERS = _shared('DATA_SAMPLERS', 'data sampler', 'datasets')
METRICS = _shared('METRICS', 'metric', 'analysis')
SCHEDULES = SharedRegistry('schedule', None, None, ['mmkd.schedules'])

REGISTRIES = (
    MODELS,
    HOOKS,
    DATASETS,
    TRANSFORMS,
    DATA_SAMPLERS,
    METRICS,
    SCHEDULES,
)

#: mmdet's own registry of detectors: students and teachers come from it.
DETECTORS = mmdet.registry.MODELS


def discover(package: str, path: list[str]) -> None:
    """Import every module of a package, so that its classes register.

    Args:
        package: ``__name__`` of the package.
        path: ``__path__`` of the package.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f'{package}.{module.name}')

"""Digests of what decides a result: code, data, files."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.build import find
from mmkd.datasets.photographs import photographs
from mmkd.laboratory.runs import PACKAGE
from mmkd.registry import REGISTRIES

#: What every training runs through, and what a distilled one does besides.
TRAINING = ('engine.trainer', 'engine.attributes', 'compat.ops')
DISTILLING = ('distillers.distiller', 'distillers.guard')


def code_digest(settings: Config) -> str:
    """Digest of mmkd's own code that a config makes run.

    The modules of every component that the config names, and all that these
    import; of a user's own those that ``custom_imports`` names. What another
    method's file says does not count, neither do comments, docstrings and
    layout.

    Args:
        settings: A training config.
    """
    parts = [f'{file} {one}' for file, one in sources(settings).items()]
    for name in custom_imports(settings):
        spec = find_spec(name)
        file = Path(spec.origin) if spec and spec.has_location else PACKAGE
        if file.is_file() and PACKAGE not in file.parents:
            parts.append(f'{name} {source_digest(file)}')
    return _digest(parts)


def custom_imports(settings: Config) -> list[str]:
    """Modules that a config has imported."""
    named = (settings.get('custom_imports') or {}).get('imports') or []
    return [named] if isinstance(named, str) else list(named)


def sources(settings: Config, more: Iterable[str] = ()) -> dict[str, str]:
    """The modules behind :func:`code_digest`, each with a digest of its own.

    Args:
        settings: A training config.
        more: Further modules that are run, by their dotted names below mmkd.

    Returns:
        Digests by path below the package.
    """
    files = {_file_of(kind) for kind in _types(settings.to_dict())} - {None}
    roots = (*TRAINING, *more)
    if settings.model.get('terms') is not None:
        roots += DISTILLING
    for name in roots:
        path = PACKAGE / name.replace('.', '/')
        files |= set(path.glob('*.py'))
        if path.with_suffix('.py').is_file():
            files.add(path.with_suffix('.py'))
    return {
        one.relative_to(PACKAGE).as_posix(): source_digest(one)
        for one in _closure(files)
    }


def source_digest(file: Path) -> str:
    """Digest of what a module does."""
    return _digest([_meaning(file)])


def data_digest(settings: Config) -> dict[str, str]:
    """Digest of each split's annotations, and of its images' sizes in bytes.

    Args:
        settings: A config with data loaders.
    """
    return {
        split: _split_digest(settings[f'{split}_dataloader'].dataset)
        for split in ('train', 'test')
    }


def folder_digest(folder: str | Path) -> str:
    """Digest of the photographs in a folder: places and sizes in bytes."""
    found = photographs(folder)
    return _digest(
        f'{os.path.relpath(one, folder)} {os.path.getsize(one)}'
        for one in found
    )


@cache
def file_digest(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def config_digest(settings: Config) -> str:
    """Digest of a config's content, seed left out."""
    content = settings.to_dict()
    content.get('randomness', {}).pop('seed', None)
    return _digest([json.dumps(content, sort_keys=True, default=str)])


def recipe_digest(terms: Mapping, inherit: Any) -> str:
    """Digest of what a recipe wrote.

    Args:
        terms: Configs of the terms by name.
        inherit: The parts that the student starts from.
    """
    return _digest([json.dumps([terms, inherit], sort_keys=True)])


def _split_digest(dataset: Mapping) -> str:
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    root = Path(dataset.get('data_root') or '')
    annotations = root / dataset['ann_file']
    images = root / dataset.get('data_prefix', {}).get('img', '')
    sizes = []
    if images.is_dir():
        sizes = [
            f'{one.name} {one.stat().st_size}'
            for one in sorted(images.iterdir())
        ]
    return _digest([file_digest(annotations), *sizes])


def _types(config: Any) -> Iterator[str]:
    """Every component's ``type`` in a config, at any depth."""
    if isinstance(config, Mapping):
        if 'type' in config:
            yield config['type']
        for value in config.values():
            yield from _types(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _types(value)


def _file_of(kind: Any) -> Path | None:
    if isinstance(kind, str):
        if not kind.startswith('mmkd.'):
            return None
        for registry in REGISTRIES:
            with suppress(ValueError, KeyError):
                kind = find(dict(type=kind), 'digest', registry)
                break
    with suppress(TypeError):
        path = Path(inspect.getfile(kind))
        if PACKAGE in path.parents:
            return path
    return None


def _closure(files: Iterable[Path]) -> list[Path]:
    """The files and all modules of mmkd that they import, sorted."""
    known: set[Path] = set()
    waiting = set(files)
    while waiting:
        one = waiting.pop()
        known.add(one)
        waiting |= set(_imports(one)) - known
    return sorted(known)


@cache
def _imports(file: Path) -> tuple[Path, ...]:
    found = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            names += [f'{node.module}.{one.name}' for one in node.names]
        elif isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        else:
            continue
        for name in names:
            if name.split('.')[0] == 'mmkd':
                path = PACKAGE.joinpath(*name.split('.')[1:])
                if path.with_suffix('.py').is_file():
                    found.append(path.with_suffix('.py'))
    return tuple(found)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding='utf-8'))


@cache
def _meaning(file: Path) -> str:
    """A module without comments, docstrings and layout."""
    tree = ast.parse(file.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            body[0].value.value = ''
    return ast.dump(tree)


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b'\n')
    return digest.hexdigest()[:16]

"""What can be known to fail is found before anything is built or written."""

from __future__ import annotations

import difflib
import inspect
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmkd.arguments import check_arguments
from mmkd.checks import check_name
from mmkd.classes import head_classes
from mmkd.compat.checkpoint import check_file, hash_in_name, sha256_of
from mmkd.datasets.check import (
    Report,
    check_annotation_file,
    check_dataset,
)
from mmkd.datasets.photographs import check_loader
from mmkd.engine.findings import Finding
from mmkd.pixels import KEPT
from mmkd.registry import REGISTRIES
from mmkd.store import PREDICTING, PREDICTIONS, Store

_TRAINING = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
_TESTING = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
#: Keys that MMEngine reads of a config besides what a runner is made of.
_READ = (
    'broadcast_buffers',
    'custom_imports',
    'detect_anomalous_params',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'static_graph',
    'sync_bn',
    'tta_model',
)


def check_training(config: Config, data: bool = True) -> Report:
    """Check the files of a training, checkpoints before data.

    Args:
        config: The whole config.
        data: Look into weights, annotations and pictures too.

    Returns:
        Classes of the training data, and all warnings.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file or the config cannot be what it is meant to be.
    """
    _check_keys(config, _TRAINING, 'train')
    check_types(config.to_dict())
    check_phases(config)
    check_batches(config.train_dataloader)
    check_kept(config.train_dataloader, 'train_dataloader')
    if config.get('load_from'):
        _check_weights(config.load_from, 'load_from')
    found = Report()
    found.warnings += unread_keys(config)
    for where, path in named_weights(config.model, 'model'):
        _check_weights(path, where)
        if data and '://' not in path:
            changed = check_named_hash(path, where)
            found.warnings += [] if changed is None else [str(changed)]
    for part in ('model', 'train_dataloader'):
        for store, path in stores(config[part], part):
            store.check({}, [path] if path else [])
    if data:
        loader = config.train_dataloader
        for report in check_dataset(
            loader.dataset, 'train_dataloader.dataset'
        ):
            found.classes = found.classes or report.classes
            found.warnings += report.warnings + report.notes
        found.warnings += _check_evaluation(config, 'val')
    return found


def check_testing(config: Config, data: bool = True) -> Report:
    """Check the files of a test; those of teachers are not needed.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file or the config cannot be what it is meant to be.
    """
    _check_keys(config, _TESTING, 'test')
    check_types(config.to_dict())
    _check_weights(config.load_from, 'CHECKPOINT')
    warnings = _check_evaluation(config, 'test') if data else []
    return Report(warnings=warnings)


def _check_keys(config: Config, keys: Sequence[str], verb: str) -> None:
    absent = [key for key in keys if config.get(key) is None]
    if absent:
        raise ValueError(
            f'mmkd {verb} expected a config with {", ".join(keys)}; '
            f'{config.filename!r} has no {", ".join(absent)}. Start from a '
            f"whole one: _base_ = 'mmdet::retinanet/"
            f"retinanet_r50_fpn_1x_coco.py'."
        )


def check_types(config: Any, where: str = '') -> None:
    """What is called mmkd's must be there, and take what it is given.

    Those inside of the model say so themselves when it is built, with the
    term that they stand in.

    Args:
        config: Any part of a config.
        where: Its place, for the message.

    Raises:
        ValueError: If there is no such component, or it has no such setting;
            the message suggests the nearest.
    """
    if isinstance(config, Mapping):
        kind = config.get('type')
        if isinstance(kind, str) and kind.startswith('mmkd.'):
            known = _components()
            check_name(where, 'type', kind, known)
            if where.split('.')[0] != 'model':
                given = {
                    name: value
                    for name, value in config.items()
                    if name not in ('type', '_scope_')
                }
                check_arguments(f'{where} of type {kind}', known[kind], given)
        for key, value in config.items():
            check_types(value, f'{where}.{key}' if where else key)
    elif isinstance(config, (list, tuple)):
        for number, value in enumerate(config):
            check_types(value, f'{where}[{number}]')


def _components() -> dict[str, type]:
    found = {}
    for registry in REGISTRIES:
        registry.import_from_location()
        found |= {
            f'mmkd.{name}': kind for name, kind in registry.module_dict.items()
        }
    return found


def unread_keys(config: Mapping) -> list[str]:
    """Keys that are nearly one that is read; nobody would miss them.

    A config may have any others, to be named by its own parts.

    Example:
        >>> unread_keys(dict(custom_hoks=[], train_pipeline=[]))
        ["Nothing reads 'custom_hoks' of the config. Did you mean \
'custom_hooks'?"]
    """
    read = {*_READ}
    for kind in (Runner, FlexibleRunner):
        read |= {*inspect.signature(kind).parameters}
    return [
        f'Nothing reads {key!r} of the config. Did you mean {near!r}?'
        for key in config
        if key not in read
        for near in difflib.get_close_matches(key, sorted(read), 1, 0.85)
    ]


def check_phases(config: Config) -> None:
    """Several processes must not wait for what a phase does not train.

    Raises:
        ValueError: Names the setting to add.
    """
    alone = config.get('launcher', 'none') == 'none'
    if alone or not config.model.get('phases'):
        return
    if not config.get('find_unused_parameters', False):
        raise ValueError(
            f'mmkd train starts several processes '
            f'({config.launcher}) for a training in '
            f'{len(config.model.phases)} phases, which needs '
            f'find_unused_parameters=True: what rests has no gradient to '
            f'wait for. Type: --cfg-options find_unused_parameters=True'
        )


def check_batches(loader: Mapping) -> None:
    """Whether batches of labelled and other images can be made.

    Raises:
        ValueError: If a batch has no room for both, or the loader's sampler
            chooses images by itself.
    """
    own = loader.get('batch_sampler') or {}
    if own.get('type') == 'mmkd.PartlyLabelledBatchSampler':
        check_loader(loader)


def check_kept(config: Any, where: str) -> None:
    """Pixels that a pipeline keeps for the teachers must be packed.

    Else the teachers would be shown what the student is, without a word.

    Args:
        config: Any part of a config.
        where: Its place, for the message.

    Raises:
        ValueError: Names the transform and what to add.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_kept(value, f'{where}.{key}')
    elif isinstance(config, (list, tuple)):
        steps = [one for one in config if isinstance(one, Mapping)]
        keeping = [one['type'] for one in steps if _keeps(one)]
        packed = [
            KEPT in one.get('meta_keys', ()) for one in steps if _packs(one)
        ]
        if keeping and not all(packed):
            raise ValueError(
                f'{where}: {keeping[0]} keeps pixels for the teachers, but '
                f'PackDetInputs does not hand them on. Give it '
                f"meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', "
                f"'scale_factor', 'flip', 'flip_direction', '{KEPT}')."
            )
        for number, value in enumerate(config):
            check_kept(value, f'{where}[{number}]')


def _keeps(step: Mapping) -> bool:
    kind = str(step.get('type')).removeprefix('mmkd.')
    overlaid = kind == 'IGOverlay' and step.get('keep_clean', True)
    return kind == 'KeepForTeacher' or overlaid


def _packs(step: Mapping) -> bool:
    return str(step.get('type')).endswith('PackDetInputs')


def _check_evaluation(config: Config, phase: str) -> list[str]:
    """Data and metrics of ``val`` or ``test``; returns the warnings."""
    loader = config.get(f'{phase}_dataloader')
    if loader is None:
        return []
    metrics = config.get(f'{phase}_evaluator') or []
    metrics = metrics if isinstance(metrics, Sequence) else [metrics]
    for metric in metrics:
        path = metric.get('ann_file') if isinstance(metric, Mapping) else None
        if path and '://' not in path and not metric.get('backend_args'):
            check_annotation_file(path, f'{phase}_evaluator.ann_file')
    where = f'{phase}_dataloader.dataset'
    reports = check_dataset(loader.dataset, where, training=False)
    return [
        one for report in reports for one in report.warnings + report.notes
    ]


def named_weights(config: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every ``checkpoint`` in a nested config, with its place.

    Example:
        >>> model = dict(teachers=dict(a=dict(checkpoint='a.pth')))
        >>> list(named_weights(model, 'model'))
        [('model.teachers.a.checkpoint', 'a.pth')]
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            place = f'{where}.{key}'
            if key == 'checkpoint' and isinstance(value, (str, os.PathLike)):
                yield place, str(value)
            else:
                yield from named_weights(value, place)
    elif isinstance(config, (list, tuple)):
        for number, value in enumerate(config):
            yield from named_weights(value, f'{where}[{number}]')


def stores(config: Any, where: str) -> Iterator[tuple[Store, str]]:
    """What a config reads of teachers that were asked before.

    Args:
        config: Any part of a config.
        where: Its place, for messages.

    Returns:
        Each store, and what is read of it; '' where the terms will say.
    """
    if isinstance(config, (list, tuple)):
        for number, value in enumerate(config):
            yield from stores(value, f'{where}[{number}]')
    if not isinstance(config, Mapping):
        return
    cache = config.get('cache')
    if isinstance(cache, Mapping):
        cache = cache.get('folder')
    if isinstance(cache, (str, os.PathLike)) and 'checkpoint' in config:
        yield Store(cache, f'{where}.cache'), ''
    if str(config.get('type')).removeprefix('mmkd.') == 'LoadPredictions':
        store = Store(config['folder'], f'{where}.folder', tool=PREDICTING)
        yield store, PREDICTIONS
    for key, value in config.items():
        yield from stores(value, f'{where}.{key}')


def _check_weights(path: str | os.PathLike, where: str) -> None:
    # An address is fetched when it is needed; mmengine caches it.
    if '://' not in str(path):
        check_file(path, where)


def check_named_hash(path: str | os.PathLike, where: str) -> Finding | None:
    """A file whose name ends with the start of its hash must have that hash.

    So the zoos of OpenMMLab and torch name theirs:
    ``retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth``.

    Args:
        path: The file.
        where: Its place in the config, for the message.

    Returns:
        What is wrong; None if nothing is, or the name tells no hash.

    Example:
        >>> check_named_hash('epoch_12.pth', 'load_from') is None
        True
    """
    path = Path(path).expanduser()
    said = hash_in_name(path)
    if said is None:
        return None
    digest = sha256_of(path)
    if digest.startswith(said):
        return None
    return Finding(
        'warn',
        f'{where}: the name of {str(path)!r} ends with {said}, as if its '
        f'SHA-256 began with that, which begins with {digest[: len(said)]}. '
        f'It was changed, or is damaged.',
        f'Type: rm {shlex.quote(str(path))} and fetch it again, or rename it.',
        where,
    )


def check_classes(
    model: nn.Module, classes: Sequence[str] | None, prefix: str = 'model'
) -> None:
    """The student's heads must have one output for each class of the data.

    Args:
        model: The detector, built.
        classes: Class names of the training data, None if it has none.
        prefix: Where the student stands in the config, for the message.

    Raises:
        ValueError: Names the heads and the setting to change.
    """
    if classes is None:
        return
    wrong = {
        name: count
        for name, count in head_classes(model).items()
        if count != len(classes)
    }
    if not wrong:
        return
    name, number = next(iter(wrong.items()))
    names = ', '.join(repr(one) for one in list(classes)[:5])
    more = ', …' if len(classes) > 5 else ''
    settings = ' '.join(
        f'{prefix}.{one}.num_classes={len(classes)}' for one in wrong
    )
    raise ValueError(
        f'{type(model).__name__}: {name} has num_classes={number}, the '
        f'training data has {len(classes)} ({names}{more}). Type: '
        f'--cfg-options {settings}'
    )

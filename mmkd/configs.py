"""Config files by path or by package, and the student inside of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config

from mmkd.checks import suggest

#: Keys that a distillation config adds to the student's own ``model``.
OWN_KEYS = ('student', 'teachers', 'terms')
#: Further ones, which a config may leave out.
OPTIONAL_KEYS = ('phases',)


def read_config(
    source: str | Path | Mapping,
    who: str = 'mmkd',
    cfg_options: Mapping[str, Any] | None = None,
) -> Config:
    """Read a config file, of this disk or of an installed package.

    Args:
        source: A path, ``'mmdet::…'`` or ``'mmkd::…'``, or a config already
            read.
        who: Named in the messages.
        cfg_options: Settings to replace, by dotted name, as on the command
            line.

    Raises:
        FileNotFoundError: If there is no such file; the message suggests the
            nearest name beside it.
    """
    if isinstance(source, Config):
        config = source.copy()
    elif isinstance(source, Mapping):
        config = Config(dict(source))
    elif '::' in str(source):
        config = _read_packaged(str(source), who)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f'{who} has no config file {str(path)!r}. {_nearest(path)}'
            )
        config = Config.fromfile(path)
    if cfg_options:
        config.merge_from_dict(dict(cfg_options))
    return config


def _read_packaged(source: str, who: str) -> Config:
    package, _, name = source.partition('::')
    # At once where it lies there: MMEngine first parses every metafile of
    # the package.
    folder = _package_configs(package)
    if folder is not None and (folder / name).is_file():
        return Config.fromfile(folder / name)
    try:
        return get_config(source)
    except FileNotFoundError as error:
        known = (
            [
                f'{package}::{one.relative_to(folder).as_posix()}'
                for one in folder.rglob('*.py')
            ]
            if folder
            else []
        )
        raise FileNotFoundError(
            f'{who} has no config {source!r}: {package} ships none of that '
            f'name. {suggest(source, known)}'
        ) from error
    except (ValueError, AssertionError) as error:
        raise FileNotFoundError(
            f'{who} cannot read the config {source!r}: {error} Write '
            f"'package::folder/file.py', for instance "
            f"'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'; got the "
            f'package {package!r} and the file {name!r}.'
        ) from error


def _package_configs(package: str) -> Path | None:
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    configs = folder / '.mim' / 'configs'
    return configs if configs.is_dir() else None


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f'The folder {str(folder)!r} does not exist either.'
    found = [str(folder / one.name) for one in folder.glob('*.py')]
    return suggest(str(path), found)


def student_config(model: Mapping) -> ConfigDict:
    """The plain student's ``model`` inside a distillation config's.

    A config that distils nothing is returned as it is.

    Args:
        model: ``model`` of any detector config.

    Example:
        >>> student_config(
        ...     dict(type='mmkd.Distiller', student='FCOS', terms={}, neck={})
        ... )
        {'type': 'FCOS', 'neck': {}}
    """
    model = ConfigDict(model)
    if str(model.get('type')).removeprefix('mmkd.') != 'Distiller':
        return model
    student = model['student']
    if isinstance(student, Mapping):
        return ConfigDict(student)
    own = (*OWN_KEYS, *OPTIONAL_KEYS)
    plain = {key: model[key] for key in model if key not in own}
    return ConfigDict(plain, type=student)

"""Config files by path or by package, and the student inside of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config

from mmkd.checks import suggest
from mmkd.reading import read_json, read_yaml

#: Keys that a distillation config adds to the student's own ``model``.
OWN_KEYS = ('student', 'teachers', 'terms')
#: Further ones, which a config may leave out.
OPTIONAL_KEYS = ('phases',)
#: Config files that are data, where those of Python are programs.
DATA = ('.json', '.yaml', '.yml')
#: Keys by which a config has modules imported or commands run.
PROGRAMS = ('custom_imports', 'prepare')
#: Keys whose value names what is built; MMEngine imports a dotted name.
TYPES = ('type', 'constructor', 'runner_type')
#: Keys whose value is a package, the registries of which are imported.
SCOPES = ('_scope_', 'default_scope')
#: Packages of which a config of data may name parts.
PACKAGES = ('mmdet', 'mmengine', 'mmcv', 'mmkd')


def read_config(
    source: str | Path | Mapping,
    who: str = 'mmkd',
    cfg_options: Mapping[str, Any] | None = None,
) -> Config:
    """Read a config file, of this disk or of an installed package.

    A config of Python is a program, and is run. One of JSON or YAML is parsed
    only: what it has imported, inherits from files of Python or names by a
    path to code is refused, and environment variables are not put into it.
    What is built of it may still read and write any file.

    Args:
        source: A path, ``'mmdet::…'`` or ``'mmkd::…'``, or a config already
            read.
        who: Named in the messages.
        cfg_options: Settings to replace, by dotted name, as on the command
            line.

    Raises:
        FileNotFoundError: If there is no such file; the message suggests the
            nearest name beside it.
        ValueError: If a config of JSON or YAML is more than data, or what a
            config has imported is not there.
    """
    if isinstance(source, Config):
        config = source.copy()
    elif isinstance(source, Mapping):
        config = Config(dict(source))
    else:
        try:
            config = _read_file(str(source), who)
        except ImportError as error:
            raise ValueError(
                f'{who} cannot read the config {str(source)!r}, which has '
                f'modules imported: {_first(error)}. Install the package, or '
                f'name the folder of a module of your own: PYTHONPATH=FOLDER'
            ) from error
    if cfg_options:
        config.merge_from_dict(dict(cfg_options))
    return config


def _read_file(source: str, who: str) -> Config:
    if '::' in source:
        return _read_packaged(source, who)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f'{who} has no config file {str(path)!r}. {_nearest(path)}'
        )
    if path.suffix in DATA:
        return _read_data(path.resolve(), who)
    return Config.fromfile(path)


def _first(error: BaseException) -> BaseException:
    """What an error began with."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


def _read_data(path: Path, who: str) -> Config:
    _check_data(path, who, ())
    # MMEngine reads YAML by a loader that can call anything, but only for
    # tags, and there are none.
    return Config.fromfile(
        path, import_custom_modules=False, use_environment_variables=False
    )


def _check_data(path: Path, who: str, below: tuple[Path, ...]) -> None:
    """Whether a file, and those it inherits from, name no code."""
    if path.suffix == '.json':
        content = read_json(path, who, 'a config', kind=dict)
    else:
        content = read_yaml(path)
    remedy = 'Write it as a config of Python, which is run; read it first.'
    if not isinstance(content, dict):
        raise ValueError(
            f'{who} expected a config in {str(path)!r}, got a '
            f'{type(content).__name__}.'
        )
    for key, value, place in _items(content, ''):
        if _is_code(key, value):
            raise ValueError(
                f'{who} refuses {str(path)!r}: {place}={value!r:.60} would '
                f'run code, and a config of {path.suffix} is data. {remedy}'
            )
    bases = content.get('_base_') or []
    for base in bases if isinstance(bases, list) else [bases]:
        packaged = re.fullmatch(r'(mmdet|mmkd)::([\w./-]+)', str(base))
        if packaged and '..' not in Path(packaged.group(2)).parts:
            continue  # installed here, as mmkd itself
        other = (path.parent / str(base)).resolve()
        elsewhere = '::' in str(base) or '://' in str(base)
        if other.suffix not in DATA or elsewhere or other in below:
            raise ValueError(
                f'{who} refuses {str(path)!r}: it inherits from {base!r}. A '
                f'config of {path.suffix} may inherit from others of '
                f'{", ".join(DATA)}, each once, and from mmdet:: and mmkd::. '
                f'{remedy}'
            )
        if not other.is_file():
            raise FileNotFoundError(
                f'{who} has no config file {str(other)!r}, from which '
                f'{str(path)!r} inherits. {_nearest(other)}'
            )
        _check_data(other, who, (*below, path))


def _is_code(key: str, value: Any) -> bool:
    """Whether MMEngine, or mmkd, would import or run what this names."""
    if key in SCOPES:
        return value not in PACKAGES
    if key in TYPES and isinstance(value, str):
        scope, _, name = value.rpartition('.')
        if not name.isidentifier() or (scope and scope not in PACKAGES):
            return True
        # What is in no registry is imported.
        if scope:
            return hasattr(import_module(scope), name)
        return find_spec(name) is not None
    return key in PROGRAMS


def _items(content: Any, place: str) -> Iterator[tuple[str, Any, str]]:
    """Every key below, its value, and where it stands."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield str(key), value, f'{place}{key}'
            yield from _items(value, f'{place}{key}.')
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _items(value, f'{place}{number}.')


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

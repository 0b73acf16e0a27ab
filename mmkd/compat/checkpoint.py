"""Checkpoints, read without executing anything that is in them.

A pickle may call any function of the interpreter that opens it. torch reads
one safely (``weights_only``) if every class and function in it is known to be
harmless. What MMEngine's training checkpoints hold beyond tensors is declared
harmless here, once, for both stacks: buffers of logged values, NumPy arrays
and scalars, and ``getattr``, which is replaced by a function that hands out
four methods and nothing else.

A file that asks for more is refused, unless :func:`trusting` names it.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor

__all__ = [
    'CheckpointError',
    'add_trust_option',
    'allow_checkpoints',
    'check_file',
    'classes_of',
    'hash_in_name',
    'kept_at',
    'read_checkpoint',
    'sha256_of',
    'state_dict_of',
    'trusted_files',
    'trusting',
]

#: Weights of terms in a distilled student's checkpoint; no detector's own.
TERM_PREFIX = 'terms.'

#: What a HistoryBuffer computes; a checkpoint names these by ``getattr``.
_STATISTICS = ('min', 'max', 'current', 'mean')
#: NumPy's name for its core until 1.26 and since 2.0.
_CORES = ('numpy.core', 'numpy._core')
#: Type codes of the arrays a checkpoint may hold: numbers and text, never
#: Python objects.
_CODES = '?bBhHiIlLqQefdgFDGSUmM'
#: Wrappers whose name a state dict's keys may start with.
_WRAPPERS = ('module.', '_orig_mod.')
#: What an address ends in that says the whole SHA-256 of its file.
_SHA256 = '#sha256='
#: Files that may be unpickled in full, with the SHA-256 of each, and those of
#: them that were.
_TRUSTED: ContextVar[Mapping[Path, str]] = ContextVar(
    'trusted', default=MappingProxyType({})
)
_NEEDED: ContextVar[set[Path]] = ContextVar('needed')


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or is not safe to read."""


# ---------------------------------------------------------------- safe reading


def allow_checkpoints() -> None:
    """Let training checkpoints be read safely, by mmkd and by MMEngine.

    MMEngine 0.10.7 cannot read its own checkpoints back where torch reads
    safely by default, and its maintained fork reads unsafely when the safe
    way fails. Both use :func:`read_checkpoint` from here on. Calling this
    again changes nothing.
    """
    torch.serialization.add_safe_globals(_harmless())
    mmengine_checkpoint.CheckpointLoader.register_scheme(
        prefixes='', loader=load_from_local, force=True
    )
    # Behind https://, torchvision:// and open-mmlab://.
    mmengine_checkpoint.load_url = load_from_url
    schemes = mmengine_checkpoint.CheckpointLoader._schemes
    for prefix, loader in schemes.items():
        schemes[prefix] = _disarming(loader)
    # The fork's only door to unsafe reading.
    if hasattr(mmengine_checkpoint, '_safe_torch_load'):
        mmengine_checkpoint._safe_torch_load = _load_safely


def _harmless() -> list[tuple[Any, str]]:
    """Pairs of an object and the name under which a pickle asks for it.

    Names stand beside every object, although torch could find most by itself:
    MMEngine's fork takes its own, nameless entries off the list after each
    read, and must not take ours.
    """
    rebuild_array = np.empty(0).__reduce__()[0]
    rebuild_scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in _CODES}
    return [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_statistic, 'builtins.getattr'),
        (_encode, '_codecs.encode'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
        *(
            (rebuild_array, f'{core}.multiarray._reconstruct')
            for core in _CORES
        ),
        *((rebuild_scalar, f'{core}.multiarray.scalar') for core in _CORES),
        *((one, f'numpy.dtypes.{one.__name__}') for one in dtypes),
    ]


def _statistic(owner: Any, name: str) -> Any:
    """``getattr`` for the one use that training checkpoints make of it."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'getattr({getattr(owner, "__name__", type(owner).__name__)}, '
        f'{name!r}) is refused'
    )


def _encode(text: str, encoding: str = 'latin1') -> bytes:
    """``codecs.encode`` as NumPy's arrays use it, without codec look-up."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'encoding {encoding!r} is refused')
    return text.encode('latin1')


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """MMEngine's reader of local files, without its unsafe ways."""
    return read_checkpoint(filename, map_location)


def load_from_url(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
) -> dict:
    """Fetch a checkpoint once, compare its SHA-256 and read it safely.

    It is compared with ``#sha256=…`` behind the address, each time it is
    read; else with the digits that the file's name ends in, if it does, when
    it is fetched.

    Args:
        url: ``https://…``.
        model_dir: Where files are kept; torch's cache if None.
        map_location: As for ``torch.load``.
        progress: Whether to show how far the download is.

    Raises:
        CheckpointError: If it cannot be fetched, is another file, or is not
            safe to read.
    """
    path = kept_at(url, model_dir)
    url, _, digest = url.partition(_SHA256)
    prefix = digest.lower() or hash_in_name(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), prefix, progress)
        except RuntimeError as error:
            if 'hash' not in str(error):
                raise
            raise CheckpointError(
                f'{url} is not the file that was recorded: {error}. Nothing '
                f'of it was kept. Ask its publisher, or name another file.'
            ) from error
        except URLError as error:
            raise CheckpointError(
                f'{url} could not be fetched: {error.reason}. Without a '
                f'network, fetch it elsewhere and copy it to {path}'
            ) from error
    if digest and sha256_of(path) != digest.lower():
        raise CheckpointError(
            f'{path} is not the file that was recorded for {url}: its SHA-256 '
            f'is {sha256_of(path)}. Remove it (rm {path}), so that it is '
            f'fetched again.'
        )
    return read_checkpoint(path, map_location)


def kept_at(url: str, folder: str | Path | None = None) -> Path:
    """Where a file that is fetched is kept, whether it is there or not.

    Args:
        url: ``https://…``, with or without ``#sha256=…`` behind it.
        folder: Where files are kept; torch's cache if None.
    """
    folder = folder or Path(torch.hub.get_dir(), 'checkpoints')
    return Path(folder, Path(urlparse(url).path).name)


def hash_in_name(path: str | os.PathLike) -> str | None:
    """The start of a SHA-256 that a file's name ends with.

    So the zoos of OpenMMLab and torch name theirs. A date is none.

    Example:
        >>> hash_in_name('retinanet_20200130-c2398f9e.pth')
        'c2398f9e'
        >>> hash_in_name('retinanet-20200130.pth') is None
        True
    """
    found = re.search(r'-([0-9a-f]{8,64})$', Path(path).stem)
    if found is None or re.fullmatch(r'(19|20)\d{6}(\d{6})?', found[1]):
        return None
    return found[1]


def _disarming(loader: Callable) -> Callable:
    """A reader of MMEngine whose file brings no program along.

    MMEngine runs what stands under ``meta.config`` as Python when it resumes.
    mmdet 2.x wrote it, and nobody needs it.
    """
    if hasattr(loader, '__wrapped__'):
        return loader

    @wraps(loader)
    def read(*args: Any, **kwargs: Any) -> Any:
        checkpoint = loader(*args, **kwargs)
        meta = getattr(checkpoint, 'get', {}.get)('meta')
        if isinstance(meta, dict):
            meta.pop('config', None)
        return checkpoint

    return read


def _load_safely(
    file: Any, map_location: Any = None, weights_only: bool | None = None
) -> Any:
    return torch.load(file, map_location=map_location, weights_only=True)


def read_checkpoint(path: str | Path, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint; nothing in it is ever executed.

    Args:
        path: A file of MMEngine, mmdet 2.x or torch, a ``.safetensors`` file,
            or an address MMEngine understands (``https://``,
            ``torchvision://``, ``open-mmlab://``).
        map_location: Where tensors go, as for ``torch.load``.

    Returns:
        The checkpoint's dict. A plain state dict is returned as it is.

    Raises:
        FileNotFoundError: If there is no such file; the message suggests the
            nearest name.
        CheckpointError: If the file is no checkpoint, is cut off, or asks for
            code to be run.
    """
    if '://' in str(path):
        checkpoint = mmengine_checkpoint.CheckpointLoader.load_checkpoint(
            str(path), map_location
        )
    else:
        path = check_file(path)
        if path.suffix == '.safetensors':
            checkpoint = _read_safetensors(path, map_location)
        else:
            checkpoint = _read_pickle(path, map_location)
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise CheckpointError(
            f'read_checkpoint expected a dict of weights in {str(path)!r}, '
            f'got {_describe(checkpoint)}. Save one with '
            f"torch.save(dict(state_dict=model.state_dict()), 'FILE.pth')."
        )
    return checkpoint


@contextmanager
def trusting(*files: str | Path) -> Iterator[None]:
    """Let these files be unpickled in full, whatever code they run.

    For files of old programs, from people you trust. It holds inside of the
    block, for these files as they are when it begins; each is read safely if
    it can be, and named on stderr if it cannot.

    Args:
        files: Checkpoints on this disk.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint.
    """
    paths = [check_file(one, '--trust-checkpoint') for one in files]
    named = {one.resolve(): sha256_of(one) for one in paths}
    trusted = _TRUSTED.set({**_TRUSTED.get(), **named})
    needed = _NEEDED.set(set())
    try:
        yield
        for path in sorted(named.keys() - _NEEDED.get()):
            _tell(f'{path} needed no trust; leave --trust-checkpoint out.')
    finally:
        _TRUSTED.reset(trusted)
        _NEEDED.reset(needed)


def trusted_files() -> list[str]:
    """Files that :func:`trusting` names here, for a process to be started.

    They are to be named on its command line; whether it needs the trust, it
    says itself.
    """
    named = _TRUSTED.get()
    if named:
        _NEEDED.get().update(named)
    return [str(path) for path in named]


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Give a command the option whose files :func:`trusting` takes."""
    parser.add_argument(
        '--trust-checkpoint',
        action='append',
        default=[],
        metavar='FILE',
        help='unpickle this checkpoint even if it asks for code to be run; '
        'only for files of people you trust',
    )


def sha256_of(path: str | Path) -> str:
    """Digest of a file, in hexadecimal digits."""
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _trusts(path: Path) -> bool:
    """Whether a file was named, and is still what it was."""
    digest = _TRUSTED.get().get(path.resolve())
    if digest is None:
        return False
    if digest != sha256_of(path):
        raise CheckpointError(
            f'{str(path)!r} was changed since --trust-checkpoint named it; '
            f'nothing of it was run. Look who writes there.'
        )
    return True


def _unpickled(path: Path, map_location: Any, wanted: str) -> Any:
    """A trusted file, which may do as it likes."""
    _NEEDED.get().add(path.resolve())
    _tell(
        f'{path} asks for {wanted} and is trusted: it may run any code on '
        f'this machine, now. Its SHA-256 is {sha256_of(path)}.'
    )
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f'{str(path)!r} needs what is not installed here ({error}). '
            f'Install it, or save the weights alone where it is.'
        ) from error


def _tell(warning: str) -> None:
    print(f'WARNING: {warning}', file=sys.stderr, flush=True)


def _describe(thing: Any) -> str:
    if isinstance(thing, Mapping):
        return 'an empty one'
    return f'an object of type {type(thing).__name__}'


#: What a file that is damaged, or made to harm, can raise while it is read.
_BROKEN = (
    EOFError,
    RuntimeError,  # and RecursionError
    ValueError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    OSError,
)


def _read_pickle(path: Path, map_location: Any) -> Any:
    _check_room(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, AttributeError, TypeError) as error:
        wanted = _unsafe_names(path, error)
        if not wanted:
            raise _damaged(path, error) from error
        if _trusts(path):
            return _unpickled(path, map_location, wanted)
        raise CheckpointError(
            f'read_checkpoint refuses {str(path)!r}: it holds more than '
            f'weights and asks for {wanted}, which could run any code on this '
            f'machine; nothing of it was run. If you trust whoever wrote it, '
            f'name it once more: --trust-checkpoint {path}'
        ) from error
    except _BROKEN as error:
        if 'CUDA' in str(error) and 'deserialize' in str(error):
            raise  # a matter of map_location, and torch says so
        raise _damaged(path, error) from error


def _check_room(path: Path) -> None:
    """An archive must not be larger inside than it is.

    torch compresses nothing, and a few kilobytes could become all memory.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sum(one.file_size for one in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    if inside > path.stat().st_size:
        raise CheckpointError(
            f'read_checkpoint refuses {str(path)!r}: of its '
            f'{path.stat().st_size} bytes would become {inside}, which torch '
            f'never writes. If you trust whoever compressed it, unpack it and '
            f'save its weights with torch.save.'
        )


def _unsafe_names(path: Path, error: Exception) -> str:
    """What a refused pickle asked for, '' if it was merely broken."""
    names = []
    if zipfile.is_zipfile(path):
        try:
            get = torch.serialization.get_unsafe_globals_in_checkpoint
            names = get(path)
        except Exception:  # a pickle too odd to take apart
            names = []
    names = names or re.findall(r'GLOBAL ([\w.]+)', str(error))
    if names:
        return ', '.join(sorted(set(names)))
    refused = re.search(
        r'(\S+ is refused|reduce for unrecognized function.*'
        r'|Can only (?:build|create).*)',
        str(error),
    )
    return refused.group(0) if refused else ''


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f'Reading {str(path)!r} needs the package safetensors: '
            f'pip install safetensors'
        ) from error
    device = map_location if isinstance(map_location, str) else 'cpu'
    try:
        return load_file(path, device=device)
    except Exception as error:  # safetensors raises classes of its own
        raise _damaged(path, error) from error


# ------------------------------------------------------------ is there a file?


def check_file(path: str | Path, who: str = 'read_checkpoint') -> Path:
    """Make sure, without reading it all, that a checkpoint can be there.

    Args:
        path: The file.
        who: Named in the messages.

    Returns:
        The path, with ``~`` resolved.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is empty, cut off, or something else.

    Example:
        >>> check_file('no/such/folder/epoch_12.pth')
        Traceback (most recent call last):
        ...
        FileNotFoundError: read_checkpoint expected a checkpoint at ...
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(
            f'{who} expected a checkpoint at {str(path)!r}, got '
            f'{"a folder" if path.is_dir() else "no such file"}. '
            f'{_nearest(path)}'
        )
    size = path.stat().st_size
    with path.open('rb') as file:
        head = file.read(64)
    complaint = _complaint(path, size, head)
    if complaint:
        raise CheckpointError(
            f'{who} expected a checkpoint at {str(path)!r}, got {complaint}'
        )
    return path


def _complaint(path: Path, size: int, head: bytes) -> str:
    again = 'Copy or download it again.'
    if not size:
        return f'an empty file. {again}'
    if head.lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml')):
        return (
            f'a web page of {size} bytes: the download was answered with an '
            f'error page. {again}'
        )
    if head.startswith(b'version https://git-lfs'):
        return (
            'a Git LFS pointer instead of the file it stands for. Type: git '
            'lfs pull'
        )
    if path.suffix == '.safetensors':
        return ''
    if head.startswith(b'PK\x03\x04'):
        if zipfile.is_zipfile(path):
            return ''
        return f'one whose end is missing after {size} bytes. {again}'
    # torch wrote bare pickles until 1.5; these start with their protocol.
    if head[:1] == b'\x80' and len(head) > 1 and head[1] <= 5:
        return ''
    return (
        f'a file of {size} bytes that torch did not write (it starts with '
        f'{head[:8]!r}). Name a .pth file.'
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    first = (str(error) or type(error).__name__).strip().splitlines()[0]
    return CheckpointError(
        f'read_checkpoint expected a checkpoint at {str(path)!r}, got a '
        f'damaged file of {path.stat().st_size} bytes ({first[:160]}). Copy '
        f'or download it again.'
    )


def _nearest(path: Path) -> str:
    folder = path.parent
    if path.is_dir():
        folder = path
    if not folder.is_dir():
        return f'The folder {str(folder)!r} does not exist either.'
    names = sorted(
        one.name
        for one in folder.iterdir()
        if one.suffix in ('.pth', '.pt', '.safetensors', '.ckpt')
    )
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if near:
        return f'Did you mean {str(folder / near[0])!r}?'
    if not names:
        return f'{str(folder)!r} holds no checkpoint.'
    more = ', …' if len(names) > 8 else ''
    return f'{str(folder)!r} holds {", ".join(names[:8])}{more}.'


# --------------------------------------------------------------- what is in it


def state_dict_of(
    checkpoint: Mapping, prefer_ema: bool = True
) -> OrderedDict[str, Tensor]:
    """The weights in a checkpoint, under the names the detector gives them.

    MMEngine's and mmdet 2.x's EMA hooks save the averaged weights under the
    plain names and the trained ones beside them; others save a second dict.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        prefer_ema: Take averaged weights where the file has both; False takes
            those the optimiser worked on.

    Returns:
        Name → tensor, with the version metadata of the file.

    Raises:
        CheckpointError: If it holds no tensors by name.

    Example:
        >>> one = torch.ones(1)
        >>> list(state_dict_of(dict(state_dict={'module.conv.bias': one})))
        ['conv.bias']
    """
    source = _weights(checkpoint, prefer_ema)
    metadata = getattr(source, '_metadata', None)
    state = OrderedDict(
        (key, value)
        for key, value in source.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    )
    if not state:
        raise CheckpointError(
            'state_dict_of found no weights in the checkpoint, only '
            f'{", ".join(sorted(map(str, checkpoint))) or "nothing"}. Name a '
            "file with a 'state_dict'."
        )
    state = _untwine(state, prefer_ema)
    for prefix in _WRAPPERS * 2:  # DDP around a compiled model, or inside
        if all(key.startswith(prefix) for key in state):
            state = OrderedDict(
                (key[len(prefix) :], value) for key, value in state.items()
            )
            metadata = metadata and OrderedDict(
                (key[len(prefix) :], value)
                for key, value in metadata.items()
                if key.startswith(prefix)
            )
    if metadata is not None:
        state._metadata = metadata
    return state


def _weights(checkpoint: Mapping, prefer_ema: bool) -> Mapping:
    """The dict of a checkpoint that holds the weights."""
    if prefer_ema:
        for key in ('state_dict_ema', 'model_ema'):
            if isinstance(checkpoint.get(key), Mapping):
                return checkpoint[key]
    kept = checkpoint.get('ema_state_dict')
    if not prefer_ema and isinstance(kept, Mapping):
        return OrderedDict(
            (key, value) for key, value in kept.items() if key != 'steps'
        )
    for key in ('state_dict', 'model', 'model_state_dict'):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def _untwine(
    state: OrderedDict[str, Tensor], prefer_ema: bool
) -> OrderedDict[str, Tensor]:
    """Part mmdet 2.x's second copy of the weights from the first.

    There, ``ema_backbone_conv1_weight`` stands beside
    ``backbone.conv1.weight``, and a saved file has the average under the
    latter.
    """
    copies = {
        'ema_' + key.replace('.', '_'): key
        for key in state
        if not key.startswith('ema_')
    }
    if not any(copy in state for copy in copies):
        return state
    parted = OrderedDict()
    for key, value in state.items():
        if key in copies and key != copies[key]:
            continue
        twin = 'ema_' + key.replace('.', '_')
        parted[key] = value if prefer_ema else state.get(twin, value)
    return parted


def classes_of(checkpoint: Mapping) -> tuple[str, ...] | None:
    """Names of the classes a checkpoint was trained on, if it says so.

    Example:
        >>> classes_of(dict(meta=dict(CLASSES=('cat', 'dog'))))
        ('cat', 'dog')
    """
    meta = checkpoint.get('meta')
    if not isinstance(meta, Mapping):
        return None
    sources = [meta.get('dataset_meta'), meta]
    for source in sources:
        if not isinstance(source, Mapping):
            continue
        classes = source.get('classes', source.get('CLASSES'))
        if classes and not isinstance(classes, str):
            return tuple(str(one) for one in classes)
    return None

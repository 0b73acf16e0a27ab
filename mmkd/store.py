"""Store: what a frozen detector said of images, on disk.

One LMDB file of safetensors: both keep numbers and nothing that runs, a write
is whole or absent whenever the machine stops, and any number of processes may
read at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mmkd.checks import check_name

#: Version of the file; another one is not read.
FORMAT = 1
#: How floating point numbers are kept. ``int8``: one of 256 steps between
#: the least and the greatest value of a channel.
PRECISIONS = ('int8', 'fp16', 'fp32')
#: Where a store says what it is.
ABOUT = b'about'
#: What predictions on an image are called there, in place of a tap.
PREDICTIONS = 'predictions'
#: What makes them.
PREDICTING = 'python tools/cache_predictions.py CONFIG CHECKPOINT'
#: Axes of the cells of one channel: of maps (N, C, H, W), and of tokens
#: (N, L, C). Other tensors are small and kept as they are.
CELLS = {4: (2, 3), 3: (1,)}
#: What a file may name as the type of a tensor.
KINDS = {
    str(kind): kind
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
#: Bytes of a page of LMDB.
PAGE = 4096
#: Bytes that LMDB is let for itself beside what is kept in it.
SLACK = 2**24
#: Open files by their folder; a process may open one once.
_FILES = weakref.WeakValueDictionary()
#: Outputs of one image, call by call, of each tap.
Outputs = dict[str, list[Any]]


class Store:
    """Outputs of a detector by the name of the image.

    Args:
        folder: Where it is.
        who: Named in messages.
        missing: What becomes of an image that is not there: ``'error'``, or
            ``'show'`` it to the teacher.
        tool: What makes such a store.

    Raises:
        ValueError: If ``missing`` is neither.
    """

    def __init__(
        self,
        folder: str | Path,
        who: str,
        missing: str = 'error',
        tool: str = 'python tools/cache_teacher.py CONFIG',
    ) -> None:
        check_name(
            f'{who} with cache=…', 'missing', missing, ('error', 'show')
        )
        self.folder, self.who, self.missing = Path(folder), who, missing
        self.tool = tool
        self.writable = False
        self._room = 0
        self._held: lmdb.Environment | None = None
        self._about: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies, and processes that get one, open the file themselves.
        return dict(self.__dict__, _held=None)

    def begin(self, about: Mapping[str, Any], room: int) -> None:
        """Make it ready to be written to.

        Args:
            about: What it will hold, and how; ``precision`` is one of
                :data:`PRECISIONS`.
            room: Bytes that it may take.
        """
        check_name(self.who, 'precision', about['precision'], PRECISIONS)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._room, self.writable = room, True
        self.tell(about)

    def tell(self, about: Mapping[str, Any]) -> None:
        """Write down what it holds."""
        self._about = dict(about, format=FORMAT)
        self._put({ABOUT: json.dumps(self._about).encode()})

    @property
    def about(self) -> dict[str, Any]:
        """What it holds, and how.

        Raises:
            FileNotFoundError: If there is no store.
            ValueError: If it cannot be read, or is of another version.
        """
        if self._about is None:
            try:
                told = self._get(ABOUT)
                about = json.loads(told if told is not None else b'{}')
            except (lmdb.Error, ValueError, RecursionError) as error:
                raise ValueError(self._broken(error)) from error
            if not _describes(about):
                raise ValueError(self._broken('it says nothing of itself'))
            if about.get('format') != FORMAT:
                raise ValueError(
                    self._broken(f'it is of version {about.get("format")}')
                )
            self._about = about
        return self._about

    def check(self, about: Mapping[str, Any], paths: Sequence[str]) -> None:
        """Whether it is what this teacher would say.

        Args:
            about: What must be the same, by name.
            paths: Taps that are asked for.

        Raises:
            FileNotFoundError: If there is no store.
            ValueError: If it is of another teacher, lacks a tap, or was not
                finished.
        """
        theirs = self.about
        other = [key for key in about if theirs.get(key) != about[key]]
        if other:
            raise ValueError(
                f'{self.who}: the cache in {self.folder} is stale, for its '
                f'{" and ".join(other)} are no longer those of the teacher. '
                f'{self._remedy("--overwrite")}'
            )
        taps = theirs.get('taps', [])
        lacking = [one for one in paths if one not in taps]
        if lacking:
            raise ValueError(
                f'{self.who}: the cache in {self.folder} holds '
                f'{", ".join(map(str, taps))}, and the terms ask for '
                f'{", ".join(lacking)}. {self._remedy("--overwrite")}'
            )
        if not theirs.get('complete'):
            raise ValueError(
                f'{self.who}: the cache in {self.folder} is not finished. '
                f'{self._remedy()}'
            )

    def _remedy(self, more: str = '') -> str:
        return f'Type: {self.command} {more}'.rstrip()

    @property
    def command(self) -> str:
        """What the file says made it, if that is what makes such files.

        Anyone could have written it, and it is going to be typed.
        """
        told = str(self.about.get('command'))
        tool = ' '.join(self.tool.split()[:2])
        try:
            plain = shlex.join(shlex.split(told)) == told
        except ValueError:
            plain = False
        known = plain and told.isprintable() and told.startswith(f'{tool} ')
        return told if known else self.tool

    def read(
        self, image: bytes, paths: Sequence[str], device: torch.device
    ) -> Outputs | None:
        """What was said of an image; None if not all of it is there.

        Args:
            image: Its name.
            paths: The taps.
            device: Where the result is wanted.

        Raises:
            ValueError: If the file is damaged.
        """
        entry = {}
        try:
            for path in paths:
                data = self._get(_key(image, path))
                if data is None:
                    return None
                entry[path] = unpacked(data, device)
        except (
            lmdb.Error,
            SafetensorError,
            LookupError,
            ValueError,  # and UnicodeError
            TypeError,
            AttributeError,
            RuntimeError,  # and RecursionError
        ) as error:
            raise ValueError(self._broken(error)) from error
        return entry

    def write(self, image: bytes, entry: Outputs) -> None:
        """Keep what was said of an image.

        Raises:
            ValueError: If there is no room, or an output cannot be kept.
        """
        precision = self.about['precision']
        try:
            parts = {
                _key(image, path): packed(value, precision)
                for path, value in entry.items()
            }
        except TypeError as error:
            raise ValueError(f'{self.who}: {error}') from error
        self._put(parts)

    def check_absent(self) -> None:
        """Whether an image may be absent.

        Raises:
            ValueError: If it may not.
        """
        if self.writable or self.missing == 'show':
            return
        raise ValueError(
            f'{self.who}: the cache in {self.folder} does not hold an image '
            f'of this training, which shows other images than when the cache '
            f'was made: another data set, augmentation, size or padded size. '
            f'{self._remedy()}, or let it be shown to the teacher: '
            f"cache=dict(folder='{self.folder}', missing='show')."
        )

    def close(self) -> None:
        """Let go of the file."""
        self._held = None

    def __len__(self) -> int:
        """Outputs of single taps of single images."""
        with self._file.begin() as transaction:
            return transaction.stat()['entries'] - 1

    @property
    def size(self) -> int:
        """Bytes that it takes on disk."""
        file = self._file
        pages = file.info()['last_pgno'] + 1
        return pages * file.stat()['psize']

    @property
    def _file(self) -> lmdb.Environment:
        folder = self.folder.resolve()
        if folder not in _FILES:
            # Held before it is noted, which alone would not keep it.
            self._held = self._open()
            _FILES[folder] = self._held
        self._held = _FILES[folder]
        return self._held

    def _open(self) -> lmdb.Environment:
        if self.writable:
            return lmdb.open(
                str(self.folder), map_size=self._room + SLACK, subdir=True
            )
        if not (self.folder / 'data.mdb').is_file():
            raise FileNotFoundError(
                f'{self.who}: there is no cache in {self.folder}. Make it '
                f'with: {self.tool} --out {self.folder}'
            )
        file = lmdb.open(
            str(self.folder), readonly=True, lock=False, readahead=False
        )
        size = (file.info()['last_pgno'] + 1) * file.stat()['psize']
        if (self.folder / 'data.mdb').stat().st_size < size:
            # What is mapped and not there would end the process.
            file.close()
            raise ValueError(self._broken(f'of {size} bytes the end is gone'))
        return file

    def _get(self, key: bytes) -> bytes | None:
        with self._file.begin() as transaction:
            return transaction.get(key)

    def _put(self, parts: Mapping[bytes, bytes]) -> None:
        try:
            with self._file.begin(write=True) as transaction:
                for key, value in parts.items():
                    transaction.put(key, value)
        except lmdb.MapFullError as error:
            raise ValueError(
                f'{self.who}: the cache in {self.folder} is full with '
                f'{self.size / 2**30:.2f} GiB. Give it more: --limit, or '
                f'keep less: fewer levels, --precision int8.'
            ) from error

    def _broken(self, why: Any) -> str:
        return (
            f'{self.who}: the cache in {self.folder} cannot be read ({why}). '
            f'Make it anew: {self.tool} --overwrite.'
        )


def _describes(about: Any) -> bool:
    """Whether a file says of itself what every store says."""
    return isinstance(about, dict) and isinstance(about.get('taps', []), list)


def _let_go() -> None:
    """A file must not be used by a child of the process that opened it."""
    for one in list(_FILES.values()):
        one.close()
    _FILES.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_let_go)


def packed(value: Any, precision: str) -> bytes:
    """Tensors in lists, tuples and dicts of any depth, as bytes.

    Args:
        value: The structure; besides tensors it may hold what JSON can.
        precision: How floating point numbers are kept. What is not finite is
            kept as it is.

    Raises:
        TypeError: If there is something else in it.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _pack_tensor(value.detach().cpu(), precision, tensors)
        if isinstance(value, dict):
            return dict(dict=[[key, pack(one)] for key, one in value.items()])
        if type(value) in (list, tuple):
            return {type(value).__name__: [pack(one) for one in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return dict(value=value)
        raise TypeError(
            f'an output that holds {type(value).__name__} cannot be kept on '
            f'disk. Tap a part that returns tensors.'
        )

    form = json.dumps(pack(value))
    return save(tensors, dict(form=form))


def _pack_tensor(
    value: Tensor, precision: str, tensors: dict[str, Tensor]
) -> dict:
    name = str(len(tensors))
    kind = str(value.dtype)
    form = dict(tensor=name)
    known = kind in KINDS and value.numel() and value.isfinite().all()
    cells = CELLS.get(value.dim())
    if not known or cells is None or precision == 'fp32':
        tensors[name] = value.contiguous()
    elif precision == 'fp16':
        half = value.half()
        whole = half if half.isfinite().all() else value
        tensors[name], form['kind'] = whole.contiguous(), kind
    else:
        steps, low, size = quantised(value.float(), cells)
        tensors.update({name: steps, f'{name}.low': low, f'{name}.size': size})
        form['kind'] = kind
    return form


def unpacked(data: bytes, device: torch.device | str = 'cpu') -> Any:
    """What :func:`packed` made bytes of.

    Raises:
        SafetensorError, ValueError, LookupError: If it is damaged.
    """
    form = json.loads(_metadata(data)['form'])
    tensors = {
        name: value.to(device, non_blocking=True)
        for name, value in load(data).items()
    }

    def unpack(form: dict) -> Any:
        if 'tensor' in form:
            return _unpack_tensor(form, tensors)
        if 'dict' in form:
            return {key: unpack(one) for key, one in form['dict']}
        if 'list' in form:
            return [unpack(one) for one in form['list']]
        if 'tuple' in form:
            return tuple(unpack(one) for one in form['tuple'])
        return form['value']

    return unpack(form)


def _unpack_tensor(form: dict, tensors: Mapping[str, Tensor]) -> Tensor:
    name = form['tensor']
    value = tensors[name]
    if f'{name}.low' in tensors:
        value = restored(
            value, tensors[f'{name}.low'], tensors[f'{name}.size']
        )
    return value.to(KINDS[form['kind']]) if 'kind' in form else value


def _metadata(data: bytes) -> dict[str, str]:
    # The library reads it from files alone: eight bytes of length, then JSON.
    length = int.from_bytes(data[:8], 'little')
    return json.loads(data[8 : 8 + length])['__metadata__']


def quantised(
    value: Tensor, cells: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of 256 steps between the least and greatest of a channel.

    Args:
        value: Floating point.
        cells: Axes over which a channel extends.

    Returns:
        The steps as uint8, and of each channel the value of the lowest and
        the size of one. What is restored differs by half a step at most.

    Example:
        >>> steps, low, size = quantised(torch.tensor([[[0.0], [2.55]]]), (1,))
        >>> steps.flatten().tolist(), low.item(), round(size.item(), 4)
        ([0, 255], 0.0, 0.01)
    """
    low = value.amin(cells, keepdim=True)
    size = (value.amax(cells, keepdim=True) - low) / 255
    size = torch.where(size > 0, size, 1)
    steps = ((value - low) / size).round()
    return steps.to(torch.uint8), low, size


def restored(steps: Tensor, low: Tensor, size: Tensor) -> Tensor:
    """What :func:`quantised` made steps of, in float32."""
    return steps.float() * size + low


def weights_digest(detector: nn.Module) -> str:
    """A name for the weights of a detector, and their layout."""
    digest = hashlib.sha256()
    for name, value in detector.state_dict().items():
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        value = value.detach().cpu().contiguous().flatten()
        digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()


def room_of(value: Any, precision: str) -> int:
    """Bytes that an output takes on disk, where it fills whole pages."""
    return math.ceil(len(packed(value, precision)) / PAGE) * PAGE


def _key(image: bytes, path: str) -> bytes:
    """Of one length, whatever images are called; LMDB takes 511 bytes."""
    name = hashlib.blake2b(path.encode(), digest_size=32)
    name.update(b'\0' + image)
    return name.digest()

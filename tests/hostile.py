"""Files as someone would make them who means harm.

Whatever runs of them leaves a mark, so that a test can say that nothing did.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

#: Deeper than any reader goes.
DEEP = 10**5


class Calls:
    """Pickles as a call that reading it unsafely would make."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call

    def __call__(self) -> None:
        """What is called must look as if it could be."""


def _method(owner: Any, *names: str) -> Calls:
    for name in names:
        owner = Calls(getattr, owner, name)
    return owner


def _object_array(mark: Path) -> np.ndarray:
    return np.array([system(mark), None], dtype=object)


def system(mark: Path) -> Calls:
    return Calls(os.system, f'touch {mark}')


#: What a pickle can hold, by name: each leaves ``mark`` where it is unpickled.
PICKLES: dict[str, Callable[[Path], Any]] = {
    'os.system': system,
    'os.mkdir': lambda mark: Calls(os.mkdir, str(mark)),
    'exec': lambda mark: Calls(exec, f'open({str(mark)!r}, "w")'),
    'eval': lambda mark: Calls(eval, f'open({str(mark)!r}, "w")'),
    'import, getattr, call': lambda mark: Calls(
        _method(Calls(__import__, 'os'), 'mkdir'), str(mark)
    ),
    'an array of objects': _object_array,
    'memmap': lambda mark: Calls(np.memmap, str(mark), 'u1', 'w+', 0, (1,)),
}
#: Those that only reach for more than they should have.
REACHING: dict[str, Callable[[Path], Any]] = {
    'globals': lambda mark: _method(HistoryBuffer.mean, '__globals__'),
    'constructor': lambda mark: _method(HistoryBuffer, '__init__'),
    'chain': lambda mark: _method(HistoryBuffer, 'mean', 'x'),
    'tofile': lambda mark: _method(np.ndarray, 'tofile'),
}


def _zipped(thing: Any, path: Path) -> None:
    torch.save(dict(state_dict=dict(w=torch.ones(1)), x=thing), path)


def _of_old_torch(thing: Any, path: Path) -> None:
    torch.save(
        dict(state_dict=dict(w=torch.ones(1)), x=thing),
        path,
        _use_new_zipfile_serialization=False,
    )


def _bare(thing: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(thing, 2))


#: Forms in which a pickle comes as a checkpoint.
WRAPPINGS: dict[str, Callable[[Any, Path], None]] = {
    'zipped': _zipped,
    'of old torch': _of_old_torch,
    'bare': _bare,
}


def zip_bomb(path: Path, name: str, size: int) -> None:
    """A file of nothing but zeros, which are packed well."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))


def overlapping(path: Path, times: int = 50) -> None:
    """An archive that names one and the same record many times."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', bytes(10**5))
        archive.filelist *= times


def vast_png(path: Path, side: int = 60_000) -> None:
    """A picture of a hundred bytes that claims to be of 60,000 x 60,000."""
    head = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    parts = [(b'IHDR', head), (b'IDAT', zlib.compress(b'\0')), (b'IEND', b'')]
    data = io.BytesIO(b'\x89PNG\r\n\x1a\n')
    data.seek(0, io.SEEK_END)
    for kind, content in parts:
        data.write(struct.pack('>I', len(content)) + kind + content)
        data.write(struct.pack('>I', zlib.crc32(kind + content)))
    path.write_bytes(data.getvalue())


def postscript(path: Path) -> None:
    """A program that Pillow has Ghostscript run, whatever it is called."""
    path.write_bytes(
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n'
        b'%%EndComments\n(mark) (w) file closefile\n%%EOF\n'
    )


def safetensors(header: bytes, length: int | None = None) -> bytes:
    """A file of a header that may say of its length what it likes."""
    length = len(header) if length is None else length
    return struct.pack('<Q', length) + header + bytes(8)


#: What safetensors can lie about.
LYING = {
    'a header without end': safetensors(b'{}', 2**62),
    'a header beyond the file': safetensors(b'{}', 10**6),
    'numbers beyond the file': safetensors(
        b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    ),
    'more numbers than bytes': safetensors(
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],'
        b'"data_offsets":[0,8]}}'
    ),
    'a shape that runs over': safetensors(
        b'{"w":{"dtype":"U8","shape":[9223372036854775807,3],'
        b'"data_offsets":[0,8]}}'
    ),
    'deep JSON': safetensors(b'[' * DEEP),
    'a pickle': pickle.dumps(dict(w=1)),
}


def yaml_bomb() -> str:
    """A few lines that become a thousand million entries."""
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x, x]']
    for number in range(1, 9):
        repeats = ', '.join([f'*a{number - 1}'] * 10)
        lines.append(f'a{number}: &a{number} [{repeats}]')
    return '\n'.join(lines)


#: YAML that asks for more than text and numbers; ``{mark}`` is put in.
YAML = {
    'apply': "names: !!python/object/apply:os.makedirs ['{mark}', 511, yes]",
    'new': "names: !!python/object/new:os.mkdir ['{mark}']",
    'name': 'names: !!python/name:os.system',
    'module': 'names: !!python/module:antigravity',
    'a bomb': yaml_bomb(),
    'depth': 'names: ' + '[' * 5000,
    'unbalanced': 'names: [a, b',
    'a list': '- names',
    'bytes': 'names: \x00',
}

#: JSON that is not what it should be.
JSON = {
    'depth': b'[' * DEEP,
    'depth of dicts': b'{"a":' * DEEP,
    'a pickle': pickle.dumps(dict(a=1), 4),
    'a number of many digits': b'{"a": ' + b'9' * 10**5 + b'}',
    'other text': '{"a": "ä"}'.encode('utf-16'),
    'another kind': b'"text"',
    'half': b'{"a": [1, 2',
    'empty': b'',
}

"""A batch on disk, to be shown again to the model that it broke."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes, HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.files import whole
from mmkd.randomness import preserved

#: Structures that a file may name.
_STRUCTURES = {
    one.__name__: one for one in (DetDataSample, InstanceData, PixelData)
}
_TYPE = 'structure'


def save_batch(path: str | Path, batch: Any, **about: Any) -> None:
    """Write a batch as the data loader handed it over.

    Args:
        path: The file.
        batch: Images, and samples with boxes, masks and sizes. What is
            neither number, text nor array is left out.
        **about: Anything plain to stand beside it.
    """
    content = dict(about, batch=_packed(batch), sizes=_sizes(batch))
    with whole(path) as part:
        torch.save(content, part)


def load_batch(path: str | Path) -> dict:
    """Read what :func:`save_batch` wrote; nothing in it is executed.

    Returns:
        ``batch``, which ``model.data_preprocessor`` takes, ``sizes`` of its
        images, and what was said beside.

    Raises:
        ValueError: If it is no such file.
    """
    content = read_checkpoint(path)
    if 'batch' not in content:
        raise ValueError(
            f'load_batch expected a batch in {str(path)!r}, got '
            f'{", ".join(map(str, content))}. Name a non_finite_iter_*.pth of '
            f'a work directory.'
        )
    return dict(content, batch=_unpacked(content['batch']))


def blame(model: nn.Module, batch: Any) -> list[str]:
    """Which losses of a batch have a value or a gradient that is no number.

    Args:
        model: A detector in training mode. Its buffers may change.
        batch: As the data loader hands it over.

    Returns:
        Their names; of a list of losses with the level. Empty if all are
        finite, or only their sum is not.

    Example:
        Of a batch that a run wrote, with the weights it had before::

            batch = load_batch('work_dirs/run/non_finite_iter_812.pth')
            blame(model.train(), batch['batch'])
    """
    found = []
    parameters = [one for one in model.parameters() if one.requires_grad]
    with preserved(), torch.enable_grad():
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
    for name, value in losses.items():
        if 'loss' not in name:
            continue
        levels = [value] if isinstance(value, Tensor) else list(value)
        for level, one in enumerate(levels):
            if not _is_sound(one.mean(), parameters):
                more = f' of level {level}' if len(levels) > 1 else ''
                found.append(f'{name}{more}')
    return found


def _is_sound(loss: Tensor, parameters: list[nn.Parameter]) -> bool:
    if not bool(loss.isfinite()):
        return False
    if not loss.requires_grad:
        return True
    gradients = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True
    )
    return all(
        bool(one.isfinite().all()) for one in gradients if one is not None
    )


def _packed(value: Any) -> Any:
    """The value of tensors, plain numbers, texts and containers alone."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if _is_number(value) else None
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, BaseBoxes):
        return {_TYPE: 'boxes', 'tensor': _packed(value.tensor)}
    if isinstance(value, BitmapMasks):
        return {
            _TYPE: 'bitmaps',
            'masks': _packed(value.masks),
            'size': (value.height, value.width),
        }
    if isinstance(value, PolygonMasks):
        return {
            _TYPE: 'polygons',
            'masks': _packed(value.masks),
            'size': (value.height, value.width),
        }
    if isinstance(value, BaseDataElement):
        kind = next(
            name
            for name, one in {**_STRUCTURES, '': BaseDataElement}.items()
            if isinstance(value, one)
        )
        return {
            _TYPE: kind or 'DetDataSample',
            'meta': _packed(dict(value.metainfo_items())),
            'data': _packed(dict(value.items())),
        }
    if isinstance(value, Mapping):
        return {str(key): _packed(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(map(_packed, value))
            if _is_plain(type(value))
            else [_packed(one) for one in value]
        )
    return value if isinstance(value, (bool, int, float, str)) else None


def _is_plain(kind: type) -> bool:
    return kind in (list, tuple)


def _is_number(value: np.ndarray) -> bool:
    return value.dtype.kind in 'biuf' and value.dtype != np.uint16


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        kind = value.get(_TYPE)
        if kind == 'boxes':
            return HorizontalBoxes(value['tensor'])
        if kind == 'bitmaps':
            return BitmapMasks(value['masks'].numpy(), *value['size'])
        if kind == 'polygons':
            masks = [[one.numpy() for one in mask] for mask in value['masks']]
            return PolygonMasks(masks, *value['size'])
        if kind in _STRUCTURES:
            element = _STRUCTURES[kind](metainfo=_unpacked(value['meta']))
            for name, one in value['data'].items():
                setattr(element, name, _unpacked(one))
            return element
        return {key: _unpacked(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unpacked, value))
    return value


def _sizes(batch: Any) -> list[tuple[int, ...]]:
    """Shapes of the images, wherever in the batch they are."""
    images = batch.get('inputs', ()) if isinstance(batch, Mapping) else ()
    if isinstance(images, Mapping):
        images = [one for group in images.values() for one in group]
    return [tuple(one.shape) for one in images]

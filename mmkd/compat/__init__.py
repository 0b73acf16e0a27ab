"""The two stacks that mmkd runs on, and what they lack.

``openmmlab`` is mmengine, mmcv-lite and mmdet as released; ``onedl`` are
their maintained forks under the same import names. Neither is a hard
requirement, because both own the same folders.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

from mmkd.compat.finder import install

__all__ = ['check_stack', 'install']

_MODULES = ('mmengine', 'mmcv', 'mmdet')
_TORCH = (2, 6)


def check_stack() -> None:
    """Make sure that a stack can be imported, without importing it.

    Raises:
        ImportError: If torch is missing or older than 2.6, or if one of
            mmengine, mmcv and mmdet is missing; it says what to type.
    """
    missing = [
        name for name in ('torch', 'torchvision') if find_spec(name) is None
    ]
    if missing:
        raise ImportError(
            f'mmkd needs torch and torchvision, and found no '
            f'{" and no ".join(missing)}. Install both together, so that they '
            'match: pip install "torch>=2.6" torchvision'
        )
    import torch

    release = tuple(int(n) for n in re.findall(r'\d+', torch.__version__)[:2])
    if release < _TORCH:
        raise ImportError(
            f'mmkd needs torch 2.6 or newer, got {torch.__version__}: older '
            'ones cannot read training checkpoints safely. Update both '
            'together: pip install -U "torch>=2.6" torchvision'
        )
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise ImportError(
            'mmkd extends MMDetection and needs mmengine, mmcv and mmdet; '
            f'found no {" and no ".join(missing)}. Install one stack: '
            'pip install "mmkd[openmmlab]" for the OpenMMLab releases, or '
            'pip install "mmkd[onedl]" for their maintained forks.'
        )

"""What the student does not see: pixels kept for the teachers."""

from __future__ import annotations

from typing import Any

from mmcv.transforms import BaseTransform

from mmkd.pixels import KEPT
from mmkd.registry import TRANSFORMS


@TRANSFORMS.register_module()
class KeepForTeacher(BaseTransform):
    """Keep an image as it is here for the teachers of :func:`distil`.

    What comes behind it in the pipeline is seen by the student alone: noise,
    blur, erased parts, overlays. What moves pixels must stand before it, since
    teachers see what is kept where the student sees its own. The samples carry
    it if the last transform is asked to::

        keys = ['img_id', 'img_path', 'ori_shape', 'img_shape']
        keys += ['scale_factor', 'flip', 'flip_direction', 'teacher_img']
        pipeline = [
            dict(type='mmkd.KeepForTeacher'),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs', meta_keys=keys),
        ]

    A training that keeps pixels and does not pack them is not begun.

    Example:
        >>> import numpy as np
        >>> found = KeepForTeacher()(dict(img=np.zeros((4, 5, 3))))
        >>> found['teacher_img'].shape, found['teacher_img'] is found['img']
        ((4, 5, 3), False)
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results[KEPT] = results['img'].copy()  # some work in place
        return results

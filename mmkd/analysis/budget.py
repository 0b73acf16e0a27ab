"""Widths of a student and its assistant that cost no more than one model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmengine.config import ConfigDict

from mmkd.analysis.cost import gflops
from mmkd.checks import check_fraction, check_positive
from mmkd.registry import DETECTORS
from mmkd.teachers import without_init

#: Settings of a backbone that are its width, of mmdet's ResNet.
WIDTH = ('base_channels', 'stem_channels')


@dataclass(frozen=True)
class Widths:
    """What fits.

    Attributes:
        main: Width of the student.
        assistant: Width of its assistant.
        gflops: Of a detector with these, see
            :func:`mmkd.analysis.cost.gflops`.
        budget: Of the given detector, the same.
    """

    main: int
    assistant: int
    gflops: float
    budget: float


def fit_widths(
    model: Mapping,
    given: Mapping,
    share: float = 0.25,
    divisor: int = 8,
    size: tuple[int, int] = (256, 256),
    settings: Sequence[str] = WIDTH,
) -> Widths:
    """The widest student with an assistant that costs no more than a model.

    Both detectors are counted as a whole, so that convolutions to the
    teacher's channels and a neck that reads these have their part in it.

    Args:
        model: ``model`` of a config whose backbone is a
            :class:`mmkd.backbones.assisted.ResidualBackbone`; its widths do
            not matter.
        given: ``model`` of the config that the two are cut from.
        share: Width of the assistant as a part of the student's. The paper's
            split is not known to us; this is ours.
        divisor: Widths are multiples of it, of the assistant at least one.
        size: Height and width of the image that is counted, pixels.
        settings: What is set to the width in both backbones.

    Raises:
        ValueError: If there is no such backbone, or not even the narrowest
            fits.

    Example:
        Widths for a RetinaNet R-18::

            fit_widths(
                read_config('configs/_base_/students/…_assisted.py').model,
                read_config(
                    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
                ).model,
            )
    """
    check_positive('fit_widths', divisor=divisor, share=share)
    check_fraction('fit_widths', share=share)
    _check_residual(model)
    budget = _cost(given, size)

    def fit(steps: int) -> Widths:
        main = steps * divisor
        assistant = max(1, round(share * steps)) * divisor
        changed = with_widths(model, main, assistant, settings)
        return Widths(main, assistant, _cost(changed, size), budget)

    best = fit(1)
    if best.gflops > budget:
        raise ValueError(
            f'fit_widths: a student and an assistant of {divisor} channels '
            f'cost {best.gflops:.3g} GFLOPs, more than the {budget:.3g} of '
            f'the given model. Set a smaller divisor=, or out_channels= of a '
            f'narrower teacher.'
        )
    fits, above = 1, 2
    while (wider := fit(above)).gflops <= budget:
        fits, best, above = above, wider, 2 * above
    while above - fits > 1:
        middle = (fits + above) // 2
        tried = fit(middle)
        if tried.gflops <= budget:
            fits, best = middle, tried
        else:
            above = middle
    return best


def with_widths(
    model: Mapping,
    main: int,
    assistant: int,
    settings: Sequence[str] = WIDTH,
) -> ConfigDict:
    """The same model with these widths of student and assistant.

    Example:
        >>> net = dict(type='mmkd.ResidualBackbone', main={}, assistant={})
        >>> with_widths(dict(backbone=net), 48, 16).backbone.assistant
        {'base_channels': 16, 'stem_channels': 16}
    """
    _check_residual(model)
    changed = ConfigDict(copy.deepcopy(dict(model)))
    for branch, width in (('main', main), ('assistant', assistant)):
        changed.backbone[branch].update(dict.fromkeys(settings, width))
    return changed


def _cost(model: Mapping, size: tuple[int, int]) -> float:
    return gflops(DETECTORS.build(without_init(model)), size)


def _check_residual(model: Mapping) -> None:
    kind = str(model.get('backbone', {}).get('type'))
    if kind.removeprefix('mmkd.') != 'ResidualBackbone':
        raise ValueError(
            f'fit_widths needs a model with a student and an assistant, got '
            f'the backbone {kind}. Set '
            f"backbone=dict(type='mmkd.ResidualBackbone', main=dict(…), "
            f'assistant=dict(…), out_channels=(…)).'
        )

"""Alignments that make the student's maps comparable with the teacher's.

An alignment is a neck, tuple of maps in, tuple of maps out, that also sees
the maps it should be like; it may read their sizes, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import (
    check_channels,
    check_name,
    check_positive,
    check_statistics,
)
from mmkd.registry import MODELS

MODES = ('nearest', 'nearest-exact', 'bilinear', 'bicubic', 'area')


@MODELS.register_module()
class ConvAdapt(nn.Module):
    """Convolutions of each level, from the student's channels to others.

    Args:
        in_channels: Channels of the maps that come in, of all levels or of
            each.
        out_channels: Channels of the maps that go out, likewise.
        num_levels: Number of levels. A term that names its ``levels`` gives
            it; a list of channels tells it as well.
        kernel_size: Of the convolutions, odd.
        norm: Whether a BatchNorm follows.
        act: Whether a ReLU follows.
        resize: ``'student'`` brings the student's maps to the teacher's
            sizes, bilinearly; None leaves them.
        convs: Convolutions of a level, one after the other, with a ReLU
            between them; all but the first keep the channels.

    Raises:
        ValueError: If the number of levels is unknown or contradictory, the
            kernel even, or there is no convolution.

    Example:
        >>> import torch
        >>> adapt = ConvAdapt([4, 8], 16)
        >>> maps = torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 4, 4)
        >>> [tuple(one.shape) for one in adapt(maps)]
        [(1, 16, 8, 8), (1, 16, 4, 4)]
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        num_levels: int | None = None,
        kernel_size: int = 1,
        norm: bool = False,
        act: bool = False,
        resize: str | None = None,
        convs: int = 1,
    ) -> None:
        super().__init__()
        check_positive('ConvAdapt', convs=convs)
        if kernel_size % 2 != 1:
            raise ValueError(
                f'ConvAdapt needs an odd kernel_size to keep the size of a '
                f'map, got kernel_size={kernel_size}. Try '
                f'kernel_size={kernel_size + 1}.'
            )
        if resize is not None:
            check_name('ConvAdapt', 'resize', resize, ['student'])
        count = count_levels(
            'ConvAdapt', in_channels, out_channels, num_levels
        )
        self.in_channels = each_level(in_channels, count)
        self.out_channels = each_level(out_channels, count)
        self.resize, self.norm = resize, norm
        self.adapts = nn.ModuleList(
            _convs(one, other, convs, kernel_size, norm, act)
            for one, other in zip(self.in_channels, self.out_channels)
        )

    def forward(
        self,
        student: tuple[Tensor, ...],
        like: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        check_count('ConvAdapt', student, len(self.adapts), 'num_levels')
        for one, expected in zip(student, self.in_channels):
            check_channels('ConvAdapt', one, expected)
        if self.norm:
            check_statistics('ConvAdapt', self.training, student)
        # A frozen teacher may run in half precision without autocast.
        maps = tuple(
            adapt(one.to(adapt[0].weight.dtype))
            for adapt, one in zip(self.adapts, student)
        )
        if self.resize is None:
            return maps
        return _resize('ConvAdapt', maps, like, 'bilinear')


@MODELS.register_module()
class ResizeAdapt(nn.Module):
    """Maps resized to those they are compared with; learns nothing.

    Args:
        mode: Of :func:`torch.nn.functional.interpolate`.
        num_levels: Any number fits; a term gives it to every alignment.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 4, 8, 8), torch.zeros(1, 9, 6, 5)
        >>> ResizeAdapt()((student,), (teacher,))[0].shape
        torch.Size([1, 4, 6, 5])
    """

    def __init__(
        self, mode: str = 'bilinear', num_levels: int | None = None
    ) -> None:
        super().__init__()
        check_name('ResizeAdapt', 'mode', mode, MODES)
        self.mode = mode

    def forward(
        self,
        student: tuple[Tensor, ...],
        like: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        return _resize('ResizeAdapt', student, like, self.mode)


def _convs(
    in_channels: int,
    out_channels: int,
    convs: int,
    kernel_size: int,
    norm: bool,
    act: bool,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convs):
        inside = index < convs - 1
        layers += _conv(
            in_channels, out_channels, kernel_size, norm, act or inside
        )
        in_channels = out_channels
    return nn.Sequential(*layers)


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: bool,
    act: bool,
) -> list[nn.Module]:
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
    )
    nonlinearity = 'relu' if act else 'linear'
    nn.init.kaiming_normal_(conv.weight, nonlinearity=nonlinearity)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: list[nn.Module] = [conv]
    if norm:
        layers.append(nn.BatchNorm2d(out_channels))
    if act:
        layers.append(nn.ReLU(inplace=True))
    return layers


def _resize(
    who: str,
    maps: tuple[Tensor, ...],
    like: tuple[Tensor, ...] | None,
    mode: str,
) -> tuple[Tensor, ...]:
    if like is None:
        raise ValueError(
            f'{who} resizes maps to those they are compared with, got '
            f'like=None. Call it as align(student_maps, teacher_maps).'
        )
    check_count(who, maps, len(like), 'levels')
    return tuple(
        one
        if one.shape[2:] == other.shape[2:]
        else F.interpolate(one, other.shape[2:], mode=mode)
        for one, other in zip(maps, like)
    )


def check_count(
    who: str, maps: tuple[Tensor, ...], expected: int, setting: str
) -> None:
    """As many maps as a neck has levels.

    Raises:
        ValueError: If not; the message names the setting.
    """
    if len(maps) == expected:
        return
    raise ValueError(
        f'{who} expects {expected} maps, got {len(maps)}. Set '
        f'{setting} to match.'
    )


def count_levels(
    who: str,
    in_channels: int | Sequence[int],
    out_channels: int | Sequence[int],
    num_levels: int | None,
) -> int:
    """The one number of levels that all arguments agree on."""
    counts = {
        len(one)
        for one in (in_channels, out_channels)
        if not isinstance(one, int)
    }
    if num_levels is not None:
        counts.add(num_levels)
    if len(counts) == 1:
        return counts.pop()
    given = (
        f'in_channels={in_channels}, out_channels={out_channels} and '
        f'num_levels={num_levels}'
    )
    if not counts:
        raise ValueError(
            f'{who} has convolutions of each level and must know how many: '
            f'got {given}. Add for instance levels=(0, 1, 2, 3, 4) to the '
            f'term, or num_levels=5 here.'
        )
    raise ValueError(
        f'{who} needs one number of levels, got {given}. Give each list '
        f'one entry a level.'
    )


def each_level(channels: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Channels of each level, from those of all or of each."""
    if isinstance(channels, int):
        return (channels,) * count
    return tuple(channels)

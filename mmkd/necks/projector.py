"""SimKD's projector: the student's maps, in the teacher's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_channels, check_positive, check_statistics
from mmkd.registry import MODELS


@MODELS.register_module()
class SimKDProjector(nn.Module):
    r"""Three convolutions a level, a bottleneck, which the student keeps.

    .. math:: P(F) = BN(C_{1 \times 1}(\rho(BN(C_{3 \times 3}(
              \rho(BN(C_{1 \times 1}(pool(F)))))))))

    :math:`\rho` is a ReLU; the inner channels are ``out_channels / factor``.
    It stands behind the student's own neck and is deployed: in a config
    ``neck=[dict(type='FPN', …), dict(type='mmkd.SimKDProjector', …)]``. What
    follows it is the teacher's head, see :class:`mmkd.terms.simkd.SimKDTerm`.

    Args:
        in_channels: Channels of the student's maps, of all levels or of each.
        out_channels: Channels of the teacher's maps.
        num_levels: Number of levels; a list of channels tells it as well.
        factor: How many times fewer channels are inside. The paper compares
            2, 4 and 8; the fewer, the cheaper and the worse.
        pool: How many times the maps are made smaller first, by averaging,
            where the student's are finer than the teacher's. The other way
            round the teacher's head would not know its own strides.
        act: Whether a ReLU follows the last norm. Published with one, before
            a classifier whose inputs are never negative; maps of an FPN have
            both signs, which is why there is none here. Set it where the
            teacher's maps come from a ReLU.

    Raises:
        ValueError: If the number of levels is unknown or contradictory, or
            ``factor`` leaves no channel.

    Reference:
        Chen et al., "Knowledge Distillation with the Reused Teacher
        Classifier", CVPR 2022, arXiv:2203.14001. One projector a level and
        ``act`` are ours.

    Example:
        >>> import torch
        >>> projector = SimKDProjector(4, 8, num_levels=2)
        >>> maps = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 4, 4)
        >>> [tuple(one.shape) for one in projector(maps)]
        [(2, 8, 8, 8), (2, 8, 4, 4)]
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int,
        num_levels: int | None = None,
        factor: int = 2,
        pool: int = 1,
        act: bool = False,
    ) -> None:
        super().__init__()
        check_positive('SimKDProjector', factor=factor, pool=pool)
        if out_channels // factor < 1:
            raise ValueError(
                f'SimKDProjector has out_channels / factor channels inside, '
                f'got out_channels={out_channels} and factor={factor}, which '
                f'leaves none. Try factor=2.'
            )
        self.in_channels = _each_level(in_channels, num_levels)
        self.pool = pool
        inner = out_channels // factor
        self.levels = nn.ModuleList(
            nn.Sequential(
                *_block(channels, inner, 1, act=True),
                *_block(inner, inner, 3, act=True),
                *_block(inner, out_channels, 1, act=act),
            )
            for channels in self.in_channels
        )

    def forward(
        self, maps: tuple[Tensor, ...], like: Any = None
    ) -> tuple[Tensor, ...]:
        """Project each level.

        Args:
            maps: The student's, (N, C, H, W) each.
            like: Ignored; alignments of terms get one.
        """
        if len(maps) != len(self.levels):
            raise ValueError(
                f'SimKDProjector expects {len(self.levels)} maps, got '
                f'{len(maps)}. Set num_levels={len(maps)} in it.'
            )
        for one, channels in zip(maps, self.in_channels):
            check_channels('SimKDProjector', one, channels)
        if self.pool > 1:
            maps = tuple(
                F.avg_pool2d(one, self.pool, ceil_mode=True) for one in maps
            )
        check_statistics('SimKDProjector', self.training, maps)
        return tuple(level(one) for level, one in zip(self.levels, maps))


def _block(
    in_channels: int, out_channels: int, kernel: int, act: bool
) -> list[nn.Module]:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, padding=kernel // 2, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels)]
    return [*layers, nn.ReLU(inplace=True)] if act else layers


def _each_level(
    channels: int | Sequence[int], num_levels: int | None
) -> tuple[int, ...]:
    if isinstance(channels, int):
        if num_levels is None:
            raise ValueError(
                f'SimKDProjector has convolutions of its own for each level '
                f'and must know how many there are, got '
                f'in_channels={channels} and no num_levels. Add num_levels=5 '
                f'for an FPN of five maps.'
            )
        return (channels,) * num_levels
    if num_levels not in (None, len(channels)):
        raise ValueError(
            f'SimKDProjector needs one number of levels, got '
            f'in_channels={tuple(channels)} and num_levels={num_levels}. '
            f'Leave num_levels out.'
        )
    return tuple(channels)

"""Projection of a student's maps before their spectra are compared."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmkd.checks import check_channels, check_positive, check_statistics
from mmkd.necks.adapt import check_count, count_levels, each_level
from mmkd.registry import MODELS


@MODELS.register_module()
class SpectralAdapt(nn.Module):
    """Two convolutions of each level, with a smooth step between them.

    .. math:: conv_{3 \\times 3}(GELU(BN(conv_{1 \\times 1}(S))))

    It is what UHKD learns on the student's side: from the student's channels
    to the teacher's. The transform and its low pass follow in
    :class:`mmkd.losses.uhkd.UHKDLoss`, alike for both sides. The order of the
    layers is ours, as the paper's is not known.

    Args:
        in_channels: Channels of the student's maps, of all levels or of each.
        out_channels: Channels of the teacher's, likewise.
        num_levels: Number of levels. A term that names its ``levels`` gives
            it; a list of channels tells it as well.
        mid_channels: Channels between the two; those that go out if None.

    Raises:
        ValueError: If the number of levels is unknown or contradictory.

    Reference:
        Yu et al., "UHKD: A Unified Framework for Heterogeneous Knowledge
        Distillation via Frequency-Domain Representations", arXiv:2510.24116.

    Example:
        >>> import torch
        >>> adapt = SpectralAdapt([4, 8], 16)
        >>> maps = torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)
        >>> [tuple(one.shape) for one in adapt(maps)]
        [(2, 16, 8, 8), (2, 16, 4, 4)]
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        num_levels: int | None = None,
        mid_channels: int | None = None,
    ) -> None:
        super().__init__()
        if mid_channels is not None:
            check_positive('SpectralAdapt', mid_channels=mid_channels)
        count = count_levels(
            'SpectralAdapt', in_channels, out_channels, num_levels
        )
        self.in_channels = each_level(in_channels, count)
        self.out_channels = each_level(out_channels, count)
        self.adapts = nn.ModuleList(
            _project(one, mid_channels or other, other)
            for one, other in zip(self.in_channels, self.out_channels)
        )

    def forward(
        self,
        student: tuple[Tensor, ...],
        like: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        check_count('SpectralAdapt', student, len(self.adapts), 'num_levels')
        for one, expected in zip(student, self.in_channels):
            check_channels('SpectralAdapt', one, expected)
        check_statistics('SpectralAdapt', self.training, student)
        return tuple(
            adapt(one.to(adapt[0].weight.dtype))
            for adapt, one in zip(self.adapts, student)
        )


def _project(
    in_channels: int, mid_channels: int, out_channels: int
) -> nn.Sequential:
    enter = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
    leave = nn.Conv2d(mid_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(enter.weight, nonlinearity='linear')
    nn.init.kaiming_normal_(leave.weight, nonlinearity='relu')
    nn.init.zeros_(leave.bias)
    return nn.Sequential(enter, nn.BatchNorm2d(mid_channels), nn.GELU(), leave)

"""Two backbones whose maps are added: a student and its assistant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmkd.build import build
from mmkd.registry import MODELS

#: Side of the image that tells the channels of a backbone's maps, pixels.
PROBE = 128


@MODELS.register_module()
class ResidualBackbone(BaseModule):
    r"""A student and its assistant, deployed as one: :math:`F_S + F_A`.

    Both look at the image. ``main`` imitates the teacher's maps, ``assistant``
    learns what is left of them, see :class:`mmkd.terms.residual.ResidualTerm`;
    the neck is fed with their sum. Each is a :class:`Branch`, so that a term
    taps ``backbone.main``, ``backbone.assistant`` or, their sum, ``backbone``.

    The two are meant to be cut from one given model, so that they cost no more
    than it does together; :func:`mmkd.analysis.budget.fit_widths` finds the
    widths.

    Args:
        main: Config of the student's backbone.
        assistant: Config of the assistant's, of the same strides.
        out_channels: Channels of the teacher's maps, which the sum has; of
            all levels or of each.
        main_neck: Config of a neck behind ``main``, to add maps of a pyramid
            instead of stages; the detector then has no neck of its own.
        assistant_neck: The same of the assistant.
        init_cfg: As in MMEngine.

    Raises:
        ValueError: If the two differ in number or strides of their maps.

    Reference:
        Gao et al., "Residual Knowledge Distillation", 2020, arXiv:2002.09168.
        The convolutions to the teacher's channels and that the maps of
        detectors are added stage by stage are ours.

    Example:
        >>> import torch
        >>> small = dict(type='mmdet.ResNet', depth=18, out_indices=(1, 2, 3))
        >>> net = ResidualBackbone(
        ...     main=dict(small, base_channels=8, stem_channels=8),
        ...     assistant=dict(small, base_channels=4, stem_channels=4),
        ...     out_channels=(32, 64, 128),
        ... )
        >>> [tuple(one.shape) for one in net(torch.zeros(1, 3, 64, 64))]
        [(1, 32, 8, 8), (1, 64, 4, 4), (1, 128, 2, 2)]
    """

    def __init__(
        self,
        main: Mapping,
        assistant: Mapping,
        out_channels: int | Sequence[int],
        main_neck: Mapping | None = None,
        assistant_neck: Mapping | None = None,
        init_cfg: Mapping | Sequence[Mapping] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.main = Branch(main, out_channels, main_neck, role='main')
        # A residual has both signs, maps behind a ReLU have not.
        self.assistant = Branch(
            assistant,
            out_channels,
            assistant_neck,
            role='assistant',
            always=True,
        )
        if self.main.strides != self.assistant.strides:
            raise ValueError(
                f'ResidualBackbone adds maps of the same strides, got '
                f'{_list(self.main.strides)} of main and '
                f'{_list(self.assistant.strides)} of assistant. Set the same '
                f'out_indices= in both, and strides as well.'
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of each level, of images (N, 3, H, W)."""
        maps, rest = self.main(images), self.assistant(images)
        return tuple(one + other for one, other in zip(maps, rest))


class Branch(BaseModule):
    """A backbone, brought to given channels by a 1x1 convolution a level.

    Args:
        net: Config of the backbone.
        out_channels: Channels of the maps that go out, of all or of each.
        neck: Config of a neck behind it; none if None.
        role: What it is called in messages.
        always: Whether there is a convolution also where the channels are
            those wanted; else the maps stay as they are.

    Attributes:
        strides: Of the maps.

    Raises:
        ValueError: If there are not as many maps as channels.
    """

    def __init__(
        self,
        net: Mapping,
        out_channels: int | Sequence[int],
        neck: Mapping | None = None,
        role: str = 'main',
        always: bool = False,
    ) -> None:
        super().__init__()
        self.net = build(net, f'ResidualBackbone: {role}')
        self.neck = (
            None
            if neck is None
            else build(neck, f'ResidualBackbone: {role}_neck')
        )
        maps = self._probe()
        self.strides = tuple(PROBE / one.shape[-1] for one in maps)
        if isinstance(out_channels, int):
            out_channels = (out_channels,) * len(maps)
        if len(out_channels) != len(maps):
            raise ValueError(
                f'ResidualBackbone has {len(maps)} maps of {role}, got '
                f'out_channels={tuple(out_channels)}. Give one number a map, '
                f'those of the teacher, or set out_indices= in {role}.'
            )
        self.laterals = nn.ModuleList(
            _lateral(one.shape[1], channels, always)
            for one, channels in zip(maps, out_channels)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            lateral(one)
            for lateral, one in zip(self.laterals, self._maps(images))
        )

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.net(images)
        return tuple(maps if self.neck is None else self.neck(maps))

    @torch.no_grad()
    def _probe(self) -> tuple[Tensor, ...]:
        """Maps of an empty image; nothing of the modules is changed."""
        modes = [(one, one.training) for one in self.modules()]
        self.eval()
        like = next(self.net.parameters())
        maps = self._maps(like.new_zeros(1, 3, PROBE, PROBE))
        for one, mode in modes:
            one.training = mode
        return maps


def _lateral(in_channels: int, out_channels: int, always: bool) -> nn.Module:
    if in_channels == out_channels and not always:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity='linear')
    nn.init.zeros_(conv.bias)
    return conv


def _list(strides: Sequence[float]) -> str:
    return ', '.join(f'{one:g}' for one in strides)

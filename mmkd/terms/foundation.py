"""Foundation: the student's cells point where a foundation model's do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.build import build, find
from mmkd.checks import check_positive
from mmkd.necks.adapt import ConvAdapt
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import unit
from mmkd.pixels import Pixels, translate
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: How models trained on ImageNet want their images: RGB, padded with grey.
IMAGENET = Pixels(
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    swapped=True,
    pad_value=0.0,
    divisor=1,
)


@MODELS.register_module()
class FoundationTerm(Term):
    r"""One minus the cosine between a map and a frozen model's features.

    .. math:: \frac{w}{HW} \sum_{ij} 1 - \cos(W s_{ij}, f_{ij})

    The frozen model is no detector and no teacher of the distiller: it was
    trained without boxes, and gives a grid with one vector for each patch of
    the image. It sees the images in its own normalisation, resized so that a
    cell of the student's map is one patch, or a square of patches whose
    features are averaged. W is a 1x1 convolution that learns along.

    The model is built, and its weights are fetched, in the first step of the
    training. Optimiser, state dict, DDP and EMA never see it, and it stays
    frozen and in eval mode. Cells of the padded border do not count.

    Args:
        model: Config of a module that turns images, (N, 3, H, W), into
            features, (N, C, H / patch, W / patch), or several such maps, of
            which the last counts: ``mmkd.TimmFeatures``, or a backbone of
            MMDetection. Its attribute ``pixels``, a
            :class:`mmkd.pixels.Pixels`, says how it wants its images; as
            models of ImageNet do if it has none.
        in_channels: Channels of the student's map.
        out_channels: Channels of the features.
        tap: Part of the student whose map is compared.
        level: Which of its maps; -1 is the coarsest.
        patch: Side of a patch in pixels; the model's attribute ``patch`` if
            None.
        patches: Patches along the side of a cell. At stride 32 and patches of
            14 pixels, 1 shows the image at 7/16 of its size, 2 at 7/8.
        loss_weight: Outer factor w.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If map, level and channels do not fit, while the model is
            built; if the features do not, in the first step.

    Reference:
        Liao et al., "RT-DETRv4: Painlessly Furthering Real-Time Object
        Detection with Vision Foundation Models", arXiv:2510.25257, from the
        abstract and summaries: a projector and a cosine on the deepest map,
        with DINOv3 ViT-B. That the image is resized to the student's cells is
        ours. The authors adjust the weight by norms of gradients, as
        :class:`mmkd.terms.balanced.BalancedTerm` can.
    """

    def __init__(
        self,
        model: Mapping,
        in_channels: int,
        out_channels: int,
        tap: str = 'backbone',
        level: int = -1,
        patch: int | None = None,
        patches: int = 1,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive('FoundationTerm', patches=patches)
        self.model = Frozen(model)
        self.projector = ConvAdapt(in_channels, out_channels, num_levels=1)
        self.path, self.level = tap, level
        self.patch, self.patches = patch, patches
        self.loss_weight = loss_weight

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.tap(student, self.path)
        self.pixels = Pixels.of(student, f'Student {type(student).__name__}')

    def silent(self) -> bool:
        return self.loss_weight == 0

    def forward(self, step: Step) -> Tensor:
        feature = self._map(step)
        (projected,) = self.projector((feature,))
        # There may be no weights yet.
        if step.dry:
            return step.images.new_zeros(())
        target = self._target(step, projected.shape)
        cosine = (unit(projected, 1) * unit(target, 1)).sum(1, keepdim=True)
        count = equal_weight(step.gt, feature)
        loss = (count * (1 - cosine)).sum() / count.sum().clamp(min=1)
        return self.loss_weight * loss

    def _map(self, step: Step) -> Tensor:
        maps = maps_of(step.student.at(self.path), f'The tap {self.path!r}')
        if not -len(maps) <= self.level < len(maps):
            raise ValueError(
                f'{self.path!r} returns {len(maps)} maps, levels 0 to '
                f'{len(maps) - 1}; FoundationTerm asks for level={self.level}.'
            )
        return maps[self.level]

    @torch.no_grad()
    def _target(self, step: Step, shape: torch.Size) -> Tensor:
        """The model's features, one vector for each of the student's cells."""
        model = self.model.at(step.images.device)
        shapes = [
            tuple(one.metainfo.get('img_shape', step.images.shape[-2:])[:2])
            for one in step.samples
        ]
        wanted = getattr(model, 'pixels', IMAGENET)
        images = translate(step.shown, shapes, self.pixels, wanted)
        side = self.patches * self._patch(model)
        size = [cells * side for cells in shape[-2:]]
        images = F.interpolate(images, size, mode='bilinear', antialias=True)
        name = type(model).__name__
        features = maps_of(model(images), name)[-1]
        features = F.avg_pool2d(features, self.patches)
        if features.shape != shape:
            raise ValueError(
                f'{name} made features {tuple(features.shape)} of images '
                f'{tuple(images.shape)}, FoundationTerm needs {tuple(shape)}. '
                f'Set out_channels={features.shape[1]}, and patch= to the '
                f'pixels of its patch; it is {self._patch(model)} now.'
            )
        return features

    def _patch(self, model: nn.Module) -> int:
        patch = self.patch or getattr(model, 'patch', None)
        if patch is None:
            raise ValueError(
                f'{type(model).__name__} does not say how many pixels a patch '
                f'of its features has. Set patch= in FoundationTerm.'
            )
        return patch


class Frozen:
    """A module out of sight of everything that walks modules.

    It is built when it is first needed, so that neither inference nor reading
    a config needs its weights, or the library it comes from.

    Args:
        config: Config of the module.

    Raises:
        ValueError: If there is no such module.
    """

    def __init__(self, config: Mapping) -> None:
        find(config, 'model')
        self.config = config
        self._module: nn.Module | None = None

    def __deepcopy__(self, memo: dict) -> Frozen:
        return self  # copies of the student, such as an EMA, share it

    def at(self, device: torch.device) -> nn.Module:
        """The module on a device, frozen and in eval mode."""
        if self._module is None:
            module = build(self.config, 'model')
            if hasattr(module, 'init_weights'):  # where init_cfg is obeyed
                module.init_weights()
            module.eval()  # of some backbones it returns nothing
            self._module = module.requires_grad_(False)
        return self._module.to(device)

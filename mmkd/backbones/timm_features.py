"""Features of a vision model of timm, as a grid of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmkd.pixels import Pixels
from mmkd.registry import MODELS


@MODELS.register_module()
class TimmFeatures(nn.Module):
    """The last features of a model of timm, (N, C, H / patch, W / patch).

    Its attributes ``patch`` and ``pixels`` say of how many pixels a vector is,
    and how images are to be normalised, as
    :class:`mmkd.terms.foundation.FoundationTerm` asks.

    Args:
        name: Its name there, for instance ``'vit_base_patch14_dinov2'``.
        pretrained: Whether its weights are fetched.
        **settings: Further arguments of ``timm.create_model``;
            ``dynamic_img_size=True`` lets a vision transformer take images of
            any size.

    Raises:
        ImportError: If timm is not installed.

    Reference:
        Wightman, "PyTorch Image Models",
        https://github.com/huggingface/pytorch-image-models.
    """

    def __init__(
        self, name: str, pretrained: bool = True, **settings: Any
    ) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f'TimmFeatures takes {name!r} from timm, which is not '
                f'installed. Type: pip install timm'
            ) from error
        self.model = timm.create_model(
            name, pretrained=pretrained, num_classes=0, **settings
        )
        self.patch = self.model.feature_info[-1]['reduction']
        trained = self.model.pretrained_cfg
        self.pixels = Pixels(
            mean=tuple(255 * one for one in trained['mean']),
            std=tuple(255 * one for one in trained['std']),
            swapped=True,
            pad_value=0.0,
            divisor=1,
        )

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.model.forward_intermediates(
            images,
            indices=1,  # the last block, behind its norm
            norm=True,
            output_fmt='NCHW',
            intermediates_only=True,
        )
        return features

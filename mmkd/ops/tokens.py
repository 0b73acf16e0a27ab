"""Tokens: directions in the space of channels, each of which draws a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd.ops.numeric import as_float, full_precision


def token_masks(feature: Tensor, tokens: Tensor) -> Tensor:
    r"""How much each cell has of each direction, :math:`\sigma(t^\top f)`.

    Args:
        feature: Map of one level, (N, C, H, W).
        tokens: Directions, (T, C).

    Returns:
        Masks in (0, 1), one half where a token is zero, (N, T, H, W).

    Reference:
        Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023,
        arXiv:2205.14589.
    """
    feature, tokens = as_float(feature), as_float(tokens)
    with full_precision(feature):
        return torch.einsum('nchw,tc->nthw', feature, tokens).sigmoid()


def mask_overlap(masks: Tensor) -> Tensor:
    r"""Dice coefficient of two masks, averaged over all pairs and images.

    .. math:: \frac{2 \sum a b}{\sum a^2 + \sum b^2}

    1 where all masks of an image are the same, 0 where none meets another.

    Args:
        masks: At least 0, (N, T, H, W).

    Returns:
        Scalar in [0, 1], 0 for one mask alone.

    Reference:
        Milletari et al., "V-Net: Fully Convolutional Neural Networks for
        Volumetric Medical Image Segmentation", 3DV 2016, arXiv:1606.04797.

    Example:
        >>> left, both = torch.tensor([1.0, 0.0]), torch.ones(2)
        >>> masks = torch.stack([left, both]).view(1, 2, 1, 2)
        >>> round(mask_overlap(masks).item(), 4)  # 2 / (1 + 2)
        0.6667
    """
    flat = as_float(masks).flatten(2)
    with full_precision(flat):
        product = flat @ flat.transpose(1, 2)  # N, T, T
    square = product.diagonal(dim1=1, dim2=2)
    dice = 2 * product / (square[:, :, None] + square[:, None] + 1e-12)
    pairs = torch.ones_like(dice).triu(1)
    return (pairs * dice).sum() / pairs.sum().clamp(min=1)


def tokens_as_map(
    who: str, feature: Tensor, shape: Sequence[int] | None
) -> Tensor:
    """Tokens of image patches, row by row, laid out as the map they are of.

    Args:
        who: Named in the message.
        feature: A map, (N, C, H, W), which stays as it is, or tokens,
            (N, L, C).
        shape: Height and width of the padded batch, which tells the rows and
            columns of L square patches; a square if None.

    Returns:
        Map, (N, C, H, W).

    Raises:
        ValueError: If L patches do not fill the batch.

    Example:
        >>> tokens_as_map('A loss', torch.zeros(2, 12, 8), (48, 64)).shape
        torch.Size([2, 8, 3, 4])
    """
    if feature.dim() == 4:
        return feature
    count = feature.shape[1] if feature.dim() == 3 else 0
    height, width = (1, 1) if shape is None else shape
    rows = max(1, round((count * height / width) ** 0.5))
    columns = round(rows * width / height)
    if rows * columns != count:
        where = 'a square' if shape is None else f'images of {tuple(shape)}'
        raise ValueError(
            f'{who} takes maps (N, C, H, W), or tokens (N, L, C) of square '
            f'patches that fill {where}; got {tuple(feature.shape)}. Leave '
            f'class tokens out, or tap a stage that returns maps.'
        )
    return feature.transpose(1, 2).unflatten(2, (rows, columns))

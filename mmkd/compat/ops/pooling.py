"""Pooling over regions and borders of boxes.

Regions are rows of ``image x1 y1 x2 y2`` in input pixels, (R, 5); times
``spatial_scale`` they are in pixels of the map. Index ``n * C + c`` of a
*plane* says which map (H, W) of (N, C, H, W) is meant.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 - brings torch.ops.torchvision
from torch import Tensor

from .common import chunks, corners, scatter_bilinear, wide

MAXIMUM, AVERAGE = range(2)

# Where the largest sample of a bin without samples is said to lie: outside.
NOWHERE = -2.0


@torch.no_grad()
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Mean or maximum of bilinear samples in each bin of a region.

    Args:
        input: (N, C, H, W).
        rois: (R, 5).
        output: Buffer for the result, (R, C, aligned_height, aligned_width).
        argmax_y: Buffer for the row of the largest sample, in pixels of the
            map, shaped like ``output``; unused for the mean.
        argmax_x: The same for its column.
        aligned_height: Bins in a column.
        aligned_width: Bins in a row.
        spatial_scale: Size of the map over that of the input.
        sampling_ratio: Samples of a bin in each direction; if 0, as many as it
            has pixels.
        pool_mode: 0 maximum, 1 mean.
        aligned: Shift by half a pixel, so that pixel centres match; without,
            regions are at least one pixel wide.

    Reference:
        He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870.
    """
    features, regions = wide(input, rois)
    size = (aligned_height, aligned_width)
    if pool_mode == AVERAGE:
        output.copy_(
            torch.ops.torchvision.roi_align(
                features,
                regions,
                spatial_scale,
                *size,
                sampling_ratio,
                aligned,
            )
        )
        return
    output.zero_()
    argmax_y.fill_(NOWHERE)
    argmax_x.fill_(NOWHERE)
    start, extent = _place(regions, spatial_scale, aligned)
    for rows, grid in _sample_grids(extent, size, sampling_ratio):
        # The samples of a bin are the centres of finer bins, of which each
        # then holds one sample.
        fine = (size[0] * grid[0], size[1] * grid[1])
        samples = torch.ops.torchvision.roi_align(
            features, regions[rows], spatial_scale, *fine, 1, aligned
        )
        largest, where = F.max_pool2d(samples, grid, return_indices=True)
        first, step = start[rows], extent[rows] / extent.new_tensor(fine)
        first, step = (
            first[:, :, None, None, None],
            step[:, :, None, None, None],
        )
        y = first[:, 0] + (where // fine[1] + 0.5) * step[:, 0]
        x = first[:, 1] + (where % fine[1] + 0.5) * step[:, 1]
        output[rows] = largest.to(output.dtype)
        argmax_y[rows] = y.to(argmax_y.dtype)
        argmax_x[rows] = x.to(argmax_x.dtype)


@torch.no_grad()
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the derivative by the map to ``grad_input``."""
    grad, regions, y, x = wide(grad_output, rois, argmax_y, argmax_x)
    if pool_mode == AVERAGE:
        grad_input.add_(
            torch.ops.torchvision._roi_align_backward(
                grad,
                regions,
                spatial_scale,
                aligned_height,
                aligned_width,
                *grad_input.shape,
                sampling_ratio,
                aligned,
            )
        )
    else:
        plane = _planes(regions, grad_input.size(1))[:, :, None, None]
        scatter_bilinear(grad_input, grad, plane.expand_as(grad), y, x)


@torch.no_grad()
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Largest pixel of each bin of a region that includes its last pixel.

    torchvision rounds the region to whole pixels first; mmcv rounds each bin
    outwards, so that neighbouring bins may share pixels.

    Args:
        input: (N, C, H, W).
        rois: (R, 5).
        output: Buffer for the result, (R, C, pooled_height, pooled_width); 0
            for an empty bin.
        argmax: Buffer for the pixel's index in its map, or -1; integers,
            shaped like ``output``.
        pooled_height: Bins in a column.
        pooled_width: Bins in a row.
        spatial_scale: Size of the map over that of the input.

    Reference:
        Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083.
    """
    features, regions = wide(input, rois)
    channels, height, width = features.shape[1:]
    start = regions[:, 1:3] * spatial_scale  # x y
    extent = (regions[:, 3:] + 1) * spatial_scale - start
    solid = (extent > 0).all(1)
    top, rows = _bins(start[:, 1], extent[:, 1], pooled_height, height)
    left, columns = _bins(start[:, 0], extent[:, 0], pooled_width, width)
    image = regions[:, 0].long() * height * width
    flat = features.transpose(0, 1).reshape(channels, -1)  # C, N * H * W
    if not len(regions):
        return
    down, across = int(rows.max()), int(columns.max())
    size = channels * pooled_height * pooled_width * down * across
    step_down = torch.arange(down, device=flat.device)
    step_across = torch.arange(across, device=flat.device)
    for part in chunks(len(regions), size):
        y = top[part, :, None, None, None] + step_down[:, None]
        x = left[part, None, :, None, None] + step_across
        valid = step_down[:, None] < rows[part, :, None, None, None]
        valid = valid & (step_across < columns[part, None, :, None, None])
        valid = valid & solid[part, None, None, None, None]
        valid = valid.flatten(3)  # R, bins down, bins across, pixels
        pixel = (y * width + x).flatten(3).where(valid, 0)
        values = flat[:, pixel + image[part, None, None, None]]
        values = values.masked_fill(~valid, -torch.inf)
        largest, where = values.max(-1)  # C, R, bins down, bins across
        index = pixel.expand_as(values).gather(-1, where[..., None])[..., 0]
        filled = valid.any(-1)
        output[part] = largest.where(filled, 0).transpose(0, 1).to(output)
        argmax[part] = index.where(filled, -1).transpose(0, 1).to(argmax)


@torch.no_grad()
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the derivative by the map to ``grad_input``."""
    grad, regions = wide(grad_output, rois)
    area = grad_input.size(2) * grad_input.size(3)
    plane = _planes(regions, grad_input.size(1))[:, :, None, None]
    index = plane * area + argmax.long().clamp(min=0)
    total = grad.new_zeros(grad_input.numel())
    total.index_add_(0, index.flatten(), (grad * (argmax >= 0)).flatten())
    grad_input.add_(total.view(grad_input.shape))


@torch.no_grad()
def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Mean of bilinear samples in bins that are moved one by one.

    Args:
        input: (N, C, H, W).
        rois: (R, 5).
        offset: ``x y`` of each bin in units of ``gamma`` times the region's
            size, (R, 2, pooled_height, pooled_width), or empty.
        output: Buffer for the result, (R, C, pooled_height, pooled_width).
        pooled_height: Bins in a column.
        pooled_width: Bins in a row.
        spatial_scale: Size of the map over that of the input.
        sampling_ratio: Samples of a bin in each direction; if 0, as many as it
            has pixels.
        gamma: Unit of the offsets.

    Reference:
        Dai et al., "Deformable Convolutional Networks", ICCV 2017,
        arXiv:1703.06211.
    """
    features, regions, shifts = wide(input, rois, offset)
    size = (pooled_height, pooled_width)
    output.zero_()
    for rows, y, x in _moved_samples(
        regions, shifts, size, spatial_scale, sampling_ratio, gamma, features
    ):
        pooled = _mean_of_samples(features, regions[rows], y, x)
        output[rows] = pooled.to(output.dtype)


@torch.no_grad()
def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Add the derivatives to ``grad_input`` and ``grad_offset``."""
    grad, features, regions, shifts = wide(grad_output, input, rois, offset)
    size = (pooled_height, pooled_width)
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        shifts = shifts.detach().requires_grad_()
        for rows, y, x in _moved_samples(
            regions,
            shifts,
            size,
            spatial_scale,
            sampling_ratio,
            gamma,
            features,
        ):
            pooled = _mean_of_samples(features, regions[rows], y, x)
            by_input, by_offset = torch.autograd.grad(
                pooled, (features, shifts), grad[rows], allow_unused=True
            )
            grad_input.add_(by_input)
            if by_offset is not None:
                grad_offset.add_(by_offset)


@torch.no_grad()
def border_align_forward(
    input: Tensor,
    boxes: Tensor,
    output: Tensor,
    argmax_idx: Tensor,
    pool_size: int,
) -> None:
    """Largest bilinear sample along each side of a box.

    Args:
        input: Maps for the top, left, bottom and right sides, (N, 4C, H, W).
        boxes: ``x1 y1 x2 y2`` in pixels of the map, (N, K, 4).
        output: Buffer for the result, (N, C, K, 4).
        argmax_idx: Buffer for the number of the largest sample, integers,
            shaped like ``output``.
        pool_size: Samples of a side, not counting the first.

    Reference:
        Qiu et al., "BorderDet: Border Feature for Dense Object Detection",
        ECCV 2020, arXiv:2007.11056.
    """
    features, corner_boxes = wide(input, boxes)
    count, channels, height, width = features.shape
    channels = channels // 4
    flat = features.reshape(count, 4, channels, height * width)
    start, step = _sides(corner_boxes, pool_size)
    largest = argmax = None
    for number in range(pool_size + 1):
        y, x = (start + number * step).unbind(-1)  # N, 4, K
        sample = 0
        for index, weight in corners(y, x, height, width):
            index = index[:, :, None].expand(-1, -1, channels, -1)
            sample = sample + flat.gather(3, index) * weight[:, :, None]
        if largest is None:
            largest, argmax = sample, torch.zeros_like(sample)
        else:
            better = sample > largest
            largest = torch.where(better, sample, largest)
            argmax = argmax.masked_fill(better, number)
    output.copy_(largest.permute(0, 2, 3, 1))
    argmax_idx.copy_(argmax.permute(0, 2, 3, 1))


@torch.no_grad()
def border_align_backward(
    grad_output: Tensor,
    boxes: Tensor,
    argmax_idx: Tensor,
    grad_input: Tensor,
    pool_size: int,
) -> None:
    """Add the derivative by the maps to ``grad_input``."""
    grad, corner_boxes = wide(grad_output, boxes)
    grad = grad.permute(0, 3, 1, 2)  # N, 4, C, K
    number = argmax_idx.permute(0, 3, 1, 2)[..., None]
    start, step = _sides(corner_boxes, pool_size)
    y, x = (start[:, :, None] + number * step[:, :, None]).unbind(-1)
    count, sides, channels, _ = grad.shape
    plane = torch.arange(count * sides * channels, device=grad.device)
    plane = plane.view(count, sides, channels, 1).expand_as(grad)
    scatter_bilinear(grad_input, grad, plane, y, x)


def _planes(regions: Tensor, channels: int) -> Tensor:
    """Plane of each region and channel, (R, C)."""
    channel = torch.arange(channels, device=regions.device)
    return regions[:, :1].long() * channels + channel


def _place(
    regions: Tensor, scale: float, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Start and extent of regions, ``y x`` in pixels of the map, (R, 2)."""
    shift = 0.5 if aligned else 0.0
    start = regions[:, [2, 1]] * scale - shift
    extent = regions[:, [4, 3]] * scale - shift - start
    return start, extent if aligned else extent.clamp(min=1)


def _sample_grids(
    extent: Tensor, size: tuple[int, int], ratio: int
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Rows of regions that have the same samples a bin, and these, ``y x``."""
    grid = extent / extent.new_tensor(size)
    grid = torch.full_like(grid, ratio) if ratio > 0 else grid.ceil()
    grid = grid.clamp(min=0).long()
    for down, across in grid.unique(dim=0).tolist():
        if down and across:
            same = (grid[:, 0] == down) & (grid[:, 1] == across)
            yield same.nonzero().squeeze(1), (down, across)


def _moved_samples(
    regions: Tensor,
    shifts: Tensor,
    size: tuple[int, int],
    scale: float,
    ratio: int,
    gamma: float,
    features: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of regions with their samples' ``y`` and ``x``.

    Samples are (rows, bins down, bins across, down, across), in pixels.
    """
    start, extent = _place(regions, scale, aligned=True)
    for group, grid in _sample_grids(extent, size, ratio):
        samples = features.size(1) * size[0] * size[1] * grid[0] * grid[1]
        for part in chunks(len(group), samples):
            rows = group[part]
            axes = []
            for axis in range(2):
                bins, inner = size[axis], grid[axis]
                steps = torch.arange(bins * inner, device=regions.device)
                steps = (steps + 0.5) / (bins * inner)
                place = (
                    start[rows, axis, None] + extent[rows, axis, None] * steps
                )
                place = place.view(len(rows), bins, inner)
                if axis == 0:
                    place = place[:, :, None, :, None]
                else:
                    place = place[:, None, :, None, :]
                if shifts.numel():
                    # Offsets come as x y, all else here is y x.
                    move = shifts[rows, 1 - axis] * gamma
                    move = move * extent[rows, axis, None, None]
                    place = place + move[:, :, :, None, None]
                axes.append(place)
            y, x = torch.broadcast_tensors(*axes)
            yield rows, y, x


def _mean_of_samples(
    features: Tensor, regions: Tensor, y: Tensor, x: Tensor
) -> Tensor:
    """Mean over the last two dims of the samples, (R, C, bins, bins)."""
    height, width = features.shape[-2:]
    flat = features.transpose(0, 1).flatten(1)  # C, N * H * W
    image = regions[:, 0].long() * height * width
    total = 0
    for index, weight in corners(y, x, height, width):
        pixel = index + image[:, None, None, None, None]
        total = total + (flat[:, pixel] * weight).mean((-2, -1))
    return total.transpose(0, 1)


def _bins(
    start: Tensor, extent: Tensor, bins: int, limit: int
) -> tuple[Tensor, Tensor]:
    """First pixel and number of pixels of each bin in the map, (R, bins)."""
    edges = torch.arange(bins + 1, device=start.device)
    edges = edges * (extent / bins)[:, None] + start[:, None]
    first = edges[:, :-1].floor().clamp(0, limit).long()
    last = edges[:, 1:].ceil().clamp(0, limit).long()
    return first, (last - first).clamp(min=0)


def _sides(boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """Start and step ``y x`` of the walk along each side, (N, 4, K, 2).

    The top and left sides are walked from the upper left corner, the bottom
    and right sides from the lower right one.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    upper, lower = torch.stack((y1, x1), -1), torch.stack((y2, x2), -1)
    nothing = torch.zeros_like(x1)
    across = torch.stack((nothing, (x2 - x1) / pool_size), -1)
    down = torch.stack(((y2 - y1) / pool_size, nothing), -1)
    start = torch.stack((upper, upper, lower, lower), 1)
    return start, torch.stack((across, down, -across, -down), 1)

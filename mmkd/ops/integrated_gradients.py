"""Attribution: which pixels a number that a network gives goes back to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

#: Deviation of the blur, in shares of the image's shorter side.
BLUR = 1 / 16


def integrated_gradients(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    baseline: Tensor,
    steps: int = 32,
    batch: int = 4,
) -> Tensor:
    r"""What each entry of an image adds to a function, from a baseline on.

    .. math:: IG_i = (x_i - x^0_i) \frac{1}{K} \sum_{k=0}^{K-1}
        \frac{\partial F}{\partial x_i}
        \left(x^0 + \frac{k + 1/2}{K} (x - x^0)\right)

    The midpoint rule: of a linear function every number of steps gives
    :math:`w (x - x^0)`. Completeness: the sum is :math:`F(x) - F(x^0)`, up
    to the error of the steps.

    Args:
        function: F of a batch, (M, ...) → (M,), each image by itself.
        image: x, of any shape.
        baseline: x0, of the same.
        steps: K.
        batch: Points of the path that are seen at once, for memory alone.

    Returns:
        Of the shape of ``image``, signed.

    Raises:
        ValueError: If ``steps`` or ``batch`` is below 1, or shapes differ.

    Reference:
        Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML
        2017, arXiv:1703.01365.

    Example:
        >>> x, zero = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> integrated_gradients(lambda x: x.prod(1), x, zero).tolist()
        [1.0, 1.0]
    """
    if steps < 1 or batch < 1 or image.shape != baseline.shape:
        raise ValueError(
            f'integrated_gradients needs one step and a batch of one or '
            f'more, and a baseline of the shape of the image, got {steps} '
            f'and {batch}, {tuple(baseline.shape)} and '
            f'{tuple(image.shape)}. The default is steps=32, batch=4.'
        )
    way = image - baseline
    places = (torch.arange(steps, device=image.device) + 0.5) / steps
    total = torch.zeros_like(way)
    for some in places.split(batch):
        some = some.reshape(-1, *[1] * image.dim())
        points = (baseline + some * way).detach().requires_grad_()
        with torch.enable_grad():
            value = function(points).sum()
        total += torch.autograd.grad(value, points)[0].sum(0)
    return way * total / steps


def blurred(image: Tensor) -> Tensor:
    """An image without its details, (..., C, H, W) → same.

    A Gaussian of :data:`BLUR` of the shorter side.

    Example:
        >>> blurred(torch.ones(1, 3, 32, 40)).sub(1).abs().max().item() < 1e-5
        True
    """
    deviation = BLUR * min(image.shape[-2:])
    size = 2 * math.ceil(3 * deviation) + 1
    for kernel in ([size, 1], [1, size]):  # one axis at a time
        image = gaussian_blur(image, kernel, [deviation, deviation])
    return image

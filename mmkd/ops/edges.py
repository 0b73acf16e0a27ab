r"""Edges of boxes as distributions, wherever their bins have come to lie.

A head of distributions says of each edge of a box how probable it is that it
lies b steps from the anchor's centre, b = 0 … B - 1. That is a random variable
with B places in the image. Where the image is moved, the places move with its
pixels and the probabilities stay; another head, with a centre and a stride of
its own, has bins at other places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.structures.constants import constant

#: Which of x1 y1 x2 y2 each of left, top, right and bottom is; away from the
#: centre coordinates fall or grow.
SIGNS = (-1.0, -1.0, 1.0, 1.0)


def bin_places(origins: Tensor, steps: Tensor, count: int) -> Tensor:
    """Where the bins of four edges lie in the image.

    Args:
        origins: The centres from which edges are measured, x y, (M, 2).
        steps: Pixels from bin to bin along x and y, (M, 2).
        count: B, the bins of an edge.

    Returns:
        Coordinates of left, top, right and bottom, (M, 4, B).

    Example:
        >>> centre, step = torch.tensor([[8.0, 9.0]]), torch.tensor([[2.0, 1]])
        >>> bin_places(centre, step, 3).tolist()
        [[[8.0, 6.0, 4.0], [9.0, 8.0, 7.0], [8.0, 10.0, 12.0], [9.0, 10.0, 11.0]]]
    """  # noqa: E501 - what Python prints
    bins = torch.arange(count, device=origins.device, dtype=origins.dtype)
    away = steps.repeat(1, 2) * constant(SIGNS, steps)  # M, 4
    return origins.repeat(1, 2)[..., None] + away[..., None] * bins


def on_bins(
    probs: Tensor, places: Tensor, origins: Tensor, steps: Tensor, count: int
) -> Tensor:
    """Edge distributions on the bins of another anchor.

    What lies between two bins is shared between them as its distance from
    them, which keeps the mean; what lies beyond the last ones goes to them. On
    bins of the same places it is the same distribution.

    Args:
        probs: (M, 4, B'), of sum 1 along the last axis.
        places: Where in the image, (M, 4, B').
        origins: The centres from which the other bins are counted, (M, 2).
        steps: Pixels from one of them to the next, (M,).
        count: B, the bins of an edge there.

    Returns:
        (M, 4, B), of sum 1.
    """
    signs = constant(SIGNS, steps)[:, None]
    apart = (places - origins.repeat(1, 2)[..., None]) * signs
    bins = (apart / steps[:, None, None]).clamp(0, count - 1)
    low = bins.floor()
    share = bins - low
    low = low.long()
    found = probs.new_zeros(*probs.shape[:2], count)
    found.scatter_add_(2, low, probs * (1 - share))
    return found.scatter_add_(2, (low + 1).clamp(max=count - 1), probs * share)


def tempered_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Divergence of a softened distribution from softened logits.

    .. math:: \frac{\tau^2}{B} \sum_b p_b \log \frac{p_b}{q_b}, \quad
              p \propto P^{1 / \tau}, \; q = \mathrm{softmax}(z / \tau)

    A bin to which the teacher gives nothing gets nothing at any temperature.

    Args:
        student: Logits z, (…, B).
        teacher: Probabilities P, (…, B), without gradient.
        temperature: :math:`\tau`.

    Returns:
        (…).
    """
    log_q = F.log_softmax(student / temperature, -1)
    p = teacher.pow(1 / temperature)
    p = p / p.sum(-1, keepdim=True)
    return temperature**2 * (torch.xlogy(p, p) - p * log_q).mean(-1)

"""Contrast: what belongs together lies together, the rest apart."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.ops.numeric import full_precision, unit, zero_of
from mmkd.ops.relations import ABSENT


def supervised_contrast(
    vectors: Tensor,
    labels: Tensor,
    temperature: float,
    valid: Tensor | None = None,
) -> Tensor:
    r"""How badly vectors of one class are told from those of others.

    With directions :math:`z`, :math:`P_i` the others of the class of i, and
    the mean over all i that have any:

    .. math:: -\frac{1}{|P_i|} \sum_{p \in P_i} \log
        \frac{e^{z_i z_p / \tau}}{\sum_{a \ne i} e^{z_i z_a / \tau}}

    Args:
        vectors: Of any length, (R, C).
        labels: Class of each, (R,).
        temperature: The formula's tau.
        valid: Whether each is there, (R,); all are if None.

    Returns:
        Scalar; zero for fewer than two vectors, or if no two share a class.

    Reference:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020,
        arXiv:2004.11362, with the sum over positives outside.

    Example:
        >>> vectors = torch.tensor([[1.0, 0], [2.0, 0]])
        >>> supervised_contrast(vectors, torch.zeros(2), 0.1).item()
        0.0
    """
    if len(vectors) < 2:
        return zero_of(vectors)
    directions = unit(vectors, dim=1)
    with full_precision(directions):
        logits = directions @ directions.T / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    if valid is None:
        valid = torch.ones_like(labels, dtype=torch.bool)
    other = valid & ~itself
    scores = logits.masked_fill(~other, ABSENT).log_softmax(1)
    positive = (labels[:, None] == labels) & other & valid[:, None]
    count = positive.sum(1)
    each = torch.where(positive, -scores, 0).sum(1) / count.clamp(min=1)
    return each.sum() / (count > 0).sum().clamp(min=1)

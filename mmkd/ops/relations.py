"""Relations: what each of several things sees in the others."""

from __future__ import annotations

from torch import Tensor

from mmkd.ops.numeric import as_float, full_precision

#: Logit of what is not there: nothing, and still finite.
ABSENT = -1e30


def row_divergence(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None
) -> Tensor:
    r"""Divergence of the softmax of each row from the teacher's.

    .. math:: KL(softmax(t_m) \| softmax(s_m))

    Args:
        student, teacher: Logits, (…, M, K).
        valid: Whether each of the K is there, (…, K); all are if None.

    Returns:
        At least 0, (…, M); 0 where nothing is there.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 3)
        >>> row_divergence(x + 5, x).abs().max().item() < 1e-6
        True
    """
    student, teacher = as_float(student), as_float(teacher)
    if valid is not None:
        absent = ~valid.bool()[..., None, :]
        student = student.masked_fill(absent, ABSENT)
        teacher = teacher.masked_fill(absent, ABSENT)
    own, other = student.log_softmax(-1), teacher.log_softmax(-1)
    return (other.exp() * (other - own)).sum(-1)


def products(tokens: Tensor) -> Tensor:
    r"""Logits of the relations of tokens, :math:`X X^\top / \sqrt{C}`.

    Args:
        tokens: (…, M, C).

    Returns:
        (…, M, M), float32.

    Example:
        >>> import torch
        >>> products(torch.tensor([[2.0, 0, 0, 0], [0, 4.0, 0, 0]])).tolist()
        [[2.0, 0.0], [0.0, 8.0]]
    """
    tokens = as_float(tokens)
    with full_precision(tokens):
        return tokens @ tokens.transpose(-1, -2) / tokens.shape[-1] ** 0.5


def relation_divergence(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Mean divergence of the relations of tokens from the teacher's.

    The rows of tokens that are there count alike, in whatever group they are.
    Relations know no channels: widths may differ, and a rotation of the
    channels of either side changes nothing.

    Args:
        student: Groups of tokens, (…, M, C).
        teacher: The same tokens, without gradient, (…, M, C').
        valid: Which tokens are there, (…, M) or what expands to it; all are
            if None.

    Returns:
        Scalar >= 0.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 4)
        >>> relation_divergence(x.flip(2), x).item() < 1e-6
        True
    """
    rows = row_divergence(products(student), products(teacher), valid)
    if valid is None:
        return rows.mean()
    weight = valid.to(rows).expand_as(rows)
    return (weight * rows).sum() / weight.sum().clamp(min=1)

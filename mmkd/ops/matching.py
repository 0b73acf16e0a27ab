"""Which query of one detector belongs to which of another."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmkd.ops.boxes import corners, giou
from mmkd.ops.numeric import as_float, full_precision


def pairwise_box_cost(
    student: Tensor,
    teacher: Tensor,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Tensor:
    r"""How far apart all pairs of boxes are, as DETR matches them.

    .. math:: \lambda_1 \lVert a - b \rVert_1 + \lambda_2 (1 - GIoU(a, b))

    Args:
        student: Centre, width and height, (N, Q, 4).
        teacher: Likewise, (N, P, 4).
        l1_weight, giou_weight: Of the two distances. DETR's by default.

    Returns:
        (N, Q, P), at least 0.
    """
    student, teacher = as_float(student), as_float(teacher)
    pairs = student[:, :, None], teacher[:, None]
    near = giou(*(corners(one) for one in pairs))
    distance = (pairs[0] - pairs[1]).abs().sum(-1)
    return l1_weight * distance + giou_weight * (1 - near)


def pairwise_class_divergence(
    student: Tensor, teacher: Tensor, softmax: bool = False
) -> Tensor:
    """How far apart the classes of all pairs of queries are.

    That of :func:`mmkd.losses.query.query_class_divergence`, so that what is
    matched by it cannot be had any nearer; by products of matrices, without a
    value for each pair and class.

    Args:
        student: Logits, (N, Q, C).
        teacher: Likewise, (N, P, C).
        softmax: Whether the C are classes of one distribution.

    Returns:
        (N, Q, P), at least 0.

    Example:
        >>> z = torch.tensor([[[2.0, -1.0]]])
        >>> round(pairwise_class_divergence(z, z).item(), 5)
        0.0
    """
    student, teacher = as_float(student), as_float(teacher)
    with full_precision(student):
        if softmax:
            own, other = student.log_softmax(-1), teacher.log_softmax(-1)
            chance = other.exp()
            least = (chance * other).sum(-1)
            found = least[:, None] - own @ chance.mT
        else:
            chance, rest = teacher.sigmoid(), (-teacher).sigmoid()
            least = chance * logsigmoid(teacher) + rest * logsigmoid(-teacher)
            found = (
                least.sum(-1)[:, None]
                - logsigmoid(student) @ chance.mT
                - logsigmoid(-student) @ rest.mT
            )
    return found.clamp(min=0)


def pairwise_label_cost(
    logits: Tensor,
    labels: Tensor,
    softmax: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    eps: float = 1e-8,
) -> Tensor:
    r"""How badly queries fit labels, as DETR and its kind match them.

    With one softmax :math:`-p_c`; with a sigmoid a class what a focal loss
    asks if the label is c, less what it asks if it is not.

    Args:
        logits: Of queries, (..., Q, C).
        labels: Classes of objects, (..., M).
        softmax: Whether the C are classes of one distribution.
        alpha, gamma: Of the focal loss.
        eps: Least chance to take the logarithm of.

    Returns:
        (..., Q, M).

    Example:
        >>> logits = torch.tensor([[[0.0, 3.0]]])
        >>> cost = pairwise_label_cost(logits, torch.tensor([[0, 1]]))[0, 0]
        >>> bool(cost[1] < cost[0])
        True
    """
    logits = as_float(logits)
    shape = *logits.shape[:-1], labels.shape[-1]
    index = labels[..., None, :].expand(shape)
    if softmax:
        return -logits.softmax(-1).gather(-1, index)
    chance = logits.sigmoid().gather(-1, index)
    yes = alpha * (1 - chance) ** gamma * -(chance + eps).log()
    no = (1 - alpha) * chance**gamma * -(1 - chance + eps).log()
    return yes - no


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest way to give each column a row of its own.

    The one place where query-based methods wait for the device, as
    MMDetection's own assigner does: the problem is solved on the CPU.

    Args:
        cost: Of each row for each column, (N, Q, P). What is not finite is
            taken for very expensive.

    Returns:
        Row of each column, (N, P), 0 where there are fewer rows than columns
        and none was left; and whether there is one, (N, P).

    Reference:
        Kuhn, "The Hungarian method for the assignment problem", 1955; by
        scipy.

    Example:
        >>> row, found = assign(torch.tensor([[[1.0, 5], [0, 1], [9, 9]]]))
        >>> row.tolist(), found.tolist()
        ([[0, 1]], [[True, True]])
    """
    cost = as_float(cost.detach()).nan_to_num(1e6, 1e6, -1e6)
    rows = torch.zeros(cost.shape[0], cost.shape[2], dtype=torch.long)
    found = torch.zeros_like(rows, dtype=torch.bool)
    for image, table in enumerate(cost.cpu().numpy()):
        row, column = linear_sum_assignment(table)
        rows[image, column] = torch.from_numpy(row)
        found[image, column] = True
    return rows.to(cost.device), found.to(cost.device)


def pick_queries(values: Tensor, index: Tensor) -> Tensor:
    """Of each image the queries that an index names.

    Args:
        values: What is said of all queries, (…, N, Q, K).
        index: Of the queries wanted, (N, P).

    Returns:
        (…, N, P, K).

    Example:
        >>> values = torch.tensor([[[10.0], [11], [12]]])
        >>> pick_queries(values, torch.tensor([[2, 0]])).flatten().tolist()
        [12.0, 10.0]
    """
    shape = *values.shape[:-2], index.shape[-1], values.shape[-1]
    return values.gather(-2, index[..., None].expand(shape))

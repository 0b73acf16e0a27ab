"""Focal losses, of sigmoids and of a softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import wide


@torch.no_grad()
def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    r"""Binary focal loss of every class.

    .. math::
        -\alpha (1 - p)^\gamma \log p \quad\text{for the target class, and}
        \quad -(1 - \alpha) p^\gamma \log (1 - p) \quad\text{for all others.}

    Args:
        input: Logits, (N, C).
        target: Class of each row, (N,); C is background.
        weight: Factor of each row by its class, (C,), or empty.
        output: Buffer for the loss, (N, C).
        gamma: Exponent.
        alpha: Weight of the target class.

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
        arXiv:1708.02002.
    """
    logits, weights = wide(input, weight)
    probs = logits.sigmoid()
    positive = -alpha * (1 - probs) ** gamma * F.logsigmoid(logits)
    negative = (alpha - 1) * probs**gamma * F.logsigmoid(-logits)
    loss = torch.where(_one_hot(target, logits), positive, negative)
    output.copy_(loss * _row_weights(target, weights))


@torch.no_grad()
def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative of the loss by the logits, written to ``grad_input``."""
    logits, weights = wide(input, weight)
    probs = logits.sigmoid()
    rest = 1 - probs
    positive = alpha * rest**gamma
    positive = positive * (gamma * probs * F.logsigmoid(logits) - rest)
    negative = (1 - alpha) * probs**gamma
    negative = negative * (probs - gamma * rest * F.logsigmoid(-logits))
    grad = torch.where(_one_hot(target, logits), positive, negative)
    grad_input.copy_(grad * _row_weights(target, weights))


@torch.no_grad()
def softmax_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    r"""Focal loss :math:`-\alpha (1 - p)^\gamma \log p` of the target class.

    Args:
        input: Probabilities, (N, C).
        target: Class of each row, (N,); negative rows are ignored.
        weight: Factor of each row by its class, (C,), or empty.
        output: Buffer for the loss, (N,).
        gamma: Exponent.
        alpha: Factor of the whole.
    """
    probs, weights = wide(input, weight)
    picked = _picked(probs, target)
    loss = -alpha * (1 - picked) ** gamma * _log(picked)
    loss = loss * _row_weights(target, weights).squeeze(1)
    output.copy_(torch.where(target >= 0, loss, 0))


@torch.no_grad()
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative by the logits behind the softmax, in ``grad_input``.

    ``buff`` (N,) takes the derivative by the logit of the target class, up to
    the factor :math:`1 - p`.
    """
    probs, weights = wide(input, weight)
    picked = _picked(probs, target)
    # The smallest number keeps 0 * inf out of the limit p = 1.
    rest = (1 - picked).clamp(min=torch.finfo(probs.dtype).tiny)
    slope = gamma * rest ** (gamma - 1) * picked * _log(picked)
    slope = alpha * (slope - rest**gamma)
    slope = slope * _row_weights(target, weights).squeeze(1)
    slope = torch.where(target >= 0, slope, 0)
    buff.copy_(slope)
    grad_input.copy_(
        slope[:, None] * (_one_hot(target, probs).float() - probs)
    )


def _one_hot(target: Tensor, scores: Tensor) -> Tensor:
    """(N,) classes → (N, C) booleans; background has no class."""
    classes = torch.arange(scores.size(1), device=scores.device)
    return target[:, None] == classes


def _row_weights(target: Tensor, weights: Tensor) -> Tensor:
    """Weight of each row's class, (N, 1); 1 for background or without any."""
    if not weights.numel():
        return weights.new_ones(())[None, None]
    weights = torch.cat((weights, weights.new_ones(1)))
    # Indexing from the end sends ignored rows (-1) to the 1 as well.
    return weights[target.clamp(-1, weights.numel() - 1)][:, None]


def _picked(probs: Tensor, target: Tensor) -> Tensor:
    """Probability of each row's class, (N,)."""
    target = target.clamp(0, probs.size(1) - 1)
    return probs.gather(1, target[:, None]).squeeze(1)


def _log(probs: Tensor) -> Tensor:
    return probs.clamp(min=torch.finfo(torch.float32).tiny).log()

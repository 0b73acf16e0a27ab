"""CMKD: class vectors correlate, by value where easy, by order where hard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mmkd.checks import check_fraction, check_name, check_positive
from mmkd.ops.numeric import zscore
from mmkd.ops.ranks import soft_rank
from mmkd.ops.scores import (
    ACTIVATIONS,
    image_samples,
    top_score,
    valid_samples,
)
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

DIFFICULTIES = ('teacher_entropy', 'equal')
#: Fewer classes have no correlation but 1 and -1.
FEWEST = 3


def cmkd_loss(
    student: Tensor,
    teacher: Tensor,
    difficulty: Tensor,
    weight: Tensor,
    rank_eps: float = 0.1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    r"""One minus the correlation of the values, and that of the ranks.

    .. math:: L_P = \sum_m w_m (1 - d_m) \big(1 - \rho(\hat z^S_m,
        \hat z^T_m)\big), \quad
        L_R = \sum_m w_m d_m \big(1 - \rho(r(\hat z^S_m), r(\hat z^T_m))\big)

    :math:`\hat z` are the logits of a sample, standardised over its classes,
    :math:`r` their soft ranks, :math:`\rho` Pearson's correlation over the
    classes, so that the second one is Spearman's, and w the weights, divided
    by their sum. Two vectors of which one is flat count as unrelated, without
    a gradient.

    Args:
        student: Logits of all samples, (M, K).
        teacher: The same of the teacher, without gradient.
        difficulty: d, the share of the order, in [0, 1], (M,).
        weight: How much each sample counts, (M,).
        rank_eps: Of :func:`mmkd.ops.ranks.soft_rank`, in deviations of a
            sample's logits.
        eps: Least sum of the weights.

    Returns:
        Scalars in [0, 2], by value and by order.

    Reference:
        Niu et al., "Efficient and Robust Knowledge Distillation from A
        Stronger Teacher Based on Correlation Matching",
        arXiv:2410.06561.

    Example:
        >>> import torch
        >>> x, half = torch.randn(9, 5), torch.full((9,), 0.5)
        >>> same = cmkd_loss(3 * x - 1, x, half, torch.ones(9))
        >>> max(part.item() for part in same) < 1e-5
        True
        >>> [round(part.item(), 4) for part in cmkd_loss(-x, x, half, half)]
        [1.0, 1.0]
    """
    sides = zscore(student), zscore(teacher)
    ranks = (zscore(soft_rank(one, rank_eps)) for one in sides)
    value, order = (1 - _product(*pair) for pair in (sides, ranks))  # M
    weight = weight / weight.sum().clamp(min=eps)
    return (
        (weight * (1 - difficulty) * value).sum(),
        (weight * difficulty * order).sum(),
    )


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of rows that are standardised, (M, K) → (M,)."""
    return (one * other).mean(1)


def class_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""How undecided a sample is between its classes.

    .. math:: \frac{1}{\log K} H(\text{softmax}(z / \tau))

    Args:
        logits: Of all samples, (M, K).
        temperature: Divides them.

    Returns:
        From 0, one class alone, to 1, all alike, (M,).

    Example:
        >>> import torch
        >>> class_entropy(torch.tensor([[0.0, 0, 0], [99, 0, 0]])).round()
        tensor([1., 0.])
    """
    log_probs = (logits / temperature).log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return (entropy / math.log(logits.shape[1])).clamp(0, 1)


@MODELS.register_module()
class CMKDLoss(nn.Module):
    r"""Correlation matching at the anchors where the teacher sees objects.

    The class logits of an anchor correlate with the teacher's, by value
    (Pearson) and by order (Spearman, of soft ranks). The harder an anchor is,
    the more the order counts, and the less the value: the share d of the
    order is the teacher's entropy over the classes, that of the value 1 - d.

    Of each image the ``topk`` anchors with the teacher's largest scores are
    compared, each weighted by that score, and the sum is divided by the sum
    of the weights of all images. Both correlations ignore the scale and the
    offset of an anchor's logits, so that nothing is said about how sure the
    student should be: that is left to the detection loss, or to a small term
    with :class:`~mmkd.losses.bckd.BCKDClassLoss`. The box part is
    :class:`~mmkd.terms.box.BoxTerm` with
    :class:`~mmkd.terms.weights.score.ScoreWeight`.

    The ranks of an anchor take K² numbers for K classes. With hundreds of
    classes, lower ``topk``.

    The second stage of a detector is compared by
    :class:`~mmkd.terms.proposal.ProposalTerm` with this loss as its
    ``cls_loss`` and ``activation='softmax'``. There ``topk`` is that of the
    batch.

    Args:
        num_classes: Scores of one anchor, with the background's where the
            head has one; None if a cell has a single anchor.
        activation: ``'sigmoid'`` for heads with one binary classifier a
            class, ``'softmax'`` for the others; says what an anchor's score
            is. What is compared are logits.
        rank_eps: Softness of the ranks, in deviations of an anchor's logits;
            the larger, the more they are like the values.
        topk: Anchors of an image that are compared; all if None.
        min_score: The teacher's score up to which an anchor does not count.
        difficulty: ``'teacher_entropy'``, or ``'equal'``: value and order by
            halves at every anchor.
        temperature: Of the softmax whose entropy is taken.
        has_background: With softmax, the last class is the background, as in
            MMDetection's heads, and does not count as the teacher's largest
            score.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
        loss_weight: Factor of both parts, the paper's lambda.

    Returns:
        ``pearson`` and ``spearman``; ``watch_difficulty`` is the mean d.

    Raises:
        ValueError: If a setting is unknown or out of range, maps do not fit,
            or there are fewer than three classes.

    Not kept:
        batch: The sum is divided by the weights of the whole batch.

    Reference:
        Niu et al., "Efficient and Robust Knowledge Distillation from A
        Stronger Teacher Based on Correlation Matching",
        arXiv:2410.06561. Read: the abstract and a summary; there is no code.
        Of the paper are the two correlations, the standardised logits, and
        that both are weighed by how difficult a sample is. It speaks of one
        label an image, and how it ranks with a gradient and measures the
        difficulty is not known here: the sum of sigmoids, the entropy and all
        that is said of anchors are ours.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(num_classes=4)

    def __init__(
        self,
        num_classes: int | None = None,
        activation: str = 'sigmoid',
        rank_eps: float = 0.1,
        topk: int | None = 1000,
        min_score: float = 0.0,
        difficulty: str = 'teacher_entropy',
        temperature: float = 1.0,
        has_background: bool = True,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 2.0,
    ) -> None:
        super().__init__()
        who = 'CMKDLoss'
        check_name(who, 'activation', activation, ACTIVATIONS)
        check_name(who, 'difficulty', difficulty, DIFFICULTIES)
        check_positive(who, rank_eps=rank_eps, temperature=temperature)
        check_fraction(who, min_score=min_score)
        if topk is not None:
            check_positive(who, topk=topk)
        self.num_classes = num_classes
        self.activation = activation
        self.rank_eps = rank_eps
        self.topk = topk
        self.min_score = min_score
        self.difficulty = difficulty
        self.temperature = temperature
        self.has_background = has_background
        self.keep_padding = keep_padding
        self.keep_ignored = keep_ignored
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> dict[str, Tensor]:
        one, other, weight = valid_samples(
            'CMKDLoss',
            student,
            teacher,
            gt,
            self.num_classes,
            self.keep_padding,
            self.keep_ignored,
        )
        _check_classes(one)
        score = top_score(other, self.activation, self.has_background)
        weight = weight * score * (score > self.min_score)
        if self.topk is not None:
            one, other, weight = self._likeliest(student, one, other, weight)
        hard = (
            class_entropy(other, self.temperature)
            if self.difficulty == 'teacher_entropy'
            else other.new_full((len(other),), 0.5)
        )
        value, order = cmkd_loss(one, other, hard, weight, self.rank_eps)
        mean = (weight * hard).sum() / weight.sum().clamp(min=1e-6)
        return dict(
            pearson=self.loss_weight * value,
            spearman=self.loss_weight * order,
            watch_difficulty=mean,
        )

    def _likeliest(
        self,
        maps: Sequence[Tensor],
        student: Tensor,
        teacher: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ``topk`` samples of each image that have the largest weight."""
        student, teacher, weight = (
            image_samples(one, maps, self.num_classes)
            for one in (student, teacher, weight)
        )  # N, P, K twice, and N, P
        count = min(self.topk, weight.shape[1])
        weight, index = weight.topk(count, dim=1)
        rows = index[..., None].expand(-1, -1, student.shape[2])
        student, teacher = (
            one.gather(1, rows).flatten(0, 1) for one in (student, teacher)
        )
        return student, teacher, weight.flatten()


def _check_classes(samples: Tensor) -> None:
    if samples.shape[1] < FEWEST:
        raise ValueError(
            f'CMKDLoss correlates the scores of at least {FEWEST} classes, '
            f'got {samples.shape[1]}: two correlate fully or not at all. Use '
            f'SoftTargetLoss for so few.'
        )

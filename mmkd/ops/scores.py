"""Class scores of dense heads, one row for each anchor of each cell.

A dense head gives maps of logits (N, A * C, H, W) for A anchors a cell and C
classes; channel ``anchor * C + class``. Here all levels and images are laid
out as one matrix, (M, C), whose rows are called samples. What holds for cells
only, such as a mask or a label, becomes a vector of the same order, (M,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.checks import check_same_shape
from mmkd.ops.masks import (
    box_spans,
    draw_boxes,
    require_ground_truth,
    valid_mask,
)
from mmkd.ops.numeric import as_float
from mmkd.structures import GroundTruth

#: How a head turns logits into probabilities.
ACTIVATIONS = ('sigmoid', 'softmax')

#: Label of a sample that has none.
NO_LABEL = -1


# Samples ---------------------------------------------------------------------


def valid_samples(
    who: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    gt: GroundTruth | None,
    num_classes: int | None = None,
    keep_padding: bool = False,
    keep_ignored: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both sides, and which of the samples count.

    Args:
        who: Name of the loss, for messages.
        student: Maps of all levels, (N, A * C, H, W) each.
        teacher: The same of the teacher.
        gt: Sizes of the images, and ignored boxes.
        num_classes: Scores of one anchor; all channels of a cell if None.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.

    Returns:
        Logits of student and teacher, (M, C), and 1 or 0, (M,).

    Raises:
        ValueError: If the ground truth is missing or the maps do not pair.
    """
    gt = require_ground_truth(who, gt, student[0])
    check_class_maps(who, student, teacher, num_classes)
    valid = [
        valid_mask(gt, tuple(one.shape[-2:]), keep_padding, keep_ignored)
        for one in student
    ]
    return (
        class_samples(student, num_classes),
        class_samples(teacher, num_classes),
        cell_samples(valid, student, num_classes),
    )


def labelled_samples(
    who: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    gt: GroundTruth | None,
    num_classes: int | None = None,
    keep_padding: bool = False,
    keep_ignored: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both sides, and the class of the box each sample lies in.

    Args:
        who: Name of the loss, for messages.
        student: Maps of all levels, (N, A * C, H, W) each.
        teacher: The same of the teacher.
        gt: Boxes and labels of the batch.
        num_classes: Scores of one anchor; all channels of a cell if None.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.

    Returns:
        Logits of student and teacher, (M, C), and labels, (M,), as
        :func:`cell_labels` has them.

    Raises:
        ValueError: As :func:`valid_samples`, and if there is a single class.
    """
    gt = require_ground_truth(who, gt, student[0])
    check_class_maps(who, student, teacher, num_classes)
    if (num_classes or student[0].shape[1]) < 2:
        raise ValueError(
            f'{who} compares the class of a box with the other classes, got '
            f'the scores of one. Use SoftTargetLoss for a single class.'
        )
    labels = [
        cell_labels(gt, tuple(one.shape[-2:]), keep_padding, keep_ignored)
        for one in student
    ]
    return (
        class_samples(student, num_classes),
        class_samples(teacher, num_classes),
        cell_samples(labels, student, num_classes),
    )


def check_class_maps(
    who: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    num_classes: int | None = None,
) -> None:
    """Maps must pair level by level and hold whole anchors.

    Raises:
        ValueError: If levels, shapes or channels do not fit.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f'{who} pairs class scores level by level, got {len(student)} '
            f'levels of the student and {len(teacher)} of the teacher. Pair '
            f'levels of one stride with levels= and teacher_levels=.'
        )
    for one, other in zip(student, teacher):
        channels = one.shape[1]
        if other.ndim == 4 and other.shape[1] != channels:
            raise ValueError(
                f'{who} compares scores of the same classes and anchors, got '
                f'{channels} channels of the student and {other.shape[1]} of '
                f'the teacher. Take a teacher whose head has the same '
                f'anchors and classes, and output=0 for its class scores.'
            )
        check_same_shape(who, one, other)
        if num_classes is not None and (
            num_classes < 1 or channels % num_classes
        ):
            raise ValueError(
                f'{who} needs num_classes scores for each anchor of a cell, '
                f'got num_classes={num_classes} and a map '
                f'{tuple(one.shape)}. Set num_classes to the scores of one '
                f'anchor, or to None if a cell has a single anchor.'
            )


def class_samples(
    maps: Sequence[Tensor], num_classes: int | None = None
) -> Tensor:
    """Maps of all levels as one matrix in float32.

    Args:
        maps: One map a level, (N, A * C, H, W).
        num_classes: C; all channels of a cell if None.

    Returns:
        Rows by level, image, row, column and anchor, (M, C).

    Example:
        >>> one = torch.arange(4.0).view(1, 4, 1, 1)
        >>> class_samples([one], num_classes=2)
        tensor([[0., 1.],
                [2., 3.]])
    """
    return torch.cat(
        [
            as_float(one)
            .unflatten(1, (-1, num_classes or one.shape[1]))  # N, A, C, H, W
            .permute(0, 3, 4, 1, 2)  # N, H, W, A, C
            .flatten(0, 3)
            for one in maps
        ]
    )


def cell_samples(
    cells: Sequence[Tensor],
    maps: Sequence[Tensor],
    num_classes: int | None = None,
) -> Tensor:
    """What holds for a cell, repeated for each of its anchors.

    Args:
        cells: One value a cell, (N, 1, H, W) for each level.
        maps: The maps whose samples they belong to, (N, A * C, H, W).
        num_classes: C; all channels of a cell if None.

    Returns:
        Vector in the order of :func:`class_samples`, (M,).
    """
    vectors = []
    for one, logits in zip(cells, maps):
        channels = logits.shape[1]
        anchors = channels // (num_classes or channels)
        one = one[:, 0, :, :, None].expand(-1, -1, -1, anchors)
        vectors.append(one.flatten())  # by image, row, column and anchor
    return torch.cat(vectors)


def image_samples(
    samples: Tensor, maps: Sequence[Tensor], num_classes: int | None = None
) -> Tensor:
    """What is said of samples, image by image.

    Args:
        samples: In the order of :func:`class_samples`, (M, ...).
        maps: The maps they were made of, (N, A * C, H, W) each.
        num_classes: C; all channels of a cell if None.

    Returns:
        (N, P, ...) of the P anchors of all levels of an image.

    Example:
        >>> maps = [torch.zeros(2, 3, 1, 2), torch.zeros(2, 3, 1, 1)]
        >>> image_samples(torch.arange(6), maps)
        tensor([[0, 1, 4],
                [2, 3, 5]])
    """
    counts = [one.numel() // (num_classes or one.shape[1]) for one in maps]
    levels = samples.split(counts)
    return torch.cat(
        [one.unflatten(0, (len(maps[0]), -1)) for one in levels], 1
    )


def cell_labels(
    gt: GroundTruth,
    size: tuple[int, int],
    keep_padding: bool = False,
    keep_ignored: bool = False,
) -> Tensor:
    """The class of the box each cell overlaps, and -1 elsewhere.

    Of several boxes the smallest counts, of equal ones the last. The cells
    that have a label are those of :func:`mmkd.ops.masks.union_mask`.

    Args:
        gt: Boxes and labels of the batch.
        size: Rows and columns of the map.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.

    Returns:
        Labels, (N, 1, h, w), made without a loop over boxes.

    Example:
        >>> gt = GroundTruth.from_boxes(
        ...     [torch.tensor([[0.0, 0, 16, 16], [0, 0, 8, 8]])],
        ...     shape=(24, 24),
        ...     labels=[torch.tensor([7, 3])],
        ... )
        >>> cell_labels(gt, (3, 3))[0, 0]
        tensor([[ 3,  7, -1],
                [ 7,  7, -1],
                [-1, -1, -1]])
    """
    area = as_float(gt.boxes[:, 2:] - gt.boxes[:, :2]).prod(1)
    order = area.argsort(descending=True, stable=True)
    rows, columns, _ = box_spans(
        gt.boxes[order], gt.shape, size, inclusive=False
    )
    # Places count from 1, so that 0 is a cell without a box.
    place = torch.arange(
        1, len(order) + 1, device=rows.device, dtype=rows.dtype
    )
    smallest = draw_boxes(rows, columns, place, gt.image[order], gt.num_images)
    labels = torch.cat([gt.labels.new_full((1,), NO_LABEL), gt.labels[order]])
    valid = valid_mask(gt, size, keep_padding, keep_ignored)
    return labels[smallest.long()].masked_fill(valid == 0, NO_LABEL)


# Probabilities ---------------------------------------------------------------


def class_probs(logits: Tensor, activation: str) -> Tensor:
    """Probabilities of samples, (M, C) → same.

    Args:
        logits: Of all samples, (M, C).
        activation: ``'sigmoid'``, each class by itself, or ``'softmax'``.
    """
    return logits.sigmoid() if activation == 'sigmoid' else logits.softmax(1)


def top_score(
    logits: Tensor, activation: str, has_background: bool = True
) -> Tensor:
    """The largest probability of an object class, (M, C) → (M,).

    Args:
        logits: Of all samples, (M, C).
        activation: ``'sigmoid'`` or ``'softmax'``.
        has_background: With softmax, the last class is the background, as in
            MMDetection's heads, and does not count.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 100.0]])
        >>> top_score(logits, 'softmax').item() < 1e-6
        True
        >>> top_score(logits, 'softmax', has_background=False).item()
        1.0
    """
    probs = class_probs(logits, activation)
    if activation == 'softmax' and has_background:
        probs = probs[:, :-1]
    return probs.amax(1)


def bernoulli_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Divergence of two coins, from their logits, element by element.

    .. math:: p \log\frac{p}{q} + (1 - p) \log\frac{1 - p}{1 - q}, \quad
        p = \sigma(t),\; q = \sigma(s)

    It is the binary cross entropy less the teacher's own entropy: its
    gradient is the same, :math:`\sigma(s) - \sigma(t)`, and it is 0 where
    both agree.

    Args:
        student: Logits s of any shape.
        teacher: Logits t of the same shape.

    Example:
        >>> x = torch.tensor([300.0, -300.0])
        >>> bernoulli_divergence(x, x).tolist()
        [0.0, 0.0]
        >>> bernoulli_divergence(-x, x).tolist()
        [300.0, 300.0]
    """
    # Each logarithm by itself: their differences keep what is left of
    # probabilities near 0 and near 1.
    yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return teacher.sigmoid() * yes + (-teacher).sigmoid() * no


def target_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""The target class against the rest, and the rest among themselves.

    .. math:: m = z_y - \log \sum_{i \ne y} e^{z_i}, \quad
        \log \hat p_i = z_i - \log \sum_{j \ne y} e^{z_j}

    The softmax of the target is :math:`\sigma(m)`, and :math:`\hat p` is
    the softmax of the other classes without it.

    Args:
        logits: Of all samples, (M, C), C > 1.
        labels: Target y of each sample, (M,). One that has none is treated
            as if it were 0; give it no weight.

    Returns:
        The margins m, (M,), and the logarithms of the others, (M, C), 0 in
        the column of the target.

    Example:
        >>> logits = torch.tensor([[5.0, 0.0, 0.0]])
        >>> _, others = target_and_others(logits, torch.tensor([0]))
        >>> others.exp()
        tensor([[1.0000, 0.5000, 0.5000]])
    """
    index = labels.clamp(min=0)[:, None]
    classes = torch.arange(logits.shape[1], device=logits.device)
    target = classes == index
    rest = logits.masked_fill(target, -torch.inf).logsumexp(1, keepdim=True)
    margin = logits.gather(1, index) - rest
    return margin[:, 0], (logits - rest).masked_fill(target, 0)

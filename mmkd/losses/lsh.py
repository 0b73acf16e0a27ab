"""LSH: features fall on the teacher's side of random planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmkd.checks import (
    check_channels,
    check_name,
    check_positive,
    check_same_shape,
)
from mmkd.ops.masks import valid_mask
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

MODES = ('l2', 'lsh', 'lshl2')
BIASES = ('zero', 'median')
#: Cells whose hashes a median is taken of, evenly spread over a batch.
CELLS = 4096
#: Planes for each number of a vector, unless they are counted.
PLANES = 4


def hashes(feature: Tensor, planes: Tensor, bias: Tensor) -> Tensor:
    r"""On which side of each plane the vectors of a map lie, and how far.

    .. math:: h_p = W f_p + b

    The vector of a cell is what k x k cells around it hold, zeros beyond the
    edge, channel by channel as :func:`torch.nn.functional.unfold` has it. So
    its product with a plane is a convolution, and no vector is laid out.

    Args:
        feature: Map of one level, (N, C, H, W).
        planes: Their normals, (P, C, k, k).
        bias: Of each plane, (P,).

    Returns:
        (N, P, H, W), float32.
    """
    feature = as_float(feature)
    planes, bias = planes.to(feature), bias.to(feature)
    with full_precision(feature):
        return F.conv2d(feature, planes, bias, padding=planes.shape[-1] // 2)


def lsh_error(
    student: Tensor, teacher: Tensor, planes: Tensor, bias: Tensor
) -> Tensor:
    r"""Binary cross entropy of the student's hashes and the teacher's bits.

    .. math:: \frac{1}{P} \sum_p -y_p \log \sigma(h_p)
        - (1 - y_p) \log(1 - \sigma(h_p)), \quad
        h = W f_S + b,\; y = [W f_T + b > 0]

    With a bias of 0 the teacher's scale does not matter. Where both are the
    same it is not 0, and falls as the student's vector grows.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: The same of the teacher, without gradient.
        planes, bias: As :func:`hashes` takes them.

    Returns:
        Error of each cell, (N, 1, H, W), float32.

    Reference:
        Wang et al., "Distilling Knowledge by Mimicking Features", IEEE TPAMI
        2022, arXiv:2011.01424.

    Example:
        >>> one = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1)
        >>> planes = torch.eye(2).view(2, 2, 1, 1)
        >>> error = lsh_error(one, one, planes, torch.zeros(2))
        >>> round(error.item(), 4)  # (log(1 + e^-3) + log 2) / 2
        0.3709
    """
    other = hashes(teacher, planes, bias) > 0
    own = hashes(student, planes, bias)
    # log(1 + e^-h) for a bit that is set, log(1 + e^h) for one that is not.
    return F.softplus(torch.where(other, -own, own)).mean(1, keepdim=True)


def vector_error(student: Tensor, teacher: Tensor, unfold: int = 1) -> Tensor:
    """Mean squared difference of the vectors of two maps, cell by cell.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: The same of the teacher, without gradient.
        unfold: k: the vector of a cell holds k x k cells around it, zeros
            beyond the edge.

    Returns:
        (N, 1, H, W), float32.

    Example:
        >>> one = torch.zeros(1, 2, 3, 3)
        >>> other = torch.zeros(1, 2, 3, 3)
        >>> other[0, :, 0, 0] = 3.0
        >>> vector_error(one, other, 3)[0, 0]
        tensor([[1., 1., 0.],
                [1., 1., 0.],
                [0., 0., 0.]])
    """
    error = (as_float(student) - as_float(teacher)).square()
    return F.avg_pool2d(error.mean(1, keepdim=True), unfold, 1, unfold // 2)


@MODELS.register_module()
class LSHLoss(nn.Module):
    r"""Feature vectors mimic the teacher's: their numbers, their hash, both.

    .. math:: L = \beta \big(MSE(f_S, f_T) + BCE(W f_S + b, [W f_T + b > 0])
        \big)

    The planes W are drawn once, from :math:`N(0, std^2)`, and never learn.
    They stand in the checkpoint, for a training that goes on must go on with
    the same. All levels share them, as they share the classifier whose input
    is compared. The mean runs over the cells of an image on all levels, then
    over images.

    As the input of what classifies is compared, tap the last layer before it:
    of a dense head ``bbox_head.cls_convs.3``, with ``unfold=3``, the size of
    the convolution that follows. The second stage of a detector is compared
    by :class:`~mmkd.terms.proposal_feature.ProposalFeatureTerm`, with
    ``unfold=1``. After the training nothing is left of it.

    With ``mode='lsh'`` nothing holds the length of a feature: it grows, and
    the authors saw RetinaNet diverge.

    Args:
        channels: Of the teacher's maps; the student's after ``align``.
        mode: ``'lshl2'``, or ``'l2'`` and ``'lsh'`` for one part alone.
        hash_num: Number of planes; 4 for each number of a vector if None.
            They and the hashes of all cells are held in memory: the authors'
            script for RetinaNet has 4096 for vectors of 2304.
        std: Of the planes' numbers; None for that of the teacher's
            classifier, which the term shows.
        bias: ``'zero'``, or ``'median'``: minus the median of each of the
            teacher's hashes, so that half of the cells have the bit. It is
            the mean of the medians of the first ``bias_steps`` batches, and
            fixed from then on.
        bias_steps: Batches of a process from which the bias is.
        unfold: k: the vector of a cell holds k x k cells around it; odd.
        keep_padding: Let cells of the padded border count; else they are
            zeros like all that is beyond the edge.
        keep_ignored: Let cells in ignored boxes count.
        loss_weight: Factor of both parts, the paper's beta. Published: 7 for
            detectors, 6 for CIFAR, 5 for ImageNet.

    Returns:
        ``l2`` and ``lsh``, or the one of the mode.

    Raises:
        ValueError: If a setting or the maps do not fit.
        RuntimeError: If there is no ``std``, and the term showed no
            classifier.

    Not kept:
        equality: The cross entropy of a hash and its own bits is not 0.

    Reference:
        Wang et al., "Distilling Knowledge by Mimicking Features", IEEE TPAMI
        2022, arXiv:2011.01424. Read: what the authors' code does
        (https://github.com/DoctorKey/LSHFM.detection and its siblings for
        classification) in a summary of it. There the median is that of the
        whole training set, taken before the training. A student of another
        width gets a linear layer that it keeps; here an ``align`` that is
        dropped.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(channels=8, hash_num=32, std=0.1)

    def __init__(
        self,
        channels: int,
        mode: str = 'lshl2',
        hash_num: int | None = None,
        std: float | None = None,
        bias: str = 'zero',
        bias_steps: int = 100,
        unfold: int = 3,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 7.0,
    ) -> None:
        super().__init__()
        who = 'LSHLoss'
        check_name(who, 'mode', mode, MODES)
        check_name(who, 'bias', bias, BIASES)
        check_positive(who, channels=channels, bias_steps=bias_steps)
        if unfold % 2 != 1:
            raise ValueError(
                f'{who} needs an odd unfold, so that a cell is the middle of '
                f'its vector, got unfold={unfold}. Try unfold={unfold + 1}.'
            )
        if hash_num is not None:
            check_positive(who, hash_num=hash_num)
        if std is not None:
            check_positive(who, std=std)
        self.channels = channels
        self.mode = mode
        self.unfold = unfold
        self.bias_rule, self.bias_steps = bias, bias_steps
        self.keep_padding = keep_padding
        self.keep_ignored = keep_ignored
        self.loss_weight = loss_weight
        #: Whether a term must show the teacher's classifier.
        self.reads_classifier = mode != 'l2' and std is None
        self._scaled = not self.reads_classifier
        if mode == 'l2':
            return
        count = hash_num or PLANES * channels * unfold**2
        planes = torch.randn(count, channels, unfold, unfold)
        self.register_buffer('planes', planes)
        self.register_buffer('std', torch.tensor(float(std or 1.0)))
        self.register_buffer('bias', torch.zeros(count))
        self.register_buffer('medians', torch.zeros((), dtype=torch.long))
        # As the buffer has it, so that a step need not ask the device.
        self._medians: int | None = 0

    def read_classifier(self, weight: Tensor) -> None:
        """Take the deviation of the planes from the teacher's classifier.

        Args:
            weight: Its numbers, of any shape.
        """
        self.std.copy_(as_float(weight).std())
        self._scaled = True

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
        weight: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        self._check(student, teacher)
        counts = [self._counts(gt, one) for one in student]
        if weight is not None:
            counts = [
                count * as_float(one).amax(1, keepdim=True)
                for count, one in zip(counts, weight)
            ]
        insides = [self._counts(gt, one, ignored=True) for one in student]
        student, teacher = (
            [as_float(one) * inside for one, inside in zip(side, insides)]
            for side in (student, teacher)
        )
        pairs = [*zip(student, teacher)]
        parts = {}
        if self.mode != 'lsh':
            parts['l2'] = [vector_error(*pair, self.unfold) for pair in pairs]
        if self.mode != 'l2':
            planes = self.std * self.planes
            if self.bias_rule == 'median' and self._settling():
                self._settle(teacher, counts, planes)
            parts['lsh'] = [
                lsh_error(*pair, planes, self.bias) for pair in pairs
            ]
        return {
            name: self.loss_weight * image_mean(errors, counts)
            for name, errors in parts.items()
        }

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._medians = None

    def _check(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        if len(student) != len(teacher):
            raise ValueError(
                f'LSHLoss compares maps level by level, got {len(student)} of '
                f'the student and {len(teacher)} of the teacher. Pair levels '
                f'of one stride with levels= and teacher_levels=.'
            )
        for one, other in zip(student, teacher):
            check_same_shape('LSHLoss', one, other)
            check_channels('LSHLoss', other, self.channels)
        if not self._scaled:
            raise RuntimeError(
                'LSHLoss takes the deviation of its planes from the '
                "teacher's classifier, which nobody showed it. Use it in a "
                'FeatureTerm or a ProposalFeatureTerm, or set std=, for '
                'instance std=0.01.'
            )

    def _counts(
        self, gt: GroundTruth | None, feature: Tensor, ignored: bool = False
    ) -> Tensor:
        """1 at the cells that count, (N, 1, H, W)."""
        size = tuple(feature.shape[-2:])
        if gt is None:
            return as_float(feature.new_ones(len(feature), 1, *size))
        ignored = ignored or self.keep_ignored
        return valid_mask(gt, size, self.keep_padding, ignored)

    def _settling(self) -> bool:
        """Whether this batch has a say in the bias."""
        if not self.training:
            return False
        if self._medians is None:  # once, after a checkpoint was loaded
            self._medians = int(self.medians)
        return self._medians < self.bias_steps

    @torch.no_grad()
    def _settle(
        self,
        teacher: Sequence[Tensor],
        counts: Sequence[Tensor],
        planes: Tensor,
    ) -> None:
        """Let the medians of this batch into the bias."""
        step = -(-sum(one.numel() for one in counts) // CELLS)
        found = [
            _cells(hashes(one, planes, torch.zeros_like(self.bias)), count)
            for one, count in zip(teacher, counts)
        ]
        median = torch.cat(found)[::step].nanmedian(0).values
        # A batch without a cell that counts says nothing new.
        bias = torch.where(median.isnan(), self.bias, -median)
        all_reduce(bias, 'mean')
        self._medians += 1
        self.medians += 1
        self.bias += (bias - self.bias) / self._medians


def _cells(maps: Tensor, count: Tensor) -> Tensor:
    """Cells one below the other, (N, P, H, W) → (N·H·W, P).

    Those that do not count are NaN.
    """
    maps = maps.masked_fill(count == 0, torch.nan)
    return maps.movedim(1, -1).flatten(0, 2)


def image_mean(errors: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Weighted mean over the cells of an image, then the mean over images.

    Args:
        errors: Of each cell, (N, 1, H, W) a level.
        counts: How much each counts, of the same shapes.

    Returns:
        Scalar; an image without a cell that counts has 0.

    Example:
        >>> errors = [torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)]
        >>> errors += [torch.tensor([5.0, 9.0]).view(2, 1, 1, 1)]
        >>> once = torch.ones(2, 1, 1, 1)
        >>> image_mean(errors, [once, once])  # (3 + 6) / 2
        tensor(4.5000)
    """
    sums, total = (
        sum(one.flatten(1).sum(1) for one in group)
        for group in ([e * c for e, c in zip(errors, counts)], counts)
    )
    return (sums / total.clamp(min=1e-6)).mean()

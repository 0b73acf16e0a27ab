"""UniKD: fused stages as distributions, whose divergence is the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_channels, check_name, check_positive
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.taps import crop, maps_of, pick_levels
from mmkd.terms.prepared import PreparedTerm, learns

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Bounds of the logarithm of a variance.
LOG_VARIANCE = (-6.0, 6.0)
#: Least sum of weights, and least variance that is divided by.
EPS = 1e-6


@MODELS.register_module()
class UnifiedTerm(PreparedTerm):
    r"""Divergence of the Gaussians that both sides make of all their maps.

    On each side the maps of all levels are fused from the coarsest to the
    finest, by a gate at each cell (:class:`GatedFusion`), and 1x1 convolutions
    read mean and log-variance of a diagonal Gaussian off each cell of the
    finest (:class:`GaussianPredictor`).

    .. math:: L = \lambda \frac{\sum_i w_i KL(N^T_i \| N^S_i)}{\sum_i w_i}

    over the cells i that are not border. Channels and numbers of levels may
    differ, only the finest map has the same size on both sides.

    Were the teacher's side to learn from this divergence, both would agree on
    a constant. It learns beforehand, from the teacher's maps alone: what is
    drawn from its Gaussians is pooled to the size of each map, and a 1x1
    convolution must tell the map, standardised per channel, by it;

    .. math:: L_T = \frac{1}{|l|} \sum_l MSE_l + \gamma \,
        \overline{KL(N^T_i \| N(0, 1)) / d}

    which counts while that side learns; the divergence counts while the
    student's does. ``phases`` say which::

        phases = [
            dict(
                length=1,
                train=(),
                terms='features',
                supervised=False,
                freeze='terms.features.student_side',
            ),
            dict(length=6, freeze='terms.features.teacher_side'),
        ]

    The response part of the method is terms of its own: soft targets of the
    classes, and of box edges where a head has distributions of them
    (``mmkd.SoftTargetLoss``, ``mmkd.LDLoss``), both divergences as well.
    Nothing of all this is part of the student that is deployed.

    Args:
        teacher: Name of the teacher.
        channels: Of the student's maps that are fused, one entry a map, from
            fine to coarse.
        teacher_channels: The same of the teacher's; as the student's if None.
        tap: Where the student's maps are, a neck or a backbone.
        levels: Which of them, 0 is the finest; all if None.
        teacher_tap, teacher_levels: The same of the teacher; as the student's
            if None.
        fuse_dim: Channels of the fused maps.
        dist_dim: Dimensions d of a Gaussian.
        weight: Config of what says how much each cell counts, of
            ``mmkd.weights``; the largest value of all levels and anchors at a
            cell is taken. The teacher's score if None. For a two-stage
            teacher ``dict(type='mmkd.ScoreWeight', tap='rpn_head')``.
        uniform: Let all cells count alike instead, for teachers without a
            dense head.
        prior_weight: The formula's gamma.
        teacher_side_checkpoint: File of an earlier training with this term,
            whose ``teacher_side`` is taken; it learns no more.
        loss_weight: The formula's lambda.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``teacher`` and ``divergence``, as far as they count, and the share of
        the variance of the teacher's maps that its Gaussians explain, to be
        watched.

    Raises:
        ValueError: If channels, levels or sizes do not fit, while the model is
            built; or in the first step if the teacher's side neither learns
            nor ever did.

    Reference:
        Huang et al., "Harmonizing Knowledge Transfer in Neural Network with
        Unified Distillation", ECCV 2024, arXiv:2409.18565, from a summary;
        neither the paper nor code was read. **Ours:** the form of the gate,
        Gaussians of single cells of the finest map, their weights, and how
        the teacher's side learns.
    """

    given, learner = 'teacher_side', 'student_side'
    setting = 'teacher_side_checkpoint'

    def __init__(
        self,
        teacher: str,
        channels: Sequence[int],
        teacher_channels: Sequence[int] | None = None,
        tap: str = 'neck',
        levels: Sequence[int] | None = None,
        teacher_tap: str | None = None,
        teacher_levels: Sequence[int] | None = None,
        fuse_dim: int = 256,
        dist_dim: int = 64,
        weight: Mapping | None = None,
        uniform: bool = False,
        prior_weight: float = 0.03,
        teacher_side_checkpoint: str | None = None,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(teacher_side_checkpoint, schedule)
        check_positive('UnifiedTerm', fuse_dim=fuse_dim, dist_dim=dist_dim)
        if uniform and weight is not None:
            raise ValueError(
                f'UnifiedTerm got uniform=True and weight={dict(weight)}. '
                f'Choose one of them.'
            )
        self.teacher = teacher
        self.path, self.levels = tap, levels
        self.teacher_path = teacher_tap or tap
        self.teacher_levels = (
            levels if teacher_levels is None else teacher_levels
        )
        self.prior_weight, self.loss_weight = prior_weight, loss_weight
        self.weight = None
        if not uniform:
            weight = weight or dict(type='mmkd.ScoreWeight')
            self.weight = build(weight, 'weight')
        channels = tuple(channels)
        if teacher_channels is None:
            teacher_channels = channels
        self.student_side = GaussianPredictor(channels, fuse_dim, dist_dim)
        self.teacher_side = Autoencoder(
            tuple(teacher_channels), fuse_dim, dist_dim
        )
        self.hold()

    def silent(self) -> bool:
        return not self.loss_weight

    def compares_classes(self) -> bool:
        return self.weight is not None and self.weight.needs_classes

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        self.teacher_names = [self.teacher]
        self.tap(student, self.path)
        teachers[self.teacher].tap(self.teacher_path)
        if self.weight is not None:
            self.weight.bind(self, student, teachers[self.teacher])

    def forward(self, step: Step) -> dict[str, Tensor]:
        self.prepare(step)
        student, teacher = self._maps(step)
        given = self.teacher_side.predictor(teacher)
        parts = {}
        if learns(self.teacher_side):
            parts |= self._lesson(step, given, teacher)
            self.count_lesson(step)
        if learns(self.student_side):
            own = self.student_side(student)
            self._check_sizes(own[0], given[0])
            divergence = gaussian_divergence(
                *own, *(one.detach() for one in given)
            )
            parts['divergence'] = self.loss_weight * weighted_mean(
                divergence, self._weights(step, divergence)
            )
        return parts

    def _maps(self, step: Step) -> tuple[tuple[Tensor, ...], ...]:
        """Maps of both sides, from fine to coarse."""
        shown = step.teacher(self.teacher)
        student = _tapped(step.student, self.path, self.levels)
        teacher = _tapped(shown, self.teacher_path, self.teacher_levels)
        # A teacher that was loaded in half precision has such maps.
        teacher = [as_float(one.detach()) for one in teacher]
        return student, crop(teacher, shown.size, step.images.shape[-2:])

    def _lesson(
        self,
        step: Step,
        given: tuple[Tensor, Tensor],
        maps: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """What the teacher's side learns by."""
        mean, log_variance = given
        drawn = mean
        if self.training:
            noise = torch.randn_like(mean)
            drawn = mean + noise * (log_variance / 2).exp()
        valid = [equal_weight(step.gt, one) for one in maps]
        told = self.teacher_side.tell(drawn, maps)
        error = sum(
            weighted_mean(
                (one - standard(like, count)).square().mean(1, keepdim=True),
                count,
            )
            for one, like, count in zip(told, maps, valid)
        ) / len(maps)
        nothing = torch.zeros_like(mean)
        prior = gaussian_divergence(nothing, nothing, mean, log_variance)
        prior = weighted_mean(prior / mean.shape[1], valid[0])
        return dict(
            teacher=error + self.prior_weight * prior,
            watch_explained=1 - error.detach(),
        )

    def _check_sizes(self, student: Tensor, teacher: Tensor) -> None:
        own, other = tuple(student.shape[-2:]), tuple(teacher.shape[-2:])
        if own != other:
            raise ValueError(
                f'UnifiedTerm compares the finest maps cell by cell, got '
                f'{own} cells of the student and {other} of the teacher. '
                f'Choose maps whose first ones have one stride with levels= '
                f'and teacher_levels=.'
            )

    def _weights(self, step: Step, like: Tensor) -> Tensor:
        """How much each cell of the finest map counts, (N, 1, H, W)."""
        counts = equal_weight(step.gt, like)
        if self.weight is None:
            return counts
        # Large objects have their scores at coarse levels.
        finest = [
            F.interpolate(
                as_float(one).amax(1, keepdim=True), tuple(like.shape[-2:])
            )
            for one in self.weight(step)
        ]
        return counts * torch.stack(finest).amax(0)


# Distributions ---------------------------------------------------------------


def gaussian_divergence(
    student_mean: Tensor,
    student_log_variance: Tensor,
    teacher_mean: Tensor,
    teacher_log_variance: Tensor,
) -> Tensor:
    r"""Divergence of the teacher's diagonal Gaussian from the student's.

    .. math:: KL(N_T \| N_S) = \frac{1}{2} \sum_d \left[
        \log \frac{v_S}{v_T} + \frac{v_T + (\mu_T - \mu_S)^2}{v_S} - 1 \right]

    Args:
        student_mean, student_log_variance: Of each cell, (N, d, H, W).
        teacher_mean, teacher_log_variance: The same of the teacher.

    Returns:
        (N, 1, H, W), at least 0, computed in float32; 0 where both agree.

    Example:
        >>> zero = torch.zeros(1, 2, 1, 1)
        >>> gaussian_divergence(zero + 3, zero, zero, zero).item()
        9.0
    """
    own, other, own_log, other_log = (
        as_float(one)
        for one in (
            student_mean,
            teacher_mean,
            student_log_variance,
            teacher_log_variance,
        )
    )
    ratio = other_log - own_log
    distance = (other - own).square() * (-own_log).exp()
    # expm1(x) - x has no rounding left where both agree.
    return (torch.expm1(ratio) - ratio + distance).sum(1, keepdim=True) / 2


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the cells of all images; 0 if none counts.

    Args:
        values: (N, 1, H, W).
        weight: Of the same shape, at least 0.

    Example:
        >>> values = torch.tensor([1.0, 5.0, 9.0])
        >>> weighted_mean(values, torch.tensor([3.0, 1.0, 0.0])).item()
        2.0
    """
    return (weight * values).sum() / weight.sum().clamp(min=EPS)


def standard(feature: Tensor, count: Tensor) -> Tensor:
    """Zero mean and unit variance of each channel, where cells count.

    Args:
        feature: (N, C, H, W).
        count: 1 or 0, (N, 1, H, W).

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0, 99.0]]]])
        >>> count = torch.tensor([[[[1.0, 1.0, 0.0]]]])
        >>> standard(x, count)[..., :2]
        tensor([[[[-1.0000,  1.0000]]]])
    """
    feature = as_float(feature)
    cells = count.sum().clamp(min=1)
    mean = (count * feature).sum((0, 2, 3), keepdim=True) / cells
    centred = feature - mean
    variance = (count * centred.square()).sum((0, 2, 3), keepdim=True) / cells
    return centred * (variance + EPS).rsqrt()


# Fusion ----------------------------------------------------------------------


class GatedFusion(nn.Module):
    r"""All maps of a pyramid in one, from the coarsest to the finest.

    .. math::
        U_i = g_i E_i(F_i) + (1 - g_i) Up(U_{i+1}), \qquad
        g_i = \sigma(G_i([E_i(F_i); Up(U_{i+1})]))

    E and G are 1x1 convolutions, Up takes the nearest cell, and the coarsest
    of all is :math:`E_n(F_n)`. A gate is one number a cell.

    Args:
        channels: Of the maps, from fine to coarse.
        fuse_dim: Of what comes out.

    Example:
        >>> fusion = GatedFusion((3, 5), fuse_dim=8)
        >>> fusion([torch.rand(1, 3, 7, 7), torch.rand(1, 5, 4, 4)]).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(self, channels: Sequence[int], fuse_dim: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.embed = nn.ModuleList(
            nn.Conv2d(one, fuse_dim, 1) for one in channels
        )
        self.gates = nn.ModuleList(
            nn.Conv2d(2 * fuse_dim, 1, 1) for _ in channels[1:]
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of each level, (N, C_i, H_i, W_i) → (N, fuse_dim, H, W)."""
        if len(maps) != len(self.channels):
            raise ValueError(
                f'UnifiedTerm was built for {len(self.channels)} maps, '
                f'channels={self.channels}, got {len(maps)}. Choose as many '
                f'with levels= and teacher_levels=.'
            )
        for one, count in zip(maps, self.channels):
            check_channels('UnifiedTerm', one, count)
        embedded = [embed(one) for embed, one in zip(self.embed, maps)]
        fused = embedded[-1]
        for gate, own in zip(self.gates[::-1], embedded[-2::-1]):
            up = F.interpolate(fused, tuple(own.shape[-2:]))
            share = gate(torch.cat([own, up], 1)).sigmoid()
            fused = share * own + (1 - share) * up
        return fused


class GaussianPredictor(nn.Module):
    """A diagonal Gaussian for each cell of the finest of several maps.

    Args:
        channels: Of the maps, from fine to coarse.
        fuse_dim: Channels of the fused map.
        dist_dim: Dimensions of a Gaussian.
    """

    def __init__(
        self, channels: Sequence[int], fuse_dim: int, dist_dim: int
    ) -> None:
        super().__init__()
        self.fusion = GatedFusion(channels, fuse_dim)
        self.mean = nn.Conv2d(fuse_dim, dist_dim, 1)
        self.log_variance = nn.Conv2d(fuse_dim, dist_dim, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, (N, d, H, W) each, in float32."""
        fused = self.fusion(maps).relu()
        log_variance = as_float(self.log_variance(fused))
        return as_float(self.mean(fused)), log_variance.clamp(*LOG_VARIANCE)


class Autoencoder(nn.Module):
    """The teacher's side: Gaussians, and maps told by what they draw.

    Args:
        channels: Of the maps, from fine to coarse.
        fuse_dim: Channels of the fused map.
        dist_dim: Dimensions of a Gaussian.
    """

    def __init__(
        self, channels: Sequence[int], fuse_dim: int, dist_dim: int
    ) -> None:
        super().__init__()
        self.predictor = GaussianPredictor(channels, fuse_dim, dist_dim)
        self.decoders = nn.ModuleList(
            nn.Conv2d(dist_dim, one, 1) for one in channels
        )

    def tell(self, drawn: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the sizes of those given, in float32.

        Args:
            drawn: A vector for each cell of the finest map, (N, d, H, W).
            maps: The teacher's, of which the sizes are read.
        """
        return [
            as_float(decode(F.interpolate(drawn, one.shape[-2:], mode='area')))
            for decode, one in zip(self.decoders, maps)
        ]


def _tapped(
    outputs: Outputs, path: str, levels: Sequence[int] | None
) -> tuple[Tensor, ...]:
    maps = maps_of(outputs.at(path), f'The tap {path!r}')
    return pick_levels(maps, levels, repr(path))

"""ONE: branches on one pyramid, whose gated sum teaches each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.utils import unpack_gt_instances
from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_channels, check_positive
from mmkd.losses.soft_target import SoftTargetLoss
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.structures.ground_truth import labelled
from mmkd.structures.nested import leaves
from mmkd.taps import maps_of, resolve
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: What a head returns: lists of maps, one a level.
Predictions = tuple[list[Tensor], ...]


class LevelGates(nn.Module):
    r"""How much each branch counts, image by image and level by level.

    .. math:: g_l = softmax(W_l \, \overline{F_l} + b_l)

    of the mean of a level's map over the cells that count.

    Args:
        channels: Channels of the maps.
        num_levels: Number of levels.
        num_branches: Number of branches.

    Example:
        >>> gates = LevelGates(8, num_levels=1, num_branches=3)
        >>> (found,) = gates(
        ...     [torch.randn(2, 8, 4, 4)], [torch.ones(2, 1, 4, 4)]
        ... )
        >>> found.shape, found.sum(1).allclose(torch.ones(2))
        (torch.Size([2, 3]), True)
    """

    def __init__(
        self, channels: int, num_levels: int, num_branches: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.levels = nn.ModuleList(
            nn.Linear(channels, num_branches) for _ in range(num_levels)
        )

    def forward(
        self, maps: Sequence[Tensor], counts: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gates of each level, (N, branches), each summing to 1.

        Args:
            maps: Of each level, (N, C, H, W).
            counts: 1 where a cell counts, (N, 1, H, W).
        """
        gates = []
        for layer, one, count in zip(self.levels, maps, counts):
            total = (as_float(one) * count).sum((2, 3))
            mean = total / count.sum((2, 3)).clamp(min=1)
            with full_precision(mean):
                gates.append(layer(mean).softmax(1))
        return gates


def gated_sum(
    branches: Sequence[Predictions], gates: Sequence[Tensor]
) -> Predictions:
    """Predictions of all branches together, likewise, float32.

    Args:
        branches: Predictions of each branch.
        gates: How much each branch counts on each level, (N, branches).

    Example:
        >>> one, other = ([torch.full((1, 1, 1, 1), x)] for x in (1.0, 5.0))
        >>> ((found,),) = gated_sum(
        ...     [(one,), (other,)], [torch.tensor([[0.25, 0.75]])]
        ... )
        >>> found.item()
        4.0
    """
    return tuple(
        [
            sum(
                gate[:, index, None, None, None] * as_float(one)
                for index, one in enumerate(level)
            )
            for gate, *level in zip(gates, *outputs)
        ]
        for outputs in zip(*branches)
    )


@MODELS.register_module()
class OneTerm(Term):
    r"""Self-distillation without a teacher: a student and lighter branches.

    .. math::
        L &= w_b \sum_{i > 0} L_{det}(z_i, y) + w_e \, L_{det}(z_e, y) +
             w_d \sum_{i \ge 0} KL(z_e \| z_i) \\
        z_e &= \sum_{i \ge 0} g_i z_i, \qquad \sum_i g_i = 1

    Branch 0 is the student's own dense head; the others are heads of the same
    kind on the same pyramid, with fewer layers. All they predict enters the
    sum, scores and boxes before decoding, weighted by a gate for each level.
    The sum learns from the labels as a head does; its class scores, held
    fixed, teach those of every branch by
    :class:`mmkd.losses.soft_target.SoftTargetLoss`. Branches and gates stand
    under ``terms.`` and are no part of the student that is deployed.

    Args:
        head: Config of a branch: the student's own, with fewer layers, for
            instance ``dict(_base_.model.bbox_head, stacked_convs=1)``. What
            training and testing settings it needs are the student's.
        channels: Channels of the pyramid.
        num_levels: Levels of the pyramid.
        num_branches: Branches beside the student's own.
        tap: What returns the pyramid.
        head_tap: The student's dense head.
        temperature: Of both sides of the divergence.
        branch_weight: The factor :math:`w_b` of ``branches``.
        ensemble_weight: The factor :math:`w_e` of ``ensemble``.
        distil_weight: The factor :math:`w_d` of ``distil``.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``branches``, ``ensemble`` and ``distil``; ``watch_gate`` is the mean
        gate of the student's own head.

    Raises:
        ValueError: If the student has no dense head, or a branch predicts
            maps of other shapes, while the model is built.

    Reference:
        Lan et al., "Knowledge Distillation by On-the-Fly Native Ensemble",
        NeurIPS 2018, arXiv:1806.04606, known second-hand, for the last blocks
        and one label of a classifier. Sarfraz et al., "Knowledge Distillation
        Beyond Model Compression", arXiv:2007.01922, compare it with eight
        others. That branches are dense heads, gates those of levels, and that
        boxes enter the sum is ours.
    """

    #: No branch says anything at first, so all say the same.
    from_nothing: ClassVar[tuple[str, ...]] = ('distil',)

    def __init__(
        self,
        head: Mapping,
        channels: int,
        num_levels: int,
        num_branches: int = 2,
        tap: str = 'neck',
        head_tap: str = 'bbox_head',
        temperature: float = 1.0,
        branch_weight: float = 1.0,
        ensemble_weight: float = 1.0,
        distil_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive(
            'OneTerm',
            channels=channels,
            num_levels=num_levels,
            num_branches=num_branches,
            temperature=temperature,
        )
        self.config, self.count = head, num_branches
        self.path, self.head = tap, head_tap
        self.temperature = temperature
        self.branch_weight = branch_weight
        self.ensemble_weight = ensemble_weight
        self.distil_weight = distil_weight
        self.gates = LevelGates(channels, num_levels, 1 + num_branches)
        self.branches = nn.ModuleList()
        self.loss: nn.Module | None = None

    def silent(self) -> bool:
        return not (
            self.branch_weight or self.ensemble_weight or self.distil_weight
        )

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.tap(student, self.path)
        self.tap(student, self.head)
        own, _ = resolve(student, self.head)
        if not isinstance(own, BaseDenseHead) or not hasattr(
            own, 'cls_out_channels'
        ):
            raise ValueError(
                f'OneTerm sums what dense heads predict, but {self.head!r} '
                f'is a {type(own).__name__}. Name a dense head with '
                f'head_tap=, or take SelfTerm for this student.'
            )
        for _ in range(self.count):
            branch = build(
                self.config,
                'the head of OneTerm',
                train_cfg=own.train_cfg,
                test_cfg=own.test_cfg,
            )
            branch.init_weights()
            self.branches.append(branch)
        sigmoid = getattr(own, 'use_sigmoid_cls', True)
        self.loss = SoftTargetLoss(
            num_classes=own.cls_out_channels,
            activation='sigmoid' if sigmoid else 'softmax',
            temperature=self.temperature,
        )

    def forward(self, step: Step) -> dict[str, Tensor]:
        maps = self._maps(step)
        said = [
            _lists(one)
            for one in (
                step.student.at(self.head),
                *(branch(maps) for branch in self.branches),
            )
        ]
        self._check_alike(said)
        counts = [equal_weight(step.gt, one) for one in maps]
        gates = self.gates(maps, counts)
        ensemble = gated_sum(said, gates)
        zero = step.images.new_zeros(()) + self.touch()
        parts = dict(branches=zero, ensemble=zero, distil=zero)
        parts['watch_gate'] = torch.stack(
            [gate[:, 0].detach().mean() for gate in gates]
        ).mean()
        if step.dry:
            return parts
        own, _ = resolve(step.student.detector, self.head)
        if self.branch_weight:
            parts['branches'] = zero + self.branch_weight * sum(
                _task(branch, one, step)
                for branch, one in zip(self.branches, said[1:])
            )
        if self.ensemble_weight:
            parts['ensemble'] = zero + self.ensemble_weight * _task(
                own, ensemble, step
            )
        if self.distil_weight:
            target = [one.detach() for one in ensemble[0]]
            parts['distil'] = zero + self.distil_weight * sum(
                self.loss(one[0], target, step.gt) for one in said
            )
        return parts

    def _maps(self, step: Step) -> tuple[Tensor, ...]:
        maps = maps_of(step.student.at(self.path), f'The tap {self.path!r}')
        if len(maps) != len(self.gates.levels):
            raise ValueError(
                f'OneTerm has gates for {len(self.gates.levels)} levels, but '
                f'{self.path!r} returns {len(maps)} maps. Set '
                f'num_levels={len(maps)}.'
            )
        for one in maps:
            check_channels('OneTerm', one, self.gates.channels)
        return maps

    def _check_alike(self, said: Sequence[Predictions]) -> None:
        own, *others = (
            [tuple(map_.shape[1:]) for map_ in leaves(one)] for one in said
        )
        for other in others:
            if other != own:
                raise ValueError(
                    f'OneTerm sums what its branches predict, but the '
                    f'student predicts maps of {own} and a branch of {other}. '
                    f"Take the student's own head as head=, with fewer "
                    f'layers only.'
                )


def _lists(outputs: tuple) -> Predictions:
    return tuple(list(one) for one in outputs)


def _task(head: nn.Module, said: Predictions, step: Step) -> Tensor:
    """Detection loss of what a head is made to say, of labelled images."""
    known = [labelled(one) for one in step.samples]
    if not any(known):
        return sum(0.0 * one.sum() for one in leaves(said))
    if not all(known):  # those that are come first
        said = tuple([one[: sum(known)] for one in level] for level in said)
    boxes, ignored, metas = unpack_gt_instances(step.samples[: sum(known)])
    said = tuple([as_float(one) for one in level] for level in said)
    with full_precision(step.images):
        losses = head.loss_by_feat(*said, boxes, metas, ignored)
    return sum(
        one.mean()
        for name, value in losses.items()
        if 'loss' in name
        for one in (value if isinstance(value, (list, tuple)) else [value])
    )

"""Balanced: terms weigh as much as stated against the detection loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.ops.gradients import gradient
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.structures.constants import constant
from mmkd.taps import maps_of
from mmkd.terms.group import GroupTerm, parts_of

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class BalancedTerm(GroupTerm):
    r"""Terms whose weights follow from gradients instead of from tuning.

    .. math::

        L = \sum_k w_k L_k, \qquad
        w_k = share_k \, \frac{\lVert \partial L_{det} / \partial f \rVert}
                              {\lVert \partial L_k / \partial f \rVert}

    where f are the student's maps at ``anchor``, which detection and terms
    both learn through. A term of share 0.5 pushes these maps half as hard as
    the detection loss does, whatever its unit, the size of the images, the
    number of channels, levels or images. The children's own ``loss_weight``
    cancels out.

    The push of a term is bounded by that of the detection loss, so a term
    that is nearly fulfilled is not blown up, though its weight grows.

    Norms are measured every ``interval`` iterations, at the cost of one
    backward pass from the losses to ``anchor``, and averaged. Before the first
    measurement the weights are 0.

    Args:
        terms: Configs of the terms by name; they log under
            ``loss_kd_<group>_<term>``.
        share: Wanted ratio of gradient norms, of every term or of each.
        anchor: Tap of the student at which gradients are measured.
        interval: Iterations between measurements.
        momentum: Of the running averages of the norms, in [0, 1).
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a name in ``share`` is no term, or a number is out of
            range.
        RuntimeError: If a loss does not depend on ``anchor``.

    Reference:
        Liao et al., "RT-DETRv4: Painlessly Furthering Real-Time Object
        Detection with Vision Foundation Models", arXiv:2510.25257, adjusts
        the weight of its distillation loss by ratios of gradient norms (read:
        the abstract). How is ours: every term has a weight of its own, and
        norms are those at the student's maps and not at parameters, so that
        they cost no pass through the backbone.
    """

    #: No phase without the detection loss can have it.
    needs_detection: ClassVar[bool] = True

    def __init__(
        self,
        terms: Mapping[str, Mapping],
        share: float | Mapping[str, float] = 1.0,
        anchor: str = 'backbone',
        interval: int = 10,
        momentum: float = 0.7,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(terms, schedule)
        self.share = _shares(share, terms)
        check_positive('BalancedTerm', interval=interval)
        if not 0 <= momentum < 1:
            raise ValueError(
                f'BalancedTerm takes a momentum in [0, 1), got '
                f'momentum={momentum}.'
            )
        self.anchor, self.interval = anchor, interval
        self.momentum = momentum
        self.register_buffer('detection_norm', torch.zeros(()))
        self.register_buffer('norms', torch.zeros(len(terms)))

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.tap(student, self.anchor)
        super().bind(student, teachers)

    def speaking(self) -> dict[str, bool]:
        return {
            name: heard and self.share[name] > 0
            for name, heard in super().speaking().items()
        }

    def forward(self, step: Step) -> dict[str, Tensor]:
        factors = self.factors(step)
        shares = self.shares(step, factors)
        if not step.dry and step.iteration % self.interval == 0:
            self._measure(step, shares, factors)
        parts: dict[str, Tensor] = {}
        zero = step.images.new_zeros(())
        for weight, (name, share) in zip(self.weights(), shares.items()):
            parts[f'watch_weight_{name}'] = weight
            factor = factors[name] * weight if factors[name] else None
            parts.update(parts_of(name, share, factor, zero))
        return parts

    def weights(self) -> Tensor:
        """Present weights of the terms, (K,), without gradient."""
        share = constant(list(self.share.values()), self.norms)
        ratio = share * self.detection_norm / self.norms
        return torch.where(self.norms > 0, ratio, torch.zeros_like(ratio))

    def _measure(
        self,
        step: Step,
        shares: Mapping[str, Any],
        factors: Mapping[str, float],
    ) -> None:
        maps = [
            one
            for one in maps_of(step.student.at(self.anchor), self._who)
            if one.requires_grad
        ]
        if not maps:
            raise RuntimeError(
                f'{self._who} carries no gradient, as behind a frozen '
                f"backbone. Name maps that are trained: anchor='neck'."
            )
        found = [_norm(detection_loss(step.losses), maps)]
        found += [
            _norm(_total(share), maps) if factors[name] else None
            for name, share in shares.items()
        ]
        for name, norm in zip(('the detection loss', *shares), found):
            if norm is None and factors.get(name, 1.0):
                raise RuntimeError(
                    f'{self._who} has no part in {name!r}. Name maps through '
                    f'which detection and every term learn: anchor=…, or '
                    f'weigh the term by hand, outside of BalancedTerm.'
                )
        now = torch.stack(
            [
                self.detection_norm.new_zeros(()) if one is None else one
                for one in found
            ]
        )
        all_reduce(now, 'mean')
        before = torch.cat([self.detection_norm[None], self.norms])
        mixed = self.momentum * before + (1 - self.momentum) * now
        mixed = torch.where(before > 0, mixed, now)
        # Half precision may overflow, a batch may give a term nothing to do.
        after = torch.where(torch.isfinite(now) & (now > 0), mixed, before)
        self.detection_norm.copy_(after[0])
        self.norms.copy_(after[1:])

    @property
    def _who(self) -> str:
        return f'The tap {self.anchor!r} of BalancedTerm {self.name!r}'


def detection_loss(losses: Mapping[str, Any]) -> Tensor:
    """Sum of a detector's own losses, as MMEngine adds them up.

    Example:
        >>> one = torch.ones(2)
        >>> detection_loss({'loss_cls': [one, one], 'acc': 5 * one}).item()
        2.0
    """
    values = [
        value
        for name, loss in losses.items()
        if 'loss' in name
        for value in (loss if isinstance(loss, (list, tuple)) else [loss])
    ]
    return sum(value.mean() for value in values)


def _total(share: Tensor | Mapping[str, Tensor]) -> Tensor:
    if isinstance(share, Tensor):
        return share
    return sum(
        value for part, value in share.items() if not part.startswith('watch_')
    )


def _norm(loss: Tensor, maps: Sequence[Tensor]) -> Tensor | None:
    found = gradient(loss, maps)
    return None if found is None else found.norm()


def _shares(
    share: float | Mapping[str, float], terms: Mapping
) -> dict[str, float]:
    if not isinstance(share, Mapping):
        share = dict.fromkeys(terms, share)
    for name in share:
        check_name('BalancedTerm', 'term in share', name, terms)
    shares = {name: float(share.get(name, 1.0)) for name in terms}
    for name, one in shares.items():
        if one < 0:
            raise ValueError(
                f'BalancedTerm takes shares of 0 or more, got {one} for '
                f'{name!r}.'
            )
    return shares

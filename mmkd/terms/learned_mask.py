"""Learned masks: what matters is first asked of the teacher's own loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmkd.checks import check_fraction
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.structures.ground_truth import labelled
from mmkd.structures.nested import pick
from mmkd.taps import maps_of
from mmkd.teachers import fed
from mmkd.terms.balanced import detection_loss
from mmkd.terms.feature import FeatureTerm

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class LearnedMaskTerm(FeatureTerm):
    r"""A feature term whose loss learns on the teacher what to look at.

    The loss, :class:`mmkd.losses.maskd.MasKDLoss` for instance, has a method
    ``reveal``: what its masks leave of the teacher's map, and how much they
    overlap. In the first part of the training the masks learn by

    .. math:: \lambda \, L_{teacher}(reveal(T)) + \mu \sum_l overlap_l

    the teacher's own detection loss, its layers frozen, for the images of the
    step. Meanwhile the student learns under the masks as they are; after it
    they stay as they are. Give their weights ``decay_mult=0`` in the
    optimiser, else they go on shrinking.

    Args:
        teacher: Name of the teacher.
        loss: Config of the loss.
        levels: Which maps of the student are compared, 0 is the finest.
        teacher_levels: Which of the teacher's neck; as the student's if None.
        tap: Part of the student whose maps they are.
        align: Config of the neck that makes the student's maps comparable;
            none if None.
        learn_until: Progress of the training up to which the masks learn.
        task_weight: Factor λ of the teacher's loss.
        overlap_weight: Factor μ of the overlap.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        The loss's share, as ``feature`` or by its parts, and ``masks``, by
        which the masks learn, 0 once they have. The teacher's loss and the
        overlap are watched each; while masks part, the former may rise.

    Raises:
        ValueError: If the loss learns no masks.

    Reference:
        Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023,
        arXiv:2205.14589. The authors train masks on their own for 2000 steps
        with Adam, store them, and then distil; that both happen in one
        training, by one optimiser, is ours.
    """

    def __init__(
        self,
        teacher: str,
        loss: Mapping,
        levels: Sequence[int],
        teacher_levels: int | Sequence[int] | None = None,
        tap: str = 'neck',
        align: Mapping | None = None,
        learn_until: float = 0.01,
        task_weight: float = 1.0,
        overlap_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(
            teacher,
            loss,
            tap=tap,
            levels=levels,
            align=align,
            teacher_tap='neck',  # where its heads begin
            teacher_levels=teacher_levels,
            schedule=schedule,
        )
        check_fraction('LearnedMaskTerm', learn_until=learn_until)
        if not hasattr(self.losses[0], 'reveal'):
            raise ValueError(
                f'LearnedMaskTerm trains the masks of its loss, but '
                f'{type(self.losses[0]).__name__} has none. Use a loss that '
                f'does, for instance mmkd.MasKDLoss, or a mmkd.FeatureTerm.'
            )
        self.learn_until = learn_until
        self.task_weight = task_weight
        self.overlap_weight = overlap_weight

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        super().bind(student, teachers)
        self.sham = teachers[self.teacher].sham

    def compares_classes(self) -> bool:
        return True  # the teacher's loss is that of the data set's classes

    def forward(self, step: Step) -> dict[str, Tensor]:
        share = super().forward(step)
        parts = share if isinstance(share, dict) else dict(feature=share)
        parts['masks'] = step.images.new_zeros(())
        if not step.dry and step.progress < self.learn_until:
            task, overlap = self._learn(step)
            parts['masks'] = (
                self.task_weight * task + self.overlap_weight * overlap
            )
            parts['watch_task'] = task.detach()
            parts['watch_overlap'] = overlap.detach()
        return parts

    def _learn(self, step: Step) -> tuple[Tensor, Tensor]:
        """The teacher's loss on what the masks leave, and their overlap."""
        shown = step.teacher(self.teacher)
        maps = list(maps_of(shown.at('neck'), "The tap 'neck'"))
        overlap = 0.0
        for loss, level in zip(self.losses, self.teacher_levels):
            maps[level], meeting = loss.reveal(maps[level])
            overlap = overlap + meeting
        samples = list(step.samples)
        if self.sham:  # it was shown the next image of the batch
            samples = [*samples[1:], *samples[:1]]
        known = [index for index, one in enumerate(samples) if labelled(one)]
        images, maps = step.images, tuple(maps)
        if len(known) < len(samples):
            images, maps = pick((images, maps), known)
        samples = [samples[index] for index in known]
        with fed(shown.detector, maps), _learning(shown.detector):
            losses = shown.detector.loss(images, samples)
        return detection_loss(losses), overlap


@contextmanager
def _learning(detector: nn.Module) -> Iterator[None]:
    """Heads as their loss wants them, with statistics that stay.

    FCOS scales its boxes in evaluation and not in training.
    """
    modes = [(one, one.training) for one in detector.modules()]
    for one, _ in modes:
        one.training = not hasattr(one, 'running_mean')
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training

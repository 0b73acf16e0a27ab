"""One iteration, as a term may need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.structures.ground_truth import GroundTruth


class Outputs(Protocol):
    """What the taps of one forward pass returned.

    Attributes:
        detector: The detector that ran.
        size: Height and width of the images it was shown.
    """

    detector: nn.Module
    size: tuple[int, int] | None

    def has(self, path: str) -> bool: ...

    def at(self, path: str) -> Any: ...

    def inputs(self, path: str) -> tuple[tuple, dict]: ...


#: Shows images to a teacher: (images, keep a graph to the images) → outputs;
#: samples follow where the images are not those of the step.
Shower = Callable[..., Outputs]


@dataclass
class Step:
    """The batch, what student and teachers make of it, and where we are.

    Attributes:
        student: Recorded outputs of the student in this step;
            ``student.detector`` is the student itself.
        images: The batch as the student sees it, (N, 3, H, W).
        samples: mmdet's sample of each image.
        clean: The batch as teachers see it, of the same shape; ``images`` if
            None.
        progress: Position in the training, [0, 1].
        iteration: Iterations done before this one.
        losses: The student's own losses, by name; none in a dry pass, or in a
            phase without them.
        dry: Whether shapes are looked at while the model is built, before
            there are weights.
        copies: How often the student shows each image to its heads, of
            several branches that learn; images and samples here are those of
            all of them, one whole batch after the other.
        teachers: Shows images to a teacher, by name.
    """

    student: Outputs
    images: Tensor
    samples: list
    clean: Tensor | None = None
    progress: float = 0.0
    iteration: int = 0
    losses: Mapping[str, Any] = field(default_factory=dict)
    dry: bool = False
    copies: int = 1
    teachers: Mapping[str, Shower] = field(default_factory=dict)
    _ran: dict[str, Outputs] = field(default_factory=dict, repr=False)

    def teacher(self, name: str) -> Outputs:
        """A teacher's outputs for this batch; it runs at the first demand."""
        if name not in self._ran:
            self._ran[name] = self.show(name, self.shown)
        return self._ran[name]

    @property
    def shown(self) -> Tensor:
        """The batch as teachers see it, in the student's normalisation."""
        return self.images if self.clean is None else self.clean

    @property
    def once(self) -> tuple[Tensor, list]:
        """Images and samples as the student's own loss takes them."""
        count = len(self.samples) // self.copies
        return self.images[:count], list(self.samples[:count])

    def show(
        self,
        name: str,
        images: Tensor,
        grad: bool = False,
        samples: Sequence[Any] | None = None,
    ) -> Outputs:
        """Show a teacher images of the term's own making.

        Args:
            name: Name of the teacher.
            images: In the student's normalisation, (N, 3, H, W).
            grad: Keep the graph from the images to the outputs.
            samples: mmdet's sample of each image; the step's own if None.
        """
        check_name('The distiller', 'teacher', name, self.teachers)
        more = () if samples is None else (list(samples),)
        return self.teachers[name](images, grad, *more)

    @cached_property
    def gt(self) -> GroundTruth:
        """The annotations of the batch, laid flat."""
        return GroundTruth.from_samples(self.samples, self.images)

"""Showing: student and teacher on images of a term's own making.

Both look in eval mode, in which an output depends on its image alone and no
statistic of a batch is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from mmkd.ops.ascent import evaluating
from mmkd.ops.numeric import as_float
from mmkd.ops.scores import class_probs
from mmkd.pixels import Pixels, valid_area
from mmkd.structures import Outputs, Step
from mmkd.structures.constants import constant
from mmkd.taps import crop, maps_of, recording, resolve
from mmkd.teachers import run_detector
from mmkd.terms.decoding import decode

#: Values that pixels of an image file have.
DARKEST, BRIGHTEST = 0.0, 255.0
#: Which of a dense head's outputs are class scores and boxes.
SCORES, BOXES = 0, 1


@contextmanager
def student_shown(step: Step, images: Tensor, path: str) -> Iterator[Seen]:
    """What the student says of other images; it is in eval mode meanwhile.

    Args:
        step: The step, whose samples describe the images.
        images: As the student sees them, (N, 3, H, W).
        path: The tap wanted; what comes after its part is not run.
    """
    detector = step.student.detector
    with evaluating(detector):
        with recording(detector, [path], stop=True) as record:
            run_detector(detector, images, step.samples)
        yield seen(step, record, path)


def teacher_shown(step: Step, name: str, images: Tensor, path: str) -> Seen:
    """What a teacher says of other images, with a graph if these have one.

    It is kept nowhere: no image of the data is like them.
    """
    return seen(step, step.show(name, images, grad=True), path)


def seen(step: Step, outputs: Outputs, path: str) -> Seen:
    """What one side says of a step's images, or of others of their size."""
    return Seen(outputs, path, tuple(step.images.shape[-2:]))


def room(step: Step, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """By how much each pixel may become darker, and brighter.

    Args:
        step: The step with its images.
        pixels: How the student's images were normalised.

    Returns:
        Changes <= 0 and >= 0 in values of pixels, 0 to 255, (N, 3, H, W); both
        0 on the padded border.
    """
    mean, std = _settings(step.images, pixels)
    values = step.images * std + mean
    shapes, size = step.gt.image_shapes, tuple(step.images.shape[-2:])
    inside = valid_area(shapes, size, step.images.device)
    darker = (DARKEST - values).clamp(max=0)
    brighter = (BRIGHTEST - values).clamp(min=0)
    return darker * inside, brighter * inside


def changed(images: Tensor, change: Tensor, pixels: Pixels) -> Tensor:
    """Normalised images after a change of their pixels.

    Args:
        images: As the student sees them, (N, 3, H, W).
        change: In values of pixels, likewise.
        pixels: How the images were normalised.
    """
    _, std = _settings(images, pixels)
    return images + change / std


def _settings(images: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
    settings = constant([pixels.mean, pixels.std], images)
    mean, std = settings[:, :, None, None].unbind()
    return mean, std


@dataclass(frozen=True)
class Seen:
    """What one side says of a batch at one tap.

    Attributes:
        outputs: Of the side.
        path: The tap.
        size: Height and width of the student's images; cells over a border
            that only this side was shown are left out.
    """

    outputs: Outputs
    path: str
    size: tuple[int, int]

    @property
    def part(self) -> nn.Module:
        """The submodule that is tapped."""
        return resolve(self.outputs.detector, self.path)[0]

    def maps(self, output: int | None = None) -> tuple[Tensor, ...]:
        """Maps, or those of one of a head's outputs, (N, …, H, W) each."""
        who = f'The tap {self.path!r}'
        maps = maps_of(self.outputs.at(self.path), who, output)
        return crop(maps, self.outputs.size, self.size)

    def logits(self) -> list[Tensor]:
        """Class scores of each anchor, (N, C, A, H, W) each, float32."""
        head = self.part
        count = getattr(head, 'cls_out_channels', head.num_classes)
        return [
            as_float(one).unflatten(1, (-1, count)).movedim(2, 1)
            for one in self.maps(SCORES)
        ]

    @property
    def activation(self) -> str:
        sigmoid = getattr(self.part, 'use_sigmoid_cls', True)
        return 'sigmoid' if sigmoid else 'softmax'

    def probs(self) -> list[Tensor]:
        """Class probabilities of each anchor, (N, C, A, H, W) each."""
        return [class_probs(one, self.activation) for one in self.logits()]

    def boxes(self) -> list[Tensor]:
        """Corners of each anchor in pixels, (N, A, 4, H, W) each."""
        return decode(self.part, self.maps(BOXES))

"""ICD: imitate what the teacher holds where it was asked for an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.layers import SinePositionalEncoding
from torch import Tensor, nn

from mmkd.checks import check_channels, check_name, check_positive
from mmkd.classes import check_num_classes
from mmkd.ops.masks import valid_mask
from mmkd.ops.numeric import as_float, full_precision, one_hot
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Step
from mmkd.taps import crop, maps_of, pick_levels
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Sines and cosines that a coordinate is told by.
WAVES = 128
#: Sides are told by octaves: below 64 pixels, below 128, …, 512 and more.
OCTAVES = 5
#: Sides below this share of the image are taken for it, as what is divided by.
SMALLEST = 1e-3


@MODELS.register_module()
class InstanceConditionalTerm(Term):
    r"""Distance of values, weighed by the attention that objects find.

    An instance is a class, a point within 0.3 sides of the middle of a box,
    and the size of that box in octaves. Told to a decoder of one layer, it
    asks the cells of all the teacher's maps at once, in each of H heads:

    .. math::
        z_{kh} = \frac{q_{kh}^\top K_h}{\sqrt d}, \qquad
        m_h = \sum_{k \, real} softmax_{cells}(z_{kh} / \tau)

    From what it is answered the decoder must say whether the instance is
    there, and how far from the point its sides are. Some are objects of the
    image, and ``negatives`` times as many are fakes: class and size of a box
    of the batch, anywhere. These two losses train the decoder alone, on the
    frozen teacher, and the masks m are where it looks for objects. There the
    student imitates the values V that it finds:

    .. math::
        distil = \frac{w}{N H} \sum_{nh} \sum_{cells}
            \frac{m_{nh}}{\sum m_{nh}} \, \frac{1}{d} \left\|
            LN(V^S_{nh}) - LN(V^T_{nh}) \right\|_2^2

    :math:`V^S` is a projection of the student's maps that learns along;
    :math:`V^T` is the decoder's, which, as the masks, gets no gradient here.
    LN is a layer norm over the d channels of a head, without weights. While
    the projections are young, in the first ``warmup`` steps, the gradient
    that goes on to the student grows linearly to its full size.

    Cells of the padded border are not asked. An image without boxes costs 0.

    Args:
        teacher: Name of the teacher.
        num_classes: Of the data set.
        channels: Of the teacher's maps.
        in_channels: Of the student's maps; as the teacher's if None.
        dim: Channels of queries and values, of all heads together.
        heads: H.
        levels: Which of the student's maps, 0 is the finest; all if None.
        teacher_levels: The same for the teacher; as the student's if None.
        tap: Whose maps they are, in both detectors.
        negatives: Fake instances for each real one.
        limit: Instances of an image above which there are fewer fakes.
            Published: 300 for one stage, 100 for Faster R-CNN.
        jitter: Farthest that the point is from the middle, in sides.
        temperature: The lower, the sharper the masks.
        warmup: Steps.
        loss_weight: Factor w. Published: 8 for one stage, 3 for Faster R-CNN.
        aux_weight: Factor of the decoder's own losses.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``distil``, ``aux_class`` and ``aux_box``.

    Raises:
        ValueError: If channels, levels, sizes or classes do not fit.

    Reference:
        Kang et al., "Instance-Conditional Knowledge Distillation for Object
        Detection", NeurIPS 2021, arXiv:2110.12724. Read: the abstract, and the
        authors' code (https://github.com/megvii-research/ICD) for facts. There
        the student waits for 1000 steps and then learns at once, the decoder
        has an AdamW of its own at 1e-4, an image has at least one instance,
        fakes are drawn from statistics of COCO, and boxes that are ignored are
        not known, as here. Ours are the growing gradient, fakes from the
        batch, so that they are alike on any data, and that errors are divided
        by at least a thousandth of the image.
    """

    def __init__(
        self,
        teacher: str,
        num_classes: int,
        channels: int = 256,
        in_channels: int | None = None,
        dim: int = 256,
        heads: int = 8,
        levels: Sequence[int] | None = None,
        teacher_levels: Sequence[int] | None = None,
        tap: str = 'neck',
        negatives: int = 5,
        limit: int = 300,
        jitter: float = 0.3,
        temperature: float = 1.0,
        warmup: int = 1000,
        loss_weight: float = 8.0,
        aux_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        who = type(self).__name__
        check_positive(
            who, num_classes=num_classes, heads=heads, temperature=temperature
        )
        if dim % heads:
            raise ValueError(
                f'{who} shares its channels among heads, got dim={dim} and '
                f'heads={heads}. Try dim={-(-dim // heads) * heads}.'
            )
        self.teacher, self.path = teacher, tap
        self.levels = levels
        self.teacher_levels = (
            levels if teacher_levels is None else teacher_levels
        )
        self.num_classes, self.channels = num_classes, channels
        self.in_channels = channels if in_channels is None else in_channels
        self.negatives, self.limit, self.jitter = negatives, limit, jitter
        self.temperature, self.warmup = temperature, warmup
        self.loss_weight, self.aux_weight = loss_weight, aux_weight
        self.sine = SinePositionalEncoding(WAVES, normalize=True)
        told = num_classes + 2 * (WAVES + OCTAVES)
        self.encoder = _layers(told, dim, dim, dim)
        self.decoder = Decoder(channels, dim, heads)
        self.predictor = _layers(dim, dim, dim, 5)
        self.value = nn.Linear(self.in_channels, dim)

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        self.tap(student, self.path)
        teachers[self.teacher].tap(self.path)
        self.teacher_names = [self.teacher]
        self.sham = teachers[self.teacher].sham
        check_num_classes(type(self).__name__, student, self.num_classes)

    def silent(self) -> bool:
        return self.loss_weight == 0

    def forward(self, step: Step) -> dict[str, Tensor]:
        student, teacher = self._maps(step)
        gt = self._annotations(step)
        with full_precision(step.images):
            return self._parts(student, teacher, gt, step.iteration)

    def _parts(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth,
        iteration: int,
    ) -> dict[str, Tensor]:
        border = [
            valid_mask(gt, tuple(one.shape[-2:]), keep_ignored=True)[:, 0] == 0
            for one in teacher
        ]
        asked = ~torch.cat([one.flatten(1) for one in border], 1)  # N, S
        most = gt.most
        found = instances(gt, most, self.negatives, self.limit)
        told, sides = self._tell(found, gt)
        query, key, value, answer = self.decoder(
            self.encoder(told),
            cells_of(teacher),
            cells_of([self.sine(one) for one in border]),
            asked,
        )
        said = self.predictor(answer)  # N, Q, 5
        with torch.no_grad():
            masks = attention_masks(
                query[:, :, :most] / self.temperature,
                key,
                asked,
                found.real[:, :most],
            )
        # The same number, with a part of its gradient.
        part = min(1.0, (iteration + 1) / (self.warmup + 1))
        own = cells_of(student)
        own = torch.lerp(own.detach(), own, part)
        own = self.decoder.split(self.value(own))
        distil = conditional_distance(own, value.detach(), masks)
        return dict(
            distil=self.loss_weight * distil,
            aux_class=self.aux_weight * class_error(said[..., 0], found),
            aux_box=self.aux_weight * box_error(said[..., 1:], sides, found),
        )

    def _tell(
        self, found: Instances, gt: GroundTruth
    ) -> tuple[Tensor, Tensor]:
        """What instances are told by, (N, Q, …), and the point's distances.

        The distances are those to the left, upper, right and lower side of
        the box, as shares of the image, (N, Q, 4).
        """
        low, high = found.boxes[..., :2], found.boxes[..., 2:]
        extent = high - low
        shift = self.jitter * (2 * torch.rand_like(extent) - 1)
        point = (low + high) / 2 + shift * extent
        pixels = extent * gt.image_sizes.to(extent)[:, None]
        octave = pixels.log2().floor().clamp(5, 4 + OCTAVES) - 5
        told = [
            one_hot(found.labels, self.num_classes),
            waves(point).flatten(2),
            one_hot(octave, OCTAVES).flatten(2),
        ]
        return torch.cat(told, 2), torch.cat([point - low, high - point], 2)

    def _annotations(self, step: Step) -> GroundTruth:
        """Those of the images that the teacher sees."""
        if not self.sham:  # else it was shown the next image of the batch
            return step.gt
        samples = [*step.samples[1:], *step.samples[:1]]
        return GroundTruth.from_samples(samples, step.images)

    def _maps(
        self, step: Step
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Maps of both sides, of the same sizes, the teacher's detached."""
        shown = step.teacher(self.teacher)
        who = f'The tap {self.path!r}'
        student, teacher = (
            pick_levels(maps_of(one.at(self.path), who), levels, who)
            for one, levels in (
                (step.student, self.levels),
                (shown, self.teacher_levels),
            )
        )
        name = type(self).__name__
        for one in student:
            check_channels(f'{name}, by in_channels,', one, self.in_channels)
        for one in teacher:
            check_channels(f'{name}, by channels,', one, self.channels)
        teacher = crop(teacher, shown.size, step.images.shape[-2:])
        own, other = (
            [tuple(one.shape[-2:]) for one in maps]
            for maps in (student, teacher)
        )
        if own != other:
            raise ValueError(
                f'{name} compares maps of one size, got student {own} and '
                f'teacher {other}. Pair levels of one stride with levels= '
                f'and teacher_levels=.'
            )
        return student, tuple(one.detach() for one in teacher)


class Decoder(nn.Module):
    """A layer of attention whose masks and values can be seen.

    Queries do not attend to each other: each instance is a question of its
    own.

    Args:
        channels: Of the cells.
        dim: Of queries, keys and values, of all heads together.
        heads: Number of heads.
    """

    def __init__(self, channels: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        # What all keys have in common, softmax does not see.
        self.place = nn.Linear(2 * WAVES, channels, bias=False)
        self.key = nn.Linear(channels, dim, bias=False)
        self.value = nn.Linear(channels, dim)
        self.out = nn.Linear(dim, dim)
        self.feed = _layers(dim, 4 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def split(self, vectors: Tensor) -> Tensor:
        """Heads apart, (N, L, H·d) → (N, H, L, d)."""
        return vectors.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, told: Tensor, cells: Tensor, places: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ask cells.

        Args:
            told: Encoded instances, (N, Q, dim).
            cells: Their vectors, (N, S, channels).
            places: Encodings of where they are, (N, S, 2·WAVES).
            asked: Which of them are asked, (N, S).

        Returns:
            Queries, (N, H, Q, d), keys and values, (N, H, S, d), and what the
            instances are answered, (N, Q, dim).
        """
        query = self.split(self.query(told))
        key = self.split(self.key(cells + self.place(places)))
        value = self.split(self.value(cells))
        # Never holds the attention of all queries to all cells.
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=asked[:, None, None]
        )
        found = self.out(found.transpose(1, 2).flatten(2))
        answer = self.norms[0](told + found)
        return query, key, value, self.norms[1](answer + self.feed(answer))


# Instances -------------------------------------------------------------------


class Instances(NamedTuple):
    """Real and fake instances of N images, Q places each; real ones first.

    Attributes:
        labels: Classes, (N, Q).
        boxes: x1 y1 x2 y2 as shares of the image, (N, Q, 4).
        real: Whether there is such an object, (N, Q).
        there: Whether the place is taken, (N, Q).
    """

    labels: Tensor
    boxes: Tensor
    real: Tensor
    there: Tensor


def instances(
    gt: GroundTruth, most: int, negatives: int, limit: int
) -> Instances:
    """The boxes of each image, and fakes: what is no object there.

    A fake has class and size of a box of the batch, drawn at random, and its
    middle anywhere in the image; what would lie outside is cut off. An image
    without boxes has none.

    Args:
        gt: Boxes of the batch.
        most: Boxes of the image that has most.
        negatives: Fakes for each box.
        limit: Instances of an image above which there are fewer fakes.

    Example:
        >>> gt = GroundTruth.from_boxes(
        ...     [torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)],
        ...     shape=(16, 32),
        ... )
        >>> found = instances(gt, most=1, negatives=1, limit=300)
        >>> found.boxes[0, 0].tolist()
        [0.0, 0.0, 0.25, 0.5]
        >>> found.real.tolist(), found.there.tolist()
        ([[True, False], [False, False]], [[True, True], [False, False]])
    """
    count = min(most * (1 + negatives), max(most, limit))
    shape = gt.num_images, count
    image = gt.image
    boxes = as_float(gt.boxes)
    boxes = boxes / gt.image_sizes.to(boxes).repeat(1, 2)[image]
    # One more row, which is drawn where there is no other.
    half = F.pad((boxes[:, 2:] - boxes[:, :2]) / 2, (0, 0, 0, 1))
    drawn = torch.randint(max(1, len(boxes)), shape, device=image.device)
    middle = torch.rand(*shape, 2, device=image.device)
    half = half[drawn]
    everything = torch.cat([middle - half, middle + half], 2).clamp(0, 1)
    labels = F.pad(gt.labels, (0, 1))[drawn]
    real = torch.zeros_like(labels, dtype=torch.bool)
    place = gt.place
    everything[image, place] = boxes
    labels[image, place] = gt.labels
    real[image, place] = True
    own = real.sum(1, keepdim=True)
    total = torch.minimum(own * (1 + negatives), own.clamp(min=limit))
    there = torch.arange(count, device=image.device) < total
    return Instances(labels, everything, real, there)


def waves(share: Tensor) -> Tensor:
    """A coordinate as sines and cosines of ever longer waves.

    Args:
        share: In [0, 1] where it is inside of the image, (…).

    Returns:
        (…, WAVES); the longest wave is 10000 images long, nearly.

    Reference:
        Vaswani et al., "Attention Is All You Need", NIPS 2017,
        arXiv:1706.03762.
    """
    index = torch.arange(WAVES // 2, device=share.device)
    length = 10000 ** (2 * index / WAVES)
    angle = 2 * torch.pi * share[..., None] / length
    return torch.cat([angle.sin(), angle.cos()], -1)


# What is compared ------------------------------------------------------------


def cells_of(maps: Sequence[Tensor]) -> Tensor:
    """Cells of all levels one after the other, (N, S, C), float32."""
    return torch.cat([as_float(one).flatten(2) for one in maps], 2).mT


def attention_masks(
    query: Tensor, key: Tensor, asked: Tensor, real: Tensor
) -> Tensor:
    """Where the real instances of each image look, added up.

    Args:
        query: (N, H, K, d).
        key: (N, H, S, d).
        asked: Cells that are asked, (N, S).
        real: Instances that count, (N, K).

    Returns:
        (N, H, S); they sum to the number of real instances.
    """
    logits = query @ key.mT * query.shape[-1] ** -0.5
    logits = logits.masked_fill(~asked[:, None, None], -torch.inf)
    return (logits.softmax(-1) * real[:, None, :, None]).sum(2)


def conditional_distance(
    student: Tensor, teacher: Tensor, masks: Tensor
) -> Tensor:
    """Squared error of normalised values, averaged under masks.

    Args:
        student: Values of the cells, (N, H, S, d).
        teacher: Likewise.
        masks: At least 0, (N, H, S).

    Returns:
        Mean over images and heads; 0 for those whose mask is 0.

    Example:
        >>> student = torch.tensor([[9.0, -9.0], [1.0, -1.0]])[None, None]
        >>> teacher = torch.tensor([[-9.0, 9.0], [5.0, -5.0]])[None, None]
        >>> masks = torch.tensor([[[3.0, 1.0]]])  # opposite, alike
        >>> round(conditional_distance(student, teacher, masks).item(), 3)
        3.0
    """
    width = student.shape[-1:]
    own, other = (F.layer_norm(one, width) for one in (student, teacher))
    error = (own - other).square().mean(-1)
    total = masks.sum(-1).clamp(min=1e-6)
    return ((masks * error).sum(-1) / total).mean()


def class_error(logits: Tensor, found: Instances) -> Tensor:
    """Binary cross entropy of being real, averaged over what is there."""
    error = F.binary_cross_entropy_with_logits(
        logits, found.real.to(logits), reduction='none'
    )
    return (found.there * error).sum() / found.there.sum().clamp(min=1)


def box_error(logits: Tensor, sides: Tensor, found: Instances) -> Tensor:
    """Absolute errors of four distances, as shares of the box.

    Args:
        logits: Of the distances to the sides, (N, Q, 4).
        sides: The distances, as shares of the image, (N, Q, 4).
        found: The instances.

    Returns:
        Their sum, averaged over the real ones.
    """
    extent = (sides + sides.roll(2, -1)).clamp(min=SMALLEST)
    error = ((logits.sigmoid() - sides).abs() / extent).sum(-1)
    return (found.real * error).sum() / found.real.sum().clamp(min=1)


# What is built and checked ---------------------------------------------------


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])

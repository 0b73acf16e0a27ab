"""MMKD: several teachers weighed image by image by two learned nets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from mmdet.models.losses import FocalLoss
from mmengine.dist import all_reduce, is_distributed
from torch import Tensor, nn
from torch.func import functional_call

from mmkd.build import build
from mmkd.checks import check_name, check_positive, check_same_shape, suggest
from mmkd.ops.masks import valid_mask
from mmkd.ops.numeric import as_float, full_precision, one_hot
from mmkd.ops.virtual import Values, meta_gradient
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Outputs, Step
from mmkd.structures.ground_truth import labelled
from mmkd.taps import crop, maps_of, pick_levels, recording, resolve
from mmkd.teachers import fed, run_detector
from mmkd.terms.balanced import detection_loss
from mmkd.terms.decoding import check_same_anchors
from mmkd.terms.hard_images import HardImages
from mmkd.terms.seen import (
    GRID,
    Seen,
    dense_head,
    response_gaps,
    scores_of,
    seen,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

_WHO = 'MetaTeachersTerm'
OUTPUTS, FEATURES = 'outputs', 'features'


@MODELS.register_module()
class MetaTeachersTerm(Term):
    r"""Outputs and features of several teachers, weighed for each image.

    .. math::

        L = \frac{1}{N} \sum_n \sum_m
            w_{nm} (\tau^2 KL_{nm} + \gamma B_{nm}) + \beta v_{nm} E_{nm}

    KL is the divergence of the class probabilities at temperature
    :math:`\tau`, B one minus the GIoU of the decoded boxes, both averaged
    over the anchors of image n with the largest score of teacher m as weight;
    E is the mean squared error of the features behind an alignment of this
    teacher's own.

    Two nets of two layers say how much each teacher counts, by a softmax over
    the teachers: w is told the largest score of every class in the image,
    according to each teacher and the student; v is told where in the image
    the features of each are strong, on a grid of 8 x 8. The nets are *not*
    trained by this loss, which would favour the easiest teacher, nor by the
    optimiser of the training. Every ``meta_interval`` iterations the student
    takes, in thought, ``inner_steps`` steps down L on images it finds hard
    and one step down its detection loss; the nets then go where the detection
    loss at the end is lower. Student and optimiser stay as they are.

    Hard images are those whose detection loss lies above the running median;
    they wait in main memory, and a stopped training finds them again. In a
    checkpoint the nets and the state of their optimiser (Adam) stand under
    ``terms.``.

    Args:
        teachers: Names of the teachers.
        output_teachers: Those whose class scores and boxes are learned as
            well: strides, anchors and classes must be the student's. All if
            None; with ``()`` features alone.
        align: Config of the neck that makes the student's features comparable
            with a teacher's, one for all teachers or one for each by name;
            none if None. Every teacher gets one of its own.
        features: Tap of the features.
        levels: Which of its maps; all if None.
        head: Dense head of student and teachers.
        temperature: :math:`\tau`. Published: 4.
        box_weight: :math:`\gamma`.
        feature_weight: :math:`\beta`. The paper's example: 100.
        meta_interval: Iterations between lessons of the nets. Published: 5.
        meta_lr, meta_decay: Learning rate and weight decay of the nets.
        meta_batch: Hard images of a lesson.
        meta_scope: Parts of the student that move in thought, besides the
            alignments.
        inner_steps: Steps in thought down L. Published: 2.
        inner_lr: Learning rate of the steps in thought.
        buffer_size: Hard images kept. Published: 256.
        loss_weight: The outer factor.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a name is unknown, a number out of range, or heads or
            features do not fit, while the model is built.
        RuntimeError: If a part in ``meta_scope`` cannot be differentiated
            twice.

    Reference:
        Zhang et al., "Adaptive Multi-Teacher Knowledge Distillation with
        Meta-Learning", ICME 2023, arXiv:2306.06634, for classifiers, from a
        description of the authors' code (Rorozhl/MMKD). There w is told the
        logits and v the similarities of the images of a batch; a detector has
        a few images and thousands of logits, so that what the nets are told
        is ours, as are boxes, the weight of an anchor, what counts as hard,
        the intervals, the rate of the steps in thought, and that the nets
        begin at equal weights.
    """

    #: No phase without the detection loss can have it.
    needs_detection: ClassVar[bool] = True

    def __init__(
        self,
        teachers: Sequence[str],
        output_teachers: Sequence[str] | None = None,
        align: Mapping | None = None,
        features: str = 'neck',
        levels: Sequence[int] | None = None,
        head: str = 'bbox_head',
        temperature: float = 4.0,
        box_weight: float = 1.0,
        feature_weight: float = 100.0,
        meta_interval: int = 50,
        meta_lr: float = 1e-3,
        meta_decay: float = 1e-4,
        meta_batch: int = 2,
        meta_scope: Sequence[str] = ('neck', 'bbox_head'),
        inner_steps: int = 2,
        inner_lr: float = 0.01,
        buffer_size: int = 64,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        who = 'MetaTeachersTerm'
        check_positive(
            who,
            temperature=temperature,
            meta_interval=meta_interval,
            meta_lr=meta_lr,
            meta_batch=meta_batch,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            buffer_size=buffer_size,
        )
        self.teachers = _names(teachers)
        if not self.teachers:
            raise ValueError(
                f'{who} needs at least one teacher, got teachers=(). Name '
                f'those of the distiller.'
            )
        self.output_teachers = (
            self.teachers
            if output_teachers is None
            else _names(output_teachers)
        )
        for name in self.output_teachers:
            check_name(who, 'teacher in output_teachers', name, self.teachers)
        self.features, self.head = features, head
        self.levels = None if levels is None else tuple(levels)
        self.aligns = _alignments(align, self.teachers, self.levels)
        self.temperature, self.box_weight = temperature, box_weight
        self.feature_weight, self.loss_weight = feature_weight, loss_weight
        self.meta_interval, self.meta_batch = meta_interval, meta_batch
        self.meta_lr, self.meta_decay = meta_lr, meta_decay
        self.meta_scope = _names(meta_scope)
        self.inner_steps, self.inner_lr = inner_steps, inner_lr
        self.hard = HardImages(buffer_size)
        self.nets = nn.ModuleDict()
        self._lesson: int | None = None

    def silent(self) -> bool:
        return not self.loss_weight

    def compares_classes(self) -> bool:
        return bool(self.output_teachers)

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.tap(student, self.features)
        self.trunk = 'neck' if hasattr(student, 'neck') else 'backbone'
        self.tap(student, self.trunk)
        for name in self.teachers:
            check_name('The distiller', 'teacher', name, teachers)
            teachers[name].tap(self.features)
        # Classes are compared with those whose scores are.
        self.teacher_names = list(self.output_teachers or self.teachers)
        if self.output_teachers:
            self.tap(student, self.head)
            own = dense_head(_WHO, student, self.head, 'student')
        for name in self.output_teachers:
            teachers[name].tap(self.head)
            other = dense_head(
                _WHO, teachers[name].detector, self.head, f'teacher {name!r}'
            )
            check_same_anchors('MetaTeachersTerm', own, other)
        self._check_scope(student)
        self._build_nets(student)

    def _check_scope(self, student: nn.Module) -> None:
        known = [name for name, _ in student.named_modules()]
        for path in self.meta_scope:
            if path not in known:
                raise ValueError(
                    f'MetaTeachersTerm: {type(student).__name__} has no part '
                    f'{path!r} to name in meta_scope. {suggest(path, known)}'
                )
        if not any(True for _ in self._moving(student)):
            raise ValueError(
                f'MetaTeachersTerm moves {", ".join(self.meta_scope)} in '
                f'thought, but no parameter there can be trained. Name other '
                f'parts in meta_scope.'
            )

    def _build_nets(self, student: nn.Module) -> None:
        count = len(self.output_teachers)
        if count:
            classes = scores_of(resolve(student, self.head)[0])
            self.nets[OUTPUTS] = WeightNet((count + 1) * classes, count)
        count = len(self.teachers)
        self.nets[FEATURES] = WeightNet((count + 1) * GRID**2, count)
        # Trained by their own optimiser alone.
        self.nets.requires_grad_(False)
        total = sum(one.numel() for one in self.nets.parameters())
        self.register_buffer('moment', torch.zeros(total))
        self.register_buffer('square', torch.zeros(total))
        self.register_buffer('lessons', torch.zeros(()))

    def forward(self, step: Step) -> dict[str, Tensor]:
        if self.training and not step.dry:
            self._teach_nets(step)
            self._watch(step)
        with full_precision(step.images):
            own = self._seen(step.student, step.gt)
            others = self._taught(step.teacher, step.gt)
            with torch.no_grad():
                weights = self.weigh(own, others)
            parts = self.compare(own, others, weights)
        parts = {
            name: self.loss_weight * value for name, value in parts.items()
        }
        for kind, values in weights.items():
            named = self.output_teachers if kind == OUTPUTS else self.teachers
            for name, value in zip(named, values.mean(0)):
                parts[f'watch_{kind}_{name}'] = value
        return parts

    # ------------------------------------------------------------ comparing

    def _seen(self, outputs: Outputs, gt: GroundTruth) -> Seen:
        """What a detector made of a batch, image by image."""
        maps = maps_of(outputs.at(self.features), f'Tap {self.features!r}')
        maps = pick_levels(maps, self.levels, repr(self.features))
        maps = crop(maps, outputs.size, gt.shape)
        if not self.output_teachers or not outputs.has(self.head):
            return Seen(gt, maps)
        return seen(outputs, gt, self.head, maps)

    def _taught(
        self, show: Callable[[str], Outputs], gt: GroundTruth
    ) -> dict[str, Seen]:
        with torch.no_grad():
            return {name: self._seen(show(name), gt) for name in self.teachers}

    def weigh(
        self,
        own: Seen,
        others: Mapping[str, Seen],
        values: Values | None = None,
    ) -> dict[str, Tensor]:
        """How much each teacher counts for each image.

        Args:
            own: What the student sees.
            others: What each teacher sees.
            values: Other parameters of the nets, by name; their own if None.

        Returns:
            Weights of ``outputs`` and ``features``, (N, M) each, rows sum to
            1; no gradient reaches the student.
        """
        told = {FEATURES: [one.energy() for one in (*others.values(), own)]}
        if OUTPUTS in self.nets:
            heard = [others[name] for name in self.output_teachers]
            told[OUTPUTS] = [one.best() for one in (*heard, own)]
        found = {}
        for kind, net in self.nets.items():
            given = torch.cat(told[kind], 1).detach()
            own_values = {
                name: (values or {}).get(f'{kind}.{name}', value)
                for name, value in net.named_parameters()
            }
            found[kind] = functional_call(net, own_values, (given,))
        return found

    def compare(
        self,
        own: Seen,
        others: Mapping[str, Seen],
        weights: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """All parts of the loss, without ``loss_weight``."""
        found: dict[str, Tensor] = {}
        if OUTPUTS in weights:
            shares = [
                response_gaps(
                    'MetaTeachersTerm', own, others[name], self.temperature
                )
                for name in self.output_teachers
            ]
            scores, boxes = (torch.stack(one, 1) for one in zip(*shares))
            found['scores'] = _mean(weights[OUTPUTS] * scores)
            found['boxes'] = self.box_weight * _mean(weights[OUTPUTS] * boxes)
        errors = [
            self._features(name, own, one) for name, one in others.items()
        ]
        found['features'] = self.feature_weight * _mean(
            weights[FEATURES] * torch.stack(errors, 1)
        )
        return found

    def _features(self, name: str, own: Seen, other: Seen) -> Tensor:
        """Mean squared error of each image, over levels, cells, channels."""
        maps = own.maps
        if name in self.aligns:
            maps = self.aligns[name](maps, other.maps)
        if len(maps) != len(other.maps):
            raise ValueError(
                f'MetaTeachersTerm pairs features level by level, got '
                f'{len(maps)} maps of the student and {len(other.maps)} of '
                f'teacher {name!r}. Name those that both have with levels=.'
            )
        errors = []
        for one, like in zip(maps, other.maps):
            check_same_shape('MetaTeachersTerm', one, like)
            valid = valid_mask(other.gt, tuple(one.shape[-2:]))
            error = (as_float(one) - as_float(like)).square().mean(1)
            inside = valid.sum((1, 2, 3)).clamp(min=1)
            errors.append((error * valid[:, 0]).sum((1, 2)) / inside)
        return torch.stack(errors).mean(0)

    # -------------------------------------------------------------- lessons

    def _moving(self, student: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, one in student.named_parameters():
            if one.requires_grad and _inside(name, self.meta_scope):
                yield f'{_Imagined.STUDENT}.{name}', one

    def _teach_nets(self, step: Step) -> None:
        due = step.iteration % self.meta_interval == 0
        if not due or self._lesson == step.iteration:
            return
        self._lesson = step.iteration
        if not _least(len(self.hard), step.images):
            return
        knobs = dict(self.nets.named_parameters())
        _, slopes = self.lesson(step)
        for slope in slopes:
            all_reduce(slope, 'mean')
        if all(slope.isfinite().all() for slope in slopes):
            self._descend(list(knobs.values()), slopes)

    def lesson(
        self, step: Step, knobs: Values | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What the detection loss becomes after steps in thought.

        Args:
            step: The present step; of it student and teachers are used.
            knobs: Parameters of the nets by name; their own if None.

        Returns:
            The detection loss of hard images, and its derivative to each
            parameter of the nets.
        """
        detector = step.student.detector
        pixels = getattr(detector, 'data_preprocessor', None)
        divisor = getattr(pixels, 'pad_size_divisor', 32)
        images, samples = self.hard.draw(self.meta_batch, step.images, divisor)
        gt = GroundTruth.from_samples(samples, images)
        if knobs is None:
            knobs = {
                name: value.detach().clone().requires_grad_()
                for name, value in self.nets.named_parameters()
            }
        with (
            full_precision(images),
            torch.enable_grad(),
            _attributes_kept(detector),
            _twice_differentiable(detector),
        ):
            others = self._taught(
                lambda name: step.show(name, images, samples=samples), gt
            )
            student = _Imagined(detector, self.aligns, self.meta_scope)
            values = {
                name: value.detach().clone().requires_grad_()
                for name, value in (
                    *self._moving(detector),
                    *student.of_aligns(),
                )
            }

            def inner(at: Values) -> Tensor:
                def match() -> Tensor:
                    record = student.look(self.student_paths, images, samples)
                    own = self._seen(record, gt)
                    weights = self.weigh(own, others, knobs)
                    return sum(self.compare(own, others, weights).values())

                return student.with_values(at, match)

            def outer(at: Values) -> Tensor:
                return student.with_values(
                    at, lambda: student.detection_loss(images, samples)
                )

            with student.prepared(images):
                try:
                    return meta_gradient(
                        list(knobs.values()),
                        values,
                        inner,
                        outer,
                        self.inner_lr,
                        self.inner_steps,
                    )
                except RuntimeError as error:
                    raise RuntimeError(_ADVICE.format(error)) from error

    def _descend(self, knobs: list[Tensor], slopes: list[Tensor]) -> None:
        """One step of Adam, whose state stands in the term's buffers."""
        sizes = [one.numel() for one in knobs]
        optimiser = torch.optim.Adam(
            knobs, lr=self.meta_lr, weight_decay=self.meta_decay
        )
        for one, slope, moment, square in zip(
            knobs,
            slopes,
            self.moment.split(sizes),
            self.square.split(sizes),
        ):
            one.grad = slope
            optimiser.state[one] = dict(
                step=self.lessons.to('cpu', copy=True),
                exp_avg=moment.view_as(one),
                exp_avg_sq=square.view_as(one),
            )
        optimiser.step()
        self.lessons += 1
        for one in knobs:
            one.grad = None

    @torch.no_grad()
    def _watch(self, step: Step) -> None:
        """Tell the store how hard each image is."""
        known = [
            index for index, one in enumerate(step.samples) if labelled(one)
        ]
        maps = maps_of(step.student.at(self.trunk), f'Tap {self.trunk!r}')
        detector = step.student.detector
        student = _Imagined(detector, self.aligns, self.meta_scope)
        found = []
        with _attributes_kept(detector), full_precision(step.images):
            # Losses that average over processes wait for each other.
            for turn in range(_most(len(known), step.images)):
                index = known[min(turn, len(known) - 1)] if known else 0
                here = slice(index, index + 1)
                with fed(detector, tuple(as_float(one[here]) for one in maps)):
                    found.append(
                        student.with_values(
                            {},
                            lambda here=here: student.detection_loss(
                                step.images[here], step.samples[here]
                            ),
                        )
                    )
        if known:
            self.hard.watch(
                step.images[known],
                [step.samples[index] for index in known],
                torch.stack(found[: len(known)]),
            )

    # ------------------------------------------------------------- resuming

    def run_state(self) -> dict[str, Any]:
        """What a stopped run needs besides weights: the hard images."""
        return self.hard.state()

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`run_state` returned."""
        self.hard.load_state(state)


class WeightNet(nn.Module):
    """Two layers and a softmax over teachers, (N, inputs) → (N, M).

    It begins at equal weights for all.

    Args:
        inputs: Numbers it is told of an image.
        teachers: M.

    Example:
        >>> WeightNet(6, 2)(torch.randn(1, 6)).detach()
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, inputs: int, teachers: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, max(inputs // 2, 1))
        self.last = nn.Linear(max(inputs // 2, 1), teachers)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, given: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(given))).softmax(1)


class _Imagined(nn.Module):
    """A student and the alignments of its term with other parameters.

    What they compute with may be exchanged for the length of a call; buffers
    are copies throughout, so that no statistic moves.
    """

    STUDENT, ALIGNS = 'student', 'aligns'

    def __init__(
        self, student: nn.Module, aligns: nn.ModuleDict, scope: Sequence[str]
    ) -> None:
        super().__init__()
        self.student, self.aligns = student, aligns
        self.scope = scope
        self.copies = {
            f'{prefix}.{name}': one.detach().clone()
            for prefix, module in (
                (self.STUDENT, student),
                (self.ALIGNS, aligns),
            )
            for name, one in module.named_buffers()
            if not name.startswith('terms.')
        }

    def of_aligns(self) -> Iterator[tuple[str, Tensor]]:
        for name, one in self.aligns.named_parameters():
            yield f'{self.ALIGNS}.{name}', one

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()

    def with_values(self, values: Values, call: Callable[[], Any]) -> Any:
        """Call with these parameters in the place of their own."""
        # Tied weights would leave modules that are found by two paths, as the
        # alignments are here, with what they were lent.
        return functional_call(
            self, {**self.copies, **values}, (call,), tie_weights=False
        )

    def look(
        self, paths: Sequence[str], images: Tensor, samples: list
    ) -> Outputs:
        with recording(self.student, paths) as record:
            run_detector(self.student, images, samples)
        return record

    def detection_loss(self, images: Tensor, samples: list) -> Tensor:
        plain = getattr(self.student, 'student_class', type(self.student))
        return detection_loss(plain.loss(self.student, images, samples))

    @contextmanager
    def prepared(self, images: Tensor) -> Iterator[None]:
        """Run the backbone once, if all that moves comes after it."""
        if _inside('backbone', [one.split('.')[0] for one in self.scope]):
            yield
            return
        backbone = self.student.backbone
        with torch.no_grad():
            maps = self.with_values({}, lambda: backbone(images))
        backbone.__dict__['forward'] = lambda *_: maps
        try:
            yield
        finally:
            del backbone.__dict__['forward']


_ADVICE = (
    'MetaTeachersTerm could not differentiate the student twice: {} Name '
    'parts after those that cannot in meta_scope, for instance '
    "meta_scope=('bbox_head',)."
)


@contextmanager
def _twice_differentiable(detector: nn.Module) -> Iterator[None]:
    """Focal losses as torch writes them: the GPU's has no second derivative.

    It takes that way for labels that are one-hot.
    """
    losses = [one for one in detector.modules() if isinstance(one, FocalLoss)]
    for one in losses:
        one.__dict__['forward'] = _of_one_hot(one.forward)
    try:
        yield
    finally:
        for one in losses:
            del one.__dict__['forward']


def _of_one_hot(method: Callable) -> Callable:
    def forward(pred: Tensor, target: Tensor, *args: Any, **more: Any) -> Any:
        if target.ndim < pred.ndim:
            target = one_hot(target, pred.shape[-1])
        return method(pred, target, *args, **more)

    return forward


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what parts remember in plain numbers and lists."""
    plain = (bool, int, float, str, list, tuple)
    before = [
        (
            one,
            {
                key: copy.copy(value)
                for key, value in vars(one).items()
                if isinstance(value, plain)
            },
        )
        for one in module.modules()
    ]
    try:
        yield
    finally:
        for one, values in before:
            vars(one).update(values)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _inside(path: str, parts: Sequence[str]) -> bool:
    return any(path == one or path.startswith(f'{one}.') for one in parts)


def _mean(values: Tensor) -> Tensor:
    """Sum over teachers, mean over images."""
    return values.sum(1).mean()


def _alignments(
    config: Mapping | None,
    teachers: Sequence[str],
    levels: Sequence[int] | None,
) -> nn.ModuleDict:
    if config is None:
        return nn.ModuleDict()
    configs = (
        dict.fromkeys(teachers, config) if 'type' in config else dict(config)
    )
    for name in configs:
        check_name('MetaTeachersTerm', 'teacher in align', name, teachers)
    count = None if levels is None else len(levels)
    return nn.ModuleDict(
        {
            name: build(one, 'align', num_levels=count)
            for name, one in configs.items()
        }
    )


def _least(count: int, like: Tensor) -> int:
    """The least of all processes."""
    return _over_all(count, like, 'min')


def _most(count: int, like: Tensor) -> int:
    """The most of all processes."""
    return _over_all(count, like, 'max')


def _over_all(count: int, like: Tensor, how: str) -> int:
    if not is_distributed():
        return count
    found = torch.tensor(count, device=like.device)
    all_reduce(found, how)
    return int(found)

"""Recipes: a method's terms for one pair of detectors, by the method's name.

A method's published config speaks of one pair. Here the two detectors are
looked at once, by a forward pass on a small random image, and the method's
terms are written for the levels, strides and channels that are found. What
comes out is what a config would say: print it, edit it, commit it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import (
    CenterNetHead,
    GuidedAnchorHead,
    TOODHead,
    YOLOV3Head,
)
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmkd.checks import check_name
from mmkd.configs import student_config
from mmkd.distillers.distiller import CHECK_SIZES, example_sample
from mmkd.randomness import preserved
from mmkd.registry import DETECTORS
from mmkd.taps import Record, maps_of, recording
from mmkd.teachers import run_detector, without_init
from mmkd.terms.d3etr import CROSS, SELF, has_maps
from mmkd.terms.queries import DECODER, HEAD, asks, has_softmax
from mmkd.terms.query_matching import same_form

#: Heads whose first output is not a logit an anchor and class: probabilities,
#: boxes and classes in one map; or those that, when they are not trained, see
#: one image at a time and some of its cells.
NO_LOGITS = (CenterNetHead, GuidedAnchorHead, TOODHead, YOLOV3Head)

#: What a user gets who names no method.
DEFAULT = 'default'
#: The same, and the teacher's detections as labels where there are none.
DEFAULT_PREDICTED = 'default_predicted'
#: Parts whose weights ``default_predicted`` lets a student start from, where
#: alike.
STARTS = ('bbox_head', 'rpn_head', 'roi_head')
#: Where nothing is learnt but what the student starts from.
INHERIT = 'inherit'


@dataclass(frozen=True)
class Level:
    """Maps of one stride on both sides.

    Attributes:
        stride: Input pixels a cell.
        student, teacher: Positions in the two pyramids.
        channels: Of the student's map and of the teacher's.
        scores: Whether both heads give class scores of one shape here.
        resized: Whether the strides differ, the stated one being the
            teacher's, so that the student's map has to be resized.
    """

    stride: int
    student: int
    teacher: int
    channels: tuple[int, int]
    scores: bool
    resized: bool = False


@dataclass(frozen=True)
class Heads:
    """What two dense heads have in common.

    Attributes:
        classes: Class scores of an anchor.
        sigmoid: Whether each of them is a sigmoid, on both sides.
        bins: Of the distribution of a box's edge, if both have the same.
        convs: Convolutions of the shorter towers, 0 where there are none.
        widths: Channels of the student's towers and of the teacher's.
        strides: Whether the strides are the same.
    """

    classes: int
    sigmoid: bool
    bins: int | None
    convs: int
    widths: tuple[int, int]
    strides: bool


@dataclass(frozen=True)
class Queries:
    """What two decoders of queries have in common.

    Attributes:
        widths: Of the student's memory and of the teacher's.
        form: Whether one can be asked what the other was.
        maps: Attentions that have maps on both sides, of ``'self'`` and
            ``'cross'``.
        softmax: Whether both give a softmax over classes and background.
    """

    widths: tuple[int, int]
    form: bool
    maps: tuple[str, ...]
    softmax: bool = False

    def align(self) -> dict:
        """The argument of a term that makes the student's states as wide."""
        own, other = self.widths
        if own == other:
            return {}
        neck = dict(type='mmkd.ConvAdapt', in_channels=own, out_channels=other)
        return dict(align=neck)


@dataclass(frozen=True)
class Pair:
    """What two detectors have in common.

    Attributes:
        tap: Submodule whose maps are compared, ``'neck'`` or ``'backbone'``.
        levels: Levels of equal stride, the finest first.
        student: The student's plain ``model``.
        teacher: The teacher's name among the distiller's teachers.
        heads: What their dense heads share; None if one has none.
        asks: Whether both find objects by queries.
        queries: What their decoders share; None if one has none.
        comparable: Whether any class of the two is the same, or may be.
        alike: Parts besides the backbone that are the same detector's on both
            sides, so that the student can start from the teacher's weights.
    """

    tap: str
    levels: tuple[Level, ...]
    student: Mapping = field(repr=False)
    teacher: str = 'teacher'
    heads: Heads | None = None
    asks: bool = False
    queries: Queries | None = None
    comparable: bool = True
    alike: tuple[str, ...] = ()

    def term(self, loss: Mapping, adapt: bool = True, **more: Any) -> dict:
        """A feature term over all common levels.

        Args:
            loss: The loss's config.
            adapt: Whether the loss compares channel by channel, so that a
                convolution is needed where the two differ in number.
            **more: Further arguments of the term.
        """
        align = self.align()
        if align and not adapt:
            neck = dict(type='mmkd.ResizeAdapt')
            align = dict(align=neck) if self.resized else {}
        return dict(
            type='mmkd.FeatureTerm',
            teacher=self.teacher,
            tap=self.tap,
            **self.paired(),
            loss=dict(loss),
            **{**align, **more},
        )

    def paired(self) -> dict:
        """The argument of a term that says which levels are compared."""
        return dict(
            levels=tuple(level.student for level in self.levels),
            teacher_levels=tuple(level.teacher for level in self.levels),
        )

    def align(self) -> dict:
        """The argument of a term that makes the student's maps as wide.

        Empty where they are, and of the same size.
        """
        own, other = (
            [level.channels[side] for level in self.levels] for side in (0, 1)
        )
        if own == other and not self.resized:
            return {}
        neck = dict(type='mmkd.ConvAdapt', in_channels=own, out_channels=other)
        if self.resized:
            neck['resize'] = 'student'
        return dict(align=neck)

    @property
    def resized(self) -> bool:
        """Whether maps of unlike strides are compared."""
        return any(level.resized for level in self.levels)

    def scores(self, loss: Mapping, **more: Any) -> dict:
        """A term over the class scores of the two heads.

        Raises:
            ValueError: If the heads give scores of different shapes.
        """
        levels = [level for level in self.levels if level.scores]
        if not levels:
            raise ValueError(
                'The heads of student and teacher give no class scores of '
                'one shape (other anchors or classes, no logits, or a '
                'two-stage head). Choose a method on features, for instance '
                'pkd.'
            )
        return dict(
            type='mmkd.FeatureTerm',
            teacher=self.teacher,
            tap='bbox_head',
            output=0,
            levels=tuple(level.student for level in levels),
            teacher_levels=tuple(level.teacher for level in levels),
            loss=dict(loss),
            **more,
        )

    def classes(self, loss: str, **more: Any) -> dict:
        """A term over class scores whose loss knows the classes.

        Args:
            loss: Type of the loss.
            **more: Its arguments.
        """
        classes = None if self.heads is None else self.heads.classes
        return self.scores(dict(type=loss, num_classes=classes, **more))

    @property
    def activation(self) -> str:
        """How both heads turn scores into probabilities."""
        sigmoid = self.heads is None or self.heads.sigmoid
        return 'sigmoid' if sigmoid else 'softmax'

    @property
    def channels(self) -> int:
        """The teacher's channels, of a loss that takes one number.

        Raises:
            ValueError: If they differ from level to level.
        """
        found = {level.channels[1] for level in self.levels}
        if len(found) > 1:
            raise ValueError(
                f'This method needs one number of channels on every level, '
                f"the teacher's {self.tap} has {sorted(found)}. Choose "
                f'another method, for instance pkd.'
            )
        return found.pop()


def look(
    student: Config | Mapping,
    teacher: Config | Mapping,
    name: str = 'teacher',
) -> Pair:
    """Look at two detectors and pair their levels by stride.

    Where no stride stands on both sides, the two levels that are nearest in
    stride are paired, and the student's map is resized.

    Args:
        student: The student's config, plain or with teachers.
        teacher: The teacher's config.
        name: The teacher's name among the distiller's teachers.

    Returns:
        What they have in common.
    """
    init_default_scope('mmdet')
    models = [student_config(one['model']) for one in (student, teacher)]
    tap = 'neck' if all(one.get('neck') for one in models) else 'backbone'
    with preserved():
        detectors = [DETECTORS.build(without_init(one)) for one in models]
        for detector in detectors:
            detector.eval()  # of some detectors it returns nothing
        own, other = _shapes(detectors, tap)
    levels = []
    for index, (channels, stride, scores) in enumerate(own):
        match = [
            position
            for position, (_, their_stride, _) in enumerate(other)
            if their_stride == stride
        ]
        # A stride that stands twice (a pyramid's smallest maps on a small
        # image) is paired in order.
        match = [
            one for one in match if one not in {x.teacher for x in levels}
        ]
        if match:
            theirs = other[match[0]]
            levels.append(
                Level(
                    stride,
                    index,
                    match[0],
                    (channels, theirs[0]),
                    scores is not None and scores == theirs[2],
                )
            )
    if not levels:
        levels = [_nearest(own, other)]
    with preserved():
        queries = _queries(*detectors)
    return Pair(
        tap,
        tuple(levels),
        models[0],
        name,
        _heads(*detectors),
        asks=all(asks(one) for one in detectors),
        queries=queries,
        alike=_alike(models, detectors),
    )


def _alike(
    models: Sequence[Mapping], detectors: Sequence[nn.Module]
) -> tuple[str, ...]:
    """Parts of one form that mean the same, by their settings.

    Shapes alone do not tell: of other anchors, or of another order of outputs,
    a head's weights say something else.
    """
    own, other = models
    student, teacher = detectors
    theirs = dict(teacher.named_children())
    parts = [
        name
        for name, part in student.named_children()
        if name not in ('backbone', 'data_preprocessor')
        and name in theirs
        and _form(own.get(name)) == _form(other.get(name))
        and _shapes_of(part) == _shapes_of(theirs[name])
    ]
    parts += [
        name
        for name, one in student._parameters.items()
        if one is not None
        and name in teacher._parameters
        and one.shape == teacher._parameters[name].shape
    ]
    return tuple(parts)


def _form(config: Any) -> Any:
    """A part's settings without those that training alone reads."""
    if isinstance(config, Mapping):
        return {
            key: _form(value)
            for key, value in config.items()
            if not key.startswith('loss')
            and key not in ('init_cfg', 'train_cfg', 'test_cfg')
        }
    if isinstance(config, (list, tuple)):
        return [_form(one) for one in config]
    return config


def _shapes_of(part: nn.Module) -> dict[str, torch.Size]:
    return {key: one.shape for key, one in part.state_dict().items()}


def _queries(*detectors: nn.Module) -> Queries | None:
    if not all(asks(one) for one in detectors):
        return None
    for size in CHECK_SIZES:
        with suppress(RuntimeError, ValueError, IndexError):  # too small
            own, other = (_decoded(one, size) for one in detectors)
            break
    else:
        return None
    own_width, other_width = (
        one.inputs(DECODER)[1]['memory'].shape[-1] for one in (own, other)
    )
    return Queries(
        widths=(own_width, other_width),
        form=same_form(own, other),
        maps=tuple(
            kind.removesuffix('_attn')
            for kind in (SELF, CROSS)
            if all(has_maps(one, kind) for one in detectors)
        ),
        softmax=all(has_softmax(one) for one in detectors),
    )


def _decoded(detector: nn.Module, size: int) -> Record:
    images = torch.rand(1, 3, size, size)
    with torch.no_grad(), recording(detector, [DECODER], stop=True) as record:
        run_detector(detector, images, [example_sample(size)])
    return record


def _heads(*detectors: nn.Module) -> Heads | None:
    heads = [getattr(one, 'bbox_head', None) for one in detectors]
    if not all(hasattr(one, 'num_classes') for one in heads):
        return None
    bins = {getattr(one, 'reg_max', None) for one in heads}
    most = bins.pop() if len(bins) == 1 else None
    strides = [
        [tuple(x) for x in one.prior_generator.strides]
        if hasattr(one, 'prior_generator')
        else None
        for one in heads
    ]
    towers = [
        getattr(one, name, ())
        for one in heads
        for name in ('cls_convs', 'reg_convs')
    ]
    shared = all(
        isinstance(layer, ConvModule) for tower in towers for layer in tower
    )
    convs = min(map(len, towers)) if shared else 0
    return Heads(
        classes=getattr(heads[0], 'cls_out_channels', heads[0].num_classes),
        sigmoid=all(getattr(one, 'use_sigmoid_cls', True) for one in heads),
        bins=None if most is None else most + 1,
        convs=convs,
        widths=(
            (towers[0][0].out_channels, towers[2][0].out_channels)
            if convs
            else (0, 0)
        ),
        strides=strides[0] is not None and strides[0] == strides[1],
    )


#: Of a level: channels, stride, and shape of the class scores if there are.
Shape = tuple[int, int, tuple[int, ...] | None]


def _nearest(own: Sequence[Shape], other: Sequence[Shape]) -> Level:
    """The levels that are nearest in stride, the finest of several."""
    student, teacher = min(
        itertools.product(range(len(own)), range(len(other))),
        key=lambda pair: abs(math.log(own[pair[0]][1] / other[pair[1]][1])),
    )
    (channels, _, _), (theirs, stride, _) = own[student], other[teacher]
    return Level(
        stride, student, teacher, (channels, theirs), False, resized=True
    )


def _shapes(
    detectors: Sequence[nn.Module], tap: str
) -> tuple[list[Shape], list[Shape]]:
    """What each level of both detectors is, seen on one size of image."""
    for size in CHECK_SIZES[:-1]:
        try:
            own, other = (_seen(one, tap, size) for one in detectors)
        except (RuntimeError, ValueError, IndexError):  # too small for one
            continue
        return own, other
    own, other = (_seen(one, tap, CHECK_SIZES[-1]) for one in detectors)
    return own, other


def _seen(detector: nn.Module, tap: str, size: int) -> list[Shape]:
    images = torch.rand(1, 3, size, size)
    # What queries answer is no map, though it may have as many axes.
    dense = getattr(detector, HEAD, None) is not None and not asks(detector)
    paths = [tap, 'bbox_head'] if dense else [tap]
    with torch.no_grad(), recording(detector, paths, stop=True) as record:
        run_detector(detector, images, [example_sample(size)])
    maps = maps_of(record.at(tap), f'The tap {tap!r}')
    scores: tuple = (None,) * len(maps)
    if dense:
        try:
            found = maps_of(record.at('bbox_head'), 'The head', 0)
        except ValueError:  # a head of another kind
            found = ()
        head = detector.bbox_head
        if len(found) == len(maps) and not isinstance(head, NO_LOGITS):
            scores = tuple(tuple(one.shape) for one in found)
    strides = [round(size / one.shape[-1]) for one in maps]
    if dense and tap == 'neck':
        strides = _stated(detector.bbox_head, strides)
    return [
        (one.shape[1], stride, score)
        for one, stride, score in zip(maps, strides, scores)
    ]


def _stated(head: nn.Module, seen: list[int]) -> list[int]:
    """Strides that a head states, where it does; else those seen.

    A map of one or two cells does not tell: SSD's last strides are 100 and
    300 for one size of images, 128 and 256 for another.
    """
    stated = getattr(getattr(head, 'prior_generator', None), 'strides', ())
    if len(stated) != len(seen):
        return seen
    return [max(one) if isinstance(one, tuple) else one for one in stated]


# ------------------------------------------------------------------ methods

Terms = dict[str, dict]
Recipe = Callable[[Pair], Terms]
RECIPES: dict[str, Recipe] = {}
#: Their names by what they compare, as docs/methods.md groups methods; the
#: first of each that fits speaks for it. What is made of others is of none.
FAMILIES: dict[str, list[str]] = {}


def recipe(method: str, pair: Pair, share: float | None = None) -> Terms:
    """The terms of a method for a pair of detectors.

    Args:
        method: Its name, a key of :data:`RECIPES`.
        pair: What :func:`look` found.
        share: Weigh the method by its gradient, see
            :class:`mmkd.terms.balanced.BalancedTerm`; None keeps the
            published weights, which were chosen for COCO at 800 pixels, 256
            channels and one pair.

    Returns:
        Configs of the terms by name, as a config's ``terms``.

    Raises:
        ValueError: If there is no such method, or it does not fit the pair.
    """
    check_name('mmkd.recipes', 'method', method, RECIPES)
    terms = RECIPES[method](pair)
    balanced = any(
        one['type'] == 'mmkd.BalancedTerm' for one in terms.values()
    )
    if share is None or balanced or method == INHERIT:
        return terms
    return {
        'balanced': dict(type='mmkd.BalancedTerm', terms=terms, share=share)
    }


def inherits(method: str, pair: Pair) -> bool | tuple[str, ...]:
    """Which parts a recipe lets the student start from, as a teacher's
    ``inherit``.

    Args:
        method: Its name.
        pair: What :func:`look` found.
    """
    if method == INHERIT:
        return pair.alike or True  # which says what differs
    few = method == DEFAULT_PREDICTED
    if few and pair.comparable and not pair.asks:
        return tuple(one for one in pair.alike if one in STARTS) or False
    return False


def _method(family: str = '') -> Callable[[Recipe], Recipe]:
    """Enters a recipe by its name and, if it is of one, in its family."""

    def enter(write: Recipe) -> Recipe:
        RECIPES[write.__name__] = write
        if family:
            FAMILIES.setdefault(family, []).append(write.__name__)
        return write

    return enter


@_method('feature')
def pkd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.PKDLoss', loss_weight=10.0)
    return dict(pkd=pair.term(loss))


@_method('feature')
def mimic(pair: Pair) -> Terms:
    return dict(mimic=pair.term(dict(type='mmkd.MimicLoss', loss_weight=2.0)))


@_method('feature')
def at(pair: Pair) -> Terms:
    return dict(at=pair.term(dict(type='mmkd.ATLoss'), adapt=False))


@_method('feature')
def cwd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.CWDLoss', loss_weight=10.0)
    return dict(cwd=pair.term(loss))


@_method('feature')
def ssim(pair: Pair) -> Terms:
    return dict(ssim=pair.term(dict(type='mmkd.SSIMLoss', loss_weight=4.0)))


@_method('feature')
def reviewkd(pair: Pair) -> Terms:
    loss = dict(
        type='mmkd.ReviewKDLoss',
        in_channels=tuple(level.channels[0] for level in pair.levels),
        mid_channels=max(level.channels[1] for level in pair.levels),
        out_channels=tuple(level.channels[1] for level in pair.levels),
    )
    return dict(reviewkd=pair.term(loss, adapt=False))


@_method('feature')
def freekd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.FreeKDLoss', channels=pair.channels)
    feature = pair.term(dict(type='mmkd.MimicLoss', loss_weight=5.0))
    return dict(freekd=_learned('freekd', pair, loss), feature=feature)


@_method('focal region')
def fgd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.FGDLoss', channels=pair.channels)
    return dict(fgd=pair.term(loss))


@_method('focal region')
def fgd_focal(pair: Pair) -> Terms:
    return dict(fgd_focal=pair.term(dict(type='mmkd.FGDFocalLoss')))


@_method('focal region')
def defeat(pair: Pair) -> Terms:
    return dict(defeat=pair.term(dict(type='mmkd.DeFeatLoss')))


@_method('focal region')
def fgfi(pair: Pair) -> Terms:
    head = pair.student.get('rpn_head') or pair.student.get('bbox_head') or {}
    kind = str(head.get('anchor_generator', {}).get('type', 'Point'))
    if 'Point' in kind:
        raise ValueError(
            f'fgfi imitates near anchors, but {pair.student["type"]} has '
            f'none. Choose a method without, for instance fgd.'
        )
    loss = dict(
        type='mmkd.FGFILoss', anchor_generator=dict(head['anchor_generator'])
    )
    return dict(fgfi=pair.term(loss))


@_method('focal region')
def fbkd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.FBKDLoss', channels=pair.channels)
    return dict(fbkd=pair.term(loss))


@_method('focal region')
def frs(pair: Pair) -> Terms:
    """Features and class scores, as the teacher scores each cell."""
    feature = pair.term(
        dict(type='mmkd.WeightedMSELoss', loss_weight=1.28),
        weight=dict(type='mmkd.ScoreWeight'),
    )
    scores = pair.classes('mmkd.SoftTargetLoss', loss_weight=0.02)
    return dict(feature=feature, scores=scores)


@_method('focal region')
def maskd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.MasKDLoss', channels=pair.channels, loss_weight=7.0)
    return dict(maskd=_learned('maskd', pair, loss))


def _learned(method: str, pair: Pair, loss: Mapping) -> dict:
    if pair.tap != 'neck':
        raise ValueError(
            f"{method} learns its masks by the loss of the teacher's heads on "
            f"its neck's maps, but one of the two has no neck. Choose another "
            f'method, for instance pkd.'
        )
    return dict(
        type='mmkd.LearnedMaskTerm',
        teacher=pair.teacher,
        **pair.paired(),
        loss=dict(loss),
        **pair.align(),
    )


@_method('focal region')
def pgd(pair: Pair) -> Terms:
    heads = pair.heads
    alike = pair.levels and all(level.scores for level in pair.levels)
    if heads is None or not (heads.convs and heads.sigmoid and alike):
        raise ValueError(
            'pgd compares the first convolutions of towers cls_convs and '
            'reg_convs, where the teacher predicts best, which needs dense '
            'heads of the same strides, anchors and classes with a sigmoid '
            'each. Choose a method on features, for instance fgd.'
        )
    own, other = heads.widths
    align = {}
    if own != other:
        align['align'] = dict(
            type='mmkd.ConvAdapt', in_channels=own, out_channels=other
        )
    published = dict(
        cls=(
            0.8,
            dict(
                type='mmkd.PGDClassLoss',
                foreground_weight=0.04,
                background_weight=0.02,
                attention_weight=8e-4,
            ),
        ),
        reg=(
            0.6,
            dict(
                type='mmkd.PGDBoxLoss',
                foreground_weight=0.064,
                attention_weight=8e-4,
            ),
        ),
    )
    return {
        tower: dict(
            type='mmkd.FeatureTerm',
            teacher=pair.teacher,
            tap=f'bbox_head.{tower}_convs.0',
            **pair.paired(),
            weight=dict(type='mmkd.QualityWeight', iou_power=power),
            loss=loss,
            **align,
        )
        for tower, (power, loss) in published.items()
    }


@_method('generation')
def mgd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.MGDLoss', channels=pair.channels)
    return dict(mgd=pair.term(loss))


@_method('generation')
def amd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.AMDLoss', channels=pair.channels)
    return dict(amd=pair.term(loss))


@_method('generation')
def dmkd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.DMKDLoss', channels=pair.channels)
    return dict(dmkd=pair.term(loss))


@_method('relational')
def affinity(pair: Pair) -> Terms:
    loss = dict(type='mmkd.AffinityLoss')
    return dict(affinity=pair.term(loss, adapt=False))


@_method('relational')
def rkd(pair: Pair) -> Terms:
    return dict(rkd=pair.term(dict(type='mmkd.RKDLoss'), adapt=False))


@_method('relational')
def sp(pair: Pair) -> Terms:
    return dict(sp=pair.term(dict(type='mmkd.SPLoss'), adapt=False))


@_method('relational')
def cckd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.CCKDLoss', loss_weight=10.0)
    return dict(cckd=pair.term(loss, adapt=False))


@_method('relational')
def fgd_global(pair: Pair) -> Terms:
    loss = dict(type='mmkd.FGDGlobalLoss', channels=pair.channels)
    return dict(fgd_global=pair.term(loss))


@_method('response')
def cwd_scores(pair: Pair) -> Terms:
    loss = dict(type='mmkd.CWDLoss', loss_weight=5.0)
    return dict(cwd_scores=pair.scores(loss))


@_method('response')
def soft_target(pair: Pair) -> Terms:
    term = pair.classes('mmkd.SoftTargetLoss', activation=pair.activation)
    return dict(soft_target=term)


@_method('response')
def dist(pair: Pair) -> Terms:
    term = pair.classes('mmkd.DISTLoss', activation=pair.activation)
    return dict(dist=term)


@_method('response')
def dkd(pair: Pair) -> Terms:
    return dict(dkd=pair.classes('mmkd.DKDLoss'))


@_method('response')
def nkd(pair: Pair) -> Terms:
    return dict(nkd=pair.classes('mmkd.NKDLoss'))


@_method('response')
def bckd(pair: Pair) -> Terms:
    boxes = dict(type='mmkd.BoxTerm', teacher=pair.teacher, loss_weight=4.0)
    return dict(bckd=pair.classes('mmkd.BCKDClassLoss'), box=boxes)


@_method('response')
def ld(pair: Pair) -> Terms:
    if pair.heads is None or pair.heads.bins is None:
        raise ValueError(
            'ld compares the distributions of box edges, which not both heads '
            'have, or not with the same reg_max. Choose another method, for '
            'instance crosskd.'
        )
    term = pair.scores(
        dict(type='mmkd.LDLoss'), weight=dict(type='mmkd.PositiveWeight')
    )
    return dict(ld=dict(term, output=1))


@_method('response')
def crosskd(pair: Pair) -> Terms:
    if pair.queries is not None:
        term = dict(type='mmkd.CrossQueryTerm', teacher=pair.teacher)
        return dict(cross=dict(term, **pair.queries.align()))
    if pair.heads is None or pair.heads.convs < 1 or not pair.heads.strides:
        raise ValueError(
            "crosskd runs the student's head through the teacher's, which "
            'needs dense heads of the same strides with towers cls_convs and '
            'reg_convs. Choose a method on features, for instance pkd.'
        )
    term = dict(
        type='mmkd.CrossHeadTerm',
        teacher=pair.teacher,
        convs=max(pair.heads.convs - 1, 1),
    )
    own, other = pair.heads.widths
    if own != other:
        term['align'] = dict(
            type='mmkd.ConvAdapt',
            in_channels=own,
            out_channels=other,
            num_levels=len(pair.levels),
        )
    return dict(cross=term)


@_method('response')
def proposal(pair: Pair) -> Terms:
    if 'roi_head' not in pair.student:
        raise ValueError(
            f'proposal compares second stages, but {pair.student["type"]} '
            f'has none. Choose a method of one stage, for instance bckd.'
        )
    term = dict(
        type='mmkd.ProposalTerm',
        teacher=pair.teacher,
        positive_weight=2.0,
        negative_weight=2.0,
    )
    return dict(proposal=term)


@_method('response')
def predicted(pair: Pair) -> Terms:
    """For any pair: what the teacher detects is learnt as if annotated."""
    term = dict(type='mmkd.PredictedBoxTerm', teacher=pair.teacher)
    return dict(predicted=term)


@_method('instance')
def icd(pair: Pair) -> Terms:
    own = {level.channels[0] for level in pair.levels}
    if len(own) > 1:
        raise ValueError(
            f'icd projects the maps of all levels by one layer, but the '
            f"student's have {sorted(own)} channels. Choose another method, "
            f'for instance pkd.'
        )
    heads = 8
    term = dict(
        type='mmkd.InstanceConditionalTerm',
        teacher=pair.teacher,
        tap=pair.tap,
        num_classes=_classes(pair.student),
        channels=pair.channels,
        in_channels=own.pop(),
        dim=-(-pair.channels // heads) * heads,
        heads=heads,
        **pair.paired(),
        loss_weight=3.0 if 'roi_head' in pair.student else 8.0,
        limit=100 if 'roi_head' in pair.student else 300,
    )
    return dict(icd=term)


def _classes(model: Mapping) -> int:
    """Classes that a student tells apart, by its config."""
    parts = model.get('roi_head', model)
    head = parts.get('bbox_head') or parts.get('mask_head') or {}
    head = head[0] if isinstance(head, (list, tuple)) else head
    if 'num_classes' not in head:
        raise ValueError(
            f'icd asks the teacher for objects by their classes, but '
            f'{model["type"]} tells none apart. Choose another method, for '
            f'instance pkd.'
        )
    return head['num_classes']


@_method('instance')
def gid(pair: Pair) -> Terms:
    alike = pair.levels and all(level.scores for level in pair.levels)
    heads = pair.heads
    if heads is None or not (heads.sigmoid and heads.strides and alike):
        raise ValueError(
            'gid compares predictions anchor by anchor, which needs dense '
            'heads of the same strides, anchors and classes with a sigmoid '
            'each. Choose a method on features, for instance pkd.'
        )
    term = dict(type='mmkd.InstanceTerm', teacher=pair.teacher, **pair.align())
    return dict(gid=term)


@_method('query')
def detrdistill(pair: Pair) -> Terms:
    queries = _both_ask('detrdistill', pair)
    term = dict(
        type='mmkd.DETRDistillTerm',
        teacher=pair.teacher,
        channels=queries.widths,
    )
    if not queries.form:
        term['prior_weight'] = 0.0
    return dict(detrdistill=term)


@_method('query')
def d3etr(pair: Pair) -> Terms:
    queries = _both_ask('d3etr', pair)
    term = dict(type='mmkd.D3ETRTerm', teacher=pair.teacher)
    if not queries.form:
        term['fixed_weight'] = 0.0
    for kind in ('self', 'cross'):
        if kind not in queries.maps:
            term[f'{kind}_weight'] = 0.0
    return dict(d3etr=term)


def _both_ask(method: str, pair: Pair) -> Queries:
    if pair.queries is None:
        raise ValueError(
            f'{method} compares decoders of queries, as DETR, Deformable DETR '
            f'and DINO have them, which not both detectors have. Choose a '
            f'method on features, for instance pkd.'
        )
    return pair.queries


@_method('query')
def kd_detr(pair: Pair) -> Terms:
    _both_ask('kd_detr', pair)
    term = dict(type='mmkd.SharedQueryTerm', teacher=pair.teacher)
    return dict(kd_detr=term)


@_method('query')
def clock(pair: Pair) -> Terms:
    _both_ask('clock', pair)
    term = dict(
        type='mmkd.CLoCKTerm',
        teacher=pair.teacher,
        **pair.paired(),
        **pair.align(),
    )
    if not pair.comparable:
        term.update(cls_weight=0.0, l1_weight=0.0, giou_weight=0.0)
    return dict(clock=term)


@_method('query')
def mhkd(pair: Pair) -> Terms:
    _both_ask('mhkd', pair)
    return dict(
        mhkd=dict(type='mmkd.MultiHeadQueryTerm', teacher=pair.teacher)
    )


@_method('query')
def alp(pair: Pair) -> Terms:
    queries = _both_ask('alp', pair)
    own, other = queries.widths
    term = dict(
        type='mmkd.ALPQueryTerm',
        teacher=pair.teacher,
        pair='questions' if queries.form else 'objects',
        channels=None if own == other else queries.widths,
        loss_weight=5.0,
    )
    return dict(alp=term)


@_method('query')
def lsh(pair: Pair) -> Terms:
    queries = _both_ask('lsh', pair)
    loss = dict(
        type='mmkd.LSHLoss',
        channels=queries.widths[1],
        mode='lshl2',
        hash_num=4 * queries.widths[1],
        bias='zero',
        unfold=1,
        loss_weight=7.0,
    )
    return dict(lsh=_states(pair, loss, **queries.align()))


@_method('query')
def dlkd(pair: Pair) -> Terms:
    own, other = _both_ask('dlkd', pair).widths
    loss = dict(
        type='mmkd.DLKDLoss',
        student_channels=own,
        teacher_channels=other,
        loss_weight=0.05,
    )
    return dict(dlkd=_states(pair, loss))


@_method('query')
def cmkd(pair: Pair) -> Terms:
    loss = dict(type='mmkd.CMKDLoss', loss_weight=2.0)
    if _both_ask('cmkd', pair).softmax:
        loss['activation'] = 'softmax'
    term = _states(pair, loss, compare='logits', pairing='answers')
    return dict(cmkd=term)


def _states(pair: Pair, loss: Mapping, **more: Any) -> dict:
    """A term over the queries of the last layers."""
    return dict(
        type='mmkd.QueryFeatureTerm',
        teacher=pair.teacher,
        loss=dict(loss),
        **more,
    )


@_method('query')
def mlkd_bert(pair: Pair) -> Terms:
    """The stage of samples; that of layers is a phase of a config's own."""
    own, other = _both_ask('mlkd_bert', pair).widths
    term = dict(
        type='mmkd.MLKDBertQuerySamplesTerm',
        teacher=pair.teacher,
        student_channels=own,
        teacher_channels=other,
    )
    return dict(mlkd_bert=term)


@_method('query')
def backward_pass(pair: Pair) -> Terms:
    _both_ask('backward_pass', pair)
    term = dict(
        type='mmkd.BackwardQueryTerm', teacher=pair.teacher, interval=4
    )
    return dict(backward_pass=term)


@_method()
def inherit(pair: Pair) -> Terms:
    """The teacher's neck and head to start from, and nothing to learn."""
    loss = dict(type='mmkd.MimicLoss', loss_weight=0.0)
    return dict(nothing=pair.term(loss))


@_method()
def default(pair: Pair) -> Terms:
    """A feature and, where heads or queries can be compared, a response term,
    weighed by gradient.
    """
    terms = pkd(pair)
    share = dict(pkd=1.0)
    if any(level.scores for level in pair.levels):
        terms |= cwd_scores(pair)
        share |= dict(cwd_scores=0.5)
    elif pair.queries is not None and pair.comparable:
        (answers,) = detrdistill(pair).values()
        answers |= dict(channels=None, feature_weight=0.0, prior_weight=0.0)
        terms |= dict(answers=answers)
        share |= dict(answers=0.5)
    return dict(
        default=dict(type='mmkd.BalancedTerm', terms=terms, share=share)
    )


@_method()
def default_predicted(pair: Pair) -> Terms:
    """For images without labels: the default, and the teacher's detections.

    Answers of queries are left out, whose first axis is no batch's, so that
    those of labelled and of other images could not be joined.
    """
    (term,) = predicted(pair).values()
    terms = default(replace(pair, queries=None))
    return terms | dict(predicted=dict(term, where='unlabelled'))

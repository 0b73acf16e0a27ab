"""Every family of detectors learns, by every recipe that fits it."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import families
import heads
import numpy as np
import pytest
import rotation
import tiny
import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper

from mmkd.distillers.distiller import example_sample
from mmkd.losses.pkd import pkd_loss
from mmkd.recipes import FAMILIES, RECIPES, look, recipe
from mmkd.schedules import Constant
from mmkd.structures.nested import leaves
from mmkd.taps import maps_of, recording
from mmkd.teachers import run_detector

# What a recipe needs; a pair that lacks it is refused.
SCORES = frozenset(
    [
        'cwd_scores',
        'soft_target',
        'dist',
        'dkd',
        'nkd',
        'bckd',
        'frs',
        'ld',
        'gid',
        'pgd',
    ]
)
SIGMOID = frozenset(('frs', 'bckd', 'gid'))
BOXES = frozenset(('bckd', 'gid'))
#: Not where labels depend on predictions.
GUESSES = frozenset(['gid'])
BINS = frozenset(['ld'])
TOWERS = frozenset(('crosskd', 'pgd'))
ANCHORS = frozenset(['fgfi'])
STAGES = frozenset(['proposal'])
ONE_WIDTH = frozenset(
    [
        *('mgd', 'fgd', 'fgd_global', 'fbkd', 'amd', 'dmkd', 'maskd'),
        *('freekd', 'icd'),
    ]
)
NECK = frozenset(('maskd', 'freekd'))
#: The teacher's own loss is asked with the student's labels.
LABELS = frozenset(('maskd', 'freekd'))
#: Those of queries have tests of their own.
METHODS = [name for name in RECIPES if name not in FAMILIES['query']]
#: The student is trained on what the teacher detects.
DETECTS = frozenset(['predicted', 'default_predicted'])

#: What no dense head has, unless it predicts distributions.
DENSE = BINS | STAGES
#: What no two-stage detector has.
TWO_STAGES = SCORES | TOWERS

#: Cells up to which a map may tell a recipe nothing, where that is not 1:
#: affinity compares patches of 4 by 4, others look at objects alone.
SIGHT = dict(
    affinity=16,
    **dict.fromkeys(('ld', 'gid', 'proposal', 'predicted'), 10**6),
)


@dataclass(frozen=True)
class Row:
    """A student, its teacher, and what does not fit them.

    Attributes:
        student, teacher: Make the models' configs.
        lacks: Recipes that are refused with a ValueError that names a way
            out.
        masks: Whether the samples hold masks.
        predicts: Whether mmdet's own prediction works.
        levels: Maps that are paired, of the student and of the teacher.
    """

    student: Callable[[], dict]
    teacher: Callable[[], dict]
    lacks: frozenset[str] = frozenset()
    masks: bool = False
    predicts: bool = True
    levels: tuple[tuple[int, ...], tuple[int, ...]] = ((0, 1, 2, 3, 4),) * 2


def alike(make: Callable, **more) -> Row:
    """A student and a teacher of one family, the latter twice as wide."""
    return Row(make, partial(make, base=2 * tiny.BASE), **more)


THREE, ONE = ((0, 1, 2),) * 2, ((0,),) * 2

ROWS = dict(
    retinanet=alike(partial(heads.retinanet, convs=2), lacks=DENSE),
    fcos=alike(partial(heads.fcos, convs=2), lacks=DENSE | ANCHORS),
    atss=alike(partial(heads.atss, convs=2), lacks=DENSE),
    gfl=alike(partial(heads.gfl, convs=2), lacks=STAGES),
    paa=alike(families.paa, lacks=DENSE | GUESSES),
    ddod=alike(
        families.ddod,
        lacks=DENSE | {'crosskd', 'bckd'} | GUESSES,
    ),
    reppoints=alike(
        families.reppoints, lacks=DENSE | ANCHORS | TOWERS | BOXES
    ),
    tood=alike(families.tood, lacks=TWO_STAGES | STAGES),
    centernet=alike(
        families.centernet, lacks=TWO_STAGES | STAGES | ANCHORS, levels=ONE
    ),
    centernet_update=alike(
        families.centernet_update,
        lacks=DENSE | ANCHORS | {'crosskd'} | BOXES,
    ),
    yolox=alike(
        families.yolox,
        lacks=DENSE | ANCHORS | TOWERS | BOXES,
        levels=THREE,
    ),
    rtmdet=alike(
        families.rtmdet,
        lacks=DENSE | TOWERS | ANCHORS | GUESSES,
        levels=THREE,
    ),
    yolov3=alike(
        families.yolov3, lacks=TWO_STAGES | STAGES | ONE_WIDTH, levels=THREE
    ),
    ssd=alike(
        families.ssd,
        lacks=DENSE | TOWERS | SIGMOID | ONE_WIDTH | DETECTS,
        levels=((0, 1, 2, 3),) * 2,
        predicts=False,
    ),
    faster_rcnn_c4=alike(
        families.faster_rcnn_c4, lacks=TWO_STAGES | NECK, levels=ONE
    ),
    faster_rcnn=alike(tiny.faster_rcnn, lacks=TWO_STAGES),
    cascade_rcnn=alike(families.cascade_rcnn, lacks=TWO_STAGES),
    mask_rcnn=alike(families.mask_rcnn, lacks=TWO_STAGES, masks=True),
    cascade_mask_rcnn=alike(
        families.cascade_mask_rcnn, lacks=TWO_STAGES, masks=True
    ),
    condinst=alike(families.condinst, lacks=DENSE | ANCHORS, masks=True),
    solo=alike(
        families.solo,
        lacks=TWO_STAGES | ANCHORS | STAGES | DETECTS,
        masks=True,
    ),
    solov2=alike(
        families.solov2,
        lacks=TWO_STAGES | ANCHORS | STAGES | DETECTS,
        masks=True,
    ),
    # Unlike pairs.
    retinanet_from_faster_rcnn=Row(
        tiny.retinanet,
        tiny.faster_rcnn,
        lacks=TWO_STAGES | STAGES,
        levels=((0, 1, 2, 3), (1, 2, 3, 4)),
    ),
    faster_rcnn_from_retinanet=Row(
        tiny.faster_rcnn,
        tiny.retinanet,
        lacks=TWO_STAGES | STAGES,
        levels=((1, 2, 3, 4), (0, 1, 2, 3)),
    ),
    resnet_from_swin=Row(tiny.retinanet, families.swin_retinanet, lacks=DENSE),
    fcos_from_gfl=Row(
        partial(heads.fcos, convs=2),
        partial(heads.gfl, convs=2, base=16),
        lacks=DENSE | ANCHORS,
    ),
    other_channels=Row(
        tiny.retinanet, partial(tiny.retinanet, channels=24), lacks=DENSE
    ),
    other_pixels=Row(
        tiny.retinanet,
        partial(tiny.retinanet, base=16, pixels=families.PIXELS),
        lacks=DENSE,
    ),
    more_classes=Row(
        tiny.retinanet,
        partial(tiny.retinanet, classes=5),
        lacks=SCORES | STAGES | LABELS | DETECTS,
    ),
    yolox_from_retinanet=Row(
        families.yolox,
        tiny.retinanet,
        lacks=DENSE | TOWERS | ANCHORS | BOXES,
        levels=THREE,
    ),
)


# A step of all recipes at once -----------------------------------------------


@dataclass
class Tried:
    """A distilled student and its first losses, beside the student alone.

    Attributes:
        row: What was built.
        file: The teacher's checkpoint.
        plain, student: Alone, and distilled by all recipes that fit.
        refused: Errors of those that do not.
        state: Of the student before its first step.
        inputs: What both were shown.
        own, losses: First losses of either.
        buffers, streams: Running statistics of either afterwards, and where
            the random numbers went on.
        maps: The student's maps that are paired.
        gradients: Of each recipe alone, to the backbone's first convolution,
            to the maps and to its own weights.
    """

    row: Row
    file: Path
    plain: torch.nn.Module
    student: torch.nn.Module
    refused: dict[str, Exception]
    state: dict
    inputs: dict
    own: dict
    losses: dict
    buffers: list[dict]
    streams: list[torch.Tensor]
    maps: list[torch.Tensor]
    gradients: dict[str, tuple]

    def restart(self) -> None:
        self.student.load_state_dict(self.state)
        for detector in (self.plain, self.student):
            detector.zero_grad()
            detector.train()
        own = {key: self.state[key] for key in self.plain.state_dict()}
        self.plain.load_state_dict(own)

    def parts(self, method: str) -> dict[str, torch.Tensor]:
        return parts_of(self.losses, method)


def parts_of(losses: dict, method: str) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in losses.items()
        if name.startswith(f'loss_kd_{method}__')
    }


@pytest.fixture(scope='module', autouse=True)
def training():
    """What PAA takes from scikit-learn."""
    from mmdet.models.dense_heads import paa_head

    torch.set_num_threads(1)  # before the first test
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            paa_head, 'skm', SimpleNamespace(GaussianMixture=families.Mixture)
        )
        yield


def begin(hub):
    """Heads ask how far the training is."""
    for key in ('iter', 'epoch'):
        hub.update_info(key, 0)


@pytest.fixture(autouse=True)
def hub(hub):
    begin(hub)
    return hub


TURNS = rotation.marks([Path(name) for name in ROWS], count=14)


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(
            name,
            marks=(
                pytest.mark.xdist_group(name),
                *TURNS[Path(name)],
            ),
        )
        for name in ROWS
    ],
)
def tried(request, tmp_path_factory):
    begin(MessageHub.get_current_instance())  # before any test's own
    row = ROWS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return attempt(row, folder, METHODS)


def attempt(row: Row, folder: Path, methods: Iterable[str]) -> Tried:
    """Distil by all recipes that are not refused, and take the first loss."""
    file = save_teacher(row, folder / 'teacher.pth')
    student, refused = distil(row, file, methods)
    plain = tiny.build(row.student())
    for detector in (plain, student):
        seeded()
        detector.init_weights()
    state = copy.deepcopy(student.state_dict())
    batch(plain, row)  # YOLOX resizes from the second on
    inputs = batch(plain, row)
    own = losses_of(plain, inputs)
    streams = [torch.get_rng_state()]
    tap = 'neck' if hasattr(plain, 'neck') else 'backbone'
    with recording(student, [tap]) as record:
        losses = losses_of(student, inputs)
    streams.append(torch.get_rng_state())
    maps = [record.at(tap)[level] for level in row.levels[0]]
    stem = next(one for one in student.backbone.parameters() if one.ndim == 4)
    gradients = {}
    for method in methods:
        share = sum(parts_of(losses, method).values())
        if getattr(share, 'requires_grad', False):
            weights = [
                one
                for name, one in student.terms.named_parameters()
                if name.startswith(f'{method}__')
            ]
            gradients[method] = torch.autograd.grad(
                share,
                [stem, *maps, *weights],
                retain_graph=True,
                allow_unused=True,
            )
    return Tried(
        row,
        file,
        plain,
        student,
        refused,
        state,
        inputs,
        own,
        detached(losses),
        [
            {k: v.clone() for k, v in x.named_buffers()}
            for x in (plain, student)
        ],
        streams,
        [one.detach() for one in maps],
        gradients,
    )


def distil(
    row: Row, file: Path, methods: Iterable[str]
) -> tuple[torch.nn.Module, dict[str, Exception]]:
    """The student of all recipes that fit, and the errors of the others."""
    teacher = dict(config=dict(model=row.teacher()), checkpoint=str(file))
    pair = look(dict(model=row.student()), teacher['config'])
    written, refused = {}, {}
    for method in methods:
        try:
            written[method] = recipe(method, pair)
        except ValueError as error:
            refused[method] = error

    def build(methods: Iterable[str]) -> torch.nn.Module:
        terms = {
            f'{method}__{name}': term
            for method in methods
            for name, term in written[method].items()
        }
        model = tiny.distilled(row.student(), dict(teacher=teacher), terms)
        return tiny.build(copy.deepcopy(model))

    for method in sorted(written.keys() & row.lacks):
        try:
            build([method])
        except ValueError as error:
            refused[method] = error
    return build(one for one in written if one not in refused), refused


def save_teacher(row: Row, path: Path) -> Path:
    """Random weights whose BatchNorm has seen pictures."""
    tiny.save_teacher(row.teacher(), path)
    teacher = tiny.build(row.teacher())
    teacher.load_state_dict(torch.load(path)['state_dict'])
    for one in teacher.modules():
        if isinstance(one, torch.nn.BatchNorm2d):
            one.momentum = 0.5  # a channel may be the same everywhere
    with torch.no_grad():
        teacher.train().extract_feat(batch(teacher, row, seed=8)['inputs'])
    torch.save(dict(state_dict=teacher.state_dict()), path)
    return path


def batch(detector, row: Row, **settings) -> dict:
    seeded()
    raw = families.batch(masks=row.masks, **settings)
    return detector.data_preprocessor(raw, training=True)


def losses_of(detector, inputs: dict) -> dict:
    seeded()
    inputs = copy.deepcopy(inputs)  # two-stage heads write into samples
    return detector.loss(inputs['inputs'], inputs['data_samples'])


def seeded() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def detached(losses: dict) -> dict[str, torch.Tensor]:
    """Losses a number each, those of several levels summed."""
    return {
        name: sum(value).detach()
        if isinstance(value, (list, tuple))
        else value.detach()
        for name, value in losses.items()
    }


def optimiser(detector) -> OptimWrapper:
    sgd = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9)
    return OptimWrapper(sgd, clip_grad=dict(max_norm=1.0))


def identical(one: dict, other: dict) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def own_part(state: dict) -> dict:
    return {k: v for k, v in state.items() if not k.startswith('terms.')}


# What a term says ------------------------------------------------------------

WAY_OUT = re.compile('Choose|Use|Set|Add|Take|Write|Leave')


@pytest.mark.parametrize('method', METHODS)
def test_a_recipe_teaches_every_level_or_says_what_else_to_do(tried, method):
    assert (method in tried.refused) == (method in tried.row.lacks), (
        tried.refused.get(method)
    )
    if method in tried.refused:
        assert WAY_OUT.search(str(tried.refused[method]))
        return
    parts = tried.parts(method)
    assert parts
    if method == 'inherit':
        assert sum(parts.values()) == 0
        return
    if method == 'default_predicted':  # every image here has labels
        assert parts.pop('loss_kd_default_predicted__predicted_task') == 0
    assert all(one.isfinite() for one in parts.values())
    assert all(one > 0 for one in parts.values()), parts
    gradients = tried.gradients[method]
    assert all(one.isfinite().all() for one in gradients if one is not None)
    stem, *maps = gradients[: 1 + len(tried.maps)]
    assert stem.abs().sum() > 0
    assert [
        level
        for level, (gradient, one) in enumerate(zip(maps, tried.maps))
        if one[0, 0].numel() > SIGHT.get(method, 1)
        and not (gradient is not None and gradient.abs().sum() > 0)
    ] == []


LOGITS = [name for name, row in ROWS.items() if 'dist' not in row.lacks]


@pytest.mark.parametrize('name', LOGITS)
def test_scores_that_are_compared_are_logits_of_classes(name):
    """One channel an anchor and class; an untrained head says no to all."""
    row = ROWS[name]
    pair = look(dict(model=row.student()), dict(model=row.teacher()))
    detector = tiny.build(row.student())
    seeded()
    detector.init_weights()
    detector.eval()
    compared = [level for level in pair.levels if level.scores]
    with torch.no_grad(), recording(detector, ['bbox_head']) as record:
        run_detector(detector, torch.rand(1, 3, 64, 64), [example_sample(64)])
    head = detector.bbox_head
    anchors = getattr(head, 'num_base_priors', 1)
    for level in compared:
        scores = maps_of(record.at('bbox_head'), '', 0)[level.student]
        count = (
            anchors[level.student] if isinstance(anchors, list) else anchors
        )
        assert scores.shape[1] == count * pair.heads.classes
        assert scores.min() < 0


def test_the_teachers_maps_are_those_of_the_detector_alone(tried):
    """PKD by its formula, the teacher run as if nobody distilled from it."""
    tried.restart()
    row, term = tried.row, tried.student.terms['pkd__pkd']
    teacher = tiny.build(row.teacher(), seed=99)
    teacher.load_state_dict(torch.load(tried.file)['state_dict'])
    images = tried.inputs['inputs']
    processor = row.teacher()['data_preprocessor']
    if processor == families.PIXELS:
        images = batch(teacher, row)['inputs']
    elif processor != row.student()['data_preprocessor']:
        images = normalised(tried.inputs)
    with torch.no_grad():
        found = teacher.eval().extract_feat(images)
        theirs = [found[level] for level in row.levels[1]]
        theirs = [
            one[..., : like.shape[-2], : like.shape[-1]]
            for one, like in zip(theirs, tried.maps)
        ]
        ours = tried.maps
        if term.align is not None:
            ours = term.align(tuple(ours), tuple(theirs))
        expected = 10 * sum(map(pkd_loss, ours, theirs))
    torch.testing.assert_close(
        tried.losses['loss_kd_pkd__pkd'], expected, rtol=1e-4, atol=1e-5
    )


def normalised(inputs: dict) -> torch.Tensor:
    """A batch of bytes, BGR, as ``tiny.PIXELS`` has it."""
    mean, std = (
        torch.tensor(tiny.PIXELS[key])[:, None, None]
        for key in ('mean', 'std')
    )
    images = (inputs['inputs'].flip(1) - mean) / std
    for image, sample in zip(images, inputs['data_samples']):
        height, width = sample.img_shape
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images


# What stays as it was --------------------------------------------------------


def test_a_first_loss_leaves_what_the_student_alone_would_leave(tried):
    """All terms act, and the student sees nothing of them in its loss."""
    own = detached(tried.own)
    assert own
    assert identical(own, tried.losses)
    assert identical(*tried.buffers)
    assert torch.equal(*tried.streams)


def test_idle_terms_train_the_student_as_it_would_train_alone(tried):
    tried.restart()
    kept = {name: term.schedule for name, term in tried.student.terms.items()}
    for term in tried.student.terms.values():
        term.schedule = Constant(0.0)
    states = []
    for detector in (tried.plain, tried.student):
        wrapper = optimiser(detector)
        for seed in (5, 6):
            inputs = batch(tried.plain, tried.row, seed=seed)
            total, _ = detector.parse_losses(losses_of(detector, inputs))
            wrapper.update_params(total)
        states.append(own_part(detector.state_dict()))
    for name, schedule in kept.items():
        tried.student.terms[name].schedule = schedule
    assert identical(*states)
    assert not identical(states[0], tried.state)


def test_training_leaves_the_teacher_alone_and_yields_a_plain_student(tried):
    tried.restart()
    student, wrapper = tried.student, optimiser(tried.student)
    for seed in (5, 6):
        seeded()
        raw = families.batch(masks=tried.row.masks, seed=seed)
        log = student.train_step(raw, wrapper)
        assert log['loss'].isfinite()
    teacher = student.teachers['teacher'].detector
    saved = torch.load(tried.file)['state_dict']
    assert saved.keys() == teacher.state_dict().keys()
    assert identical(saved, teacher.state_dict())
    assert not any(one.training for one in teacher.modules())
    assert all(one.grad is None for one in teacher.parameters())
    tried.plain.load_state_dict(own_part(student.state_dict()), strict=True)
    one, other = (
        predictions(detector.eval(), tried)
        for detector in (tried.plain, student)
    )
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def predictions(detector, tried: Tried) -> list[torch.Tensor]:
    inputs = copy.deepcopy(tried.inputs)
    images, samples = inputs['inputs'], inputs['data_samples']
    with torch.no_grad():
        if not tried.row.predicts:
            return leaves(detector(images, samples, mode='tensor'))
        found = detector.predict(images, samples)
    return [
        value
        for sample in found
        for value in sample.pred_instances.values()
        if isinstance(value, torch.Tensor)
    ]


def test_an_image_without_boxes_teaches_nothing_broken(tried):
    tried.restart()
    inputs = batch(tried.student, tried.row, boxes=(3, 0))
    losses = losses_of(tried.student, inputs)
    assert all(one.isfinite() for one in detached(losses).values())
    total, _ = tried.student.parse_losses(losses)
    total.backward()
    gradients = [one.grad for one in tried.student.parameters()]
    assert all(one.isfinite().all() for one in gradients if one is not None)


# Heads part by part ----------------------------------------------------------


@pytest.mark.parametrize(
    ('make', 'head', 'layer'),
    [
        (heads.retinanet, 'bbox_head', 'retina_cls'),
        (heads.fcos, 'bbox_head', 'conv_cls'),
        (heads.gfl, 'bbox_head', 'gfl_cls'),
        (families.ddod, 'bbox_head', 'atss_cls'),
        (families.reppoints, 'bbox_head', 'reppoints_cls_out'),
        (tiny.faster_rcnn, 'rpn_head', 'rpn_cls'),
    ],
)
def test_what_is_called_level_by_level_is_the_head_as_a_whole(
    make, head, layer, tmp_path
):
    file = tiny.save_teacher(make(base=16), tmp_path / 'teacher.pth')
    teacher = dict(config=dict(model=make(base=16)), checkpoint=str(file))
    whole = dict(
        type='mmkd.FeatureTerm',
        teacher='teacher',
        tap=head,
        output=0,
        loss=dict(type='mmkd.CWDLoss'),
    )
    terms = dict(
        whole=whole,
        level=dict(whole, tap=f'{head}.forward_single'),
        layer=dict(whole, tap=f'{head}.{layer}', output=None),
    )
    student = tiny.build(tiny.distilled(make(), dict(teacher=teacher), terms))
    inputs = student.train().data_preprocessor(families.batch(), True)
    losses = losses_of(student, inputs)
    values = {losses[f'loss_kd_{name}'].item() for name in terms}
    assert len(values) == 1
    assert values.pop() > 0

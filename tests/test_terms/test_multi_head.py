import copy
import math

import heads
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.optim import OptimWrapper
from one_term import builder, same, shares, state, teacher_of
from torchvision.ops import generalized_box_iou

from mmkd.ops.masks import valid_mask
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Step
from mmkd.terms.decoding import decode
from mmkd.terms.multi_head import MultiHeadTerm, heads_apart

STRIDES, CHANNELS = (8, 16, 32), (16, 32, 64)
PHASES = [
    dict(
        length=1,
        train=(),
        freeze='terms.x.student_heads',
        supervised=False,
    ),
    dict(length=3, freeze='terms.x.teacher_heads'),
]
SMALL = dict(norm_cfg=dict(type='GN', num_groups=4, requires_grad=True))
FCOS = dict(type='FCOSHead', stacked_convs=1, **SMALL)
GFL = {
    key: value
    for key, value in heads.gfl()['bbox_head'].items()
    if key not in ('num_classes', 'in_channels', 'feat_channels')
} | dict(train_cfg=heads.gfl()['train_cfg'])


def term(**settings):
    wide = [2 * one for one in CHANNELS]
    return dict(
        dict(
            type='mmkd.MultiHeadTerm',
            teacher='big',
            num_classes=tiny.CLASSES,
            tap='backbone',
            levels=(1, 2, 3),
            strides=STRIDES,
            channels=CHANNELS,
            teacher_channels=wide,
            head_channels=8,
            head=SMALL,
        ),
        **settings,
    )


build = builder(term)


def optimiser(student, lr=0.01):
    learns = student.parameters()
    return OptimWrapper(torch.optim.SGD(learns, lr=lr, momentum=0.9))


def go_to(hub, progress):
    hub.update_info('max_iters', 100)
    hub.update_info('iter', round(100 * progress))


# How far apart two heads are -------------------------------------------------


@pytest.fixture
def two_heads():
    """Heads of a kind with what they say of two images, one of them padded."""

    def two_heads(kind, bins=(4, 4)):
        pair, said = [], []
        for seed in (0, 1):
            more = dict(bins=bins[seed]) if kind == 'gfl' else {}
            head = tiny.build(getattr(heads, kind)(**more), seed).bbox_head
            generator = torch.Generator().manual_seed(seed)
            maps = [
                torch.randn(2, 16, size, size, generator=generator)
                for size in (16, 8, 4, 2, 1)
            ]
            for name, weight in head.named_parameters():
                if name.endswith('weight') and weight.ndim > 1:
                    torch.nn.init.normal_(weight.data, std=0.1)
                if name == 'conv_reg.bias':  # no boxes without area
                    torch.nn.init.constant_(weight.data, 3.0)
            pair.append(head)
            said.append([list(maps) for maps in head(maps)])
        gt = GroundTruth.from_boxes(
            [torch.zeros(0, 4), torch.zeros(0, 4)],
            shape=(128, 128),
            image_shapes=[(128, 128), (96, 64)],
        )
        return pair[0], said[0], pair[1], said[1], gt

    return two_heads


def literal(own, student, other, teacher, gt, temperature):
    """Anchor by anchor, as the formula is written."""
    own_boxes, boxes = decode(own, student[1]), decode(other, teacher[1])
    total = cls = box = 0.0
    for level, scores in enumerate(teacher[0]):
        inside = valid_mask(gt, tuple(scores.shape[-2:]))
        for image, _, row, column in inside.nonzero().tolist():
            cell = image, slice(None), row, column
            t = scores[cell].reshape(-1, tiny.CLASSES)
            s = student[0][level][cell].reshape(-1, tiny.CLASSES)
            for anchor in range(len(t)):
                weight = t[anchor].sigmoid().max()
                p, q = (
                    torch.distributions.Bernoulli(
                        logits=one[anchor] / temperature
                    )
                    for one in (t, s)
                )
                kl = torch.distributions.kl_divergence(p, q).sum()
                cls = cls + weight * kl
                if hasattr(own, 'reg_max') and own.reg_max == other.reg_max:
                    p, q = (
                        torch.distributions.Categorical(
                            logits=one[1][level][cell].reshape(4, -1)
                        )
                        for one in (teacher, student)
                    )
                    error = torch.distributions.kl_divergence(p, q).mean()
                else:
                    place = image, anchor, slice(None), row, column
                    error = (
                        1
                        - generalized_box_iou(
                            own_boxes[level][place][None],
                            boxes[level][place][None],
                        )[0, 0]
                    )
                box = box + weight * error
                total = total + weight
    return temperature**2 * cls / total, box / total


@pytest.mark.parametrize('kind', ['atss', 'gfl', 'fcos'])
@torch.no_grad()
def test_equals_the_formula_anchor_by_anchor(two_heads, kind):
    found = heads_apart(*two_heads(kind), temperature=3.0)
    wanted = literal(*two_heads(kind), 3.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(one > 0.01 for one in found)


@torch.no_grad()
def test_heads_of_different_bins_are_compared_by_their_boxes(two_heads):
    found = heads_apart(*two_heads('gfl', bins=(4, 6)))
    wanted = literal(*two_heads('gfl', bins=(4, 6)), 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_head_of_softmax_has_one_distribution_an_anchor(two_heads):
    own, student, other, teacher, gt = two_heads('atss')
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)] * 2, shape=(128, 128))
    for one in (own, other):  # the last class is the background
        one.use_sigmoid_cls = False
    found, _ = heads_apart(own, student, other, teacher, gt, 2.0)
    t, s = (
        torch.cat([one.permute(0, 2, 3, 1).flatten(0, 2) for one in side[0]])
        for side in (teacher, student)
    )
    weight = t.softmax(1)[:, :-1].amax(1)
    kl = F.kl_div(
        (s / 2).log_softmax(1), (t / 2).softmax(1), reduction='none'
    ).sum(1)
    torch.testing.assert_close(found, 4 * (weight * kl).sum() / weight.sum())


def test_what_a_head_says_of_the_border_does_not_count(two_heads):
    own, student, other, teacher, gt = two_heads('gfl')
    before = heads_apart(own, student, other, teacher, gt)
    for side in (student, teacher):
        for maps in side[:2]:
            for one in maps[:3]:
                one.data[1, :, :, one.shape[-1] // 2 :] += 3.0
    torch.testing.assert_close(
        heads_apart(own, student, other, teacher, gt), before
    )


def test_where_nothing_counts_nothing_is_apart(two_heads):
    own, student, other, teacher, _ = two_heads('gfl')
    nothing, whole = torch.zeros(0, 4), torch.tensor([[0.0, 0, 128, 128]])
    gt = GroundTruth.from_boxes(
        [nothing] * 2, shape=(128, 128), ignored=[whole] * 2
    )
    assert heads_apart(own, student, other, teacher, gt) == (0, 0)


def test_equal_heads_are_not_apart_and_the_teacher_hears_nothing(two_heads):
    own, student, other, teacher, gt = two_heads('gfl')
    assert sum(heads_apart(own, teacher, other, teacher, gt)) < 1e-5
    sum(heads_apart(own, student, other, teacher, gt)).backward()
    assert all(one.grad is None for one in other.parameters())
    assert own.gfl_cls.weight.grad.abs().sum() > 0
    assert own.gfl_reg.weight.grad.abs().sum() > 0


# The term --------------------------------------------------------------------


def test_nothing_but_heads_is_added(build):
    student = build()
    plain = tiny.build(tiny.retinanet())
    added = {
        name: one
        for name, one in student.state_dict().items()
        if name not in plain.state_dict()
    }
    own = ('terms.x.student_heads.', 'terms.x.teacher_heads.')
    assert {name for name in added if not name.startswith(own)} == {
        'terms.x.taught'
    }
    for width, side in ((1, 'student'), (2, 'teacher')):
        for index, channels in enumerate(CHANNELS):
            first = added[
                f'terms.x.{side}_heads.{index}.cls_convs.0.conv.weight'
            ]
            assert first.shape[1] == width * channels


def test_a_twin_of_the_teacher_with_its_heads_learns_from_labels_alone(build):
    big = tiny.retinanet(base=16)
    student = build(big, big, channels=[2 * one for one in CHANNELS])
    student.load_state_dict(teacher_of(student).state_dict(), strict=False)
    own = student.terms['x']
    own.student_heads.load_state_dict(own.teacher_heads.state_dict())
    found = shares(student.loss(*tiny.batch()))
    for name in ('cls', 'box', 'final_cls', 'final_box'):
        assert found[name] < 1e-5
    assert found['labels'] > 1
    # 0.5 and 1 - 0.1 of what the teacher's say, which are the same.
    torch.testing.assert_close(found['labels'], 0.45 * found['teacher'])


def test_losses_are_those_of_the_heads_with_the_factors_of_the_formula(build):
    settings = dict(head_weight=0.7, mix=0.2, temperature=2.0, box_weight=3.0)
    student = build(**settings)
    big, own = teacher_of(student), student.terms['x']
    images, samples = tiny.batch()
    found = shares(student.loss(images, copy.deepcopy(samples)))
    gt = GroundTruth.from_samples(samples, images)
    labels = teacher = cls = box = 0.0
    maps = zip(student.backbone(images)[1:], big.backbone(images)[1:])
    pairs = zip(own.student_heads, own.teacher_heads)
    for (one, other), (mine, theirs) in zip(maps, pairs):
        for name, value in mine.loss((one,), samples).items():
            labels += sum(value) if 'loss' in name else 0
        for name, value in theirs.loss((other,), samples).items():
            teacher += sum(value) if 'loss' in name else 0
        with torch.no_grad():
            said = mine((one,)), theirs((other,))
        apart = literal(mine, said[0], theirs, said[1], gt, 2.0)
        cls, box = cls + apart[0], box + apart[1]
    with torch.no_grad():
        final = literal(
            student.bbox_head,
            student.bbox_head(student.extract_feat(images)),
            big.bbox_head,
            big.bbox_head(big.extract_feat(images)),
            gt,
            2.0,
        )
    wanted = dict(
        teacher=teacher,
        labels=0.7 * 0.8 * labels,
        cls=0.7 * 0.2 * cls,
        box=0.7 * 0.2 * 3.0 * box,
        final_cls=0.2 * final[0],
        final_box=0.2 * 3.0 * final[1],
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('level', [0, 1, 2])
def test_a_head_teaches_its_stage_and_those_before_it(build, level):
    student = build(
        levels=(level + 1,),
        strides=STRIDES[level : level + 1],
        channels=CHANNELS[level],
        teacher_channels=2 * CHANNELS[level],
        final=None,
    )
    found = shares(student.loss(*tiny.batch()))
    assert list(found) == ['teacher', 'labels', 'cls', 'box']
    (found['cls'] + found['box'] + found['labels']).backward()
    for stage in (1, 2, 3, 4):
        grads = [
            one.grad
            for one in student.backbone.get_submodule(
                f'layer{stage}'
            ).parameters()
        ]
        if stage <= level + 2:
            assert any(one.abs().sum() > 0 for one in grads)
        else:
            assert all(one is None for one in grads)


def test_imitation_teaches_no_head_of_the_teacher(build):
    student = build()
    found = shares(student.loss(*tiny.batch()))
    teacher = found.pop('teacher')
    sum(found.values()).backward()
    own = student.terms['x']
    assert all(one.grad is None for one in own.teacher_heads.parameters())
    assert all(one.grad is not None for one in own.student_heads.parameters())
    teacher.backward()
    assert all(one.grad is not None for one in own.teacher_heads.parameters())


@pytest.mark.parametrize('kind', [FCOS, GFL], ids=['fcos', 'gfl'])
def test_other_heads_of_the_library_serve_as_well(build, kind):
    student = build(head=kind)
    found = shares(student.loss(*tiny.batch()))
    assert all(one.isfinite() and one > 0 for one in found.values())
    sum(found.values()).backward()
    for head in student.terms['x'].teacher_heads:
        assert [one for one in head.parameters() if one.grad is None] == []


def test_every_head_of_points_has_objects_of_all_sizes(build):
    student = build(head=FCOS)
    points = [torch.tensor([[64.0, 64.0]])]
    for side in (2.0, 60.0):
        box = torch.tensor([[64 - side, 64 - side, 64 + side, 64 + side]])
        for head in student.terms['x'].student_heads:
            one = tiny.batch(shapes=((128, 128),), boxes=1)[1][0].gt_instances
            one.bboxes, one.labels = box, torch.tensor([1])
            assert head.get_targets(points, [one])[0][0] == 1


def test_the_pyramid_of_two_stages_may_have_the_heads(build):
    student = build(
        tiny.faster_rcnn(),
        tiny.faster_rcnn(base=16),
        tap='neck',
        strides=(4, 8, 16, 32),
        channels=16,
        teacher_channels=None,
        levels=(0, 1, 2, 3),
        final='rpn_head',
    )
    assert not student.terms['x'].compares_classes()
    found = shares(student.loss(*tiny.batch()))
    assert {'labels', 'final_cls', 'final_box'} < set(found)
    assert all(one > 0 for one in found.values())


def test_a_teacher_of_other_classes_has_heads_of_the_students(build):
    student = build(teacher=tiny.retinanet(base=16, classes=7), final=None)
    assert all(
        one.num_classes == tiny.CLASSES
        for one in student.terms['x'].teacher_heads
    )
    assert not student.terms['x'].compares_classes()
    assert build().terms['x'].compares_classes()


def test_images_without_annotations_are_compared_all_the_same(build):
    student = build()
    images, samples = tiny.batch()
    for one in samples:
        del one.gt_instances
    record, step = student.dry_step(images, samples)[0], None
    step = Step(
        student=record.student,
        images=images,
        samples=samples,
        teachers=record.teachers,
    )
    found = student.terms['x'](step)
    assert found['labels'] == found['teacher'] == 0
    assert found['cls'] > 0


# Phases ----------------------------------------------------------------------


def test_first_the_teachers_heads_learn_and_nothing_else_does(build, hub):
    student = build(phases=PHASES)
    own, big = student.terms['x'], teacher_of(student)
    before = state(student), state(big), state(own.student_heads)
    data, optim, errors = tiny.batch(), optimiser(student), []
    for _ in range(10):
        log = student.train_step(tiny.pixels(*data), optim)
        assert shares(log).keys() == {'teacher'}
        assert log['loss'] == log['loss_kd_x_teacher']
        errors.append(float(log['loss']))
    assert errors[-1] < 0.8 * errors[0]
    assert same(big, before[1])
    assert same(own.student_heads, before[2])
    learned = 'terms.x.teacher_heads.', 'terms.x.taught'
    for name, one in student.state_dict().items():
        assert name.startswith(learned) or torch.equal(one, before[0][name])
    assert own.taught == 10


def test_then_the_teachers_heads_rest_and_all_of_the_student_learns(
    build, hub
):
    student = build(phases=PHASES)
    data, optim = tiny.batch(), optimiser(student)
    student.train_step(tiny.pixels(*data), optim)
    go_to(hub, 0.5)
    own = student.terms['x']
    before = state(own.teacher_heads), state(own.student_heads)
    head = state(student.bbox_head)
    log = student.train_step(tiny.pixels(*data), optim)
    assert 'loss_cls' in log
    assert 'teacher' not in shares(log)
    assert {'labels', 'cls', 'box', 'final_cls', 'final_box'} <= set(
        shares(log)
    )
    assert same(own.teacher_heads, before[0])
    assert not same(own.student_heads, before[1])
    assert not same(student.bbox_head, head)
    assert own.taught == 1


def test_untrained_heads_of_the_teacher_are_refused(build, hub):
    student = build(phases=PHASES)
    go_to(hub, 0.5)
    with pytest.raises(ValueError, match='untrained ones teach nothing'):
        student.loss(*tiny.batch())


def test_a_resumed_training_knows_that_they_were_trained(build, hub):
    first = build(phases=PHASES)
    data = tiny.pixels(*tiny.batch())
    first.train_step(data, optimiser(first))
    saved = state(first)
    second = build(phases=PHASES)
    second.load_state_dict(saved)
    go_to(hub, 0.5)
    found = []
    for student in (first, second):
        torch.manual_seed(0)
        found.append(shares(student.loss(*tiny.batch())))
    assert found[0] == found[1]


# Heads of an earlier training ------------------------------------------------


@pytest.fixture
def trained(build, tmp_path):
    """A checkpoint of a training with the term, and its student."""

    def trained(name='trained.pth', **settings):
        student = build(**settings)
        student.train_step(
            tiny.pixels(*tiny.batch()), optimiser(student, lr=0.1)
        )
        torch.save(dict(state_dict=student.state_dict()), tmp_path / name)
        return str(tmp_path / name), student

    return trained


def test_heads_of_an_earlier_training_need_no_phase(build, trained):
    norm = dict(norm_cfg=dict(type='BN', requires_grad=True))
    file, earlier = trained(head=norm)
    wanted = earlier.terms['x'].teacher_heads
    student = build(head=norm, teacher_head_checkpoint=file)
    own = student.terms['x']
    assert not same(own.teacher_heads, state(wanted))
    optim = optimiser(student)
    for _ in range(2):
        log = student.train_step(tiny.pixels(*tiny.batch()), optim)
    assert 'teacher' not in shares(log)
    assert same(own.teacher_heads, state(wanted))
    # What a resumed training has learned is not overwritten.
    saved = state(student)
    with torch.no_grad():
        for key in saved:
            if key.startswith('terms.x.teacher_heads.') and '_cls' in key:
                saved[key] += 1.0
    again = build(head=norm, teacher_head_checkpoint=file)
    again.load_state_dict(saved)
    again.loss(*tiny.batch())
    assert not same(again.terms['x'].teacher_heads, state(wanted))


def test_loaded_heads_have_no_phase_to_learn_in(build, trained):
    file, _ = trained()
    with pytest.raises(ValueError, match='Phase 1 .*no parameter'):
        build(teacher_head_checkpoint=file, phases=PHASES)


# Messages --------------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (
            dict(levels=(2, 3)),
            r'3 heads, .* got 2 maps of the student.*levels',
        ),
        (dict(levels=(0, 1, 2)), r'cell every 8 pixels, got \(32, 32\) cells'),
        (
            dict(teacher_levels=(0, 1, 2)),
            r'map of the teacher .*choose others with teacher_levels=',
        ),
        (dict(channels=16), 'built for 16 channels'),
        (dict(channels=(16, 32)), 'Give channels one entry a stride'),
        (dict(num_classes=4), 'Set num_classes=3'),
        (dict(tap='nek'), "Did you mean 'neck'"),
        (dict(final='backbone'), 'final=None'),
        (dict(mix=1.5), 'mix between 0 and 1'),
        (dict(temperature=0), 'temperature > 0'),
        (dict(head=dict(type='ATSSHed')), "Did you mean '?mmkd|ATSSHed"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ('cells', 'fits'), [((16, 15), True), ((17, 15), False), ((16, 14), False)]
)
def test_what_does_not_divide_may_be_rounded_either_way(build, cells, fits):
    settings = dict(strides=(8,), channels=16, teacher_channels=32)
    own = build(levels=(1,), **settings).terms['x']
    check = own._check_maps
    arguments = [torch.zeros(1, 16, *cells)], own.student_heads, (128, 127)
    if fits:
        check('student', *arguments)
        return
    with pytest.raises(ValueError, match='Set strides='):
        check('student', *arguments)


def test_heads_that_share_no_anchors_are_refused(build):
    with pytest.raises(ValueError, match='MultiHeadTerm pairs boxes anchor'):
        build(
            heads.atss(),
            heads.retinanet(
                base=16,
                anchor_generator=dict(
                    type='AnchorGenerator',
                    octave_base_scale=4,
                    scales_per_octave=3,
                    ratios=[1.0],
                    strides=[8, 16, 32, 64, 128],
                ),
            ),
        )


def test_two_stages_have_no_last_dense_head(build):
    with pytest.raises(ValueError, match='final|bbox_head'):
        build(
            tiny.faster_rcnn(),
            tiny.faster_rcnn(base=16),
            levels=(1, 2, 3),
        )


def test_without_weight_it_is_silent():
    assert MODELS.build(term(head_weight=0, mix=0)).silent()
    assert not MODELS.build(term(head_weight=0)).silent()
    assert not MODELS.build(term(mix=0)).silent()


def test_a_head_begins_with_the_scores_of_a_rare_object():
    """As MMDetection initialises it: a probability of 0.01."""
    own = MultiHeadTerm(**{k: v for k, v in term().items() if k != 'type'})
    for head in [*own.student_heads, *own.teacher_heads]:
        bias = head.atss_cls.bias
        torch.testing.assert_close(
            bias, torch.full_like(bias, math.log(0.01 / 0.99))
        )


def test_channels_that_the_norm_cannot_divide_are_told():
    with pytest.raises(
        ValueError,
        match='cannot build ATSSHead with head_channels=16.*norm_cfg',
    ):
        MultiHeadTerm('big', num_classes=3, strides=(8,), head_channels=16)

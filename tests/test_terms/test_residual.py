"""Residual KD: the assistant learns what the student leaves undone."""

import copy

import pytest
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmkd.configs import student_config

CHANNELS = (32, 64, 128)  # of the teacher's stages, strides 8, 16, 32
ADAM = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=0.01))
BOTH = dict(levels=(0, 1, 2), teacher_levels=(1, 2, 3))
PROGRESSIVE = [
    dict(train='backbone.main', terms='main', supervised=False),
    dict(train='backbone.assistant', terms='residual', supervised=False),
    dict(train=('neck', 'bbox_head'), terms=()),
]


def assisted(channels=CHANNELS):
    model = tiny.retinanet()
    net = dict(tiny.backbone(8), out_indices=(1, 2, 3))
    model.backbone = dict(
        type='mmkd.ResidualBackbone',
        main=net,
        assistant=dict(net, base_channels=4, stem_channels=4),
        out_channels=channels,
    )
    model.neck.update(in_channels=list(channels), start_level=0)
    return model


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 'retinanet.pth'
    return str(tiny.save_teacher(tiny.retinanet(base=16), path))


def config(file, student=None, phases=None, residual=None, main=None):
    settings = {} if phases is None else dict(phases=phases)
    return tiny.distilled(
        student or assisted(),
        dict(
            big=dict(
                config=dict(model=tiny.retinanet(base=16)), checkpoint=file
            )
        ),
        dict(
            main=dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                tap='backbone.main',
                teacher_tap='backbone',
                loss=dict(type='mmkd.MimicLoss'),
                **(main or BOTH),
            ),
            residual=dict(
                type='mmkd.ResidualTerm',
                teacher='big',
                **(residual or BOTH),
            ),
        ),
        **settings,
    )


def built(config):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    student = MODELS.build(config)
    student.init_weights()
    return student.train()


def maps_of(student, images):
    net = student.backbone
    teacher = student.teachers['big'].detector.backbone(images)[1:]
    return net.main(images), net.assistant(images), teacher


def test_it_is_the_squared_error_of_the_rest_and_so_of_the_sum(file):
    student = built(config(file)).eval()
    images, samples = tiny.batch()
    losses = student.loss(images, samples)
    rest, whole, alone = 0, 0, 0
    for main, assistant, teacher in zip(*maps_of(student, images)):
        rest += ((teacher - main) - assistant).square().mean()
        whole += (teacher - (main + assistant)).square().mean()
        alone += (teacher - main).square().mean()
    share = losses['loss_kd_residual']
    torch.testing.assert_close(share, rest, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(share, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses['loss_kd_main'], alone)


def gradients(student, name):
    """Whether each branch gets one from a term's share."""
    student.zero_grad()
    losses = student.loss(*tiny.batch())
    losses[f'loss_kd_{name}'].backward()
    return {
        branch: [
            key
            for key, one in getattr(
                student.backbone, branch
            ).named_parameters()
            if one.grad is not None and one.grad.abs().sum() > 0
        ]
        for branch in ('main', 'assistant')
    }


def test_jointly_each_learns_from_its_own_term(file):
    student = built(config(file))
    found = gradients(student, 'residual')
    assert found['main'] == []
    assert 'net.conv1.weight' in found['assistant']
    assert 'laterals.2.weight' in found['assistant']
    found = gradients(student, 'main')
    assert 'net.conv1.weight' in found['main']
    assert found['assistant'] == []


def test_an_assistant_that_says_nothing_leaves_the_students_error(file):
    """And one that says what is left leaves none: not another student."""
    student = built(config(file)).eval()
    images, samples = tiny.batch()
    main, _, teacher = maps_of(student, images)
    for said, expected in (
        ([torch.zeros_like(one) for one in main], None),
        ([other - one for one, other in zip(main, teacher)], 0),
        ([*teacher], sum(one.square().mean() for one in main)),
    ):
        said = tuple(one.detach().requires_grad_() for one in said)
        student.backbone.assistant.forward = lambda _, said=said: said
        losses = student.loss(images, samples)
        if expected is None:
            expected = losses['loss_kd_main']
        torch.testing.assert_close(
            losses['loss_kd_residual'],
            torch.as_tensor(expected, dtype=torch.float32),
            atol=1e-5,
            rtol=1e-5,
        )
    del student.backbone.assistant.forward


def move_to(hub, phase):
    hub.update_info('max_iters', 3)
    hub.update_info('iter', phase)


def test_progressively_each_learns_in_turn_and_the_sum_is_nearer(file, hub):
    whole = config(file, phases=PROGRESSIVE)
    student = built(whole)
    optimiser = build_optim_wrapper(student, ADAM)
    batch = tiny.pixels(*tiny.batch())
    shares = {}
    for phase, (name, part) in enumerate(
        [
            ('main', ('backbone.main.',)),
            ('residual', ('backbone.assistant.',)),
            (None, ('neck.', 'bbox_head.')),
        ]
    ):
        move_to(hub, phase)
        before = {k: one.clone() for k, one in student.state_dict().items()}
        for _ in range(12 if name else 1):
            log = student.train_step(batch, optimiser)
            if name:
                shares.setdefault(name, []).append(log[f'loss_kd_{name}'])
        after = student.state_dict()
        moved = [k for k in after if not torch.equal(after[k], before[k])]
        assert moved
        assert all(key.startswith(part) for key in moved), moved
    assert shares['main'][-1] < 0.9 * shares['main'][0]
    assert shares['residual'][-1] < shares['main'][-1]
    assert shares['residual'][-1] < 0.9 * shares['residual'][0]


def test_labels_count_for_neck_and_head_alone(file, hub):
    student = built(config(file, phases=PROGRESSIVE)).eval()
    images, samples = tiny.batch()
    for phase in (0, 1):
        move_to(hub, phase)
        found = student.loss(images, samples)
        assert (
            student.loss(images, tiny.batch(seed=8)[1]).keys() == found.keys()
        )
        assert all('kd' in key for key in found)
    move_to(hub, 2)
    assert {'loss_cls', 'loss_bbox'} <= student.loss(images, samples).keys()


def test_the_assistant_is_deployed_and_counts(file):
    whole = config(file)
    student = built(whole).eval()
    plain = MODELS.build(student_config(whole)).eval()
    state = {
        key: one
        for key, one in student.state_dict().items()
        if not key.startswith('terms.')
    }
    plain.load_state_dict(state, strict=True)
    assert any(key.startswith('backbone.assistant.net.') for key in state)
    images, samples = tiny.batch()

    def detect(detector):
        with torch.no_grad():
            return [
                one.pred_instances.bboxes
                for one in detector.predict(images, copy.deepcopy(samples))
            ]

    expected = detect(student)
    for one, other in zip(detect(plain), expected):
        assert torch.equal(one, other)
    with torch.no_grad():
        for one in plain.backbone.assistant.laterals.parameters():
            one.zero_()
    assert any(
        one.shape != other.shape or not torch.equal(one, other)
        for one, other in zip(detect(plain), expected)
    )


def test_maps_of_a_pyramid_may_be_added_instead(file):
    model = assisted()
    neck = dict(tiny.retinanet().neck, start_level=0)
    model.backbone.update(
        main_neck=dict(neck, in_channels=[16, 32, 64]),
        assistant_neck=dict(neck, in_channels=[8, 16, 32]),
        out_channels=16,
    )
    model.neck = None
    taps = dict(teacher_tap='neck')
    whole = config(file, student=ConfigDict(model), residual=taps)
    whole.terms.pop('main')
    student = built(whole).eval()
    images, samples = tiny.batch()
    share = student.loss(images, samples)['loss_kd_residual']
    big = student.teachers['big'].detector
    expected = sum(
        (one - other).square().mean()
        for one, other in zip(
            student.backbone(images), big.extract_feat(images)
        )
    )
    torch.testing.assert_close(share, expected)


def test_a_level_alone_is_compared_with_that_of_the_teacher(file):
    one = dict(levels=(1,), teacher_levels=(2,))
    student = built(config(file, residual=one)).eval()
    images, samples = tiny.batch()
    share = student.loss(images, samples)['loss_kd_residual']
    main, rest, teacher = (maps[1] for maps in maps_of(student, images))
    torch.testing.assert_close(
        share, (main + rest - teacher).square().mean(), atol=1e-5, rtol=1e-5
    )


def test_where_objects_are_may_count_more(file):
    more = dict(
        BOTH,
        weight=dict(type='mmkd.ScoreWeight'),
        loss=dict(type='mmkd.WeightedMSELoss'),
    )
    student = built(config(file, residual=more)).eval()
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    share = student.loss(images, samples)['loss_kd_residual']
    big = student.teachers['big'].detector
    scores = big.bbox_head(big.extract_feat(images))[0]
    expected = 0
    for main, rest, teacher, score in zip(*maps_of(student, images), scores):
        weight = score.sigmoid().amax(1, keepdim=True)
        error = (main + rest - teacher).square().mean(1, keepdim=True)
        expected += (weight * error).sum() / weight.sum()
    torch.testing.assert_close(share, expected)


def test_a_student_without_an_assistant_is_told_what_to_set(file):
    whole = config(file, student=tiny.retinanet())
    whole.terms.pop('main')
    with pytest.raises(ValueError, match="'backbone.main'.+ResidualBackbone"):
        built(whole)


def test_maps_of_other_channels_or_number_are_refused(file):
    narrow = assisted(channels=(32, 64, 96))
    with pytest.raises(ValueError, match='96, 4, 4.+128, 4, 4'):
        built(config(file, student=narrow))
    with pytest.raises(ValueError, match='levels= and teacher_levels='):
        built(config(file, residual=dict(levels=None)))

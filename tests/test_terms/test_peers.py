import copy

import detrs
import pytest
import tiny
import torch
from mmengine.optim import OptimWrapper

from mmkd.taps import recording
from mmkd.terms.balanced import detection_loss
from mmkd.terms.peers import PeersTerm
from mmkd.terms.queries import DECODER, HEAD, answers, ask, question
from mmkd.terms.shared_queries import answer_distances, confidence

SMALL = dict(config=dict(model=tiny.retinanet()))
WIDE = dict(config=dict(model=tiny.retinanet(base=16)))


def term(**settings):
    return dict(type='mmkd.PeersTerm', **settings)


def distilled(teachers=None, student=None, **settings):
    model = tiny.build(
        tiny.distilled(
            student or tiny.retinanet(),
            teachers or {},
            dict(p2p=term(**settings)),
        )
    )
    model.init_weights()
    return loud(model)


def loud(model):
    """Heads of unlike opinions; those of untrained ones are all alike."""
    for number, one in enumerate([model, *model.terms.p2p.peers.values()]):
        torch.manual_seed(number)
        torch.nn.init.normal_(one.bbox_head.retina_cls.weight, std=0.2)
        torch.nn.init.normal_(one.bbox_head.retina_reg.weight, std=0.1)
    return model.train()


def company(**settings):
    """A student, two peers and a teacher, all of which learn."""
    return distilled(
        peers=dict(b=SMALL, c=WIDE), online_teacher=WIDE, **settings
    )


@pytest.fixture(scope='module')
def whole():
    return company()


@pytest.fixture
def model(whole):
    return copy.deepcopy(whole)


@pytest.fixture
def pictures():
    return tiny.batch()


def parts(model, pictures, kind=''):
    found = model.loss(*pictures)
    return {
        key.removeprefix('loss_kd_p2p_'): one
        for key, one in found.items()
        if key.startswith('loss_kd_p2p_') and key.endswith(kind)
    }


def grads(model):
    """Whether a gradient has reached the student, each peer, the teacher."""
    found = {'student': model.backbone}
    found.update(
        {name: one.backbone for name, one in model.terms.p2p.peers.items()}
    )
    return {
        name
        for name, one in found.items()
        if any(
            p.grad is not None and p.grad.abs().sum() > 0
            for p in one.parameters()
        )
    }


# Who learns from whom --------------------------------------------------------


def test_everybody_is_trained_and_hears_all_others(model, pictures):
    assert set(parts(model, pictures)) == {
        *('b_task', 'c_task', 'teacher_task'),
        *('student_teacher', 'b_teacher', 'c_teacher'),
        *('student_peers', 'b_peers', 'c_peers'),
    }


@pytest.mark.parametrize('name', ['student', 'b', 'c'])
@pytest.mark.parametrize('kind', ['teacher', 'peers'])
def test_what_a_student_is_told_moves_that_student_alone(
    model, pictures, name, kind
):
    parts(model, pictures)[f'{name}_{kind}'].backward()
    assert grads(model) == {name}


@pytest.mark.parametrize('name', ['b', 'c', 'teacher'])
def test_a_detection_loss_moves_its_own_detector_alone(model, pictures, name):
    parts(model, pictures)[f'{name}_task'].backward()
    assert grads(model) == {name}


def test_the_online_teacher_hears_the_labels_alone(model, pictures):
    peer = copy.deepcopy(model.terms.p2p.peers['teacher'])
    tiny.total(model.loss(*pictures)).backward()
    detection_loss(peer.loss(*pictures)).backward()
    found = model.terms.p2p.peers['teacher'].named_parameters()
    for (name, one), other in zip(found, peer.parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_all_of_them_move_in_a_training_step(model, pictures):
    before = copy.deepcopy(model.state_dict())
    optimiser = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    model.train_step(tiny.pixels(*pictures), optimiser)
    after = model.state_dict()
    for prefix in ('', *(f'terms.p2p.peers.{x}.' for x in 'bc')):
        key = f'{prefix}backbone.conv1.weight'
        assert not torch.equal(before[key], after[key])
    key = 'terms.p2p.peers.teacher.backbone.conv1.weight'
    assert not torch.equal(before[key], after[key])


def test_a_frozen_teacher_stays_as_it_is(teachers, pictures):
    model = distilled(teachers, peers=dict(b=SMALL), teacher='big')
    model.teachers.load()
    before = copy.deepcopy(model.teachers['big'].detector.state_dict())
    optimiser = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    model.train_step(tiny.pixels(*pictures), optimiser)
    for key, one in model.teachers['big'].detector.state_dict().items():
        assert torch.equal(one, before[key])
    assert set(parts(model, pictures, 'teacher')) == {
        'student_teacher',
        'b_teacher',
    }


# What they pay ---------------------------------------------------------------


def test_identical_peers_have_nothing_to_say(pictures):
    model = distilled(peers=dict(b=SMALL))
    own = {
        key: one
        for key, one in model.state_dict().items()
        if not key.startswith('terms.')
    }
    model.terms.p2p.peers['b'].load_state_dict(own)
    found = parts(model, pictures, 'peers')
    assert found['student_peers'].abs() < 1e-6
    assert found['b_peers'].abs() < 1e-6


def test_a_student_alone_learns_from_the_teacher_as_among_peers(
    model, pictures
):
    alone = distilled(online_teacher=WIDE)
    alone.load_state_dict(
        {
            key: one
            for key, one in model.state_dict().items()
            if key in alone.state_dict() and 'merit' not in key
        },
        strict=False,
    )
    found = parts(alone, pictures)
    assert set(found) == {'student_teacher', 'teacher_task'}
    wanted = parts(model, pictures)
    for key, one in found.items():
        torch.testing.assert_close(one, wanted[key])


def test_peers_that_change_places_change_losses(pictures):
    model = distilled(peers=dict(b=SMALL, c=SMALL))
    turned = copy.deepcopy(model)
    b, c = (turned.terms.p2p.peers[name] for name in 'bc')
    state = copy.deepcopy(b.state_dict())
    b.load_state_dict(c.state_dict())
    c.load_state_dict(state)
    before, after = parts(model, pictures), parts(turned, pictures)
    for kind in ('task', 'peers'):
        torch.testing.assert_close(before[f'b_{kind}'], after[f'c_{kind}'])
        torch.testing.assert_close(before[f'c_{kind}'], after[f'b_{kind}'])
        assert before[f'b_{kind}'] != before[f'c_{kind}']
    torch.testing.assert_close(before['student_peers'], after['student_peers'])


def test_what_peers_say_is_the_mean_over_all_others(pictures):
    model = distilled(peers=dict(b=SMALL, c=SMALL), beta=3.0)
    term = model.terms.p2p
    found = []
    gap = term.gap
    term.gap = lambda own, other: found.append(gap(own, other)) or found[-1]
    parts_ = parts(model, pictures, 'peers')
    # Pairs come student by student: two others each.
    for index, name in enumerate(('student', 'b', 'c')):
        pair = found[2 * index : 2 * index + 2]
        torch.testing.assert_close(parts_[f'{name}_peers'], 1.5 * sum(pair))


def test_weights_and_temperature_count(pictures):
    plain = company()
    louder = company(alpha=2.0, beta=0.5)
    before, after = parts(plain, pictures), parts(louder, pictures)
    for name in ('student', 'b', 'c'):
        torch.testing.assert_close(
            after[f'{name}_teacher'], 2 * before[f'{name}_teacher']
        )
        torch.testing.assert_close(
            after[f'{name}_peers'], 0.5 * before[f'{name}_peers']
        )
    hot = company(temperature=9.0)
    assert parts(hot, pictures)['b_peers'] != before['b_peers']
    assert PeersTerm(peers=dict(b=SMALL)).temperature == 3


def test_boxes_count_by_their_weight(pictures):
    shares = [
        parts(company(box_weight=weight), pictures)['b_peers']
        for weight in (0.0, 1.0, 3.0)
    ]
    torch.testing.assert_close(
        shares[2] - shares[0], 3 * (shares[1] - shares[0])
    )
    assert shares[1] > shares[0]


def test_at_the_beginning_there_are_labels_alone(pictures, hub):
    model = company(warmup_iters=5)
    hub.update_info('max_iters', 10)
    for iteration, kinds in ((4, {'task'}), (5, {'task', 'teacher', 'peers'})):
        hub.update_info('iter', iteration)
        found = parts(model, pictures)
        assert {key.rpartition('_')[2] for key in found} == kinds


# They differ, and who is best ------------------------------------------------


def test_no_two_begin_with_the_same_weights():
    torch.manual_seed(0)
    model = tiny.build(
        tiny.distilled(
            tiny.retinanet(),
            {},
            dict(p2p=term(peers=dict(b=SMALL, c=SMALL))),
        )
    )
    model.init_weights()
    key = 'bbox_head.retina_reg.weight'
    found = [
        model.state_dict()[f'{prefix}{key}']
        for prefix in ('', 'terms.p2p.peers.b.', 'terms.p2p.peers.c.')
    ]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert not torch.equal(one, other)
    ids = [id(one) for one in model.parameters()]
    assert len(ids) == len(set(ids))


def test_one_seed_gives_the_same_peers_and_the_same_student():
    states = []
    for peers in (dict(b=SMALL), dict(b=SMALL), None):
        torch.manual_seed(4)
        config = tiny.retinanet()
        if peers:
            config = tiny.distilled(config, {}, dict(p2p=term(peers=peers)))
        model = tiny.build(config, seed=4)
        model.init_weights()
        states.append(model.state_dict())
    for key, one in states[0].items():
        assert torch.equal(one, states[1][key])
        if not key.startswith('terms.'):
            assert torch.equal(one, states[2][key])


def test_merit_is_the_mean_detection_loss_of_each(model, pictures):
    found = []
    for _ in range(3):
        losses = model.loss(*pictures)
        own = {key: one for key, one in losses.items() if 'kd_p2p' not in key}
        found.append(
            [
                detection_loss(own),
                losses['loss_kd_p2p_b_task'],
                losses['loss_kd_p2p_c_task'],
            ]
        )
    wanted = torch.tensor(found).mean(0)
    torch.testing.assert_close(model.terms.p2p.merit, wanted)
    model.eval().loss(*pictures)
    torch.testing.assert_close(model.terms.p2p.merit, wanted)


def test_each_sees_images_in_its_own_normalisation(pictures):
    model = distilled(peers=dict(b=SMALL))
    other = copy.deepcopy(model)
    pixels = dict(tiny.PIXELS, mean=[0.0] * 3, std=[1.0] * 3)
    plain = dict(config=dict(model=tiny.retinanet(pixels=pixels)))
    raw = distilled(peers=dict(b=plain))
    raw.load_state_dict(other.state_dict())
    conv = raw.terms.p2p.peers['b'].backbone.conv1
    seen = []
    conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    raw.loss(*pictures)
    images, samples = pictures
    height, width = samples[1].img_shape
    std = torch.tensor(tiny.PIXELS['std'])[:, None, None]
    mean = torch.tensor(tiny.PIXELS['mean'])[:, None, None]
    torch.testing.assert_close(
        seen[0][1, :, :height, :width],
        images[1, :, :height, :width] * std + mean,
        rtol=1e-4,
        atol=1e-3,
    )


# What cannot be --------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(), 'nobody to learn from'),
        (dict(peers=dict(student=SMALL)), "cannot call a peer 'student'"),
        (dict(peers=dict(b=dict())), 'needs a config'),
        (dict(peers=dict(b=dict(confg=1))), "Did you mean 'config'"),
        (dict(teacher='bg'), "no teacher 'bg'"),
        (
            dict(peers=dict(b=dict(config=dict(model=tiny.faster_rcnn())))),
            'bbox_head',
        ),
        (
            dict(
                peers=dict(
                    b=dict(config=dict(model=tiny.retinanet(classes=5)))
                )
            ),
            'num_classes=3',
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        distilled(**settings)


def test_two_teachers_are_refused():
    with pytest.raises(ValueError, match='has one teacher'):
        PeersTerm(teacher='big', online_teacher=WIDE)


def test_images_without_labels_are_refused(model, pictures):
    images, samples = pictures
    del samples[1].gt_instances
    with pytest.raises(ValueError, match='unlabelled data'):
        model.loss(images, samples)


def test_everything_counts_without_boxes_too(model):
    found = parts(model, tiny.batch(boxes=0))
    assert all(one.isfinite() for one in found.values())


# Detectors of queries --------------------------------------------------------


def asked(kind='refine', others=('refine', 'refine'), **settings):
    """A student that asks, a peer and a teacher that learns."""
    peer, teacher = (
        dict(config=dict(model=detrs.detr(one, queries=count)))
        for one, count in zip(others, (12, 14))
    )
    model = tiny.build(
        tiny.distilled(
            detrs.detr(kind),
            {},
            dict(
                p2p=term(
                    peers=dict(b=peer), online_teacher=teacher, **settings
                )
            ),
        )
    )
    model.init_weights()
    for number, one in enumerate([model, *model.terms.p2p.peers.values()]):
        torch.manual_seed(number)
        for weight in one.bbox_head.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.1)
        one.backbone.norm_eval = True
        for layer in one.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0
            if isinstance(layer, torch.nn.MultiheadAttention):
                layer.dropout = 0
    return model.train()


@pytest.mark.parametrize('pairing', ['questions', 'answers'])
def test_peers_that_ask_hear_each_other_and_move_themselves(pictures, pairing):
    model = asked(pairing=pairing)
    found = parts(model, pictures)
    assert {*found} == {
        'b_task',
        'teacher_task',
        *(
            f'{one}_{kind}'
            for one in ('student', 'b')
            for kind in ('teacher', 'peers')
        ),
    }
    assert all(one.isfinite() and one > 0 for one in found.values())
    for key, one in found.items():
        model.zero_grad()
        one.backward(retain_graph=True)
        assert grads(model) == {key.split('_')[0]}


def test_what_peers_ask_is_asked_in_each_layer(pictures):
    model = asked(temperature=2.0, box_weight=3.0)
    kept = []
    model.terms.p2p.register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    found = parts(model, pictures)
    other = model.terms.p2p.peers.b
    with recording(other, [DECODER, HEAD]) as record:
        other.loss(*copy.deepcopy(pictures))
    own = ask(kept[0].student, question(record))
    cls, l1, giou = answer_distances(
        own, answers(record), confidence(answers(record)), 2.0
    ).values()
    torch.testing.assert_close(
        found['student_peers'], cls + 3 * (5 * l1 + 2 * giou)
    )


def test_the_order_of_a_peers_queries_changes_nothing(pictures):
    for pairing in ('questions', 'answers'):
        model = asked(pairing=pairing)
        plain = parts(model, pictures, 'peers')
        torch.manual_seed(0)
        detrs.reorder(model.terms.p2p.peers.b, torch.randperm(12))
        for key, one in parts(model, pictures, 'peers').items():
            torch.testing.assert_close(one, plain[key], rtol=1e-3, atol=1e-4)


def test_identical_peers_that_ask_have_nothing_to_say(pictures):
    model = asked()
    plain = {
        key: one
        for key, one in model.state_dict().items()
        if not key.startswith('terms.')
    }
    model.terms.p2p.peers.b.load_state_dict(plain)
    for one in parts(model, pictures, 'peers').values():
        assert one < 1e-4


def test_peers_of_other_kinds_are_matched_by_answers(pictures):
    with pytest.raises(ValueError, match="Set pairing='answers'"):
        asked('dab')
    found = parts(
        asked('dab', ('detr', 'refine'), pairing='answers'), pictures
    )
    assert all(one.isfinite() for one in found.values())


def test_peers_without_queries_are_refused_among_those_with():
    settings = dict(peers=dict(b=SMALL))
    with pytest.raises(ValueError, match="peer 'b', RetinaNet, has none"):
        tiny.build(
            tiny.distilled(detrs.detr('dab'), {}, dict(p2p=term(**settings)))
        )
    with pytest.raises(ValueError, match="pairing 'index'"):
        PeersTerm(**settings, pairing='index')

import copy

import detrs
import pytest
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint
from torchvision.ops import batched_nms

from mmkd.detectors.peer_ensemble import (
    best_in,
    export_peer,
    fuse_boxes,
    main,
    students_in,
)

SMALL = dict(config=dict(model=tiny.retinanet()))
WIDE = dict(config=dict(model=tiny.retinanet(base=16)))


@pytest.fixture(scope='module')
def trained():
    """A student, a wider peer and a teacher, as they are after a training."""
    model = tiny.build(
        tiny.distilled(
            tiny.retinanet(),
            {},
            dict(
                p2p=dict(
                    type='mmkd.PeersTerm',
                    peers=dict(b=WIDE),
                    online_teacher=SMALL,
                )
            ),
        )
    )
    for number, one in enumerate([model, *model.terms.p2p.peers.values()]):
        torch.manual_seed(number)
        torch.nn.init.normal_(one.bbox_head.retina_cls.weight, std=0.2)
    model.terms.p2p.merit.copy_(torch.tensor([0.5, 0.25]))
    return model.eval()


@pytest.fixture
def file(trained, tmp_path):
    path = tmp_path / 'epoch_12.pth'
    meta = dict(dataset_meta=dict(classes=('a', 'b', 'c')))
    torch.save(dict(state_dict=trained.state_dict(), meta=meta), path)
    return path


def ensemble(**settings):
    return tiny.build(
        dict(
            type='mmkd.PeerEnsemble',
            students=dict(student=SMALL, b=WIDE),
            **settings,
        )
    ).eval()


def predictions(model):
    images, samples = tiny.batch()
    with torch.no_grad():
        found = model.predict(images, copy.deepcopy(samples))
    return [one.pred_instances for one in found]


def assert_same(found, wanted):
    for one, other in zip(found, wanted):
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(one[key], other[key])


# One of them -----------------------------------------------------------------


def test_the_training_loads_in_the_students_plain_config(trained, file):
    plain = tiny.build(tiny.retinanet(), seed=9).eval()
    load_checkpoint(plain, str(file))
    assert_same(predictions(plain), predictions(trained))


def test_the_best_has_the_lowest_detection_loss(trained):
    state = dict(trained.state_dict())
    assert list(students_in(state)) == ['student', 'b']
    assert best_in(state) == 'b'
    state['terms.p2p.merit'] = torch.tensor([0.1, 0.2])
    assert best_in(state) == 'student'


@pytest.mark.parametrize(
    ('peer', 'name', 'base'),
    [('best', 'b', 16), ('b', 'b', 16), ('student', 'student', 8)],
)
def test_an_exported_student_is_plain_and_says_the_same(
    trained, file, tmp_path, peer, name, base
):
    target = tmp_path / 'plain.pth'
    assert export_peer(file, target, peer) == name
    plain = tiny.build(tiny.retinanet(base=base), seed=9).eval()
    saved = torch.load(target, weights_only=True)
    plain.load_state_dict(saved['state_dict'], strict=True)
    assert saved['meta']['dataset_meta']['classes'] == ('a', 'b', 'c')
    own = trained.terms.p2p.peers['b'] if name == 'b' else trained
    assert_same(predictions(plain), predictions(own))


def test_a_misspelt_peer_is_told(file, tmp_path):
    with pytest.raises(ValueError, match="has no student 'c'"):
        export_peer(file, tmp_path / 'x.pth', 'c')


def test_a_training_without_peers_is_told(tmp_path, capsys):
    path = tmp_path / 'plain.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), path)
    assert main([str(path), str(tmp_path / 'x.pth')]) == 1
    assert 'one PeersTerm' in capsys.readouterr().err


def test_the_command_says_whom_it_wrote(file, tmp_path, capsys):
    target = tmp_path / 'x.pth'
    assert main([str(file), str(target)]) == 0
    assert capsys.readouterr().out == f'{target}: b\n'


def test_a_file_that_is_there_stays_unless_told(file, tmp_path, capsys):
    target = tmp_path / 'x.pth'
    target.write_text('mine')
    assert main([str(file), str(target)]) == 1
    assert '--overwrite' in capsys.readouterr().err
    assert target.read_text() == 'mine'
    assert main([str(file), str(target), '--overwrite']) == 0


# All of them -----------------------------------------------------------------


@pytest.mark.parametrize('how', ['nms', 'wbf'])
def test_they_answer_together(trained, file, how):
    model = ensemble(fuse=how, iou_threshold=0.4, max_per_img=12)
    load_checkpoint(model, str(file))
    own, peer = (
        predictions(one) for one in (trained, trained.terms.p2p.peers['b'])
    )
    for found, one, other in zip(predictions(model), own, peer):
        boxes, scores, labels = fuse_boxes(
            [one.bboxes, other.bboxes],
            [one.scores, other.scores],
            [one.labels, other.labels],
            how,
            0.4,
        )
        assert torch.equal(found.bboxes, boxes[:12])
        assert torch.equal(found.scores, scores[:12])
        assert torch.equal(found.labels, labels[:12])


def test_its_own_checkpoint_loads_as_well(trained, file):
    model, other = ensemble(), ensemble()
    load_checkpoint(model, str(file))
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same(predictions(other), predictions(model))


def test_equal_students_fused_by_nms_are_one_of_them():
    model = tiny.build(
        dict(type='mmkd.PeerEnsemble', students=dict(a=SMALL, b=SMALL))
    ).eval()
    one = model.students['a']
    model.students['b'].load_state_dict(one.state_dict())
    assert_same(predictions(model), predictions(one))


def test_detectors_of_queries_answer_together():
    """Who asks one and the same of itself twice has the answers once."""
    one = dict(config=dict(model=detrs.detr('dab')))
    model = tiny.build(
        dict(type='mmkd.PeerEnsemble', students=dict(student=one, b=one))
    ).eval()
    first, second = model.students.values()
    second.load_state_dict(first.state_dict())
    (found, _), (alone, _) = predictions(model), predictions(first)
    kept = batched_nms(alone.bboxes, alone.scores, alone.labels, 0.5)
    assert len(kept)
    for key in ('bboxes', 'scores', 'labels'):
        assert torch.equal(found[key], alone[key][kept])


def test_losses_are_those_of_every_student():
    model = ensemble()
    found = model.loss(*tiny.batch())
    own = model.students['b'].loss(*tiny.batch())
    assert set(found) == {
        f'{name}_{key}' for name in ('student', 'b') for key in own
    }
    torch.testing.assert_close(
        tiny.total({'loss': found['b_loss_cls']}),
        tiny.total({'loss': own['loss_cls']}),
    )


def test_a_student_that_is_not_in_the_checkpoint_is_told(trained):
    model = tiny.build(
        dict(type='mmkd.PeerEnsemble', students=dict(student=SMALL, d=WIDE))
    )
    with pytest.raises(ValueError, match="no student 'd'"):
        model.load_state_dict(trained.state_dict())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(fuse='nmss'), "Did you mean 'nms'"),
        (dict(iou_threshold=2), 'between 0 and 1'),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ensemble(**settings)


def test_an_ensemble_of_nobody_is_refused():
    with pytest.raises(ValueError, match='at least one student'):
        MODELS.build(dict(type='mmkd.PeerEnsemble', students={}))


# Boxes brought together ------------------------------------------------------

A = [0.0, 0, 10, 10]
NEAR_A = [0.0, 0, 10, 14]
FAR = [50.0, 50, 60, 60]


def fuse(boxes, scores, labels=None, **settings):
    """Of two detectors, which take turns."""
    labels = [0] * len(boxes) if labels is None else labels
    turns = [slice(start, None, 2) for start in range(2)]
    return fuse_boxes(
        [torch.tensor(boxes).view(-1, 4)[turn] for turn in turns],
        [torch.tensor(scores)[turn] for turn in turns],
        [torch.tensor(labels, dtype=torch.long)[turn] for turn in turns],
        **settings,
    )


def test_nms_keeps_the_best_as_it_is():
    boxes, scores, _ = fuse([A, NEAR_A, FAR], [0.5, 0.8, 0.3])
    assert boxes.tolist() == [NEAR_A, FAR]
    assert scores.tolist() == pytest.approx([0.8, 0.3])


def test_fused_boxes_are_means_by_score():
    boxes, scores, _ = fuse([A, NEAR_A], [0.6, 0.2], how='wbf')
    # (0.6 * 10 + 0.2 * 14) / 0.8
    assert boxes[0].tolist() == pytest.approx([0, 0, 10, 11])
    assert scores.tolist() == pytest.approx([0.4])


def test_what_one_of_two_has_seen_counts_half():
    _, scores, _ = fuse([A, A, FAR], [0.9, 0.7, 0.9], how='wbf')
    assert scores.tolist() == pytest.approx([0.8, 0.45])


def test_more_boxes_than_detectors_are_averaged():
    _, scores, _ = fuse([A] * 4, [0.8, 0.6, 0.4, 0.2], how='wbf')
    assert scores.tolist() == pytest.approx([0.5])


@pytest.mark.parametrize('how', ['nms', 'wbf'])
def test_classes_are_apart(how):
    boxes, _, labels = fuse([A, A], [0.6, 0.4], [2, 1], how=how)
    assert boxes.tolist() == [A, A]
    assert labels.tolist() == [2, 1]


def test_the_threshold_says_what_is_the_same():
    assert len(fuse([A, NEAR_A], [0.6, 0.2], iou_threshold=0.7)[0]) == 1
    assert len(fuse([A, NEAR_A], [0.6, 0.2], iou_threshold=0.8)[0]) == 2


def test_the_best_comes_first():
    _, scores, labels = fuse(
        [A, FAR, FAR], [0.9, 0.6, 0.8], [3, 4, 4], how='wbf'
    )
    assert labels.tolist() == [4, 3]  # both have seen the far one
    assert scores.tolist() == pytest.approx([0.7, 0.45])


@pytest.mark.parametrize('how', ['nms', 'wbf'])
def test_nothing_stays_nothing(how):
    boxes, scores, labels = fuse([], [], how=how)
    assert (len(boxes), len(scores), len(labels)) == (0, 0, 0)


def test_a_box_without_an_area_is_left_out():
    flat = [3.0, 3, 3, 9]
    boxes, _, _ = fuse([A, flat], [0.6, 0.9], how='wbf')
    assert boxes.tolist() == [A]

"""Teachers of other class lists teach what both know, by name."""

from __future__ import annotations

import copy
from functools import partial

import detrs
import families
import pytest
import rois
import tiny
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmkd.classes import pick_classes, with_classes
from mmkd.ops.boxes import giou_error
from mmkd.registry import DETECTORS
from mmkd.taps import maps_of, recording
from mmkd.teachers import Teacher, run_detector

#: Of the data, and of a teacher that knows more of them.
OWN = ('cat', 'dog', 'cow')
MORE = ('yak', 'cow', 'cat', 'emu', 'dog')
PLACES = [MORE.index(name) for name in OWN]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture
def save(tmp_path):
    def save(detector, names, name='teacher'):
        file = tmp_path / f'{name}.pth'
        meta = dict(dataset_meta=dict(classes=names))
        torch.save(dict(state_dict=detector.state_dict(), meta=meta), file)
        return str(file)

    return save


@pytest.fixture
def loaded(save):
    """A detector and the teacher that was cut from it."""

    def loaded(model, names, classes=OWN):
        whole = tiny.lively(model)
        teacher = Teacher(
            dict(model=model), save(whole, names), classes=classes
        )
        teacher.load()
        return whole, teacher

    return loaded


def finding(config, count):
    """Settings by which so many boxes of an image are found."""
    if isinstance(config, dict):
        most = dict.fromkeys(('max_per_img', 'nms_pre', 'topk'), count)
        return type(config)(
            {k: most.get(k, finding(one, count)) for k, one in config.items()}
        )
    if isinstance(config, (list, tuple)):
        return type(config)(finding(one, count) for one in config)
    return config


def predicted(detector):
    """What mmdet makes of a batch, an image after the other."""
    images, samples = tiny.batch()
    for one in samples:
        one.gt_instances = InstanceData()
    found = detector.predict(images, samples, rescale=False)
    return [one.pred_instances for one in found]


# The teacher is cut ----------------------------------------------------------

FAMILIES = dict(
    retinanet=tiny.retinanet,
    tood=families.tood,
    yolox=families.yolox,
    rtmdet=families.rtmdet,
    yolov3=families.yolov3,
    faster_rcnn=tiny.faster_rcnn,
    mask_rcnn=families.mask_rcnn,
    condinst=families.condinst,
    solo=families.solo,
    detr=partial(detrs.detr, 'detr'),
    deformable=partial(detrs.detr, 'deformable'),
    dino=detrs.detr,
)


def described(found, place):
    """Each object as a row: score, class, box and area of its mask."""
    rows = [found.scores[:, None], 1000 * place[found.labels][:, None]]
    rows.append(found.bboxes)
    if 'masks' in found:
        rows.append(found.masks.flatten(1).sum(1, keepdim=True))
    return torch.cat([one.double() for one in rows], 1)


@pytest.mark.parametrize('family', FAMILIES)
def test_in_another_order_a_teacher_finds_the_same(family, loaded):
    """By mmdet's own post-processing; every class has another place."""
    names = ('cow', 'cat', 'dog')
    model = FAMILIES[family]()
    if 'num_queries' not in model:
        # All, as those of one score may be cut at any place.
        count = 100 if family in ('mask_rcnn', 'condinst') else 2000
        model['test_cfg'] = finding(model['test_cfg'], count)
    whole, teacher = loaded(model, names)
    place = torch.tensor([OWN.index(name) for name in names])
    for one, other in zip(predicted(whole), predicted(teacher.detector)):
        assert len(one) == len(other) > 0
        found = described(one, place), described(other, torch.arange(3))
        apart = torch.cdist(
            *found, compute_mode='donot_use_mm_for_euclid_dist'
        )
        assert apart.amin(0).max() < 0.01
        assert apart.amin(1).max() < 0.01


def head_maps(detector, output=0):
    images, samples = tiny.batch()
    with torch.no_grad(), recording(detector, ['bbox_head']) as record:
        run_detector(detector, images, samples)
    return maps_of(record.at('bbox_head'), 'The head', output)


def three_shapes(classes=5):
    model = tiny.retinanet(classes=classes)
    model.bbox_head.anchor_generator.ratios = [0.5, 1.0, 2.0]
    return model


def test_a_teacher_of_more_classes_loses_their_channels(loaded):
    whole, teacher = loaded(three_shapes(), MORE)
    assert teacher.detector.bbox_head.num_classes == 3
    for one, other in zip(head_maps(whole), head_maps(teacher.detector)):
        for anchor in range(3):
            for own, place in enumerate(PLACES):
                torch.testing.assert_close(
                    other[:, 3 * anchor + own], one[:, 5 * anchor + place]
                )
    boxes = head_maps(whole, 1), head_maps(teacher.detector, 1)
    torch.testing.assert_close(*boxes)


def test_a_softmax_is_that_of_what_is_left(loaded):
    """Given that an object is of none of the classes left out."""
    whole, teacher = loaded(with_classes(families.ssd(), 5), MORE)
    kept = [*PLACES, 5]
    for one, other in zip(head_maps(whole), head_maps(teacher.detector)):
        every = one.unflatten(1, (-1, 6)).softmax(2)
        left = other.unflatten(1, (-1, 4)).softmax(2)
        expected = every[:, :, kept]
        expected = expected / expected.sum(2, keepdim=True)
        torch.testing.assert_close(left, expected)


def test_boxes_of_a_second_stage_go_with_their_class(loaded):
    whole, teacher = loaded(with_classes(rois.mask(), 5), MORE)
    one, other = whole.roi_head, teacher.detector.roi_head
    for kind in ('weight', 'bias'):
        for own, place in enumerate([*PLACES, 5]):
            assert torch.equal(
                getattr(other.bbox_head.fc_cls, kind)[own],
                getattr(one.bbox_head.fc_cls, kind)[place],
            )
        for own, place in enumerate(PLACES):
            assert torch.equal(
                getattr(other.bbox_head.fc_reg, kind)[4 * own : 4 * own + 4],
                getattr(one.bbox_head.fc_reg, kind)[4 * place : 4 * place + 4],
            )
            assert torch.equal(
                getattr(other.mask_head.conv_logits, kind)[own],
                getattr(one.mask_head.conv_logits, kind)[place],
            )


def test_what_is_not_of_classes_is_the_file_s(loaded):
    whole, teacher = loaded(tiny.faster_rcnn(classes=5), MORE)
    cut = teacher.detector.state_dict()
    for key, value in whole.state_dict().items():
        if not key.startswith('roi_head.bbox_head.fc_'):
            assert torch.equal(cut[key], value), key


def test_cutting_draws_nothing(save):
    file = save(tiny.lively(three_shapes()), MORE)
    teacher = Teacher(dict(model=three_shapes()), file, classes=OWN)
    before = torch.get_rng_state()
    teacher.load()
    assert torch.equal(torch.get_rng_state(), before)


# What is compared ------------------------------------------------------------


def small_steps(model, terms, teacher, seed=1):
    """Losses and gradients of a student taught by a teacher."""
    student = tiny.build(
        tiny.distilled(copy.deepcopy(model), dict(big=teacher), terms), seed
    )
    torch.manual_seed(3)
    for name, one in student.named_parameters():
        if one.ndim > 1 and 'head' in name:
            one.data.normal_(std=one[0].numel() ** -0.5)
    student.teachers.load()
    torch.manual_seed(0)
    losses = student.loss(*rois.batch(shapes=((tiny.SIZE,) * 2,)))
    tiny.total(losses).backward()
    shares = {key: value for key, value in losses.items() if 'loss_kd' in key}
    grads = {
        key: one.grad
        for key, one in student.named_parameters()
        if one.grad is not None
    }
    return shares, grads


def term(kind, **more):
    return dict(type=f'mmkd.{kind}', teacher='big', **more)


SCORES = term(
    'FeatureTerm',
    tap='bbox_head',
    output=0,
    loss=dict(type='mmkd.SoftTargetLoss', num_classes=3),
)
DENSE = dict(
    scores=SCORES,
    cwd=dict(SCORES, loss=dict(type='mmkd.CWDLoss')),
    dkd=dict(SCORES, loss=dict(type='mmkd.DKDLoss', num_classes=3)),
    boxes=term('BoxTerm'),
    cross=term('CrossHeadTerm', convs=1),
    objects=term('InstanceTerm'),
    weighed=term(
        'FeatureTerm',
        loss=dict(type='mmkd.WeightedMSELoss'),
        weight=dict(type='mmkd.DisagreementWeight'),
    ),
)
ORDERED = ('scores', 'boxes', 'cross', 'objects', 'weighed')
STAGES = dict(
    proposals=term('ProposalTerm', box_weight=1.0), masks=term('MaskTerm')
)


def reordered(detector, names, order):
    """The same detector, its classes in another order by hand."""
    order = [names.index(name) for name in order]
    other, count = copy.deepcopy(detector), len(names)
    for name, one in other.named_parameters():
        if 'retina_cls' in name:
            groups = one.data.unflatten(0, (-1, count))
            one.data = groups[:, order].flatten(0, 1)
        elif 'fc_cls' in name:
            one.data = one.data[[*order, count]]
        elif 'fc_reg' in name:
            groups = one.data.unflatten(0, (count, 4))
            one.data = groups[order].flatten(0, 1)
        elif 'conv_logits' in name:
            one.data = one.data[order]
    return other


@pytest.mark.parametrize(
    ('model', 'terms'),
    [
        *((three_shapes(3), {name: DENSE[name]}) for name in ORDERED),
        *((rois.mask(), {name: STAGES[name]}) for name in STAGES),
    ],
    ids=[*ORDERED, *STAGES],
)
def test_the_order_of_a_teacher_s_classes_changes_nothing(model, terms, save):
    """No loss and no gradient, though its weights and names are permuted."""
    detector = tiny.lively(model)
    names = ('cow', 'cat', 'dog')
    other = reordered(detector, OWN, names)
    config = dict(model=model)
    one, like = (
        small_steps(model, terms, dict(config=config, **teacher))
        for teacher in (
            dict(checkpoint=save(detector, OWN)),
            dict(checkpoint=save(other, names, 'other'), classes=OWN),
        )
    )
    for given, found in zip(one, like):
        assert given.keys() == found.keys()
        for key, value in given.items():
            torch.testing.assert_close(found[key], value, msg=key)
    unlike, _ = small_steps(
        model, terms, dict(config=config, checkpoint=save(other, names))
    )
    cross = 'cross' in terms  # the teacher's own head says both
    assert (unlike != one[0]) or cross


def test_classes_that_a_teacher_has_besides_change_nothing(save):
    """It is the teacher without their channels."""
    few = tiny.lively(three_shapes(3))
    more = tiny.lively(three_shapes(5))
    for name, one in more.named_parameters():
        small = few.get_parameter(name).data
        if 'retina_cls' in name:
            groups = one.data.unflatten(0, (3, 5))
            groups[:, PLACES] = small.unflatten(0, (3, 3))
        else:
            one.data = small.clone()
    terms = {name: DENSE[name] for name in ('scores', 'cwd', 'dkd')}
    found = [
        small_steps(
            three_shapes(3), terms, dict(config=dict(model=model), **teacher)
        )
        for model, teacher in (
            (three_shapes(3), dict(checkpoint=save(few, OWN, 'few'))),
            (
                three_shapes(5),
                dict(checkpoint=save(more, MORE, 'more'), classes=OWN),
            ),
        )
    ]
    for given, like in zip(*found):
        for key, value in given.items():
            torch.testing.assert_close(like[key], value, msg=key)


# A teacher that lacks some ---------------------------------------------------

#: Of the student's classes the second is unknown to the teacher.
LACKS = ('cow', 'cat', 'emu')
SOME = ('cat', None, 'cow')


def raw(model, terms, save, names=LACKS, classes=SOME):
    """A student in its first step, and the shares of its terms."""
    teacher = dict(
        config=dict(model=model),
        checkpoint=save(tiny.lively(model), names),
        classes=classes,
    )
    student = tiny.build(
        tiny.distilled(copy.deepcopy(model), dict(big=teacher), terms), 1
    )
    student.teachers.load()
    return student


def test_only_what_both_know_is_compared(save):
    """The mean error of scores, by hand; the third class gets no gradient."""
    loss = dict(type='mmkd.MimicLoss', loss_weight=1.0)
    model = three_shapes(3)
    student = raw(model, dict(x=dict(SCORES, loss=loss)), save)
    images, samples = tiny.batch(shapes=((128, 128),) * 2)
    share = student.loss(images, samples)['loss_kd_x']
    own = student.bbox_head(student.extract_feat(images))[0]
    other = head_of_file = tiny.lively(model)
    with torch.no_grad():
        other = head_of_file.bbox_head(head_of_file.extract_feat(images))[0]
    expected = 0
    for one, like in zip(own, other):
        one, like = (x.unflatten(1, (3, 3)) for x in (one, like))
        # cat and cow, of the student's order and of the teacher's.
        expected += F.mse_loss(one[:, :, [0, 2]], like[:, :, [1, 0]])
    torch.testing.assert_close(share, expected)
    share.backward()
    grad = student.bbox_head.retina_cls.bias.grad.unflatten(0, (3, 3))
    assert (grad[:, 1] == 0).all()
    assert (grad[:, [0, 2]] != 0).all()


def test_a_background_is_compared_too(save):
    model = families.ssd()
    loss = dict(
        type='mmkd.SoftTargetLoss',
        num_classes=3,
        activation='softmax',
        weight_by='uniform',
    )
    student = raw(model, dict(x=dict(SCORES, loss=loss)), save)
    share = student.loss(*tiny.batch(shapes=((128, 128),) * 2))['loss_kd_x']
    share.backward()
    grads = [
        one.bias.grad.unflatten(0, (-1, 4)).abs().sum(0)
        for one in (layer[-1] for layer in student.bbox_head.cls_convs)
    ]
    assert all((one[1] == 0) and (one[[0, 2, 3]] > 0).all() for one in grads)


def test_proposals_of_an_unknown_class_are_background(save):
    """Scores by hand; boxes of the known classes alone."""
    model = tiny.faster_rcnn()
    terms = dict(x=term('ProposalTerm', box_weight=1.0, decoupled=False))
    student = raw(model, terms, save)
    step = {}
    call = student.terms.x.forward
    student.terms.x.forward = lambda one: (
        step.setdefault('it', one) and call(one)
    )
    losses = student.loss(*tiny.batch())
    seen = student.terms.x.seen(step['it'])
    given = student.terms.x.judge(step['it'], seen['rois'])
    own = seen['cls_score'][:, [0, 2, 3]].log_softmax(1)
    other = given['cls_score'].log_softmax(1)  # cat, cow, background
    expected = (other.exp() * (other - own)).sum(1).mean()
    torch.testing.assert_close(losses['loss_kd_x_cls'], expected)

    head = student.teachers['big'].detector.roi_head.bbox_head
    labels = seen['bbox_targets'][0]
    errors = []
    for row, label in enumerate(labels.tolist()):
        if label not in (0, 2):
            continue
        place = (0, 2).index(label)
        roi = seen['rois'][row : row + 1, 1:]
        boxes = [
            coder.decode(roi, deltas[row : row + 1, 4 * at : 4 * at + 4])
            for coder, deltas, at in (
                (head.bbox_coder, seen['bbox_pred'], label),
                (head.bbox_coder, given['bbox_pred'], place),
            )
        ]
        errors.append(giou_error(*boxes))
    assert errors
    torch.testing.assert_close(
        losses['loss_kd_x_box'], torch.cat(errors).mean()
    )


def test_labels_are_those_of_the_classes_that_are_compared(save):
    """A cell of an object that the teacher does not know has no label."""
    seen = []
    model = three_shapes(3)
    terms = dict(x=dict(SCORES, loss=dict(type='mmkd.DKDLoss', num_classes=2)))
    student = raw(model, terms, save)
    loss = student.terms.x.losses[0]
    whole = loss.forward
    loss.forward = lambda *one: seen.append(one[2].labels) or whole(*one)
    images, samples = tiny.batch()
    student.loss(images, samples)
    labels = torch.cat([one.gt_instances.labels for one in samples]).tolist()
    assert seen[0].tolist() == [{0: 0, 1: -1, 2: 1}[one] for one in labels]
    assert -1 in seen[0], 'or nothing is tried'


# Mistakes --------------------------------------------------------------------


@pytest.mark.parametrize('name', ['boxes', 'weighed'])
def test_terms_that_need_every_class_say_so(name, save):
    with pytest.raises(ValueError, match='compares all classes') as caught:
        raw(three_shapes(3), {name: DENSE[name]}, save)
    assert "2 of the student's 3" in str(caught.value)
    assert "tap='neck'" in str(caught.value)
    group = dict(g=dict(type='mmkd.BalancedTerm', terms={name: DENSE[name]}))
    with pytest.raises(ValueError, match='compares all classes'):
        raw(three_shapes(3), group, save)


def test_terms_on_features_and_boxes_do_not_care(save):
    loss = dict(type='mmkd.MimicLoss')
    terms = dict(
        neck=term('FeatureTerm', loss=loss),
        box=term(
            'BoxTerm',
            weight=dict(type='mmkd.PositiveWeight'),
            normalise_by='weight',
        ),
    )
    shares = raw(three_shapes(3), terms, save).loss(*tiny.batch())
    assert shares['loss_kd_neck'] > 0
    assert shares['loss_kd_box'] > 0


def test_a_list_of_another_length_is_refused_at_once(save):
    with pytest.raises(ValueError, match='student has 3 and .*big.* 2'):
        raw(three_shapes(3), dict(x=SCORES), save, classes=('cat', 'cow'))


def test_a_name_that_the_file_does_not_have_gets_the_nearest(save):
    with pytest.raises(ValueError, match=r"'catt'.*'cat'"):
        raw(
            three_shapes(3),
            dict(x=SCORES),
            save,
            classes=('catt', None, 'cow'),
        )


def test_a_file_without_names_cannot_be_cut(save):
    with pytest.raises(ValueError, match='names none'):
        raw(three_shapes(3), dict(x=SCORES), save, names=None)


def test_a_file_of_other_classes_than_its_config_is_refused(save):
    model, other = three_shapes(3), ('a', 'cat', 'cow', 'b')
    with pytest.raises(ValueError, match=r'names 4 classes, .* \[3\]'):
        raw(model, dict(x=SCORES), save, names=other)


def test_a_detector_whose_heads_cannot_be_cut_is_refused(save):
    """One that states its classes otherwise than by num_classes."""

    class Fixed(DETECTORS.get('RetinaHead')):
        def __init__(self, *args, **settings):
            settings['num_classes'] = 3
            super().__init__(*args, **settings)

    model = tiny.retinanet(classes=5)
    model.bbox_head.type = Fixed
    with pytest.raises(ValueError, match=r'cannot be cut to 2 .* \[3\]'):
        Teacher(ConfigDict(model=model), classes=('cat', 'dog'))


def test_weights_of_an_unknown_order_are_refused():
    weights, more = (dict(x=torch.zeros(one)) for one in (14, 15))
    with pytest.raises(ValueError, match=r'^It: its x has 14 .* 5 classes'):
        pick_classes('It', weights, more, 5, [0])


@pytest.fixture
def known(monkeypatch):
    """Says which classes the data has."""

    def known(names):
        place = 'mmkd.distillers.distiller.training_classes'
        monkeypatch.setattr(place, lambda: names)

    return known


def test_names_that_the_config_pairs_may_differ(save, known):
    """The teacher says kitty for cat; nobody else could know."""
    known(OWN)
    names = ('cow', 'kitty', 'dog')
    student = raw(
        three_shapes(3), dict(x=SCORES), save, names, ('kitty', 'dog', 'cow')
    )
    student.loss(*tiny.batch())


@pytest.mark.parametrize(
    'own',
    [('cow', 'dog', 'cat'), ('cat', 'dog'), ('cat', 'dog', 'cow', 'yak')],
)
def test_a_pairing_that_the_data_contradicts_stops_the_training(
    own, save, known
):
    known(own)
    student = raw(three_shapes(3), dict(x=SCORES), save)
    with pytest.raises(ValueError, match=r'has classes=.* of the data set'):
        student.loss(*tiny.batch())


@pytest.mark.parametrize(
    ('own', 'said'),
    [
        (('dog', 'cow', 'cat'), "classes=(None, 'cow', 'cat')"),
        (('a', 'b', 'c'), 'They share none'),
    ],
)
def test_without_a_pairing_the_message_says_what_to_type(
    own, said, save, known
):
    known(own)
    student = raw(three_shapes(3), dict(x=SCORES), save, classes=None)
    with pytest.raises(ValueError, match='first differ at 0') as caught:
        student.loss(*tiny.batch())
    assert said in str(caught.value)

"""What a teacher detects is what the student is trained on."""

from __future__ import annotations

import copy
from functools import partial

import detrs
import families
import heads
import one_term
import pytest
import rois
import tiny
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData

from mmkd.pixels import translate
from mmkd.recipes import look, recipe
from mmkd.structures import Step
from mmkd.structures.ground_truth import labelled
from mmkd.terms.predicted import PredictedBoxTerm

STUDENT = tiny.retinanet


@pytest.fixture
def build(tmp_path):
    """A student of one term, whose teacher finds objects of every class."""

    def build(student=None, teacher=None, names=None, **settings):
        other = (teacher or tiny.faster_rcnn)()
        more = {}
        for key in ('sham', 'classes'):
            if key in settings:
                more[key] = settings.pop(key)
        phases = settings.pop('phases', None)
        file = tmp_path / 'teacher.pth'
        meta = dict(dataset_meta=dict(classes=names)) if names else {}
        state = tiny.lively(other).state_dict()
        torch.save(dict(state_dict=state, meta=meta), file)
        model = tiny.build(
            tiny.distilled(
                (student or STUDENT)(),
                dict(
                    big=dict(
                        config=dict(model=other), checkpoint=str(file), **more
                    )
                ),
                dict(
                    x=dict(type='mmkd.PredictedBoxTerm', teacher='big')
                    | settings
                ),
                **({} if phases is None else dict(phases=phases)),
            ),
            1,
        )
        model.teachers.load()
        return model.train()

    return build


def watched(model):
    """The step that the term is given, and what it found there."""
    seen = {}
    forward = model.terms.x.forward

    def watch(step):
        seen['step'] = step
        seen['found'] = model.terms.x.found(step)
        return forward(step)

    model.terms.x.forward = watch
    return seen


def own_words(model, images, samples):
    """What the teacher makes of a batch, from the images on."""
    teacher = model.teachers['big']
    shapes = [one.img_shape for one in samples]
    images = translate(images, shapes, model._pixels, teacher.pixels)
    samples = [one.new() for one in samples]
    for one in samples:
        one.set_metainfo(dict(ori_shape=one.img_shape))
    with torch.no_grad():
        found = teacher.detector.predict(images, samples, rescale=False)
    found = [one.pred_instances for one in found]
    for one, (height, width) in zip(found, shapes):
        for side, most in enumerate((width, height, width, height)):
            one.bboxes[:, side].clamp_(0, most)
    return found


def loss_of(model, images, samples, found, seed=0):
    """The plain student's loss on what was found, and its gradients."""
    plain = copy.deepcopy(model)
    plain.__class__ = model.student_class
    own = []
    for sample, (boxes, labels) in zip(samples, found):
        one = sample.new()
        one.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        own.append(one)
    torch.manual_seed(seed)
    return plain, tiny.total(plain.loss(images, own))


@pytest.fixture
def small(monkeypatch):
    """Boxes of any size, as teachers of random weights find them."""
    monkeypatch.setattr('mmkd.terms.predicted.PIXEL', -1000)


# The boxes -------------------------------------------------------------------

TEACHERS = dict(
    faster=tiny.faster_rcnn,
    dino=detrs.detr,
    yolox=families.yolox,
    centernet=families.centernet,
)


@pytest.mark.parametrize('kind', TEACHERS)
def test_they_are_what_the_teacher_deploys(kind, build, small):
    """Its own post-processing, and of that the scores that suffice."""
    model = build(teacher=TEACHERS[kind], score_thr=0.0)
    images, samples = tiny.batch()
    for one in samples:
        one.set_metainfo(dict(border=(0, 128, 0, 128)))
    expected = own_words(model, images, samples)
    scores = torch.cat([one.scores for one in expected])
    model.terms.x.score_thr = float(scores.median())
    seen = watched(model)
    losses = model.loss(images, samples)
    number = 0
    for one, found in zip(expected, seen['found']):
        kept = [
            index
            for index, score in enumerate(one.scores.tolist())
            if score >= model.terms.x.score_thr
        ]
        number += len(kept)
        assert found.labels.tolist() == one.labels[kept].tolist()
        torch.testing.assert_close(found.bboxes, one.bboxes[kept])
        torch.testing.assert_close(found.scores, one.scores[kept])
    assert 0 < number < len(scores)
    assert losses['kd_x_found'] == number / 2


def test_labels_that_are_real_numbers_are_classes_as_well(build, small):
    """CrowdDet's head predicts such."""
    model = build(score_thr=0.0)
    detector = model.teachers['big'].detector
    plain = detector.predict

    def predict(*given, **settings):
        found = plain(*given, **settings)
        for one in found:
            one.pred_instances.labels = one.pred_instances.labels.float()
        return found

    def found(step):
        seen.append(model.terms.x.found(step))
        return step.images.new_zeros(())

    seen, model.terms.x.forward = [], found
    model.loss(*tiny.batch())
    detector.predict = predict
    model.loss(*tiny.batch())
    for one, other in zip(*seen, strict=True):
        assert len(one) > 0
        assert other.labels.dtype == torch.int64
        assert torch.equal(one.labels, other.labels)


def test_heads_that_take_one_image_are_asked_one_by_one(build, small):
    """Guided anchors are made by convolutions that mask one image."""
    model = build(teacher=families.guided, score_thr=0.0)
    images, samples = tiny.batch()
    expected = [
        own_words(model, images[index : index + 1], samples[index : index + 1])
        for index in range(len(samples))
    ]
    seen = watched(model)
    model.loss(images, samples)
    for (one,), found in zip(expected, seen['found'], strict=True):
        assert len(one) > 0
        torch.testing.assert_close(
            found.bboxes, one.bboxes, rtol=1e-4, atol=1e-3
        )
        torch.testing.assert_close(found.scores, one.scores)


def test_a_border_that_only_the_teacher_sees_moves_nothing(build, small):
    """Queries mask it, so the teacher is told how large its images are."""
    teacher = partial(detrs.detr, 'deformable')

    def padded():
        model = teacher()
        model.data_preprocessor = dict(tiny.PIXELS, pad_size_divisor=96)
        return model

    model = build(teacher=padded, score_thr=0.0)
    images, samples = tiny.batch()
    seen = watched(model)
    model.loss(images, samples)
    for one in samples:
        one.set_metainfo(dict(batch_input_shape=(192, 192)))
    for one, found in zip(own_words(model, images, samples), seen['found']):
        torch.testing.assert_close(found.bboxes, one.bboxes)
        torch.testing.assert_close(found.scores, one.scores)


def test_the_control_gets_the_boxes_of_another_image(build, small):
    model = build(score_thr=0.0, sham=True)
    images, samples = tiny.batch()
    shapes = [samples[1].img_shape, samples[0].img_shape]
    swapped = own_words(model, images.flip(0), samples[::-1])
    expected = [one.bboxes for one in swapped]
    for one, (height, width) in zip(expected, shapes[::-1]):
        for side, most in enumerate((width, height, width, height)):
            one[:, side].clamp_(0, most)
    seen = watched(model)
    model.loss(images, samples)
    for one, found in zip(expected, seen['found']):
        torch.testing.assert_close(found.bboxes, one)


def test_they_are_of_the_student_s_classes(build, small):
    """The teacher's first class is the student's third; one it lacks."""
    model = build(
        names=('cow', 'cat', 'yak'),
        classes=('cat', None, 'cow'),
        score_thr=0.0,
    )
    seen = watched(model)
    images, samples = tiny.batch()
    model.loss(images, samples)
    expected = own_words(model, images, samples)
    for one, found in zip(expected, seen['found']):
        assert set(found.labels.tolist()) <= {0, 2}
        assert found.labels.tolist() == [2 * x for x in one.labels.tolist()]


# The loss --------------------------------------------------------------------

STUDENTS = dict(
    retinanet=tiny.retinanet,
    faster=tiny.faster_rcnn,
    dino=detrs.detr,
)


@pytest.mark.parametrize('weight', [1.0, 0.25])
def test_it_is_the_student_s_own_on_these_boxes(build, weight):
    """Value and gradient, to the first layer, of a pass from the images on."""
    model = build(score_thr=0.2, loss_weight=weight)
    seen = watched(model)
    images, samples = tiny.batch()
    share = model.loss(images, samples)['loss_kd_x_task']
    found = [(one.bboxes, one.labels) for one in seen['found']]
    assert sum(len(boxes) for boxes, _ in found)
    plain, expected = loss_of(model, images, samples, found)
    torch.testing.assert_close(share, weight * expected)
    for detector, loss in ((model, share), (plain, weight * expected)):
        detector.zero_grad()
        loss.backward()
    for name, one in plain.named_parameters():
        if one.grad is not None and not name.startswith('terms'):
            like = model.get_parameter(name).grad
            torch.testing.assert_close(like, one.grad, msg=name)


@pytest.mark.parametrize('kind', STUDENTS)
def test_where_nothing_is_found_images_have_no_objects(kind, build):
    model = build(STUDENTS[kind], score_thr=1.0)
    images, samples = tiny.batch()
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    step = {}
    forward = model.terms.x.forward

    def watch(one):
        torch.manual_seed(0)
        step['share'] = forward(one)
        return step['share']

    model.terms.x.forward = watch
    losses = model.loss(images, samples)
    assert losses['kd_x_found'] == 0
    _, expected = loss_of(model, images, samples, [nothing] * 2)
    torch.testing.assert_close(step['share']['task'], expected.sum())


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        (tiny.faster_rcnn, detrs.detr),
        (detrs.detr, tiny.retinanet),
        (families.yolox, tiny.faster_rcnn),
        (partial(detrs.detr, 'detr'), partial(detrs.detr, 'deformable')),
    ],
    ids=lambda one: getattr(one, '__name__', 'detr'),
)
def test_any_detector_teaches_any_other(student, teacher, build):
    pair = look(dict(model=student()), dict(model=teacher()), 'big')
    (settings,) = recipe('predicted', pair).values()
    settings.pop('type'), settings.pop('teacher')
    model = build(student, teacher, **settings, score_thr=0.05)
    losses = model.loss(*tiny.batch())
    assert losses['kd_x_found'] > 0
    losses['loss_kd_x_task'].backward()
    grad = next(
        one for one in model.backbone.parameters() if one.ndim == 4
    ).grad
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_backbones_run_once(build):
    model = build(score_thr=0.2)
    calls = []
    for name, one in (('own', model), ('other', one_term.teacher_of(model))):
        forward = one.backbone.forward
        one.backbone.forward = lambda x, n=name, f=forward: (
            calls.append(n) or f(x)
        )
    model.loss(*tiny.batch())
    assert sorted(calls) == ['other', 'own']


def test_heads_remember_one_pass(build):
    """Batch normalisations of a head, as without the term."""
    model = build(families.rtmdet, score_thr=0.0)
    plain = copy.deepcopy(model)
    plain.__class__ = model.student_class
    images, samples = tiny.batch()
    plain.loss(images, samples)
    model.loss(images, samples)
    moved = 0
    for name, one in plain.named_buffers():
        if not name.startswith('terms'):
            assert torch.equal(model.get_buffer(name), one), name
            moved += 'bbox_head' in name and 'running_mean' in name
    assert moved, 'or the head has none'


def test_samples_are_left_alone(build):
    model = build(score_thr=0.0, union=True)
    images, samples = tiny.batch()
    before = copy.deepcopy(samples)
    model.loss(images, samples)
    for one, other in zip(samples, before):
        assert set(one.keys()) == set(other.keys())
        assert torch.equal(one.gt_instances.bboxes, other.gt_instances.bboxes)
        assert one.metainfo == other.metainfo


def test_labels_are_not_needed(build):
    """Of a phase without them, and of images without."""
    rest = [dict(length=1, supervised=False)]
    model = build(score_thr=0.2, phases=rest)
    images, samples = tiny.batch()
    expected = model.loss(images, samples)
    for one in samples:
        del one.gt_instances, one.ignored_instances
    torch.testing.assert_close(model.loss(images, samples), expected)
    assert list(expected) == ['loss_kd_x_task', 'kd_x_found']
    mixed = build(score_thr=0.2, union=True)
    _, samples = tiny.batch()
    del samples[0].gt_instances
    losses = mixed.loss(images, samples)
    assert losses['loss_kd_x_task'].isfinite()


@pytest.mark.parametrize('student', [tiny.retinanet, heads.atss])
def test_images_without_labels_are_learnt_as_they_are_packed(build, student):
    """Pipelines without labels pack ignored objects that have no boxes,
    which assigners read."""
    model = build(student, score_thr=0.2)
    images, samples = tiny.batch()
    expected = model.loss(images, samples)
    (own,) = (one for one in expected if one.startswith('loss_kd_x'))
    for one in samples[1:]:
        one.gt_instances = InstanceData()
        one.ignored_instances = InstanceData()
    found = model.loss(images, samples)
    torch.testing.assert_close(found[own], expected[own])


@pytest.mark.parametrize('sham', [False, True])
@pytest.mark.parametrize('bare', [1, 0])
def test_images_without_labels_alone(build, bare, sham):
    """As if the batch were that one; the other image is as it was."""
    model = build(score_thr=0.2, where='unlabelled', sham=sham)
    images, samples = tiny.batch()
    samples[bare].gt_instances = InstanceData()
    seen = watched(model)
    share = model.loss(images, samples)['loss_kd_x_task']
    place = [labelled(one) for one in seen['step'].samples].index(False)
    every = model.terms.x.found(seen['step'])
    found = every[place]
    assert not torch.equal(found.scores, every[1 - place].scores)
    only = slice(bare, bare + 1)
    _, expected = loss_of(
        model,
        images[only],
        samples[only],
        [(found.bboxes, found.labels)],
    )
    assert share.isfinite()
    torch.testing.assert_close(share, expected)


def test_where_all_have_labels_nothing_is_learnt_and_that_is_told(
    build, monkeypatch
):
    monkeypatch.setattr('mmkd.terms.predicted.PATIENCE', 2)
    model = build(score_thr=0.2, where='unlabelled')
    told = []
    monkeypatch.setattr(
        'mmkd.terms.predicted.print_log', lambda text, **_: told.append(text)
    )
    for _ in range(4):
        losses = model.loss(*tiny.batch())
        assert losses['loss_kd_x_task'] == 0
    (text,) = told
    assert "where='unlabelled' has learnt nothing in 2 steps" in text


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ValueError, match="where 'label'"):
        PredictedBoxTerm('big', where='label')


# What is annotated -----------------------------------------------------------


class Given:
    """Stands for a teacher that found what is written here."""

    size = None

    def __init__(self, boxes, labels, scores):
        self.detector = self
        one = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.tensor(labels),
            scores=torch.tensor(scores),
        )
        self.sample = type('Sample', (), dict(pred_instances=one))
        self.modules = list

    def at(self, path):
        return ()

    def predict(self, images, samples, rescale):
        return [self.sample]


def counted(found, union, **settings):
    """Boxes and labels that the student is trained on."""
    term = PredictedBoxTerm('big', union=union, **settings)
    term.shared, term.sham, term.masks = None, False, False
    term.their_path = 'neck'
    images, (sample,) = tiny.batch(shapes=((128, 128),), boxes=2)
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 40, 40], [60, 60, 100, 100]]),
        labels=torch.tensor([0, 1]),
    )
    sample.ignored_instances = InstanceData(
        bboxes=torch.tensor([[5.0, 5, 9, 9]]), labels=torch.tensor([0])
    )
    step = Step(
        None, images, [sample], teachers=dict(big=lambda *_: Given(*found))
    )
    (kept,) = term.found(step)
    own = term._labelled(sample, kept, images)
    ignored = own.ignored_instances.bboxes.tolist()
    assert ignored == [[5, 5, 9, 9]], 'they stay ignored'
    return own.gt_instances.bboxes.tolist(), own.gt_instances.labels.tolist()


FOUND = (
    [[0, 0, 40, 36], [0, 0, 40, 36], [0, 0, 40, 19], [2, 90, 30, 120]],
    [0, 1, 0, 2],
    [0.9, 0.8, 0.7, 0.2],
)


def test_boxes_of_a_score_that_suffices_are_labels():
    boxes, labels = counted(FOUND, union=False, score_thr=0.7)
    assert boxes == FOUND[0][:3]
    assert labels == [0, 1, 0]


def test_a_box_of_less_than_a_pixel_is_none():
    """Its logarithm would be no number."""
    boxes = [[0, 0, 0.9, 9], [0, 0, 9, 0.9], [5, 5, 6, 6], [8, 8, 8, 4]]
    found = boxes, [0] * 4, [0.9] * 4
    assert counted(found, union=False)[0] == [[5, 5, 6, 6]]


def test_a_box_on_an_annotated_one_of_its_class_is_left_out():
    """The first has 0.9 of it; the third 0.475, the second another class."""
    boxes, labels = counted(FOUND, union=True, score_thr=0.0)
    annotated = [[0, 0, 40, 40], [60, 60, 100, 100]]
    assert boxes == [*annotated, *FOUND[0][1:]]
    assert labels == [0, 1, 1, 0, 2]
    strict, _ = counted(FOUND, union=True, score_thr=0.0, iou_thr=0.4)
    assert strict == [*annotated, FOUND[0][1], FOUND[0][3]]


# Masks -----------------------------------------------------------------------


@pytest.mark.parametrize('union', [False, True])
def test_masks_are_labels_too(build, union):
    """Those of the teacher, padded as the batch is."""
    model = build(
        families.mask_rcnn, families.condinst, score_thr=0.0, union=union
    )
    seen = watched(model)
    given = []
    label = model.terms.x._labelled
    model.terms.x._labelled = lambda *one: (
        given.append(label(*one)) or given[-1]
    )
    images, samples = rois.batch()
    losses = model.loss(images, samples)
    assert losses['loss_kd_x_task'].isfinite()
    for sample, own, found in zip(samples, given, seen['found']):
        masks = own.gt_instances.masks
        assert isinstance(masks, BitmapMasks)
        assert (masks.height, masks.width) == (128, 128)
        assert len(masks) == len(own.gt_instances.bboxes)
        height, width = sample.img_shape
        first = len(sample.gt_instances) if union else 0
        later = torch.from_numpy(masks.masks[first:]).bool()
        assert torch.equal(later[:, :height, :width], found.masks)
        assert not later[:, height:].any()
        if union:
            before = sample.gt_instances.masks.masks
            assert (masks.masks[:first, :height, :width] == before).all()


def test_a_teacher_without_masks_is_refused(build):
    with pytest.raises(ValueError, match='MaskRCNN.*FasterRCNN.*none'):
        build(families.mask_rcnn)


def test_a_student_without_masks_needs_none(build):
    model = build(teacher=families.mask_rcnn, score_thr=0.2)
    assert model.loss(*tiny.batch())['loss_kd_x_task'].isfinite()


# Mistakes --------------------------------------------------------------------


def test_a_teacher_without_boxes_is_refused(build):
    with pytest.raises(ValueError, match=r'teacher \(SOLO\) has no bbox_head'):
        build(teacher=families.solo)


@pytest.mark.parametrize('name', ['score_thr', 'iou_thr'])
def test_a_threshold_is_a_fraction(name):
    with pytest.raises(ValueError, match=f'{name} between 0 and 1'):
        PredictedBoxTerm('big', **{name: 1.5})


def test_weight_zero_is_silent():
    assert PredictedBoxTerm('big', loss_weight=0.0).silent()
    assert not PredictedBoxTerm('big').silent()


def test_classes_are_compared_by_name(build, monkeypatch):
    model = build(names=('cow', 'cat', 'dog'))
    monkeypatch.setattr(
        'mmkd.distillers.distiller.training_classes',
        lambda: ('cat', 'dog', 'cow'),
    )
    with pytest.raises(ValueError, match='first differ at 0'):
        model.loss(*tiny.batch())

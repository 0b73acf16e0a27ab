import copy

import pytest
import runs
import tiny
import torch
from mmengine.structures import InstanceData

from mmkd.distillers.unlabelled import labelled_first
from mmkd.losses.pkd import pkd_loss
from mmkd.structures.ground_truth import labelled
from mmkd.taps import recording

SHAPES = ((128, 128), (96, 128), (128, 112), (120, 120))


@pytest.fixture
def batch():
    """Four images, the first and the third unlabelled."""
    images, samples = tiny.batch(shapes=SHAPES)
    for index in (0, 2):
        samples[index].gt_instances = InstanceData()
    return images, samples


@pytest.fixture
def ordered(batch):
    """The same, labelled images first."""
    images, samples = batch
    order = [1, 3, 0, 2]
    return images[order], [samples[index] for index in order]


def scores_term():
    return dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='bbox_head',
        output=0,
        levels=(0, 1, 2),
        loss=dict(type='mmkd.CWDLoss'),
    )


@pytest.fixture
def student(teachers, terms):
    terms['scores'] = scores_term()
    model = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    model.teachers.load()
    return model.train()


def test_an_annotated_image_without_objects_is_labelled(batch):
    _, samples = batch
    assert [labelled(one) for one in samples] == [False, True, False, True]
    samples[1].gt_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
    )
    assert labelled(samples[1])


def test_labelled_images_come_first(batch):
    images, samples = batch
    ordered, others, known = labelled_first(images, samples)
    assert known == 2
    assert torch.equal(ordered, images[[1, 3, 0, 2]])
    assert others == [samples[index] for index in (1, 3, 0, 2)]


def test_a_labelled_batch_is_left_alone():
    images, samples = tiny.batch()
    same, others, known = labelled_first(images, samples)
    assert same is images
    assert others == samples
    assert known == 2


def test_the_detection_loss_is_that_of_the_labelled_images(student, ordered):
    """Literally: maps of the whole batch, the head on the labelled part."""
    images, samples = ordered
    plain = copy.deepcopy(student)
    losses = student.loss(images, samples)
    maps = plain.extract_feat(images)
    expected = plain.bbox_head.loss([one[:2] for one in maps], samples[:2])
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    for one, other in zip(student.buffers(), plain.buffers()):
        assert torch.equal(one, other)  # batch statistics, seen once


def test_terms_see_every_image(student, ordered):
    images, samples = ordered
    plain = copy.deepcopy(student)
    losses = student.loss(images, samples)
    own = plain.extract_feat(images)
    teacher = plain.teachers['big'].detector
    with torch.no_grad():
        theirs = teacher.extract_feat(images)
    expected = sum(2 * pkd_loss(own[x], theirs[x]) for x in range(3))
    torch.testing.assert_close(losses['loss_kd_pkd'], expected)
    with recording(plain, ['bbox_head']) as record:
        plain.bbox_head(own)
    loss = student.terms['scores'].losses[0]
    with torch.no_grad():
        targets = teacher.bbox_head(theirs)[0]
    expected = sum(
        loss(record.at('bbox_head')[0][x], targets[x]) for x in range(3)
    )
    torch.testing.assert_close(losses['loss_kd_scores'], expected)


def test_order_in_the_batch_does_not_matter(student, batch, ordered):
    other = copy.deepcopy(student)
    one, two = student.loss(*batch), other.loss(*ordered)
    for name, value in one.items():
        torch.testing.assert_close(
            torch.stack([*value]) if isinstance(value, list) else value,
            torch.stack([*two[name]])
            if isinstance(value, list)
            else two[name],
        )


def test_unlabelled_images_push_through_terms_alone(student, ordered):
    student.eval()  # batch statistics would let every image reach all others
    images, samples = ordered
    images.requires_grad_()
    losses = student.loss(images, samples)
    detection = sum(map(sum, (losses['loss_cls'], losses['loss_bbox'])))
    (own,) = torch.autograd.grad(detection, images, retain_graph=True)
    pushed = own.flatten(1).abs().amax(1)
    assert (pushed[:2] > 0).all()
    assert (pushed[2:] == 0).all()
    for term in ('pkd', 'scores'):
        (taught,) = torch.autograd.grad(
            losses[f'loss_kd_{term}'], images, retain_graph=True
        )
        assert (taught.flatten(1).abs().amax(1) > 0).all()


def test_nothing_stays_behind(student, batch):
    student.loss(*batch)
    assert 'extract_feat' not in student.__dict__
    images, samples = tiny.batch()
    assert 'loss_cls' in student.loss(images, samples)


def test_two_stages(teachers, terms, batch):
    terms['pkd'].update(levels=(1, 2, 3), teacher_levels=(0, 1, 2))
    model = tiny.build(tiny.distilled(tiny.faster_rcnn(), teachers, terms))
    model.teachers.load()
    losses = model.train().loss(*batch)
    tiny.total(losses).backward()
    assert {'loss_rpn_cls', 'loss_cls', 'loss_kd_pkd'} <= losses.keys()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_a_batch_without_labels_says_what_to_sample(student, batch):
    images, samples = batch
    with pytest.raises(ValueError, match='PartlyLabelledBatchSampler'):
        student.loss(images[[0, 2]], [samples[0], samples[2]])


def test_outputs_of_another_axis_are_refused(teachers, terms, batch):
    """Boxes of all images in one list, say."""
    model = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    model.teachers.load()
    model.terms['pkd'].student_paths = ['neck', 'bbox_head.loss_cls']
    with pytest.raises(ValueError, match=r"'bbox_head.loss_cls' gives noth"):
        model.train().loss(*batch)
    model.bbox_head.forward = lambda maps: (maps[0].movedim(0, 1),)
    model.bbox_head.loss_by_feat = lambda *_, **__: {}
    model.terms['pkd'].student_paths = ['neck', 'bbox_head']
    with pytest.raises(ValueError, match='not the first axis'):
        model.loss(*batch)


def test_a_training_on_few_labels(tmp_path, teachers, terms):
    """mmdet's own wrapper and sampler, and a resume that is exact."""
    runs.write_coco(tmp_path / 'data', images=8)
    model = tiny.distilled(tiny.retinanet(), teachers, terms)

    def settings(name, iters):
        config = runs.config(
            tmp_path / 'data', tmp_path / name, iters=iters, model=model
        )
        loader = config.train_dataloader
        few = loader.dataset
        many = copy.deepcopy(few)
        few.indices, many.indices = [0, 1], list(range(2, 8))
        many.pipeline = [
            one for one in many.pipeline if one.type != 'LoadAnnotations'
        ]
        loader.dataset = dict(type='ConcatDataset', datasets=[few, many])
        loader.sampler = dict(
            type='MultiSourceSampler', batch_size=2, source_ratio=[1, 1]
        )
        return config

    whole = runs.train(settings('whole', 4))
    resumed = runs.train(settings('again', 4), tmp_path / 'whole/iter_2.pth')
    assert runs.differences(whole, resumed) == []

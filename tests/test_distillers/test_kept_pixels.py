"""Teachers see what a sample keeps for them, the student what it is shown."""

import copy

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config

TERM = dict(
    type='mmkd.FeatureTerm',
    teacher='big',
    tap='neck',
    loss=dict(type='mmkd.PKDLoss'),
)


@pytest.fixture
def build(tmp_path):
    weights = tiny.save_teacher(tiny.retinanet(16), tmp_path / 'big.pth')

    def build(**teacher):
        big = dict(
            config=Config(dict(model=tiny.retinanet(16))),
            checkpoint=str(weights),
            **teacher,
        )
        model = tiny.distilled(tiny.retinanet(), dict(big=big), dict(kd=TERM))
        student = tiny.build(model)
        student.init_weights()
        return student

    return build


@pytest.fixture
def student(build):
    return build()


def batches(student):
    """A batch, the batch with an overlay, and that with what it lies over."""
    data = tiny.pixels(*tiny.batch())
    overlaid = copy.deepcopy(data)
    for image in overlaid['inputs']:
        image[:, 20:60, 30:70] = 255
    keeping = copy.deepcopy(overlaid)
    for image, sample in zip(data['inputs'], keeping['data_samples']):
        picture = image.permute(1, 2, 0).numpy()
        sample.set_metainfo(dict(teacher_img=picture))
    return [
        tuple(student.data_preprocessor(one, True).values())
        for one in (data, overlaid, keeping)
    ]


def seen(student, images, samples):
    """What teacher and student are shown in a step, and the losses."""
    shown = {}

    def observe(step, losses):
        shown.update(
            images=step.images,
            teacher=step.teacher('big').at('neck'),
            student=step.student.at('neck'),
            losses=dict(losses),
        )

    observe.paths = ['neck']
    student.observer = observe
    torch.manual_seed(0)
    student.loss(images, samples)
    student.observer = None
    return shown


def equal(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other))


def test_the_teacher_sees_the_clean_view_and_the_student_the_overlay(student):
    clean, overlaid, both = (
        seen(copy.deepcopy(student), *one) for one in batches(student)
    )
    assert equal(both['teacher'], clean['teacher'])
    assert equal(both['student'], overlaid['student'])
    assert not equal(both['teacher'], overlaid['teacher'])
    assert not equal(both['student'], clean['student'])
    assert torch.equal(both['images'], overlaid['images'])


def test_the_detectors_own_loss_is_that_of_what_it_is_shown(student):
    _, overlaid, both = (
        seen(copy.deepcopy(student), *one)['losses']
        for one in batches(student)
    )
    for key in ('loss_cls', 'loss_bbox'):
        assert equal(both[key], overlaid[key])
    assert both['loss_kd_kd'] != overlaid['loss_kd_kd']


def test_without_kept_pixels_the_batch_itself_is_shown(student, monkeypatch):
    images, samples = batches(student)[0]
    shown = []
    teacher = student.teachers['big']
    run = teacher.run
    monkeypatch.setattr(
        teacher,
        'run',
        lambda images, *rest, **more: (
            shown.append(images) or run(images, *rest, **more)
        ),
    )
    student.loss(images, samples)
    assert shown[0] is images


def test_unlabelled_images_keep_their_own_pixels(student):
    """They are sorted behind the labelled ones, samples and all."""
    data = batches(student)
    (clean, _), (images, samples) = data[0], data[2]
    del samples[0].gt_instances
    found = seen(student, images, samples)
    teacher = student.teachers['big']
    other = teacher.run(clean.flip(0), samples[::-1], student._pixels)
    assert equal(found['teacher'], other.at('neck'))


def test_what_a_teacher_remembers_is_the_clean_view(build):
    student = build(cache=0.1)
    clean, overlaid, both = batches(student)
    memory = student.teachers['big'].memory
    student.loss(*both)
    assert (memory.hits, memory.misses) == (0, 2)
    student.loss(*clean)
    assert (memory.hits, memory.misses) == (2, 2)
    student.loss(*overlaid)
    assert (memory.hits, memory.misses) == (2, 4)


def test_pixels_of_another_size_are_refused(student):
    images, samples = batches(student)[2]
    picture = np.zeros((8, 8, 3), np.uint8)
    samples[0].set_metainfo(dict(teacher_img=picture))
    with pytest.raises(ValueError, match='KeepForTeacher behind'):
        student.loss(images, samples)

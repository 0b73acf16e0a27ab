"""Students that show their heads each image several times, as TridentNet."""

from __future__ import annotations

import families
import pytest
import tiny
import torch

from mmkd.pixels import translate
from mmkd.taps import counting, recording
from mmkd.teachers import run_detector


@pytest.fixture
def build(tmp_path):
    """A student of three branches and a teacher of the same backbone."""

    def build(**terms):
        teacher, file = families.trident(), tmp_path / 'teacher.pth'
        torch.save(dict(state_dict=tiny.lively(teacher).state_dict()), file)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        terms = terms or dict(x=feature('mmkd.MimicLoss'))
        model = tiny.build(
            tiny.distilled(families.trident(), dict(big=big), terms), seed=1
        )
        plain = tiny.lively(families.trident(), seed=2)
        model.load_state_dict(plain.state_dict(), strict=False)
        model.teachers.load()
        return model.train()

    return build


def feature(loss, **settings):
    return dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='backbone',
        levels=(0,),
        loss=dict(type=loss, **settings),
    )


def teacher_s(model, images, samples):
    """The maps of the branch that it deploys."""
    teacher = model.teachers['big']
    shapes = [one.img_shape for one in samples]
    shown = translate(images, shapes, model._pixels, teacher.pixels)
    with (
        torch.no_grad(),
        recording(teacher.detector, ['backbone'], stop=True) as record,
    ):
        run_detector(teacher.detector, shown, samples)
    return record.at('backbone')[0]


def watched(model):
    """What the term is given."""
    seen = {}
    forward = model.terms.x.forward

    def watch(step):
        seen['step'] = step
        return forward(step)

    model.terms.x.forward = watch
    return seen


def test_each_branch_learns_from_the_teacher_s_maps_of_its_image(build):
    """Branch after branch, and in each the images in their order."""
    model = build()
    images, samples = tiny.batch()
    seen = watched(model)
    losses = model.loss(images, samples)
    (student,) = seen['step'].student.at('backbone')
    teacher = teacher_s(model, images, samples)
    assert len(student) == 3 * len(images)
    expected = [
        (student[2 * branch + image] - teacher[image]).square().mean()
        for branch in range(3)
        for image in range(2)
    ]
    torch.testing.assert_close(
        losses['loss_kd_x'], torch.stack(expected).mean()
    )


def test_annotations_follow_their_images(build):
    model = build()
    images, samples = tiny.batch()
    samples[1].gt_instances = samples[1].gt_instances[:1]
    seen = watched(model)
    model.loss(images, samples)
    step = seen['step']
    assert step.copies == 3
    assert [id(one) for one in step.samples] == 3 * [id(x) for x in samples]
    assert step.gt.image.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    once, own = step.once
    assert torch.equal(once, images)
    assert own == samples


def test_the_detector_s_own_loss_is_as_it_would_be_alone(build):
    model = build()
    images, samples = tiny.batch()
    torch.manual_seed(0)
    losses = model.loss(images, samples)
    torch.manual_seed(0)
    alone = model.student_class.loss(model, images, samples)
    for key, value in alone.items():
        torch.testing.assert_close(losses[key], value)


@pytest.mark.parametrize(
    'term',
    [
        feature('mmkd.FGDLoss', channels=64),
        dict(type='mmkd.PredictedBoxTerm', teacher='big', score_thr=0.0),
    ],
    ids=['objects', 'predicted'],
)
def test_terms_that_read_boxes_and_heads_teach_every_branch(build, term):
    model = build(x=term)
    images, samples = tiny.batch()
    losses = model.loss(images, samples)
    share = sum(
        value for key, value in losses.items() if key.startswith('loss_kd_x')
    )
    assert torch.isfinite(share)
    model.zero_grad()
    share.backward()
    weight = model.backbone.layer3[-1].conv1.weight
    assert weight.grad.abs().max() > 0


def test_one_branch_is_deployed_and_one_is_compared_at_build(build):
    model = build()
    images, samples = tiny.batch()
    step, broken = model.dry_step(images, samples)
    assert broken is None
    assert step.copies == 1
    assert torch.equal(step.images, images)


def test_other_students_show_each_image_once():
    model = tiny.build(tiny.retinanet()).train()
    with counting(model) as copies:
        model.loss(*tiny.batch())
    assert copies == [1]
    assert 'forward' not in model.backbone.__dict__


def test_some_images_without_labels_are_refused(build):
    model = build()
    images, samples = tiny.batch()
    del samples[1].gt_instances
    with pytest.raises(ValueError, match='maps of 6 images from a batch of 2'):
        model.loss(images, samples)

import copy

import heads
import pytest
import tiny
import torch
from mmdet.models.dense_heads import RetinaHead
from mmengine.structures import InstanceData

from mmkd.structures import GroundTruth
from mmkd.terms.learned_mask import LearnedMaskTerm

MASKD = dict(type='mmkd.MasKDLoss', channels=16, loss_weight=2.0)


@pytest.fixture
def at(hub):
    """Puts the training at an iteration of a hundred."""

    def at(iteration):
        hub.update_info('iter', iteration)
        hub.update_info('max_iters', 100)

    return at


@pytest.fixture
def build(tmp_path):
    def build(model=None, sham=False, **settings):
        model = model or tiny.retinanet(base=16)
        file = tmp_path / 'teacher.pth'
        tiny.save_teacher(model, file, seed=3)
        big = dict(config=dict(model=model), checkpoint=str(file), sham=sham)
        term = {
            'type': 'mmkd.LearnedMaskTerm',
            'teacher': 'big',
            'loss': MASKD,
            'levels': (0, 2),
            'learn_until': 0.1,
            **settings,
        }
        student = tiny.build(
            tiny.distilled(tiny.retinanet(), dict(big=big), dict(x=term))
        )
        student.teachers.load()
        return student.train()

    return build


def shares(student, images, samples):
    losses = student.loss(images, samples)
    return {
        name.removeprefix('loss_').removeprefix('kd_x_'): value
        for name, value in losses.items()
        if 'kd_x' in name
    }


def task_of(student, images, samples, head='bbox_head'):
    """The teacher's loss on revealed maps, from images to the sum."""
    big = copy.deepcopy(student.teachers['big'].detector)
    with torch.no_grad():
        maps = list(big.extract_feat(images))
    overlap = 0.0
    for loss, level in zip(student.terms['x'].losses, (0, 2)):
        maps[level], one = loss.reveal(maps[level])
        overlap = overlap + one
    getattr(big, head).train()
    losses = getattr(big, head).loss(tuple(maps), samples)
    return tiny.total(losses), overlap


@pytest.mark.parametrize('kind', ['retinanet', 'fcos'])
def test_the_task_is_the_teachers_loss_on_what_is_revealed(build, kind):
    """FCOS decodes boxes otherwise in evaluation."""
    model = getattr(heads, kind)(base=16)
    student = build(model, task_weight=0.5, overlap_weight=3.0)
    images, samples = tiny.batch(boxes=5)
    task, overlap = task_of(student, images, samples)
    found = shares(student, images, samples)
    assert found.keys() == {'feature', 'masks', 'task', 'overlap'}
    torch.testing.assert_close(found['masks'], 0.5 * task + 3 * overlap)
    torch.testing.assert_close(found['task'], task)
    torch.testing.assert_close(found['overlap'], overlap)
    assert not found['task'].requires_grad
    assert task > 0


def test_the_feature_part_is_that_of_a_feature_term(build):
    student = build()
    images, samples = tiny.batch()
    big = student.teachers['big'].detector
    own = copy.deepcopy(student).extract_feat(images)
    with torch.no_grad():
        theirs = big.extract_feat(images)
    found = shares(student, images, samples)
    losses = student.terms['x'].losses
    gt = GroundTruth.from_samples(samples, images)
    expected = sum(
        loss(own[level], theirs[level], gt)
        for loss, level in zip(losses, (0, 2))
    )
    torch.testing.assert_close(found['feature'], expected)


def test_masks_learn_of_the_teacher_and_the_student_of_the_masks(build):
    student = build()
    found = shares(student, *tiny.batch())
    masks = list(student.terms['x'].losses.parameters())
    plain = [one for n, one in student.named_parameters() if 'terms' not in n]
    found['masks'].backward(retain_graph=True)
    assert all(one.grad.abs().sum() > 0 for one in masks)
    assert all(one.grad is None for one in plain)
    student.zero_grad()
    found['feature'].backward()
    assert all((one.grad == 0).all() for one in masks)
    assert sum(p.grad is not None for p in student.backbone.parameters())
    big = student.teachers['big'].detector
    assert all(one.grad is None for one in big.parameters())


def test_after_its_time_nothing_is_learned_and_no_head_runs(build, at):
    student = build()
    big = student.teachers['big'].detector
    at(9)
    assert shares(student, *tiny.batch())['masks'] > 0
    at(10)
    big.bbox_head = None
    found = shares(student, *tiny.batch())
    assert found.keys() == {'feature', 'masks'}
    assert found['masks'] == 0
    assert found['feature'] > 0
    sum(found.values()).backward()
    masks = student.terms['x'].losses.parameters()
    assert all((one.grad == 0).all() for one in masks)


def test_a_schedule_ends_it_as_a_whole(build, at):
    student = build(schedule=dict(type='mmkd.StopAfter', fraction=0.05))
    at(4)
    assert 'masks' in shares(student, *tiny.batch())
    at(5)
    assert shares(student, *tiny.batch()) == {'kd_x': 0}


def test_building_it_asks_the_teacher_for_no_loss(build, monkeypatch):
    def early(*_):
        raise RuntimeError('weights are not read yet')

    monkeypatch.setattr(RetinaHead, 'loss', early)
    build()


def test_the_teacher_is_left_as_it_was(build):
    """Its heads have batch statistics of their own here."""
    model = heads.fcos(base=16, norm_cfg=dict(type='BN'))
    student = build(model)
    big = student.teachers['big'].detector
    before = copy.deepcopy(big.state_dict())
    found = shares(student, *tiny.batch())
    (found['feature'] + found['masks']).backward()
    assert not any(one.training for one in big.modules())
    assert 'extract_feat' not in big.__dict__
    after = big.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_loss_that_fails_leaves_the_teacher_as_it_was(build):
    student = build()
    big = student.teachers['big'].detector

    def broken(*_):
        assert big.bbox_head.training
        raise RuntimeError('no loss today')

    big.bbox_head.loss = broken
    with pytest.raises(RuntimeError, match='no loss today'):
        student.loss(*tiny.batch())
    assert not any(one.training for one in big.modules())
    assert 'extract_feat' not in big.__dict__


def test_the_teachers_levels_may_be_others(build):
    student = build(
        levels=(0, 1),
        teacher_levels=(1, 2),
        align=dict(type='mmkd.ResizeAdapt'),
    )
    images, samples = tiny.batch()
    seen = []
    head = student.teachers['big'].detector.bbox_head
    forward = head.forward
    head.forward = lambda maps: seen.append(maps) or forward(maps)
    shares(student, images, samples)
    with torch.no_grad():
        maps = student.teachers['big'].detector.extract_feat(images)
    ratios = [(a / b).mean().item() for a, b in zip(seen[-1], maps)]
    assert ratios == pytest.approx([1, 0.5, 0.5, 1, 1], abs=0.05)


def test_the_student_may_be_tapped_elsewhere(build):
    student = build(tap='backbone', levels=(1,), teacher_levels=(0,))
    images, samples = tiny.batch()
    own = copy.deepcopy(student).backbone(images)[1]
    with torch.no_grad():
        theirs = student.teachers['big'].detector.extract_feat(images)[0]
    gt = GroundTruth.from_samples(samples, images)
    expected = student.terms['x'].losses[0](own, theirs, gt)
    found = shares(student, images, samples)
    torch.testing.assert_close(found['feature'], expected)


def test_images_without_annotations_are_no_background(build):
    """The distiller puts them last; the teacher's loss leaves them out."""
    student = build()
    images, samples = tiny.batch(boxes=5)
    expected, _ = task_of(student, images[:1], samples[:1])
    samples[1].gt_instances = InstanceData()
    found = shares(student, images, samples)
    torch.testing.assert_close(found['task'], expected)


def test_a_sham_teacher_gets_the_boxes_of_the_image_it_sees(build):
    images, samples = tiny.batch(shapes=((128, 128),) * 3, boxes=5)
    student = build(sham=True)
    following = samples[1:] + samples[:1]
    expected, _ = task_of(student, images.roll(-1, 0), following)
    found = shares(student, images, samples)
    torch.testing.assert_close(found['task'], expected)


def test_tokens_that_learn_lower_the_teachers_loss_and_part(build):
    student = build(learn_until=1.0)
    torch.manual_seed(0)
    images, samples = tiny.batch(boxes=5)
    # A teacher that knows the batch: its heads fit what its maps show.
    big = student.teachers['big'].detector
    big.requires_grad_(True)
    fit = torch.optim.Adam(big.bbox_head.parameters(), 1e-2)
    for _ in range(40):
        fit.zero_grad()
        tiny.total(big.loss(images, samples)).backward()
        fit.step()
    big.requires_grad_(False).zero_grad()
    masks = list(student.terms['x'].losses.parameters())
    learn = torch.optim.Adam(masks, 1e-2)
    first = shares(student, images, samples)
    for _ in range(40):
        learn.zero_grad()
        found = shares(student, images, samples)
        found['masks'].backward()
        learn.step()
    assert found['task'] < 0.9 * first['task']
    assert found['overlap'] < 0.95 * first['overlap']


def test_its_classes_are_those_of_the_data():
    assert LearnedMaskTerm('big', MASKD, (0,)).compares_classes()


def test_mistakes_are_named(build):
    with pytest.raises(ValueError, match=r'MimicLoss has none.*MasKDLoss'):
        LearnedMaskTerm('big', dict(type='mmkd.MimicLoss'), (0,))
    with pytest.raises(ValueError, match='learn_until between 0 and 1'):
        LearnedMaskTerm('big', MASKD, (0,), learn_until=2000)
    with pytest.raises(ValueError, match='built for 8 channels'):
        build(loss=dict(type='mmkd.MasKDLoss', channels=8))

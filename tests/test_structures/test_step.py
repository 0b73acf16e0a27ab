import pytest
import tiny
import torch

from mmkd.structures import Step


@pytest.fixture
def shown():
    return []


@pytest.fixture
def step(shown):
    def shower(name):
        def show(images, grad=False):
            shown.append((name, images, grad))
            return f'outputs {len(shown)}'

        return show

    images, samples = tiny.batch()
    return Step(
        student=None,
        images=images,
        samples=samples,
        teachers={name: shower(name) for name in ('r101', 'x101')},
    )


def test_a_teacher_runs_at_the_first_demand_and_once(step, shown):
    assert shown == []
    assert step.teacher('r101') == 'outputs 1'
    assert step.teacher('r101') == 'outputs 1'
    assert [(name, grad) for name, _, grad in shown] == [('r101', False)]
    assert shown[0][1] is step.images


def test_teachers_run_apart(step, shown):
    step.teacher('r101')
    assert step.teacher('x101') == 'outputs 2'


def test_images_of_a_terms_own_are_shown_each_time(step, shown):
    images = torch.ones(1)
    step.teacher('r101')
    assert step.show('r101', images, grad=True) == 'outputs 2'
    assert step.show('r101', images) == 'outputs 3'
    assert step.teacher('r101') == 'outputs 1', 'the batch is kept'
    assert [grad for *_, grad in shown] == [False, True, False]


def test_an_unknown_teacher_suggests_the_nearest(step):
    with pytest.raises(ValueError, match="no teacher 'r10'.*'r101'"):
        step.teacher('r10')


def test_annotations_are_laid_flat_once(step):
    assert step.gt is step.gt
    assert step.gt.boxes.shape == (6, 4)


def test_steps_do_not_share_what_ran(step):
    step.teacher('r101')
    other = Step(step.student, step.images, step.samples)
    with pytest.raises(ValueError, match='It has none'):
        other.teacher('r101')


def test_teachers_see_a_view_of_their_own_where_there_is_one(step, shown):
    assert step.shown is step.images
    step.clean = torch.ones_like(step.images)
    step.teacher('r101')
    assert shown[0][1] is step.clean is step.shown

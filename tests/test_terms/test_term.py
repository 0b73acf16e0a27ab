import pytest
import torch
from torch import nn

from mmkd.schedules import Constant, StopAfter
from mmkd.terms.term import Term


class Norm(Term):
    """A term as small as can be: the size of one tapped map."""

    def __init__(self, schedule=None):
        super().__init__(schedule)
        self.scale = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def bind(self, student, teachers):
        self.tap(student, 'stem')
        self.tap(student, 'stem')

    def forward(self, step):
        return self.scale.sum() * step.student.at('stem').square().mean()


class Recorded:
    def __init__(self, *paths):
        self.paths = paths

    def has(self, path):
        return path in self.paths


class Step:
    def __init__(self, *paths):
        self.student = Recorded(*paths)


@pytest.fixture
def student():
    return nn.Sequential()


@pytest.fixture
def bound():
    student = nn.Module()
    student.stem = nn.Identity()
    term = Norm()
    term.bind(student, {})
    return term


def test_a_term_without_bind_or_forward_cannot_be_made():
    with pytest.raises(TypeError, match='abstract'):
        Term()


def test_the_schedule_is_constant_unless_given():
    assert isinstance(Norm().schedule, Constant)
    assert Norm().schedule(0.5) == 1
    schedule = Norm(dict(type='mmkd.StopAfter', fraction=0.5)).schedule
    assert isinstance(schedule, StopAfter)


def test_a_misspelt_schedule_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"mean 'mmkd\.StopAfter'"):
        Norm(dict(type='mmkd.StopAftr', fraction=0.5))


def test_a_tap_is_noted_once(bound):
    assert bound.student_paths == ['stem']


def test_a_wrong_tap_is_refused():
    student = nn.Module()
    student.neck = nn.Identity()
    with pytest.raises(ValueError, match="Module has no submodule 'stem'"):
        Norm().bind(student, {})


def test_it_holds_no_reference_to_the_student(bound):
    assert [name for name, _ in bound.named_modules()] == ['']
    assert list(bound.state_dict()) == ['scale', 'frozen']


def test_it_can_be_checked_if_a_dry_pass_called_its_taps(bound):
    assert bound.checkable(Step('stem', 'neck'))
    assert not bound.checkable(Step('neck'))


def test_touching_is_zero_with_a_gradient_for_every_weight_that_learns(bound):
    zero = bound.touch()
    assert zero == 0
    zero.backward()
    assert torch.equal(bound.scale.grad, torch.zeros(2))
    assert bound.frozen.grad is None


def test_touching_a_term_without_weights_is_zero():
    class Plain(Norm):
        def __init__(self):
            Term.__init__(self)

    assert Plain().touch() == 0


def test_by_itself_a_term_says_nothing_of_classes_and_is_not_silent(bound):
    assert not bound.compares_classes()
    assert not bound.silent()

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmkd.terms.prepared import PreparedTerm, learns

STEP, DRY = SimpleNamespace(dry=False), SimpleNamespace(dry=True)


class Prepared(PreparedTerm):
    given, learner = 'lecture', 'notes'
    setting = 'lecture_checkpoint'

    def __init__(self, lecture_checkpoint=None, width=2):
        super().__init__(lecture_checkpoint)
        self.lecture = nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2))
        self.notes = nn.Linear(2, 2)
        self.hold()
        self.name = 'x'

    def bind(self, student, teachers): ...

    def forward(self, step): ...


def rested(term):
    """As a phase that freezes the teacher's side leaves it."""
    term.lecture.requires_grad_(False)
    return term


def saved(path, prefix='terms.x.', value=5.0, **more):
    state = {
        f'{prefix}{key}': torch.full_like(one, value)
        for key, one in Prepared().state_dict().items()
    }
    torch.save(dict(state_dict={**more, **state}), path)
    return str(path)


def test_a_side_that_learns_is_prepared():
    term = Prepared()
    assert learns(term.lecture)
    term.prepare(STEP)
    rested(term)
    assert not learns(term.lecture)


def test_one_that_rests_untrained_is_refused_but_not_in_a_dry_pass():
    term = rested(Prepared())
    term.prepare(DRY)
    with pytest.raises(
        ValueError,
        match=r"Prepared 'x': its lecture .*freeze='terms.x.notes', or set "
        r'lecture_checkpoint=FILE',
    ):
        term.prepare(STEP)


def test_one_that_learned_may_rest_in_a_resumed_training_as_well():
    term = Prepared()
    term.count_lesson(STEP)
    rested(term).prepare(STEP)
    resumed = rested(Prepared())
    resumed.load_state_dict(term.state_dict())
    resumed.prepare(STEP)
    assert resumed.taught == 1


def test_lessons_are_counted_in_training_alone():
    term = Prepared()
    term.count_lesson(DRY)
    term.eval().count_lesson(STEP)
    assert term.taught == 0
    term.train().count_lesson(STEP)
    assert term.taught == 1


def test_what_is_loaded_rests_with_its_statistics(tmp_path):
    term = Prepared(saved(tmp_path / 'a.pth'))
    assert not learns(term.lecture)
    assert learns(term.notes)
    term.train()
    assert not term.lecture[1].training
    term.prepare(DRY)
    assert term.taught == 0
    term.prepare(STEP)
    assert all((one == 5).all() for one in term.lecture.state_dict().values())
    assert not (term.notes.weight == 5).any()
    assert term.taught == 1


def test_what_is_not_loaded_keeps_its_mode():
    assert Prepared().train().lecture[1].training


def test_it_is_loaded_once(tmp_path):
    term = Prepared(saved(tmp_path / 'a.pth'))
    term.prepare(STEP)
    resumed = Prepared(str(tmp_path / 'gone.pth'))
    resumed.load_state_dict(term.state_dict())
    resumed.prepare(STEP)
    (tmp_path / 'a.pth').unlink()
    term.prepare(STEP)


def test_a_term_of_another_name_may_have_trained_it(tmp_path):
    term = Prepared(saved(tmp_path / 'a.pth', 'terms.y.'))
    term.prepare(STEP)
    assert (term.lecture[0].weight == 5).all()


def test_that_of_its_own_name_comes_first(tmp_path):
    other = {'terms.a.lecture.0.weight': torch.zeros(2, 2)}
    term = Prepared(saved(tmp_path / 'a.pth', **other))
    term.prepare(STEP)
    assert (term.lecture[0].weight == 5).all()


@pytest.mark.parametrize(
    ('names', 'held'),
    [((), 'no term'), (('a', 'b'), r"\['terms.a.', 'terms.b.'\]")],
)
def test_a_file_without_it_is_refused(tmp_path, names, held):
    file = tmp_path / 'a.pth'
    state = {f'terms.{one}.lecture.0.bias': torch.zeros(2) for one in names}
    torch.save(dict(state_dict={'backbone.a': torch.zeros(1), **state}), file)
    with pytest.raises(ValueError, match=f'holds lecture of {held}, and'):
        Prepared(str(file)).prepare(STEP)


def test_one_of_another_shape_is_refused(tmp_path):
    term = Prepared(saved(tmp_path / 'a.pth'), width=3)
    with pytest.raises(ValueError, match='lecture of .*a.pth are others'):
        term.prepare(STEP)

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmkd.registry import MODELS
from mmkd.terms.group import GroupTerm, parts_of
from mmkd.terms.term import Term


class Said(Term):
    """Says a constant, or parts."""

    def __init__(self, share, weight=1.0, paths=('neck',), schedule=None):
        super().__init__(schedule)
        self.share, self.loss_weight = share, weight
        self.own = nn.Parameter(torch.ones(()))
        self.paths, self.asked = paths, 0

    def bind(self, student, teachers):
        for path in self.paths:
            self.tap(student, path)
        self.teacher_names = list(teachers)

    def silent(self):
        return not self.loss_weight

    def compares_classes(self):
        return self.share == 'classes'

    def forward(self, step):
        self.asked += 1
        if isinstance(self.share, dict):
            return {name: self.own * one for name, one in self.share.items()}
        return self.own * self.share


@pytest.fixture(autouse=True)
def registered():
    before = dict(MODELS._module_dict), dict(MODELS.peer._module_dict)
    MODELS.register_module(module=Said)
    yield
    for registry, entries in zip((MODELS, MODELS.peer), before):
        registry._module_dict.clear()
        registry._module_dict.update(entries)


def said(share, **more):
    return dict(type='mmkd.Said', share=share, **more)


STEP = SimpleNamespace(progress=0.5, images=torch.zeros(1, 3, 2, 2))


def student():
    model = nn.Module()
    model.neck, model.head = nn.Identity(), nn.Identity()
    return model


def test_each_term_logs_under_its_own_name():
    group = GroupTerm(
        dict(a=said(2.0), b=said(dict(near=3.0, watch_peak=7.0)))
    )
    found = {name: one.item() for name, one in group(STEP).items()}
    assert found == {'a': 2.0, 'b_near': 3.0, 'watch_b_peak': 7.0}


def test_a_terms_own_schedule_scales_what_is_summed():
    schedule = dict(type='mmkd.Constant', factor=0.25)
    group = GroupTerm(
        dict(b=said(dict(near=4.0, watch_peak=7.0), schedule=schedule))
    )
    found = group(STEP)
    assert found['b_near'].item() == 1.0
    assert found['watch_b_peak'].item() == 7.0


def test_who_has_nothing_to_say_is_not_asked():
    off = dict(type='mmkd.Constant', factor=0.0)
    group = GroupTerm(
        dict(a=said(2.0, weight=0.0), b=said(3.0, schedule=off), c=said(1.0))
    )
    found = group(STEP)
    assert [term.asked for term in group.terms.values()] == [0, 0, 1]
    assert found['a'].item() == found['b'].item() == 0.0
    assert not group.silent()
    assert GroupTerm(dict(a=said(2.0, weight=0.0))).silent()


def test_it_needs_what_its_terms_need():
    group = GroupTerm(
        dict(a=said(1.0), b=said('classes', paths=('neck', 'head')))
    )
    group.bind(student(), dict(big=None, small=None))
    assert group.student_paths == ['neck', 'head']
    assert group.teacher_names == ['big', 'small']
    assert group.terms['b'].name == 'b'
    assert group.compares_classes()
    assert not GroupTerm(dict(a=said(1.0))).compares_classes()


def test_it_is_checkable_if_all_its_terms_are():
    group = GroupTerm(dict(a=said(1.0), b=said(1.0, paths=('head',))))
    group.bind(student(), {})
    for paths, expected in ((('neck', 'head'), True), (('neck',), False)):
        step = SimpleNamespace(
            student=SimpleNamespace(has=lambda path, all=paths: path in all)
        )
        assert group.checkable(step) is expected


def test_an_empty_group_is_an_error():
    with pytest.raises(ValueError, match='GroupTerm needs at least one term'):
        GroupTerm({})


def test_an_unknown_term_is_named():
    with pytest.raises(ValueError, match=r"'a' in GroupTerm.*mmkd.Said"):
        GroupTerm(dict(a=dict(type='mmkd.Sayd', share=1.0)))


def test_a_weight_that_is_a_tensor_keeps_its_gradient():
    weight = torch.tensor(2.0, requires_grad=True)
    parts_of('a', torch.tensor(3.0), weight, torch.zeros(()))['a'].backward()
    assert weight.grad.item() == 3.0

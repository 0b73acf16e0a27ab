"""Every registered alignment makes something of odd maps, or says why not."""

import odd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from mmkd.registry import MODELS

MODELS.import_from_location()
NECKS = {
    name: neck
    for name, neck in MODELS.module_dict.items()
    if neck.__module__.startswith('mmkd.necks.')
}
THEIRS = 5
#: What each is built with, once for every way it works in.
SETTINGS = {
    'ConvAdapt': [
        dict(in_channels=odd.CHANNELS, out_channels=THEIRS, num_levels=2),
        dict(
            in_channels=odd.CHANNELS,
            out_channels=[THEIRS, THEIRS],
            kernel_size=3,
            convs=2,
            norm=True,
            act=True,
            resize='student',
        ),
    ],
    'ResizeAdapt': [dict(), dict(mode='area'), dict(mode='nearest-exact')],
    'SimKDProjector': [
        dict(in_channels=odd.CHANNELS, out_channels=THEIRS, num_levels=2),
        dict(
            in_channels=[odd.CHANNELS] * 2,
            out_channels=THEIRS,
            pool=2,
            act=True,
        ),
    ],
    'SpectralAdapt': [
        dict(in_channels=odd.CHANNELS, out_channels=THEIRS, num_levels=2),
        dict(
            in_channels=odd.CHANNELS,
            out_channels=[THEIRS, THEIRS],
            mid_channels=1,
        ),
    ],
}
WAYS = [
    pytest.param(name, one, id=f'{name}-{number}')
    for name, each in SETTINGS.items()
    for number, one in enumerate(each)
]
quick = settings(
    derandomize=True,
    max_examples=15,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
thorough = settings(quick, max_examples=1000)
ALONE = odd.Case(boxes=('none',), cells=(1, 1))


def test_all_of_them_are_fed():
    assert NECKS.keys() == SETTINGS.keys()


def both(case):
    student, _ = case.maps(2)
    _, teacher = case.but(layout='contiguous').maps(2, THEIRS)
    return tuple(one.detach() for one in student), teacher


def pooled(case, factor):
    cells = tuple(-(-one // factor) for one in case.cells)
    return case.but(cells=cells)


def built(name, given):
    torch.manual_seed(0)
    return NECKS[name](**given)


def defined(name, given, case):
    neck = built(name, given)
    student, teacher = both(case)
    student = tuple(one.requires_grad_() for one in student)
    normalised = given.get('norm', name.startswith(('SimKD', 'Spectral')))
    if normalised and pooled(case, given.get('pool', 1)).few_cells():
        # One cell of a channel has no spread.
        with pytest.raises(ValueError, match=f'{name} normalises each'):
            neck(student, teacher)
        return
    found = neck(student, teacher)
    assert [len(one) for one in found] == [len(one) for one in student]
    for one in found:
        assert one.isfinite().all()
    sum(one.float().sum() for one in found).backward()
    assert all(one.grad.isfinite().all() for one in student)


@pytest.mark.parametrize(('name', 'given_'), WAYS)
@quick
@given(case=odd.cases(dtype='float32'))
@example(case=ALONE)
@example(case=odd.Case(boxes=('none',) * 2, cells=(1, 1)))
def test_odd_maps_are_defined_with_their_gradient(name, given_, case):
    defined(name, given_, case)


@pytest.mark.soak
@pytest.mark.parametrize(('name', 'given_'), WAYS)
@thorough
@given(case=odd.cases(dtype='float32'))
def test_many_odd_maps_are_defined_with_their_gradient(name, given_, case):
    defined(name, given_, case)


@pytest.mark.parametrize(('name', 'given_'), WAYS)
@quick
@given(case=odd.cases(dtype='float32', cells=(5, 16), student='normal'))
def test_the_layout_of_a_map_changes_nothing(name, given_, case):
    found = [
        built(name, given_)(*both(case.but(layout=layout)))
        for layout in ('contiguous', case.layout)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'given_'), WAYS)
def test_other_maps_than_it_was_built_for_are_refused_by_name(name, given_):
    neck = built(name, given_)
    student, teacher = both(odd.Case())
    wrong = [(student[:1], teacher)]
    if 'in_channels' in given_:
        wrong.append((tuple(one[:, 1:] for one in student), teacher))
    for one, other in wrong:
        with pytest.raises(ValueError, match=name):
            neck(one, other)

"""Every registered loss makes something of odd batches."""

import odd
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from test_contracts import LOSSES, build, scope, total

quick = settings(
    derandomize=True,
    max_examples=4,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
thorough = settings(quick, max_examples=200)
ALONE = odd.Case(boxes=('none',), cells=(2, 2))
HALF = dict(dtype='float16', student='large', teacher='large')

#: What a map of one cell in a batch of one is told by losses with BatchNorm.
NORM = 'normalises each channel'


@pytest.fixture(params=sorted(LOSSES))
def kind(request):
    return LOSSES[request.param]


def inputs(kind, case):
    student, teacher = case.maps(1 if scope(kind) == 'level' else 2)
    student = tuple(one.detach().requires_grad_() for one in student)
    if scope(kind) == 'level':
        return student[0], teacher[0], student
    return student, teacher, student


def defined(kind, case):
    """Value and gradient are finite."""
    # What lies on many boxes takes pairs of them: a test of its own.
    assume('many' not in case.boxes)
    torch.manual_seed(0)
    loss = build(kind)
    student, teacher, leaves = inputs(kind, case)
    try:
        value = total(loss(student, teacher, case.ground_truth()))
    except ValueError as error:
        if NORM not in str(error) or not str(error).startswith(kind.__name__):
            raise
        assert case.few_cells(), 'refused with cells enough'
        return
    assert value.isfinite()
    value.backward()
    assert all(one.grad.isfinite().all() for one in leaves)


# Gradients beyond float16 and modules in float64 are not asked for.
ORDINARY = odd.cases(dtype='float32')


@quick
@given(case=ORDINARY)
@example(case=ALONE)
@example(case=odd.Case(boxes=('nested', 'turned')))
@example(case=odd.Case(boxes=('endless', 'outside'), cells=(3, 5)))
@example(case=odd.Case(boxes=('inside', 'none'), **HALF))
def test_an_odd_batch_is_defined_with_its_gradient(kind, case):
    defined(kind, case)


@pytest.mark.soak
@thorough
@given(case=ORDINARY)
def test_many_odd_batches_are_defined_with_their_gradient(kind, case):
    defined(kind, case)


@quick
@given(case=odd.cases(dtype='float32', cells=(5, 16), student='normal'))
@example(
    case=odd.Case(cells=(5, 16), teacher='cells alike', layout='channels_last')
)
def test_the_layout_of_a_map_changes_nothing(kind, case):
    assume('many' not in case.boxes)
    found = []
    for layout in ('contiguous', case.layout):
        torch.manual_seed(0)
        loss = build(kind)
        one = case.but(layout=layout)
        student, teacher, _ = inputs(kind, one)
        torch.manual_seed(1)
        found.append(total(loss(student, teacher, one.ground_truth())))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)

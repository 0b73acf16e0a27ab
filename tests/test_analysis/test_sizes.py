"""Maps of another size are named, where a loss compares their values."""

import copy

import pytest
import runs
import tiny
import torch
from mmengine.registry import init_default_scope

from mmkd.analysis import checking
from mmkd.analysis.checking import check
from mmkd.analysis.sizes import LARGE, Sizes, compared_sizes

FEATURE = dict(type='mmkd.FeatureTerm', teacher='big', levels=(0, 1, 2))
WIDER = dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=16)
#: By name, whether the loss changes with the size of the student's maps.
TERMS = dict(
    mimic=(dict(FEATURE, loss=dict(type='mmkd.MimicLoss')), True),
    aligned=(
        dict(FEATURE, align=WIDER, loss=dict(type='mmkd.MimicLoss')),
        True,
    ),
    pkd=(dict(FEATURE, loss=dict(type='mmkd.PKDLoss')), False),
    at=(dict(FEATURE, loss=dict(type='mmkd.ATLoss')), False),
    scores=(  # numbers of a head are scores
        dict(
            FEATURE,
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.MimicLoss'),
        ),
        False,
    ),
    weighed=(  # as if every cell counted alike
        dict(
            FEATURE,
            weight=dict(type='mmkd.ScoreWeight'),
            loss=dict(type='mmkd.WeightedMSELoss'),
        ),
        False,
    ),
)


@pytest.fixture
def training(tmp_path):
    """A training whose teacher's maps are ``factor`` times as large."""

    def training(factor, **terms):
        init_default_scope('mmdet')
        runs.write_coco(tmp_path, images=4)
        file = tmp_path / f'{factor}.pth'
        tiny.save_teacher(tiny.retinanet(base=16), file)
        content = torch.load(file)
        for key, value in content['state_dict'].items():
            if key.startswith('neck.fpn_convs'):
                value *= factor
        torch.save(content, file)
        big = dict(
            config=dict(model=tiny.retinanet(base=16)), checkpoint=str(file)
        )
        model = tiny.distilled(tiny.retinanet(), dict(big=big), terms)
        return runs.config(tmp_path, tmp_path / 'never', model=model)

    return training


def looked_at(config):
    """The sheet of a check, and the sizes that it saw."""
    seen = []

    def see(*arguments):
        found = compared_sizes(*arguments)
        seen.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, 'compared_sizes', see)
        sheet = check(config, images=0, device='cpu', data=False)
    return sheet, seen[0]


def warnings(sheet):
    return [
        one.text
        for section in sheet.sections
        for one in section.findings
        if one.mark == 'warn' and 'compares values' in one.text
    ]


def test_only_losses_of_values_and_maps_are_looked_at(training):
    terms = {name: copy.deepcopy(term) for name, (term, _) in TERMS.items()}
    _, found = looked_at(training(1, **terms))
    assert [one.term for one in found] == [
        name for name, (_, depends) in TERMS.items() if depends
    ]
    plain, aligned = found
    assert aligned.student != pytest.approx(plain.student)
    assert aligned.teacher == plain.teacher


def test_the_sizes_are_those_of_the_maps(training):
    term = TERMS['mimic'][0]
    (plain,) = looked_at(training(1, mimic=term))[1]
    sheet, (large,) = looked_at(training(100, mimic=term))
    assert large.student == pytest.approx(plain.student)
    assert large.teacher == pytest.approx([100 * one for one in plain.teacher])
    assert not warnings(looked_at(training(1, mimic=term))[0])
    (said,) = warnings(sheet)
    times = [own / other for own, other in zip(large.teacher, large.student)]
    assert f'are {max(times):.0f} times as large' in said
    assert said.startswith("Term 'mimic' compares values")
    assert f'map {times.index(max(times))})' in said


def test_inside_of_a_group_as_well(training):
    group = dict(
        type='mmkd.BalancedTerm',
        share=1.0,
        terms=dict(mimic=TERMS['mimic'][0], pkd=TERMS['pkd'][0]),
    )
    sheet, (found,) = looked_at(training(100, group=group))
    assert found.term == 'group.mimic'
    assert len(warnings(sheet)) == 1


def test_patterns_may_be_of_any_size(training):
    sheet, found = looked_at(training(100, pkd=TERMS['pkd'][0]))
    assert (found, warnings(sheet)) == ([], [])


def test_the_level_that_differs_most_counts():
    one = Sizes('t', (1.0, 0.1, 2.0), (3.0, 2.0, 8.0))
    assert one.largest() == 1
    assert one.times() == pytest.approx(20)
    assert one.times() > LARGE
    assert Sizes('t', (0.0, 1.0), (1.0, 1.0)).largest() == 0


def test_a_term_that_rests_is_looked_at_where_its_maps_are_there(training):
    """It taps what another one makes the student record."""
    terms = dict(
        first=TERMS['mimic'][0],
        later=dict(
            TERMS['mimic'][0],
            teacher='other',
            schedule=dict(type='mmkd.Between', begin=0.5, end=1.0),
        ),
    )
    config = training(100, **terms)
    config.model.teachers.other = copy.deepcopy(config.model.teachers.big)
    sheet, found = looked_at(config)
    assert [one.term for one in found] == ['first', 'later']
    assert found[0].teacher == found[1].teacher
    assert len(warnings(sheet)) == 2
    assert not [
        one
        for section in sheet.sections
        for one in section.findings
        if one.mark == 'fail'
    ]

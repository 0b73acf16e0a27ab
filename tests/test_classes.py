import heads
import pytest
import rois
import tiny
from torch import nn

from mmkd.classes import (
    by_name,
    check_class_names,
    check_num_classes,
    class_channels,
    head_classes,
    shared_classes,
    with_classes,
)


def test_one_stage_has_one_head():
    model = tiny.build(heads.gfl())
    assert head_classes(model) == dict(bbox_head=tiny.CLASSES)


def test_proposals_have_no_classes():
    model = tiny.build(rois.mask())
    assert head_classes(model) == {
        'roi_head.bbox_head': tiny.CLASSES,
        'roi_head.mask_head': tiny.CLASSES,
    }


def test_neither_losses_nor_terms_nor_semantic_heads_count():
    model = nn.Module()
    for name in ('bbox_head', 'terms', 'semantic_head'):
        part = nn.Module()
        part.num_classes = 7
        model.add_module(name, part)
    model.bbox_head.loss_cls = nn.Module()
    model.bbox_head.loss_cls.num_classes = 8
    model.terms.head = nn.Module()
    model.terms.head.num_classes = 9
    assert head_classes(model) == dict(bbox_head=7)


def test_a_number_that_no_head_has_is_refused():
    model = tiny.build(heads.gfl())
    check_num_classes('It', model, tiny.CLASSES)
    check_num_classes('It', nn.Module(), 99)  # nothing is known
    with pytest.raises(ValueError, match=r'It .* 99 .* num_classes=3 in it'):
        check_num_classes('It', model, 99)


# By name ---------------------------------------------------------------------


def test_classes_are_found_by_name_whatever_their_order():
    theirs = ('dog', 'cat', 'cow')
    assert by_name(('cat', 'dog'), theirs) == ('cat', 'dog')
    assert by_name(('yak', 'cow', 'emu'), theirs) == (None, 'cow', None)
    assert by_name(('yak',), theirs) == (None,)


def test_those_that_are_shared_are_counted_among_the_student_s():
    assert shared_classes((None, 'cow', 'cat', None)) == (1, 2)
    assert shared_classes(('cow', 'cat')) is None


@pytest.mark.parametrize(
    ('names', 'said'),
    [
        ('cat', 'one name for each class'),
        ((1, 2), 'one name for each class'),
        (('cat', 'dog', 'cat'), "names 'cat' for several"),
        ((None, None), 'shares no class'),
        ((), 'shares no class'),
    ],
)
def test_a_list_that_says_nothing_is_refused(names, said):
    with pytest.raises(ValueError, match=rf'^It .*{said}'):
        check_class_names('It', names)
    assert check_class_names('It', ['a', None]) == ('a', None)


# Channels --------------------------------------------------------------------


def named(anchors, classes, before=(), after=()):
    """Channels by what they say: of an anchor and a class."""
    return [
        (anchor, one)
        for anchor in range(anchors)
        for one in (*before, *range(classes), *after)
    ]


@pytest.mark.parametrize('before', [(), ('x', 'y', 'w', 'h', 'there')])
@pytest.mark.parametrize('after', [(), ('background',)])
@pytest.mark.parametrize('kept', [(2, 0, 1, 3), (3, 1), (2,)])
def test_channels_go_by_anchor_and_class(before, after, kept):
    if before and after:
        return  # no detector has both
    every = named(3, 4, before, after)
    width = 4 + len(before) + len(after)
    found = [every[x] for x in class_channels(len(every), width, 4, kept)]
    assert found == [
        (anchor, one)
        for anchor in range(3)
        for one in (*before, *kept, *after)
    ]


def test_channels_of_one_class_may_lie_together():
    every = [(one, side) for one in range(3) for side in 'xywh']
    found = [every[x] for x in class_channels(12, 3, 3, (2, 0), by_class=True)]
    assert found == [(one, side) for one in (2, 0) for side in 'xywh']


@pytest.mark.parametrize(('size', 'width'), [(11, 4), (12, 6), (8, 2)])
def test_channels_of_an_unknown_order_are_refused(size, width):
    with pytest.raises(ValueError, match='not known to be those of 4'):
        class_channels(size, width, 4, (0,))


def test_a_config_gets_another_number_in_the_heads_alone():
    model = rois.mask()
    model['rpn_head']['num_classes'] = 1
    model['roi_head']['semantic_head'] = dict(num_classes=9)
    found = with_classes(model, 7)
    roi_head = found['roi_head']
    assert roi_head['bbox_head']['num_classes'] == 7
    assert roi_head['mask_head']['num_classes'] == 7
    assert roi_head['semantic_head']['num_classes'] == 9
    assert found['rpn_head']['num_classes'] == 1
    assert model['roi_head']['bbox_head']['num_classes'] == tiny.CLASSES
    cascade = with_classes(rois.cascade(), 7)['roi_head']['bbox_head']
    assert [one['num_classes'] for one in cascade] == [7, 7]

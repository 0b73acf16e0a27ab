import heads
import pytest
import rois
import tiny
from torch import nn

from mmkd.classes import check_num_classes, head_classes


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

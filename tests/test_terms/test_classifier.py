import detrs
import pytest
import rois
import tiny
import torch
from mmdet.registry import MODELS
from torch import nn

from mmkd.losses.lsh import LSHLoss
from mmkd.terms.classifier import classifier_weight, readers


def test_a_dense_head_has_its_convolution():
    detector = tiny.build(tiny.retinanet())
    found = classifier_weight('It', detector)
    assert torch.equal(found, detector.bbox_head.retina_cls.weight.flatten())
    assert not found.requires_grad
    assert torch.equal(classifier_weight('It', detector.bbox_head), found)


def test_a_second_stage_has_its_linear_layer_and_a_cascade_the_last():
    detector = tiny.build(rois.faster())
    expected = detector.roi_head.bbox_head.fc_cls.weight
    found = classifier_weight('It', detector)
    assert torch.equal(found, expected.flatten())
    detector = tiny.build(rois.cascade())
    first, last = (
        head.fc_cls.weight.flatten() for head in detector.roi_head.bbox_head
    )
    assert torch.equal(classifier_weight('It', detector), last)
    stage = detector.roi_head.bbox_head[0]
    assert torch.equal(classifier_weight('It', stage), first)


def test_a_head_with_a_layer_a_level_has_all_of_them():
    head = nn.Module()
    head.some_cls = nn.ModuleList([nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 3)])
    head.some_reg = nn.Conv2d(2, 4, 1)
    head.cls_convs = nn.ModuleList([nn.Conv2d(2, 2, 1)])
    head.loss_cls = MODELS.build(dict(type='FocalLoss'))
    expected = [one.weight.flatten() for one in head.some_cls]
    assert torch.equal(classifier_weight('It', head), torch.cat(expected))


def test_a_head_without_one_is_refused():
    with pytest.raises(ValueError, match=r'XLoss takes .* Set std= of the'):
        classifier_weight('XLoss', nn.Linear(2, 2))


def test_a_loss_asks_or_does_not():
    asking = LSHLoss(2, hash_num=3)
    losses = [asking, LSHLoss(2, hash_num=3, std=1.0), nn.Identity()]
    assert readers(losses) == [asking]


@pytest.mark.parametrize('kind', ['detr', 'refine'])
def test_a_head_of_queries_has_one_or_one_a_layer(kind):
    head = tiny.build(detrs.detr(kind)).bbox_head
    layers = [head.fc_cls] if kind == 'detr' else head.cls_branches
    expected = torch.cat([one.weight.flatten() for one in layers])
    assert torch.equal(classifier_weight('It', head), expected)

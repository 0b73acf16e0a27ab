from types import SimpleNamespace

import pytest
import torch

from mmkd.ops.anchors import valuable_region
from mmkd.structures import GroundTruth
from mmkd.terms.weights.valuable import ValuableWeight


@pytest.fixture
def gt():
    return GroundTruth.from_boxes(
        [torch.tensor([[10.0, 12, 50, 40]]), torch.zeros(0, 4)],
        shape=(64, 64),
    )


def anchors(size=4, stride=16, side=40):
    middles = (torch.arange(size) + 0.5) * stride
    y, x = torch.meshgrid(middles, middles, indexing='ij')
    half = side / 2
    one = torch.stack([x - half, y - half, x + half, y + half], -1)
    return one.reshape(1, -1, 4).expand(2, -1, -1)


def step(gt, labels):
    outputs = {'bbox_head': ([torch.zeros(2, 3, 4, 4)], ['boxes'])}
    outputs['bbox_head.get_targets'] = ([anchors()], [labels])
    head = SimpleNamespace(num_classes=3)
    return SimpleNamespace(
        gt=gt,
        student=SimpleNamespace(
            at=outputs.get, detector=SimpleNamespace(bbox_head=head)
        ),
    )


def test_the_region_without_the_positives(gt):
    labels = torch.full((2, 16), 3)
    (region,) = valuable_region([anchors()[0]], gt, 9, 0.25)
    (found,) = ValuableWeight()(step(gt, labels))
    torch.testing.assert_close(found, region.reshape(2, 1, 4, 4))
    place = region[0].argmax()
    labels[0, place] = 1
    (found,) = ValuableWeight()(step(gt, labels))
    region[0, place] = 0
    torch.testing.assert_close(found, region.reshape(2, 1, 4, 4))
    assert found[0].sum() > 0
    assert found[1].sum() == 0


def test_settings_reach_the_region(gt):
    labels = torch.full((2, 16), 3)
    (found,) = ValuableWeight(topk=3, ratio=0.7)(step(gt, labels))
    (region,) = valuable_region([anchors()[0]], gt, 3, 0.7)
    torch.testing.assert_close(found, region.reshape(2, 1, 4, 4))


def test_targets_of_another_shape_are_no_anchors(gt):
    one = step(gt, torch.full((2, 16), 3))
    labels = one.student.at('bbox_head.get_targets')[1]
    others = {'bbox_head': one.student.at('bbox_head')}
    others['bbox_head.get_targets'] = ([torch.ones(2, 16)], labels)
    one.student.at = others.get
    with pytest.raises(ValueError, match='SimpleNamespace has none'):
        ValuableWeight()(one)


@pytest.mark.parametrize('settings', [dict(topk=0), dict(ratio=1.5)])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match='ValuableWeight needs'):
        ValuableWeight(**settings)

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkd.backbones.timm_features import TimmFeatures


class FakeTimm(nn.Module):
    """As much of a model of timm as is used."""

    def __init__(self):
        super().__init__()
        self.feature_info = [dict(reduction=2), dict(reduction=8)]
        self.pretrained_cfg = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 1.0))

    def forward_intermediates(
        self, images, indices, norm, output_fmt, intermediates_only
    ):
        assert (indices, norm) == (1, True)
        assert (output_fmt, intermediates_only) == ('NCHW', True)
        return [F.avg_pool2d(images, 8)]


def test_a_model_of_timm_says_its_patch_and_its_pixels(monkeypatch):
    made = []
    fake = SimpleNamespace(
        create_model=lambda name, **more: (
            made.append((name, more)) or FakeTimm()
        )
    )
    monkeypatch.setitem(sys.modules, 'timm', fake)
    model = TimmFeatures('vit', dynamic_img_size=True)
    settings = dict(pretrained=True, num_classes=0, dynamic_img_size=True)
    assert made == [('vit', settings)]
    assert model.patch == 8
    assert model.pixels.mean == pytest.approx((127.5, 102, 76.5))
    assert model.pixels.std == pytest.approx((51, 25.5, 255))
    assert model.pixels.swapped
    assert model.pixels.divisor == 1
    assert model(torch.zeros(1, 3, 16, 24)).shape == (1, 3, 2, 3)


def test_without_timm_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match=r"'vit'.*pip install timm"):
        TimmFeatures('vit')


def test_real_models_of_timm_give_a_grid():
    pytest.importorskip('timm')
    model = TimmFeatures(
        'vit_tiny_patch16_224', pretrained=False, dynamic_img_size=True
    ).eval()
    images = torch.randn(1, 3, 32, 48)
    tokens = model.model.forward_features(images)
    grid = tokens[:, model.model.num_prefix_tokens :].mT.unflatten(2, (2, 3))
    torch.testing.assert_close(model(images), grid)

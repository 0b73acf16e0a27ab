import math

import pytest
import torch

from mmkd.ops.attention import channel_attention, spatial_attention


@pytest.fixture
def feature():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5)


def test_equals_the_literal_formula(feature):
    spatial = spatial_attention(feature, temperature=0.7)
    channel = channel_attention(feature, temperature=0.7)
    assert spatial.shape == (2, 1, 4, 5)
    assert channel.shape == (2, 3, 1, 1)
    for n in range(2):
        strength = {
            (y, x): math.exp(
                sum(abs(feature[n, c, y, x].item()) for c in range(3))
                / 3
                / 0.7
            )
            for y in range(4)
            for x in range(5)
        }
        total = sum(strength.values())
        for (y, x), one in strength.items():
            assert spatial[n, 0, y, x].item() == pytest.approx(
                20 * one / total, rel=1e-5
            )
        strength = [
            math.exp(feature[n, c].abs().sum().item() / 20 / 0.7)
            for c in range(3)
        ]
        for c in range(3):
            assert channel[n, c].item() == pytest.approx(
                3 * strength[c] / sum(strength), rel=1e-5
            )


def test_the_mean_of_each_image_is_one(feature):
    torch.testing.assert_close(
        spatial_attention(feature).mean((1, 2, 3)), torch.ones(2)
    )
    torch.testing.assert_close(
        channel_attention(feature).mean((1, 2, 3)), torch.ones(2)
    )


def test_sign_does_not_matter_and_temperature_divides(feature):
    for attention in (spatial_attention, channel_attention):
        torch.testing.assert_close(
            attention(-feature, 0.5), attention(2 * feature, 1.0)
        )


def test_a_large_map_in_half_precision_stays_finite():
    feature = torch.full((1, 2, 4, 4), 6e4, dtype=torch.float16)
    for attention in (spatial_attention, channel_attention):
        assert attention(feature).dtype == torch.float32
        assert (attention(feature) == 1).all()

import pytest
import torch

from mmkd.necks.projector import SimKDProjector


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 4, 8, 10), torch.randn(2, 4, 4, 5)


def test_a_level_is_three_convolutions_with_norms_and_two_relus(maps):
    """A literal version: of the maps' own statistics, while it trains."""
    projector = SimKDProjector(4, 8, num_levels=2)
    for one, level, result in zip(maps, projector.levels, projector(maps)):
        convs = [part for part in level if hasattr(part, 'kernel_size')]
        assert [conv.weight.shape for conv in convs] == [
            (4, 4, 1, 1),
            (4, 4, 3, 3),
            (8, 4, 1, 1),
        ]
        for index, conv in enumerate(convs):
            assert conv.bias is None
            one = torch.conv2d(one, conv.weight, padding=index % 2)
            std, mean = torch.std_mean(
                one, (0, 2, 3), correction=0, keepdim=True
            )
            one = (one - mean) / (std.square() + 1e-5).sqrt()
            one = one.clamp(min=0) if index < 2 else one
        torch.testing.assert_close(result, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(('factor', 'inner'), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_factor_narrows_what_is_inside(factor, inner):
    (level,) = SimKDProjector([6], 8, factor=factor).levels
    assert level[3].weight.shape == (inner, inner, 3, 3)
    # Convolutions without bias, norms with two numbers a channel.
    expected = 6 * inner + 9 * inner**2 + 8 * inner + 2 * (2 * inner + 8)
    assert sum(one.numel() for one in level.parameters()) == expected


def test_levels_share_nothing(maps):
    projector = SimKDProjector([4, 3], 8)
    out = projector((maps[0], maps[1][:, :3]))
    assert [tuple(one.shape) for one in out] == [(2, 8, 8, 10), (2, 8, 4, 5)]
    out[0].sum().backward()
    assert all(one.grad is None for one in projector.levels[1].parameters())


def test_both_signs_come_out_unless_a_relu_is_asked_for(maps):
    assert SimKDProjector(4, 8, 2)(maps)[0].min() < -1
    out = SimKDProjector(4, 8, 2, act=True)(maps)
    assert out[0].min() == 0
    assert out[0].max() > 1


def test_finer_maps_are_averaged_first(maps):
    plain, pooled = (SimKDProjector(4, 8, 2, pool=pool) for pool in (1, 2))
    pooled.load_state_dict(plain.state_dict())
    fine = tuple(
        one.repeat_interleave(2, 2).repeat_interleave(2, 3) for one in maps
    )
    noise = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    fine = tuple(
        one + noise.repeat(one.shape[2] // 2, one.shape[3] // 2)
        for one in fine
    )
    for one, other in zip(pooled(fine), plain(maps)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_odd_side_is_rounded_up_as_strides_are():
    (out,) = SimKDProjector([4], 8, pool=2)((torch.zeros(2, 4, 7, 9),))
    assert out.shape == (2, 8, 4, 5)


def test_wrong_settings_say_what_to_type(maps):
    with pytest.raises(ValueError, match='num_levels=5'):
        SimKDProjector(4, 8)
    with pytest.raises(ValueError, match='Leave num_levels out'):
        SimKDProjector([4, 4], 8, num_levels=3)
    with pytest.raises(ValueError, match='factor=2'):
        SimKDProjector(4, 8, 1, factor=16)
    for wrong in (dict(factor=0), dict(pool=0)):
        with pytest.raises(ValueError, match='> 0'):
            SimKDProjector(4, 8, 1, **wrong)
    with pytest.raises(ValueError, match='num_levels=2'):
        SimKDProjector(4, 8, 3)(maps)
    with pytest.raises(ValueError, match='channels to 4'):
        SimKDProjector(5, 8, 2)(maps)

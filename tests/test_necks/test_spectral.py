import pytest
import torch
import torch.nn.functional as F

from mmkd.necks.spectral import SpectralAdapt


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 6), torch.randn(2, 3, 3, 3)


def test_a_level_is_projected_normalised_bent_and_convolved(maps):
    adapt = SpectralAdapt([4, 3], [5, 6], mid_channels=7)
    results = adapt(maps)
    assert [tuple(one.shape) for one in results] == [
        (2, 5, 6, 6),
        (2, 6, 3, 3),
    ]
    for one, result, (enter, norm, _, leave) in zip(
        maps, results, adapt.adapts
    ):
        x = torch.einsum('oi,nihw->nohw', enter.weight[:, :, 0, 0], one)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
        expected = F.conv2d(x, leave.weight, leave.bias, padding=1)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_in_half_precision_does_not_stop_it(maps):
    adapt = SpectralAdapt(4, 5, num_levels=1)
    assert adapt((maps[0].half(),))[0].dtype == torch.float32


def test_all_of_it_learns(maps):
    adapt = SpectralAdapt([4, 3], 5)
    sum(one.square().sum() for one in adapt(maps)).backward()
    assert all(one.grad is not None for one in adapt.parameters())


def test_errors_name_the_neck_and_the_fix(maps):
    with pytest.raises(ValueError, match='SpectralAdapt has convolutions'):
        SpectralAdapt(4, 5)
    with pytest.raises(ValueError, match='SpectralAdapt needs one number'):
        SpectralAdapt([4, 4], [5])
    with pytest.raises(ValueError, match='Set num_levels'):
        SpectralAdapt(4, 5, num_levels=1)(maps)
    with pytest.raises(ValueError, match='Set its channels to 3'):
        SpectralAdapt(4, 5, num_levels=2)(maps)
    with pytest.raises(ValueError, match='mid_channels > 0'):
        SpectralAdapt(4, 5, num_levels=1, mid_channels=0)

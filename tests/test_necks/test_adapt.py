import pytest
import torch

from mmkd.necks.adapt import ConvAdapt, ResizeAdapt


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 4, 8, 10), torch.randn(2, 4, 4, 5)


@pytest.fixture
def like():
    return torch.zeros(2, 6, 16, 20), torch.zeros(2, 6, 4, 5)


def test_each_level_has_a_convolution_of_its_own(maps):
    adapt = ConvAdapt(4, 6, num_levels=2)
    adapted = adapt(maps)
    assert isinstance(adapted, tuple)
    for one, level, result in zip(maps, adapt.adapts, adapted):
        conv = level[0]
        expected = torch.einsum('oi,nihw->nohw', conv.weight[:, :, 0, 0], one)
        torch.testing.assert_close(result, expected)
    first, second = (level[0].weight for level in adapt.adapts)
    assert (first != second).any()


def test_channels_may_differ_from_level_to_level(maps):
    adapt = ConvAdapt([4, 3], [6, 8])
    adapted = adapt((maps[0], maps[1][:, :3]))
    assert [one.shape[1] for one in adapted] == [6, 8]


def test_a_fresh_adapter_keeps_the_scale_of_its_input():
    torch.manual_seed(0)
    feature = 3 * torch.randn(2, 64, 16, 16)
    (adapted,) = ConvAdapt(64, 64, num_levels=1)((feature,))
    assert adapted.mean().abs() < 0.2
    assert adapted.std().item() == pytest.approx(3, rel=0.1)
    (adapted,) = ConvAdapt(64, 64, num_levels=1, act=True)((feature,))
    assert adapted.square().mean().sqrt().item() == pytest.approx(3, rel=0.1)


def test_norm_and_activation_follow_the_convolution(maps):
    (adapted,) = ConvAdapt(4, 6, 1, norm=True)(maps[:1])
    torch.testing.assert_close(
        adapted.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        adapted.var((0, 2, 3), correction=0), torch.ones(6), rtol=1e-3, atol=0
    )
    adapt = ConvAdapt(4, 6, 1, norm=True, act=True)
    torch.nn.init.ones_(adapt.adapts[0][1].bias)
    adapted = adapt(maps[:1])[0]
    assert adapted.min() == 0
    assert adapted.mean() > 1


def test_of_two_convolutions_the_first_changes_the_channels(maps):
    """A ReLU lies between them, and none after the last."""
    adapt = ConvAdapt([4, 4], [6, 5], convs=2)
    for one, level, result, channels in zip(
        maps, adapt.adapts, adapt(maps), (6, 5)
    ):
        first, _, second = level
        assert first.weight.shape == (channels, 4, 1, 1)
        assert second.weight.shape == (channels, channels, 1, 1)
        hidden = torch.conv2d(one, first.weight, first.bias).clamp(min=0)
        expected = torch.conv2d(hidden, second.weight, second.bias)
        assert expected.min() < 0
        torch.testing.assert_close(result, expected)


def test_settings_hold_for_each_of_two_convolutions(maps):
    adapt = ConvAdapt(4, 6, 1, kernel_size=3, norm=True, act=True, convs=2)
    assert [type(one).__name__ for one in adapt.adapts[0]] == [
        *('Conv2d', 'BatchNorm2d', 'ReLU'),
        *('Conv2d', 'BatchNorm2d', 'ReLU'),
    ]
    assert adapt.adapts[0][0].weight.shape == (6, 4, 3, 3)
    assert adapt.adapts[0][3].weight.shape == (6, 6, 3, 3)
    assert adapt.adapts[0][0].bias is None
    (adapted,) = adapt(maps[:1])
    assert adapted.shape == (2, 6, 8, 10)


def test_fresh_convolutions_keep_the_scale_of_their_input():
    torch.manual_seed(0)
    feature = 3 * torch.randn(2, 256, 16, 16)
    (adapted,) = ConvAdapt(256, 256, num_levels=1, convs=2)((feature,))
    assert adapted.square().mean().sqrt().item() == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_the_size_stays(maps, kernel_size):
    adapted = ConvAdapt(4, 6, 2, kernel_size=kernel_size)(maps)
    assert [one.shape[2:] for one in adapted] == [
        one.shape[2:] for one in maps
    ]


def test_resize_brings_the_student_to_the_teachers_size(maps, like):
    adapt = ConvAdapt(4, 6, 2, resize='student')
    assert [one.shape for one in adapt(maps, like)] == [
        one.shape for one in like
    ]


def test_a_linear_map_stays_linear_when_resized():
    steps = torch.arange(8) + 0.5
    feature = steps.expand(1, 1, 8, 8)
    (resized,) = ResizeAdapt()((feature,), (torch.zeros(1, 1, 8, 4),))
    torch.testing.assert_close(
        resized[0, 0, 0], torch.tensor([1.0, 3.0, 5.0, 7.0])
    )


def test_a_map_of_the_right_size_is_handed_through(maps):
    for mode in ('bilinear', 'nearest', 'area'):
        resized = ResizeAdapt(mode)(maps, maps)
        assert all(a is b for a, b in zip(resized, maps))


def test_only_the_size_of_the_other_maps_is_read(maps):
    like = torch.full((2, 6, 3, 3), torch.nan, requires_grad=True)
    (resized,) = ResizeAdapt()(maps[:1], (like,))
    assert resized.isfinite().all()
    assert not resized.requires_grad


def test_gradient_is_that_of_finite_differences(maps, like):
    adapt = ConvAdapt(4, 2, 1, kernel_size=3, act=True, resize='student')
    adapt = adapt.double()
    feature = maps[1][:, :, :3, :3].double().requires_grad_()
    other = torch.zeros(1, 1, 4, 5)
    assert torch.autograd.gradcheck(
        lambda one: adapt((one,), (other,))[0], feature
    )


def test_maps_in_half_precision_are_adapted_without_autocast(maps):
    adapt = ConvAdapt(4, 6, num_levels=2)
    half = tuple(one.half() for one in maps)
    for one, other in zip(adapt(half), adapt(maps)):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


def test_an_unknown_number_of_levels_names_the_fix():
    with pytest.raises(ValueError, match=r'levels=\(0, 1, 2, 3, 4\)'):
        ConvAdapt(4, 6)


@pytest.mark.parametrize(
    'settings',
    [
        dict(in_channels=[4, 4], out_channels=[6]),
        dict(in_channels=[4, 4], out_channels=6, num_levels=3),
    ],
)
def test_contradictory_numbers_of_levels_are_refused(settings):
    with pytest.raises(ValueError, match='one number of levels'):
        ConvAdapt(**settings)


def test_wrong_maps_are_named(maps):
    with pytest.raises(ValueError, match='expects 3 maps, got 2'):
        ConvAdapt(4, 6, num_levels=3)(maps)
    with pytest.raises(ValueError, match='ConvAdapt was built for 5'):
        ConvAdapt(5, 6, num_levels=2)(maps)
    with pytest.raises(ValueError, match='like=None'):
        ResizeAdapt()(maps)
    with pytest.raises(ValueError, match='expects 1 maps, got 2'):
        ResizeAdapt()(maps, maps[:1])


def test_misspelt_settings_fail_at_build():
    with pytest.raises(ValueError, match="Did you mean 'bilinear'"):
        ResizeAdapt('bilinar')
    with pytest.raises(ValueError, match="Did you mean 'student'"):
        ConvAdapt(4, 6, 1, resize='students')
    with pytest.raises(ValueError, match='kernel_size=3'):
        ConvAdapt(4, 6, 1, kernel_size=2)
    with pytest.raises(ValueError, match='ConvAdapt needs convs > 0'):
        ConvAdapt(4, 6, 1, convs=0)

import pytest
import torch
from mmengine.registry import init_default_scope

from mmkd.backbones.assisted import ResidualBackbone

SHAPES = [(2, 24, 8, 8), (2, 48, 4, 4), (2, 96, 2, 2)]


def resnet(base, **settings):
    return dict(
        dict(
            type='ResNet',
            depth=18,
            base_channels=base,
            stem_channels=base,
            out_indices=(1, 2, 3),
            frozen_stages=-1,
            norm_eval=False,
        ),
        **settings,
    )


def fpn(base):
    return dict(
        type='FPN',
        in_channels=[2 * base, 4 * base, 8 * base],
        out_channels=16,
        num_outs=5,
    )


def build(main=8, assistant=2, out_channels=(24, 48, 96), **settings):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    net = ResidualBackbone(
        resnet(main), resnet(assistant), out_channels, **settings
    )
    net.init_weights()
    return net


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 64)


def test_it_is_the_sum_of_two_convolved_backbones(images):
    net = build().eval()
    found = net(images)
    assert len(found) == len(net.main.strides) == 3
    for level, one in enumerate(found):
        expected = 0
        for branch in (net.main, net.assistant):
            maps = branch.net(images)[level]
            conv = branch.laterals[level]
            weight = conv.weight[:, :, 0, 0]
            expected = expected + torch.einsum('oi,nihw->nohw', weight, maps)
            expected = expected + conv.bias[:, None, None]
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)
    assert [tuple(one.shape) for one in found] == SHAPES


def test_a_student_of_the_teachers_channels_needs_no_convolution(images):
    """Its maps stay as they are; the assistant's need both signs."""
    net = build(out_channels=(16, 32, 64)).eval()
    assert not list(net.main.laterals.parameters())
    for one, other in zip(net.main(images), net.main.net(images)):
        assert torch.equal(one, other)
    equal = build(main=8, assistant=8, out_channels=(16, 32, 64)).eval()
    for one in equal.assistant(images):
        assert one.min() < 0 < one.max()
    assert len(list(equal.assistant.laterals.parameters())) == 6


def test_without_the_assistant_the_sum_is_another(images):
    net = build().eval()
    whole, main = net(images), net.main(images)
    for one, other in zip(whole, main):
        assert (one - other).abs().max() > 0.01
    with torch.no_grad():
        for one in net.assistant.laterals.parameters():
            one.zero_()
    for one, other in zip(net(images), main):
        assert torch.equal(one, other)


def test_maps_of_a_pyramid_are_added_behind_necks_of_their_own(images):
    net = build(
        out_channels=16, main_neck=fpn(8), assistant_neck=fpn(2)
    ).eval()
    found = net(images)
    assert [one.shape[-1] for one in found] == [8, 4, 2, 1, 1]
    for level, one in enumerate(found):
        main = net.main.neck(net.main.net(images))[level]
        rest = net.assistant.neck(net.assistant.net(images))[level]
        conv = net.assistant.laterals[level]
        expected = main + torch.conv2d(rest, conv.weight, conv.bias)
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-4)


def test_to_be_built_changes_nothing_of_what_it_holds():
    """Channels are found by a pass, which leaves statistics and modes."""
    net = build()
    for one in net.modules():
        assert one.training
        if isinstance(one, torch.nn.BatchNorm2d):
            assert one.num_batches_tracked == 0
    frozen = build()
    assert all(one.requires_grad for one in frozen.parameters())


def test_both_begin_with_their_own_initialisation():
    net = ResidualBackbone(
        resnet(8, init_cfg=dict(type='Constant', layer='Conv2d', val=0.5)),
        resnet(2, init_cfg=dict(type='Constant', layer='Conv2d', val=0.25)),
        (24, 48, 96),
    )
    net.init_weights()
    assert (net.main.net.conv1.weight == 0.5).all()
    assert (net.assistant.net.conv1.weight == 0.25).all()
    assert net.main.laterals[0].weight.std() > 0


def test_it_is_built_without_memory_for_its_weights():
    with torch.device('meta'):
        net = ResidualBackbone(resnet(8), resnet(2), (24, 48, 96))
    assert next(net.parameters()).is_meta


def test_what_cannot_be_added_says_what_to_type():
    init_default_scope('mmdet')
    with pytest.raises(ValueError, match='8, 16, 32 of main and 4, 8, 16 of'):
        ResidualBackbone(
            resnet(8), resnet(2, out_indices=(0, 1, 2)), (24, 48, 96)
        )
    with pytest.raises(ValueError, match='3 maps of main.+out_indices='):
        ResidualBackbone(resnet(8), resnet(2), (24, 48))
    with pytest.raises(ValueError, match="assistant of type.+'base_channels'"):
        ResidualBackbone(resnet(8), resnet(2, base_chanels=2), 16)

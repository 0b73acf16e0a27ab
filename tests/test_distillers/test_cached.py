"""What several teachers said, read from the disk."""

import copy

import pytest
import tiny
import torch
from kept_said import keep
from mmengine.structures import InstanceData

SHAPES = ((128, 128), (96, 128), (128, 112))


@pytest.fixture
def build(tmp_path, teachers, terms):
    """A student of two teachers, one of which is shown another tap."""
    wide = tiny.retinanet(base=24)
    file = tiny.save_teacher(wide, tmp_path / 'wide.pth')
    teachers['wide'] = dict(config=dict(model=wide), checkpoint=str(file))
    terms['scores'] = dict(
        type='mmkd.FeatureTerm',
        teacher='wide',
        tap='bbox_head',
        output=0,
        levels=(0, 1),
        loss=dict(type='mmkd.CWDLoss'),
    )

    def build(cache=None):
        given = copy.deepcopy(teachers)
        for name, one in given.items():
            one['cache'] = 0.0 if cache is None else str(cache / name)
        model = tiny.build(tiny.distilled(tiny.retinanet(), given, terms))
        model.teachers.load()
        return model.train()

    return build


def batch(*unlabelled):
    images, samples = tiny.batch(shapes=SHAPES)
    for index in unlabelled:
        samples[index].gt_instances = InstanceData()
    return tiny.pixels(images, samples)


def learnt(model, data):
    """Shares of the terms, and the gradient that they and labels give."""
    made = model.data_preprocessor(data, True)
    losses = model.loss(made['inputs'], made['data_samples'])
    model.parse_losses(losses)[0].backward()
    shares = {key: one for key, one in losses.items() if 'loss_kd' in key}
    return shares, model.backbone.conv1.weight.grad


@pytest.mark.parametrize(
    ('precision', 'error'), [('fp32', 1e-5), ('int8', 2e-2)]
)
@pytest.mark.parametrize('unlabelled', [(), (0, 2)])
def test_several_teachers_and_images_without_labels(
    build, tmp_path, precision, error, unlabelled
):
    """Terms and gradients are those of teachers that run."""
    online = build()
    keep(online, tmp_path, [batch()], precision)
    cached = build(tmp_path)
    for one in cached.teachers.values():
        one.detector._forward = None  # does not run
    (wanted, slope), (found, own) = (
        learnt(one, batch(*unlabelled)) for one in (online, cached)
    )
    assert wanted.keys() == {'loss_kd_pkd', 'loss_kd_scores'}
    for key, one in wanted.items():
        assert one > 1e-3
        torch.testing.assert_close(found[key], one, rtol=error, atol=0)
    assert (own - slope).norm() < error * slope.norm()
    assert [one.memory.hits for one in cached.teachers.values()] == [3, 3]


def test_what_is_kept_is_each_teacher_s_own(build, tmp_path):
    keep(build(), tmp_path, [batch()])
    (tmp_path / 'big').rename(tmp_path / 'other')
    (tmp_path / 'wide').rename(tmp_path / 'big')
    (tmp_path / 'other').rename(tmp_path / 'wide')
    with pytest.raises(ValueError, match=r"Teacher 'big'.*is stale"):
        build(tmp_path)

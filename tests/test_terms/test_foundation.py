import copy
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmkd.configs import read_config, student_config
from mmkd.pixels import Pixels
from mmkd.registry import MODELS
from mmkd.terms.foundation import IMAGENET, FoundationTerm

CONFIG = (
    Path(__file__).parents[2]
    / 'configs/foundation'
    / 'foundation_retinanet_r50-from-dinov2-b14_fpn_1x_coco.py'
)
PATCH = 4
STRIDE = 32  # of the backbone's last map


class Means(nn.Module):
    """The mean colour of each patch, and a constant: four channels."""

    patch = PATCH
    built = 0

    def __init__(self, scale=1.0):
        super().__init__()
        type(self).built += 1
        self.scale = nn.Parameter(torch.tensor(scale))
        self.norm = nn.BatchNorm2d(3)
        self.seen = []

    def forward(self, images):
        assert not torch.is_grad_enabled()
        self.seen.append(images)
        means = F.avg_pool2d(images, PATCH) * self.scale
        return torch.cat([means, torch.ones_like(means[:, :1])], 1)


@pytest.fixture(autouse=True)
def registered():
    before = dict(MODELS._module_dict), dict(MODELS.peer._module_dict)
    Means.built = 0
    MODELS.register_module(module=Means)
    yield
    for registry, entries in zip((MODELS, MODELS.peer), before):
        registry._module_dict.clear()
        registry._module_dict.update(entries)


def config(**settings):
    return {
        'type': 'mmkd.FoundationTerm',
        'model': dict(type='mmkd.Means'),
        'in_channels': 64,
        'out_channels': 4,
        **settings,
    }


def build(student=None, **settings):
    term = config(**settings)
    model = tiny.distilled(student or tiny.retinanet(), {}, dict(vfm=term))
    return tiny.build(model).train()


def model_of(student):
    return student.terms['vfm'].model._module


def as_imagenet(images, samples):
    """What a model of ImageNet would have been shown, grey at the border."""
    images = images.clone()
    for image, sample in zip(images, samples):
        height, width = sample.img_shape
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images


def literal(student, images, samples, patches=1):
    """Cell by cell of the images' own area."""
    with torch.no_grad():
        feature = copy.deepcopy(student).backbone(images)[-1]
    conv = student.terms['vfm'].projector.adapts[0][0]
    rows, columns = feature.shape[-2:]
    side = PATCH * patches
    small = F.interpolate(
        as_imagenet(images, samples),
        (rows * side, columns * side),
        mode='bilinear',
        antialias=True,
    )
    values = []
    for n, sample in enumerate(samples):
        height, width = sample.img_shape
        for y in range(-(-height // STRIDE)):
            for x in range(-(-width // STRIDE)):
                patch = small[n, :, y * side :, x * side :][:, :side, :side]
                target = torch.cat([patch.mean((1, 2)), torch.ones(1)])
                own = conv.weight[:, :, 0, 0] @ feature[n, :, y, x] + conv.bias
                cosine = own @ target / (own.norm() * target.norm())
                values.append(1 - cosine)
    return torch.stack(values).mean()


@pytest.mark.parametrize('patches', [1, 2])
def test_equals_one_minus_the_cosine_cell_by_cell(patches):
    student = build(patches=patches, loss_weight=3.0)
    images, samples = tiny.batch()
    expected = literal(student, images, samples, patches)
    found = student.loss(images, samples)['loss_kd_vfm']
    torch.testing.assert_close(found, 3 * expected)
    (shown,) = model_of(student).seen
    assert shown.shape[-2:] == (4 * PATCH * patches, 4 * PATCH * patches)


def test_parallel_features_cost_nothing_and_opposite_ones_two():
    student = build()
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    images.zero_()  # each patch is (0, 0, 0, 1)
    conv = student.terms['vfm'].projector.adapts[0][0]
    nn.init.zeros_(conv.weight)
    for last, expected in ((5.0, 0.0), (-5.0, 2.0)):
        conv.bias.data = torch.tensor([0.0, 0.0, 0.0, last])
        found = student.loss(images, samples)['loss_kd_vfm']
        assert found.item() == pytest.approx(expected, abs=1e-5)


def test_other_maps_of_other_parts_are_compared_by_choice():
    student = build(tap='neck', level=1, in_channels=16)
    images, samples = tiny.batch()
    student.loss(images, samples)
    (shown,) = model_of(student).seen
    assert shown.shape[-2:] == (8 * PATCH, 8 * PATCH)  # stride 16


def test_it_sees_images_in_a_normalisation_of_its_own():
    other = dict(
        tiny.PIXELS, mean=[10.0, 20, 30], std=[2.0, 2, 2], bgr_to_rgb=False
    )
    student = build(tiny.retinanet(pixels=other))
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    student.loss(images, samples)
    (shown,) = model_of(student).seen
    colours = images * 2 + torch.tensor([10.0, 20, 30])[:, None, None]
    mean = torch.tensor(IMAGENET.mean)[:, None, None]
    std = torch.tensor(IMAGENET.std)[:, None, None]
    expected = F.interpolate(
        (colours.flip(1) - mean) / std,
        shown.shape[-2:],
        mode='bilinear',
        antialias=True,
    )
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-4)


def test_a_model_may_want_other_pixels(monkeypatch):
    pixels = Pixels((0.0,) * 3, (1.0,) * 3, True, 7.0, 1)
    monkeypatch.setattr(Means, 'pixels', pixels, raising=False)
    student = build()
    images, samples = tiny.batch(shapes=((128, 128), (64, 64)))
    student.loss(images, samples)
    (shown,) = model_of(student).seen
    assert (shown[1, :, -PATCH:, -PATCH:] == 7).all()
    assert shown[0].mean() > 50  # bytes


def test_the_gradient_reaches_student_and_projector_and_not_the_model():
    student = build()
    student.loss(*tiny.batch())['loss_kd_vfm'].backward()
    assert student.backbone.layer4[0].conv1.weight.grad.abs().sum() > 0
    learning = student.terms['vfm'].projector.parameters()
    assert all(one.grad.abs().sum() > 0 for one in learning)
    assert model_of(student).scale.grad is None
    assert not any(one.requires_grad for one in model_of(student).parameters())


def test_autocast_does_not_lower_the_precision_of_the_cosine():
    student = build()
    images, samples = tiny.batch()
    with torch.autocast('cpu', torch.bfloat16):
        found = student.loss(images, samples)['loss_kd_vfm']
    assert found.dtype == torch.float32
    assert found.isfinite()


def test_images_without_boxes_are_as_good_as_others():
    student = build()
    images, samples = tiny.batch(boxes=0)
    assert student.loss(images, samples)['loss_kd_vfm'] > 0


def test_an_image_that_is_ignored_as_a_whole_is_defined():
    student = build()
    images, samples = tiny.batch()
    for sample in samples:
        sample.ignored_instances.bboxes = torch.tensor([[0.0, 0, 128, 128]])
        sample.ignored_instances.labels = torch.zeros(1, dtype=torch.long)
    assert student.loss(images, samples)['loss_kd_vfm'] == 0


# Out of sight ----------------------------------------------------------------


def test_it_is_built_once_and_in_the_first_step():
    student = build()
    assert Means.built == 0
    student.init_weights()
    assert Means.built == 0
    for _ in range(2):
        student.loss(*tiny.batch())
    assert Means.built == 1


def test_nothing_that_walks_modules_sees_it():
    student = build()
    before = list(student.state_dict())
    student.loss(*tiny.batch())
    model = model_of(student)
    assert list(student.state_dict()) == before
    terms = [key for key in before if key.startswith('terms.')]
    assert all('projector' in key for key in terms)
    assert not any(one is model for one in student.modules())
    student.train()
    assert not any(one.training for one in model.modules())
    student.init_weights()
    assert model.scale == 1
    student.double()
    assert model.scale.dtype == torch.float32


def test_copies_of_the_student_share_it():
    student = build()
    early = ExponentialMovingAverage(student)
    student.loss(*tiny.batch())
    late = copy.deepcopy(student)
    assert model_of(late) is model_of(student)
    assert model_of(early.module) is model_of(student)


def test_building_it_draws_nothing_from_the_students_random_stream():
    student = build()
    plain = tiny.build(tiny.retinanet()).train()
    states = []
    for one in (student, plain):
        torch.manual_seed(3)
        one.loss(*tiny.batch())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# Mistakes --------------------------------------------------------------------


def test_what_can_be_known_fails_while_the_student_is_built():
    with pytest.raises(ValueError, match=r"Did you mean 'mmkd\.Means'"):
        build(model=dict(type='mmkd.Meanz'))
    with pytest.raises(ValueError, match='Set its channels to 64'):
        build(in_channels=8)
    with pytest.raises(ValueError, match='levels 0 to 3; .* level=4'):
        build(level=4)
    with pytest.raises(ValueError, match='level=-5'):
        build(level=-5)
    with pytest.raises(ValueError, match="mean 'backbone'"):
        build(tap='bakbone')
    with pytest.raises(ValueError, match='patches > 0'):
        build(patches=0)


def test_features_of_other_channels_name_the_fix():
    student = build(out_channels=5)
    with pytest.raises(ValueError, match=r'Set out_channels=4, .* 4 now'):
        student.loss(*tiny.batch())


def test_a_model_that_does_not_say_its_patch_is_told(monkeypatch):
    monkeypatch.delattr(Means, 'patch')
    with pytest.raises(ValueError, match=r'Means does not say.*patch='):
        build().loss(*tiny.batch())
    student = build(patch=PATCH)
    images, samples = tiny.batch()
    expected = literal(student, images, samples)
    found = student.loss(images, samples)['loss_kd_vfm']
    torch.testing.assert_close(found, expected)


def test_a_backbone_of_mmdetection_gives_its_last_map(tmp_path):
    """Its weights are those that its init_cfg names."""
    backbone = tiny.build(tiny.retinanet(base=16)).backbone
    backbone.eval()
    file = tmp_path / 'backbone.pth'
    torch.save(dict(state_dict=backbone.state_dict()), file)
    pretrained = dict(type='Pretrained', checkpoint=str(file))
    student = build(
        model=tiny.backbone(16, init_cfg=pretrained),
        out_channels=128,
        patch=STRIDE,
    )
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    with torch.no_grad():
        target = backbone(images)[-1]
        feature = copy.deepcopy(student).backbone(images)[-1]
    (own,) = student.terms['vfm'].projector((feature,))
    found = student.loss(images, samples)['loss_kd_vfm']
    expected = 1 - F.cosine_similarity(own, target, dim=1).mean()
    torch.testing.assert_close(found, expected)


def test_weight_zero_is_silent():
    assert FoundationTerm(
        dict(type='mmkd.Means'), 64, 4, loss_weight=0
    ).silent()
    student = build(loss_weight=0.0)
    student.loss(*tiny.batch())
    assert Means.built == 0


# The published config --------------------------------------------------------


def test_the_coco_config_builds_without_the_model_and_then_learns():
    """It fetches nothing until it trains; another model takes its place."""
    base = read_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    config = read_config(CONFIG)
    plain = student_config(config.model).to_dict()
    plain.pop('_scope_')  # added by MMEngine
    assert plain == base.model.to_dict()
    config.model.backbone.init_cfg = None
    student = tiny.build(config.model).train()
    student.init_weights()
    term = student.terms['dino']
    assert term.model.config['type'] == 'mmkd.TimmFeatures'
    term.model.config = dict(type=Wide)
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    student.loss(images, samples)['loss_kd_dino'].backward()
    (shown,) = term.model._module.seen
    assert shown.shape == (2, 3, 4 * 14, 4 * 14)
    reached = student.backbone.layer4.parameters()
    assert sum(one.grad.abs().sum() for one in reached) > 0


class Wide(Means):
    """As much of DINOv2 as the term sees."""

    patch = 14

    def forward(self, images):
        self.seen.append(images)
        return F.avg_pool2d(images, 14).repeat(1, 256, 1, 1)

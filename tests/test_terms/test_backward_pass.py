import copy
from itertools import pairwise

import heads
import pytest
import tiny
import torch

from mmkd.taps import recording
from mmkd.terms.decoding import decode

CLASSES = 3
ADAPT = dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=32)
STD = torch.tensor(tiny.PIXELS['std'])[:, None, None]
MEAN = torch.tensor(tiny.PIXELS['mean'])[:, None, None]


def term(**settings):
    return dict(type='mmkd.BackwardPassTerm', teacher='big', **settings)


@pytest.fixture
def build(tmp_path):
    def build(kind='retinanet', teacher=None, **settings):
        teacher = teacher or getattr(heads, kind)(base=16)
        file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth', seed=3)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        student = getattr(heads, kind)()
        model = tiny.distilled(
            student, dict(big=big), dict(x=term(**settings))
        )
        model = tiny.build(model)
        model.teachers.load()
        # Else scores of an untrained head are all alike.
        for seed, one in enumerate((model, model.teachers['big'].detector)):
            torch.manual_seed(seed)
            for name, weight in one.bbox_head.named_parameters():
                if name.endswith('weight') and weight.ndim > 1:
                    torch.nn.init.normal_(weight.data, std=0.05)
        return model.train()

    return build


def steps_of(model, images, samples):
    """The step that the term is shown, and what it says of it."""
    kept = []
    model.terms['x'].register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    losses = model.loss(images, samples)
    return kept[-1], losses


def widened(model, batch):
    step, _ = steps_of(model, *batch)
    return model.terms['x'].widened(step)


def both(model, images):
    """What the two heads say of images, in eval mode, with a graph."""
    found = []
    big = model.teachers['big'].detector
    modes = [(one, one.training) for one in model.modules()]
    model.eval()
    for one in (model, big):
        found.append(one.bbox_head(one.extract_feat(images)))
    boxes = [
        decode(one.bbox_head, out[1]) for one, out in zip((model, big), found)
    ]
    for one, training in modes:
        one.training = training
    scores = [
        [
            one.unflatten(1, (-1, CLASSES)).permute(0, 1, 3, 4, 2).sigmoid()
            for one in out[0]
        ]
        for out in found
    ]
    return scores, boxes


def weights_of(model, images, samples):
    """The teacher's best score of each anchor, 0 on the border."""
    scores, _ = both(model, images)
    weights = []
    for level in scores[1]:
        weight = level.detach().amax(-1).clone()
        for index, sample in enumerate(samples):
            height, width = sample.img_shape
            rows, columns = weight.shape[-2:]
            weight[index, :, -(-rows * height // 128) :] = 0
            weight[index, :, :, -(-columns * width // 128) :] = 0
        weights.append(weight)
    return weights


def literal_gap(model, images, weights, divergence='cls+box'):
    """D of each image, by the formula."""
    scores, boxes = both(model, images)
    gaps = []
    for index in range(len(images)):
        total = count = 0.0
        for level, weight in enumerate(weights):
            error = torch.zeros_like(weight[index])
            if 'cls' in divergence:
                one, other = (side[level][index] for side in scores)
                error = error + ((one - other) ** 2).sum(-1)
            if 'box' in divergence:
                one, other = (side[level][index] for side in boxes)
                error = error + ((one - other) / 128).abs().sum(1)
            total = total + (weight[index] * error).sum()
            count = count + weight[index].sum()
        gaps.append(total / count)
    return torch.stack(gaps)


@pytest.mark.parametrize('kind', ['retinanet', 'gfl', 'fcos'])
@pytest.mark.parametrize('divergence', ['cls+box', 'cls', 'box'])
def test_both_parts_are_the_gap_written_out(build, kind, divergence):
    model = build(
        kind, divergence=divergence, clean_weight=2.0, aux_weight=3.0
    ).eval()
    images, samples = tiny.batch()
    step, losses = steps_of(model, images, samples)
    moved = model.terms['x'].widened(step)
    for one, part, factor in ((images, 'clean', 2), (moved, 'aux', 3)):
        weights = weights_of(model, one, samples)
        wanted = literal_gap(model, one, weights, divergence).mean()
        found = losses[f'loss_kd_x_{part}']
        torch.testing.assert_close(found, factor * wanted, rtol=1e-3, atol=0)
        assert found > 0


def test_the_direction_is_the_gradient_through_both_networks(build):
    model = build(num_steps=1, step_size=1e6, norm='raw')
    images, samples = tiny.batch()
    images = images.clamp(-1, 1)
    moved = widened(model, (images, samples))
    shown = images.clone().requires_grad_()
    weights = weights_of(model, images, samples)
    gap = literal_gap(model, shown, weights).sum()
    (slope,) = torch.autograd.grad(gap, shown)
    slope[1, :, 96:] = slope[1, :, :, 112:] = 0
    # To pixels and back: a value of a pixel is 1 / std of a normalised one.
    wanted = 1e6 * slope / STD**2
    torch.testing.assert_close(moved - images, wanted, rtol=1e-2, atol=1e-6)
    assert wanted.abs().max() > 1e-2


def test_without_a_norm_the_gap_grows_with_every_small_step(build):
    model = build(norm='raw', step_size=1e5)
    images, samples = tiny.batch()
    images = images.clamp(-1, 1)
    weights = weights_of(model, images, samples)
    gaps = [literal_gap(model, images, weights)]
    for count in (1, 2, 3):
        model.terms['x'].num_steps = count
        moved = widened(model, (images, samples))
        gaps.append(literal_gap(model, moved, weights))
    for one, other in pairwise(gaps):
        assert (other > one).all()


def test_noise_of_the_same_norm_widens_far_less(build):
    model = build(num_steps=2, step_size=2.0)
    images, samples = tiny.batch()
    images = images.clamp(-1, 1)
    weights = weights_of(model, images, samples)
    before = literal_gap(model, images, weights).mean()
    change = widened(model, (images, samples)) - images
    climbed = literal_gap(model, images + change, weights).mean() - before
    torch.manual_seed(0)
    noise = torch.randn_like(change) * (change != 0)
    for norm in (2, torch.inf):
        same = noise * (change.norm(norm) / noise.norm(norm))
        found = literal_gap(model, images + same, weights).mean() - before
        assert climbed > 5 * found.abs()


def test_two_that_agree_leave_the_images_and_cost_nothing(build):
    for norm in ('raw', 'linf', 'l2'):
        model = build(teacher=heads.retinanet(), norm=norm)
        big = model.teachers['big'].detector
        model.load_state_dict(big.state_dict(), strict=False)
        batch = tiny.batch()
        model.eval()
        step, losses = steps_of(model, *batch)
        assert torch.equal(model.terms['x'].widened(step), batch[0])
        assert losses['loss_kd_x_clean'] == losses['loss_kd_x_aux'] == 0


def test_the_border_and_the_range_of_pixels_are_respected(build):
    model = build(num_steps=3, step_size=40.0)
    images, samples = tiny.batch()
    white, black = (255 - MEAN) / STD, (0 - MEAN) / STD
    images = torch.minimum(torch.maximum(images, black), white)
    images[1, :, 96:] = images[1, :, :, 112:] = 0
    moved = widened(model, (images, samples))
    assert torch.equal(moved[1, :, 96:], images[1, :, 96:])
    assert torch.equal(moved[1, :, :, 112:], images[1, :, :, 112:])
    values = moved * STD + MEAN
    assert values.min() > -1e-3
    assert values.max() < 255 + 1e-3
    change = ((moved - images) * STD).abs()
    assert change[0].max() > 60
    assert change.max() <= 120.01


def test_each_image_takes_its_own_step(build):
    model = build(num_steps=1, step_size=2.0)
    images, samples = tiny.batch()
    change = (widened(model, (images, samples)) - images) * STD
    for one in change:
        assert one.abs().max().item() == pytest.approx(2.0, rel=1e-3)
    alone = widened(model, (images[:1], samples[:1])) - images[:1]
    torch.testing.assert_close(alone[0] * STD, change[0], rtol=1e-2, atol=1e-3)


def test_ascent_leaves_weights_gradients_modes_and_statistics(build):
    model = build()
    big = model.teachers['big'].detector
    model.backbone.layer1.eval()
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    step, _ = steps_of(model, *tiny.batch())
    before = copy.deepcopy((model.state_dict(), big.state_dict()))
    modes = [one.training for one in model.modules()]
    moved = model.terms['x'].widened(step)
    assert not moved.requires_grad
    assert (moved != step.images).any()
    for side, state in zip((model, big), before):
        for key, one in side.state_dict().items():
            assert torch.equal(one, state[key]), key
    assert [one.training for one in model.modules()] == modes
    assert all((one.grad == 1).all() for one in model.parameters())
    assert all(one.grad is None for one in big.parameters())
    assert not any(one.training for one in big.modules())


def test_no_statistic_is_kept_of_an_image_that_was_changed(build):
    batch = tiny.batch()
    states = []
    for weight in (0.0, 1.0):
        model = build(aux_weight=weight)
        model.loss(*batch)
        states.append(model.state_dict())
    assert all(
        torch.equal(states[0][key], one) for key, one in states[1].items()
    )


def test_labels_are_not_read(build):
    model = build().eval()
    found = [
        model.loss(*tiny.batch()),
        model.loss(tiny.batch()[0], tiny.batch(boxes=7)[1]),
    ]
    for part in ('clean', 'aux'):
        assert found[0][f'loss_kd_x_{part}'] == found[1][f'loss_kd_x_{part}']


def test_it_is_due_every_so_many_iterations(build, hub):
    model = build(interval=3)
    hub.update_info('max_iters', 10)
    said = []
    for iteration in range(5):
        hub.update_info('iter', iteration)
        losses = model.loss(*tiny.batch())
        said.append(bool(losses['loss_kd_x_aux'] > 0))
        assert losses['loss_kd_x_clean'] > 0
    assert said == [True, False, False, True, False]


@pytest.mark.parametrize('part', ['clean', 'aux'])
def test_each_part_teaches_the_student_alone(build, part):
    weights = dict(clean_weight=0.0, aux_weight=0.0) | {f'{part}_weight': 1.0}
    model = build(**weights)
    big = model.teachers['big'].detector
    big.requires_grad_(True)  # as those of a running average might
    losses = model.loss(*tiny.batch())
    losses[f'loss_kd_x_{part}'].backward()
    layer = [*model.backbone.children()][-1]
    assert all(one.grad.abs().sum() > 0 for one in layer.parameters())
    assert all(one.grad is None for one in big.parameters())


def test_nothing_runs_without_a_weight(build):
    model = build(clean_weight=0.0, aux_weight=0.0)
    assert model.terms['x'].silent()
    with recording(model.teachers['big'].detector, ['backbone']) as record:
        model.loss(*tiny.batch())
    assert not record.has('backbone')


def test_maps_are_compared_where_heads_cannot_be(build):
    model = build(
        'gfl',
        tiny.retinanet(channels=32),
        divergence='feature',
        align=dict(ADAPT, num_levels=5),
        norm='raw',
        step_size=2.0,
    ).eval()
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    step, losses = steps_of(model, images, samples)
    moved = model.terms['x'].widened(step)
    for part, one in (('clean', images), ('aux', moved)):
        own = model.terms['x'].align(model.extract_feat(one))
        other = model.teachers['big'].detector.extract_feat(one)
        cells = torch.cat(
            [((a - b) ** 2).mean(1).flatten(1) for a, b in zip(own, other)],
            1,
        )
        torch.testing.assert_close(
            losses[f'loss_kd_x_{part}'], cells.mean(), rtol=1e-3, atol=0
        )
    assert losses['loss_kd_x_aux'] > losses['loss_kd_x_clean']
    sum(losses[f'loss_kd_x_{part}'] for part in ('clean', 'aux')).backward()
    for one in model.terms['x'].align.parameters():
        assert one.grad.abs().sum() > 0


def test_heads_of_other_anchors_are_refused_with_advice(build):
    teacher = heads.retinanet(base=16)
    teacher['bbox_head']['anchor_generator'].scales_per_octave = 2
    with pytest.raises(ValueError, match='BackwardPassTerm pairs.*features'):
        build('retinanet', teacher)
    with pytest.raises(ValueError, match='in_channels=16, out_channels=32'):
        build('gfl', tiny.retinanet(channels=32), divergence='feature')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(divergence='kl'), 'no divergence'),
        (dict(norm='l1'), 'no norm'),
        (dict(num_steps=0), 'num_steps > 0'),
        (dict(step_size=-1.0), 'step_size > 0'),
        (dict(interval=0), 'interval > 0'),
        (dict(align=dict(type='mmkd.ResizeAdapt')), 'Leave align out'),
        (dict(tap='bbox_hed'), "Did you mean 'bbox_head'"),
    ],
)
def test_a_wrong_setting_is_told(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_first_stages_are_compared_by_their_rpn(tmp_path):
    teacher = tiny.faster_rcnn(base=16)
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    model = tiny.build(
        tiny.distilled(
            tiny.faster_rcnn(), dict(big=big), dict(x=term(tap='rpn_head'))
        )
    ).train()
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_x_clean'] > 0
    assert losses['loss_kd_x_aux'] > 0

"""Images climb the gap between the answers of two decoders."""

import copy
from itertools import pairwise

import detrs
import pytest
import tiny
import torch
from asking import distilled
from torch import nn

from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.backward_query import BackwardQueryTerm
from mmkd.terms.queries import DECODER, HEAD, answers
from mmkd.terms.query_pairs import matched_queries

STD = torch.tensor(tiny.PIXELS['std'])[:, None, None]


@pytest.fixture
def build(tmp_path):
    def build(kind='refine', teacher=None, seed=3, **settings):
        term = dict(type='mmkd.BackwardQueryTerm', teacher='big', **settings)
        teacher = teacher or detrs.detr(kind, base=16, queries=14, layers=3)
        model = distilled(detrs.detr(kind), teacher, term, tmp_path)
        # Else scores of an untrained head are all alike.
        for part, one in enumerate((model, model.teachers['big'].detector)):
            torch.manual_seed(part + seed)
            for name, weight in one.bbox_head.named_parameters():
                if name.endswith('weight') and weight.ndim > 1:
                    torch.nn.init.normal_(weight.data, std=0.2)
        for one in model.modules():  # so that a pass of training is one
            if isinstance(one, nn.Dropout):
                one.p = 0
            if isinstance(one, nn.MultiheadAttention):
                one.dropout = 0
        model.backbone.norm_eval = True
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


def both(model, images, samples):
    """What the two decoders say of images, in eval mode, with a graph."""
    found, modes = [], [(one, one.training) for one in model.modules()]
    model.eval()
    for one in (model, model.teachers['big'].detector):
        with recording(one, [DECODER, HEAD]) as record:
            run_detector(one, images, samples)
        found.append(answers(record))
    for one, training in modes:
        one.training = training
    return found


def literal_gap(model, images, samples, divergence='cls+box'):
    """D of each image, by the formula."""
    own, other = both(model, images, samples)
    index = matched_queries(own, other)
    gaps = []
    for image in range(len(images)):
        total = count = 0.0
        for s, t in zip(index[0][image], index[1][image]):
            p = own.logits[-1, image, s].sigmoid()
            q = other.logits[-1, image, t].sigmoid()
            a, b = own.boxes[-1, image, s], other.boxes[-1, image, t]
            error = 0.0
            if 'cls' in divergence:
                error = error + ((p - q) ** 2).sum()
            if 'box' in divergence:
                error = error + (a - b).abs().sum()
            total = total + q.max().detach() * error
            count = count + q.max().detach()
        gaps.append(total / count)
    return torch.stack(gaps)


@pytest.mark.parametrize('divergence', ['cls+box', 'cls', 'box'])
def test_both_parts_are_the_gap_written_out(build, divergence):
    model = build(divergence=divergence, clean_weight=2.0, aux_weight=3.0)
    images, samples = tiny.batch()
    step, losses = steps_of(model, images, samples)
    moved = model.terms['x'].widened(step)
    for one, part, factor in ((images, 'clean', 2), (moved, 'aux', 3)):
        wanted = literal_gap(model, one, samples, divergence).mean()
        found = losses[f'loss_kd_x_{part}']
        torch.testing.assert_close(found, factor * wanted, rtol=1e-3, atol=0)
        assert found > 0


def test_the_direction_is_the_gradient_through_both_networks(build):
    model = build(num_steps=1, step_size=1e3, norm='raw')
    images, samples = tiny.batch()
    images = images.clamp(-1, 1)
    moved = widened(model, (images, samples))
    shown = images.clone().requires_grad_()
    gap = literal_gap(model, shown, samples).sum()
    (slope,) = torch.autograd.grad(gap, shown)
    slope[1, :, 96:] = slope[1, :, :, 112:] = 0
    wanted = 1e3 * slope / STD**2
    torch.testing.assert_close(moved - images, wanted, rtol=1e-2, atol=1e-5)
    assert wanted.abs().max() > 1e-4


def test_without_a_norm_the_gap_grows_with_every_small_step(build):
    model = build(norm='raw', step_size=3e3)
    images, samples = tiny.batch()
    images = images.clamp(-1, 1)
    gaps = [literal_gap(model, images, samples)]
    for count in (1, 2):
        model.terms['x'].num_steps = count
        moved = widened(model, (images, samples))
        gaps.append(literal_gap(model, moved, samples))
    for one, other in pairwise(gaps):
        assert (other > one).all()


def test_noise_of_the_same_norm_widens_far_less(build):
    model = build(num_steps=2, step_size=2.0)
    images, samples = tiny.batch()
    images = images.clamp(-1, 1)
    before = literal_gap(model, images, samples).mean()
    change = widened(model, (images, samples)) - images
    climbed = literal_gap(model, images + change, samples).mean() - before
    torch.manual_seed(0)
    noise = torch.randn_like(change) * (change != 0)
    for norm in (2, torch.inf):
        same = noise * (change.norm(norm) / noise.norm(norm))
        found = literal_gap(model, images + same, samples).mean() - before
        assert climbed > 5 * found.abs()


def test_two_that_agree_leave_the_images_and_cost_nothing(build):
    model = build(teacher=detrs.detr('refine'), norm='raw')
    big = model.teachers['big'].detector
    model.load_state_dict(big.state_dict(), strict=False)
    batch = tiny.batch()
    step, losses = steps_of(model, *batch)
    assert torch.equal(model.terms['x'].widened(step), batch[0])
    assert max(losses['loss_kd_x_clean'], losses['loss_kd_x_aux']) < 1e-6


def test_the_order_of_queries_changes_nothing(build):
    model = build()
    plain = model.loss(*tiny.batch())
    torch.manual_seed(0)
    detrs.reorder(model.teachers['big'].detector, torch.randperm(14))
    detrs.reorder(model, torch.randperm(12))
    found = model.loss(*tiny.batch())
    for part in ('clean', 'aux'):
        torch.testing.assert_close(
            found[f'loss_kd_x_{part}'],
            plain[f'loss_kd_x_{part}'],
            rtol=1e-3,
            atol=1e-5,
        )


def test_the_border_is_respected_and_each_image_takes_its_own_step(build):
    model = build(num_steps=1)
    images, samples = tiny.batch()
    images = images.clamp(-1, 1)
    moved = widened(model, (images, samples))
    assert torch.equal(moved[1, :, 96:], images[1, :, 96:])
    assert torch.equal(moved[1, :, :, 112:], images[1, :, :, 112:])
    for one in (moved - images) * STD:
        assert one.abs().max().item() == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize('kind', ['refine', 'ddq'])
def test_ascent_leaves_all_but_the_images_as_it_was(build, kind):
    model = build(kind)
    big = model.teachers['big'].detector
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    step, _ = steps_of(model, *tiny.batch())
    before = copy.deepcopy((model.state_dict(), big.state_dict()))
    modes = [one.training for one in model.modules()]
    book = [*getattr(model, 'cache_dict', {}).get('dis_query_info', [])]
    moved = model.terms['x'].widened(step)
    assert not moved.requires_grad
    assert (moved != step.images).any()
    for side, state in zip((model, big), before):
        for key, one in side.state_dict().items():
            assert torch.equal(one, state[key]), key
    assert [one.training for one in model.modules()] == modes
    assert all((one.grad == 1).all() for one in model.parameters())
    assert all(one.grad is None for one in big.parameters())
    if kind == 'ddq':
        assert model.cache_dict['dis_query_info'] == book != [0, 12]


@pytest.mark.parametrize('kind', ['detr', 'dab', 'deformable', 'ddq'])
def test_every_kind_learns(build, kind):
    model = build(kind)
    losses = model.loss(*tiny.batch(shapes=((128, 128), (96, 64))))
    for part in ('clean', 'aux'):
        value = losses[f'loss_kd_x_{part}']
        assert value.isfinite()
        assert value > 0
        model.zero_grad()
        value.backward(retain_graph=True)
        assert model.backbone.conv1.weight.grad.abs().sum() > 0
    for one in model.teachers['big'].detector.parameters():
        assert one.grad is None


def test_kinds_may_differ(build):
    model = build('dab', teacher=detrs.detr('detr', base=16))
    assert model.loss(*tiny.batch())['loss_kd_x_aux'] > 0


def test_half_precision_and_images_without_boxes_are_finite(build):
    model = build()
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(*tiny.batch(boxes=0))
    for part in ('clean', 'aux'):
        assert losses[f'loss_kd_x_{part}'].isfinite()


def test_between_ascents_the_batch_alone_counts(build):
    model = build(interval=2)
    step, _ = steps_of(model, *tiny.batch())
    step.iteration = 1
    found = model.terms['x'](step)
    assert found['aux'] == 0
    assert found['clean'] > 0


def test_what_does_not_fit_is_refused(build):
    with pytest.raises(ValueError, match='teacher, RetinaNet, has none'):
        build(teacher=tiny.retinanet())
    with pytest.raises(ValueError, match="divergence 'feature'"):
        BackwardQueryTerm('big', divergence='feature')
    assert BackwardQueryTerm('big').compares_classes()

import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.optim import OptimWrapper
from one_term import builder, same, shares, state, teacher_of
from torch.distributions import Independent, Normal, kl_divergence

from mmkd.ops.masks import valid_mask
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth
from mmkd.terms.unified import (
    LOG_VARIANCE,
    GatedFusion,
    GaussianPredictor,
    gaussian_divergence,
    standard,
    weighted_mean,
)

PHASES = [
    dict(
        length=1,
        train=(),
        freeze='terms.x.student_side',
        supervised=False,
    ),
    dict(length=3, freeze='terms.x.teacher_side'),
]


def term(**settings):
    return dict(
        dict(
            type='mmkd.UnifiedTerm',
            teacher='big',
            channels=(16, 16, 16),
            levels=(0, 1, 2),
            fuse_dim=8,
            dist_dim=4,
        ),
        **settings,
    )


build = builder(term)


def optimiser(student):
    return OptimWrapper(torch.optim.Adam(student.parameters(), lr=0.02))


def go_to(hub, progress):
    hub.update_info('max_iters', 100)
    hub.update_info('iter', round(100 * progress))


# The divergence --------------------------------------------------------------


@pytest.fixture
def gaussians():
    torch.manual_seed(0)
    return torch.randn(4, 2, 5, 3, 4).unbind()


def torchs(mean, log_variance):
    """One distribution a cell."""
    place = [one.permute(0, 2, 3, 1) for one in (mean, log_variance)]
    return Independent(Normal(place[0], (place[1] / 2).exp()), 1)


def test_is_the_divergence_of_the_teachers_from_the_students(gaussians):
    mean, log, other, other_log = gaussians
    found = gaussian_divergence(mean, log, other, other_log)
    wanted = kl_divergence(torchs(other, other_log), torchs(mean, log))
    torch.testing.assert_close(found[:, 0], wanted)
    assert (found > 0).all()


def test_is_the_mean_of_the_log_ratio_of_what_the_teacher_draws(gaussians):
    found = gaussian_divergence(*gaussians).mean()
    own, other = torchs(*gaussians[:2]), torchs(*gaussians[2:])
    drawn = other.sample((20000,))
    ratio = other.log_prob(drawn) - own.log_prob(drawn)
    torch.testing.assert_close(found, ratio.mean(), rtol=0.02, atol=0.0)


def test_is_zero_only_where_means_and_variances_agree(gaussians):
    mean, log, other, other_log = gaussians
    assert gaussian_divergence(mean, log, mean, log).abs().max() == 0
    assert (gaussian_divergence(mean, log, other, log) > 0).all()
    assert (gaussian_divergence(mean, log, mean, other_log) > 0).all()


def test_depends_on_who_teaches(gaussians):
    mean, log, other, other_log = gaussians
    there = gaussian_divergence(mean, log, other, other_log)
    back = gaussian_divergence(other, other_log, mean, log)
    assert not torch.allclose(there, back, rtol=0.1)


def test_dimensions_are_added():
    zero = torch.zeros(1, 6, 1, 1)
    assert gaussian_divergence(zero + 1, zero, zero, zero) == 3.0


def test_what_counts_is_averaged_by_its_weight():
    values = torch.tensor([1.0, 5.0, 9.0]).view(1, 1, 1, 3)
    weight = torch.tensor([3.0, 1.0, 0.0]).view(1, 1, 1, 3)
    assert weighted_mean(values, weight) == 2.0
    assert weighted_mean(values, 0 * weight) == 0.0


def test_a_standard_map_has_unit_variance_over_what_counts():
    torch.manual_seed(0)
    feature = 5 * torch.randn(2, 3, 4, 4) + 7
    count = torch.ones(2, 1, 4, 4)
    count[1, :, 2:] = 0
    found = standard(feature, count)
    inside = found.movedim(1, -1)[count[:, 0] > 0]
    torch.testing.assert_close(inside.mean(0), torch.zeros(3))
    torch.testing.assert_close(
        inside.var(0, correction=0), torch.ones(3), rtol=1e-4, atol=0
    )
    flat = torch.ones(1, 1, 2, 2)
    assert standard(flat, flat).sum() == 0
    assert standard(feature, 0 * count).isfinite().all()


# Fusion ----------------------------------------------------------------------


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    return [
        torch.randn(2, channels, size, size)
        for channels, size in ((3, 8), (5, 4), (7, 2))
    ]


@torch.no_grad()
def test_fuses_from_coarse_to_fine_by_a_gate_at_each_cell(pyramid):
    fusion = GatedFusion((3, 5, 7), 6)
    fine, middle, coarse = (
        embed(one) for embed, one in zip(fusion.embed, pyramid)
    )
    for gate, own, below in (
        (fusion.gates[1], middle, 'coarse'),
        (fusion.gates[0], fine, 'middle'),
    ):
        up = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        share = torch.sigmoid(
            torch.einsum(
                'oc,nchw->nohw',
                gate.weight[:, :, 0, 0],
                torch.cat([own, up], 1),
            )
            + gate.bias[:, None, None]
        )
        assert ((share > 0) & (share < 1)).all(), below
        assert share.shape[1] == 1
        coarse = share * own + (1 - share) * up
    torch.testing.assert_close(fusion(pyramid), coarse)


@torch.no_grad()
def test_an_open_gate_lets_the_own_map_through_and_a_closed_one_the_coarser(
    pyramid,
):
    fusion = GatedFusion((3, 5, 7), 6)
    for gate in fusion.gates:
        gate.bias.fill_(100.0)
    torch.testing.assert_close(fusion(pyramid), fusion.embed[0](pyramid[0]))
    for gate in fusion.gates:
        gate.bias.fill_(-100.0)
    top = F.interpolate(fusion.embed[2](pyramid[2]), (8, 8))
    torch.testing.assert_close(fusion(pyramid), top)


@pytest.mark.parametrize('level', [0, 1, 2])
def test_every_map_has_a_say(pyramid, level):
    predictor = GaussianPredictor((3, 5, 7), 6, 4)
    before = predictor(pyramid)
    pyramid[level] = torch.zeros_like(pyramid[level])
    for one, other in zip(predictor(pyramid), before):
        assert not torch.allclose(one, other)


def test_variances_are_positive_and_bounded(pyramid):
    predictor = GaussianPredictor((3, 5, 7), 6, 4)
    _, log_variance = predictor([1000 * one for one in pyramid])
    low, high = LOG_VARIANCE
    assert (log_variance.min(), log_variance.max()) == (low, high) == (-6, 6)
    assert (log_variance.exp() > 0).all()


# The term --------------------------------------------------------------------


@torch.no_grad()
def weights(student, images, samples, size):
    """Of the cells of the finest map, by the teacher's scores of all."""
    big = teacher_of(student)
    scores = big.bbox_head(big.extract_feat(images))[0]
    best = torch.zeros(len(images), *size)
    for one in scores:
        top = one.sigmoid().amax(1)
        factor = size[0] // top.shape[-2]
        large = top.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        best = torch.maximum(best, large)
    gt = GroundTruth.from_samples(samples, images)
    return best[:, None] * valid_mask(gt, size)


@pytest.mark.parametrize('uniform', [False, True])
def test_is_the_weighted_mean_of_the_cells_divergences(build, uniform):
    student = build(loss_weight=3.0, uniform=uniform)
    images, samples = tiny.batch()
    found = shares(student.loss(images, samples))
    own = student.terms['x']
    with torch.no_grad():
        maps = student.neck(student.backbone(images))[:3]
        others = teacher_of(student).extract_feat(images)[:3]
        cells = kl_divergence(
            torchs(*own.teacher_side.predictor(others)),
            torchs(*own.student_side(maps)),
        )[:, None]
        weight = weights(student, images, samples, cells.shape[-2:])
        if uniform:
            weight = (weight > 0).float()
    wanted = 3 * (weight * cells).sum() / weight.sum()
    torch.testing.assert_close(found['divergence'], wanted)


def test_the_teachers_side_learns_to_tell_its_maps(build):
    student = build(prior_weight=0.3)
    own, big = student.terms['x'], teacher_of(student)
    student.terms.eval()  # the mean is what is drawn
    images, samples = tiny.batch()
    losses = student.loss(images, samples)
    gt = GroundTruth.from_samples(samples, images)
    with torch.no_grad():
        maps = big.extract_feat(images)[:3]
        mean, log = own.teacher_side.predictor(maps)
        error = 0.0
        for decode, one in zip(own.teacher_side.decoders, maps):
            told = decode(F.adaptive_avg_pool2d(mean, one.shape[-2:]))
            inside = valid_mask(gt, one.shape[-2:])[:, 0] > 0
            cells = one.movedim(1, -1)[inside]
            cells = (cells - cells.mean(0)) / cells.std(0, correction=0)
            gap = told.movedim(1, -1)[inside] - cells
            error += gap.square().mean() / 3
        zero = torch.zeros_like(mean)
        prior = kl_divergence(torchs(mean, log), torchs(zero, zero))
        prior = prior[valid_mask(gt, mean.shape[-2:])[:, 0] > 0].mean() / 4
    torch.testing.assert_close(
        losses['loss_kd_x_teacher'], error + 0.3 * prior, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        losses['kd_x_explained'], 1 - error, rtol=1e-3, atol=1e-4
    )


def test_what_is_told_is_drawn_from_the_gaussians(build):
    """Noise of variance v adds v times the decoder's squared weights."""
    student = build(levels=(0,), channels=(16,), prior_weight=0.0)
    side = student.terms['x'].teacher_side
    with torch.no_grad():
        side.predictor.log_variance.weight.zero_()
        side.predictor.log_variance.bias.fill_(3.0)
    drawn = shares(student.loss(*tiny.batch()))['teacher']
    student.terms.eval()
    told = shares(student.loss(*tiny.batch()))['teacher']
    (decode,) = side.decoders
    added = torch.tensor(3.0).exp() * decode.weight.square().sum() / 16
    torch.testing.assert_close(drawn - told, added, rtol=0.15, atol=0)


def test_of_several_levels_and_anchors_the_largest_weight_counts(build):
    student = build()
    images, samples = tiny.batch()
    fine, coarse = torch.rand(2, 2, 16, 16), torch.rand(2, 1, 8, 8)
    own = student.terms['x']
    # Not a module, so that it is not asked for parameters.
    own._modules.pop('weight')
    own.weight = lambda step: [fine, coarse]
    step = type('Step', (), {})()
    step.gt = GroundTruth.from_samples(samples, images)
    found = own._weights(step, torch.zeros(2, 1, 16, 16))
    large = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = torch.cat([fine, large], 1).amax(1, keepdim=True)
    inside = valid_mask(step.gt, (16, 16))
    torch.testing.assert_close(found, wanted * inside)


def test_the_divergence_teaches_the_student_and_never_the_teachers_side(
    build,
):
    student = build()
    found = shares(student.loss(*tiny.batch()))
    found['divergence'].backward()
    own = student.terms['x']
    assert all(one.grad is None for one in own.teacher_side.parameters())
    assert all(one.grad is not None for one in own.student_side.parameters())
    assert student.backbone.layer2[0].conv1.weight.grad.abs().sum() > 0


def test_a_twin_of_the_teacher_with_its_side_costs_nothing(build):
    big = tiny.retinanet(base=16)
    student = build(big, big)
    student.load_state_dict(teacher_of(student).state_dict(), strict=False)
    own = student.terms['x']
    own.student_side.load_state_dict(own.teacher_side.predictor.state_dict())
    assert shares(student.loss(*tiny.batch()))['divergence'] < 1e-6


def test_channels_and_numbers_of_levels_may_differ(build):
    student = build(
        tap='backbone',
        levels=(1, 2, 3),
        channels=(16, 32, 64),
        teacher_levels=(1, 2),
        teacher_channels=(32, 64),
    )
    assert shares(student.loss(*tiny.batch()))['divergence'] > 0


def test_proposals_of_two_stages_weigh_as_well(build):
    student = build(
        tiny.faster_rcnn(),
        tiny.faster_rcnn(base=16),
        weight=dict(type='mmkd.ScoreWeight', tap='rpn_head'),
    )
    assert shares(student.loss(*tiny.batch()))['divergence'] > 0


# Phases ----------------------------------------------------------------------


def means(student, images):
    with torch.no_grad():
        maps = teacher_of(student).extract_feat(images)[:3]
        return student.terms['x'].teacher_side.predictor(maps)[0]


def test_first_the_teachers_side_learns_then_it_rests(build, hub):
    student = build(phases=PHASES, dist_dim=8)
    own = student.terms['x']
    data, optim = tiny.batch(), optimiser(student)
    before, errors = state(student), []
    for _ in range(20):
        log = student.train_step(tiny.pixels(*data), optim)
        assert shares(log).keys() == {'teacher'}
        errors.append(float(log['loss']))
    assert errors[-1] < 0.8 * errors[0]
    assert log['kd_x_explained'] > 0.2
    learned = 'terms.x.teacher_side.', 'terms.x.taught'
    for name, one in student.state_dict().items():
        assert name.startswith(learned) or torch.equal(one, before[name])
    found = means(student, data[0])
    assert found.var(dim=(0, 2, 3)).min() > 0.01  # no constant
    assert (found[0] - found[1]).abs().mean() > 0.05
    go_to(hub, 0.5)
    side, student_side = state(own.teacher_side), state(own.student_side)
    for _ in range(2):
        log = student.train_step(tiny.pixels(*data), optim)
    assert shares(log).keys() == {'divergence'}
    assert same(own.teacher_side, side)
    assert not same(own.student_side, student_side)


def test_an_untrained_side_of_the_teacher_is_refused(build, hub):
    student = build(phases=PHASES)
    go_to(hub, 0.5)
    with pytest.raises(ValueError, match='teacher_side_checkpoint=FILE'):
        student.loss(*tiny.batch())


def test_the_side_of_an_earlier_training_needs_no_phase(build, tmp_path):
    earlier = build()
    earlier.train_step(tiny.pixels(*tiny.batch()), optimiser(earlier))
    file = tmp_path / 'earlier.pth'
    torch.save(dict(state_dict=earlier.state_dict()), file)
    student = build(teacher_side_checkpoint=str(file))
    assert shares(student.loss(*tiny.batch())).keys() == {'divergence'}
    wanted = state(earlier.terms['x'].teacher_side)
    assert same(student.terms['x'].teacher_side, wanted)


# Messages --------------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(levels=(0, 1)), r'built for 3 maps, .* got 2.*levels='),
        (dict(channels=(16, 16, 8)), 'built for 8 channels'),
        (
            dict(teacher_levels=(1, 2, 3)),
            r'\(16, 16\) cells of the student and \(8, 8\)',
        ),
        (dict(tap='nek'), "Did you mean 'neck'"),
        (dict(fuse_dim=0), 'fuse_dim > 0'),
        (dict(dist_dim=0), 'dist_dim > 0'),
        (
            dict(uniform=True, weight=dict(type='mmkd.ScoreWeight')),
            'Choose one of them',
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_without_weight_it_is_silent():
    assert MODELS.build(term(loss_weight=0)).silent()
    assert not MODELS.build(term()).silent()

import copy
import math

import heads
import pytest
import tiny
import torch
from mmengine.config import ConfigDict

from mmkd.taps import recording
from mmkd.terms.teacher_attention import (
    TeacherAttention,
    collapse,
    fused,
    pooled,
)

CHANNELS, CLASSES = 16, 3
SCORES = dict(output=0, loss=dict(type='mmkd.SoftTargetLoss'))
EDGES = dict(output=1, loss=dict(type='mmkd.LDLoss'))


def gfl(base=8):
    model = ConfigDict(heads.gfl(convs=1))
    model.backbone.base_channels = base
    model.neck.in_channels = [base * 2**level for level in range(4)]
    model.backbone.stem_channels = base
    return model


@pytest.fixture
def build(tmp_path):
    def build(student=None, taught=None, phases=None, **settings):
        teachers = {}
        for seed, name in enumerate(('big', 'other')):
            torch.manual_seed(seed)
            model = (taught or {}).get(name) or gfl(16 - 4 * seed)
            file = tiny.save_teacher(model, tmp_path / f'{name}.pth')
            teachers[name] = dict(
                config=dict(model=model), checkpoint=str(file)
            )
        term = dict(
            type='mmkd.TeacherAttentionTerm',
            teachers=('big', 'other'),
            channels=CHANNELS,
            losses=dict(scores=SCORES, edges=EDGES),
        )
        model = tiny.build(
            tiny.distilled(
                student or gfl(),
                teachers,
                dict(x=dict(term, **settings)),
                phases=phases,
            )
        )
        model.teachers.load()
        # Heads begin by saying the same of everything.
        for seed, one in enumerate(
            (model, *(x.detector for x in model.teachers.values()))
        ):
            torch.manual_seed(seed)
            for name, weight in one.bbox_head.named_parameters():
                if name.endswith('weight') and weight.ndim > 1:
                    torch.nn.init.normal_(weight.data, std=0.1)
        model.backbone.eval()
        return model.train()

    return build


def parts(model, batch=None):
    losses = model.loss(*(batch or tiny.batch()))
    return {
        name.split('kd_x_')[1]: value
        for name, value in losses.items()
        if 'kd_x' in name
    }


def said(detector, images):
    with recording(detector, ['neck', 'bbox_head']) as record:
        detector._forward(images, None)
    return record.at('neck'), record.at('bbox_head')


# The attention ---------------------------------------------------------------


def test_weights_are_positive_and_sum_to_one():
    weights = TeacherAttention(8, teachers=3)(10 * torch.randn(5, 8)).exp()
    assert weights.shape == (5, 3)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(5))


def test_it_is_two_layers_of_the_image_and_all_embeddings():
    net = TeacherAttention(4, teachers=2, hidden=6)
    assert net.embeddings.shape == (2, 6)
    assert [*net.first.weight.shape] == [6, 4 + 2 * 6]
    described = torch.randn(3, 4)
    rows = []
    for one in described:
        given = torch.cat([one, net.embeddings[0], net.embeddings[1]])
        between = (net.first.weight @ given + net.first.bias).clamp(min=0)
        rows.append((net.last.weight @ between + net.last.bias).softmax(0))
    torch.testing.assert_close(net(described).exp(), torch.stack(rows))


def test_hidden_is_128_unless_set(build):
    assert build().terms['x'].attention.embeddings.shape == (2, 128)
    model = build(attn=dict(hidden=32))
    assert model.terms['x'].attention.embeddings.shape == (2, 32)


def test_an_image_is_the_mean_of_what_is_not_border():
    maps = [torch.arange(4.0).view(1, 1, 2, 2), torch.full((1, 1, 1, 1), 7.0)]
    counts = [
        torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]]),
        torch.ones(1, 1, 1, 1),
    ]
    assert pooled(maps, counts).tolist() == [[(0.5 + 7.0) / 2]]


def test_the_fused_target_is_the_sum_by_image():
    said = [[torch.full((2, 1, 1, 1), 1.0)], [torch.full((2, 1, 1, 1), 5.0)]]
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    assert fused(said, weights)[0].flatten().tolist() == [1.0, 4.0]


@pytest.mark.parametrize('teachers', [2, 3, 5])
def test_collapse_is_what_entropy_lacks(teachers):
    log_weights = (3 * torch.randn(7, teachers)).log_softmax(1)
    weights = log_weights.exp()
    entropy = -(weights * weights.log()).sum(1).mean()
    torch.testing.assert_close(
        collapse(log_weights),
        math.log(teachers) - entropy,
    )


def test_collapse_pushes_towards_equal_weights():
    logits = torch.tensor([[2.0, -1.0, 0.0]], requires_grad=True)
    for _ in range(300):
        loss = collapse(logits.log_softmax(1))
        (slope,) = torch.autograd.grad(loss, logits)
        before = loss.item()
        logits = (logits - slope).detach().requires_grad_()
        assert collapse(logits.log_softmax(1)).item() <= before
    torch.testing.assert_close(
        logits.softmax(1), torch.full((1, 3), 1 / 3), atol=1e-3, rtol=0
    )


def test_collapse_is_finite_where_one_has_all():
    logits = torch.tensor([[300.0, -300.0]], requires_grad=True)
    loss = collapse(logits.log_softmax(1))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad.isfinite().all()


# The term --------------------------------------------------------------------


def test_it_is_the_loss_against_the_fused_target(build):
    """A literal version, image by image and cell by cell."""
    model = build(attn=dict(entropy_weight=0.7), temperature=None)
    term = model.terms['x']
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    found = parts(model, (images, samples))
    maps, own = said(model, images)
    described = torch.stack([one.mean((2, 3)) for one in maps]).mean(0)
    weights = term.attention(described).exp()
    others = []
    for teacher in model.teachers.values():
        with torch.no_grad():
            others.append(said(teacher.detector, images)[1])
    top = bottom = edges = 0.0
    for image in range(2):
        for level in range(len(maps)):
            target = [
                sum(
                    weights[image, index] * one[output][level][image]
                    for index, one in enumerate(others)
                ).flatten(1)
                for output in (0, 1)
            ]
            score, edge = (own[x][level][image].flatten(1) for x in (0, 1))
            p, q = target[0].sigmoid(), score.sigmoid()
            weight = p.amax(0).detach()
            gap = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            top = top + (weight * gap.sum(0)).sum()
            bottom = bottom + weight.sum()
            t, s = (
                (x.unflatten(0, (4, -1)) / 10).log_softmax(1)
                for x in (target[1], edge)
            )
            gap = 100 * (t.exp() * (t - s)).mean((0, 1))
            edges = edges + (weight * gap).sum()
    torch.testing.assert_close(found['scores'], top / bottom)
    torch.testing.assert_close(
        found['edges'], edges / bottom.clamp(min=1), rtol=1e-3, atol=1e-6
    )
    entropy = -(weights * weights.log()).sum(1).mean()
    torch.testing.assert_close(
        found['entropy'], 0.7 * (math.log(2) - entropy), atol=1e-6, rtol=1e-4
    )
    for index, name in enumerate(('big', 'other')):
        torch.testing.assert_close(
            found[f'attention_{name}'], weights[:, index].mean()
        )


def test_images_weigh_their_teachers_each(build):
    model = build()
    term, seen = model.terms['x'], []
    term.attention.register_forward_hook(lambda *x: seen.append(x[2].exp()))
    torch.nn.init.normal_(term.attention.last.weight, std=3.0)
    parts(model)
    (weights,) = seen
    assert not torch.allclose(weights[0], weights[1])
    assert not torch.allclose(weights, torch.full_like(weights, 0.5))


def test_the_border_says_nothing_of_an_image(build):
    model = build()
    seen = []
    model.terms['x'].attention.register_forward_hook(
        lambda *x: seen.append(x[1][0])
    )
    images, samples = tiny.batch()
    parts(model, (images, samples))
    with recording(model, ['neck']) as record:
        model.extract_feat(images)
    height, width = samples[1].img_shape
    means = []
    for one in record.at('neck'):
        rows = -(-one.shape[2] * height // 128)
        columns = -(-one.shape[3] * width // 128)
        means.append(one[1, :, :rows, :columns].mean((1, 2)))
    torch.testing.assert_close(seen[0][1], torch.stack(means).mean(0))


def test_attention_learns_from_the_fused_target_alone(build):
    model = build(attn=dict(entropy_weight=0.0))
    found = parts(model)
    (found['scores'] + found['edges']).backward()
    term = model.terms['x']
    for one in term.attention.parameters():
        assert one.grad.abs().sum() > 0


def test_attention_goes_to_the_teacher_that_is_followed(build):
    """Equal weights that nothing moves would stay where they are."""
    model = build(attn=dict(entropy_weight=0.0))
    with torch.no_grad():
        for one in model.teachers['big'].detector.bbox_head.parameters():
            one.mul_(5.0)  # far from what the student says
    term = model.terms['x']
    optimiser = torch.optim.Adam(term.attention.parameters(), lr=0.01)
    batch = tiny.batch()
    first = parts(model, batch)
    for _ in range(20):
        optimiser.zero_grad()
        found = parts(model, batch)
        (found['scores'] + found['edges']).backward()
        optimiser.step()
    last = parts(model, batch)
    assert last['attention_other'] > first['attention_other'] + 0.1
    assert last['attention_other'] > 0.6


def test_entropy_holds_weights_together(build):
    model = build(attn=dict(entropy_weight=1.0))
    term = model.terms['x']
    torch.nn.init.normal_(term.attention.last.weight, std=0.2)
    optimiser = torch.optim.Adam(term.attention.parameters(), lr=3e-4)
    batch = tiny.batch()
    first = parts(model, batch)['entropy'].item()
    for _ in range(20):
        optimiser.zero_grad()
        parts(model, batch)['entropy'].backward()
        optimiser.step()
    assert parts(model, batch)['entropy'] < 0.2 * first


def test_a_student_like_both_teachers_has_nothing_to_learn(build):
    model = build(taught=dict(big=gfl(), other=gfl()))
    for one in model.teachers.values():
        one.detector.load_state_dict(
            {k: v for k, v in model.state_dict().items() if 'terms.' not in k}
        )
    found = parts(model)
    assert found['scores'].abs() < 1e-5
    assert found['edges'].abs() < 1e-5


def test_no_weight_of_an_anchor_has_a_gradient(build):
    model = build()
    seen = []

    def look(module, given):
        seen.append(given[3])

    model.terms['x'].losses['edges'].register_forward_pre_hook(look)
    parts(model)
    assert not any(one.requires_grad for one in seen[0])


# Its temperature -------------------------------------------------------------


def at(hub, progress):
    hub.update_info('iter', int(1000 * progress))
    hub.update_info('max_iters', 1000)


def test_losses_follow_the_temperature(build, hub):
    model = build(temperature=dict(policy='cosine', tmin=2.0, tmax=6.0))
    found = {}
    for progress, wanted in ((0.0, 6.0), (0.999, 2.0)):
        at(hub, progress)
        found[wanted] = parts(model)
        assert found[wanted]['temperature'] == wanted
        for loss in model.terms['x'].losses.values():
            assert loss.temperature == wanted
    assert found[6.0]['scores'] != found[2.0]['scores']


def test_without_one_losses_keep_their_own(build):
    model = build()
    assert 'temperature' not in parts(model)
    assert model.terms['x'].losses['edges'].temperature == 10.0


def test_it_is_told_the_detection_loss(build, hub):
    model = build(temperature=dict(policy='convergence'))
    term = model.terms['x']
    assert term.needs_detection
    at(hub, 0.0)
    losses = model.loss(*tiny.batch())
    wanted = sum(
        one.mean()
        for name, value in losses.items()
        if name.startswith('loss') and 'kd' not in name
        for one in (value if isinstance(value, list) else [value])
    )
    torch.testing.assert_close(term.temperature._total, wanted.detach())


def test_only_a_policy_that_listens_needs_detection(build):
    assert (
        not build(temperature=dict(policy='cosine')).terms['x'].needs_detection
    )
    assert not build().terms['x'].needs_detection


def test_a_stopped_training_knows_the_losses(build, hub):
    one = build(temperature=dict(policy='loss'))
    for progress in (0.0, 0.1, 0.2, 0.25):
        at(hub, progress)
        parts(one)
    other = build(temperature=dict(policy='loss'))
    other.terms['x'].load_run_state(copy.deepcopy(one.terms['x'].run_state()))
    assert (
        other.terms['x'].temperature.state()
        == one.terms['x'].temperature.state()
    )
    assert len(other.terms['x'].temperature.means) == 2


# What does not fit -----------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(teachers=('big',)), 'two teachers or more'),
        (dict(teachers=('big', 'big')), "'big' twice"),
        (dict(teachers=('big', 'othr')), "Did you mean 'other'?"),
        (dict(attn=dict(hiden=3)), "Did you mean 'hidden'?"),
        (dict(attn=dict(entropy_weight=-1.0)), 'entropy_weight >= 0'),
        (dict(channels=32), 'Set its channels to 16'),
        (dict(losses=dict(a=dict(type='mmkd.LDLoss'))), 'Give both'),
        (
            dict(
                losses=dict(a=dict(output=0, loss=dict(type='mmkd.PKDLoss')))
            ),
            'Choose a loss on outputs of heads',
        ),
        (
            dict(
                losses=dict(a=dict(output=0, loss=dict(type='mmkd.ALPLoss'))),
                temperature=dict(),
            ),
            'leave temperature out',
        ),
    ],
)
def test_what_cannot_be_is_refused(build, settings, message):
    with pytest.raises(ValueError) as error:
        build(**settings)
    assert message in str(error.value)


def test_a_teacher_of_another_head_is_refused(build):
    with pytest.raises(ValueError, match='Did you mean'):
        build(taught=dict(other=tiny.faster_rcnn(base=16)))


def test_fused_gradient_stops_at_the_teachers(build):
    model = build()
    found = parts(model)
    sum(found[name] for name in ('scores', 'edges', 'entropy')).backward()
    assert model.bbox_head.gfl_cls.weight.grad.abs().sum() > 0
    for teacher in model.teachers.values():
        assert all(one.grad is None for one in teacher.detector.parameters())

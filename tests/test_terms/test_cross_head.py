import copy

import heads
import pytest
import tiny
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou

from mmkd.taps import recording
from mmkd.terms.cross_head import rescale

CONVS = 2
KINDS = ('gfl', 'atss', 'retinanet', 'fcos')
GROUPS = dict(type='GN', num_groups=4)


def detector(kind, **more):
    return getattr(heads, kind)(convs=3, **more)


def term(**settings):
    return dict(
        type='mmkd.CrossHeadTerm', teacher='big', convs=CONVS, **settings
    )


@pytest.fixture
def build(tmp_path):
    def build(kind, teacher=None, student=None, **settings):
        teacher = teacher or detector(kind, base=16)
        file = tmp_path / 'teacher.pth'
        tiny.save_teacher(teacher, file, seed=3)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        model = tiny.distilled(
            student or detector(kind), dict(big=big), dict(x=term(**settings))
        )
        model = tiny.build(model)
        model.teachers.load()
        # Else scores of an untrained head are all alike.
        for one in (model, model.teachers['big'].detector):
            torch.manual_seed(len(str(type(one))))
            for name, weight in one.bbox_head.named_parameters():
                if name.endswith('weight') and 'gn' not in name:
                    torch.nn.init.normal_(weight.data, std=0.08)
        return model.train()

    return build


def towers(head, maps, first, last):
    """Pre-activation maps after ``last`` convolutions, level by level."""
    found = {}
    for name in ('cls_convs', 'reg_convs'):
        levels = []
        for one in maps:
            for index, layer in enumerate(getattr(head, name)[first:last]):
                one = layer.conv(one)
                if layer.with_norm:
                    one = layer.norm(one)
                if index < last - first - 1:
                    one = one.relu()
            levels.append(one)
        found[name] = levels
    return found


PREDICTORS = dict(
    gfl=('gfl_cls', 'gfl_reg'),
    atss=('atss_cls', 'atss_reg'),
    retinanet=('retina_cls', 'retina_reg'),
    fcos=('conv_cls', 'conv_reg'),
)


def predictions(kind, head, classes, boxes):
    """The teacher's last convolution and predictors, written out."""
    cls, reg = (getattr(head, name) for name in PREDICTORS[kind])
    rest = [getattr(head, x)[CONVS] for x in ('cls_convs', 'reg_convs')]
    scores, deltas, centers = [], [], []
    for level, (one, other) in enumerate(zip(classes, boxes)):
        one, other = rest[0](one.relu()), rest[1](other.relu())
        scores.append(cls(one))
        delta = reg(other)
        if kind != 'retinanet':
            delta = head.scales[level](delta)
        if kind == 'fcos':
            delta = delta.clamp(min=0) * head.strides[level]
        if kind == 'atss':
            centers.append(head.atss_centerness(other))
        deltas.append(delta)
    return scores, deltas, centers


def standard(one, other):
    """Channel by channel, with loops."""
    out = torch.empty_like(one)
    for c in range(one.shape[1]):
        own, like = one[:, c], other[:, c]
        own = (own - own.mean()) / (own.std(correction=0) + 1e-6)
        out[:, c] = own * like.std(correction=0) + like.mean()
    return out


def rows(one, width):
    return one.permute(0, 2, 3, 1).reshape(-1, width)


def literal(kind, student, images, samples):
    """All parts, from maps to sums."""
    big = student.teachers['big'].detector
    own = towers(student.bbox_head, student.extract_feat(images), 0, CONVS)
    with torch.no_grad():
        theirs = towers(big.bbox_head, big.extract_feat(images), 0, CONVS)
    names = ('cls_convs', 'reg_convs')
    crossed = predictions(
        kind,
        big.bbox_head,
        *([standard(*x) for x in zip(own[n], theirs[n])] for n in names),
    )
    given = predictions(kind, big.bbox_head, *(theirs[n] for n in names))
    with recording(student, ['bbox_head.get_targets']) as record:
        student.loss(images, samples)
    targets = record.at('bbox_head.get_targets')
    labels = targets[1] if kind in ('gfl', 'atss') else targets[0]
    count = sum(((x >= 0) & (x < 3)).sum().item() for x in labels)
    assert count > 1
    cls = box = center = total = 0.0
    head = big.bbox_head
    for level in range(len(given[0])):
        x, t = (rows(one[0][level], 3) for one in (crossed, given))
        p, q = t.sigmoid(), x.sigmoid()
        entropy = -p * q.log() - (1 - p) * (1 - q).log()
        cls += ((q - p).abs() * entropy).sum()
        weight = p.amax(1)
        if kind == 'gfl':
            one, other = (rows(g[1][level], 4) for g in (crossed, given))
            one, other = (g.reshape(-1, 4, 4) for g in (one, other))
            kl = other.softmax(2) * (other.log_softmax(2) - one.log_softmax(2))
            box += (weight * kl.sum(2).mean(1)).sum()
            total += weight.sum()
            continue
        size = given[1][level].shape[-2:]
        prior = head.prior_generator.single_level_grid_priors(
            size, level, device='cpu'
        )
        decoded = [
            head.bbox_coder.decode(
                prior.repeat(len(images), 1), rows(g[1][level], 4)
            )
            for g in (crossed, given)
        ]
        giou = generalized_box_iou(*decoded).diagonal()
        box += (weight * (1 - giou)).sum()
        if kind == 'atss':
            inside = (labels[level] >= 0) & (labels[level] < 3)
            one, other = (
                rows(g[2][level], 1).reshape(inside.shape)
                for g in (crossed, given)
            )
            center += F.binary_cross_entropy_with_logits(
                one[inside], other[inside].sigmoid(), reduction='sum'
            )
    box = box / max(total, 1) if kind == 'gfl' else box / count
    return dict(cls=cls / count, box=box, centerness=center / count)


@pytest.mark.parametrize('kind', KINDS)
def test_equals_the_method_written_out(build, kind):
    more = dict(centerness_weight=0.5) if kind == 'atss' else {}
    student = build(kind, class_weight=2.0, box_weight=3.0, **more)
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)), boxes=6)
    expected = literal(kind, student, images, samples)
    losses = student.loss(images, samples)
    found = {
        name.removeprefix('loss_kd_x_'): value
        for name, value in losses.items()
        if 'kd_x' in name
    }
    factors = dict(cls=2.0, box=3.0, centerness=0.5)
    assert found.keys() == (
        {'cls', 'box'} | ({'centerness'} if more else set())
    )
    for name, value in found.items():
        assert value > 0
        torch.testing.assert_close(
            value, factors[name] * expected[name], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize('norm', [None, GROUPS], ids=['plain', 'norm'])
@pytest.mark.parametrize('kind', ['gfl', 'retinanet'])
def test_a_student_that_is_the_teacher_costs_nothing(build, kind, norm):
    model = detector(kind, norm_cfg=norm)
    student = build(kind, teacher=model, student=copy.deepcopy(model))
    big = student.teachers['big'].detector
    student.load_state_dict(big.state_dict(), strict=False)
    student.eval()
    losses = student.loss(*tiny.batch())
    assert losses['loss_kd_x_cls'].item() < 1e-4
    assert losses['loss_kd_x_box'].item() < 1e-4


def test_scale_and_level_of_the_students_channels_do_not_matter(build):
    student = build('gfl')
    batch = tiny.batch()
    before = student.loss(*batch)
    for tower in ('cls_convs', 'reg_convs'):
        conv = getattr(student.bbox_head, tower)[CONVS - 1].conv
        with torch.no_grad():
            conv.weight *= torch.rand(len(conv.weight), 1, 1, 1) + 0.5
            conv.bias += torch.randn(len(conv.bias))
    after = student.loss(*batch)
    for part in ('cls', 'box'):
        name = f'loss_kd_x_{part}'
        torch.testing.assert_close(
            after[name], before[name], rtol=1e-3, atol=1e-5
        )


def test_the_students_own_predictors_learn_nothing_from_it(build):
    """And nothing of the teacher does."""
    student = build('gfl')
    losses = student.loss(*tiny.batch())
    (losses['loss_kd_x_cls'] + losses['loss_kd_x_box']).backward()
    head = student.bbox_head
    for module in (head.gfl_cls, head.gfl_reg, head.cls_convs[CONVS]):
        assert all(
            one.grad is None or not one.grad.any()
            for one in module.parameters()
        )
    for module in (
        student.backbone.conv1,
        head.cls_convs[0],
        head.reg_convs[0],
    ):
        assert all(one.grad.any() for one in module.parameters())
    big = student.teachers['big'].detector
    assert all(one.grad is None for one in big.parameters())


def test_the_teachers_head_is_left_as_it_was(build):
    student = build('gfl')
    head = student.teachers['big'].detector.bbox_head
    before = list(head.cls_convs)
    student.loss(*tiny.batch())
    assert list(head.cls_convs) == before
    head.gfl_reg.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        student.loss(*tiny.batch())
    assert list(head.cls_convs) == before


def test_other_widths_are_aligned(build):
    wide = detector('gfl', base=16)
    wide['bbox_head']['feat_channels'] *= 2
    with pytest.raises(
        ValueError, match=r'16 and 32 channels.*out_channels=32'
    ):
        build('gfl', teacher=wide)
    student = build(
        'gfl',
        teacher=wide,
        align=dict(
            type='mmkd.ConvAdapt',
            in_channels=16,
            out_channels=32,
            num_levels=5,
        ),
    )
    losses = student.loss(*tiny.batch())
    losses['loss_kd_x_cls'].backward()
    adapt = student.terms['x'].aligns['cls_convs']
    assert all(one.grad is not None for one in adapt.parameters())


def test_images_without_boxes(build):
    student = build('retinanet')
    losses = student.loss(*tiny.batch(boxes=0))
    assert losses['loss_kd_x_cls'].isfinite()
    tiny.total(losses).backward()


def test_the_border_does_not_count(build):
    student = build('gfl').eval()
    images, samples = tiny.batch(shapes=((128, 128), (64, 128)))
    seen = []
    for name in ('_classes', '_boxes'):
        plain = getattr(student.terms['x'], name)
        setattr(
            student.terms['x'],
            name,
            lambda *x, plain=plain: seen.append(x) or plain(*x),
        )
    student.loss(images, samples)
    assert len(seen) == 2
    nothing = [0 * one for one in seen[0][2]]
    crossed, given, _, head = seen[0]
    classes = student.terms['x']._classes
    assert classes(crossed, given, nothing, head).item() == 0
    for weights in (seen[0][2], seen[1][2]):
        rows = weights[0].shape[-2]
        assert weights[0][0].all()
        assert weights[0][1, :, : rows // 2].all()
        assert not weights[0][1, :, rows // 2 + 1 :].any()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(power=0.5), 'power >= 1'),
        (dict(temperature=0), 'temperature > 0'),
    ],
)
def test_settings_out_of_range(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build('gfl', **settings)


def test_too_many_convolutions(build):
    with pytest.raises(ValueError, match=r"student's cls_convs has 1.*most 1"):
        build('gfl', student=heads.gfl(convs=1))


def test_a_head_without_towers(build):
    with pytest.raises(ValueError, match="no submodule 'bbox_head' to tap"):
        build('gfl', student=tiny.faster_rcnn())
    with pytest.raises(ValueError, match='needs a dense head with towers'):
        build('gfl', tap='neck')


def test_a_misspelt_head_gets_the_nearest(build):
    with pytest.raises(ValueError, match=r"'bbox_hed' to tap.*'bbox_head'"):
        build('gfl', tap='bbox_hed')


def test_other_strides(build):
    model = detector('gfl')
    strides = model['bbox_head']['anchor_generator']['strides']
    model['bbox_head']['anchor_generator']['strides'] = strides[1:]
    model['neck']['num_outs'] = len(strides) - 1
    with pytest.raises(ValueError, match='heads of the same strides'):
        build('gfl', student=model)


def test_no_centerness(build):
    student = build('gfl', centerness_weight=1.0)
    with pytest.raises(ValueError, match='Set centerness_weight=0'):
        student.loss(*tiny.batch())


def test_nothing_to_do_nothing_done(build):
    student = build('gfl', class_weight=0.0, box_weight=0.0)
    assert student.terms['x'].silent()


def test_rescaling():
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 4, 5), 3 * torch.randn(2, 3, 4, 5) + 1
    torch.testing.assert_close(
        rescale(one, other), standard(one, other), rtol=1e-4, atol=1e-5
    )

import copy

import heads
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmdet.models.utils import unpack_gt_instances

from mmkd.taps import recording
from mmkd.terms.one import LevelGates, gated_sum

LEVELS, CHANNELS, CLASSES = 5, 16, 3
WEIGHTS = ('branch_weight', 'ensemble_weight', 'distil_weight')
PARTS = ('branches', 'ensemble', 'distil')


def build(kind='retinanet', head=None, phases=None, **settings):
    student = getattr(heads, kind)(convs=2)
    term = dict(
        type='mmkd.OneTerm',
        head=dict(head or student['bbox_head'], stacked_convs=1),
        channels=CHANNELS,
        num_levels=LEVELS,
    )
    model = tiny.build(
        tiny.distilled(
            student, {}, dict(x=dict(term, **settings)), phases=phases
        )
    )
    # Else all heads say the same of everything.
    for seed, one in enumerate((model.bbox_head, *branches(model))):
        torch.manual_seed(seed)
        for name, weight in one.named_parameters():
            if name.endswith('weight') and weight.ndim > 1:
                torch.nn.init.normal_(weight.data, std=0.05)
    return model.train()


def branches(model):
    return model.terms['x'].branches


def shares(model, images, samples):
    losses = model.loss(images, samples)
    return {part: losses[f'loss_kd_x_{part}'] for part in PARTS}


def only(weight):
    return {**dict.fromkeys(WEIGHTS, 0.0), weight: 1.0}


def total(losses):
    return sum(
        one.mean()
        for name, value in losses.items()
        if 'loss' in name
        for one in (value if isinstance(value, (list, tuple)) else [value])
    )


def said_by_all(model, images):
    with recording(model, ['neck']) as record:
        model.extract_feat(images)
    maps = record.at('neck')
    return maps, [one(maps) for one in (model.bbox_head, *branches(model))]


def literal_gates(model, maps, samples):
    """Gates of each image and level: [level][image, branch]."""
    found = []
    for level, one in enumerate(maps):
        layer = model.terms['x'].gates.levels[level]
        rows = []
        for index, sample in enumerate(samples):
            height, width = (
                -(-cells * side // 128)
                for cells, side in zip(one.shape[-2:], sample.img_shape)
            )
            mean = one[index, :, :height, :width].mean((1, 2))
            rows.append((layer.weight @ mean + layer.bias).softmax(0))
        found.append(torch.stack(rows))
    return found


def literal_sum(said, gates):
    """What all branches say together, one output, level and image a time."""
    together = []
    for output in range(len(said[0])):
        levels = []
        for level, gate in enumerate(gates):
            rows = [
                sum(
                    gate[image, branch] * said[branch][output][level][image]
                    for branch in range(len(said))
                )
                for image in range(len(gate))
            ]
            levels.append(torch.stack(rows))
        together.append(levels)
    return tuple(together)


@pytest.mark.parametrize('kind', ['retinanet', 'gfl', 'fcos'])
def test_the_three_parts_are_those_of_the_method(kind):
    model = build(kind, **dict(zip(WEIGHTS, (2.0, 3.0, 5.0))))
    for gate in model.terms['x'].gates.levels:
        torch.nn.init.normal_(gate.weight, std=2.0)
    model.backbone.eval()  # its statistics do not move between the two
    images, samples = tiny.batch()
    found = shares(model, images, samples)
    maps, said = said_by_all(model, images)
    gates = literal_gates(model, maps, samples)
    together = literal_sum(said, gates)
    boxes, ignored, metas = unpack_gt_instances(samples)
    tasks = [
        total(head.loss_by_feat(*one, boxes, metas, ignored))
        for head, one in zip(branches(model), said[1:])
    ]
    torch.testing.assert_close(found['branches'], 2 * sum(tasks))
    alone = total(
        model.bbox_head.loss_by_feat(*together, boxes, metas, ignored)
    )
    torch.testing.assert_close(found['ensemble'], 3 * alone)
    rows = []
    for one in (together, *said):
        logits = torch.cat([x.flatten(2) for x in one[0]], 2)
        rows.append(logits.transpose(1, 2).detach())
    valid = torch.ones(2, rows[0].shape[1])
    start = 0
    for one in maps:
        cells = torch.ones(one.shape[-2:])
        cells[-(-one.shape[-2] * 96 // 128) :] = 0
        cells[:, -(-one.shape[-1] * 112 // 128) :] = 0
        valid[1, start : start + cells.numel()] = cells.flatten()
        start += cells.numel()
    p = rows[0].sigmoid()
    weight = valid * p.amax(2)
    wanted = 0.0
    for z in rows[1:]:
        cross = F.binary_cross_entropy_with_logits(z, p, reduction='none')
        entropy = F.binary_cross_entropy(p, p, reduction='none')
        divergence = (cross - entropy).sum(2)
        wanted += (weight * divergence).sum() / weight.sum()
    torch.testing.assert_close(
        found['distil'], 5 * wanted, rtol=1e-3, atol=1e-6
    )
    assert all(one > 0 for one in found.values())


def test_gates_of_an_image_sum_to_one_and_differ_by_level_and_image():
    torch.manual_seed(0)
    gates = LevelGates(4, num_levels=2, num_branches=3)
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)]
    counts = [torch.ones_like(one[:, :1]) for one in maps]
    found = gates(maps, counts)
    assert [one.shape for one in found] == [(2, 3), (2, 3)]
    for one in found:
        torch.testing.assert_close(one.sum(1), torch.ones(2))
        assert (one > 0).all()
        assert (one[0] - one[1]).abs().max() > 1e-3
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_padded_border_opens_no_gate():
    torch.manual_seed(0)
    gates = LevelGates(4, num_levels=1, num_branches=2)
    one, count = torch.randn(1, 4, 4, 4), torch.ones(1, 1, 4, 4)
    count[..., 2:] = 0
    (cut,) = gates([one[..., :2]], [count[..., :2]])
    one[..., 2:] = 1e4
    torch.testing.assert_close(gates([one], [count])[0], cut)


def test_the_sum_of_equal_branches_is_the_branch():
    torch.manual_seed(0)
    maps = ([torch.randn(2, 4, 3, 3)], [torch.randn(2, 8, 3, 3)])
    gate = torch.rand(2, 3).softmax(1)
    for one, other in zip(gated_sum([maps] * 3, [gate]), maps):
        torch.testing.assert_close(one[0], other[0])


def test_branches_that_agree_teach_each_other_nothing():
    model = build(
        head=dict(heads.retinanet(convs=2)['bbox_head']), **only(WEIGHTS[2])
    )
    for one in branches(model):
        for name, weight in one.named_parameters():
            own = dict(model.bbox_head.named_parameters()).get(name)
            weight.data = own.data.clone()
        one.cls_convs.append(copy.deepcopy(model.bbox_head.cls_convs[1]))
        one.reg_convs.append(copy.deepcopy(model.bbox_head.reg_convs[1]))
    found = shares(model, *tiny.batch())
    assert found['distil'].abs() < 1e-5


def test_the_sum_that_teaches_is_held_fixed():
    model = build(**only('distil_weight'))
    shares(model, *tiny.batch())['distil'].backward()
    for one in model.terms['x'].gates.parameters():
        assert one.grad is None or (one.grad == 0).all()
    for head in (model.bbox_head, *branches(model)):
        assert head.retina_cls.weight.grad.abs().sum() > 0
        assert (
            head.retina_reg.weight.grad is None
            or (head.retina_reg.weight.grad == 0).all()
        )


def test_the_sum_learns_from_labels_through_all_branches_and_gates():
    model = build(**only('ensemble_weight'))
    found = shares(model, *tiny.batch())
    assert found['branches'] == found['distil'] == 0
    found['ensemble'].backward()
    for head in (model.bbox_head, *branches(model)):
        assert head.retina_cls.weight.grad.abs().sum() > 0
        assert head.retina_reg.weight.grad.abs().sum() > 0
    for one in model.terms['x'].gates.parameters():
        assert one.grad.abs().sum() > 0


def test_the_branches_learn_from_labels_by_themselves():
    model = build(**only('branch_weight'))
    shares(model, *tiny.batch())['branches'].backward()
    for one in branches(model):
        assert one.retina_cls.weight.grad.abs().sum() > 0
    own = model.bbox_head.retina_cls.weight.grad
    assert own is None or (own == 0).all()
    last = [*model.backbone.children()][-1]
    assert all(one.grad.abs().sum() > 0 for one in last.parameters())


def test_branches_are_lighter_start_apart_and_are_not_deployed():
    model = build(num_branches=3)
    assert len(branches(model)) == 3
    sizes = [
        sum(weight.numel() for weight in one.parameters())
        for one in (model.bbox_head, *branches(model))
    ]
    assert all(one < sizes[0] for one in sizes[1:])
    plain = tiny.build(heads.retinanet(convs=2))
    report = plain.load_state_dict(model.state_dict(), strict=False)
    assert report.missing_keys == []
    assert all(key.startswith('terms.') for key in report.unexpected_keys)


def test_the_mean_gate_of_the_student_is_watched():
    model = build()
    losses = model.loss(*tiny.batch())
    assert 0 < losses['kd_x_gate'] < 1
    assert not losses['kd_x_gate'].requires_grad


def test_images_without_labels_are_no_background():
    """Their branches are compared, and learn from no label."""
    model = build()
    model.backbone.eval()
    images, samples = tiny.batch(shapes=((128, 128),) * 2)
    wanted = shares(model, images[:1], samples[:1])
    del samples[1].gt_instances
    found = shares(model, images, samples)
    for part in ('branches', 'ensemble'):
        torch.testing.assert_close(found[part], wanted[part])
    assert (found['distil'] - wanted['distil']).abs() > 1e-7
    model = build(phases=[dict(supervised=False)])
    del samples[0].gt_instances
    found = shares(model, images, samples)
    assert found['branches'] == found['ensemble'] == 0
    sum(found.values()).backward()


def test_nothing_is_said_without_a_weight():
    model = build(**dict.fromkeys(WEIGHTS, 0.0))
    assert model.terms['x'].silent()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(num_levels=4), 'Set num_levels=5'),
        (dict(channels=8), 'Set its channels to 16'),
        (dict(num_branches=0), 'num_branches > 0'),
        (dict(temperature=0.0), 'temperature > 0'),
        (dict(tap='nek'), "Did you mean 'neck'"),
        (dict(head_tap='backbone'), 'OneTerm sums what dense heads'),
    ],
)
def test_a_wrong_setting_is_told(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_a_branch_of_another_kind_is_refused():
    other = dict(heads.retinanet()['bbox_head'], num_classes=4)
    with pytest.raises(ValueError, match="student's own head"):
        build(head=other)

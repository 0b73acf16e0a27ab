"""The teacher's head reads the student's queries, whatever their order."""

import copy

import detrs
import pytest
import tiny
import torch
from asking import detector, distilled, permuted, step_of

from mmkd.terms.cross_query import CrossQueryTerm
from mmkd.terms.queries import answers
from mmkd.terms.query_pairs import matched_queries

#: Student and teacher whose reference points have as many coordinates.
PAIRS = [
    ('detr', 'detr'),
    ('dab', 'detr'),
    ('conditional', 'conditional'),
    ('dab', 'dab'),
    ('deformable', 'deformable'),
    ('refine', 'refine'),
    ('two_stage', 'two_stage'),
    ('dino', 'two_stage'),
    ('dino', 'dino'),
    ('ddq', 'ddq'),
]


def said(step, seed=0, **settings):
    torch.manual_seed(seed)
    return CrossQueryTerm('big', **settings)(step)


@pytest.fixture(scope='module')
def pair():
    return detector('refine'), detector('refine', 1, queries=15, layers=3)


@pytest.fixture
def step(pair):
    return step_of(*pair)


def crossed(step):
    """What each branch of the teacher says, read one by one."""
    own, shown = step.student, step.teacher('big')
    states = answers(own).states
    known = answers(shown).states
    places = own.at('forward_decoder')['references']
    head = shown.detector.bbox_head
    found = []
    for layer, like in enumerate(known):
        layers = len(known), len(states)
        (source,) = [
            one
            for one in range(layers[1])
            if one == -(-(layer + 1) * layers[1] // layers[0]) - 1
        ]
        one = states[source].flatten(0, 1)
        flat = like.flatten(0, 1)
        one = (one - one.mean(0)) / one.std(0, correction=0)
        one = one * flat.std(0, correction=0) + flat.mean(0)
        one = one.view_as(states[source])
        box = head.reg_branches[layer](one)
        place = places[source].detach().logit(eps=1e-5)
        box = torch.cat(
            [
                box[..., : place.shape[-1]] + place,
                box[..., place.shape[-1] :],
            ],
            -1,
        ).sigmoid()
        found.append((head.cls_branches[layer](one), box))
    return found


# The formula -----------------------------------------------------------------


def test_it_is_the_formula(step):
    found = said(step, class_weight=3.0)
    known = answers(step.teacher('big'))
    own = type(known)(
        *(torch.stack(one) for one in zip(*crossed(step))), None, False
    )
    own = type(known)(own.logits, own.boxes, own.logits, False)
    index = matched_queries(own, known)
    cls, box = 0.0, 0.0
    chance = known.logits.sigmoid()
    weight = chance[-1].amax(-1)
    total = sum(weight[n, q] for n in range(2) for q in index[1][n])
    for layer in range(3):
        for image in range(2):
            for one, other in zip(index[0][image], index[1][image]):
                p = own.logits[layer, image, one].sigmoid()
                t = chance[layer, image, other]
                entropy = -(t * p.log() + (1 - t) * (1 - p).log())
                cls = cls + ((p - t).abs() * entropy).sum()
                a = own.boxes[layer, image, one]
                b = known.boxes[layer, image, other]
                apart = 5 * (a - b).abs().sum() + 2 * (1 - overlap(a, b))
                box = box + weight[image, other] / total * apart
    cls = 3 * cls / len(step.gt.labels)
    torch.testing.assert_close(found['cls'], cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found['box'], box, rtol=1e-4, atol=1e-5)


def overlap(one, other):
    """GIoU of two boxes by centre and size."""
    a, b = (
        torch.cat([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
        for box in (one, other)
    )
    inner = torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])
    inside = inner.clamp(min=0).prod()
    union = one[2:].prod() + other[2:].prod() - inside
    hull = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod()
    return inside / union - (hull - union) / hull


def test_weights_are_factors(step):
    plain = said(step, l1_weight=0.0)
    found = said(step, class_weight=2.0, l1_weight=0.0, giou_weight=6.0)
    torch.testing.assert_close(found['cls'], 2 * plain['cls'])
    torch.testing.assert_close(found['box'], 3 * plain['box'])


def test_a_power_leaves_small_differences_out(step):
    assert said(step, power=2.0)['cls'] < said(step)['cls']


def test_the_student_itself_costs_nothing(pair):
    turned = permuted(pair[0], torch.randperm(12))
    for value in said(step_of(turned, pair[0])).values():
        assert value < 1e-4


def test_the_order_of_queries_changes_nothing(pair, step):
    student, teacher = pair
    plain = said(step)
    torch.manual_seed(0)
    for turned in (
        (student, permuted(teacher, torch.randperm(15))),
        (permuted(student, torch.randperm(12)), teacher),
    ):
        for key, value in said(step_of(*turned)).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)


def test_scale_and_offset_of_the_states_do_not_matter(step):
    plain = said(step)
    decoded = step.student.at('forward_decoder')
    states = decoded['hidden_states']
    torch.manual_seed(0)
    scale, offset = torch.rand(16) + 0.5, torch.randn(16)
    decoded['hidden_states'] = scale * states + offset
    for key, value in said(step).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)
    decoded['hidden_states'] = states


def test_the_teacher_counts(pair, step):
    plain = said(step)
    other = copy.deepcopy(pair[1])
    with torch.no_grad():  # what is read by, not what is read
        for one in other.bbox_head.parameters():
            one.add_(0.3 * torch.randn_like(one))
    for key, value in said(step_of(pair[0], other)).items():
        assert (value - plain[key]).abs() > 1e-4


# Who learns ------------------------------------------------------------------


@pytest.mark.parametrize('kinds', PAIRS, ids='-from-'.join)
def test_every_kind_learns_but_for_its_own_head(kinds, tmp_path):
    student, teacher = (
        detrs.detr(kind, base=base, queries=queries, layers=layers)
        for kind, base, queries, layers in zip(
            kinds, (8, 16), (12, 14), (2, 3)
        )
    )
    term = dict(type='mmkd.CrossQueryTerm', teacher='big')
    model = distilled(student, teacher, term, tmp_path)
    losses = model.loss(*tiny.batch(shapes=((128, 128), (96, 64))))
    shares = {key: one for key, one in losses.items() if 'loss_kd' in key}
    assert {*shares} == {'loss_kd_x_cls', 'loss_kd_x_box'}
    assert all(one.isfinite() and one > 0 for one in shares.values())
    sum(shares.values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    assert model.decoder.layers[0].norms[-1].weight.grad.abs().sum() > 0
    # What layers with queries of the encoder's do not know: the branches.
    for one in model.bbox_head.parameters():
        assert one.grad is None or one.grad.abs().sum() == 0
    for one in model.teachers['big'].detector.parameters():
        assert one.grad is None


def test_an_align_brings_other_widths_together(tmp_path):
    align = dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=256)
    term = dict(type='mmkd.CrossQueryTerm', teacher='big', align=align)
    student, teacher = detrs.detr('ddq'), detrs.detr('dino')
    model = distilled(student, teacher, term, tmp_path)
    losses = model.loss(*tiny.batch())
    losses['loss_kd_x_cls'].backward()
    (layer,) = model.terms.x.align.adapts
    assert layer[0].weight.grad.abs().sum() > 0


def test_classes_may_be_others(tmp_path):
    term = dict(type='mmkd.CrossQueryTerm', teacher='big')
    student, teacher = detrs.detr('dab'), detrs.detr('dab', classes=5)
    model = distilled(student, teacher, term, tmp_path)
    assert not model.terms.x.compares_classes()
    assert model.loss(*tiny.batch())['loss_kd_x_cls'] > 0


def test_images_without_boxes_are_defined(pair):
    found = said(step_of(*pair, boxes=0))
    assert all(one.isfinite() for one in found.values())


def test_half_precision_is_finite(pair):
    with torch.autocast('cpu', torch.bfloat16):
        found = said(step_of(*pair))
    for value in found.values():
        assert value.dtype == torch.float32
        assert value.isfinite()


def test_the_teachers_head_reads_in_full_precision(step):
    plain = said(step)
    with torch.autocast('cpu', torch.bfloat16):
        found = said(step)
    for key, value in found.items():
        assert torch.equal(value, plain[key])


# Refusals --------------------------------------------------------------------


@pytest.mark.parametrize(
    'kinds',
    [('deformable', 'dab'), ('detr', 'dab'), ('deformable', 'refine')],
    ids='-from-'.join,
)
def test_other_reference_points_are_refused(kinds, tmp_path):
    term = dict(type='mmkd.CrossQueryTerm', teacher='big')
    with pytest.raises(ValueError, match='Use mmkd.QueryFeatureTerm for'):
        distilled(*map(detrs.detr, kinds), term, tmp_path)


def test_other_widths_are_refused(tmp_path):
    term = dict(type='mmkd.CrossQueryTerm', teacher='big')
    with pytest.raises(
        ValueError, match='in_channels=16, out_channels=256.*to this term'
    ):
        distilled(detrs.detr('ddq'), detrs.detr('dino'), term, tmp_path)


def test_detectors_without_queries_are_refused(tmp_path):
    term = dict(type='mmkd.CrossQueryTerm', teacher='big')
    with pytest.raises(ValueError, match='teacher, RetinaNet, has none'):
        distilled(detrs.detr('dab'), tiny.retinanet(), term, tmp_path)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match='power >= 1'):
        CrossQueryTerm('big', power=0.5)


def test_a_weight_of_nothing_is_silent():
    nothing = dict(class_weight=0.0, l1_weight=0.0, giou_weight=0.0)
    assert CrossQueryTerm('big', **nothing).silent()
    for one in nothing:
        assert not CrossQueryTerm('big', **nothing | {one: 1.0}).silent()

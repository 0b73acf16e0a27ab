import detrs
import pytest
import tiny
import torch
from asking import detector, distilled, permuted, step_of

from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import answers, ask, drawn, question
from mmkd.terms.shared_queries import (
    SharedQueryTerm,
    answer_distances,
    confidence,
)

#: Student and teacher whose decoders can be asked the same.
PAIRS = [
    ('detr', 'detr'),
    ('conditional', 'conditional'),
    ('dab', 'dab'),
    ('deformable', 'deformable'),
    ('deformable', 'refine'),
    ('refine', 'deformable'),
    ('two_stage', 'two_stage'),
    ('dino', 'dino'),
    ('ddq', 'ddq'),
]


def said(step, seed=0, **settings):
    torch.manual_seed(seed)
    return SharedQueryTerm('big', **{'general': 7, **settings})(step)


@pytest.fixture(scope='module')
def pair():
    return detector('refine'), detector('refine', 1, queries=15, layers=3)


@pytest.fixture
def step(pair):
    return step_of(*pair)


def overlap(one, other):
    """GIoU of two boxes by centre and size, as one reads it."""
    a, b = (
        [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        for x, y, w, h in (one, other)
    )
    wide = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = one[2] * one[3] + other[2] * other[3] - wide * high
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (
        max(a[3], b[3]) - min(a[1], b[1])
    )
    return wide * high / union - (hull - union) / hull


def literally(own, known):
    found = dict(cls=0.0, l1=0.0, giou=0.0)
    layers, images, queries, classes = own.logits.shape
    chance = known.logits.sigmoid().tolist()
    wrong = own.logits.sigmoid().tolist()
    boxes, others = own.boxes.tolist(), known.boxes.tolist()
    pairs = [(image, q) for image in range(images) for q in range(queries)]
    total = sum(max(chance[-1][image][q]) for image, q in pairs)
    for layer, place in enumerate(uniform_map(layers, len(chance))):
        for image, q in pairs:
            share = max(chance[-1][image][q]) / total
            for c in range(classes):
                t = torch.tensor(chance[place][image][q][c]).double()
                s = torch.tensor(wrong[layer][image][q][c]).double()
                found['cls'] += share * (
                    t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
                )
            a, b = boxes[layer][image][q], others[place][image][q]
            found['l1'] += share * sum(abs(x - y) for x, y in zip(a, b))
            found['giou'] += share * (1 - overlap(a, b))
    return {part: float(value) for part, value in found.items()}


# The formula -----------------------------------------------------------------


def test_it_is_the_formula(step):
    found = said(step)
    teacher = step.teacher('big')
    torch.manual_seed(0)
    asked = drawn(teacher, 7)
    expected = literally(ask(step.student, asked), ask(teacher, asked))
    specific = literally(
        ask(step.student, question(teacher)), answers(teacher)
    )
    for weight, part in zip((1, 5, 2), ('cls', 'l1', 'giou')):
        for kind, value in (('general', expected), ('specific', specific)):
            assert found[f'{kind}_{part}'].item() == pytest.approx(
                weight * value[part], rel=1e-4, abs=1e-6
            )


def test_weights_are_factors(step):
    plain = said(step)
    found = said(
        step, cls_weight=3.0, l1_weight=0.5, giou_weight=0.0, loss_weight=2.0
    )
    for kind in ('general', 'specific'):
        for part, factor in (('cls', 6.0), ('l1', 0.2), ('giou', 0.0)):
            torch.testing.assert_close(
                found[f'{kind}_{part}'], factor * plain[f'{kind}_{part}']
            )


def test_queries_that_find_nothing_do_not_count(step):
    teacher = step.teacher('big')
    own, known = ask(step.student, question(teacher)), answers(teacher)
    weight = torch.zeros_like(confidence(known))
    weight[:, 2] = 1
    some = slice(2, 3)
    found = answer_distances(own, known, weight)
    alone = answer_distances(own.of(some), known.of(some), weight[:, some])
    for part, value in found.items():
        torch.testing.assert_close(value, alone[part])


def test_confidence_leaves_the_background_out():
    known = answers(step_of(*[detector('detr')] * 2).student)
    known.logits[..., -1] = 50.0
    assert confidence(known).max() < 1e-6


def test_the_same_detector_says_the_same():
    model = detector('refine')
    for value in said(step_of(model, model)).values():
        assert value.abs() < 1e-5


@pytest.mark.parametrize(
    'kinds', [('conditional', 'detr'), ('detr', 'conditional')]
)
def test_one_softmax_is_compared_with_sigmoids_by_chances(kinds):
    model = detector('dab')
    soft = answers(step_of(*[detector('detr')] * 2).student)
    sharp = answers(step_of(model, model).student)
    alike = soft.chances.clamp(1e-6, 1 - 1e-6).logit()
    sharp = type(sharp)(alike, soft.boxes, soft.states, False)
    pair = (sharp, soft) if kinds[1] == 'detr' else (soft, sharp)
    for value in answer_distances(*pair, torch.ones(2, 12)).values():
        assert value.abs() < 1e-4


# Correspondence --------------------------------------------------------------


def test_the_order_of_queries_changes_nothing(pair, step):
    student, teacher = pair
    plain = said(step)
    turned = permuted(teacher, torch.randperm(15))
    for key, value in said(step_of(student, turned)).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-5)
    turned = permuted(student, torch.randperm(12))
    for key, value in said(step_of(turned, teacher)).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-5)


def test_general_queries_are_not_seen_by_specific_ones(step):
    both, alone = said(step), said(step, general=0)
    assert {*alone} == {key for key in both if key.startswith('specific')}
    for key, value in alone.items():
        assert torch.equal(value, both[key])


def test_general_queries_alone(step):
    both, alone = said(step), said(step, specific=False)
    assert {*alone} == {key for key in both if key.startswith('general')}
    for key, value in alone.items():
        assert torch.equal(value, both[key])


def test_general_queries_are_new_in_each_step(step):
    one, other = said(step, 0), said(step, 1)
    assert one['general_l1'] != other['general_l1']
    assert one['specific_l1'] == other['specific_l1']


def test_the_student_is_asked_as_it_trains(pair):
    """With what it drops and with denoising queries left out."""
    student = detector('ddq').train()
    found = said(step_of(student, detector('ddq', 1)))
    assert all(value.isfinite() and value > 0 for value in found.values())
    assert student.training


# Every kind ------------------------------------------------------------------


@pytest.mark.parametrize('kinds', PAIRS, ids='-from-'.join)
def test_every_kind_learns(kinds, tmp_path):
    student, teacher = (
        detrs.detr(kind, base=base, queries=queries)
        for kind, base, queries in zip(kinds, (8, 16), (12, 14))
    )
    term = dict(type='mmkd.SharedQueryTerm', teacher='big', general=7)
    model = distilled(student, teacher, term, tmp_path)
    losses = model.loss(*tiny.batch(shapes=((128, 128), (96, 64))))
    shares = {key: one for key, one in losses.items() if 'kd' in key}
    assert len(shares) == 6
    assert all(one.isfinite() and one > 0 for one in shares.values())
    sum(shares.values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    for one in model.teachers['big'].detector.parameters():
        assert one.grad is None


def test_half_precision_is_finite(pair):
    with torch.autocast('cpu', torch.bfloat16):
        found = said(step_of(*pair))
    for value in found.values():
        assert value.dtype == torch.float32
        assert value.isfinite()


# Refusals --------------------------------------------------------------------


def test_decoders_of_other_forms_are_refused(tmp_path):
    term = dict(type='mmkd.SharedQueryTerm', teacher='big')
    with pytest.raises(ValueError, match='x.*is asked in that of its teacher'):
        distilled(detrs.detr('dab'), detrs.detr('deformable'), term, tmp_path)


def test_detectors_without_queries_are_refused(tmp_path):
    term = dict(type='mmkd.SharedQueryTerm', teacher='big')
    with pytest.raises(ValueError, match='teacher, RetinaNet, has none'):
        distilled(detrs.detr('dab'), tiny.retinanet(), term, tmp_path)


def test_asking_nothing_is_refused():
    with pytest.raises(ValueError, match='Set general=300'):
        SharedQueryTerm('big', general=0, specific=False)


def test_other_classes_are_refused():
    first, other = (
        answers(step_of(*[detector('dab', classes=n)] * 2).student)
        for n in (3, 4)
    )
    with pytest.raises(ValueError, match='3 outputs.* 4'):
        answer_distances(first, other, torch.ones(2, 12))


def test_a_weight_of_nothing_is_silent():
    assert SharedQueryTerm('big', loss_weight=0.0).silent()
    assert not SharedQueryTerm('big').silent()
    assert SharedQueryTerm('big').compares_classes()

"""What papers say of vectors is said of queries that belong together."""

import copy

import detrs
import pytest
import tiny
import torch
import torch.nn.functional as F
from asking import detector, distilled, permuted, step_of
from torch import nn

from mmkd.terms.queries import answers
from mmkd.terms.query_feature import QueryFeatureTerm
from mmkd.terms.query_matching import of_layers
from mmkd.terms.query_pairs import PAIRINGS, pair_queries

MIMIC = dict(type='mmkd.MimicLoss')
LSH = dict(type='mmkd.LSHLoss', unfold=1, hash_num=9, std=0.1)
DLKD = dict(type='mmkd.DLKDLoss', hidden_ratio=1, loss_weight=0.1)
CMKD = dict(type='mmkd.CMKDLoss')
#: Detectors and what their states are wide.
KINDS = {
    **dict.fromkeys(('detr', 'dab', 'deformable', 'refine', 'ddq'), 16),
    **dict.fromkeys(('conditional', 'two_stage', 'dino'), 256),
}


def dlkd(own=16, other=16, **settings):
    return dict(DLKD, student_channels=own, teacher_channels=other, **settings)


def lsh(width=16, **settings):
    return dict(LSH, channels=width, **settings)


def term_of(loss=MIMIC, seed=0, **settings):
    torch.manual_seed(seed)
    return QueryFeatureTerm('big', copy.deepcopy(loss), **settings)


def said(step, *args, **settings):
    term = term_of(*args, **settings)
    torch.manual_seed(4)
    return term(step)


def total(found):
    if isinstance(found, dict):
        return sum(one for key, one in found.items() if 'watch' not in key)
    return found


@pytest.fixture(scope='module')
def pair():
    return detector('refine'), detector('refine', 1, queries=15, layers=3)


@pytest.fixture
def step(pair):
    return step_of(*pair)


def pairs_of(step, pairing='objects', **settings):
    torch.manual_seed(4)
    return pair_queries(
        pairing, step.student, step.teacher('big'), step.gt, **settings
    )


# What is compared ------------------------------------------------------------


def test_states_of_objects_are_compared_one_by_one(step):
    pairs = pairs_of(step)
    rows = zip(pairs.student.states[-1, :, 0], pairs.teacher.states[-1, :, 0])
    expected = [(one - other).square().mean() for one, other in rows]
    assert len(expected) == len(step.gt.labels) > 2
    torch.testing.assert_close(said(step), torch.stack(expected).mean())


def test_lsh_is_that_of_the_states_of_objects(step):
    term = term_of(lsh(loss_weight=2.0))
    found, pairs = term(step), pairs_of(step)
    own, other = pairs.student.states[-1, :, 0], pairs.teacher.states[-1, :, 0]
    planes = 0.1 * term.loss.planes[:, :, 0, 0]
    bits = (other @ planes.T > 0).float()
    expected = F.binary_cross_entropy_with_logits(own @ planes.T, bits)
    torch.testing.assert_close(found['lsh'], 2 * expected)
    torch.testing.assert_close(found['l2'], 2 * F.mse_loss(own, other))


def test_the_planes_are_as_wide_as_the_teachers_classifier(step):
    loss = {key: one for key, one in lsh().items() if key != 'std'}
    term = term_of(loss)
    term(step)
    head = step.teacher('big').detector.bbox_head
    weights = [one.weight.flatten() for one in head.cls_branches]
    torch.testing.assert_close(term.loss.std, torch.cat(weights).std())
    assert term._introduced
    step.dry = True
    dry = term_of(loss)
    dry(step)
    assert not dry._introduced


def test_dlkd_is_that_of_the_states_of_objects_and_their_views(step):
    term = term_of(dlkd(num_views=2, jitter=0.3))
    torch.manual_seed(4)
    found, pairs = term(step), pairs_of(step, views=2, jitter=0.3)
    own, other = pairs.student.states[-1], pairs.teacher.states[-1]
    assert own.shape[1] == 3
    expected = term.loss.compare_objects(own, other, step.gt.labels)
    assert {*found} == {'align', 'correlate', 'contrast'}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])
    turned = term.loss.compare_objects(own, other, step.gt.labels.flip(0) + 1)
    assert turned['align'] == found['align']


def test_logits_are_compared_image_by_image(step):
    seen = Seen()
    term = term_of(compare='logits', pairing='answers')
    term.loss = seen
    term(step)
    ((own,), (other,), gt) = seen.given
    pairs = pairs_of(step, 'answers')
    assert gt.shape == (1, 12)
    assert (gt.num_images, len(gt.boxes)) == (2, 0)
    assert own.shape == other.shape == (2, tiny.CLASSES, 1, 12)
    assert torch.equal(own[:, :, 0].mT, pairs.student.logits[-1])
    assert torch.equal(other[:, :, 0].mT, pairs.teacher.logits[-1])


def test_a_loss_sees_the_label_of_each_object(step):
    term = term_of()
    term.loss = Seen()
    term(step)
    ((own,), (other,), gt) = term.loss.given
    count = len(step.gt.labels)
    assert own.shape == other.shape == (1, 16, 1, count)
    assert torch.equal(gt.labels, step.gt.labels)
    assert gt.shape == (1, count)


class Seen(nn.Module):
    scope = 'levels'

    def forward(self, *given):
        self.given = given
        return given[0][0].sum()


@pytest.mark.parametrize('pairing', PAIRINGS)
def test_layers_are_chosen_on_either_side(step, pairing):
    found = said(step, pairing=pairing, layer=0, teacher_layer=1)
    pairs = pairs_of(step, pairing)
    expected = F.mse_loss(pairs.student.states[0], pairs.teacher.states[1])
    torch.testing.assert_close(found, expected)
    assert found != said(step, pairing=pairing)


def test_an_align_brings_other_widths_together(pair):
    student = detector('conditional')
    step = step_of(student, pair[1])
    align = dict(type='mmkd.ConvAdapt', in_channels=256, out_channels=16)
    term = term_of(align=align)
    found = term(step)
    pairs = pairs_of(step)
    (layer,) = term.align.adapts
    own = F.linear(
        pairs.student.states[-1], layer[0].weight.flatten(1), layer[0].bias
    )
    expected = F.mse_loss(own, pairs.teacher.states[-1])
    torch.testing.assert_close(found, expected)


def test_one_softmax_is_told_by_the_logits_of_its_chances():
    student, teacher = detector('detr'), detector('dab', 1)
    step = step_of(student, teacher)
    term = term_of(compare='logits', pairing='answers')
    term.loss = Seen()
    term(step)
    ((own,), (other,), _) = term.loss.given
    assert own.shape == other.shape == (2, tiny.CLASSES, 1, 12)
    chances = answers(step.student).chances[-1].sort(1).values
    torch.testing.assert_close(
        own[:, :, 0].mT.sigmoid().sort(1).values, chances
    )


# Correspondence --------------------------------------------------------------

CASES = {
    'lsh': (lsh(), dict()),
    'dlkd': (dlkd(), dict()),
    'cmkd': (CMKD, dict(compare='logits', pairing='answers')),
    'asked': (CMKD, dict(compare='logits', pairing='questions')),
}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_the_order_of_queries_changes_nothing(pair, step, case):
    student, teacher = pair
    loss, settings = case
    plain = said(step, loss, **settings)
    torch.manual_seed(0)
    for turned in (
        (student, permuted(teacher, torch.randperm(15))),
        (permuted(student, torch.randperm(12)), teacher),
    ):
        found = said(step_of(*turned), loss, **settings)
        assert {*found} == {*plain}
        for key, value in found.items():
            torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)


def test_a_detector_is_its_own_copy(pair):
    step = step_of(permuted(pair[0], torch.randperm(12)), pair[0])
    for pairing in PAIRINGS:
        assert said(step, pairing=pairing) < 1e-6
    found = said(step, CMKD, compare='logits', pairing='answers')
    assert total(found) < 1e-4
    assert found['watch_difficulty'] > 0


def test_the_teacher_counts(pair, step):
    other = step_of(pair[0], detector('refine', 2, queries=15))
    for loss, settings in CASES.values():
        plain, found = (
            total(said(one, loss, **settings)) for one in (step, other)
        )
        assert (plain - found).abs() > 1e-5


# Every kind ------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_learns(kind, tmp_path):
    student, teacher = (
        detrs.detr(kind, base=base, queries=queries)
        for base, queries in ((8, 12), (16, 14))
    )
    term = dict(
        type='mmkd.QueryFeatureTerm', teacher='big', loss=lsh(KINDS[kind])
    )
    model = distilled(student, teacher, term, tmp_path)
    model.terms['more'] = term_of(
        dict(CMKD, activation='softmax' if kind == 'detr' else 'sigmoid'),
        compare='logits',
        pairing='answers',
    )
    model.terms['more'].bind(model, dict(big=model.teachers['big']))
    losses = model.loss(*tiny.batch(shapes=((128, 128), (96, 64))))
    shares = {key: one for key, one in losses.items() if 'loss_kd' in key}
    assert len(shares) == 4
    assert all(one.isfinite() and one > 0 for one in shares.values())
    sum(shares.values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    for one in model.teachers['big'].detector.parameters():
        assert one.grad is None


def test_unlike_decoders_learn_from_each_other(tmp_path):
    term = dict(
        type='mmkd.QueryFeatureTerm', teacher='big', loss=dlkd(16, 256)
    )
    model = distilled(
        detrs.detr('dab', layers=1), detrs.detr('dino'), term, tmp_path
    )
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_x_align'] > 0
    losses['loss_kd_x_align'].backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_images_without_objects_cost_no_more_than_they_say(pair, case):
    loss, settings = case
    step = step_of(*pair, boxes=0)
    found = said(step, loss, **settings)
    assert {*found} == {*said(step_of(*pair), loss, **settings)}
    if not settings:  # of objects there are none
        assert all(one == 0 for one in found.values())
    total(found).backward()


def test_a_loss_of_one_part_is_0_without_objects(pair):
    """Also when the adapter makes something of nothing."""
    align = dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=16)
    term = term_of(align=align)
    for name, one in term.align.named_parameters():
        if name.endswith('bias'):
            nn.init.ones_(one)
    found = term(step_of(*pair, boxes=0))
    assert found == 0
    found.backward()


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_half_precision_is_finite(pair, case):
    with torch.autocast('cpu', torch.bfloat16):
        found = said(step_of(*pair), case[0], **case[1])
    for value in found.values():
        assert value.dtype == torch.float32
        assert value.isfinite()


# Refusals --------------------------------------------------------------------


def test_detectors_without_queries_are_refused(tmp_path):
    term = dict(type='mmkd.QueryFeatureTerm', teacher='big', loss=MIMIC)
    with pytest.raises(ValueError, match='teacher, RetinaNet, has none'):
        distilled(detrs.detr('dab'), tiny.retinanet(), term, tmp_path)


def test_other_widths_are_refused_while_the_model_is_built(tmp_path):
    term = dict(type='mmkd.QueryFeatureTerm', teacher='big', loss=MIMIC)
    with pytest.raises(
        ValueError, match='in_channels=16, out_channels=256.* to this term'
    ):
        distilled(detrs.detr('dab'), detrs.detr('dino'), term, tmp_path)


def test_layers_that_are_not_there_are_refused(tmp_path):
    term = dict(
        type='mmkd.QueryFeatureTerm', teacher='big', loss=MIMIC, layer=2
    )
    with pytest.raises(ValueError, match='layer=2.*has 2 layers.*at most 1'):
        distilled(detrs.detr('dab'), detrs.detr('dab'), term, tmp_path)


def test_scores_of_another_activation_are_refused(tmp_path):
    term = dict(
        type='mmkd.QueryFeatureTerm',
        teacher='big',
        loss=CMKD,
        compare='logits',
        pairing='answers',
    )
    with pytest.raises(ValueError, match="Set activation='softmax'"):
        distilled(detrs.detr('detr'), detrs.detr('detr'), term, tmp_path)


def test_a_loss_of_objects_gets_nothing_else():
    for wrong in (
        dict(compare='logits'),
        dict(pairing='answers'),
        dict(align=dict(type='mmkd.ConvAdapt', in_channels=4, out_channels=4)),
    ):
        with pytest.raises(ValueError, match='DLKDLoss the states of objects'):
            term_of(dlkd(), **wrong)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="compare 'state'"):
        term_of(compare='state')
    with pytest.raises(ValueError, match="pairing 'index'"):
        term_of(pairing='index')


def test_a_weight_of_nothing_is_silent():
    assert term_of(dict(MIMIC, loss_weight=0.0)).silent()
    assert not term_of().silent()
    assert term_of().compares_classes()


def test_classes_of_another_number_are_refused():
    student, teacher = detector('dab'), detector('dab', classes=4)
    step = step_of(student, teacher)
    own, other = (
        of_layers(answers(one), [-1])
        for one in (step.student, step.teacher('big'))
    )
    term = term_of(compare='logits')
    with pytest.raises(ValueError, match='Choose a teacher of the same class'):
        term._check_widths(own.logits[0].mT, other.logits[0].mT)

import math

import pytest
import rois
import tiny
import torch
from scipy.stats import pearsonr, spearmanr

from mmkd.losses.cmkd import CMKDLoss, class_entropy, cmkd_loss
from mmkd.structures import GroundTruth
from mmkd.taps import recording

SHAPE = (32, 48)
SIZES = ((4, 6), (2, 3))
#: So hard that soft ranks are ranks.
HARD = 1e-5


@pytest.fixture
def samples():
    torch.manual_seed(0)
    return torch.randn(2, 9, 6).unbind()


@pytest.fixture
def pyramid():
    """Two levels of two anchors and four classes."""
    torch.manual_seed(0)
    return tuple(
        tuple(torch.randn(2, 8, *size) for size in SIZES) for _ in range(2)
    )


@pytest.fixture
def gt():
    """The second image is 16 x 24 in its batch of 32 x 48."""
    return GroundTruth.from_boxes(
        [torch.tensor([[10.0, 4, 30, 16]]), torch.zeros(0, 4)],
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
    )


def by_value(student, teacher, **settings):
    """What easy samples cost."""
    count = len(student)
    return cmkd_loss(
        student, teacher, torch.zeros(count), torch.ones(count), **settings
    )[0]


def by_order(student, teacher, **settings):
    """What hard samples cost."""
    count = len(student)
    return cmkd_loss(
        student, teacher, torch.ones(count), torch.ones(count), **settings
    )[1]


def soft_ranks(values, eps):
    """Literal, of one list of numbers, standardised first."""
    mean = sum(values) / len(values)
    std = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
    scores = [(x - mean) / std for x in values]
    return [
        0.5 + sum(1 / (1 + math.exp((b - a) / eps)) for b in scores)
        for a in scores
    ]


def entropy(values, temperature=1.0):
    """Literal, of one list of logits, in shares of the largest possible."""
    odds = [math.exp(x / temperature) for x in values]
    probs = [x / sum(odds) for x in odds]
    return -sum(p * math.log(p) for p in probs) / math.log(len(values))


# The formula -----------------------------------------------------------------


def test_the_value_is_scipys_pearson(samples):
    expected = [1 - pearsonr(*pair)[0] for pair in zip(*samples)]
    value = by_value(*samples)
    assert value.item() == pytest.approx(sum(expected) / 9, rel=1e-5)


def test_the_order_becomes_scipys_spearman(samples):
    expected = [1 - spearmanr(*pair)[0] for pair in zip(*samples)]
    errors = [
        abs(by_order(*samples, rank_eps=eps).item() - sum(expected) / 9)
        for eps in (1.0, HARD)
    ]
    assert errors[1] < 1e-4 < 1e-3 < errors[0]


@pytest.mark.parametrize('eps', [0.1, 0.5])
def test_the_order_is_the_correlation_of_soft_ranks(samples, eps):
    expected = [
        1 - pearsonr(soft_ranks(one, eps), soft_ranks(other, eps))[0]
        for one, other in zip(*(side.tolist() for side in samples))
    ]
    value = by_order(*samples, rank_eps=eps)
    assert value.item() == pytest.approx(sum(expected) / 9, rel=1e-4)


@pytest.mark.parametrize('part', [by_value, by_order])
def test_equal_vectors_cost_nothing_and_reversed_ones_two(samples, part):
    _, teacher = samples
    assert part(teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    assert part(-teacher, teacher).item() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize('part', [by_value, by_order])
def test_scale_and_offset_of_each_sample_do_not_matter(samples, part):
    """A divergence of probabilities would change."""
    student, teacher = samples
    scale = torch.linspace(0.1, 5, 9)[:, None]
    offset = torch.linspace(-7, 7, 9)[:, None]
    expected = part(student, teacher)
    for pair in (
        (scale * student + offset, teacher),
        (student, scale * teacher + offset),
    ):
        torch.testing.assert_close(part(*pair), expected, rtol=1e-4, atol=1e-5)


def test_increasing_maps_keep_the_order_and_not_the_value(samples):
    student, teacher = samples
    bent = (2 * teacher).exp()
    assert by_order(bent, teacher, rank_eps=HARD) < 1e-4
    assert by_value(bent, teacher) > 0.05
    torch.testing.assert_close(
        by_order((2 * student).exp(), teacher, rank_eps=HARD),
        by_order(student, teacher, rank_eps=HARD),
        rtol=0,
        atol=1e-4,
    )


def test_both_parts_change_when_the_teacher_does(samples):
    student, teacher = samples
    for part in (by_value, by_order):
        assert (part(student, teacher.flip(1)) - part(student, teacher)) != 0


def test_a_case_worked_out_by_hand():
    """Deviations (-1, 0, 1) and (1, 0, -1) / (-1, 1, 0): r = -1 and 1/2."""
    teacher = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    student = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    value, order = cmkd_loss(
        student,
        teacher,
        torch.tensor([0.25, 0.75]),
        torch.tensor([1.0, 3.0]),
        rank_eps=HARD,
    )
    # Of the weights a quarter and three quarters; costs are 2 and 1/2.
    expected = (
        0.25 * 0.75 * 2 + 0.75 * 0.25 * 0.5,
        0.25 * 0.25 * 2 + 0.75 * 0.75 * 0.5,
    )
    assert (value.item(), order.item()) == pytest.approx(expected, rel=1e-4)


def test_the_shares_of_value_and_order_are_one(samples):
    """Where both cost the same, difficulty decides nothing."""
    _, teacher = samples
    for difficulty in (0.0, 0.3, 1.0):
        parts = cmkd_loss(
            -teacher, teacher, torch.full((9,), difficulty), torch.rand(9)
        )
        assert sum(parts).item() == pytest.approx(2, abs=1e-5)


def test_the_scale_of_the_weights_does_not_matter(samples):
    hard, weight = torch.rand(2, 9)
    for one, other in zip(
        cmkd_loss(*samples, hard, weight),
        cmkd_loss(*samples, hard, 7 * weight),
    ):
        torch.testing.assert_close(one, other)


def test_a_sample_without_weight_has_no_gradient(samples):
    student, teacher = samples
    weight = torch.ones(9)
    weight[3] = 0
    student.requires_grad_()
    sum(cmkd_loss(student, teacher, torch.full((9,), 0.5), weight)).backward()
    moved = student.grad.abs().sum(1) > 0
    assert moved.tolist() == [index != 3 for index in range(9)]


@pytest.mark.parametrize('side', [0, 1])
@pytest.mark.parametrize('height', [0.0, 0.3, -4.595])
def test_a_flat_side_is_unrelated_and_gives_no_gradient(samples, side, height):
    pair = [one.clone() for one in samples]
    pair[side] = torch.full_like(pair[side], height)
    pair[0].requires_grad_()
    for part in (by_value, by_order):
        value = part(*pair)
        value.backward()
        assert value == 1
        assert (pair[0].grad == 0).all()


def test_following_the_order_alone_brings_the_students_into_it(samples):
    """So that ranks have a gradient, which sorting has not."""
    student, teacher = (one[:1] for one in samples)
    student = student.clone().requires_grad_()
    optimiser = torch.optim.SGD([student], lr=0.3)
    for _ in range(200):
        optimiser.zero_grad()
        by_order(student, teacher, rank_eps=0.3).backward()
        optimiser.step()
    assert torch.equal(student.argsort(1), teacher.argsort(1))


def test_gradient_is_that_of_finite_differences(samples):
    student, teacher = (one[:3].double() for one in samples)
    hard, weight = torch.rand(2, 3).double()
    assert torch.autograd.gradcheck(
        lambda s: cmkd_loss(s, teacher, hard, weight, rank_eps=0.5),
        student.requires_grad_(),
    )


# Difficulty ------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_difficulty_is_the_entropy_in_shares_of_the_largest(
    samples, temperature
):
    logits = 3 * samples[0]
    expected = [entropy(row, temperature) for row in logits.tolist()]
    found = class_entropy(logits, temperature)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_one_class_alone_is_easy_and_all_alike_is_hardest():
    logits = torch.tensor([[300.0, 0, 0, 0], [5.0, 5, 5, 5], [9.0, 9, 0, 0]])
    found = class_entropy(logits)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(1)
    assert found[2].item() == pytest.approx(0.5, abs=1e-3)  # log 2 / log 4
    assert found.max() <= 1


# The module ------------------------------------------------------------------


def rows_that_count(maps):
    """Samples of four classes, image by image, without the border."""
    images = []
    for n in range(2):
        rows = []
        for one, height, width in zip(
            maps, ((4, 2), (2, 1)), ((6, 3), (3, 2))
        ):
            for y in range(height[n]):
                for x in range(width[n]):
                    cell = one[n, :, y, x].tolist()
                    rows += [cell[:4], cell[4:]]
        images.append(rows)
    return images


def literal(
    pyramid, topk, activation='sigmoid', min_score=0.0, eps=0.1, hard=None
):
    """Value, order and difficulty, anchor by anchor."""
    sums, total = [0.0, 0.0, 0.0], 0.0
    for student, teacher in zip(*(rows_that_count(side) for side in pyramid)):
        scored = []
        for one, other in zip(student, teacher):
            odds = [math.exp(x) for x in other]
            if activation == 'sigmoid':
                score = max(x / (1 + x) for x in odds)
            else:  # the last class is the background
                score = max(odds[:-1]) / sum(odds)
            scored.append((score if score > min_score else 0.0, one, other))
        for score, one, other in sorted(scored, reverse=True)[:topk]:
            d = entropy(other, 2.0) if hard is None else hard
            ranks = soft_ranks(one, eps), soft_ranks(other, eps)
            sums[0] += score * (1 - d) * (1 - pearsonr(one, other)[0])
            sums[1] += score * d * (1 - pearsonr(*ranks)[0])
            sums[2] += score * d
            total += score
    return [one / total for one in sums]


@pytest.mark.parametrize(
    'settings',
    [
        dict(topk=None),
        dict(topk=5),
        dict(topk=1, rank_eps=0.4),
        dict(topk=7, activation='softmax'),
        dict(topk=None, min_score=0.8),
        dict(topk=5, difficulty='equal'),
    ],
    ids=str,
)
def test_equals_a_literal_loop_over_images_levels_cells_and_anchors(
    pyramid, gt, settings
):
    loss = CMKDLoss(
        num_classes=4, temperature=2.0, loss_weight=3.0, **settings
    )
    value, order, hard = literal(
        pyramid,
        settings['topk'],
        settings.get('activation', 'sigmoid'),
        settings.get('min_score', 0.0),
        settings.get('rank_eps', 0.1),
        0.5 if 'difficulty' in settings else None,
    )
    parts = loss(*pyramid, gt)
    assert list(parts) == ['pearson', 'spearman', 'watch_difficulty']
    assert parts['pearson'].item() == pytest.approx(3 * value, rel=1e-4)
    assert parts['spearman'].item() == pytest.approx(3 * order, rel=1e-4)
    assert parts['watch_difficulty'].item() == pytest.approx(hard, rel=1e-4)


def test_defaults_are_those_of_the_method(pyramid, gt):
    named = CMKDLoss(
        num_classes=4,
        rank_eps=0.1,
        topk=1000,
        min_score=0.0,
        difficulty='teacher_entropy',
        temperature=1.0,
        loss_weight=2.0,
    )
    assert CMKDLoss(4)(*pyramid, gt) == named(*pyramid, gt)


def test_anchors_below_the_likeliest_get_no_gradient(pyramid, gt):
    student, teacher = pyramid
    student = tuple(one.requires_grad_() for one in student)
    parts = CMKDLoss(num_classes=4, topk=3)(student, teacher, gt)
    (parts['pearson'] + parts['spearman']).backward()
    for image in range(2):
        moved = sum(
            (one.grad[image].unflatten(0, (2, 4)).abs().sum(1) > 0).sum()
            for one in student
        )
        assert moved == 3


def test_no_anchor_above_the_least_score_costs_nothing(pyramid, gt):
    """The score itself is not above it."""
    student, teacher = pyramid
    student = tuple(one.requires_grad_() for one in student)
    teacher = tuple(-one.relu() for one in teacher)
    for one in teacher:
        one[:, ::4] = 0  # of each anchor the best class has one half
    parts = CMKDLoss(num_classes=4, min_score=0.5)(student, teacher, gt)
    sum(parts.values()).backward()
    assert [part.item() for part in parts.values()] == [0, 0, 0]
    assert all((one.grad == 0).all() for one in student)
    assert CMKDLoss(4, min_score=0.49)(student, teacher, gt)['pearson'] > 0


def test_an_easy_anchor_is_matched_by_value_and_a_hard_one_by_order(gt):
    """The teacher's entropy decides, not the student's."""
    student = torch.randn(2, 4, 4, 6)
    certain = torch.tensor([40.0, 0.0, 1.0, 2.0]).view(1, 4, 1, 1)
    unsure = 1e-2 * certain
    for teacher, cheap, dear in (
        (certain, 'spearman', 'pearson'),
        (unsure, 'pearson', 'spearman'),
    ):
        parts = CMKDLoss()((student,), (teacher.expand_as(student),), gt)
        assert parts[cheap] < 0.02 * parts[dear]


def test_padding_and_ignored_boxes_count_on_demand(pyramid):
    student, teacher = pyramid
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=SHAPE,
        image_shapes=[SHAPE, (16, 24)],
        ignored=[torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)],
    )
    for name, index in (
        ('keep_padding', (1, slice(None), 3, 5)),
        ('keep_ignored', (0, slice(None), 0, 0)),
    ):
        changed = (student[0].clone(), student[1])
        changed[0][index] = -changed[0][index]
        for keep in (False, True):
            loss = CMKDLoss(4, **{name: keep})
            for part in ('pearson', 'spearman'):
                before = loss(student, teacher, gt)[part]
                after = loss(changed, teacher, gt)[part]
                assert (before == after).item() is not keep


def test_a_background_class_counts_as_a_score_on_demand(pyramid, gt):
    values = [
        CMKDLoss(4, activation='softmax', has_background=background)(
            *pyramid, gt
        )['pearson']
        for background in (False, True)
    ]
    assert values[0] != values[1]


def test_contradictions_in_half_precision_stay_finite():
    gt = GroundTruth.from_boxes([torch.zeros(0, 4)], shape=SHAPE)
    torch.manual_seed(0)
    teacher = (300 * torch.randn(1, 4, 4, 6)).half()
    for student in (teacher.clone(), -teacher, torch.full_like(teacher, -300)):
        student.requires_grad_()
        parts = CMKDLoss()((student,), (teacher,), gt)
        sum(parts.values()).backward()
        assert all(part.isfinite() for part in parts.values())
        assert student.grad.isfinite().all()


def test_settings_that_mean_nothing_are_refused(pyramid, gt):
    with pytest.raises(ValueError, match="CMKDLoss .* mean 'sigmoid'"):
        CMKDLoss(activation='sigmod')
    with pytest.raises(ValueError, match="mean 'teacher_entropy'"):
        CMKDLoss(difficulty='teachers_entropy')
    for name in ('rank_eps', 'temperature', 'topk'):
        with pytest.raises(ValueError, match=f'CMKDLoss needs {name} > 0'):
            CMKDLoss(**{name: 0})
    with pytest.raises(ValueError, match='needs min_score between 0 and 1'):
        CMKDLoss(min_score=1.5)
    with pytest.raises(ValueError, match='CMKDLoss .* num_classes=5'):
        CMKDLoss(num_classes=5)(*pyramid, gt)


@pytest.mark.parametrize('classes', [1, 2])
def test_too_few_classes_are_refused(pyramid, gt, classes):
    with pytest.raises(ValueError, match=f'at least 3 classes, got {classes}'):
        CMKDLoss(num_classes=classes)(*pyramid, gt)
    CMKDLoss(num_classes=4)(*pyramid, gt)
    three = tuple(tuple(one[:, :3] for one in side) for side in pyramid)
    CMKDLoss()(*three, gt)


# The second stage ------------------------------------------------------------


def test_a_second_stage_is_compared_on_the_students_proposals(tmp_path):
    file = tmp_path / 'teacher.pth'
    teacher = rois.faster(base=16)
    tiny.save_teacher(teacher, file)
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    term = dict(
        type='mmkd.ProposalTerm',
        teacher='big',
        decoupled=False,
        cls_loss=dict(type='mmkd.CMKDLoss', activation='softmax', topk=6),
        box_weight=1.0,
    )
    model = tiny.build(
        tiny.distilled(rois.faster(), dict(big=big), dict(x=term))
    )
    model.teachers.load()
    big = model.teachers['big'].detector
    for seed, one in enumerate((model, big)):
        rois.liven(one, seed)
    images, samples = tiny.batch()
    paths = ['roi_head.bbox_head', 'roi_head.bbox_roi_extractor']
    with recording(model, paths) as record:
        losses = model.train().loss(images, samples)
    (_, proposals), _ = record.inputs(paths[1])
    with torch.no_grad():
        maps = big.extract_feat(images)
        other = big.roi_head._bbox_forward(maps, proposals)['cls_score']
    rows = record.at(paths[0])[0], other
    logits = [one.double().tolist() for one in rows]
    scored = sorted(
        (
            max(torch.tensor(target).softmax(0)[:-1]).item(),
            index,
        )
        for index, target in enumerate(logits[1])
    )[-6:]
    value = order = 0.0
    for score, index in scored:
        one, other = (side[index] for side in logits)
        d = entropy(other)
        value += score * (1 - d) * (1 - pearsonr(one, other)[0])
        ranks = soft_ranks(one, 0.1), soft_ranks(other, 0.1)
        order += score * d * (1 - pearsonr(*ranks)[0])
    total = sum(score for score, _ in scored)
    assert losses['loss_kd_x_box'] > 0
    found = losses['loss_kd_x_cls_pearson'], losses['loss_kd_x_cls_spearman']
    assert [one.item() for one in found] == pytest.approx(
        [2 * value / total, 2 * order / total], rel=1e-3
    )
    sum(found).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0

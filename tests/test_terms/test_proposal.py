import copy
import math

import pytest
import rois
import tiny
import torch
import torch.nn.functional as F
from test_contracts import pretended, pretending
from torch import nn

from mmkd.losses.dist import dist_loss
from mmkd.losses.dkd import dkd_loss
from mmkd.losses.nkd import nkd_loss
from mmkd.taps import recording
from mmkd.terms.proposal import (
    ProposalTerm,
    decode,
    halves,
    of_class,
    row_labels,
)

BACKGROUND = tiny.CLASSES
SOFT = dict(
    type='mmkd.SoftTargetLoss', activation='softmax', weight_by='uniform'
)


@pytest.fixture
def build(tmp_path):
    def build(student=None, teacher=None, cache=0.0, **settings):
        teacher = teacher or rois.faster(base=16)
        file = tmp_path / 'teacher.pth'
        tiny.save_teacher(teacher, file)
        big = dict(
            config=dict(model=teacher), checkpoint=str(file), cache=cache
        )
        term = dict(type='mmkd.ProposalTerm', teacher='big', **settings)
        model = tiny.build(
            tiny.distilled(
                student or rois.faster(), dict(big=big), dict(x=term)
            )
        )
        model.teachers.load()
        for seed, one in enumerate((model, teacher_of(model))):
            if hasattr(one, 'roi_head'):
                rois.liven(one, seed)
        return model.train()

    return build


def teacher_of(student):
    return student.teachers['big'].detector


def shares(losses):
    return {
        name.removeprefix('loss_kd_x_'): value
        for name, value in losses.items()
        if name.startswith('loss_kd_x')
    }


# Whole detectors -------------------------------------------------------------


def staged(part, stage):
    return part[stage] if isinstance(part, nn.ModuleList) else part


def watched(student, images, samples, stage=0):
    """Losses, and what the student itself said of its proposals."""
    path = 'roi_head.{}'
    if isinstance(student.roi_head.bbox_head, nn.ModuleList):
        path = f'roi_head.{{}}.{stage}'
    paths = [path.format('bbox_roi_extractor'), path.format('bbox_head')]
    targets = f'{paths[1]}.get_targets'
    with recording(student, [*paths, targets]) as record:
        losses = student.loss(images, samples)
    (_, proposals), _ = record.inputs(paths[0])
    scores, deltas = record.at(paths[1])
    return losses, proposals, scores, deltas, record.at(targets)[0]


def corners(head, proposal, deltas, label):
    """A proposal's box by the formulas of the coder."""
    if len(deltas) > 4:
        deltas = deltas[4 * label : 4 * label + 4]
    dx, dy, dw, dh = (
        d * s for d, s in zip(deltas, head.bbox_coder.stds, strict=True)
    )
    x1, y1, x2, y2 = proposal
    width, height = x2 - x1, y2 - y1
    x, y = x1 + width * (0.5 + dx), y1 + height * (0.5 + dy)
    width, height = width * dw.exp(), height * dh.exp()
    return (
        x - width / 2,
        y - height / 2,
        x + width / 2,
        y + height / 2,
    )


def giou(one, other):
    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    inside = area(
        *(max(a, b) for a, b in zip(one[:2], other[:2])),
        *(min(a, b) for a, b in zip(one[2:], other[2:])),
    )
    around = area(
        *(min(a, b) for a, b in zip(one[:2], other[:2])),
        *(max(a, b) for a, b in zip(one[2:], other[2:])),
    )
    union = area(*one) + area(*other) - inside
    return inside / union - (around - union) / around


def literal(student, images, said, stage=0, teacher_stage=-1):
    """All parts, proposal by proposal."""
    proposals, scores, deltas, labels = said
    big = teacher_of(student)
    own = staged(student.roi_head.bbox_head, stage)
    other = staged(big.roi_head.bbox_head, teacher_stage)
    extract = staged(big.roi_head.bbox_roi_extractor, teacher_stage)
    with torch.no_grad():
        maps = big.extract_feat(images)
    sums = dict(positive=0.0, negative=0.0, box=0.0)
    counts = dict(positive=0, negative=0)
    for m, label in enumerate(labels.tolist()):
        with torch.no_grad():
            score, delta = other(extract(maps[:4], proposals[m : m + 1]))
        p, q = score[0].softmax(0), scores[m].softmax(0)
        group = 'negative' if label == BACKGROUND else 'positive'
        counts[group] += 1
        sums[group] += sum(
            p[c] * (p[c] / q[c]).log() for c in range(BACKGROUND + 1)
        )
        if group == 'positive':
            box, target = (
                corners(head, proposals[m, 1:], one, label)
                for head, one in ((own, deltas[m]), (other, delta[0]))
            )
            sums['box'] += 1 - giou(box, target)
    assert min(counts.values()) > 1
    return dict(
        positive=sums['positive'] / counts['positive'],
        negative=sums['negative'] / counts['negative'],
        box=sums['box'] / counts['positive'],
    )


@pytest.mark.parametrize(
    ('student', 'teacher', 'stages'),
    [
        (rois.faster(), rois.faster(base=16), (0, 0)),
        (rois.faster(), rois.mask(base=16), (0, 0)),
        (rois.faster(), rois.cascade(base=16), (0, 1)),
        (rois.faster(), rois.cascade(base=16, masks=True), (0, 0)),
        (rois.cascade(), rois.faster(base=16), (1, 0)),
        (rois.cascade(masks=True), rois.cascade(base=16), (0, 1)),
        (rois.mask(shared=True), rois.cascade(base=16), (0, 1)),
        (rois.faster(reg_class_agnostic=True), rois.faster(), (0, 0)),
    ],
    ids=[
        'faster-faster',
        'faster-mask',
        'faster-cascade',
        'faster-cascade-mask',
        'cascade-faster',
        'cascade-mask-cascade',
        'shared-mask-cascade',
        'agnostic-faster',
    ],
)
def test_equals_the_method_written_out(build, student, teacher, stages):
    stage, teacher_stage = stages
    model = build(
        student,
        teacher,
        positive_weight=2.0,
        negative_weight=3.0,
        box_weight=5.0,
        stage=stage,
        teacher_stage=teacher_stage,
    )
    images, samples = rois.batch(boxes=6)
    losses, *said = watched(model, images, samples, stage)
    expected = literal(model, images, said, stage, teacher_stage)
    found = shares(losses)
    factors = dict(positive=2.0, negative=3.0, box=5.0)
    assert found.keys() == factors.keys()
    for name, value in found.items():
        assert value > 0.01
        torch.testing.assert_close(
            value, factors[name] * expected[name], rtol=1e-3, atol=1e-5
        )


def test_the_last_stage_of_a_teacher_and_the_first_of_a_student(build):
    settings = dict(student=rois.cascade(), teacher=rois.cascade(base=16))
    images, samples = tiny.batch()
    found = []
    for stages in ({}, dict(stage=0, teacher_stage=1), dict(stage=-2)):
        model = build(**settings, **stages)
        torch.manual_seed(0)
        found.append(shares(model.loss(images, samples)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize('kind', [rois.faster, rois.cascade])
def test_a_student_that_is_the_teacher_costs_nothing(build, kind):
    model = build(kind(), kind(), box_weight=1.0, teacher_stage=0)
    model.load_state_dict(teacher_of(model).state_dict(), strict=False)
    model.eval()
    for value in shares(model.loss(*tiny.batch())).values():
        assert value.abs() < 1e-5


def test_the_teacher_sees_the_students_proposals_and_its_own_maps(build):
    model = build(teacher=rois.cascade(base=16))
    big = teacher_of(model).requires_grad_(True)
    images, samples = tiny.batch()
    with recording(big, ['roi_head._bbox_forward']) as record:
        _, proposals, *_ = watched(model, images, samples)
        (stage, maps, seen), _ = record.inputs('roi_head._bbox_forward')
        outputs = record.at('roi_head._bbox_forward')
    assert stage == 1
    assert torch.equal(seen, proposals)
    assert all(map(torch.equal, maps, big.extract_feat(images)))
    assert not outputs['cls_score'].requires_grad
    assert not any(one.training for one in big.modules())


def test_a_teacher_with_a_wider_border_sees_the_same_pixels(build):
    teacher = rois.faster(base=16)
    teacher['data_preprocessor'] = dict(tiny.PIXELS, pad_size_divisor=96)
    model = build(teacher=teacher, box_weight=1.0)
    images, samples = tiny.batch(boxes=6)
    losses, *said = watched(model, images, samples)
    expected = literal(model, F.pad(images, (0, 64, 0, 64)), said)
    for name, value in shares(losses).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_a_teacher_that_remembers_says_the_same(build):
    images, samples = tiny.batch()
    found = []
    for cache in (0.0, 0.1):
        model = build(cache=cache, box_weight=1.0)
        for _ in range(2):
            torch.manual_seed(0)
            found.append(shares(model.eval().loss(images, samples)))
    for one in found[1:]:
        for name, value in one.items():
            torch.testing.assert_close(value, found[0][name])


def test_a_teacher_without_a_neck(build):
    """Its second stage reads the backbone's map."""
    teacher = rois.faster(base=16)
    del teacher['neck']
    teacher['backbone'].update(out_indices=(2,))
    teacher['rpn_head'].update(in_channels=64)
    teacher['rpn_head']['anchor_generator'].update(strides=[16])
    roi_head = teacher['roi_head']
    roi_head['bbox_roi_extractor'].update(
        out_channels=64, featmap_strides=[16]
    )
    roi_head['bbox_head'].update(in_channels=64)
    model = build(teacher=teacher)
    images, samples = tiny.batch(boxes=6)
    losses, *said = watched(model, images, samples)
    expected = literal(model, images, said)
    for name, value in shares(losses).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_each_part_reaches_the_students_backbone_and_not_the_teacher(build):
    model = build(box_weight=1.0)
    found = shares(model.loss(*tiny.batch()))
    assert found.keys() == {'positive', 'negative', 'box'}
    for value in found.values():
        model.zero_grad()
        value.backward(retain_graph=True)
        for module in (model.backbone.layer3, model.roi_head.bbox_head):
            assert any(
                one.grad is not None and one.grad.abs().sum() > 0
                for one in module.parameters()
            )
    assert all(one.grad is None for one in teacher_of(model).parameters())


def test_the_students_own_losses_stay_as_they_were(build):
    model = build(box_weight=1.0)
    plain = tiny.build(rois.faster()).train()
    plain.load_state_dict(model.state_dict(), strict=False)
    images, samples = tiny.batch()
    torch.manual_seed(0)
    losses = model.loss(images, copy.deepcopy(samples))
    torch.manual_seed(0)
    for name, value in plain.loss(images, samples).items():
        for one, other in zip(
            value if isinstance(value, list) else [value],
            losses[name] if isinstance(value, list) else [losses[name]],
        ):
            assert torch.equal(one, other)


def test_images_without_boxes_have_no_positive_proposals(build):
    model = build(box_weight=1.0)
    losses = model.loss(*tiny.batch(boxes=0))
    found = shares(losses)
    assert found['positive'] == found['box'] == 0
    assert found['negative'] > 0
    tiny.total(losses).backward()
    assert model.backbone.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    'teacher', [rois.faster(base=16), rois.cascade(base=16)]
)
def test_no_proposals_at_all(build, teacher):
    student = rois.faster()
    student['train_cfg']['rpn_proposal']['min_bbox_size'] = 10_000
    model = build(student, teacher, box_weight=1.0)
    losses = model.loss(*tiny.batch(boxes=0))
    found = shares(losses)
    assert found.keys() == {'positive', 'negative', 'box'}
    assert all(value == 0 for value in found.values())
    tiny.total(losses).backward()
    assert model.backbone.conv1.weight.grad.isfinite().all()


def test_a_cascade_that_stops_before_the_stage(build):
    model = build(rois.cascade(), stage=1, box_weight=1.0)
    model.roi_head.bbox_head[0].refine_bboxes = lambda *_: None
    losses = model.loss(*tiny.batch())
    assert 's1.loss_cls' not in losses
    assert losses['loss_kd_x'] == 0
    tiny.total(losses).backward()


def test_half_precision_is_finite_and_computed_in_float32(build):
    model = build(box_weight=1.0)
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(*tiny.batch())
    for value in shares(losses).values():
        assert value.dtype == torch.float32
        assert value.isfinite()
    tiny.total(losses).backward()


# One group of proposals ------------------------------------------------------


class Sampled:
    def __init__(self, positive, negative):
        self.pos_priors = torch.zeros(positive, 4)
        self.neg_priors = torch.zeros(negative, 4)


class Head:
    num_classes, reg_class_agnostic = BACKGROUND, False

    class bbox_coder:  # noqa: N801
        @staticmethod
        def decode(boxes, deltas):
            return boxes + deltas


class Said:
    """What a student's loss was given, and what a teacher says of it."""

    images = torch.zeros(1, 3, 8, 8)

    def __init__(self, sizes, seed=0):
        torch.manual_seed(seed)
        count = sum(map(sum, sizes))
        self.sizes = sizes
        boxes = torch.rand(count, 2) * 20
        boxes = torch.cat([boxes, boxes + 20 + 9 * torch.rand(count, 2)], 1)
        self.rois = torch.cat([torch.zeros(count, 1), boxes], 1)
        self.scores = torch.randn(2, count, BACKGROUND + 1)
        self.boxes = 4 * torch.randn(2, count, 4 * BACKGROUND)
        self.labels = torch.cat(
            [
                one
                for positive, negative in sizes
                for one in (
                    torch.randint(BACKGROUND, (positive,)),
                    torch.full((negative,), BACKGROUND),
                )
            ]
        )

    @property
    def student(self):
        return self

    def has(self, path):
        return True

    def inputs(self, path):
        return (), dict(
            rois=self.rois,
            cls_score=self.scores[0],
            bbox_pred=self.boxes[0],
            sampling_results=[Sampled(*one) for one in self.sizes],
        )

    def at(self, path):
        return dict(bbox_targets=(self.labels, None), loss_bbox={})

    def reorder(self, order, sizes):
        other = copy.copy(self)
        other.sizes = sizes
        other.rois, other.labels = self.rois[order], self.labels[order]
        other.scores = self.scores[:, order]
        other.boxes = self.boxes[:, order]
        return other

    def share(self, **settings):
        term = ProposalTerm('big', **settings)
        term.path = 'a'
        term.pair = lambda step: (Head, Head)
        term.judge = lambda step, rois: dict(
            cls_score=self.scores[1], bbox_pred=self.boxes[1]
        )
        return term(self)


def test_a_case_worked_out_by_hand():
    """Two classes and the background, one proposal of each kind."""
    said = Said([(1, 2)])
    said.scores = torch.zeros(2, 3, BACKGROUND + 1)
    third, tiny_one = math.log(3.0), -200.0
    # Certain of one class against a student without an opinion: log 4.
    said.scores[1, 0] = torch.tensor([0.0, tiny_one, tiny_one, tiny_one])
    # (3/6, 1/6, 1/6, 1/6) against quarters.
    said.scores[1, 1] = torch.tensor([third, 0, 0, 0])
    found = said.share(positive_weight=2.0, negative_weight=3.0)
    negative = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert found['positive'].item() == pytest.approx(2 * math.log(4))
    assert found['negative'].item() == pytest.approx(3 * negative / 2)


def test_each_group_is_divided_by_its_own_number():
    """Twice as many negative proposals change neither share."""
    said = Said([(2, 3), (1, 4)])
    order = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 6, 7, 8, 9]
    more = said.reorder(order, [(2, 6), (1, 8)])
    one, other = (x.share(box_weight=1.0) for x in (said, more))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)


def test_the_order_of_proposals_does_not_matter():
    said = Said([(2, 3), (1, 4)])
    other = said.reorder([5, 1, 9, 4, 7, 0, 2, 8, 6, 3], [(2, 3), (1, 4)])
    found = other.share(box_weight=1.0)
    for name, value in said.share(box_weight=1.0).items():
        torch.testing.assert_close(found[name], value)


def test_one_group_of_all():
    said = Said([(2, 3), (1, 4)])
    parts = said.share(positive_weight=1.0, negative_weight=1.0)
    together = said.share(decoupled=False, positive_weight=7.0)
    expected = (3 * parts['positive'] + 7 * parts['negative']) / 10
    assert together.keys() == {'cls'}
    torch.testing.assert_close(together['cls'], expected)


def test_the_temperature_is_the_losses():
    said = Said([(2, 3)])
    found = said.share(cls_loss=dict(SOFT, temperature=4.0))
    student, teacher = said.scores[:, :2] / 4
    expected = 16 * F.kl_div(
        student.log_softmax(1), teacher.softmax(1), reduction='batchmean'
    )
    torch.testing.assert_close(found['positive'], expected)


def test_dkd_takes_the_label_for_the_target_and_background_for_a_class():
    said = Said([(2, 3), (1, 4)])
    found = said.share(
        cls_loss=dict(type='mmkd.DKDLoss', other_weight=0.25), decoupled=False
    )
    target, others = dkd_loss(*said.scores, said.labels)
    assert found.keys() == {'cls_target', 'cls_others'}
    torch.testing.assert_close(found['cls_target'], target)
    torch.testing.assert_close(found['cls_others'], 0.25 * others)


@pytest.mark.parametrize('weight', [1.0, 3.0])
def test_nkd_of_each_group(weight):
    said = Said([(2, 3), (1, 4)])
    found = said.share(
        cls_loss=dict(type='mmkd.NKDLoss', other_weight=1.0),
        positive_weight=weight,
    )
    for name, factor, rows in (
        ('positive', weight, [0, 1, 5]),
        ('negative', 1.0, [2, 3, 4, 6, 7, 8, 9]),
    ):
        target, others = nkd_loss(*said.scores[:, rows], said.labels[rows])
        torch.testing.assert_close(found[f'{name}_target'], factor * target)
        torch.testing.assert_close(found[f'{name}_others'], factor * others)


def test_dist_relates_the_proposals_of_a_group():
    said = Said([(2, 3), (1, 4)])
    found = said.share(
        cls_loss=dict(
            type='mmkd.DISTLoss', activation='softmax', weight_by='uniform'
        )
    )
    rows = [2, 3, 4, 6, 7, 8, 9]
    inter, intra = dist_loss(
        *said.scores[:, rows], torch.ones(7), activation='softmax'
    )
    torch.testing.assert_close(found['negative_inter'], inter)
    torch.testing.assert_close(found['negative_intra'], intra)


@pytest.mark.parametrize(
    'loss', ['SoftTargetLoss', 'DISTLoss', 'DKDLoss', 'NKDLoss', 'CMKDLoss']
)
def test_an_empty_group_costs_nothing_under_the_same_names(loss):
    for sizes, empty in (
        ([(0, 3)], 'positive'),
        ([(2, 0)], 'negative'),
        ([(0, 0)], 'positive'),
    ):
        cls_loss = dict(type=f'mmkd.{loss}')
        full = Said([(2, 3)]).share(cls_loss=cls_loss, box_weight=1.0)
        said = Said(sizes)
        said.scores.requires_grad_()
        said.boxes.requires_grad_()
        found = said.share(cls_loss=cls_loss, box_weight=1.0)
        assert found.keys() == full.keys()
        for name, value in found.items():
            assert value.isfinite()
            assert value == 0 or not name.startswith(empty)
        sum(found.values()).backward()
        assert said.scores.grad.isfinite().all()
        assert said.boxes.grad.isfinite().all()


class Level(nn.Module):
    """A loss of one map, with something to watch and a weight to learn."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, gt=None):
        assert student.shape[:3] == (1, BACKGROUND + 1, 1)
        return dict(
            gap=self.scale * (student - teacher).abs().mean(),
            watch_labels=gt.labels.float().mean(),
        )


def test_a_loss_of_single_maps_and_what_it_watches():
    said = Said([(2, 3)])
    found = said.share(cls_loss=dict(type=Level), positive_weight=2.0)
    gap = (said.scores[0, :2] - said.scores[1, :2]).abs().mean()
    torch.testing.assert_close(found['positive_gap'], 2 * gap)
    assert found['watch_positive_labels'] == said.labels[:2].float().mean()
    assert found['watch_negative_labels'] == BACKGROUND
    assert len(found) == 4


def test_weights_of_a_loss_are_part_of_every_step():
    said = Said([(0, 0)])
    term = ProposalTerm('big', cls_loss=dict(type=Level))
    assert [name for name, _ in term.named_parameters()] == ['loss.scale']
    term.path, term.pair = 'a', lambda step: (Head, Head)
    term.judge = lambda step, rois: dict(cls_score=said.scores[1])
    parts = term(said)
    (parts['positive_gap'] + parts['negative_gap']).backward()
    assert term.loss.scale.grad == 0


def test_boxes_alone():
    said = Said([(2, 3), (1, 4)])
    said.scores = said.scores[:, :, :2]  # not looked at
    found = said.share(cls_loss=None, box_weight=2.0)
    rows = torch.tensor([0, 1, 5])
    total = 0.0
    for row in rows.tolist():
        label, roi = said.labels[row], said.rois[row, 1:]
        boxes = (
            roi + one[row].view(BACKGROUND, 4)[label] for one in said.boxes
        )
        total += 1 - giou(*(tuple(box) for box in boxes))
    assert found.keys() == {'box'}
    torch.testing.assert_close(found['box'], 2 * total / 3)


def test_boxes_far_apart_cost_more_than_one_and_pull():
    said = Said([(1, 0)])
    said.boxes = torch.zeros(2, 1, 4 * BACKGROUND)
    said.boxes[1] += 1000
    said.boxes.requires_grad_()
    said.rois.requires_grad_()  # where proposals are is not learnt from it
    (found,) = said.share(cls_loss=None, box_weight=1.0).values()
    assert 1 < found < 2
    found.backward()
    label = said.labels[0]
    grad = said.boxes.grad[0, 0].view(BACKGROUND, 4)
    assert (grad[label, 2:] < 0).all()
    assert grad.count_nonzero() <= 4
    assert said.rois.grad is None


def test_scores_of_other_things_than_classes_are_refused():
    said = Said([(1, 2)])
    said.scores = torch.zeros(2, 3, BACKGROUND + 2)
    with pytest.raises(
        ValueError, match=r'3 classes and the background, got 5 .* and 5'
    ):
        said.share()


@pretending
def test_nothing_is_read_back_from_the_device():
    sizes = [(2, 3), (0, 4)]
    with pretended():
        said = Said(sizes)
        for name in ('scores', 'boxes', 'rois', 'labels'):
            one = getattr(said, name)
            setattr(said, name, torch.empty_like(one, device='cuda'))
        for loss in ('SoftTargetLoss', 'DKDLoss'):
            found = said.share(
                cls_loss=dict(type=f'mmkd.{loss}'), box_weight=1.0
            )
            assert all(one.device.type == 'cuda' for one in found.values())


# Pieces ----------------------------------------------------------------------


def test_positive_proposals_come_first_in_each_image():
    """As mmdet lays them out; the labels say so."""
    model = tiny.build(rois.faster()).train()
    path = 'roi_head.bbox_head.loss_and_target'
    with recording(model, [path]) as record:
        model.loss(*tiny.batch(boxes=6))
    _, given = record.inputs(path)
    labels = record.at(path)['bbox_targets'][0]
    sizes = []
    for one in given['sampling_results']:
        sizes += [len(one.pos_priors), len(one.neg_priors)]
    positive, negative = halves(labels, sizes)
    assert len(positive) > 1
    assert (positive < BACKGROUND).all()
    assert (negative == BACKGROUND).all()


@pytest.mark.parametrize('count', [1, 3, 20_011])
def test_every_proposal_has_the_cell_of_its_place(count):
    """In long rows too, where float32 rounds products of places."""
    gt = row_labels(torch.arange(count))
    size = gt.shape
    assert size == (1, count)
    assert gt.num_images == 1
    cells = gt.boxes * count / size[1]
    assert torch.equal(cells[:, 0].floor(), torch.arange(count).float())
    assert torch.equal(cells[:, 2].ceil(), torch.arange(1, count + 1).float())
    assert (gt.boxes[:, 1] < gt.boxes[:, 3]).all()


def test_what_is_said_for_the_class_of_each_row():
    values = torch.arange(24).view(2, 3, 4)
    labels = torch.tensor([2, 0])
    assert torch.equal(
        of_class(values, labels, False),
        torch.stack([values[0, 2], values[1, 0]]),
    )
    assert torch.equal(of_class(values[:, 1:2], labels, True), values[:, 1])


def test_a_box_of_its_class_by_the_coder_of_its_head():
    head = tiny.build(rois.faster()).roi_head.bbox_head
    proposal = torch.tensor([[1.0, 0, 0, 40, 20]])
    deltas = torch.zeros(1, 4 * BACKGROUND)
    deltas[0, 4:8] = torch.tensor([0.5, 0, math.log(2), 0])
    box = decode(head, proposal, deltas, torch.tensor([1]))
    torch.testing.assert_close(box, torch.tensor([[0.0, 0, 80, 20]]))
    other = decode(head, proposal, deltas, torch.tensor([2]))
    torch.testing.assert_close(other, proposal[:, 1:])


def test_half_precision_of_a_head_is_decoded_in_float32():
    head = tiny.build(rois.faster()).roi_head.bbox_head
    torch.manual_seed(0)
    proposal = torch.tensor([[0.0, 0, 0, 700, 300]])
    deltas = torch.randn(1, 4 * BACKGROUND).bfloat16()
    label = torch.tensor([1])
    assert torch.equal(
        decode(head, proposal, deltas, label),
        decode(head, proposal, deltas.float(), label),
    )


# Errors ----------------------------------------------------------------------


def test_detectors_without_a_second_stage(build):
    with pytest.raises(
        ValueError, match=r'student \(Dist\w+\) has no roi_head.bbox_head'
    ):
        build(student=tiny.retinanet())
    with pytest.raises(
        ValueError, match=r'teacher \(RetinaNet\) has no roi_head.bbox_head'
    ):
        build(teacher=tiny.retinanet())


def test_other_classes(build):
    other = tiny.faster_rcnn(classes=5)
    with pytest.raises(ValueError, match=r"has 3 classes and the teacher's 5"):
        build(teacher=other)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(stage=1), 'stage=1, but that detector has 1 stage, 0 to 0'),
        (dict(stage=-2), 'stage=-2, but that detector has 1 stage,'),
        (dict(teacher_stage=2), 'teacher_stage=2, .* has 2 stages, 0 to 1'),
        (dict(teacher_stage=-3), 'teacher_stage=-3, but'),
    ],
)
def test_a_stage_that_is_not_there(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(teacher=rois.cascade(base=16), **settings)


def test_strides_are_those_of_the_teachers_stage(build):
    teacher = rois.cascade(base=16)
    extractor = teacher['roi_head']['bbox_roi_extractor']
    wrong = dict(extractor, featmap_strides=[8, 16, 32, 64])
    teacher['roi_head']['bbox_roi_extractor'] = [wrong, extractor]
    build(teacher=teacher, teacher_stage=1)
    with pytest.raises(ValueError, match='Set featmap_strides'):
        build(teacher=teacher, teacher_stage=0)


@pytest.mark.parametrize('strides', [[8, 16, 32, 64], [4, 8, 16, 32, 32]])
def test_a_teacher_whose_head_expects_other_strides(build, strides):
    teacher = rois.faster(base=16)
    extractor = teacher['roi_head']['bbox_roi_extractor']
    extractor['featmap_strides'] = strides
    with pytest.raises(
        ValueError, match=r'maps of strides \[.*Set featmap_strides'
    ):
        build(teacher=teacher)


def test_a_teacher_whose_head_expects_more_maps(build):
    teacher = rois.faster(base=16)
    teacher['neck']['num_outs'] = 4
    teacher['rpn_head']['anchor_generator']['strides'] = [4, 8, 16, 32]
    extractor = teacher['roi_head']['bbox_roi_extractor']
    extractor['featmap_strides'] = [4, 8, 16, 32, 64]
    with pytest.raises(ValueError, match='Set featmap_strides'):
        build(teacher=teacher)


def test_a_head_that_needs_more_than_proposals(build):
    teacher = rois.cascade(base=16)
    teacher['roi_head'].update(type='HybridTaskCascadeRoIHead')
    with pytest.raises(
        ValueError, match=r'HybridTaskCascadeRoIHead also needs semantic_feat'
    ):
        build(teacher=teacher)


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_a_head_with_outputs_besides_classes(build, side):
    """SeesawLoss adds two, which tell objects from background."""
    loss = dict(type='SeesawLoss', p=0.8, q=2.0, num_classes=tiny.CLASSES)
    model = rois.faster(loss_cls=loss)
    with pytest.raises(ValueError, match=rf'the {side} has .*SeesawLoss'):
        build(**{side: model})


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_a_head_of_several_objects_a_proposal(build, side):
    model = rois.faster(type='MultiInstanceBBoxHead', num_instance=2)
    with pytest.raises(ValueError, match=rf'the {side} has a Multi.*finds 2'):
        build(**{side: model})


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_a_head_without_boxes(build, side):
    model = rois.faster(with_reg=False)
    with pytest.raises(ValueError, match=rf'the {side} has a .*box_weight=0'):
        build(**{side: model}, box_weight=1.0)
    losses = build(**{side: model}).loss(*tiny.batch())
    assert shares(losses).keys() == {'positive', 'negative'}


def test_a_misspelt_teacher(build):
    with pytest.raises(ValueError, match="teacher 'bigg'"):
        term = ProposalTerm('bigg')
        term.bind(tiny.build(rois.faster()), dict(big=None))


@pytest.mark.parametrize(
    ('settings', 'silent'),
    [
        (dict(), False),
        (dict(positive_weight=0.0), False),
        (dict(positive_weight=0.0, negative_weight=0.0), True),
        (dict(cls_loss=None), True),
        (dict(cls_loss=None, box_weight=1.0), False),
        (dict(positive_weight=0, negative_weight=0, decoupled=False), False),
    ],
)
def test_a_term_without_weights_is_silent(settings, silent):
    assert ProposalTerm('big', **settings).silent() == silent


def test_classes_must_mean_the_same(build):
    term = build().terms['x']
    assert term.compares_classes()
    assert term.teacher_names == ['big']


def test_a_schedule():
    term = ProposalTerm(
        'big', schedule=dict(type='mmkd.StopAfter', fraction=0.5)
    )
    assert [term.schedule(0.25), term.schedule(0.75)] == [1, 0]


# The first stage -------------------------------------------------------------


@pytest.mark.parametrize('loss', ['SoftTargetLoss', 'BCKDClassLoss'])
def test_scores_of_the_first_stage_are_a_plain_feature_term(tmp_path, loss):
    """One class and a sigmoid: objects against the background."""
    teacher = rois.faster(base=16)
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='rpn_head',
        output=0,
        levels=(0, 1, 2, 3, 4),
        loss=dict(type=f'mmkd.{loss}', num_classes=1),
    )
    model = tiny.build(
        tiny.distilled(rois.faster(), dict(big=big), dict(x=term))
    )
    model.teachers.load()
    for seed, one in enumerate((model, teacher_of(model))):
        torch.manual_seed(seed)
        nn.init.normal_(one.rpn_head.rpn_cls.weight, std=0.5)
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    losses = model.train().loss(images, samples)
    with torch.no_grad():
        scores = [
            torch.cat([one.flatten() for one in side.rpn_head(maps)[0]])
            for side, maps in (
                (model, model.extract_feat(images)),
                (teacher_of(model), teacher_of(model).extract_feat(images)),
            )
        ]
    s, t = (one.sigmoid() for one in scores)
    entropy = -t * s.log() - (1 - t) * (1 - s).log()
    if loss == 'SoftTargetLoss':
        own = -t * t.log() - (1 - t) * (1 - t).log()
        expected = (t * (entropy - own)).sum() / t.sum()
    else:
        expected = ((s - t).abs() * entropy).sum() / t.sum()
    torch.testing.assert_close(
        losses['loss_kd_x'], expected, rtol=1e-3, atol=1e-6
    )
    losses['loss_kd_x'].backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(one.grad is None for one in teacher_of(model).parameters())

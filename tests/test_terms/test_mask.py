import copy

import pytest
import rois
import tiny
import torch
import torch.nn.functional as F
from test_contracts import pretended, pretending
from torch import nn

from mmkd.taps import recording
from mmkd.terms.mask import MaskTerm


@pytest.fixture
def build(tmp_path):
    def build(student=None, teacher=None, **settings):
        teacher = teacher or rois.mask(base=16)
        file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        term = dict(type='mmkd.MaskTerm', teacher='big', **settings)
        model = tiny.build(
            tiny.distilled(student or rois.mask(), dict(big=big), dict(x=term))
        )
        model.teachers.load()
        for seed, one in enumerate((model, teacher_of(model))):
            rois.liven(one, seed)
        return model.train()

    return build


def teacher_of(student):
    return student.teachers['big'].detector


# Whole detectors -------------------------------------------------------------


def staged(part, stage):
    return part[stage] if isinstance(part, nn.ModuleList) else part


def watched(student, images, samples, stage=0):
    """Losses, and the masks, RoIs and labels that the student's loss saw."""
    cascade = isinstance(student.roi_head.mask_head, nn.ModuleList)
    end = f'.{stage}' if cascade else ''
    masks, boxes = f'roi_head.mask_head{end}', f'roi_head.bbox_head{end}'
    with recording(student, [masks, f'{boxes}.get_targets']) as record:
        losses = student.loss(images, samples)
    path = f'{boxes}.get_targets'
    sampled = record.inputs(path)[0][0]
    labels = record.at(path)[0]
    labels = labels[labels < tiny.CLASSES]
    proposals = torch.cat(
        [
            F.pad(one.pos_priors, (1, 0), value=image)
            for image, one in enumerate(sampled)
        ]
    )
    return losses, proposals, labels, record.at(masks)


def literal(student, images, said, stage=0, teacher_stage=-1, temperature=1):
    """RoI by RoI and cell by cell."""
    proposals, labels, masks = said
    big = teacher_of(student).roi_head
    own = staged(student.roi_head.mask_head, stage)
    other = staged(big.mask_head, teacher_stage)
    extract = staged(big.mask_roi_extractor, teacher_stage)
    with torch.no_grad():
        maps = teacher_of(student).extract_feat(images)
    assert len(masks) == len(labels) == len(proposals) > 2
    total = 0.0
    for m, label in enumerate(labels.tolist()):
        with torch.no_grad():
            target = other(extract(maps[:4], proposals[m : m + 1]))[0]
        target = target[0 if other.class_agnostic else label]
        mask = masks[m, 0 if own.class_agnostic else label]
        q = (mask / temperature).sigmoid()
        p = (target / temperature).sigmoid()
        cells = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        total += temperature**2 * cells.mean()
    return total / len(labels)


@pytest.mark.parametrize(
    ('student', 'teacher', 'stages'),
    [
        (rois.mask(), rois.mask(base=16), (0, 0)),
        (rois.mask(shared=True), rois.mask(base=16), (0, 0)),
        (rois.mask(), rois.mask(base=16, shared=True), (0, 0)),
        (rois.mask(), rois.cascade(base=16, masks=True), (0, 1)),
        (rois.cascade(masks=True), rois.mask(base=16), (1, 0)),
        (rois.mask(class_agnostic=True), rois.mask(base=16), (0, 0)),
        (rois.mask(), rois.mask(base=16, class_agnostic=True), (0, 0)),
    ],
    ids=[
        'own-own',
        'shared-own',
        'own-shared',
        'own-cascade',
        'cascade-own',
        'agnostic-own',
        'own-agnostic',
    ],
)
@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_equals_the_method_written_out(
    build, student, teacher, stages, temperature
):
    stage, teacher_stage = stages
    model = build(
        student,
        teacher,
        loss_weight=2.0,
        temperature=temperature,
        stage=stage,
        teacher_stage=teacher_stage,
    )
    images, samples = rois.batch(boxes=6)
    losses, *said = watched(model, images, samples, stage)
    expected = literal(model, images, said, stage, teacher_stage, temperature)
    assert expected > 0.01
    torch.testing.assert_close(
        losses['loss_kd_x'], 2 * expected, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize('kind', [rois.mask, lambda: rois.cascade(masks=True)])
def test_a_student_that_is_the_teacher_costs_nothing(build, kind):
    model = build(kind(), kind(), teacher_stage=0)
    model.load_state_dict(teacher_of(model).state_dict(), strict=False)
    losses = model.eval().loss(*rois.batch())
    assert losses['loss_kd_x'].abs() < 1e-6


def test_the_teacher_sees_the_students_positive_proposals(build):
    model = build(teacher=rois.cascade(base=16, masks=True))
    big = teacher_of(model).requires_grad_(True)
    images, samples = rois.batch()
    with recording(big, ['roi_head._mask_forward']) as record:
        _, proposals, *_ = watched(model, images, samples)
        (stage, maps, seen), _ = record.inputs('roi_head._mask_forward')
        outputs = record.at('roi_head._mask_forward')
    assert stage == 1
    assert torch.equal(seen, proposals)
    assert all(map(torch.equal, maps, big.extract_feat(images)))
    assert not outputs['mask_preds'].requires_grad
    assert not any(one.training for one in big.modules())


def test_it_reaches_the_students_backbone_and_not_the_teacher(build):
    model = build()
    model.loss(*rois.batch())['loss_kd_x'].backward()
    for module in (model.backbone.layer3, model.roi_head.mask_head):
        assert all(
            one.grad is not None and one.grad.isfinite().all()
            for one in module.parameters()
        )
        assert any(one.grad.abs().sum() > 0 for one in module.parameters())
    assert all(one.grad is None for one in teacher_of(model).parameters())


def test_images_without_boxes(build):
    model = build()
    losses = model.loss(*rois.batch(boxes=0))
    assert losses['loss_kd_x'] == 0
    tiny.total(losses).backward()
    assert model.backbone.conv1.weight.grad.isfinite().all()


def test_no_proposals_and_masks_of_another_size(build):
    student = rois.mask()
    student['train_cfg']['rpn_proposal']['min_bbox_size'] = 10_000
    model = build(student, rois.mask(base=16, size=10))
    losses = model.loss(*rois.batch(boxes=0))
    assert losses['loss_kd_x'] == 0
    tiny.total(losses).backward()


def test_a_cascade_that_stops_before_the_stage(build):
    model = build(rois.cascade(masks=True), stage=1)
    model.roi_head.bbox_head[0].refine_bboxes = lambda *_: None
    losses = model.loss(*rois.batch())
    assert 's1.loss_mask' not in losses
    assert losses['loss_kd_x'] == 0
    tiny.total(losses).backward()


def test_half_precision_is_finite_and_computed_in_float32(build):
    model = build()
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(*rois.batch())
    assert losses['loss_kd_x'].dtype == torch.float32
    assert losses['loss_kd_x'].isfinite()


# Masks of a few RoIs ---------------------------------------------------------


class Sampled:
    def __init__(self, labels):
        self.pos_gt_labels = labels
        self.pos_priors = torch.zeros(len(labels), 4, device=labels.device)


class Head:
    class_agnostic = False


class Said:
    """What a student's mask loss was given, and a teacher's masks."""

    images = torch.zeros(1, 3, 8, 8)

    def __init__(self, student, teacher, labels):
        self.masks, self.labels = (student, teacher), labels

    @property
    def student(self):
        return self

    def has(self, path):
        return True

    def inputs(self, path):
        return (), dict(
            mask_preds=self.masks[0],
            sampling_results=[Sampled(one) for one in self.labels],
        )

    def at(self, path):
        return {}

    def share(self, **settings):
        term = MaskTerm('big', **settings)
        term.path, term.pair = 'a', lambda step: (Head, Head)
        term.judge = lambda step, rois: dict(mask_preds=self.masks[1])
        return term(self)


@pytest.fixture
def masks():
    torch.manual_seed(0)
    return torch.randn(2, 5, 3, 4, 6)


def test_a_case_worked_out_by_hand():
    """A student without an opinion of a cell, a teacher with 3 : 1 for it."""
    labels = [torch.tensor([1])]
    teacher = torch.tensor([9.0, 3.0]).log().view(1, 2, 1, 1)
    found = Said(torch.zeros(1, 2, 1, 1), teacher, labels).share()
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(found, expected)


def test_the_gradient_is_that_of_the_binary_cross_entropy(masks):
    labels = [torch.tensor([2, 0]), torch.tensor([1, 1, 0])]
    student, teacher = masks.unbind()
    grads = []
    for one in (student.clone(), student.clone()):
        one.requires_grad_()
        if not grads:
            Said(one, teacher, labels).share().backward()
        else:
            rows = torch.arange(5), torch.cat(labels)
            F.binary_cross_entropy_with_logits(
                one[rows], teacher[rows].sigmoid()
            ).backward()
        grads.append(one.grad)
    torch.testing.assert_close(*grads)


def test_the_order_of_rois_does_not_matter(masks):
    labels = [torch.tensor([2, 0]), torch.tensor([1, 1, 0])]
    order = torch.tensor([3, 0, 4, 2, 1])
    flat = torch.cat(labels)[order]
    one = Said(*masks, labels).share()
    other = Said(*masks[:, order], [flat[:2], flat[2:]]).share()
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize('size', [(8, 12), (2, 3), (4, 7)])
def test_masks_of_another_size_are_resized_to_the_students(masks, size):
    """Flat ones stay what they are; a slope goes on along its axis."""
    student = masks[0]
    labels = [torch.zeros(5, dtype=torch.long)]
    flat = torch.full((5, 3, *size), 1.5)
    torch.testing.assert_close(
        Said(student, flat, labels).share(),
        Said(student, torch.full_like(student, 1.5), labels).share(),
    )
    slope = torch.linspace(-1, 1, size[1]).expand(5, 3, *size)
    found = Said(student.requires_grad_(), slope, labels).share()
    across = Said(student.mT.flip(2), slope, labels).share()
    assert (found - across).abs() > 1e-4


def test_halving_a_mask_averages_its_neighbours(masks):
    labels = [torch.zeros(5, dtype=torch.long)]
    large = torch.randn(5, 3, 8, 12)
    small = F.avg_pool2d(large, 2)
    torch.testing.assert_close(
        Said(masks[0], large, labels).share(),
        Said(masks[0], small, labels).share(),
    )


@pretending
def test_nothing_is_read_back_from_the_device(masks):
    with pretended():
        student = torch.empty(5, 3, 4, 6, device='cuda')
        labels = [torch.zeros(5, dtype=torch.long, device='cuda')]
        found = Said(student, torch.empty_like(student), labels).share()
        assert found.device.type == 'cuda'


# Errors ----------------------------------------------------------------------


def test_detectors_without_masks(build):
    with pytest.raises(
        ValueError, match=r'student \(Dist\w+\) has no roi_head.mask_head'
    ):
        build(student=rois.faster())
    with pytest.raises(
        ValueError, match=r'teacher \(FasterRCNN\) has no roi_head.mask_head'
    ):
        build(teacher=rois.faster())


def test_other_classes(build):
    teacher = rois.mask(base=16)
    teacher['roi_head']['mask_head']['num_classes'] = 5
    with pytest.raises(ValueError, match=r"has 3 classes and the teacher's 5"):
        build(teacher=teacher)


def test_strides_of_the_masks_own_extractor(build):
    teacher = rois.mask(base=16)
    extractor = copy.deepcopy(teacher['roi_head']['bbox_roi_extractor'])
    extractor['featmap_strides'] = [8, 16, 32, 64]
    teacher['roi_head']['mask_roi_extractor'] = extractor
    with pytest.raises(ValueError, match='roi_head.mask_roi_extractor to'):
        build(teacher=teacher)


def test_a_head_that_needs_more_than_rois(build):
    teacher = rois.cascade(base=16, masks=True)
    teacher['roi_head'].update(type='HybridTaskCascadeRoIHead')
    with pytest.raises(ValueError, match='also needs semantic_feat, training'):
        build(teacher=teacher)


def test_a_stage_that_is_not_there(build):
    with pytest.raises(ValueError, match='stage=1, but that detector has 1'):
        build(stage=1)


def test_settings():
    with pytest.raises(ValueError, match='temperature > 0'):
        MaskTerm('big', temperature=0.0)
    assert MaskTerm('big', loss_weight=0.0).silent()
    assert not MaskTerm('big').silent()
    assert MaskTerm('big').compares_classes()
    schedule = dict(type='mmkd.StopAfter', fraction=0.5)
    assert MaskTerm('big', schedule=schedule).schedule(0.75) == 0

import copy

import pytest
import rois
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from mmkd.losses.mimic import mimic_loss
from mmkd.taps import recording

BACKGROUND = tiny.CLASSES
WIDTH = 32
MIMIC = dict(type='mmkd.MimicLoss')


def hashed(**settings):
    settings = dict(channels=WIDTH, hash_num=50, unfold=1) | settings
    return dict(type='mmkd.LSHLoss', **settings)


@pytest.fixture
def build(tmp_path):
    def build(student=None, teacher=None, loss=MIMIC, **settings):
        teacher = teacher or rois.faster(base=16)
        file = tmp_path / 'teacher.pth'
        tiny.save_teacher(teacher, file)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        term = dict(
            type='mmkd.ProposalFeatureTerm',
            teacher='big',
            loss=loss,
            **settings,
        )
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


def staged(part, stage):
    return part[stage] if isinstance(part, nn.ModuleList) else part


def vectors(head, feature):
    """What a head of shared layers makes of RoI features, layer by layer."""
    flat = feature.flatten(1)
    for layer in head.shared_fcs:
        flat = F.relu(F.linear(flat, layer.weight, layer.bias))
    return flat


def watched(student, images, samples, stage=0, teacher_stage=-1):
    """Losses; vectors, labels and the teacher's scores of the proposals."""
    path = 'roi_head.{}'
    if isinstance(student.roi_head.bbox_head, nn.ModuleList):
        path = f'roi_head.{{}}.{stage}'
    extract = path.format('bbox_roi_extractor')
    targets = f'{path.format("bbox_head")}.get_targets'
    with recording(student, [extract, targets]) as record:
        losses = student.loss(images, samples)
    (_, proposals), _ = record.inputs(extract)
    big = teacher_of(student)
    other = staged(big.roi_head.bbox_head, teacher_stage)
    with torch.no_grad():
        own = staged(student.roi_head.bbox_head, stage)
        maps = big.extract_feat(images)[:4]
        extract_big = staged(big.roi_head.bbox_roi_extractor, teacher_stage)
        theirs = vectors(other, extract_big(maps, proposals))
        return (
            losses,
            vectors(own, record.at(extract)),
            theirs,
            record.at(targets)[0],
            F.linear(theirs, other.fc_cls.weight, other.fc_cls.bias),
        )


@pytest.mark.parametrize(
    ('student', 'teacher', 'stages'),
    [
        (rois.faster(), rois.faster(base=16), (0, 0)),
        (rois.faster(), rois.mask(base=16), (0, 0)),
        (rois.faster(), rois.cascade(base=16), (0, 1)),
        (rois.cascade(), rois.faster(base=16), (1, 0)),
        (rois.cascade(), rois.cascade(base=16), (0, 0)),
    ],
    ids=[
        'faster-faster',
        'faster-mask',
        'faster-cascade',
        'cascade-faster',
        'cascade-cascade',
    ],
)
def test_compares_what_classes_are_told_by(build, student, teacher, stages):
    stage, teacher_stage = stages
    model = build(student, teacher, stage=stage, teacher_stage=teacher_stage)
    batch = rois.batch(boxes=6)
    losses, own, theirs, _, _ = watched(model, *batch, stage, teacher_stage)
    expected = mimic_loss(own[..., None, None], theirs[..., None, None])
    assert expected > 0.01
    torch.testing.assert_close(losses['loss_kd_x'], expected)


def test_the_published_loss_on_proposals(build):
    """Squares and hashes, the planes as wide as the teacher's classifier."""
    model = build(loss=hashed())
    losses, own, theirs, _, _ = watched(model, *tiny.batch())
    std = teacher_of(model).roi_head.bbox_head.fc_cls.weight.std()
    planes = std * model.terms.x.loss.planes.flatten(1)
    bits = (theirs @ planes.T > 0).float()
    entropy = F.binary_cross_entropy_with_logits(own @ planes.T, bits)
    torch.testing.assert_close(losses['loss_kd_x_lsh'], 7 * entropy)
    square = (own - theirs).square().mean()
    torch.testing.assert_close(losses['loss_kd_x_l2'], 7 * square)


def test_the_teacher_sees_the_students_proposals_and_its_own_maps(build):
    model = build(teacher=rois.cascade(base=16))
    big = teacher_of(model).requires_grad_(True)
    images, samples = tiny.batch()
    paths = ['roi_head._bbox_forward', 'rpn_head']
    with (
        recording(big, paths) as record,
        recording(model, ['roi_head.bbox_roi_extractor']) as own,
    ):
        losses = model.loss(images, samples)
    (stage, maps, seen), _ = record.inputs(paths[0])
    (_, proposals), _ = own.inputs('roi_head.bbox_roi_extractor')
    assert stage == 1
    assert torch.equal(seen, proposals)
    assert all(map(torch.equal, maps, big.extract_feat(images)))
    assert not record.has('rpn_head')
    losses['loss_kd_x'].backward()
    assert all(one.grad is None for one in big.parameters())


def test_a_student_that_is_the_teacher_costs_nothing(build):
    model = build(rois.faster(), rois.faster())
    model.load_state_dict(teacher_of(model).state_dict(), strict=False)
    assert model.eval().loss(*tiny.batch())['loss_kd_x'] < 1e-6


def test_gradient_reaches_what_the_vectors_are_made_by(build):
    model = build(loss=hashed(std=0.1))
    losses = model.loss(*tiny.batch())
    (losses['loss_kd_x_lsh'] + losses['loss_kd_x_l2']).backward()
    head = model.roi_head.bbox_head
    for part in (model.backbone.layer3, head.shared_fcs):
        assert any(one.grad.abs().sum() > 0 for one in part.parameters())
    assert head.fc_cls.weight.grad is None


def test_the_students_own_losses_stay_as_they_were(build):
    model = build(loss=hashed())
    plain = tiny.build(rois.faster()).train()
    plain.load_state_dict(model.state_dict(), strict=False)
    images, samples = tiny.batch()
    found = []
    for one in (model, plain):
        torch.manual_seed(0)
        found.append(one.loss(images, copy.deepcopy(samples)))
    for name, value in found[1].items():
        for one, other in zip(
            *(
                x if isinstance(x, list) else [x]
                for x in (value, found[0][name])
            )
        ):
            assert torch.equal(one, other)


def test_only_what_the_teacher_gets_right_counts_on_demand(build):
    settings = dict(loss_weight=1.0)
    model = build(
        loss=hashed(mode='l2', **settings),
        student=rois.faster(),
        correct_only=True,
    )
    batch = tiny.batch(boxes=6)
    losses, own, theirs, labels, scores = watched(model, *batch)
    right = scores.argmax(1) == labels
    assert 0 < right.sum() < len(right)
    expected = (own - theirs).square().mean(1)[right].mean()
    torch.testing.assert_close(losses['loss_kd_x_l2'], expected)


def test_other_widths_are_brought_together_by_a_linear_layer(build):
    align = dict(type='mmkd.ConvAdapt', in_channels=20, out_channels=WIDTH)
    model = build(rois.faster(fc_out_channels=20), align=align)
    losses, own, theirs, _, _ = watched(model, *tiny.batch())
    (layer,) = model.terms.x.align.adapts
    own = F.linear(own, layer[0].weight.flatten(1), layer[0].bias)
    expected = mimic_loss(own[..., None, None], theirs[..., None, None])
    torch.testing.assert_close(losses['loss_kd_x'], expected)
    losses['loss_kd_x'].backward()
    assert layer[0].weight.grad.abs().sum() > 0


class Watching(nn.Module):
    """Reads the rows and labels it gets."""

    scope = 'levels'

    def forward(self, student, teacher, gt=None):
        ((one,), (other,)) = student, teacher
        assert one.shape == other.shape
        assert one.shape[:3] == (1, WIDTH, 1)
        assert gt.shape == (1, one.shape[3])
        return dict(
            gap=(one - other).mean(), watch_labels=gt.labels.float().mean()
        )


def test_a_loss_sees_one_row_and_the_label_of_each_proposal(build):
    model = build()
    model.terms.x.loss = Watching()
    losses, own, theirs, labels, _ = watched(model, *tiny.batch())
    torch.testing.assert_close(losses['loss_kd_x_gap'], (own - theirs).mean())
    torch.testing.assert_close(losses['kd_x_labels'], labels.float().mean())


def test_images_without_boxes_are_defined(build):
    model = build(loss=hashed(), correct_only=True)
    losses = model.loss(*tiny.batch(boxes=0))
    tiny.total(losses).backward()
    assert losses['loss_kd_x_l2'].isfinite()
    assert model.backbone.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    'loss', [hashed(), MIMIC], ids=lambda one: one['type']
)
def test_no_proposals_at_all(build, loss):
    student = rois.faster()
    student['train_cfg']['rpn_proposal']['min_bbox_size'] = 10_000
    model = build(student, loss=loss)
    losses = model.loss(*tiny.batch(boxes=0))
    found = {name for name in losses if name.startswith('loss_kd_x')}
    assert found == (
        {'loss_kd_x'} if loss is MIMIC else {'loss_kd_x_l2', 'loss_kd_x_lsh'}
    )
    assert all(losses[name] == 0 for name in found)
    tiny.total(losses).backward()
    assert model.backbone.conv1.weight.grad.isfinite().all()


def test_a_cascade_that_stops_before_the_stage(build):
    align = dict(type='mmkd.ConvAdapt', in_channels=WIDTH, out_channels=WIDTH)
    model = build(rois.cascade(), stage=1, align=align)
    model.roi_head.bbox_head[0].refine_bboxes = lambda *_: None
    losses = model.loss(*tiny.batch())
    assert 's1.loss_cls' not in losses
    assert losses['loss_kd_x'] == 0
    losses['loss_kd_x'].backward()
    assert all((one.grad == 0).all() for one in model.terms.x.parameters())


def test_classes_matter_only_where_labels_do(build):
    other = rois.faster(base=16, num_classes=BACKGROUND + 2)
    assert not build(teacher=other).terms.x.compares_classes()
    with pytest.raises(ValueError, match='compares class by class'):
        build(teacher=other, loss=hashed(), correct_only=True)
    model = build(loss=hashed(), correct_only=True)
    assert model.terms.x.compares_classes()


def test_a_loss_without_weight_is_silent(build):
    assert build(loss=dict(MIMIC, loss_weight=0.0)).terms.x.silent()
    assert not build().terms.x.silent()


def test_vectors_that_do_not_fit_are_refused(build):
    with pytest.raises(ValueError, match='in_channels=20, out_channels=32'):
        build(rois.faster(fc_out_channels=20))
    with pytest.raises(ValueError, match='takes no weight. Leave it out'):
        build(correct_only=True)


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_detectors_without_such_vectors_are_refused(build, side):
    with pytest.raises(ValueError, match=f'the {side} .* has no roi_head'):
        build(**{side: tiny.retinanet()})
    without = rois.faster(with_cls=False)
    with pytest.raises(ValueError, match=f'the {side} has a .* without one'):
        build(**{side: without})

"""Weights in a term: what the loss is given, and what is refused."""

import families
import pytest
import tiny
import torch
from heads import fcos, gfl, retinanet

from mmkd.losses.ld import edge_divergence
from mmkd.losses.weighted_mse import weighted_mse_loss
from mmkd.taps import recording
from mmkd.terms.feature import FeatureTerm


def localisation(**settings):
    return dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='bbox_head',
        output=1,
        loss=dict(type='mmkd.LDLoss', temperature=10.0),
        **settings,
    )


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    model = gfl(base=16)
    file = tmp_path_factory.mktemp('teacher') / 'gfl.pth'
    tiny.save_teacher(model, file)
    return dict(big=dict(config=dict(model=model), checkpoint=str(file)))


@pytest.fixture
def build(teachers):
    def build(**terms):
        model = tiny.build(tiny.distilled(gfl(), teachers, terms))
        model.teachers.load()
        return model.train()

    return build


def test_the_main_region_is_where_the_students_loss_has_objects(build):
    """Literally: labels read, scores and divergences cell by cell."""
    student = build(ld=localisation(weight=dict(type='mmkd.PositiveWeight')))
    images, samples = tiny.batch()
    paths = ['bbox_head', 'bbox_head.get_targets']
    with recording(student, paths) as record:
        losses = student.loss(images, samples)
    _, labels, *_ = record.at('bbox_head.get_targets')
    scores, boxes = record.at('bbox_head')
    with torch.no_grad():
        big = student.teachers['big'].detector
        _, theirs = big.bbox_head(big.extract_feat(images))
    above = below = 0.0
    for score, own, other, label in zip(scores, boxes, theirs, labels):
        divergence = edge_divergence(own, other)
        columns = score.shape[-1]
        for image in range(2):
            for place in (label[image] < 3).nonzero()[:, 0].tolist():
                y, x = divmod(place, columns)
                weight = score[image, :, y, x].sigmoid().max().item()
                above += weight * divergence[image, 0, y, x].item()
                below += weight
    assert below > 0
    assert losses['loss_kd_ld'].item() == pytest.approx(
        above / max(below, 1), rel=1e-4
    )


def test_the_valuable_region_adds_what_the_main_one_leaves(build):
    student = build(
        main=localisation(
            weight=dict(type='mmkd.PositiveWeight', score=False)
        ),
        more=localisation(weight=dict(type='mmkd.ValuableWeight')),
    )
    term = student.terms
    images, samples = tiny.batch()
    losses = student.loss(images, samples)
    assert losses['loss_kd_main'] > 0
    assert losses['loss_kd_more'] > 0
    seen = {}
    for name in ('main', 'more'):
        weight = term[name].weight
        plain = weight.forward
        weight.forward = lambda step, name=name, plain=plain: seen.setdefault(
            name, plain(step)
        )
    student.loss(images, samples)
    for one, other in zip(seen['main'], seen['more']):
        assert one.shape == other.shape
        assert not ((one > 0) & (other > 0)).any()


def test_features_count_as_the_teacher_scores_them(build):
    student = build(
        rich=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 2),
            loss=dict(type='mmkd.WeightedMSELoss'),
            weight=dict(type='mmkd.ScoreWeight'),
        )
    )
    images, samples = tiny.batch()
    with recording(student, ['neck']) as record:
        losses = student.loss(images, samples)
    big = student.teachers['big'].detector
    with torch.no_grad():
        maps = big.extract_feat(images)
        scores = big.bbox_head(maps)[0]
    expected = sum(
        weighted_mse_loss(
            record.at('neck')[level],
            maps[level],
            scores[level].sigmoid().amax(1, keepdim=True),
        )
        for level in (0, 2)
    )
    torch.testing.assert_close(losses['loss_kd_rich'], expected)


def test_gradients_reach_the_student_and_no_weight(build):
    student = build(
        ld=localisation(weight=dict(type='mmkd.PositiveWeight')),
        rich=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.WeightedMSELoss'),
            weight=dict(type='mmkd.ScoreWeight', side='student'),
        ),
    )
    losses = student.loss(*tiny.batch())
    for term in ('ld', 'rich'):
        student.zero_grad()
        losses[f'loss_kd_{term}'].backward(retain_graph=True)
        assert student.backbone.conv1.weight.grad.abs().sum() > 0
        grad = student.bbox_head.gfl_cls.weight.grad
        assert grad is None or not grad.any()  # scores only weigh


def test_images_without_boxes(build):
    student = build(
        ld=localisation(weight=dict(type='mmkd.PositiveWeight')),
        more=localisation(weight=dict(type='mmkd.ValuableWeight')),
    )
    images, samples = tiny.batch(boxes=0)
    losses = student.loss(images, samples)
    assert losses['loss_kd_ld'].item() == 0
    assert losses['loss_kd_more'].item() == 0
    tiny.total(losses).backward()


def test_a_loss_with_a_rule_of_its_own_takes_none():
    with pytest.raises(ValueError, match=r'PKDLoss says itself.*Weighted'):
        FeatureTerm(
            'big',
            dict(type='mmkd.PKDLoss'),
            weight=dict(type='mmkd.ScoreWeight'),
        )


def test_weights_of_other_sizes_are_refused_while_the_model_is_built(build):
    with pytest.raises(ValueError, match=r"Term 'rich'.*ScoreWeight weighs"):
        build(
            rich=dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                tap='backbone',
                levels=(0,),
                loss=dict(type='mmkd.WeightedMSELoss'),
                align=dict(
                    type='mmkd.ConvAdapt', in_channels=8, out_channels=16
                ),
                weight=dict(type='mmkd.ScoreWeight'),
            )
        )


def test_a_head_that_assigns_nothing_is_refused(teachers):
    model = tiny.distilled(
        tiny.faster_rcnn(),
        teachers,
        dict(ld=localisation(weight=dict(type='mmkd.PositiveWeight'))),
    )
    model['terms']['ld']['tap'] = 'neck'
    with pytest.raises(ValueError, match=r"no submodule 'bbox_head' to tap"):
        tiny.build(model)
    model['terms']['ld']['weight']['tap'] = 'neck'
    with pytest.raises(ValueError, match=r"Term 'ld'.*PositiveWeight reads"):
        tiny.build(model)


@pytest.mark.parametrize('head', [retinanet, fcos, families.rtmdet])
def test_targets_without_anchors_are_refused_while_the_model_is_built(
    teachers, head
):
    """Label weights, boxes, or points with their strides: numbers, too."""
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        loss=dict(type='mmkd.WeightedMSELoss'),
        weight=dict(type='mmkd.ValuableWeight'),
    )
    model = tiny.distilled(head(), teachers, dict(x=term))
    with pytest.raises(ValueError, match=r"Term 'x'.*Head has none"):
        tiny.build(model)


@pytest.mark.parametrize('kind', ['mmkd.ScoreWeight', 'mmkd.QualityWeight'])
def test_a_border_that_only_the_teacher_sees_is_left_out(kind, tmp_path):
    """Of the cells that both see, the weights are those of the teacher."""
    wide = gfl(base=16)
    wide['data_preprocessor'] = dict(tiny.PIXELS, pad_size_divisor=256)
    file = tiny.save_teacher(wide, tmp_path / 'gfl.pth')
    big = dict(config=dict(model=wide), checkpoint=str(file))
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        loss=dict(type='mmkd.WeightedMSELoss'),
        weight=dict(type=kind),
    )
    model = tiny.build(tiny.distilled(gfl(), dict(big=big), dict(x=term)))
    model.teachers.load()
    seen = []
    weigh = model.terms['x'].weight.forward
    model.terms['x'].weight.forward = lambda step: (
        seen.append(weigh(step)) or seen[-1]
    )
    losses = model.train().loss(*tiny.batch())
    assert losses['loss_kd_x'].isfinite()
    assert [tuple(one.shape[-2:]) for one in seen[0]] == [
        (side, side) for side in (16, 8, 4, 2, 1)
    ]


@pytest.mark.parametrize(
    ('weight', 'expected'),
    [('mmkd.QualityWeight', True), ('mmkd.ScoreWeight', False)],
)
def test_some_weights_compare_classes(weight, expected):
    """A quality is that of the object's own class."""
    loss = dict(type='mmkd.WeightedMSELoss')
    term = FeatureTerm('big', loss, weight=dict(type=weight))
    assert term.compares_classes() == expected

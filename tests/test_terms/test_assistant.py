import heads
import pytest
import tiny
import torch

from mmkd.losses.mimic import mimic_loss
from mmkd.ops.numeric import as_float
from mmkd.taps import recording

SCORES = dict(
    type='mmkd.FeatureTerm',
    teacher='big',
    tap='bbox_head',
    output=0,
    loss=dict(type='mmkd.MimicLoss'),
)


@pytest.fixture
def build(tmp_path):
    def build(detector=None, student=None, terms='scores', **settings):
        model = detector or heads.atss(base=16)
        file = tiny.save_teacher(model, tmp_path / 'teacher.pth', seed=3)
        big = dict(config=dict(model=model), checkpoint=str(file))
        settings = dict(teacher='big') | settings
        if settings['teacher'] is None:
            del settings['teacher']
        if terms == 'scores':
            terms = dict(scores=SCORES)
        built = tiny.build(
            tiny.distilled(
                student or heads.fcos(),
                dict(big=big),
                dict(
                    x=dict(type='mmkd.AssistantTerm', terms=terms, **settings)
                ),
            )
        )
        built.init_weights()
        return built.train()

    return build


def own(losses):
    return {
        name.removeprefix('loss_kd_x_own_'): one
        for name, one in losses.items()
        if name.startswith('loss_kd_x_own_')
    }


def test_the_assistant_learns_from_the_labels_as_its_own_detector_would(build):
    """A detector with the student's body and the assistant's heads."""
    model = build(loss_weight=2.0)
    images, samples = tiny.batch()
    losses = own(model.loss(images, samples))
    with torch.no_grad():
        maps = model.extract_feat(images)
        expected = model.terms['x'].heads.bbox_head.loss(maps, samples)
    assert losses.keys() == expected.keys()
    for name, values in expected.items():
        total = 2 * sum(value.mean() for value in values)
        torch.testing.assert_close(
            losses[name].detach(), total, rtol=1e-4, atol=1e-5
        )


def test_its_predictions_are_compared_with_the_teachers(build):
    model = build()
    images, samples = tiny.batch()
    loss = model.loss(images, samples)['loss_kd_x_scores']
    big = model.teachers['big'].detector
    with torch.no_grad():
        mine = model.terms['x'].heads.bbox_head(model.extract_feat(images))
        theirs = big.bbox_head(big.extract_feat(images))
    expected = sum(mimic_loss(*pair) for pair in zip(mine[0], theirs[0]))
    assert loss > 0
    torch.testing.assert_close(
        as_float(loss.detach()), expected, rtol=1e-4, atol=1e-6
    )


def test_body_and_assistant_learn_and_the_students_own_head_does_not(build):
    model = build()
    losses = model.loss(*tiny.batch())
    sum(one for name, one in losses.items() if '_kd_' in name).backward()
    assert model.backbone.conv1.weight.grad.any()
    assert model.terms['x'].heads.bbox_head.atss_cls.weight.grad.any()
    assert model.bbox_head.conv_cls.weight.grad is None
    big = model.teachers['big'].detector
    assert all(one.grad is None for one in big.parameters())


def test_a_two_stage_teacher_reaches_a_one_stage_student(build):
    terms = dict(
        proposals=dict(
            SCORES,
            tap='rpn_head',
            loss=dict(type='mmkd.MimicLoss'),
        ),
    )
    student = tiny.retinanet()
    student['neck'].update(start_level=0)
    student['bbox_head']['anchor_generator']['strides'] = [4, 8, 16, 32, 64]
    model = build(tiny.faster_rcnn(base=16), student, terms)
    losses = model.loss(*tiny.batch())
    assert losses['loss_kd_x_proposals'] > 0
    assert {'loss_rpn_cls', 'loss_cls', 'loss_bbox'} <= own(losses).keys()
    assert losses['kd_x_own_acc'].ndim == 0
    tiny.total(losses).backward()
    assert model.backbone.conv1.weight.grad.any()


def test_without_terms_and_teacher_it_is_a_second_task(build):
    file = dict(model=heads.atss(base=16))
    model = build(terms=None, teacher=None, config=file)
    losses = model.loss(*tiny.batch())
    assert 'loss_cls' in own(losses)
    assert model.terms['x'].teacher_names == []
    tiny.total(losses).backward()


def test_it_starts_anew_and_leaves_the_teacher_whole(build):
    model = build()
    big = model.teachers['big'].detector
    heads = model.terms['x'].heads
    assert big.backbone is not None
    assert not hasattr(heads, 'backbone')
    assert not torch.equal(
        heads.bbox_head.atss_cls.weight, big.bbox_head.atss_cls.weight
    )
    assert all(one.requires_grad for one in heads.parameters())
    assert not any(one.requires_grad for one in big.parameters())


def test_the_student_is_what_it_is_without(build):
    images, samples = tiny.batch()
    model = build()
    plain = tiny.build(heads.fcos())
    plain.init_weights()
    plain.train()
    mine, theirs = (one.loss(images, samples) for one in (model, plain))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=0)
    kept = {
        name for name in model.state_dict() if not name.startswith('terms.')
    }
    assert kept == plain.state_dict().keys()


def test_other_channels_and_levels_are_aligned(build):
    narrow = heads.fcos()
    narrow['neck'].update(out_channels=8)
    narrow['bbox_head'].update(in_channels=8)
    align = dict(
        type='mmkd.ConvAdapt', in_channels=8, out_channels=16, num_levels=5
    )
    with pytest.raises(ValueError, match="Term 'x'"):
        build(student=narrow)
    model = build(student=narrow, align=align)
    model.loss(*tiny.batch())['loss_kd_x_scores'].backward()
    assert all(
        one.grad is not None for one in model.terms['x'].align.parameters()
    )


def test_levels_choose_the_maps(build):
    model = build()
    term = model.terms['x']
    with recording(model, ['neck']) as record:
        maps = model.extract_feat(tiny.batch()[0])
    step = type('Step', (), dict(student=record))
    assert len(term._maps(step)) == 5
    term.levels = (1, 3)
    found = term._maps(step)
    assert found[0] is maps[1]
    assert found[1] is maps[3]


def test_images_without_boxes(build):
    losses = build().loss(*tiny.batch(boxes=0))
    assert all(one.isfinite() for one in own(losses).values())


def test_what_is_missing_is_said(build):
    with pytest.raises(ValueError, match='name teacher=…, whose kind'):
        build(teacher=None, terms=None)
    with pytest.raises(ValueError, match="'bigg'.*'big'"):
        build(teacher='bigg')
    with pytest.raises(ValueError, match="'neck' .* 0 to 4; .* asks for 7"):
        build(levels=(1, 7))
    with pytest.raises(ValueError, match=r"'neck' has \[.*bbox_head reads 8"):
        build(tiny.retinanet(channels=8))


def test_it_is_silent_only_if_nothing_is_asked(build):
    quiet = dict(SCORES, loss=dict(type='mmkd.MimicLoss', loss_weight=0.0))
    assert not build().terms['x'].silent()
    assert not build(loss_weight=0.0).terms['x'].silent()
    assert not build(terms=dict(scores=quiet)).terms['x'].silent()
    model = build(terms=dict(scores=quiet), loss_weight=0.0)
    assert model.terms['x'].silent()

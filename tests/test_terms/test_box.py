import heads
import pytest
import tiny
import torch
from torchvision.ops import generalized_box_iou

from mmkd.taps import recording
from mmkd.terms.decoding import decode

KINDS = ('gfl', 'atss', 'retinanet', 'fcos')
CLASSES = 3


def box(**settings):
    return dict(type='mmkd.BoxTerm', teacher='big', **settings)


@pytest.fixture
def build(tmp_path):
    def build(kind, teacher=None, **settings):
        teacher = teacher or getattr(heads, kind)(base=16)
        file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth', seed=3)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        student = getattr(heads, kind)()
        model = tiny.distilled(student, dict(big=big), dict(x=box(**settings)))
        model = tiny.build(model)
        model.teachers.load()
        # Else scores of an untrained head are all alike.
        for seed, one in enumerate((model, model.teachers['big'].detector)):
            torch.manual_seed(seed)
            for name, weight in one.bbox_head.named_parameters():
                if name.endswith('weight') and weight.ndim > 1:
                    torch.nn.init.normal_(weight.data, std=0.1)
                if name == 'conv_reg.bias':  # no boxes without area
                    torch.nn.init.constant_(weight.data, 3.0)
        return model.train()

    return build


def rows(boxes):
    return boxes.permute(0, 3, 4, 1, 2).reshape(-1, 4)


def outputs(model, images, samples):
    """What both heads say, and the student's labels."""
    big = model.teachers['big'].detector
    paths = ['bbox_head', 'bbox_head.get_targets']
    with recording(model, paths) as record:
        plain = type(model).__mro__[2]
        plain.loss(model, images, samples)
    with torch.no_grad():
        theirs = big.bbox_head(big.extract_feat(images))
    targets = record.at('bbox_head.get_targets')
    labels = next(one for one in targets if not one[0].is_floating_point())
    return record.at('bbox_head'), theirs, labels


@pytest.mark.parametrize('kind', KINDS)
def test_equals_the_method_written_out(build, kind):
    model = build(kind, loss_weight=2.0)
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)), boxes=6)
    own, theirs, labels = outputs(model, images, samples)
    big = model.teachers['big'].detector
    ours = decode(model.bbox_head, own[1])
    others = decode(big.bbox_head, theirs[1])
    total = 0.0
    for level in range(5):
        scores = [
            x[0][level].sigmoid().permute(0, 2, 3, 1).reshape(-1, CLASSES)
            for x in (own, theirs)
        ]
        one, other = rows(ours[level]), rows(others[level])
        for index in range(len(one)):
            weight = max(
                abs(scores[0][index, c] - scores[1][index, c]).item()
                for c in range(CLASSES)
            )
            pair = one[index : index + 1], other[index : index + 1]
            total += weight * (1 - generalized_box_iou(*pair).item())
    count = sum(((x >= 0) & (x < CLASSES)).sum().item() for x in labels)
    assert count > 1
    found = model.loss(images, samples)['loss_kd_x']
    assert found > 0
    assert found.item() == pytest.approx(2 * total / count, rel=1e-3)


def test_the_sum_of_weights_divides_instead(build):
    model = build(
        'retinanet',
        normalise_by='weight',
        weight=dict(type='mmkd.ScoreWeight'),
    )
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    own, theirs, _ = outputs(model, images, samples)
    ours = decode(model.bbox_head, own[1])
    others = decode(model.teachers['big'].detector.bbox_head, theirs[1])
    total = weights = 0.0
    for level in range(5):
        one, other = rows(ours[level]), rows(others[level])
        weight = theirs[0][level].amax(1).sigmoid().flatten()
        error = 1 - generalized_box_iou(one, other).diagonal()
        total, weights = total + (weight * error).sum(), weights + weight.sum()
    found = model.loss(images, samples)['loss_kd_x']
    torch.testing.assert_close(found, total / weights, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_the_teacher_costs_nothing(build):
    model = build(
        'gfl', teacher=heads.gfl(), weight=dict(type='mmkd.ScoreWeight')
    )
    big = model.teachers['big'].detector
    model.load_state_dict(big.state_dict(), strict=False)
    model.eval()
    assert model.loss(*tiny.batch())['loss_kd_x'].item() < 1e-4


def test_it_reaches_the_backbone_and_not_the_teacher_or_the_classes(build):
    model = build('gfl')
    model.loss(*tiny.batch())['loss_kd_x'].backward()
    assert model.backbone.conv1.weight.grad.any()
    assert model.bbox_head.gfl_reg.weight.grad.any()
    grad = model.bbox_head.gfl_cls.weight.grad
    assert grad is None or not grad.any()
    big = model.teachers['big'].detector
    assert all(one.grad is None for one in big.parameters())


def test_heads_of_different_forms_are_compared(build):
    """Distributions learn from offsets."""
    model = build('gfl', teacher=heads.atss(base=16))
    losses = model.loss(*tiny.batch())
    losses['loss_kd_x'].backward()
    assert losses['loss_kd_x'] > 0
    assert model.bbox_head.gfl_reg.weight.grad.any()


def test_a_border_that_only_the_teacher_sees_does_not_count(build):
    wide = heads.gfl(base=16)
    wide['data_preprocessor'] = dict(tiny.PIXELS, pad_size_divisor=256)
    model, plain = build('gfl', teacher=wide), build('gfl')
    one, other = (x.loss(*tiny.batch())['loss_kd_x'] for x in (model, plain))
    # The teacher's features near the border see zeros either way.
    torch.testing.assert_close(one, other, rtol=0.2, atol=0)


def test_the_region_proposals_of_two_stages(tmp_path):
    teacher = tiny.faster_rcnn(base=16)
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    model = tiny.build(
        tiny.distilled(
            tiny.faster_rcnn(), dict(big=big), dict(x=box(tap='rpn_head'))
        )
    ).train()
    loss = model.loss(*tiny.batch())['loss_kd_x']
    loss.backward()
    assert loss > 0
    assert model.rpn_head.rpn_reg.weight.grad.any()


def test_the_teachers_head_may_have_another_name(tmp_path):
    """A one-stage student learns from region proposals."""
    teacher = tiny.faster_rcnn(base=16, channels=16)
    teacher['neck'].update(
        start_level=1, add_extra_convs='on_input', num_outs=5
    )
    strides = [8, 16, 32, 64, 128]
    teacher['rpn_head']['anchor_generator']['strides'] = strides
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    term = box(
        teacher_tap='rpn_head',
        weight=dict(type='mmkd.ScoreWeight', tap='rpn_head'),
    )
    model = tiny.distilled(heads.atss(), dict(big=big), dict(x=term))
    loss = tiny.build(model).train().loss(*tiny.batch())['loss_kd_x']
    assert loss > 0


def test_images_without_boxes(build):
    model = build('retinanet')
    losses = model.loss(*tiny.batch(boxes=0))
    assert losses['loss_kd_x'].isfinite()
    tiny.total(losses).backward()


def test_classes_matter_where_they_are_compared(build):
    assert build('gfl').terms['x'].compares_classes()
    weight = dict(type='mmkd.ScoreWeight')
    assert not build('gfl', weight=weight).terms['x'].compares_classes()


def test_other_anchors_are_refused(build):
    model = heads.retinanet(base=16)
    model['bbox_head']['anchor_generator']['ratios'] = [0.5, 1.0]
    with pytest.raises(ValueError, match=r'\(8, 8\), 1\).*\(8, 8\), 2\)'):
        build('retinanet', teacher=model)


def test_a_head_without_boxes_of_each_cell_is_refused(build):
    with pytest.raises(ValueError, match="off the student's FPN"):
        build('gfl', tap='neck', teacher_tap='bbox_head')
    with pytest.raises(ValueError, match="off the teacher's FPN"):
        build('gfl', teacher_tap='neck')
    with pytest.raises(ValueError, match="'bbox_hed' to tap.*'bbox_head'"):
        build('gfl', tap='bbox_hed')


def test_settings_are_checked(build):
    with pytest.raises(ValueError, match="'positive'.*'positives'"):
        build('gfl', normalise_by='positive')
    assert build('gfl', loss_weight=0.0).terms['x'].silent()

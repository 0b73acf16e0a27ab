import heads
import numpy as np
import pytest
import runs
import tiny
import torch
from PIL import Image

from mmkd.analysis import focus

data = runs.data


@pytest.fixture
def config(data, tmp_path):
    """A distillation config of tiny detectors, and its path."""
    teacher = tiny.retinanet(base=16)
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    term = dict(
        type='mmkd.FeatureTerm', teacher='big', loss=dict(type='mmkd.PKDLoss')
    )
    model = tiny.distilled(
        tiny.retinanet(),
        dict(big=dict(config=dict(model=teacher), checkpoint=str(file))),
        dict(pkd=term),
    )
    cfg = runs.config(data, tmp_path / 'work', iters=2, model=model)
    path = tmp_path / 'config.py'
    path.write_text(cfg.pretty_text)
    return path


def test_a_picture_a_row_and_a_panel_for_each_that_looks(config, tmp_path):
    out = tmp_path / 'focus.png'
    assert focus.main([str(config), '--count', '2', '--out', str(out)]) == 0
    width, height = Image.open(out).size
    # picture, foreground, background, attention and richness of both, and
    # the positives; two rows
    assert width == pytest.approx(8 * 330, rel=0.06)
    assert height == pytest.approx(2 * 330, rel=0.15)


def test_photographs_without_labels_are_not_drawn(data, config, tmp_path):
    """Nothing is positive on them."""
    cfg = focus.read_config(config)
    few = dict(cfg.train_dataloader.dataset, indices=2)
    cfg.train_dataloader.dataset = dict(
        type='mmkd.PartlyLabelledDataset', dataset=few, unlabelled=str(data)
    )
    config.write_text(cfg.pretty_text)
    out = tmp_path / 'focus.png'
    assert focus.main([str(config), '--count', '4', '--out', str(out)]) == 0
    assert Image.open(out).height == pytest.approx(2 * 330, rel=0.15)


def test_the_foreground_glows_where_the_boxes_are(data, config):
    cfg = focus.read_config(config)
    focus.init_default_scope('mmdet')
    model = focus.MODELS.build(cfg.model)
    model.init_weights()
    # One object of known place in an image of one colour.
    samples = tiny.batch(shapes=((128, 128),), boxes=1)[1]
    samples[0].gt_instances.bboxes = torch.tensor([[64.0, 0.0, 128.0, 64.0]])
    batch = dict(
        inputs=[torch.full((3, 128, 128), 100, dtype=torch.uint8)],
        data_samples=samples,
    )
    panels = focus.focus(model, batch, 'neck', 0)
    (picture,), (found,) = panels['picture'], panels['foreground']
    assert (picture == 100).all()
    bright = found.astype(int).sum(2)
    assert bright[8:48, 80:120].min() > bright[80:120, 8:48].max()
    behind = panels['background'][0].astype(int).sum(2)
    assert behind[8:48, 80:120].max() < behind[80:120, 8:48].min()


def test_attention_is_the_teachers_own(config):
    cfg = focus.read_config(config)
    focus.init_default_scope('mmdet')
    model = focus.MODELS.build(cfg.model)
    model.init_weights()
    images, samples = tiny.batch()
    panels = focus.focus(model, tiny.pixels(images, samples), 'neck', 0)
    one, other = panels['attention of student'], panels['attention of big']
    assert not np.array_equal(one[0], other[0])
    assert all(one.shape == (128, 128, 3) for one in panels['picture'])


def test_what_a_head_cannot_give_is_said(config, tmp_path, capsys):
    out = tmp_path / 'focus.png'
    assert focus.main([str(config), '--count', '1', '--out', str(out)]) == 0
    said = capsys.readouterr().out
    assert 'Not drawn, valuable region: ValuableWeight reads' in said


def test_a_step_s_weights_are_those_that_its_loss_is_given(tmp_path):
    """Richness, positives and the valuable region, and a term's own."""
    teacher = heads.gfl(base=16)
    file = str(tiny.save_teacher(teacher, tmp_path / 'gfl.pth'))
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='bbox_head',
        output=1,
        loss=dict(type='mmkd.LDLoss'),
        weight=dict(type='mmkd.DisagreementWeight'),
    )
    model = tiny.build(
        tiny.distilled(
            heads.gfl(),
            dict(big=dict(config=dict(model=teacher), checkpoint=file)),
            dict(ld=term),
        )
    )
    model.init_weights()
    images, samples = tiny.batch(shapes=((128, 128),) * 2)
    found = focus._weights(model, images, samples, 0)
    assert list(found) == [
        'richness of big',
        'richness of student',
        'positives',
        'valuable region',
        'ld: DisagreementWeight',
    ]
    assert {tuple(one.shape) for one in found.values()} == {(2, 1, 16, 16)}
    with torch.no_grad():
        own, other = (
            one.bbox_head(one.extract_feat(images))[0][0].sigmoid()
            for one in (model, model.teachers['big'].detector.eval())
        )
    for name, expected in {
        'richness of big': other.amax(1, keepdim=True),
        'richness of student': own.amax(1, keepdim=True),
        'ld: DisagreementWeight': (own - other).abs().amax(1, keepdim=True),
    }.items():
        torch.testing.assert_close(found[name], expected)
    positives, region = found['positives'], found['valuable region']
    assert set(positives.unique().tolist()) <= {0.0, 1.0}
    assert region.any()
    assert not (positives * region).any()
    assert model.observer is None


def test_a_weight_of_one_everywhere_is_bright():
    image = np.zeros((8, 8, 3), np.uint8)
    ones = torch.ones(1, 2, 2)
    assert focus.attention_over(image, ones, from_zero=True).min() > 50
    assert focus.attention_over(image, ones).max() < 10


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--level', '9'], 'levels 0 to 4'),
        (['--tap', 'nek'], "Did you mean 'neck'"),
    ],
)
def test_what_is_not_there_is_named(config, capsys, words, message):
    assert focus.main([str(config), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_plain_config_is_refused(tmp_path, capsys):
    path = tmp_path / 'plain.py'
    path.write_text("model = dict(type='RetinaNet')\n")
    assert focus.main([str(path)]) == 1
    assert 'distils nothing' in capsys.readouterr().err

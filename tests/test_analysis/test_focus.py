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
    # picture, foreground, background, student, big; two rows
    assert width == pytest.approx(5 * 330, rel=0.06)
    assert height == pytest.approx(2 * 330, rel=0.15)


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

import importlib.util
import shutil
from pathlib import Path

import mmcv
import numpy as np
import pytest
import tiny
import torch

from mmkd.configs import read_config

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ('disc', 'square', 'cross')


@pytest.fixture(scope='module')
def demo():
    spec = importlib.util.spec_from_file_location(
        'image_demo', ROOT / 'demo' / 'image_demo.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reading(classes=CLASSES):
    return dict(
        dataset=dict(
            type='CocoDataset',
            metainfo=dict(classes=classes),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='Resize', scale=(128, 128), keep_ratio=True),
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id',
                        'ori_shape',
                        'img_shape',
                        'scale_factor',
                    ),
                ),
            ],
        )
    )


def write(path, **settings):
    lines = [f'{key} = {dict(value)!r}' for key, value in settings.items()]
    path.write_text('\n'.join(lines))


@pytest.fixture(scope='module')
def folder(tmp_path_factory, teacher_file):
    """A picture, plain and distillation config, and their checkpoints."""
    folder = tmp_path_factory.mktemp('demo')
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    mmcv.imwrite(noise, str(folder / 'street.png'))
    small, big = tiny.retinanet(), tiny.retinanet(base=16)
    write(folder / 'plain.py', model=small, test_dataloader=reading())
    write(folder / 'big.py', model=big, test_dataloader=reading())
    teachers = dict(big=dict(config='big.py', checkpoint='teacher.pth'))
    terms = dict(
        mgd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0,),
            loss=dict(type='mmkd.MGDLoss', channels=16),
        )
    )
    model = tiny.distilled(small, teachers, terms)
    write(folder / 'distil.py', model=model, test_dataloader=reading())
    shutil.copy(teacher_file, folder / 'teacher.pth')
    tiny.save_teacher(small, folder / 'plain.pth', seed=1)
    weights = torch.load(folder / 'plain.pth')['state_dict']
    weights['terms.mgd.losses.0.generation.0.bias'] = torch.zeros(16)
    torch.save(dict(state_dict=weights), folder / 'distil.pth')
    return folder


@pytest.fixture
def files(folder, tmp_path, monkeypatch):
    """A copy of the folder, in which the test runs."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def run(demo, *words):
    return demo.main(
        ['street.png', *words, '--score-thr', '0.0', '--device', 'cpu']
    )


def boxes(demo, config, checkpoint):
    image = mmcv.imread('street.png', channel_order='rgb')
    detector = demo.load(read_config(config), checkpoint, 'cpu')
    return demo.detect(detector, image, 0.0)


def test_student_alone_is_one_panel(demo, files, capsys):
    assert run(demo, 'plain.py', 'plain.pth') == 0
    height, width = mmcv.imread('street_detections.png').shape[:2]
    assert 640 < width < 700
    assert 480 < height < 560
    assert 'student: RetinaNet finds' in capsys.readouterr().out


def test_teacher_of_the_config_is_drawn_beside(demo, files, capsys):
    out = ['--out', 'both.png', '--teacher']
    assert run(demo, 'distil.py', 'distil.pth', *out) == 0
    assert 1280 < mmcv.imread('both.png').shape[1] < 1340
    assert 'teacher: RetinaNet finds' in capsys.readouterr().out


@pytest.mark.parametrize('words', [[], ['auto'], ['big']])
def test_teacher_of_the_config_is_found_by_any_word(demo, files, words):
    config, checkpoint, ema = demo.find_teacher(
        words, read_config('distil.py')
    )
    assert config.filename.endswith('big.py')
    assert (checkpoint, ema) == ('teacher.pth', True)


def test_teacher_named_on_the_command_line(demo, files, capsys):
    words = ['--teacher', 'big.py', 'teacher.pth']
    assert run(demo, 'plain.py', 'plain.pth', *words) == 0
    assert 'teacher: RetinaNet finds' in capsys.readouterr().out


def test_plain_and_distillation_config_find_the_same(demo, files):
    for checkpoint in ('plain.pth', 'distil.pth'):
        one, other = (
            boxes(demo, config, checkpoint)
            for config in ('plain.py', 'distil.py')
        )
        for a, b in zip(one, other):
            np.testing.assert_array_equal(a, b)


def test_boxes_are_those_of_the_detector_itself(demo, files):
    """Reading, resizing and channel order are the test pipeline's."""
    image = torch.from_numpy(mmcv.imread('street.png')).permute(2, 0, 1)
    plain = tiny.build(tiny.retinanet()).eval()
    plain.load_state_dict(torch.load('plain.pth')['state_dict'])
    _, samples = tiny.batch(shapes=((96, 128),))
    with torch.no_grad():
        (sample,) = plain.test_step(dict(inputs=[image], data_samples=samples))
    found = boxes(demo, 'plain.py', 'plain.pth')
    np.testing.assert_allclose(found[1], sample.pred_instances.scores)
    np.testing.assert_allclose(found[0], sample.pred_instances.bboxes)


def test_student_needs_no_file_of_a_teacher(demo, files, monkeypatch):
    Path('big.py').unlink()
    assert run(demo, 'distil.py', 'distil.pth') == 0


def test_classes_of_both_are_matched_by_name(demo):
    shared = ['cat']
    labels = demo._relabel(np.array([0, 1, 2]), ('dog', 'cat'), shared)
    assert shared == ['cat', 'dog', 'class 2']
    assert labels.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['plain.py', 'big.pth'], "expected a checkpoint at 'big.pth'"),
        (['plian.py', 'plain.pth'], "Did you mean 'plain.py'"),
        (['big.py', 'plain.pth'], 'plain.pth does not fit RetinaNet'),
        (
            ['plain.py', 'plain.pth', '--teacher'],
            'the config names no teacher',
        ),
        (
            ['distil.py', 'plain.pth', '--teacher', 'bug'],
            "Did you mean 'big'",
        ),
        (
            ['distil.py', 'plain.pth', '--teacher', 'a', 'b', 'c'],
            'expected CONFIG CHECKPOINT',
        ),
    ],
)
def test_a_mistake_is_one_clear_line(demo, files, words, message, capsys):
    assert run(demo, *words) == 1
    assert message in capsys.readouterr().err
    assert not list(Path().glob('*_detections.png'))


def test_of_several_teachers_one_must_be_named(demo, files):
    config = read_config('distil.py')
    config.model.teachers.small = config.model.teachers.big
    with pytest.raises(ValueError, match='--teacher big or --teacher small'):
        demo.find_teacher([], config)


def test_a_missing_picture_is_named(demo, files, capsys):
    assert demo.main(['stret.png', 'plain.py', 'plain.pth']) == 1
    assert "no image 'stret.png'" in capsys.readouterr().err


def test_a_damaged_picture_is_named(demo, files, capsys):
    Path('broken.png').write_bytes(Path('street.png').read_bytes()[:40])
    assert demo.main(['broken.png', 'plain.py', 'plain.pth']) == 1
    assert "'broken.png' of 40 bytes" in capsys.readouterr().err

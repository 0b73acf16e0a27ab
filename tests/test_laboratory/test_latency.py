"""How long a detector takes: who is timed, on what, and what is said."""

import json

import pytest
import runs
import tiny
import torch
from mmengine.config import Config
from torch import nn

from mmkd.laboratory import latency as module
from mmkd.laboratory.latency import Deployed, images_of, latency, main, noise

data = runs.data


class Counting(nn.Module):
    """Takes as many seconds of a clock as its image says."""

    def __init__(self, clock, name):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.clock, self.name = clock, name

    def test_step(self, image):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.clock.calls.append(self.name)
        self.clock.now += image


class Clock:
    now, calls = 0.0, ()

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    clock.calls = []
    monkeypatch.setattr(module, 'time', clock)
    return clock


def test_every_round_is_one_image_of_each_and_the_first_warms_up(clock):
    detectors = dict(
        a=(Counting(clock, 'a'), [1.0, 2.0, 3.0]),
        b=(Counting(clock, 'b'), [0.25]),
    )
    times = latency(detectors, rounds=4)
    assert times == dict(a=[2000, 3000, 1000, 2000], b=[250] * 4)
    turns = [sorted(clock.calls[at : at + 2]) for at in range(0, 10, 2)]
    assert turns == [['a', 'b']] * 5
    assert clock.calls[0::2] != ['a'] * 5, 'nobody is always first'


def deployed(times, **facts):
    facts = (
        dict(
            name='x.py',
            weights=None,
            parameters=10**6,
            gflops=1.5,
            size=(64, 96),
        )
        | facts
    )
    return Deployed(milliseconds=times, **facts)


def test_the_slower_figure_holds_for_nine_of_ten_images():
    one = deployed([10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    assert (one.median, one.slow) == (5.5, 9.0)
    assert one.fits(9.0)
    assert not one.fits(8.9), 'a median below the budget is not enough'
    assert deployed([3.0]).slow == 3.0


def test_the_wider_detector_takes_longer():
    torch.manual_seed(0)
    detectors = {
        name: (tiny.build(tiny.retinanet(base=base)), [noise((128, 128))])
        for name, base in dict(narrow=8, wide=48).items()
    }
    taken = latency(detectors, rounds=3)
    assert 0 < sorted(taken['narrow'])[1] < sorted(taken['wide'])[1]


# The command -----------------------------------------------------------------


@pytest.fixture
def files(data, tmp_path, monkeypatch, teacher_file):
    """Configs of a student, of its distillation and of a teacher."""
    monkeypatch.chdir(tmp_path)
    small, big = tiny.retinanet(), tiny.retinanet(base=16)
    loader = dict(dataset=runs.dataset(data) | dict(test_mode=True))
    loader['dataset']['pipeline'] = runs.TEST_PIPELINE
    teachers = dict(
        big=dict(config=dict(model=big), checkpoint=str(teacher_file))
    )
    models = dict(
        plain=small, big=big, distil=tiny.distilled(small, teachers, {})
    )
    for name, model in models.items():
        config = Config(dict(model=model, test_dataloader=loader))
        config.dump(f'{name}.py')
    Config(dict(model=small)).dump('bare.py')
    tiny.save_teacher(small, tmp_path / 'plain.pth')
    return tmp_path


def lines(capsys):
    said = capsys.readouterr().out.splitlines()
    return [line.strip('| ').split(' | ') for line in said]


def test_students_are_timed_without_their_teachers(files, capsys):
    words = ['plain.py', 'distil.py', 'big.py', '--rounds', '2']
    assert main([*words, '--json', 'out.json']) == 0
    rows = lines(capsys)
    assert [row[0] for row in rows[2:5]] == ['plain.py', 'distil.py', 'big.py']
    assert rows[2][1:3] == rows[3][1:3] != rows[4][1:3]
    kept = json.loads((files / 'out.json').read_text())
    plain = tiny.build(tiny.retinanet())
    count = sum(one.numel() for one in plain.parameters())
    assert kept[0]['parameters'] == kept[1]['parameters'] == count
    assert kept[0]['size'] == [64, 64]
    assert len(kept[2]['milliseconds']) == 2


def test_a_budget_that_nobody_keeps_is_the_status(files, capsys):
    words = ['plain.py', 'big.py', '--rounds', '1', '--budget']
    assert main([*words, '1e6']) == 0
    rows = lines(capsys)
    assert rows[0][-1] == 'within 1e+06 ms'
    assert [row[-1] for row in rows[2:4]] == ['yes', 'yes']
    assert main([*words, '1e-6']) == 2
    assert [row[-1] for row in lines(capsys)[2:4]] == ['no', 'no']


def test_weights_are_its_own(files, capsys):
    words = ['--rounds', '1', '--size', '64', '96']
    assert main(['bare.py=plain.pth', *words]) == 0
    said = capsys.readouterr().out
    assert '64×96 (height×width, noise)' in said
    assert 'random weights' not in said
    assert main(['bare.py', *words]) == 0
    assert 'random weights' in capsys.readouterr().out
    assert main(['big.py=plain.pth', *words]) == 1
    assert 'plain.pth does not fit RetinaNet' in capsys.readouterr().err
    assert main(['bare.py=gone.pth', *words]) == 1
    assert 'gone.pth' in capsys.readouterr().err


def test_what_is_missing_says_what_to_type(files, capsys):
    assert main(['bare.py']) == 1
    assert 'no test_dataloader' in capsys.readouterr().err
    config = Config.fromfile('plain.py')
    config.test_dataloader.dataset.ann_file = 'gone.json'
    config.dump('gone.py')
    assert main(['gone.py']) == 1
    assert '--size HEIGHT WIDTH' in capsys.readouterr().err
    for words, said in (
        (['--rounds', '0'], 'rounds > 0'),
        (['--size', '0', '64'], 'height > 0'),
        (['--budget', '-1'], 'budget > 0'),
    ):
        assert main(['plain.py', *words]) == 1
        assert said in capsys.readouterr().err


def test_images_come_from_all_over_the_set(files):
    images = images_of(Config.fromfile('plain.py'), 3)
    names = [one['data_samples'][0].img_path[-7:] for one in images]
    assert names == ['001.png', '003.png', '005.png']
    assert images[0]['inputs'][0].shape == (3, 64, 64)

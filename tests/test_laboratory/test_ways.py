"""The ways a teacher can run: what each of them runs, and what is told."""

import json
from dataclasses import replace

import pytest
import runs
import tiny
import torch
from mmengine.registry import init_default_scope

from mmkd.laboratory import ways as module
from mmkd.laboratory.benchmark import WAYS, Settings, main, page
from mmkd.laboratory.ways import FAST, WHOLE, Ways, measure_ways

SETTINGS = Settings(
    blocks=2,
    steps=1,
    warm_up=1,
    batches=1,
    random_weights=True,
    boxes=2.0,
    size=(64, 64),
)
TAPS, FOLDED, HALF = FAST


@pytest.fixture
def config(tmp_path):
    init_default_scope('mmdet')
    model = tiny.distilled(
        tiny.retinanet(),
        dict(big=dict(config=dict(model=tiny.retinanet(base=16)))),
        dict(
            pkd=dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                loss=dict(type='mmkd.PKDLoss'),
            )
        ),
    )
    return runs.config(tmp_path, tmp_path / 'run', epochs=1, model=model)


def test_each_way_runs_what_it_says(config, monkeypatch):
    seen = {}

    def noted(config, settings, fast):
        arm = plain(config, settings, fast)
        teacher = arm.model.teachers['big']
        for name in ('backbone', 'neck', 'bbox_head.retina_cls'):
            teacher.detector.get_submodule(name).register_forward_pre_hook(
                lambda part, given, name=name: seen[str(fast)][0].append(name)
            )
        seen[str(fast)] = [], teacher
        return arm

    plain = module._arm
    monkeypatch.setattr(module, '_arm', noted)
    found = measure_ways(config, SETTINGS, 'one', {})
    assert list(found.ways) == [WHOLE, TAPS, FOLDED, HALF]
    assert all(len(one) == SETTINGS.blocks for one in found.ways.values())
    called, teacher = seen['False']
    passes = SETTINGS.warm_up + SETTINGS.blocks * SETTINGS.steps
    assert teacher.fast is None
    # With its head once a pass of the whole, never on the way to the taps.
    assert called.count('backbone') == called.count('neck') == 2 * passes
    levels = config.model.neck.num_outs
    assert called.count('bbox_head.retina_cls') == passes * levels
    for way, precision in ((FOLDED, 'fp32'), (HALF, 'bf16')):
        called, teacher = seen[str(FAST[way])]
        assert teacher.fast.speed.precision == precision
        assert teacher.fast.speed.fuse_bn
        # The copy, and once the teacher that it is compared with.
        assert called.count('backbone') == passes + 1
        assert called.count('bbox_head.retina_cls') == 0


def test_a_way_that_says_something_else_is_told(config, monkeypatch):
    assert not measure_ways(config, SETTINGS, 'one', {}).notes
    narrow = dict(FAST[HALF], tolerance=1e-9)
    monkeypatch.setitem(FAST, HALF, narrow)
    found = measure_ways(config, SETTINGS, 'one', {})
    assert 'differs' in found.notes[HALF]
    assert 'differs' in found.report().splitlines()[-1]


def test_shares_are_of_the_whole_by_medians():
    found = Ways(
        'one',
        {
            WHOLE: [4.0, 4.0, 9.0],
            TAPS: [2.0, 9.0, 2.0],
            FOLDED: [1.0, 1.0, 1.0],
            HALF: [1.0, 3.0, 3.0],
        },
        {HALF: '(told)'},
        {},
    )
    assert found.row() == '| one | 4000 | 0.50 | 0.25 | 0.75 (told) |'


def test_the_command_adds_them_to_the_page(config, tmp_path, capsys):
    path = tmp_path / 'taught.py'
    config.dump(path)
    words = f'{path} --out {tmp_path} --ways --synthetic 2 --size 64 64'
    words += ' --random-weights --device cpu --batches 1'
    words += ' --blocks 1 --steps 1 --warm-up 1'
    assert main(words.split()) == 0
    assert TAPS in capsys.readouterr().out
    kept = json.loads((tmp_path / f'taught{WAYS}').read_text())
    assert kept['ways'].keys() == {WHOLE, *FAST}
    text = page(tmp_path)
    assert text.count('| taught |') == 2
    assert f'| {TAPS} |' in text


def test_a_fast_copy_that_was_not_taken_says_so(config):
    arm = module._arm(config, SETTINGS, dict(precision='bf16'))
    teacher = arm.model.teachers['big']
    images, samples = tiny.batch()
    assert teacher.fast is None
    with torch.no_grad():
        teacher.run(images, samples, teacher.pixels)
    assert not teacher.fast.fell_back
    teacher.fast._chosen = replace(teacher.fast.speed, precision='fp32')
    assert teacher.fast.fell_back

"""A repeat of the first steps finds what changed code changes."""

import json
import sys

import pytest

from mmkd.laboratory import runs
from mmkd.laboratory.runs import Run
from mmkd.laboratory.verify import (
    RECORD,
    by_code_alone,
    records,
    verify,
)

#: Writes a log of ten steps and a checkpoint, or the test's detections.
TRAINING = """
import json, pathlib, sys, time
verb, config, *rest = sys.argv[1:]
folder = pathlib.Path(rest[rest.index('--work-dir') + 1])
if verb == 'train':
    log = folder / '20260101_000000' / 'vis_data'
    log.mkdir(parents=True)
    with (log / 'scalars.json').open('w') as file:
        for step in range(1, 11):
            line = dict(iter=step, step=step, loss=LOSS, time=time.time())
            file.write(json.dumps(line) + chr(10))
            file.flush()
    (folder / 'iter_600.pth').write_bytes(b'weights')
else:
    folder.mkdir(exist_ok=True)
    (folder / 'predictions.bbox.json').write_text('DETECTIONS')
"""


@pytest.fixture
def code(monkeypatch):
    """Sets what "the code" computes."""

    def set_code(loss='1 / step', detections='[]'):
        program = TRAINING.replace('LOSS', loss)
        program = program.replace('DETECTIONS', detections)
        monkeypatch.setattr(runs, 'COMMAND', [sys.executable, '-c', program])

    return set_code


@pytest.fixture
def arm(tmp_path, monkeypatch, code):
    """Finished runs of two seeds, made by code 'old'."""
    config = tmp_path / 'config.py'
    config.write_text('train_cfg = dict(max_iters=600)\nmodel = dict()\n')
    code()
    made = [
        Run(f'pkd, seed {seed}', config, tmp_path / f'seed{seed}')
        for seed in (0, 1)
    ]
    for run in made:
        run.keys = dict(code='old', data='same')
        runs.carry_out([run], cores=1)
        assert run.done
        run.keys = dict(code='new', data='same')
        assert run.stale
    return made


def test_code_that_trains_alike_keeps_its_results(arm):
    assert verify(arm, steps=8) is None
    assert all(run.done for run in arm)
    expected = [dict(before='old', after='new', steps=8, of=600)]
    assert records(arm) == expected
    assert not list(arm[0].folder.parent.glob('*again*'))


def test_the_first_other_number_is_named_and_results_stay_stale(arm, code):
    code(loss='1 / step if step < 7 else 0.5')
    found = verify(arm, steps=10)
    assert found == (f'pkd, seed 0: at step 7, loss was {1 / 7} and is 0.5')
    assert all(run.stale for run in arm)
    assert records(arm) == []


def test_a_new_entry_of_the_log_is_a_difference(arm, code):
    code(loss='1 / step, loss_kd=step')
    assert 'loss_kd was None and is 1' in verify(arm, steps=5)


def test_other_detections_are_a_difference(arm, code):
    code(detections='[1]')
    assert 'gives other detections' in verify(arm, steps=5)
    assert all(run.stale for run in arm)


def test_a_repeat_that_fails_says_so(arm, monkeypatch):
    program = 'raise SystemExit("no memory left")'
    monkeypatch.setattr(runs, 'COMMAND', [sys.executable, '-c', program])
    assert 'no memory left' in verify(arm, steps=5)


def test_only_the_code_may_have_changed(arm):
    for run in arm:
        run.keys = dict(code='new', data='other')
    with pytest.raises(ValueError, match='with other code and data'):
        verify(arm, steps=5)


def test_there_must_be_something_to_verify(arm):
    for run in arm:
        run.keys = dict(code='old', data='same')
    with pytest.raises(ValueError, match='nothing has changed'):
        verify(arm, steps=5)


def test_a_run_without_a_result_cannot_be_accepted(arm):
    arm[0].predictions.unlink()
    assert not by_code_alone(arm[0])
    assert verify(arm, steps=5) is None
    assert [run.done for run in arm] == [False, True]


def test_later_code_is_added_to_the_record(arm):
    verify(arm, steps=5)
    for run in arm:
        run.keys = dict(code='newer', data='same')
    verify(arm, steps=9)
    assert [one['after'] for one in records(arm)] == ['new', 'newer']
    assert json.loads((arm[1].folder / RECORD).read_text())[1]['steps'] == 9


def test_some_steps_must_be_repeated(arm):
    with pytest.raises(ValueError, match='steps > 0'):
        verify(arm, steps=0)

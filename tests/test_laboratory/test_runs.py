import json
import sys
import time
from pathlib import Path

import pytest
import torch

from mmkd.compat.checkpoint import trusting
from mmkd.laboratory import runs
from mmkd.laboratory.runs import (
    DONE,
    FAILED,
    MISSING,
    STAMP,
    TIMED_OUT,
    Run,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return Run(
        'student alone',
        ROOT / 'demo' / 'configs' / 'student.py',
        tmp_path / 'alone',
        guess=0.5,
    )


def finish(run):
    """What a run leaves behind that went well."""
    run.predictions.parent.mkdir(parents=True, exist_ok=True)
    run.final.write_bytes(b'weights')
    run.predictions.write_text('[]')


def words(monkeypatch, program):
    """Run a program of Python's instead of a training."""
    monkeypatch.setattr(runs, 'COMMAND', [sys.executable, '-c', program])


def write_log(run, *lines):
    folder = run.folder / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(json.dumps(line) for line in lines)
    (folder / 'scalars.json').write_text(text + '\n{"iter": 3, "lo')


def test_before_the_first_log_the_guess_tells_the_time(run):
    assert run.position() == (0, 0.5 * run.iterations)


def test_a_stale_run_begins_anew_at_its_old_pace(run):
    write_log(run, dict(iter=run.iterations, loss=1.0, time=0.25))
    run.sign()
    assert run.position() == (run.iterations, 0.0)
    (run.folder / STAMP).write_text('{"settings": "other"}')
    assert run.position() == (0, 0.25 * run.iterations)


def test_what_is_started_trusts_the_same_files(run, tmp_path, monkeypatch):
    legacy = tmp_path / 'old.pth'
    torch.save(dict(weight=torch.ones(1)), legacy)
    words(monkeypatch, 'import sys; print(sys.argv)')
    with trusting(legacy):
        run.start()
    while run.poll():
        time.sleep(0.01)
    said = (run.folder / 'output.txt').read_text()
    assert f"'--resume', '--trust-checkpoint', '{legacy}']" in said


def test_position_follows_the_log_and_its_unfinished_line(run):
    write_log(
        run,
        dict(iter=10, step=10, loss=2.0, time=0.25),
        dict(iter=20, step=20, loss=1.0, time=0.25),
    )
    run.sign()
    assert run.position() == (20, 0.25 * (run.iterations - 20))


def test_curve_is_in_percent_at_the_iteration(run):
    write_log(
        run,
        dict(iter=100, step=100, loss=2.0, time=0.25),
        {'coco/bbox_mAP': 0.125, 'step': 0},
    )
    assert run.curve() == [(100, 12.5)]


def test_time_is_that_of_the_steps(run):
    write_log(
        run,
        dict(iter=10, step=10, loss=2.0, time=0.5),
        dict(iter=20, step=20, loss=1.0, time=0.25),
    )
    assert run.seconds() == 10 * 0.5 + 10 * 0.25


def test_a_run_is_done_only_with_its_own_settings(run):
    finish(run)
    assert not run.done, 'nobody knows what made them'
    run.sign()
    assert run.done
    run.options = ('randomness.seed=1',)
    assert not run.done
    assert run.stale


def test_other_code_makes_a_result_stale(run):
    run.keys = dict(code='1', data='2')
    finish(run)
    run.sign()
    assert run.done
    run.keys = dict(code='3', data='2')
    assert run.stale


def test_what_has_changed_is_told(run):
    run.keys = dict(code='1', train='2', teacher='3')
    finish(run)
    assert run.why_stale().startswith('nothing says')
    run.sign()
    assert run.changed() == []
    run.keys = dict(code='1', train='4', test='5')
    assert run.changed() == ['teacher', 'test', 'train']
    assert run.why_stale() == (
        'it was made with other weights of the teacher and test data and '
        'training data'
    )
    run.keys = dict(code='1', train='2', teacher='3')
    run.options = ('randomness.seed=1',)
    assert run.why_stale() == 'it was made with other settings'


def test_results_of_other_settings_are_kept_aside(run, monkeypatch):
    finish(run)
    (run.folder / STAMP).write_text('{"settings": "other"}')
    words(monkeypatch, '')
    run.start()
    run._process.wait()
    aside = Path(f'{run.folder}-1')
    assert (aside / run.final.name).read_bytes() == b'weights'
    assert not run.final.exists()


def test_a_training_that_fails_ends_in_its_own_words(run, monkeypatch):
    words(monkeypatch, 'raise SystemExit("no memory left")')
    runs.carry_out([run], cores=1)
    assert run.status == FAILED
    assert 'no memory left' in run.reason


def test_a_run_that_hangs_is_ended_and_said_to_be(run, monkeypatch):
    words(monkeypatch, 'import time; time.sleep(60)')
    run.timeout = 0.1
    runs.carry_out([run], cores=1)
    assert run.status == TIMED_OUT


def test_training_then_test_then_done(run, monkeypatch, capsys):
    """The program writes what its verb is to give."""
    words(
        monkeypatch,
        'import pathlib, sys; verb, config, *rest = sys.argv[1:];\n'
        'folder = pathlib.Path(rest[rest.index("--work-dir") + 1])\n'
        'if verb == "train":\n'
        '    (folder / "iter_600.pth").write_bytes(b"weights")\n'
        'else:\n'
        '    folder.mkdir()\n'
        '    (folder / "predictions.bbox.json").write_text("[]")\n',
    )
    ended = []
    runs.carry_out([run], cores=1, ended=ended.append)
    assert ended == [run]
    assert run.status == DONE
    assert 'alone: trained and tested in 0.0 min' in capsys.readouterr().out
    again = Run(run.name, run.config, run.folder)
    words(monkeypatch, 'raise SystemExit("started again")')
    runs.carry_out([again], cores=1)
    assert again.status == DONE


def test_given_weights_are_tested_and_not_said_to_be_trained(
    run, tmp_path, monkeypatch, capsys
):
    words(
        monkeypatch,
        'import pathlib, sys; verb, config, weights, *rest = sys.argv[1:]\n'
        'folder = pathlib.Path(rest[rest.index("--work-dir") + 1])\n'
        'folder.mkdir()\n'
        '(folder / "predictions.bbox.json").write_text("[]")\n'
        'raise SystemExit(verb != "test")',
    )
    weights = tmp_path / 'weights.pth'
    weights.write_bytes(b'weights')
    given = Run('teacher', run.config, run.folder, weights=weights)
    assert given.position() == (given.iterations, 0.0)
    runs.carry_out([given], cores=1)
    assert given.status == DONE
    assert 'teacher: tested in 0.0 min' in capsys.readouterr().out


def test_what_needs_a_failed_run_is_missing_and_says_why(run, monkeypatch):
    words(monkeypatch, 'raise SystemExit(1)')
    later = Run('distilled', run.config, run.folder / 'later', needs=(run,))
    runs.carry_out([run, later], cores=2)
    assert later.status == MISSING
    assert later.reason == 'student alone is not done'
    assert not later.folder.exists()


def test_nothing_starts_beyond_the_budget(run, monkeypatch):
    words(monkeypatch, 'raise SystemExit("started")')
    runs.carry_out([run], cores=1, budget=-1)
    assert run.status == MISSING
    assert not run.folder.exists()

"""The quick start's bookkeeping, and its configs; `make demo` is the rest."""

import json
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'demo'))
    sys.modules.pop('runs', None)  # tests have a module of that name
    import runs

    yield runs
    sys.modules.pop('runs', None)


@pytest.fixture
def run(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return runs.Run(
        'student alone',
        ROOT / 'demo' / 'configs' / 'student.py',
        tmp_path / 'alone',
        guess=0.5,
    )


def write_log(run, *lines):
    folder = run.folder / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(json.dumps(line) for line in lines)
    (folder / 'scalars.json').write_text(text + '\n{"iter": 3, "lo')


def test_student_and_distilled_differ_in_the_model_alone():
    folder = ROOT / 'demo' / 'configs'
    alone = Config.fromfile(folder / 'student.py').to_dict()
    distilled = Config.fromfile(folder / 'distilled.py').to_dict()
    one, other = alone.pop('model'), distilled.pop('model')
    assert alone == distilled
    assert other.pop('student') == one['type']
    del other['teachers'], other['terms'], other['type'], one['type']
    assert one == other


def test_before_the_first_log_the_guess_tells_the_time(run):
    assert run.position() == (0, 0.5 * run.iterations)


def test_position_follows_the_log_and_its_unfinished_line(run):
    write_log(
        run,
        dict(iter=10, step=10, loss=2.0, time=0.25),
        dict(iter=20, step=20, loss=1.0, time=0.25),
    )
    assert run.position() == (20, 0.25 * (run.iterations - 20))


def test_curve_is_in_percent_at_the_iteration(run):
    write_log(
        run,
        dict(iter=100, step=100, loss=2.0, time=0.25),
        {'coco/bbox_mAP': 0.125, 'step': 0},
    )
    assert run.curve() == [(100, 12.5)]


def test_a_run_is_done_only_with_its_own_settings(run):
    run.folder.mkdir()
    run.final.write_bytes(b'weights')
    assert not run.done, 'nobody knows what made them'
    (run.folder / 'fingerprint').write_text(run.fingerprint())
    assert run.done
    run.options = ('randomness.seed=1',)
    assert not run.done


def test_results_of_other_settings_are_kept_aside(run, monkeypatch, runs):
    run.folder.mkdir()
    run.final.write_bytes(b'weights')
    (run.folder / 'fingerprint').write_text('other settings')
    monkeypatch.setattr(runs, 'TRAIN', [sys.executable, '-c', ''])
    run.start(threads=1)
    run._process.wait()
    aside = Path(f'{run.folder}-1')
    assert (aside / run.final.name).read_bytes() == b'weights'
    assert not run.final.exists()


def test_a_training_that_fails_ends_in_its_own_words(run, monkeypatch, runs):
    words = [sys.executable, '-c', 'raise SystemExit("no memory left")']
    monkeypatch.setattr(runs, 'TRAIN', words)
    run.start(threads=1)
    run._process.wait()
    with pytest.raises(RuntimeError, match='no memory left'):
        run.poll()

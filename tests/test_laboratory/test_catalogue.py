"""The command that trains every tiny config: its verdicts and its page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmkd.laboratory import catalogue
from mmkd.laboratory.catalogue import (
    FAILED,
    NOT_RUN,
    PASSED,
    SECONDS,
    Finding,
    Outcome,
    Training,
    Trial,
    main,
    page,
    rising,
    sample,
    shares,
    tiny_configs,
)
from mmkd.laboratory.runs import DONE, STAMP

ROOT = Path(__file__).parents[2]


def lines(**series):
    """A log whose keys take these values, one line a step."""
    return [
        dict(zip(series, values), loss=1.0, iter=step)
        for step, values in enumerate(zip(*series.values()), 1)
    ]


# The sample ------------------------------------------------------------------

PATHS = [Path(f'configs/m/tiny/m{number}_tiny.py') for number in range(20)]


def test_sample_depends_on_the_key_alone():
    assert sample(PATHS, 'one', 3) == sample(reversed(PATHS), 'one', 3)
    assert len(set(sample(PATHS, 'one', 3))) == 3


def test_every_config_has_its_turn():
    seen = {path for key in range(200) for path in sample(PATHS, str(key))}
    assert seen == set(PATHS)


def test_configs_are_found_below_the_root_and_bases_are_none(tmp_path):
    for name in ('b/tiny/b_tiny.py', 'a/tiny/a_tiny.py', '_base_/tiny/gfl.py'):
        path = tmp_path / 'configs' / name
        path.parent.mkdir(parents=True)
        path.touch()
    found = [path.name for path in tiny_configs(tmp_path)]
    assert found == ['a_tiny.py', 'b_tiny.py']


def test_another_folder_than_the_root_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='in the root of the repos'):
        tiny_configs(tmp_path)


# The log ---------------------------------------------------------------------


def test_first_and_last_quarter_are_means():
    log = lines(loss_kd_at=(8.0, 6.0, 5.0, 5.0, 5.0, 5.0, 1.0, 2.0))
    assert Outcome.of(log, 1.0).shares == {'at': (7.0, 1.5)}


def test_a_quarter_of_few_values_is_one_value():
    for values in ((8.0, 6.0, 5.0), (8.0, 7.0, 7.0, 6.0, 6.0, 5.0)):
        log = lines(loss_kd_at=values)
        assert Outcome.of(log, 1.0).shares == {'at': (8.0, 5.0)}


def test_steps_in_which_a_share_was_idle_do_not_count():
    log = lines(loss_kd_at=(0.0, 0.0, 8.0, 6.0, 4.0, 2.0))
    assert Outcome.of(log, 1.0).shares == {'at': (8.0, 2.0)}


def test_only_shares_of_terms_are_looked_at():
    log = lines(loss_cls=(1.0, 2.0), kd_at_peak=(1.0, 2.0))
    assert Outcome.of(log, 1.0).shares == {}


@pytest.mark.parametrize('broken', [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_seen_anywhere(broken):
    log = lines(loss_kd_at=(2.0, 1.0), grad_norm=(1.0, broken))
    outcome = Outcome.of(log, 1.0)
    assert outcome.problems(['at']) == ['a number is not finite']
    assert Outcome.of(lines(loss_kd_at=(2.0, 1.0)), 1.0).finite


def test_weights_by_gradient_are_divided_out():
    log = lines(
        loss_kd_my_both_at_x=(2.0, 3.0),
        kd_my_both_weight_at_x=(1.0, 6.0),
        loss_kd_cwd=(2.0, 3.0),
    )
    outcome = Outcome.of(log, 1.0)
    assert outcome.shares == {'my_both_at_x': (2.0, 0.5), 'cwd': (2.0, 3.0)}


def test_a_part_is_divided_by_the_weight_of_its_term():
    log = lines(
        loss_kd_both_fgd_relation=(2.0, 3.0), kd_both_weight_fgd=(1.0, 6.0)
    )
    assert Outcome.of(log, 1.0).shares == {'both_fgd_relation': (2.0, 0.5)}


def test_the_whole_loss_is_looked_at_where_there_is_no_term():
    log = lines(loss_cls=(1.0, 2.0))
    log[0]['loss'] = 3.0
    assert Outcome.of(log, 1.0, ['loss']).shares == {'loss': (3.0, 1.0)}
    assert Outcome.of(log, 1.0, ['at']).shares == {}


# The verdict -----------------------------------------------------------------


def outcome(seconds=1.0, **found):
    return Outcome(found, True, seconds)


def test_what_falls_is_logged_and_is_quick_has_no_problem():
    assert outcome(at=(2.0, 1.0)).problems(['at']) == []


def test_a_part_speaks_for_its_term_and_a_like_name_does_not():
    good = outcome(fgd_relation=(2.0, 1.0), att=(2.0, 1.0))
    assert good.problems(['fgd', 'att']) == []
    assert good.problems(['fgd', 'at']) == ['at is not logged']


@pytest.mark.parametrize('last', [2.0, 3.0, math.nan])
def test_what_does_not_fall_is_a_problem(last):
    found = outcome(at=(2.0, last)).problems(['at'])
    assert found == ['at does not fall']


def test_what_begins_at_0_may_rise_but_must_be_there():
    found = outcome(one_distil=(0.1, 2.0), one_task=(2.0, 1.0))
    assert found.problems(['one'], ['one_distil']) == []
    assert found.problems(['one']) == ['one_distil does not fall']
    negative = outcome(one_distil=(-0.1, 2.0), one_task=(2.0, 1.0))
    said = negative.problems(['one'], ['one_distil'])
    assert said == ['one_distil is not above 0']
    missing = outcome(one_task=(2.0, 1.0)).problems(['one'], ['one_distil'])
    assert missing == ['one_distil is not logged']
    peers = outcome(p2p_b_teacher=(0.1, 2.0), p2p_b_task=(2.0, 1.0))
    assert peers.problems(['p2p'], ['p2p_*_teacher']) == []


def test_terms_say_which_of_their_parts_begin_at_0():
    one, at = dict(type='mmkd.OneTerm'), dict(type='mmkd.FeatureTerm')
    terms = dict(a=at, b=dict(type='mmkd.BalancedTerm', terms=dict(c=one)))
    assert rising(terms) == ['b_c_distil']


def test_a_minute_is_too_long():
    found = outcome(SECONDS, at=(2.0, 1.0)).problems(['at'])
    assert found == ['longer than 60 s']
    assert outcome(SECONDS - 1, at=(2.0, 1.0)).problems(['at']) == []


def finding(problems=(), complete=True, outcomes=(), name='at'):
    path = Path(f'configs/{name}/tiny/{name}_tiny.py')
    return Finding(path, outcomes, problems, complete)


def test_a_problem_outweighs_all_else():
    assert finding().verdict == PASSED
    assert finding(complete=False).verdict == NOT_RUN
    assert finding(['x'], complete=False).verdict == FAILED


def test_shares_of_groups_are_named_through_them():
    terms = dict(a=dict(terms=dict(b=dict(terms=dict(c={})), d={})), e={})
    assert shares(terms) == ['a_b_c', 'a_d', 'e']


# The page --------------------------------------------------------------------


def test_page_shows_means_the_slowest_seed_and_every_failure():
    text = page(
        [
            finding(
                outcomes=[
                    outcome(3.0, at_x=(2.0, 1.0), at_y=(9.0, 8.0)),
                    outcome(7.4, at_x=(4.0, 2.0)),
                ]
            ),
            finding(['x does not fall', 'y is not logged'], name='bad'),
            finding(complete=False, name='new'),
        ],
        [0, 1],
    )
    rows = [line for line in text.splitlines() if line.startswith('| ')][1:]
    assert rows == [
        '| [at_tiny](../configs/at/tiny/at_tiny.py) | at_x | 3 | 1.5 | 7 '
        '| passed |',
        '|  | at_y | 9 | 8 |  |  |',
        '| [bad_tiny](../configs/bad/tiny/bad_tiny.py) | | | | '
        '| FAILED: x does not fall, y is not logged |',
        '| [new_tiny](../configs/new/tiny/new_tiny.py) | | | | | not run |',
    ]
    assert '3 configs: 1 passed, 1 FAILED, 1 not run.' in text
    assert '1 configs: 1 passed.' in page([finding()], [0])
    marked = Finding(PATHS[0], [outcome(one_x=(1, 2))], [], True, ['one_x'])
    assert '| one_x (from 0) | 1 | 2 |' in page([marked], [0])
    assert 'over seeds 0, 1' in text
    assert 'torch 2' in text


def test_page_has_no_date():
    assert not re.search(r'20\d\d-|\d\d:\d\d', page([finding()], [0]))


# The trainings ---------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one tiny config whose trainings take six steps."""
    base = tmp_path / 'configs' / '_base_'
    shutil.copytree(ROOT / 'configs' / '_base_', base)
    for path in (base / 'tiny').glob('*.py'):
        text = path.read_text().replace('640', '6').replace('160', '6')
        path.write_text(text.replace('interval=5', 'interval=1'))
    source = ROOT / 'configs' / 'mimic' / 'tiny' / 'mimic_tiny.py'
    target = tmp_path / source.relative_to(ROOT)
    target.parent.mkdir(parents=True)
    shutil.copyfile(source, target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        catalogue.TINY, 'counts', {'train': 16, 'val': 0, 'test': 1}
    )
    return tmp_path


def test_a_teacher_that_ends_elsewhere_is_refused(root):
    base = root / 'configs' / '_base_' / 'tiny' / 'gfl_teacher.py'
    base.write_text(base.read_text().replace('max_iters=6', 'max_iters=7'))
    (path,) = tiny_configs(root)
    with pytest.raises(ValueError, match=r'ends with .*iter_7\.pth'):
        Trial(path, root / 'work', [0])


def test_a_misspelt_name_is_answered(root, capsys):
    assert main(['mimc_tiny']) == 1
    assert "Did you mean 'mimic_tiny'?" in capsys.readouterr().err


def test_a_training_is_done_with_its_last_checkpoint(root):
    (path,) = tiny_configs(root)
    run = Training('x', path, root / 'run')
    run.folder.mkdir()
    run.final.touch()
    assert not run.done
    run.sign()
    assert run.done
    command = [sys.executable, '-c', 'sum(range(10**7))']
    run._process, run._stage = subprocess.Popen(command), 'train'
    while run.poll():
        time.sleep(0.01)
    assert run.status == DONE
    assert not run.failed
    assert 0 < run.processor_seconds() < 60


def test_a_training_that_ends_without_its_checkpoint_has_failed(root):
    (path,) = tiny_configs(root)
    run = Training('x', path, root / 'run')
    run.folder.mkdir()
    (run.folder / 'output.txt').write_text('out of memory')
    run._process, run._stage = subprocess.Popen(['true']), 'train'
    while run.poll():
        time.sleep(0.01)
    assert run.status == 'failed'
    assert 'out of memory' in run.reason


def write_run(run, values):
    write_log(run, values)
    run.sign()


def write_log(run, values, key='loss_kd_mimic'):
    folder = run.folder / 'log' / 'vis_data'
    folder.mkdir(parents=True)
    log = lines(**{key: values})
    text = '\n'.join(map(json.dumps, log))
    (folder / 'scalars.json').write_text(text)


def finish(run):
    run.folder.mkdir(parents=True, exist_ok=True)
    run.sign()
    run.final.write_text('weights')
    (run.folder / 'processor').write_text('0.4')


@pytest.fixture
def trial(root):
    """The config's trial, its teacher trained."""
    catalogue.prepare_shapes(**catalogue.TINY, say=len)
    (path,) = tiny_configs('.')
    trial = Trial(path, Path('work'), [0, 1])
    for teacher in trial.teachers():
        finish(teacher)
    return trial


def test_no_student_is_trained_before_its_teacher(trial):
    assert len(trial.runs()) == 2
    trial.teachers()[0].final.unlink()
    assert trial.runs() == []
    assert trial.finding().verdict == NOT_RUN


def test_seeds_differ_and_another_teacher_is_another_training(trial):
    one, other = trial.runs()
    assert one.folder != other.folder
    assert one.fingerprint() != other.fingerprint()
    before = one.fingerprint()
    catalogue.file_digest.cache_clear()
    trial.teachers()[0].final.write_text('others')
    assert trial.runs()[0].fingerprint() != before


def test_all_seeds_must_be_done_and_each_must_fall(trial):
    runs = trial.runs()
    write_run(runs[0], [4.0, 3.0, 2.0, 1.0])
    finish(runs[0])
    assert trial.finding().verdict == NOT_RUN
    write_run(runs[1], [1.0, 2.0, 3.0, 4.0])
    finish(runs[1])
    found = trial.finding()
    assert found.verdict == FAILED
    assert found.problems == ['mimic does not fall']
    shutil.rmtree(runs[0].folder / 'log')
    write_log(runs[0], [1.0, 2.0])
    assert trial.finding().problems == ['mimic does not fall']
    assert [one.seconds for one in found.outcomes] == [0.4, 0.4]


def test_a_training_that_ended_badly_is_a_failure(trial):
    run = trial.runs()[0]
    write_run(run, [4.0, 3.0])
    run._end('failed', 'why')
    assert trial.finding().problems == ['a training stopped early']
    (run.folder / STAMP).write_text('{"settings": "other"}')
    assert trial.finding().verdict == NOT_RUN


def test_one_that_was_broken_off_or_begins_anew_is_none(trial, monkeypatch):
    run = trial.runs()[0]
    write_run(run, [4.0, 3.0])
    assert trial.finding().verdict == NOT_RUN
    run._end('failed', 'why')
    monkeypatch.setattr(Training, '_launch', lambda *stage: None)
    run.start()
    assert trial.finding().verdict == NOT_RUN


def test_a_training_of_other_code_says_nothing(trial):
    run = trial.runs()[0]
    write_run(run, [1.0, 2.0])
    (run.folder / STAMP).write_text('{"settings": "other"}')
    assert trial.finding().verdict == NOT_RUN


def test_report_only_trains_nothing_and_writes_the_page(trial, capsys):
    for run in trial.runs():
        write_run(run, [1.0, 2.0])
        finish(run)
    words = ['--report-only', '--work-dir', 'work', '--page', 'docs/tiny.md']
    assert main([*words, '--seeds', '0', '1']) == 1
    assert 'failed: mimic_tiny' in capsys.readouterr().err
    assert 'FAILED: mimic does not fall' in Path('docs/tiny.md').read_text()
    assert main([*words, '--seeds', '2']) == 0


def test_only_what_was_asked_for_fails_the_command(trial, root, capsys):
    for run in trial.runs():
        write_run(run, [1.0, 2.0])
        finish(run)
    path = root / 'configs' / 'new' / 'tiny' / 'new_tiny.py'
    path.parent.mkdir(parents=True)
    shutil.copyfile(trial.path, path)
    words = ['--report-only', '--work-dir', 'work', '--seeds', '0', '1']
    assert main(['new_tiny', *words]) == 0
    assert main(['new_tiny', 'mimic_tiny', *words]) == 1
    assert capsys.readouterr().err.endswith('failed: mimic_tiny\n')


def test_pictures_come_first_then_teachers_then_students(trial, monkeypatch):
    (teacher,) = trial.teachers()
    teacher.final.unlink()
    shutil.rmtree(catalogue.TINY['out'])
    begun = []

    def carry_out(runs, jobs, ended=None):
        begun.append([run.name for run in runs])
        for run in runs:
            finish(run)

    monkeypatch.setattr(catalogue, 'carry_out', carry_out)
    catalogue.train([trial, trial], jobs=1)
    students = ['mimic_tiny, seed 0', 'mimic_tiny, seed 1']
    assert begun == [['gfl'], students * 2]
    assert Path(catalogue.TINY['out'], 'train.json').is_file()


def test_a_teacher_that_fails_ends_the_command(trial, monkeypatch):
    (teacher,) = trial.teachers()
    teacher.final.unlink()
    monkeypatch.setattr(catalogue, 'carry_out', lambda *runs, **more: None)
    with pytest.raises(RuntimeError):
        catalogue.train([trial], jobs=1)


# What a teacher says before the training -------------------------------------

TOOL = """
import sys
from pathlib import Path

config, checkpoint, _, out = sys.argv[1:]
with Path(out).open('a') as file:
    print('asked', Path(checkpoint).read_text(), file=file)
if Path('broken').exists():
    sys.exit('out of ideas')
"""
ASKED = (
    'ask.py configs/_base_/tiny/gfl_teacher.py '
    'work_dirs/tiny/teachers/gfl/iter_6.pth --out'
)


@pytest.fixture
def told(trial, root):
    """A trial whose config distils nothing, and learns of what is asked."""
    (root / 'ask.py').write_text(TOOL)
    path = root / 'configs' / 'said' / 'tiny' / 'said_tiny.py'
    path.parent.mkdir(parents=True)
    path.write_text(
        f"_base_ = '../../_base_/tiny/gfl.py'\n"
        f"prepare = ['{ASKED} said', '{ASKED} said', '{ASKED} more']\n"
    )
    return Trial(path.relative_to(root), Path('work'), [0])


def test_commands_run_once_between_teachers_and_students(told, monkeypatch):
    (teacher,) = told.teachers()
    teacher.final.unlink()
    begun = []

    def carry_out(runs, jobs, ended=None):
        begun.extend((run.name, Path('said').exists()) for run in runs)
        for run in runs:
            finish(run)

    monkeypatch.setattr(catalogue, 'carry_out', carry_out)
    catalogue.train([told, told], jobs=1)
    assert begun == [('gfl', False), *2 * [('said_tiny, seed 0', True)]]
    assert Path('said').read_text() == 'asked weights\n'
    assert Path('more').exists()


def test_no_student_is_trained_before_all_is_said(told):
    assert told.runs() == []
    Path('said').write_text('x')
    assert told.runs() == []
    Path('more').mkdir()
    assert len(told.runs()) == 1


def test_what_is_said_otherwise_is_another_training(told):
    Path('said').write_text('x')
    Path('more').mkdir()
    seen = [told.runs()[0].fingerprint()]
    for place, text in (('said', 'y'), ('more/a', 'x'), ('more/a', 'y')):
        Path(place).write_text(text)
        seen.append(told.runs()[0].fingerprint())
    Path('more/a').rename('more/b')
    seen.append(told.runs()[0].fingerprint())
    assert len(set(seen)) == 5


def test_a_command_that_fails_is_shown_with_its_last_words(told):
    Path('broken').touch()
    with pytest.raises(RuntimeError) as error:
        catalogue.train([told], jobs=1)
    assert f'python {ASKED} said' in str(error.value)
    assert 'out of ideas' in str(error.value)


def test_a_command_that_writes_nothing_is_a_failure(told):
    Path('ask.py').write_text('')
    with pytest.raises(RuntimeError, match='There is no said'):
        catalogue.train([told], jobs=1)


@pytest.mark.parametrize(
    'prepare',
    ['a.py b c --out d', ['a.py b --out c'], ['a.py b c'], ['a.py b c --out']],
)
def test_commands_of_another_form_are_refused(told, prepare):
    text = told.path.read_text().partition('prepare')[0]
    told.path.write_text(f'{text}prepare = {prepare!r}\n')
    with pytest.raises(ValueError, match='TOOL CONFIG CHECKPOINT --out FILE'):
        Trial(told.path, Path('work'), [0])


def test_without_a_term_the_whole_loss_must_fall(told):
    Path('said').touch()
    Path('more').touch()
    (run,) = told.runs()
    finish(run)
    write_log(run, [1.0, 1.0], key='grad_norm')
    assert told.finding().problems == ['loss does not fall']


@pytest.mark.parametrize('part', ['code_digest', 'data_digest'])
def test_other_code_or_pictures_are_another_training(trial, monkeypatch, part):
    before = [run.fingerprint() for run in trial.runs()]
    other = dict(train='other') if part == 'data_digest' else 'other'
    monkeypatch.setattr(catalogue, part, lambda settings: other)
    teacher = trial.teachers()[0]
    finish(teacher)
    after = [run.fingerprint() for run in trial.runs()]
    assert not set(before) & set(after)


@pytest.mark.slow
def test_command_draws_trains_and_goes_on_from_where_it_was(root):
    words = ['--seeds', '0', '--jobs', '1', '--work-dir', 'work']
    main(words)
    text = catalogue.PAGE.read_text()
    assert '| mimic |' in text
    assert 'not run' not in text.split('configs:')[1]
    times = {path: path.stat().st_mtime for path in root.rglob('*.pth')}
    assert len(times) == 2
    main(words)
    assert {path: path.stat().st_mtime for path in times} == times

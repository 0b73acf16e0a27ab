import json
import os
import subprocess
import sys
import time
from signal import SIGINT, default_int_handler, pthread_kill, signal
from threading import Barrier, Semaphore, main_thread

import pytest
import runs
import tiny
import torch

from mmkd.compat.checkpoint import trusted_files, trusting
from mmkd.laboratory import compare
from mmkd.laboratory.runs import STAMP

data = runs.data


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    """Writes a plain training config of a few steps."""
    monkeypatch.chdir(tmp_path)

    def write(name, **model):
        cfg = runs.config(
            data,
            tmp_path,
            iters=2,
            model=tiny.retinanet(**model),
            **runs.evaluation(data, 'test'),
        )
        for key in ('work_dir', 'experiment_name', 'log_level'):
            cfg.pop(key)
        path = tmp_path / name
        path.write_text(cfg.pretty_text)
        return str(path)

    return write


def parse(*words):
    return compare._setting(compare._parser().parse_args(list(words)))


# Settings --------------------------------------------------------------------


def test_the_command_line_replaces_a_settings_file(tmp_path):
    path = tmp_path / 'quick.py'
    path.write_text(
        "laboratory = dict(student='s.py', teacher='t.py', labels=9,\n"
        "    seeds=(0, 1), methods=('pkd', 'fgd'))\n"
    )
    setting = parse(str(path), '--seeds', '4', '--methods', 'cwd')
    assert setting.seeds == [4]
    assert setting.methods == ['cwd']
    assert setting.labels == 9
    assert setting.arms == compare.ARMS


def test_a_students_config_is_a_setting_of_its_own(config):
    student = config('student.py')
    setting = parse(student, '--teacher', 'teacher.py')
    assert setting.student == student
    assert list(setting.methods) == ['default']


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], 'Name a setting'),
        (['STUDENT'], 'names no teacher'),
        (
            ['STUDENT', '--teacher', 't.py', '--methods', 'pkdd'],
            "Did you mean 'pkd'",
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--arms', 'shame'],
            "Did you mean 'sham'",
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--unlabelled', 'photographs'],
            'Add --arms alone time distilled sham unlabelled',
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--methods', 'pkd', 'pkd'],
            "calls the method pkd 'pkd', and the method pkd as well",
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--seeds', '0', '1', '0'],
            'got 0 twice in seeds=(0, 1, 0)',
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--seeds', '-1'],
            'whole numbers from 0, got seeds=[-1]',
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--share', '-0.5'],
            'got share=-0.5. 0 leaves it out',
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--timeout', '0'],
            'needs --timeout above 0, got 0.0',
        ),
        (
            ['STUDENT', '--teacher', 't.py', '--teacher-checkpoint', 'no.pth'],
            "compare.py expected a checkpoint at 'no.pth', got no such file",
        ),
        (['nowhere.py'], 'has no config file'),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    config, capsys, words, message
):
    student = config('student.py')
    words = [student if word == 'STUDENT' else word for word in words]
    assert compare.main(words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('file', 'other'),
    [('pkd.py', 'the method pkd'), ('teacher.py', 'what compare.py writes')],
)
def test_two_of_one_name_would_share_a_folder(
    config, tmp_path, capsys, file, other
):
    path = tmp_path / file
    path.write_text('')
    words = ['--teacher', 't.py', '--methods', 'pkd', str(path)]
    assert compare.main([config('student.py'), *words]) == 1
    said = capsys.readouterr().err
    assert f'calls the method {path} {path.stem!r}, and {other}' in said
    assert 'rename the file' in said


@pytest.mark.parametrize('seeds', ['6', '()', "'012'", '(0.5,)', '(True,)'])
def test_seeds_of_a_setting_are_a_list(tmp_path, capsys, seeds):
    path = tmp_path / 'quick.py'
    path.write_text(
        f"laboratory = dict(student='s.py', teacher='t.py', seeds={seeds})\n"
    )
    assert compare.main([str(path)]) == 1
    assert 'Write for instance seeds=(0, 1, 2)' in capsys.readouterr().err


def test_a_misspelt_key_of_a_setting_gets_the_nearest(tmp_path, capsys):
    path = tmp_path / 'quick.py'
    path.write_text("laboratory = dict(studnt='s.py')\n")
    assert compare.main([str(path)]) == 1
    assert "Did you mean 'student'" in capsys.readouterr().err


def test_two_commands_do_not_work_in_one_folder(tmp_path):
    (tmp_path / 'lock').write_text(str(os.getppid()))
    with (
        pytest.raises(RuntimeError, match=r'at work in .* --work-dir'),
        compare.sole_user(tmp_path),
    ):
        pass


def test_a_lock_that_was_left_behind_is_taken_over(tmp_path):
    done = subprocess.Popen([sys.executable, '-c', ''])
    done.wait()
    (tmp_path / 'lock').write_text(str(done.pid))
    with compare.sole_user(tmp_path):
        assert (tmp_path / 'lock').read_text() == str(os.getpid())
    assert not (tmp_path / 'lock').exists()


# Planning --------------------------------------------------------------------


@pytest.fixture
def comparison(config, tmp_path, monkeypatch):
    """A comparison whose teacher is a file and whose steps are not timed."""
    file = tiny.save_teacher(tiny.retinanet(base=16), tmp_path / 'teacher.pth')
    words = [config('student.py'), '--teacher', config('teacher.py', base=16)]
    words += ['--teacher-checkpoint', str(file), '--seeds', '0', '1']
    words += ['--methods', 'pkd', 'cwd', 'fgd']
    options = compare._parser().parse_args(words)
    monkeypatch.setattr(
        compare,
        'step_times',
        lambda arms: {
            name: [dict(pkd=1.21, cwd=1.28, fgd=1.6).get(name, 1.0)]
            for name in arms
        },
    )
    one = compare.Comparison(
        compare._setting(options), tmp_path / 'out', options, 'command'
    )
    return one


def test_what_does_not_fit_is_said_before_the_teacher_is_trained(
    comparison, monkeypatch
):
    def fail(*given, **named):
        raise AssertionError('trained')

    monkeypatch.setattr(compare, 'carry_out', fail)
    assert not comparison.teacher.done
    with pytest.raises(AssertionError, match='trained'):
        comparison.run()
    comparison.setting.methods = ['kd_detr']
    with pytest.raises(
        ValueError, match='kd_detr compares decoders of queries'
    ):
        comparison.run()


def test_the_teachers_level_is_of_the_images_of_the_curves(
    comparison, monkeypatch
):
    curve = []
    monkeypatch.setattr(compare.Run, 'curve', lambda run: curve)
    student, teacher = comparison.student, comparison.teacher.settings
    student.val_evaluator = teacher.val_evaluator = dict(ann_file='val.json')
    student.test_evaluator = dict(ann_file='val.json')
    assert comparison._validated(17.0) == 17.0
    student.test_evaluator = dict(ann_file='test.json')
    assert comparison._validated(17.0) is None  # a checkpoint that was given
    curve += [(1, 3.0), (2, 16.0)]
    assert comparison._validated(17.0) == 16.0
    teacher.val_evaluator = dict(ann_file='other.json')
    assert comparison._validated(17.0) is None


def test_more_labels_than_images_are_refused_at_once(comparison):
    setting = comparison.setting
    setting.labels = 1000
    with pytest.raises(ValueError, match=r'labels=1000 .* Ask for 1 to'):
        compare.Comparison(setting, comparison.folder, comparison.options, '')


def test_methods_of_like_cost_share_a_control(comparison):
    arms = comparison._trials().arms
    assert [arm.name for arm in arms] == [
        'alone',
        'alone_x1.30',
        'alone_x1.60',
        'pkd',
        'cwd',
        'fgd',
        'pkd_sham',
        'cwd_sham',
        'fgd_sham',
    ]
    assert arms[1].method == 'pkd,cwd'
    assert arms[1].settings.train_cfg.max_iters == 3  # 2.6
    assert arms[3].step_ratio == 1.21


def test_a_method_that_costs_nothing_is_compared_with_the_student_as_it_is(
    comparison, monkeypatch
):
    comparison.setting.methods = ['at', 'pkd']
    monkeypatch.setattr(
        compare,
        'step_times',
        lambda arms: {name: [1 + 0.2 * (name == 'pkd')] for name in arms},
    )
    trials = comparison._trials()
    names = ['alone', 'alone_x1.00', 'alone_x1.20', 'at', 'pkd']
    assert [arm.name for arm in trials.arms][:5] == names
    assert trials.arms[1].method == 'at'
    for seed in (0, 1):
        assert trials.runs['alone_x1.00', seed] is trials.runs['alone', seed]
    started = []
    monkeypatch.setattr(
        compare, 'carry_out', lambda runs, *how, **more: started.extend(runs)
    )
    monkeypatch.setattr(compare.Run, 'done', True)
    comparison.run()
    folders = [run.folder for run in started]
    assert len(set(folders)) == len(folders) == 1 + 2 * 6
    comparison.setting.arms = ['time', 'distilled']
    trials = comparison._trials()
    assert trials.runs['alone_x1.00', 0].folder.parent.name == 'alone_x1.00'


def test_every_run_has_a_config_of_its_own_that_builds(comparison):
    trials = comparison._trials()
    run = trials.runs['pkd_sham', 1]
    assert run.settings.randomness.seed == 1
    assert run.settings.model.teachers.teacher.sham
    model = tiny.build(run.settings.model)
    model.init_weights()
    assert model.teachers['teacher'].loaded


def test_a_shuffled_teacher_is_made_where_it_is_asked_for(comparison):
    comparison.setting.arms = ['alone', 'distilled', 'shuffled']
    trials = comparison._trials()
    assert 'pkd_shuffled' in [arm.name for arm in trials.arms]
    run = trials.runs['pkd_shuffled', 0]
    file = run.settings.model.teachers.teacher.checkpoint
    assert file != str(comparison.teacher.final)
    model = tiny.build(run.settings.model)
    model.init_weights()
    assert model.teachers['teacher'].loaded


def test_a_report_names_the_code_that_a_run_is_made_with(comparison):
    """That of the data set and sampler, too, which the labels bring."""
    comparison.setting.update(
        arms=['alone', 'unlabelled'], methods=['pkd'], labels=2
    )
    trials = comparison._trials()
    for name, settings in comparison._trained(trials).items():
        code = trials.runs[name, 0].keys['code']
        assert compare.code_digest(settings) == code
    unseeded = {arm.name: arm.settings for arm in trials.arms}
    assert compare.code_digest(unseeded['pkd_unlabelled']) != code


def test_images_without_labels_are_an_arm_where_it_is_asked_for(comparison):
    comparison.setting.arms = [*compare.ARMS, 'unlabelled']
    comparison.setting.methods = ['pkd']
    with pytest.raises(ValueError, match=r'--labels below \d+'):
        comparison._trials()
    comparison.setting.labels = 2
    trials = comparison._trials()
    assert [arm.name for arm in trials.arms] == [
        'alone',
        'alone_x1.00',  # of pkd_unlabelled, which is not timed here
        'alone_x1.30',
        'pkd',
        'pkd_unlabelled',
        'pkd_sham',
        'pkd_unlabelled_sham',
    ]
    for name in ('pkd_unlabelled', 'pkd_unlabelled_sham'):
        run = trials.runs[name, 0]
        assert run.settings.train_dataloader.dataset.type == 'ConcatDataset'
        shown_another = run.settings.model.teachers.teacher.sham
        assert shown_another == name.endswith('sham')
    comparison.setting.arms = ['alone', 'time', 'unlabelled', 'sham']
    trials = comparison._trials()
    assert [arm.name for arm in trials.arms] == [
        'alone',
        'alone_x1.00',  # and none as long as 'pkd' takes, which is not trained
        'pkd_unlabelled',
        'pkd_unlabelled_sham',
    ]


def test_photographs_of_a_folder_are_said_of_the_runs_that_see_them(
    comparison, tmp_path
):
    (tmp_path / 'a.png').write_bytes(b'12')
    comparison.setting.update(
        arms=['alone', 'unlabelled'],
        methods=['pkd'],
        unlabelled=str(tmp_path),
    )

    def keys():
        anew = type(comparison)(
            comparison.setting, comparison.folder, comparison.options, ''
        )
        runs = anew._trials().runs
        return [runs[one, 0].keys for one in ('alone', 'pkd_unlabelled')]

    before = keys()
    assert ['unlabelled' in one for one in before] == [False, True]
    (tmp_path / 'b.png').write_bytes(b'1')
    after = keys()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_the_teacher_keeps_what_it_said(comparison):
    trials = comparison._trials()
    for arm in ('pkd', 'pkd_sham'):
        model = trials.runs[arm, 0].settings.model
        assert model.teachers.teacher.cache == 1.0


def test_a_cached_step_counts_with_its_share_of_new_images(
    comparison, monkeypatch
):
    shown = []

    def count(settings, steps):
        shown.append(steps)
        return 0.25

    monkeypatch.setattr(
        compare,
        'step_times',
        lambda arms: {
            'alone': [1.0],
            'pkd': [1.2],
            'pkd, new images': [2.0],
            'at': [1.0],
            'at, new images': [2.0],
        },
    )
    monkeypatch.setattr(compare, 'new_images', count)
    comparison.setting.methods = ['pkd', 'at']
    trials = comparison._trials()
    assert shown == [2]  # both see the same images
    ratios = {arm.name: arm.step_ratio for arm in trials.arms}
    assert (ratios['pkd'], ratios['at']) == (1.4, 1.25)


def test_another_teacher_makes_distilled_results_stale(comparison, tmp_path):
    before = comparison._trials()
    prints = {key: run.fingerprint() for key, run in before.runs.items()}
    tiny.save_teacher(
        tiny.retinanet(base=16), tmp_path / 'teacher.pth', seed=8
    )
    compare.file_digest.cache_clear()
    after = comparison._trials()
    for key, run in after.runs.items():
        same = run.fingerprint() == prints[key]
        assert same == key[0].startswith('alone'), key


def test_configs_are_written_once_and_follow_the_setting(
    comparison, monkeypatch
):
    comparison.setting.methods = ['pkd']
    run = comparison._trials().runs['pkd', 1]
    written = run.config.read_text()
    run.config.write_text(written.replace('seed=1', 'seed=7'))  # by hand
    comparison._trials()
    assert run.config.read_text() == written
    monkeypatch.delattr(compare.Config, 'pretty_text')
    comparison._trials()


def test_step_times_are_measured_once(comparison, monkeypatch):
    comparison._trials()

    def fail(arms):
        raise AssertionError('timed again')

    monkeypatch.setattr(compare, 'step_times', fail)
    comparison._trials()


@pytest.fixture
def stale(comparison, monkeypatch):
    """A comparison with results of 'pkd' and its sham by earlier code."""
    comparison.setting.methods = ['pkd']
    first = comparison._trials()
    pace = json.loads((comparison.folder / 'pace.json').read_text())
    for name in ('pkd', 'pkd_sham'):
        for seed in (0, 1):
            run = first.runs[name, seed]
            run.keys['code'] = 'earlier'
            run.predictions.parent.mkdir(parents=True)
            for file in (run.final, run.predictions):
                file.write_text('')
            run.sign()
    config = pace['pkd']['key'].split()[0]
    pace['pkd']['key'] = f'{config} earlier'
    (comparison.folder / 'pace.json').write_text(json.dumps(pace))
    teacher = comparison.teacher
    teacher.predictions.parent.mkdir(parents=True)
    teacher.predictions.write_text('[]')
    teacher.sign()
    comparison.options.verify = 7
    return comparison


def test_only_stale_results_are_verified_and_their_pace_is_kept(
    stale, monkeypatch
):
    monkeypatch.delattr(compare, 'step_times')
    asked = []
    monkeypatch.setattr(
        compare, 'verify', lambda runs, *how: asked.append((runs, *how))
    )
    stale.run()
    assert [(len(runs), *how) for runs, *how in asked] == [(2, 7)] * 2
    assert 'pkd' in str(asked[0][0][0].folder)
    stale.options.verify = None
    assert stale._trials().arms[2].step_ratio == 1.21


@pytest.mark.parametrize('jobs', [1, 2])
def test_as_many_arms_are_repeated_at_a_time_as_there_are_jobs(
    stale, monkeypatch, tmp_path, jobs
):
    stale.options.jobs = jobs
    alone = Semaphore(1)
    met = Barrier(2)
    trusted = tmp_path / 'old.pth'
    torch.save(dict(weight=torch.ones(1)), trusted)

    def repeat(runs, steps):
        assert trusted_files() == [str(trusted)]
        if jobs == 2:
            met.wait(timeout=60)  # for the other arm
        else:
            assert alone.acquire(blocking=False)
            time.sleep(0.1)
            alone.release()

    monkeypatch.setattr(compare, 'verify', repeat)
    with trusting(trusted):
        stale.run()


def test_runs_that_two_arms_share_are_repeated_once(stale, monkeypatch):
    stale.setting.update(arms=['alone', 'time', 'unlabelled'], labels=2)
    trials = stale._trials()
    assert [arm.name for arm in trials.arms][:2] == ['alone', 'alone_x1.00']
    run = trials.runs['alone_x1.00', 0]
    assert run is trials.runs['alone', 0]
    run.keys['code'] = 'earlier'
    run.predictions.parent.mkdir(parents=True)
    for file in (run.final, run.predictions):
        file.write_text('')
    run.sign()
    asked = []
    monkeypatch.setattr(
        compare, 'verify', lambda runs, *how: asked.append(runs[0].name)
    )
    stale.run()
    assert asked == ['student alone, seed 0']


def test_broken_off_no_further_arm_is_repeated(stale, monkeypatch):
    begun = []

    def repeat(runs, steps):
        begun.append(runs[0].name)
        pthread_kill(main_thread().ident, SIGINT)  # Ctrl-C
        time.sleep(0.5)

    stale.options.jobs = 1
    monkeypatch.setattr(compare, 'verify', repeat)
    before = signal(SIGINT, default_int_handler)  # pytest-xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            stale.run()
    finally:
        signal(SIGINT, before)
    assert begun == ['pkd, seed 0']


def test_what_is_stale_for_more_than_its_code_is_left_to_train(
    stale, monkeypatch, capsys
):
    for seed in (0, 1):
        stamp = stale.folder / 'pkd' / f'seed{seed}' / STAMP
        made_with = json.loads(stamp.read_text())
        stamp.write_text(json.dumps(dict(made_with, train='other')))
    asked = []
    monkeypatch.setattr(
        compare, 'verify', lambda runs, *how: asked.append(runs[0].name)
    )
    stale.run()
    assert asked == ['pkd, sham, seed 0']
    said = capsys.readouterr().out
    assert 'pkd: it was made with other code and training data; a' in said


def test_a_repeat_that_differs_ends_the_command(stale, monkeypatch):
    monkeypatch.setattr(compare, 'verify', lambda *which: 'loss was 1')
    with pytest.raises(RuntimeError, match='loss was 1; loss was 1. Train'):
        stale.run()


@pytest.fixture
def stale_teacher(stale):
    """Its code has changed as well."""
    teacher, now = stale.teacher, stale.teacher.keys['code']
    teacher.keys['code'] = 'earlier'
    teacher.sign()
    teacher.keys['code'] = now
    assert teacher.stale
    return stale


def test_a_stale_teacher_is_verified_first(stale_teacher, monkeypatch):
    asked = []

    def accept(runs, *how):
        asked.append(([run.name for run in runs], *how))
        for run in runs:
            run.sign()

    monkeypatch.setattr(compare, 'verify', accept)
    stale_teacher.run()
    assert asked[0] == (['teacher'], 7)
    assert len(asked) == 3


def test_a_teacher_that_would_be_another_ends_the_command(
    stale_teacher, monkeypatch
):
    monkeypatch.setattr(compare, 'verify', lambda *which: 'loss was 1')
    with pytest.raises(
        RuntimeError, match=r'otherwise now\. loss was 1.*--jobs'
    ):
        stale_teacher.run()


def test_a_teacher_of_other_settings_is_not_repeated(stale_teacher):
    stale_teacher.teacher.options = ('randomness.seed=1',)
    with pytest.raises(ValueError, match='with other code and settings'):
        stale_teacher.run()


# Everything ------------------------------------------------------------------


@pytest.mark.slow
def test_one_command_from_nothing_to_a_report(config, tmp_path, capsys):
    words = [config('student.py'), '--teacher', config('teacher.py', base=16)]
    words += ['--seeds', '0', '1', '--methods', 'pkd', '--labels', '4']
    words += ['--draws', '20', '--work-dir', str(tmp_path / 'out')]
    assert compare.main(words) == 0, capsys.readouterr().err
    report = tmp_path / 'out' / 'report'
    found = json.loads((report / 'results.json').read_text())
    names = [arm['name'] for arm in found['arms']]
    assert names[0] == 'alone'
    assert {'pkd', 'pkd_sham'} < set(names)
    for arm in found['arms']:
        assert [run['status'] for run in arm['runs']] == ['done', 'done']
    assert (report / 'report.html').stat().st_size > 10_000
    pkd = next(arm for arm in found['arms'] if arm['name'] == 'pkd')
    assert pkd['runs'][0]['diagnostics'][0]['balanced_pkd_agreement_0'] < 1
    # A second call trains nothing.
    before = {path: path.stat().st_mtime for path in tmp_path.rglob('*.pth')}
    assert compare.main([*words, '--report-only']) == 0
    assert compare.main(words) == 0
    assert before == {
        path: path.stat().st_mtime for path in tmp_path.rglob('*.pth')
    }
    assert '| pkd |' in _diff(report, capsys)


def _diff(report, capsys):
    file = str(report / 'results.json')
    assert compare.main(['--diff', file, file]) == 0
    return capsys.readouterr().out


def test_diff_needs_two_reports():
    with pytest.raises(SystemExit):
        compare._parser().parse_args(['--diff', 'one.json'])


def test_the_parser_knows_every_setting():
    options = compare._parser().parse_args([])
    named = set(vars(options))
    assert set(compare.SETTINGS) - named == {'student'}

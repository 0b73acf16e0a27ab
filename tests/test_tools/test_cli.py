import json
import os
import pickle
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch
from mmengine.config import Config

from mmkd.cli import evaluation_config, main, training_config
from mmkd.engine.finite import FiniteLossHook

ROOT = Path(__file__).parents[2]

data, quick_starts = runs.data, runs.quick_starts


@pytest.fixture
def config(data, tmp_path):
    """Path of a config file of a short training and its test."""
    path = tmp_path / 'student.py'
    cfg = runs.config(
        data,
        tmp_path / 'unused',
        epochs=2,
        default_hooks=dict(visualization=dict(type='DetVisualizationHook')),
        visualizer=dict(
            type='DetLocalVisualizer',
            vis_backends=[dict(type='LocalVisBackend')],
        ),
        **runs.evaluation(data, 'test'),
    )
    cfg.pop('work_dir')
    cfg.dump(path)
    return path


def train(config, *arguments):
    return main(['train', str(config), *map(str, arguments)])


def evaluate(config, checkpoint, *arguments):
    return main(['test', str(config), str(checkpoint), *map(str, arguments)])


def check(config, *arguments):
    return main(['check', str(config), *map(str, arguments)])


def metrics(folder):
    """The numbers a test wrote to its log."""
    (log,) = [
        one for one in folder.rglob('*.json') if one.parent.parent == folder
    ]
    return log.read_text()


def test_train_then_test_then_resume(config, tmp_path, capsys):
    work = tmp_path / 'run'
    assert train(config, '--work-dir', work) == 0
    checkpoint = work / 'epoch_2.pth'
    assert checkpoint.is_file()
    # A finished run has nothing left to do.
    before = checkpoint.read_bytes()
    assert train(config, '--work-dir', work, '--resume') == 0
    assert checkpoint.read_bytes() == before

    out = tmp_path / 'out.pkl'
    arguments = ('--work-dir', tmp_path / 'test', '--out', out)
    shown = ('--show-dir', 'shown')
    assert evaluate(config, checkpoint, *arguments, *shown) == 0
    assert 'coco/bbox_mAP' in metrics(tmp_path / 'test')
    assert len(pickle.loads(out.read_bytes())) == 6
    assert len(list((tmp_path / 'test').glob('*/shown/*.png'))) == 6

    arguments = ('--work-dir', tmp_path / 'tta', '--tta')
    assert evaluate(config, checkpoint, *arguments) == 0
    assert 'coco/bbox_mAP' in metrics(tmp_path / 'tta')


def test_options_reach_the_config(config, tmp_path):
    cfg = training_config(
        config,
        amp=True,
        resume='auto',
        cfg_options={'optim_wrapper.optimizer.lr': 0.5},
        launcher='pytorch',
    )
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    assert (cfg.resume, cfg.load_from) == (True, None)
    assert cfg.launcher == 'pytorch'
    assert cfg.work_dir == os.path.join('work_dirs', 'student')
    named = training_config(config, resume='a.pth', work_dir=str(tmp_path))
    assert (named.resume, named.load_from) == (True, 'a.pth')
    assert named.work_dir == str(tmp_path)


def test_the_learning_rate_is_scaled_where_the_config_says_how(config):
    with pytest.raises(ValueError, match='base_batch_size=16'):
        training_config(config, auto_scale_lr=True)
    scaling = dict(enable=False, base_batch_size=16)
    cfg = training_config(
        config, auto_scale_lr=True, cfg_options=dict(auto_scale_lr=scaling)
    )
    assert cfg.auto_scale_lr.enable is True


def test_configs_of_packages_are_found():
    name = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
    cfg = training_config(name)
    assert cfg.model.type == 'RetinaNet'
    assert cfg.work_dir.endswith('retinanet_r50_fpn_1x_coco')


def test_a_missing_config_suggests_the_nearest(config, capsys):
    assert train(config.with_name('studnet.py')) == 1
    assert "Did you mean '" in capsys.readouterr().err


def test_a_misspelt_option_is_not_added_silently(config, capsys):
    assert train(config, '--cfg-options', 'optim_wraper.type=X') == 1
    error = capsys.readouterr().err
    assert "Did you mean 'optim_wrapper'?" in error
    # A key the file lacks but MMEngine reads is fine.
    training_config(config, cfg_options={'randomness.seed': 3})


@pytest.mark.parametrize(
    ('option', 'complaint'),
    [
        ('train_dataloader.dataset.ann_file=gone.json', "Did you mean 'train"),
        ('load_from=gone.pth', 'load_from expected'),
        ('model.bbox_head.num_classes=80', 'num_classes=3'),
        ('model.neck.out_channels=7', ''),
    ],
)
def test_a_refused_start_writes_nothing(option, complaint, config, capsys):
    work = config.parent / 'run'
    arguments = ('--work-dir', work, '--cfg-options', option)
    try:
        assert train(config, *arguments) == 1
        error = capsys.readouterr().err
    except (ValueError, RuntimeError) as raised:
        error = str(raised)
    assert complaint in error
    assert not work.exists()


def test_what_mmkd_says_of_a_component_needs_no_traceback(config, capsys):
    cfg = Config.fromfile(config)
    cfg.custom_hooks = [dict(type='mmkd.FiniteLossHook', policy='leap')]
    cfg.dump(config)
    assert train(config, '--work-dir', config.parent / 'run') == 1
    said = capsys.readouterr().err
    assert said.endswith(
        "\nFiniteLossHook has no policy 'leap'. It has 'stop', 'skip'.\n"
    )
    assert not (config.parent / 'run').exists()


def test_what_others_raise_keeps_its_traceback(config, monkeypatch):
    def fail(self):
        raise ValueError('of nobody here')

    monkeypatch.setattr(FiniteLossHook, '__init__', fail)
    with pytest.raises(ValueError, match='of nobody here'):
        train(config)


def test_what_mmkd_did_not_foresee_keeps_its_traceback(config, monkeypatch):
    """An error that a line of its own comes across is no message."""
    program = "def fail(self):\n    int('abc')\n"
    place = dict(__name__='mmkd.engine.finite')
    exec(program, place)
    monkeypatch.setattr(FiniteLossHook, '__init__', place['fail'])
    with pytest.raises(ValueError, match='invalid literal'):
        train(config)


def test_a_missing_checkpoint_is_one_clear_error(config, capsys):
    work = config.parent / 'run'
    assert evaluate(config, 'gone.pth', '--work-dir', work) == 1
    assert 'CHECKPOINT expected a checkpoint at' in capsys.readouterr().err
    assert not work.exists()


def test_predictions_go_to_a_pickle(config, tmp_path, capsys):
    checkpoint = tmp_path / 'a.pth'
    torch.save(dict(state_dict={}), checkpoint)
    assert evaluate(config, checkpoint, '--out', 'a.json') == 1
    assert 'expected a .pkl' in capsys.readouterr().err


def test_flips_are_added_where_the_config_has_none(config):
    cfg = evaluation_config(config, 'a.pth', tta=True)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == 'RetinaNet'
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'


def test_a_check_tells_failures_from_warnings_by_its_status(
    config, data, tmp_path, capsys
):
    before = sorted(tmp_path.rglob('*'))
    assert check(config, '--strict') == 0
    assert capsys.readouterr().out.startswith(f'Check of {config}\n')
    assert sorted(tmp_path.rglob('*')) == before
    # A box that stands there twice is a warning.
    shutil.copytree(data, tmp_path / 'data')
    path = tmp_path / 'data' / 'train.json'
    content = json.loads(path.read_text())
    content['annotations'].append(dict(content['annotations'][0], id=99))
    path.write_text(json.dumps(content))
    where = f'train_dataloader.dataset.data_root={tmp_path / "data"}'
    found = tmp_path / 'found.json'
    assert check(config, '--cfg-options', where) == 0
    assert check(config, '--strict', '--cfg-options', where) == 1
    # A class too many is a failure.
    option = 'model.bbox_head.num_classes=4'
    assert check(config, '--json', found, '--cfg-options', option) == 2
    content = json.loads(found.read_text())
    assert content['verdict'] == 'fail'
    assert 'num_classes=3' in capsys.readouterr().out


def test_a_check_of_a_config_that_is_not_there_fails(config, capsys):
    assert check(config.with_name('studnet.py')) == 2
    said = capsys.readouterr().err
    assert 'mmkd check has no config' in said
    assert "Did you mean '" in said
    assert check(config, '--print-config') == 2
    assert 'Name its config: --teacher' not in capsys.readouterr().out


def test_a_plan_is_checked_as_it_would_be_trained(config, tmp_path, capsys):
    teacher = tiny.retinanet(base=16)
    Config(dict(model=teacher)).dump(tmp_path / 'teacher.py')
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    status = check(
        config,
        '--no-data-check',
        '--images',
        0,
        '--teacher',
        tmp_path / 'teacher.py',
        '--teacher-checkpoint',
        file,
        '--method',
        'pkd',
    )
    said = capsys.readouterr().out
    assert status == 0
    assert "Teacher 'teacher'\nok" in said
    assert 'Data' not in said.splitlines()


def test_no_check_looks_at_nothing(config, monkeypatch, tmp_path):
    looked = []
    for place in (
        'mmkd.engine.first_step.FirstStepHook.before_train_iter',
        'mmkd.engine.preflight.check_dataset',
    ):
        monkeypatch.setattr(
            place, lambda *_, place=place, **__: looked.append(place) or []
        )
    once = ('--cfg-options', 'train_cfg.max_epochs=1')
    work = ('--work-dir', tmp_path / 'run')
    assert train(config, *work, '--no-check', *once) == 0
    assert looked == []
    assert train(config, *work, *once) == 0
    assert len(set(looked)) == 2


def test_the_tool_is_the_verb(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['check.py', '--help'])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / 'tools' / 'check.py'), run_name='__main__')
    assert stopped.value.code == 0
    assert '--strict' in capsys.readouterr().out


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_tools_run_from_any_folder_without_installation(tool, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / tool, '--help'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ''},
    )
    assert done.returncode == 0
    assert '--cfg-options' in done.stdout


def test_ctrl_c_in_a_terminal_says_how_to_go_on(config, tmp_path):
    """The signal goes to the whole process group, workers included."""
    cfg = Config.fromfile(config)
    cfg.train_cfg.max_epochs = 1000
    cfg.train_dataloader.num_workers = 1
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=1)
    cfg.log_level = 'INFO'
    cfg.dump(config)
    work = tmp_path / 'a run'
    running = subprocess.Popen(
        [
            sys.executable,
            ROOT / 'tools' / 'train.py',
            config,
            '--work-dir',
            work,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    try:
        for line in running.stdout:
            if 'Epoch(train)' in line:
                break
        os.killpg(running.pid, signal.SIGINT)
        _, error = running.communicate(timeout=120)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 128 + signal.SIGINT, error
    assert (work / 'interrupted.pth').is_file()
    command = error.strip().splitlines()[-1]
    assert shlex.split(command) == [
        'python',
        str(ROOT / 'tools' / 'train.py'),
        str(config),
        '--work-dir',
        str(work),
        '--resume',
    ]


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh']
)
def test_scripts_say_what_they_need(script):
    path = ROOT / 'tools' / script
    assert os.access(path, os.X_OK)
    done = subprocess.run([path], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'usage:' in done.stderr


@pytest.mark.parametrize(
    ('script', 'arguments', 'expected'),
    [
        (
            'dist_train.sh',
            ['a config.py', '2', '--work-dir', 'a b'],
            '--nproc-per-node=2 {tools}/train.py|a config.py|--launcher|'
            'pytorch|--work-dir|a b',
        ),
        (
            'dist_test.sh',
            ['c.py', 'e.pth', '2', '--tta'],
            '--nproc-per-node=2 {tools}/test.py|c.py|e.pth|--launcher|'
            'pytorch|--tta',
        ),
        (
            'slurm_train.sh',
            ['gpu', 'job', 'c.py', 'work', '--amp'],
            'python|-u|{tools}/train.py|c.py|--work-dir|work|--launcher|'
            'slurm|--amp',
        ),
    ],
)
def test_scripts_hand_their_arguments_on(
    script, arguments, expected, tmp_path
):
    for name in ('python', 'srun'):
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
        fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / 'tools' / script, *arguments],
        capture_output=True,
        text=True,
        env=dict(PATH=f'{tmp_path}:{os.environ["PATH"]}'),
    )
    assert ('-c|import yapf|' in done.stdout) == script.startswith('dist_')
    expected = expected.format(tools=ROOT / 'tools').replace(' {', '|{')
    assert expected.replace('=2 ', '=2|') in done.stdout

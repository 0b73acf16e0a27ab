"""``--trust-checkpoint``: by which commands, and for what."""

import hostile
import pytest
import torch

import mmkd.analysis.attribute
import mmkd.analysis.caching
import mmkd.analysis.factorizing
import mmkd.analysis.focus
import mmkd.analysis.hypotheses
import mmkd.analysis.predicting
import mmkd.cli
import mmkd.detectors.peer_ensemble
import mmkd.laboratory.benchmark
import mmkd.laboratory.chain
import mmkd.laboratory.compare
from mmkd.compat.checkpoint import (
    CheckpointError,
    read_checkpoint,
    trusted_files,
)

MODEL = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
#: What a command does in the end, and how it is typed.
COMMANDS = {
    'mmkd test': (mmkd.cli, '_test', 'test a.py {file}'),
    'mmkd train': (mmkd.cli, '_train', 'train a.py --resume {file}'),
    'attribute.py': (mmkd.analysis.attribute, 'make', 'a.py {file} --out b'),
    'make_hypotheses.py': (
        mmkd.analysis.hypotheses,
        'make',
        'a.py {file} --out b',
    ),
    'cache_predictions.py': (
        mmkd.analysis.predicting,
        'make',
        'a.py {file} --out b',
    ),
    'cache_teacher.py': (mmkd.analysis.caching, 'make', 'a.py'),
    'factorize.py': (
        mmkd.analysis.factorizing,
        'write',
        'a.py {file} --out b.py',
    ),
    'show_focus.py': (
        mmkd.analysis.focus,
        'show',
        'a.py --checkpoint {file}',
    ),
    'export_peer.py': (
        mmkd.detectors.peer_ensemble,
        'export_peer',
        '{file} {file}.out',
    ),
    'benchmark.py': (
        mmkd.laboratory.benchmark,
        '_measure_all',
        'a.py --out {file}.out',
    ),
}
#: Those that start other commands, which read the files.
STARTERS = {
    'compare.py': (
        mmkd.laboratory.compare,
        'Comparison',
        'configs/laboratory/shapes/quick.py',
    ),
    'chain.py': (
        mmkd.laboratory.chain,
        'Chain',
        f'{MODEL} {{file}} {MODEL} --chain {MODEL}',
    ),
}


@pytest.fixture
def legacy(tmp_path):
    """A file that asks for a call, which leaves a mark."""
    path = tmp_path / 'legacy.pth'
    torch.save(dict(x=hostile.system(tmp_path / 'mark')), path)
    return path


@pytest.fixture(params=COMMANDS)
def command(request, legacy, monkeypatch):
    """A command that does nothing but to read the file."""
    module, worker, words = COMMANDS[request.param]

    def read(*arguments):
        try:
            read_checkpoint(legacy)
        except CheckpointError as error:
            if module is not mmkd.cli:
                raise
            return mmkd.cli._refuse(arguments[0], error)
        return 0

    monkeypatch.setattr(module, worker, read)
    if worker == 'write':
        monkeypatch.setattr(module, 'table', str)
    words = words.format(file=legacy).split()
    return lambda *more: module.main([*words, *more])


def test_a_command_reads_the_file_it_trusts_and_no_later_one(
    command, legacy, tmp_path, capsys
):
    assert command('--trust-checkpoint', str(legacy)) == 0
    assert (tmp_path / 'mark').exists()
    assert f'WARNING: {legacy}' in capsys.readouterr().err
    (tmp_path / 'mark').unlink()
    assert command() == 1
    assert f'--trust-checkpoint {legacy}' in capsys.readouterr().err
    assert not (tmp_path / 'mark').exists()


def test_a_command_says_that_there_is_nothing_to_trust(
    command, tmp_path, capsys
):
    assert command('--trust-checkpoint', str(tmp_path / 'no.pth')) == 1
    said = capsys.readouterr().err
    assert '--trust-checkpoint expected a checkpoint' in said


@pytest.mark.parametrize('name', STARTERS)
def test_a_command_that_starts_others_hands_its_trust_on(
    name, legacy, tmp_path, monkeypatch, capsys
):
    module, worker, words = STARTERS[name]
    handed = []

    def start(*arguments, **settings):
        handed.extend(trusted_files())
        raise ValueError('seen enough')

    monkeypatch.setattr(module, worker, start)
    words = [*words.format(file=legacy).split(), '--work-dir', str(tmp_path)]
    assert module.main([*words, '--trust-checkpoint', str(legacy)]) == 1
    assert handed == [str(legacy)]
    said = capsys.readouterr().err
    assert 'seen enough' in said
    assert 'needed no trust' not in said  # those that it starts know
    assert trusted_files() == []

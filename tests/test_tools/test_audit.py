"""A package that nobody was asked about is not called sound."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOUND = dict(name='a', version='1', vulns=[])
WEAK = dict(name='b', version='2', vulns=[dict(id='CVE-1')])
SKIPPED = dict(name='c', skip_reason='not found')


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location(
        'audit', ROOT / 'tools' / 'audit.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def status(audit, monkeypatch):
    """Exit status after pip-audit has said this, one lock after the other."""

    def main(*said):
        answers = iter(said)

        def run(command, **settings):
            packages = next(answers)
            if packages is not None:
                path = Path(command[command.index('--output') + 1])
                path.write_text(json.dumps(dict(dependencies=packages)))
            return subprocess.CompletedProcess(command, 0, '', 'no network')

        monkeypatch.setattr(audit.subprocess, 'run', run)
        return audit.main([f'{number}.txt' for number in range(len(said))])

    return main


@pytest.mark.parametrize(
    ('said', 'expected'),
    [
        ([[SOUND]], 0),
        ([[SOUND], [SOUND, SOUND]], 0),
        ([[SOUND, SKIPPED]], 2),
        ([[SKIPPED]], 2),
        ([[]], 2),
        ([None], 2),
        ([[SOUND, WEAK]], 1),
        ([[SOUND], [WEAK, SKIPPED]], 1),
        ([[SKIPPED], [WEAK]], 1),
        ([None, [SOUND]], 2),
    ],
)
def test_the_status_tells_sound_from_unasked(said, expected, status):
    assert status(*said) == expected


def test_what_was_not_audited_is_counted_and_named(status, capsys):
    status([SOUND, WEAK, SKIPPED])
    said = capsys.readouterr().out
    assert '2 audited, 1 not audited' in said
    assert 'known weakness: b 2: CVE-1' in said
    assert 'not audited: c' in said

"""Changes are those that were meant, and one that is noticed is told apart."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'mutate', ROOT / 'tools' / 'mutate.py'
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules['mutate'] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules['mutate']


def function(line):
    return f'def f(x, mask, temperature, eps):\n    return {line}\n'


def changes(tool, line):
    return {
        (one.way, one.change.split(' -> ')[1])
        for one in tool.mutants(function(line))
    }


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        ('2 * x', {('factor', '4 * x'), ('operator', '2 / x')}),
        ('x ** 2', {('exponent', 'x ** 3')}),
        ('x.square()', {('reduction', 'x.abs()')}),
        (
            'x.sum((2, 3))',
            {
                ('reduction', 'x.mean((2, 3))'),
                ('axis', 'x.sum((3,))'),
                ('axis', 'x.sum((2,))'),
            },
        ),
        ('x.softmax(dim=1)', {('axis', 'x.softmax(dim=0)')}),
        ('mask * x', {('mask', 'x'), ('operator', 'mask / x')}),
        (
            'x / temperature',
            {('temperature', 'x'), ('operator', 'x * temperature')},
        ),
        ('x.clamp(min=1)', {('clamp', 'x')}),
        ('x > mask', {('comparison', 'x >= mask')}),
        # What keeps a division from nothing is no part of the formula.
        ('x + 1e-6', set()),
        ('x + eps', set()),
        ('x.clamp(min=1e-6)', set()),
    ],
)
def test_a_formula_is_broken_in_the_ways_that_are_named(tool, line, expected):
    assert changes(tool, line) == expected


def test_every_way_is_explained(tool):
    source = (ROOT / 'mmkd' / 'losses' / 'ld.py').read_text()
    found = {one.way for one in tool.mutants(source)}
    assert found <= tool.WAYS.keys()
    assert len(found) >= 8


def test_student_and_teacher_are_cut_off_ignored_and_exchanged(tool):
    source = (
        'def loss(student, teacher):\n    """Docs."""\n    return student\n'
    )
    found = {one.way: one.text for one in tool.mutants(source)}
    assert found.keys() == {'detach', 'teacher', 'swap'}
    assert 'student, teacher = (teacher, student)' in found['swap']
    values = {}
    for way, text in found.items():
        space = {}
        exec(text, space)
        values[way] = space['loss'](_Number(2.0), _Number(3.0))
        assert space['loss'].__doc__ == 'Docs.'
    assert values['detach'].detached
    assert not values['teacher'].detached
    assert values['swap'].value == 3.0


class _Number:
    def __init__(self, value, detached=False):
        self.value, self.detached = value, detached

    def detach(self):
        return _Number(self.value, detached=True)

    def __rmul__(self, other):
        return _Number(other * self.value)


def test_messages_signatures_and_constructors_are_left_alone(tool):
    source = (
        'class Loss:\n'
        '    def __init__(self, weight=2 * 3):\n'
        '        self.weight = 2 * weight\n'
        '    def forward(self, x, scale=2 * 3):\n'
        "        raise ValueError(f'{2 * x}')\n"
    )
    assert tool.mutants(source) == []


def test_each_mutant_is_one_change(tool):
    source = (ROOT / 'mmkd' / 'losses' / 'cwd.py').read_text()
    found = tool.mutants(source)
    assert len({one.text for one in found}) == len(found) > 8
    for one in found:
        compile(one.text, 'mutant', 'exec')
    # Nothing is left of one in the next.
    assert tool.mutants(source) == found


def test_a_module_is_tried_with_its_own_tests(tool):
    assert tool.tests_of(ROOT / 'mmkd/losses/pkd.py') == Path(
        'tests/test_losses/test_pkd.py'
    )
    words = tool.contracts_of(
        ROOT / 'mmkd/losses/x.py', 'class A:\n    pass\nclass B:\n    pass\n'
    )
    assert words == ['tests/test_contracts.py', '-k', 'A or B']
    assert tool.contracts_of(ROOT / 'mmkd/ops/x.py', 'class A: pass') == []


@pytest.mark.slow
def test_what_is_excused_exists(tool):
    """A line that no mutant answers to would hide a later one."""
    lines = [
        line.split(': ', 2)
        for line in tool.EQUAL.read_text().splitlines()
        if line and not line.startswith('#')
    ]
    found = {
        name: {
            (one.way, one.change)
            for one in tool.mutants((ROOT / name).read_text())
        }
        for name in {name for name, _, _ in lines}
    }
    for name, way, change in lines:
        assert (way, change) in found[name], name


def test_the_list_is_told_without_running_anything(tool, capsys):
    file = str(ROOT / 'mmkd' / 'losses' / 'pkd.py')
    assert tool.main(['--list', file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'mmkd/losses/pkd.py: detach: pkd_loss (line 14)'


@pytest.mark.slow
def test_one_file_is_tried_from_end_to_end():
    words = ['tools/mutate.py', 'mmkd/losses/pkd.py']
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith('none survives\n')

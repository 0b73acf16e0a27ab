"""Imports point upwards, and every method has its test file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'mmkd'

#: A module imports only from its own line and the lines above it.
ORDER = (
    'version',
    'checks',
    'arguments',
    'registry',
    'compat',
    'files',
    'reading',
    'classes',
    'build',
    'randomness',
    'configs',
    'structures',
    'pixels',
    'ops',
    'schedules',
    'losses',
    'necks',
    'backbones',
    'taps',
    'phases',
    'store',
    'memory',
    'fast',
    'teachers',
    'terms',
    'distillers',
    'detectors',
    'recipes',
    'datasets',
    'engine',
    'analysis',
    'plan',
    'own_config',
    'cli',
    'laboratory',
)

#: Packages that know torch and nothing of detectors.
PURE = ('losses', 'necks', 'ops')

#: Packages whose every module has a test file of its own name.
MIRRORED = (
    'structures',
    'ops',
    'losses',
    'necks',
    'backbones',
    'terms',
    'detectors',
)

#: Modules of the core whose tests stand elsewhere than under their name.
ELSEWHERE = {
    'configs': 'test_configs_reading',
    'cli': 'test_tools',
    'version': 'test_compat',
}

MODULES = sorted(PACKAGE.rglob('*.py'))
TOP = [one for one in MODULES if one.parent == PACKAGE]


def layer(file: Path) -> str:
    """Name of the line of ``ORDER`` that a file of mmkd stands on."""
    return file.relative_to(PACKAGE).with_suffix('').parts[0]


def imported(source: str, package: str = '', late: bool = True) -> list[str]:
    """Every module that a source imports, for type checking included.

    Of ``from a import b`` both ``a`` and ``a.b`` are listed, as b may be a
    module.

    Args:
        source: Text of a module.
        package: Package it stands in, for relative imports.
        late: Also what is imported inside of functions.
    """
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if not late and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: 1 - node.level or None]
            parts = above if node.level else []
            base = '.'.join([*parts, *filter(None, [node.module])])
            found += [base, *(f'{base}.{alias.name}' for alias in node.names)]
    return found


def own_layers(source: str, package: str = '') -> set[str]:
    """Lines of ``ORDER`` that a source imports from."""
    names = [name.split('.') for name in imported(source, package)]
    return {
        name[1] for name in names if name[0] == 'mmkd' and len(name) > 1
    } - {'__version__'}


def above(name: str) -> set[str]:
    return set(ORDER[: ORDER.index(name) + 1])


def label(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def dotted_package(file: Path) -> str:
    return '.'.join(file.parent.relative_to(ROOT).parts)


@pytest.mark.parametrize(
    'file',
    [one for one in MODULES if one != PACKAGE / '__init__.py'],
    ids=label,
)
def test_a_module_imports_only_from_above(file):
    name = layer(file)
    assert name in ORDER, f'give mmkd/{name} a line in ORDER'
    below = own_layers(file.read_text(), dotted_package(file)) - above(name)
    assert not below, f'{label(file)} imports from below: {sorted(below)}'


@pytest.mark.parametrize(
    'file', [one for one in MODULES if layer(one) in PURE], ids=label
)
def test_mathematics_knows_no_detector(file):
    """A setting named as in mmdet may still be built from its registry."""
    names = imported(file.read_text(), late=False)
    assert 'mmdet' not in {name.split('.')[0] for name in names}


def test_imports_are_found_at_any_depth_and_in_any_spelling():
    source = """
import mmkd.taps
from mmkd import teachers
from typing import TYPE_CHECKING
from . import necks
from ..losses.pkd import pkd_loss
if TYPE_CHECKING:
    from mmkd.terms.term import Term
def late():
    from mmkd.engine import start
"""
    found = own_layers(source, 'mmkd.ops')
    assert found == {'taps', 'teachers', 'ops', 'losses', 'terms', 'engine'}


def test_an_import_inside_of_a_function_is_late():
    source = 'import torch\ndef build():\n    import mmdet'
    assert imported(source) == ['torch', 'mmdet']
    assert imported(source, late=False) == ['torch']


def test_a_loss_that_imports_a_term_would_be_noticed():
    below = own_layers('from mmkd.terms import term') - above('losses')
    assert below == {'terms'}


def test_importing_mmkd_loads_nothing_of_the_trainer():
    found = own_layers((PACKAGE / '__init__.py').read_text(), 'mmkd')
    assert found.isdisjoint({'engine', 'analysis', 'cli', 'datasets'})


@pytest.mark.parametrize(
    'file',
    [
        one
        for one in MODULES
        if layer(one) in MIRRORED and one.name != '__init__.py'
    ],
    ids=label,
)
def test_every_method_has_a_test_of_its_name(file):
    inside = file.relative_to(PACKAGE)
    folders = [f'test_{part}' for part in inside.parent.parts]
    mirror = Path('tests', *folders, f'test_{inside.name}')
    assert (ROOT / mirror).is_file(), f'write {mirror}'


@pytest.mark.parametrize(
    'name', [one.stem for one in TOP if one.name != '__init__.py']
)
def test_every_module_of_the_core_has_a_test(name):
    tests = ROOT / 'tests'
    known = ELSEWHERE.get(name, f'test_{name}')
    assert (tests / f'{known}.py').is_file() or (tests / known).is_dir()


def test_every_method_file_says_what_it_is():
    silent = [
        label(one)
        for one in MODULES
        if one.name != '__init__.py'
        and not ast.get_docstring(ast.parse(one.read_text()))
        and one.stem != 'version'
    ]
    assert silent == []

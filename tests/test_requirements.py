"""What is installed is what the locks name, all of it."""

import re
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'requirements'
STACKS = ('openmmlab', 'onedl')
#: What every stack needs of its own.
OWN = dict(openmmlab='mmengine', onedl='onedl-mmengine')


def read(name):
    lines = (FOLDER / name).read_text(encoding='utf-8').splitlines()
    found = [line for line in lines if line and not line.startswith('#')]
    return [Requirement(line) for line in found]


def locked(stack):
    """Versions by name, as this Python would get them."""
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix('==')
        for one in read(f'lock-{stack}.txt')
        if one.marker is None or one.marker.evaluate()
    }


def brought(name, extras, seen):
    """All that a package brings along here, by name."""
    try:
        needs = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for need in map(Requirement, needs):
        wanted = need.marker is None or any(
            need.marker.evaluate(dict(extra=extra)) for extra in ('', *extras)
        )
        key = canonicalize_name(need.name)
        if wanted and (key, tuple(need.extras)) not in seen:
            seen.add((key, tuple(need.extras)))
            brought(need.name, need.extras, seen)


@pytest.mark.parametrize('stack', STACKS)
def test_every_line_of_a_lock_is_one_version(stack):
    for one in read(f'lock-{stack}.txt'):
        (specifier,) = one.specifier
        assert specifier.operator == '==', one
        assert '*' not in specifier.version, one


@pytest.mark.parametrize('stack', STACKS)
def test_a_lock_keeps_what_it_was_made_from(stack):
    versions = locked(stack)
    sources = ['constraints.txt', f'constraints-{stack}.txt', 'torch.txt']
    for one in (need for name in sources for need in read(name)):
        name = canonicalize_name(one.name)
        if name not in versions or (one.marker and not one.marker.evaluate()):
            continue
        assert one.specifier.contains(versions[name]), one


def test_all_that_this_stack_brings_along_is_locked():
    here = [stack for stack in STACKS if _installed(OWN[stack])]
    assert len(here) == 1
    seen = set()
    brought('mmkd', (*here, 'demo', 'test'), seen)
    names = {name for name, _ in seen}
    assert len(names) > 60
    assert names - locked(here[0]).keys() == set()


def _installed(name):
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize('stack', STACKS)
def test_make_installs_by_the_lock_of_the_stack(stack, tmp_path):
    said = subprocess.run(
        ['make', '-n', 'setup', f'STACK={stack}', f'VENV={tmp_path}/v'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    installs = re.findall(r'(?:pip install|pip --install).*', said)
    calls = [one for one in installs if 'uninstall' not in one]
    assert len(calls) >= 4
    assert all(f'--constraint requirements/lock-{stack}' in x for x in calls)

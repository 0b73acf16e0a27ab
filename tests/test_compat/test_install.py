"""The import hooks, the check for a stack, and what a wheel installs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import mmkd
from mmkd import compat

ROOT = Path(__file__).parents[2]
FINDER = ROOT / 'mmkd' / 'compat' / 'finder.py'


def run(*args, cwd, python=sys.executable, **env):
    """Output of a Python that sees nothing of this folder by itself."""
    clean = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    result = subprocess.run(
        [str(python), *map(str, args)],
        cwd=cwd,
        env=dict(clean, OMP_NUM_THREADS='1', **env),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture
def fake_mmcv(tmp_path):
    """A package mmcv without an extension, first on a Python's path."""
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    return package


def with_finder(code, file=FINDER):
    return (
        'import importlib.util, sys\n'
        f'spec = importlib.util.spec_from_file_location("f", {str(file)!r})\n'
        'finder = importlib.util.module_from_spec(spec)\n'
        'spec.loader.exec_module(finder)\n'
        f'finder.install()\n{code}'
    )


# The hooks ------------------------------------------------------------------


def test_a_compiled_extension_is_left_alone(fake_mmcv):
    (fake_mmcv / '_ext.py').write_text('nms = "compiled"\n')
    code = with_finder('import mmcv._ext; print(mmcv._ext.nms)')
    out = run('-c', code, cwd=fake_mmcv.parent)
    assert out == 'compiled'


def test_an_extension_of_another_finder_is_left_alone(fake_mmcv):
    code = with_finder(
        """
import importlib.machinery, types

class Other:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        module.nms = 'compiled'

sys.meta_path.append(Other())
import mmcv._ext
print(mmcv._ext.nms)
"""
    )
    assert run('-c', code, cwd=fake_mmcv.parent) == 'compiled'


def test_an_extension_that_is_loaded_already_is_left_alone(fake_mmcv):
    code = with_finder(
        """
import types
import mmcv
module = sys.modules['mmcv._ext'] = types.ModuleType('mmcv._ext')
finder.install()
import importlib
assert importlib.import_module('mmcv._ext') is module
"""
    )
    run('-c', code, cwd=fake_mmcv.parent)


def test_without_the_operators_the_import_fails_as_it_always_did(fake_mmcv):
    lonely = fake_mmcv.parent / '_mmkd_finder.py'
    shutil.copyfile(FINDER, lonely)
    code = with_finder(
        """
try:
    import mmcv._ext
except ModuleNotFoundError as error:
    print(error)
""",
        lonely,
    )
    out = run('-c', code, cwd=fake_mmcv.parent)
    assert out == "No module named 'mmcv._ext'"


def test_the_operators_load_without_mmkd(tmp_path):
    pytest.importorskip('mmcv')
    code = with_finder(
        """
import mmcv.ops, mmcv._ext
assert 'mmkd' not in sys.modules
assert mmcv._ext.__spec__.name == 'mmcv._ext'
print(mmcv._ext.__file__)
"""
    )
    out = Path(run('-c', code, cwd=tmp_path))
    if out.suffix != '.py':
        pytest.skip('mmcv is compiled here')
    assert out == FINDER.with_name('ops') / '__init__.py'


def test_mmengine_learns_the_package_whenever_it_is_imported(tmp_path):
    pytest.importorskip('mmengine')
    report = 'print(mmengine.config.utils.MODULE2PACKAGE["mmkd"])'
    later = with_finder(f'import mmengine.config\n{report}')
    earlier = 'import mmengine.config\n' + with_finder(report)
    for code in (later, earlier):
        assert run('-c', code, cwd=tmp_path) == 'mmkd.version'


def test_starting_up_imports_nothing_and_takes_no_time(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(FINDER.parent)!r})
before = set(sys.modules)
def start():
    begin = time.perf_counter()
    import finder
    finder.install()
    return time.perf_counter() - begin
first = start()  # compiles
print(*set(sys.modules) - before)
def again():
    del sys.modules['finder']
    return start()
print(min(again() for _ in range(20)) * 1e3)
"""
    cached = dict(PYTHONDONTWRITEBYTECODE='', PYTHONPYCACHEPREFIX=tmp_path)
    out = run('-c', code, cwd=tmp_path, **cached)
    imported, milliseconds = out.splitlines()
    assert imported == 'finder'
    assert float(milliseconds) < 1


def test_installing_twice_changes_nothing():
    compat.install()
    before = list(sys.meta_path)
    compat.install()
    assert sys.meta_path == before
    ours = [f for f in before if getattr(f, 'serves', '') == 'mmkd']
    assert len(ours) == 1


def test_a_clone_takes_over_from_an_installed_package(monkeypatch):
    class Installed:
        serves = 'mmkd'
        origin = 'site-packages'

    mine = [f for f in sys.meta_path if getattr(f, 'serves', '') != 'mmkd']
    monkeypatch.setattr(sys, 'meta_path', [Installed(), *mine])
    compat.install()
    (ours,) = (f for f in sys.meta_path if getattr(f, 'serves', ''))
    assert ours.origin == str(FINDER.parent)


# The stack ------------------------------------------------------------------


def without(monkeypatch, *names):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        compat,
        'find_spec',
        lambda name: None if name in names else find(name),
    )


def test_a_complete_stack_passes():
    pytest.importorskip('mmdet')
    compat.check_stack()


def test_a_missing_stack_says_what_to_type(monkeypatch):
    without(monkeypatch, 'mmcv', 'mmdet')
    with pytest.raises(ImportError, match='no mmcv and no mmdet') as info:
        compat.check_stack()
    assert 'pip install "mmkd[openmmlab]"' in str(info.value)
    assert 'pip install "mmkd[onedl]"' in str(info.value)


def test_missing_torchvision_says_what_to_type(monkeypatch):
    without(monkeypatch, 'torchvision')
    with pytest.raises(ImportError, match=r'pip install "torch>=2\.6"'):
        compat.check_stack()


@pytest.mark.parametrize('version', ['2.5.1+cu121', '1.13.0'])
def test_an_old_torch_says_what_to_type(monkeypatch, version):
    monkeypatch.setattr(torch, '__version__', version)
    with pytest.raises(ImportError, match=r'torch 2\.6 or newer, got [12]'):
        compat.check_stack()


@pytest.mark.parametrize('version', ['2.6.0a0+nv24', '2.10.0', '3.0.0'])
def test_a_new_torch_passes(monkeypatch, version):
    pytest.importorskip('mmdet')
    monkeypatch.setattr(torch, '__version__', version)
    compat.check_stack()


# The wheel ------------------------------------------------------------------

PROBE = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """What a clone holds, with one config more."""
    if not (ROOT / 'setup.py').is_file():
        pytest.skip('needs a clone of the project')
    pytest.importorskip('setuptools', '77.0.3')
    copy = tmp_path_factory.mktemp('clone') / 'mmkd'
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            *('.*', 'build', 'dist', '*.egg-info', 'data', 'work_dirs'),
            *('checkpoints', '__pycache__', 'tests'),
        ),
    )
    probe = copy / 'configs' / 'probe'
    probe.mkdir(parents=True)
    (probe / 'probe.py').write_text(PROBE)
    index = copy / 'model-index.yml'
    if not index.exists():
        index.write_text('Import: []\n')
    return copy


@pytest.fixture
def fresh(tmp_path):
    """An environment that sees the packages of this one, but not mmkd."""
    folder = tmp_path / 'env'
    venv.create(folder, with_pip=False, symlinks=os.name != 'nt')
    scripts = folder / ('Scripts' if os.name == 'nt' else 'bin')
    python = scripts / Path(sys.executable).name
    if not python.exists():
        python = scripts / 'python'
    code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    site = Path(run('-c', code, cwd=tmp_path, python=python))
    # A path file inside the other folder is not followed, so hooks of an
    # mmkd installed there stay out.
    names = ('mmdet', 'mmcv', 'mmengine', 'torch', 'pytest')
    specs = (importlib.util.find_spec(name) for name in names)
    packages = {str(Path(s.origin).parents[1]): None for s in specs if s}
    (site / 'zz_packages.pth').write_text('\n'.join(packages) + '\n')
    return python, site


def pip(python, *args, cwd):
    """Uses this environment's pip on another one, and no network."""
    if importlib.util.find_spec('pip') is None:
        pytest.skip('needs pip')
    return run(
        *('-m', 'pip', '--python', python, *args),
        cwd=cwd,
        PIP_NO_INDEX='1',
        PIP_DISABLE_PIP_VERSION_CHECK='1',
    )


BUILD = ('--no-deps', '--no-build-isolation')

BASES = """
from mmengine.config import Config
from mmengine.hub import get_config
for config in (Config.fromfile('user.py'), get_config('mmkd::probe/probe.py')):
    print(config.model.type)
import mmkd
print(mmkd.__file__)
"""


def stock_tool():
    mmdet = pytest.importorskip('mmdet')
    tool = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
    if not tool.is_file():
        pytest.skip('mmdet was installed without its tools')
    return tool


def files(folder):
    found = (path for path in folder.rglob('*') if path.is_file())
    found = {path.relative_to(folder) for path in found}
    return {path for path in found if path.suffix != '.pyc'}


@pytest.mark.slow
def test_a_wheel_brings_operators_and_configs_to_stock_tools(
    source, fresh, tmp_path
):
    python, site = fresh
    pip(python, 'install', *BUILD, source, cwd=tmp_path)
    assert (site / 'mmkd.pth').is_file()
    mim = site / 'mmkd' / '.mim'
    assert not (mim / 'configs').is_symlink()
    assert files(mim) == {
        file
        for file in files(source)
        if file.parts[0] in ('configs', 'tools', 'demo', 'model-index.yml')
    }

    code = (
        'import sys, mmcv.ops, mmcv._ext\n'
        "assert 'mmkd' not in sys.modules\n"
        'print(mmcv._ext.__file__)'
    )
    out = Path(run('-I', '-c', code, cwd=tmp_path, python=python))
    if out.suffix == '.py':  # else mmcv is compiled here
        assert out == site / 'mmkd' / 'compat' / 'ops' / '__init__.py'

    out = run('-I', stock_tool(), '--help', cwd=tmp_path, python=python)
    assert '--auto-scale-lr' in out

    (tmp_path / 'user.py').write_text("_base_ = 'mmkd::probe/probe.py'\n")
    out = run('-I', '-c', BASES, cwd=tmp_path, python=python).splitlines()
    assert out[-3:-1] == ['RetinaNet'] * 2
    assert Path(out[-1]) == site / 'mmkd' / '__init__.py'

    # A package that is gone in part must not disturb the interpreter.
    shutil.rmtree(site / 'mmkd')
    assert run('-I', '-c', 'print(1)', cwd=tmp_path, python=python) == '1'
    (site / '_mmkd_finder.py').unlink()
    assert run('-I', '-c', 'print(1)', cwd=tmp_path, python=python) == '1'
    pip(python, 'uninstall', '-y', 'mmkd', cwd=tmp_path)
    assert not list(site.glob('*mmkd*'))


@pytest.mark.slow
def test_an_editable_installation_finds_its_configs(source, fresh, tmp_path):
    python, site = fresh
    pip(python, 'install', *BUILD, '-e', source, cwd=tmp_path)
    assert not (site / 'mmkd.pth').exists()
    configs = source / 'mmkd' / '.mim' / 'configs'
    assert configs.resolve() == (source / 'configs').resolve()

    (tmp_path / 'user.py').write_text("_base_ = 'mmkd::probe/probe.py'\n")
    code = f'import mmkd\n{BASES}'
    out = run('-I', '-c', code, cwd=tmp_path, python=python).splitlines()
    assert out[-3:-1] == ['RetinaNet'] * 2
    assert Path(out[-1]) == source / 'mmkd' / '__init__.py'

    # Installing again replaces the links, and what a wheel left behind.
    pip(python, 'install', *BUILD, '-e', source, cwd=tmp_path)
    assert (configs / 'probe' / 'probe.py').is_file()


@pytest.mark.slow
def test_a_source_distribution_is_complete(source, fresh, tmp_path):
    code = (
        'from setuptools import build_meta\n'
        f'print(build_meta.build_sdist({str(tmp_path)!r}))'
    )
    archive = run('-c', code, cwd=source).splitlines()[-1]
    python, site = fresh
    pip(python, 'install', *BUILD, tmp_path / archive, cwd=tmp_path)
    mim = site / 'mmkd' / '.mim'
    assert (mim / 'configs' / 'probe' / 'probe.py').is_file()
    assert (mim / 'model-index.yml').is_file()
    assert mmkd.__version__ in archive

import subprocess
import sys

import mmdet.registry
import pytest
from torch import nn

import mmkd.registry
from mmkd.registry import HOOKS, MODELS, SCHEDULES, discover

KINDS = (
    'MODELS',
    'HOOKS',
    'DATASETS',
    'TRANSFORMS',
    'DATA_SAMPLERS',
    'METRICS',
)


@pytest.fixture
def forget():
    """Removes what a test registered."""
    registries = (MODELS, HOOKS, mmdet.registry.MODELS, mmdet.registry.HOOKS)
    before = [dict(one._module_dict) for one in registries]
    yield
    for registry, entries in zip(registries, before):
        registry._module_dict.clear()
        registry._module_dict.update(entries)


def in_a_fresh_interpreter(code):
    return subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize('kind', KINDS)
def test_every_entry_is_the_same_object_in_mmdet(kind):
    own, peer = getattr(mmkd.registry, kind), getattr(mmdet.registry, kind)
    own.import_from_location()
    assert own.module_dict.items() <= peer.module_dict.items()


def test_both_spellings_find_one_class():
    from mmkd.losses.pkd import PKDLoss

    assert mmdet.registry.MODELS.get('PKDLoss') is PKDLoss
    assert mmdet.registry.MODELS.get('mmkd.PKDLoss') is PKDLoss
    assert MODELS.get('PKDLoss') is PKDLoss


def test_a_prefix_imports_the_package_by_itself():
    done = in_a_fresh_interpreter(
        'import mmengine.registry as r, sys\n'
        "assert 'mmkd' not in sys.modules\n"
        "print(r.MODELS.build(dict(type='mmkd.PKDLoss', loss_weight=3)))\n"
    )
    assert done.stdout.strip() == 'PKDLoss()', done.stderr


def test_a_name_of_mmdet_is_refused_and_both_owners_are_named(forget):
    class RetinaNet(nn.Module):
        pass

    with pytest.raises(KeyError) as error:
        MODELS.register_module(module=RetinaNet)
    message = str(error.value)
    assert __name__ in message
    assert 'mmdet.models.detectors.retinanet' in message
    assert 'Rename one' in message
    assert 'RetinaNet' not in MODELS.module_dict, 'nothing is half registered'


def test_a_name_that_another_package_owns_is_refused(forget):
    class Theirs(nn.Module):
        __module__ = 'another.package'

    class Ours(nn.Module):
        pass

    mmdet.registry.MODELS.register_module(name='SharedLoss', module=Theirs)
    with pytest.raises(KeyError, match=r'another\.package already owns'):
        MODELS.register_module(name='SharedLoss', module=Ours)


def test_of_several_names_none_is_registered_if_one_is_taken(forget):
    class Ours(nn.Module):
        pass

    with pytest.raises(KeyError):
        MODELS.register_module(name=['Fresh', 'FCOS'], module=Ours)
    assert 'Fresh' not in MODELS.module_dict
    assert 'Fresh' not in mmdet.registry.MODELS.module_dict


def test_force_replaces_in_both(forget):
    class FCOS(nn.Module):
        pass

    MODELS.register_module(module=FCOS, force=True)
    assert MODELS.get('FCOS') is FCOS
    assert mmdet.registry.MODELS.get('FCOS') is FCOS


def test_a_new_entry_resolves_at_once_in_both(forget):
    @MODELS.register_module()
    class BrandNewLoss(nn.Module):
        pass

    for kind in ('BrandNewLoss', 'mmkd.BrandNewLoss'):
        assert isinstance(
            mmdet.registry.MODELS.build(dict(type=kind)), BrandNewLoss
        )


def test_hooks_are_shared_as_models_are(forget):
    @HOOKS.register_module()
    class BrandNewHook:
        pass

    assert mmdet.registry.HOOKS.get('BrandNewHook') is BrandNewHook


def test_schedules_are_mmkds_alone():
    SCHEDULES.import_from_location()
    assert 'StopAfter' in SCHEDULES.module_dict
    assert mmdet.registry.MODELS.get('StopAfter') is None


def test_discover_imports_every_module_of_a_package(tmp_path, monkeypatch):
    package = tmp_path / 'somewhere_new'
    package.mkdir()
    (package / '__init__.py').write_text(
        'from mmkd.registry import discover\ndiscover(__name__, __path__)\n'
    )
    (package / 'first.py').write_text('value = 1\n')
    (package / 'second.py').write_text('value = 2\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    import somewhere_new

    assert (somewhere_new.first.value, somewhere_new.second.value) == (1, 2)
    discover(somewhere_new.__name__, somewhere_new.__path__)  # again: no harm

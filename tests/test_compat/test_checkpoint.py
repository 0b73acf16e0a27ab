import collections
import hashlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import hostile
import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmkd.compat.checkpoint import (
    CheckpointError,
    allow_checkpoints,
    check_file,
    classes_of,
    hash_in_name,
    kept_at,
    load_from_url,
    read_checkpoint,
    sha256_of,
    state_dict_of,
    trusting,
)


@pytest.fixture
def training_file(tmp_path):
    """What MMEngine writes: weights, logs, NumPy values, words."""
    loss = HistoryBuffer([2.0, 1.0], [1, 1])
    path = tmp_path / 'epoch_1.pth'
    torch.save(
        dict(
            meta=dict(epoch=1, iter=2, dataset_meta=dict(classes=('a', 'b'))),
            state_dict=collections.OrderedDict(weight=torch.arange(3.0)),
            message_hub=dict(
                log_scalars=dict(loss=loss),
                runtime_info=dict(best_score=np.float64(0.5)),
            ),
            array=np.arange(4, dtype=np.uint8),
        ),
        path,
    )
    return path


def test_training_checkpoint_is_read_whole(training_file):
    read = read_checkpoint(training_file)
    buffer = read['message_hub']['log_scalars']['loss']
    assert buffer.mean() == 1.5
    assert buffer.statistics('max') == 2
    assert read['message_hub']['runtime_info']['best_score'] == 0.5
    assert read['array'].tolist() == [0, 1, 2, 3]
    assert read['state_dict']['weight'].tolist() == [0, 1, 2]


def test_mmengine_reads_training_checkpoints_too(training_file):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3))
    mmengine_checkpoint.load_checkpoint(model, str(training_file))
    assert model.weight.tolist() == [0, 1, 2]


@pytest.mark.parametrize('core', ['numpy.core', 'numpy._core'])
def test_arrays_of_either_numpy_are_read(training_file, core, tmp_path):
    path = tmp_path / 'other.pth'
    with (
        zipfile.ZipFile(training_file) as old,
        zipfile.ZipFile(path, 'w') as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name.endswith('data.pkl'):
                for present in (b'cnumpy._core.', b'cnumpy.core.'):
                    content = content.replace(present, f'c{core}.'.encode())
            new.writestr(name, content)
    assert read_checkpoint(path)['array'].tolist() == [0, 1, 2, 3]


@pytest.fixture
def legacy(tmp_path):
    """A file that asks for a call, which leaves a mark."""
    path = tmp_path / 'legacy.pth'
    torch.save(
        dict(
            state_dict=dict(w=torch.ones(2)),
            other=hostile.system(tmp_path / 'mark'),
        ),
        path,
    )
    return path


@pytest.fixture
def ran(tmp_path):
    """Whether it was made."""
    return (tmp_path / 'mark').exists


def test_a_trusted_file_is_read_and_named_aloud(legacy, ran, capsys):
    digest = sha256_of(legacy)
    with trusting(legacy):
        state = state_dict_of(read_checkpoint(legacy))
    assert state['w'].tolist() == [1, 1]
    assert ran()
    said = capsys.readouterr()
    assert said.out == ''
    assert said.err.startswith(f'WARNING: {legacy} asks for posix.system')
    assert 'may run any code' in said.err
    assert digest in said.err


def test_mmengine_reads_a_trusted_file_too(legacy, ran):
    with trusting(legacy):
        mmengine_checkpoint._load_checkpoint(str(legacy))
    assert ran()


def test_trust_ends_with_the_command(legacy, ran):
    with trusting(legacy):
        pass
    with pytest.raises(CheckpointError, match='--trust-checkpoint'):
        read_checkpoint(legacy)
    assert not ran()


def test_trust_ends_when_the_command_fails(legacy, ran):
    with pytest.raises(KeyError), trusting(legacy):
        raise KeyError
    with pytest.raises(CheckpointError, match='--trust-checkpoint'):
        read_checkpoint(legacy)
    assert not ran()


def test_trust_is_of_the_files_that_are_named(legacy, ran, tmp_path):
    other = shutil.copy(legacy, tmp_path / 'other.pth')
    with (
        trusting(other),
        pytest.raises(CheckpointError, match=f'--trust-checkpoint {legacy}'),
    ):
        read_checkpoint(legacy)
    assert not ran()


def test_trust_is_of_a_file_as_it_was(legacy, ran, training_file):
    hidden = legacy.read_bytes()
    shutil.copy(training_file, legacy)
    with trusting(legacy):
        legacy.write_bytes(hidden)
        with pytest.raises(CheckpointError, match='was changed since'):
            read_checkpoint(legacy)
    assert not ran()


def test_trust_is_of_a_file_by_any_of_its_names(legacy, ran, monkeypatch):
    monkeypatch.chdir(legacy.parent)
    with trusting('./legacy.pth'):
        read_checkpoint(legacy)
    assert ran()


def test_trust_that_was_not_needed_is_told(training_file, capsys):
    with trusting(training_file):
        read_checkpoint(training_file)
    assert 'needed no trust' in capsys.readouterr().err


def test_without_trust_nothing_is_told(training_file, capsys):
    with trusting():
        read_checkpoint(training_file)
    assert capsys.readouterr().err == ''


def test_what_is_not_there_cannot_be_trusted(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match='--trust-checkpoint expected'),
        trusting(tmp_path / 'no.pth'),
    ):
        pytest.fail('it begins')


def test_a_trusted_file_of_a_missing_package_says_so(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(dict(w=torch.ones(1), x=hostile.Calls(os.mkdir, 'x')), path)
    content = path.read_bytes()
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / 'b.pth', 'w') as new,
    ):
        for name in old.namelist():
            text = old.read(name).replace(b'cposix\nmkdir', b'cgone_x\nmkdir')
            new.writestr(name, text)
    assert content
    with (
        trusting(tmp_path / 'b.pth'),
        pytest.raises(CheckpointError, match='gone_x.*not installed|needs'),
    ):
        read_checkpoint(tmp_path / 'b.pth')


# Addresses -------------------------------------------------------------------


@pytest.fixture
def published(training_file, tmp_path):
    """The address of a file, its SHA-256, and where it is kept."""
    address = training_file.as_uri()
    return address, sha256_of(training_file), tmp_path / 'cache'


def test_a_recorded_file_is_fetched_and_kept(published, training_file):
    address, digest, cache = published
    read = load_from_url(f'{address}#sha256={digest}', str(cache))
    assert read['meta']['epoch'] == 1
    training_file.unlink()  # it is not asked for again
    load_from_url(f'{address}#sha256={digest.upper()}', str(cache))
    assert [one.name for one in cache.iterdir()] == ['epoch_1.pth']


def test_another_file_than_recorded_is_not_kept(published):
    address, _, cache = published
    with pytest.raises(CheckpointError, match='not the file that was record'):
        load_from_url(f'{address}#sha256={"0" * 64}', str(cache))
    assert list(cache.iterdir()) == []


def test_a_kept_file_is_compared_again(published, training_file):
    address, digest, cache = published
    load_from_url(f'{address}#sha256={digest}', str(cache))
    torch.save(dict(w=torch.zeros(1)), cache / training_file.name)
    with pytest.raises(CheckpointError, match=r'Remove it \(rm '):
        load_from_url(f'{address}#sha256={digest}', str(cache))


@pytest.mark.parametrize('right', [True, False])
def test_digits_in_a_published_name_are_compared(right, published):
    address, digest, cache = published
    digits = digest[:8] if right else '01234567'
    path = Path(address.removeprefix('file://'))
    name = path.with_name(f'model-1.5x_300e-{digits}.pth')
    path.rename(name)
    if right:
        assert load_from_url(name.as_uri(), str(cache))['meta']['iter'] == 2
    else:
        with pytest.raises(CheckpointError, match='not the file that was'):
            load_from_url(name.as_uri(), str(cache))


@pytest.mark.parametrize('scheme', ['http://127.0.0.1:9', 'file:///none'])
def test_without_a_network_it_says_where_the_file_belongs(scheme, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_from_url(f'{scheme}/a/resnet.pth', str(tmp_path))
    said = str(caught.value)
    assert said.startswith(f'{scheme}/a/resnet.pth could not be fetched: ')
    assert said.endswith(f'copy it to {tmp_path / "resnet.pth"}')
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_read_as_any_file(published, tmp_path):
    _, _, cache = published
    path = tmp_path / 'trojan.pth'
    torch.save(dict(x=hostile.system(tmp_path / 'mark')), path)
    with pytest.raises(CheckpointError, match='nothing of it was run'):
        load_from_url(path.as_uri(), str(cache))
    assert not (tmp_path / 'mark').exists()


def test_mmengine_fetches_by_the_same_way(published, monkeypatch):
    address, digest, cache = published
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(cache))
    read = mmengine_checkpoint.load_from_http(f'{address}#sha256={digest}')
    assert read['meta']['iter'] == 2
    assert (cache / 'checkpoints' / 'epoch_1.pth').is_file()


# -----------------------------------------------------------------------------


def test_allowing_twice_changes_nothing(training_file):
    before = len(torch.serialization.get_safe_globals())
    allow_checkpoints()
    assert len(torch.serialization.get_safe_globals()) == before
    read_checkpoint(training_file)


def test_the_real_getattr_is_not_on_the_list():
    listed = [
        one[0] if isinstance(one, tuple) else one
        for one in torch.serialization.get_safe_globals()
    ]
    assert getattr not in listed


def test_a_missing_file_suggests_the_nearest_name(tmp_path):
    (tmp_path / 'epoch_12.pth').touch()
    with pytest.raises(FileNotFoundError, match=r"mean '.*epoch_12\.pth'\?"):
        read_checkpoint(tmp_path / 'epoch_2.pth')


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist either'):
        check_file(tmp_path / 'nowhere' / 'a.pth')


@pytest.mark.parametrize('keep', [0.3, 0.9])
def test_a_cut_off_file_says_so(training_file, keep):
    content = training_file.read_bytes()
    training_file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r'end is missing.*again'):
        read_checkpoint(training_file)


def test_a_cut_off_file_of_old_torch_says_so(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(
        dict(w=torch.zeros(999)), path, _use_new_zipfile_serialization=False
    )
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(CheckpointError, match=r'damaged file of .* again'):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ('content', 'complaint'),
    [
        (b'', 'an empty file'),
        (b'<!DOCTYPE html><html>404', 'a web page'),
        (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
        (b'hello world', 'torch did not write'),
        (pickle.dumps([1, 2]), 'damaged file|type list'),
    ],
)
def test_what_is_no_checkpoint_is_named(content, complaint, tmp_path):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(path)


def test_a_checkpoint_must_be_a_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / 'tensor.pth')
    with pytest.raises(CheckpointError, match='type Tensor'):
        read_checkpoint(tmp_path / 'tensor.pth')


def test_files_of_old_torch_are_read(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(
        dict(meta=dict(CLASSES=('a',)), state_dict=dict(w=torch.ones(2))),
        path,
        _use_new_zipfile_serialization=False,
    )
    read = read_checkpoint(path)
    assert state_dict_of(read)['w'].tolist() == [1, 1]
    assert classes_of(read) == ('a',)


def test_wrappers_are_stripped_and_metadata_kept():
    plain = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    wrapped = nn.Module()
    wrapped.module = plain
    state = state_dict_of(dict(state_dict=wrapped.state_dict()))
    assert list(state) == list(plain.state_dict())
    # BatchNorm asks for the version it was saved with.
    assert state._metadata['1'] == plain.state_dict()._metadata['1']


def test_a_name_that_only_starts_like_a_wrapper_stays():
    state = {'module.w': torch.zeros(1), 'head.w': torch.zeros(1)}
    assert list(state_dict_of(state)) == list(state)


def test_mmengines_average_stands_under_the_plain_names():
    average, trained = torch.ones(2), torch.zeros(2)
    saved = dict(
        state_dict={'conv.w': average},
        ema_state_dict={'steps': torch.tensor(5), 'module.conv.w': trained},
    )
    assert state_dict_of(saved)['conv.w'] is average
    assert dict(state_dict_of(saved, prefer_ema=False)) == {'conv.w': trained}


def test_mmdet_2_average_is_parted_from_the_trained_weights():
    average, trained = torch.ones(2), torch.zeros(2)
    saved = dict(
        state_dict={
            'backbone.conv1.weight': average,
            'ema_backbone_conv1_weight': trained,
        }
    )
    name = 'backbone.conv1.weight'
    assert dict(state_dict_of(saved)) == {name: average}
    assert dict(state_dict_of(saved, prefer_ema=False)) == {name: trained}


def test_a_second_dict_of_averages_is_taken_on_request():
    saved = dict(
        state_dict=dict(w=torch.zeros(1)), state_dict_ema=dict(w=torch.ones(1))
    )
    assert state_dict_of(saved)['w'] == 1
    assert state_dict_of(saved, prefer_ema=False)['w'] == 0


def test_weights_may_be_missing_from_a_dict():
    with pytest.raises(CheckpointError, match='only epoch'):
        state_dict_of(dict(epoch=3))


@pytest.mark.parametrize(
    ('meta', 'classes'),
    [
        (dict(dataset_meta=dict(classes=['cat', 'dog'])), ('cat', 'dog')),
        (dict(dataset_meta=dict(CLASSES=('cat',))), ('cat',)),
        (dict(CLASSES=('cat',)), ('cat',)),
        (dict(epoch=1), None),
        (None, None),
    ],
)
def test_classes_are_found_where_either_mmdet_put_them(meta, classes):
    assert classes_of(dict(meta=meta)) == classes


def test_safetensors_need_their_package_or_are_read(tmp_path):
    path = tmp_path / 'weights.safetensors'
    path.write_bytes(b'\x00' * 16)
    try:
        import safetensors.torch
    except ImportError:
        with pytest.raises(ImportError, match='pip install safetensors'):
            read_checkpoint(path)
        return
    safetensors.torch.save_file({'w': torch.ones(2)}, path)
    assert read_checkpoint(path)['w'].tolist() == [1, 1]


# Hashes in names -------------------------------------------------------------


def test_the_digest_is_that_of_the_standard_library(tmp_path):
    content = bytes(range(256)) * 2**13  # two blocks
    (tmp_path / 'a').write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert sha256_of(tmp_path / 'a') == expected


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth', 'c2398f9e'),
        ('resnet50-0676ba61.pth', '0676ba61'),
        ('a-20200130.pth', None),
        ('a-20200130123456.pth', None),
        ('epoch-12.pth', None),
        ('best-checkpoint.pth', None),
    ],
)
def test_a_date_is_no_hash(name, said):
    assert hash_in_name(name) == said


def test_a_file_that_is_named_by_a_date_is_fetched(tmp_path, training_file):
    path = tmp_path / 'detector-20200130.pth'
    path.write_bytes(training_file.read_bytes())
    cache = tmp_path / 'cache'
    assert load_from_url(path.as_uri(), str(cache))['meta']
    assert kept_at(f'{path.as_uri()}#sha256=00', cache) == cache / path.name
    assert (cache / path.name).is_file()

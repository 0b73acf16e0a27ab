"""A disk that takes no more, and files that vanish, during a training."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import runs
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.engine.trainer import latest_checkpoint

data, quick_starts = runs.data, runs.quick_starts

#: Iteration after which the disk takes no more; a checkpoint follows each.
LAST = 2


@HOOKS.register_module()
class Spoiler(Hook):
    """Calls a function before an iteration."""

    def __init__(self, call):
        self.call = call

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == LAST:
            self.call(runner)


def config(data, work_dir, spoil):
    cfg = runs.config(data, work_dir, iters=2 * LAST)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.custom_hooks = [dict(type='Spoiler', call=spoil)]
    return cfg


def check_what_is_left(work_dir, checkpoints, iteration=LAST):
    """The last good one is whole and is found; nothing else is there."""
    last = checkpoints / f'iter_{iteration}.pth'
    assert latest_checkpoint(work_dir) == str(last)
    assert read_checkpoint(last)['meta']['iter'] == iteration
    assert [one.name for one in checkpoints.glob('.*.part')] == []
    assert [one.name for one in checkpoints.glob('*.pth')] == [last.name]


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('cannot mount a small file system here')
    yield folder
    subprocess.run(['umount', '--lazy', str(folder)], check=True)


def test_a_full_disk_says_so_and_leaves_the_last_checkpoint(data, small_disk):
    def fill(runner):
        free = shutil.disk_usage(small_disk).free
        # Room for half of a checkpoint.
        half = (work_dir / f'iter_{LAST}.pth').stat().st_size // 2
        (small_disk / 'filler').write_bytes(bytes(free - half))

    work_dir = small_disk / 'run'
    with pytest.raises(OSError, match='No space left.*iteration 3') as caught:
        runs.train(config(data, work_dir, fill))
    assert caught.value.errno == errno.ENOSPC
    assert f'last whole checkpoint is {work_dir}/iter_2.pth' in str(
        caught.value
    )
    check_what_is_left(work_dir, work_dir)

    (small_disk / 'filler').unlink()
    left = work_dir / '.iter_9.pth.part'  # as SIGKILL would have
    left.touch()
    again = config(data, work_dir, None)
    again.custom_hooks, again.resume = [], True
    whole = config(data, small_disk.parent / 'whole', None)
    whole.custom_hooks = []
    assert runs.differences(runs.train(whole), runs.train(again)) == []
    assert not left.exists()


def test_a_disk_that_becomes_read_only_says_so(data, tmp_path, small_disk):
    def freeze(runner):
        command = ['mount', '-o', 'remount,ro', str(small_disk)]
        subprocess.run(command, check=True)

    cfg = config(data, tmp_path / 'run', freeze)
    cfg.default_hooks.checkpoint.out_dir = str(small_disk)
    with pytest.raises(OSError, match='Read-only.*disk/run/') as caught:
        runs.train(cfg)
    assert 'The last whole checkpoint is' in str(caught.value)
    check_what_is_left(tmp_path / 'run', small_disk / 'run')


def test_a_file_that_may_not_be_as_large_says_so(data, tmp_path):
    """The same without a file system of its own, as for any user."""
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(runner):
        size = (tmp_path / f'iter_{LAST}.pth').stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        with pytest.raises(OSError, match='too large.*iteration 3') as caught:
            runs.train(config(data, tmp_path, limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    check_what_is_left(tmp_path, tmp_path)


def test_other_errors_of_files_are_left_as_they_are(data, tmp_path):
    def fail(runner):
        raise OSError(errno.EIO, os.strerror(errno.EIO), 'a disk')

    with pytest.raises(OSError, match=r"^\[Errno 5\].*: 'a disk'$"):
        runs.train(config(data, tmp_path, fail))


def test_an_image_that_vanishes_is_named(tmp_path):
    runs.write_coco(tmp_path / 'data')

    def remove(runner):
        for one in (tmp_path / 'data' / 'images').iterdir():
            one.unlink()

    with pytest.raises(FileNotFoundError, match=r'images/00\d\.png'):
        runs.train(config(tmp_path / 'data', tmp_path / 'run', remove))
    # The images of the next step were there already.
    check_what_is_left(tmp_path / 'run', tmp_path / 'run', LAST + 1)


def test_checkpoints_that_vanish_do_not_end_the_training(data, tmp_path):
    def remove(runner):
        for one in Path(tmp_path).glob('*.pth'):
            one.unlink()
        (tmp_path / 'last_checkpoint').unlink()

    runs.train(config(data, tmp_path, remove))
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'iter_4.pth')

import multiprocessing
from collections import namedtuple

import pytest
import torch

from mmkd.store import (
    PRECISIONS,
    Store,
    packed,
    quantised,
    restored,
    room_of,
    unpacked,
    weights_digest,
)
from mmkd.structures.nested import leaves

WHO = "Teacher 'big'"
ABOUT = dict(precision='int8', taps=['neck'], weights='w', complete=True)


def written(folder, entries, room=2**20, **about):
    store = Store(folder, WHO)
    store.begin(dict(ABOUT, **about), room)
    for image, entry in entries.items():
        store.write(image, entry)
    store.close()
    return folder


def maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, 6, side, side + 1, generator=generator)
        for side in (8, 4)
    )


@pytest.mark.parametrize('form', [(3, 7, 5, 4), (3, 11, 7)])
def test_what_is_restored_is_half_a_step_away_at_most(form):
    """A step is the 255th part of what a channel spans."""
    torch.manual_seed(0)
    value = torch.randn(form) * torch.logspace(-4, 4, 7).reshape(
        (1, 7, 1, 1) if len(form) == 4 else (1, 1, 7)
    )
    cells = (2, 3) if len(form) == 4 else (1,)
    found = restored(*quantised(value, cells))
    span = value.amax(cells, keepdim=True) - value.amin(cells, keepdim=True)
    assert ((found - value).abs() <= span / 255 * 0.5001).all()
    assert ((found - value).abs().amax(cells) > 0).all()


def test_a_channel_of_one_value_is_kept_exactly():
    value = torch.tensor([0.1, -7.0, 0.0])[None, :, None, None]
    value = value.expand(2, 3, 4, 5)
    steps, low, size = quantised(value, (2, 3))
    assert torch.equal(restored(steps, low, size), value)
    assert not steps.any()
    assert (size > 0).all()  # else 0 / 0


def test_channels_do_not_share_their_steps():
    """A large channel beside it costs a small one nothing."""
    small = torch.rand(1, 1, 4, 4)
    both = torch.cat([small, 1e6 * torch.rand(1, 1, 4, 4)], 1)
    alone, beside = (
        unpacked(packed(one, 'int8'))[:, :1] for one in (small, both)
    )
    assert torch.equal(alone, beside)


@pytest.mark.parametrize('precision', PRECISIONS)
def test_outputs_of_any_depth_come_back(precision):
    torch.manual_seed(0)
    value = (
        maps(),
        [torch.arange(3), None, {'a': torch.zeros(1, 0), 'b': 'text'}],
        torch.tensor(3.25),
        torch.randn(1, 6, 4).half(),
        torch.tensor([[True, False]]),
        (1, 2.5, False),
        700 + torch.rand(1, 4),
    )
    found = unpacked(packed(value, precision))
    assert type(found) is tuple
    assert found[1][1] is None
    assert found[1][2]['b'] == 'text'
    assert found[5] == (1, 2.5, False)
    error = dict(int8=0.02, fp16=1e-3, fp32=0.0)[precision]
    for one, other in zip(leaves(value), leaves(found), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=error, rtol=error)
    # What is not a map is small, and often a place in pixels.
    assert torch.equal(value[6], found[6])


@pytest.mark.parametrize('precision', PRECISIONS)
def test_what_is_not_finite_stays(precision):
    value = torch.tensor([0.0, float('inf'), float('nan'), 1e30])
    value = value.reshape(1, 1, 2, 2)
    found = unpacked(packed(value, precision))
    torch.testing.assert_close(found, value, equal_nan=True, rtol=0, atol=0)


def test_what_half_precision_cannot_hold_stays():
    value = torch.full((1, 1, 2, 2), 1e9)
    assert torch.equal(unpacked(packed(value, 'fp16')), value)


def test_steps_take_a_quarter_of_the_room():
    value = torch.randn(1, 64, 40, 40)
    sizes = {each: len(packed(value, each)) for each in PRECISIONS}
    assert sizes['int8'] < 0.26 * sizes['fp32']
    assert 0.49 < sizes['fp16'] / sizes['fp32'] < 0.51


@pytest.mark.parametrize(
    'value', [torch.nn.Identity(), [{1}], namedtuple('Pair', 'a b')(1, 2)]
)
def test_what_no_file_may_hold_is_refused(value, tmp_path):
    store = Store(tmp_path, WHO)
    store.begin(ABOUT, 2**20)
    with pytest.raises(ValueError, match="'big': an output that holds"):
        store.write(b'image', dict(neck=[value]))


def test_it_gives_what_was_written(tmp_path):
    entries = {b'one': maps(0), b'other': maps(1)}
    written(tmp_path, {key: dict(neck=[one]) for key, one in entries.items()})
    store = Store(tmp_path, WHO)
    assert len(store) == 2
    for key, value in entries.items():
        (found,) = store.read(key, ['neck'], 'cpu')['neck']
        for one, other in zip(value, found):
            torch.testing.assert_close(one, other, atol=0.02, rtol=0)


def test_images_may_have_long_names(tmp_path):
    names = [900 * b'a', 900 * b'a' + b'b']
    written(tmp_path, {one: dict(neck=[maps(len(one))]) for one in names})
    store = Store(tmp_path, WHO)
    ours, theirs = (store.read(one, ['neck'], 'cpu') for one in names)
    assert not torch.equal(ours['neck'][0][0], theirs['neck'][0][0])


@pytest.mark.parametrize('precision', PRECISIONS)
def test_room_is_known_before_it_is_taken(tmp_path, precision):
    value = [torch.rand(1, 8, 40, 40)]
    entries = {str(one).encode(): dict(neck=value) for one in range(40)}
    written(tmp_path, entries, room=2**24, precision=precision)
    wanted = 40 * room_of(value, precision)
    assert wanted <= Store(tmp_path, WHO).size < 1.2 * wanted + 2**16


def test_its_size_is_that_of_its_file(tmp_path):
    written(tmp_path, {b'one': dict(neck=[maps()])})
    size = (tmp_path / 'data.mdb').stat().st_size
    assert Store(tmp_path, WHO).size == size


def test_what_is_not_there_is_not_there(tmp_path):
    written(tmp_path, {b'one': dict(neck=[maps()])})
    store = Store(tmp_path, WHO)
    assert store.read(b'two', ['neck'], 'cpu') is None
    assert store.read(b'one', ['neck', 'backbone'], 'cpu') is None
    with pytest.raises(ValueError, match=r'does not hold an image.*padded'):
        store.check_absent()
    Store(tmp_path, WHO, missing='show').check_absent()


@pytest.mark.parametrize(
    ('about', 'wanted', 'message'),
    [
        ({}, dict(weights='other'), r'stale, for its weights'),
        (dict(taps=['backbone']), {}, r'holds backbone, and.*ask for neck'),
        (
            dict(complete=False),
            {},
            r'not finished\. .*teacher\.py my\.py$',
        ),
    ],
)
def test_what_a_teacher_would_not_say_is_refused(
    tmp_path, about, wanted, message
):
    command = 'python tools/cache_teacher.py my.py'
    written(tmp_path, {}, command=command, **about)
    store = Store(tmp_path, WHO)
    with pytest.raises(ValueError, match=message):
        store.check(dict(dict(weights='w'), **wanted), ['neck'])


def test_where_none_is_the_command_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no cache in .*there.*tools'):
        Store(tmp_path / 'there', WHO).check({}, [])


@pytest.mark.parametrize('damage', ['cut', 'noise', 'text'])
def test_a_damaged_file_is_told(tmp_path, damage):
    written(tmp_path, {b'one': dict(neck=[maps()])})
    file = tmp_path / 'data.mdb'
    data = file.read_bytes()
    if damage == 'cut':
        file.write_bytes(data[:100])
    elif damage == 'text':
        file.write_text('not a cache')
    else:
        file.write_bytes(bytes(reversed(data)))
    with pytest.raises(ValueError, match=r'cannot be read.*--overwrite'):
        Store(tmp_path, WHO).check({}, ['neck'])


def test_another_version_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr('mmkd.store.FORMAT', 0)
    written(tmp_path, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r'of version 0'):
        Store(tmp_path, WHO).check({}, [])


def test_a_damaged_output_is_told(tmp_path):
    store = Store(tmp_path, WHO)
    store.begin(ABOUT, 2**20)
    store.write(b'one', dict(neck=[maps()]))
    with store._file.begin(write=True) as transaction:
        for key, value in list(transaction.cursor()):
            if key != b'about':
                transaction.put(key, bytes(len(value)))
    with pytest.raises(ValueError, match='cannot be read'):
        store.read(b'one', ['neck'], 'cpu')


def test_a_full_one_is_told_and_what_is_there_stays(tmp_path):
    store = Store(tmp_path, WHO)
    store.begin(dict(ABOUT, precision='fp32'), 2**20)
    kept = 0
    with pytest.raises(ValueError, match=r'is full with .*--limit'):
        for kept in range(60):
            value = torch.rand(1, 2**18)
            store.write(str(kept).encode(), dict(neck=[value]))
    assert kept > 3
    assert store.read(str(kept).encode(), ['neck'], 'cpu') is None
    assert store.read(b'0', ['neck'], 'cpu') is not None


def test_several_read_it_at_once_in_one_process(tmp_path):
    written(tmp_path, {b'one': dict(neck=[maps()])})
    stores = [Store(tmp_path, WHO) for _ in range(3)]
    assert all(one.read(b'one', ['neck'], 'cpu') for one in stores)
    stores[0].close()
    assert stores[1].read(b'one', ['neck'], 'cpu')
    assert stores[0].read(b'one', ['neck'], 'cpu')


def test_a_forked_process_opens_its_own(tmp_path):
    """As the workers of a loader are."""
    written(tmp_path, {b'one': dict(neck=[maps()])})
    store = Store(tmp_path, WHO)
    store.read(b'one', ['neck'], 'cpu')
    ours = store._file
    context = multiprocessing.get_context('fork')
    queue = context.Queue()

    def work():
        found = store.read(b'one', ['neck'], 'cpu')
        queue.put((store._file is ours, found is not None))

    workers = [context.Process(target=work) for _ in range(3)]
    for one in workers:
        one.start()
    told = [queue.get(timeout=60) for _ in workers]
    for one in workers:
        one.join()
    assert told == [(False, True)] * 3


@pytest.mark.parametrize('change', ['weight', 'buffer', 'name', 'shape'])
def test_weights_have_a_name(change):
    def net(norm=torch.nn.BatchNorm2d):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), norm(2))

    one, other = net(), net()
    assert weights_digest(one) == weights_digest(other)
    if change == 'weight':
        other[0].weight.data[0, 0] += 1e-6
    elif change == 'buffer':
        other[1].running_mean[0] = 1e-6
    elif change == 'name':
        other = torch.nn.Sequential(other)
    else:
        other[0].weight.data = other[0].weight.data.reshape(1, 4, 1, 1)
    assert weights_digest(one) != weights_digest(other)

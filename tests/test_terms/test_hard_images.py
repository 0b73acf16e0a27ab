import io

import pytest
import tiny
import torch

from mmkd.terms.hard_images import HardImages


def numbered(*numbers, side=64):
    """Images that are one number, of this side, and their samples."""
    images, samples = tiny.batch(shapes=((side, side),) * len(numbers))
    for index, number in enumerate(numbers):
        images[index, :, :side, :side] = number
    return images, samples


def held(store):
    """Numbers of the images it holds, in their order."""
    return [one['image'][0, 0, 0].item() for one in store.state()['images']]


def watch(store, numbers, losses, **settings):
    store.watch(*numbered(*numbers, **settings), torch.tensor(losses))


def test_images_at_or_above_the_median_are_kept():
    store = HardImages(8)
    watch(store, [1, 2, 3], [0.1, 0.3, 0.2])
    assert held(store) == [2, 3]


def test_the_median_runs_over_earlier_batches():
    store = HardImages(8)
    watch(store, [1, 2], [10.0, 20.0])  # median 15
    watch(store, [3, 4], [12.0, 5.0])  # median 11
    watch(store, [5, 6], [1.0, 2.0])  # both easy
    assert held(store) == [2, 3]


def test_nothing_is_looked_at_before_it_is_needed():
    store = HardImages(8)
    losses = torch.tensor([1.0])
    store.watch(*numbered(1), losses)
    assert store._images == []  # nobody has waited for the device
    assert len(store) == 1


def test_a_full_store_replaces_at_random():
    torch.manual_seed(0)
    places = set()
    for _ in range(20):
        store = HardImages(3)
        for number in (1, 2, 3, 4):
            watch(store, [number], [float(number)])
        found = held(store)
        assert len(found) == 3
        assert found.count(4) == 1
        places.add(found.index(4))
    assert places == {0, 1, 2}


def test_it_lies_in_main_memory_without_border_in_half_precision():
    store = HardImages(2)
    watch(store, [1.5], [1.0], side=48)
    (kept,) = store.state()['images']
    assert kept['image'].shape == (3, 48, 48)
    assert kept['image'].dtype == torch.float16
    assert kept['image'].device.type == 'cpu'
    assert kept['image'].untyped_storage().nbytes() == 2 * 3 * 48 * 48


def test_what_is_drawn_is_a_batch_with_its_boxes():
    store = HardImages(4)
    images, samples = tiny.batch(shapes=((96, 112), (48, 40)))
    store.watch(images, samples, torch.ones(2))
    found, drawn = store.draw(2, images)
    assert found.shape == (2, 3, 96, 128)
    assert found.dtype == images.dtype
    for image, sample in zip(found, drawn):
        (own,) = (one for one in samples if one.img_shape == sample.img_shape)
        height, width = sample.img_shape
        index = samples.index(own)
        torch.testing.assert_close(
            image[:, :height, :width],
            images[index, :, :height, :width],
            rtol=1e-3,
            atol=1e-3,
        )
        assert image[:, height:].abs().sum() == 0
        assert image[:, :, width:].abs().sum() == 0
        assert sample.batch_input_shape == (96, 128)
        assert torch.equal(sample.gt_instances.bboxes, own.gt_instances.bboxes)
        assert torch.equal(sample.gt_instances.labels, own.gt_instances.labels)


def test_fewer_than_asked_are_all():
    store = HardImages(4)
    watch(store, [1], [1.0])
    assert len(store.draw(3, torch.zeros(1))[1]) == 1


def test_ignored_boxes_stay_ignored():
    images, (sample,) = numbered(1)
    sample.ignored_instances.bboxes = torch.tensor([[0.0, 0, 9, 9]])
    sample.ignored_instances.labels = torch.zeros(1, dtype=torch.long)
    store = HardImages(1)
    store.watch(images, [sample], torch.ones(1))
    (drawn,) = store.draw(1, images)[1]
    assert drawn.ignored_instances.bboxes.tolist() == [[0, 0, 9, 9]]


def test_another_store_goes_on_from_its_state():
    store, other = HardImages(4), HardImages(4)
    watch(store, [1, 2, 3], [1.0, 2.0, 3.0])
    file = io.BytesIO()
    torch.save(store.state(), file)
    file.seek(0)
    other.load_state(torch.load(file, weights_only=True))
    for one in (store, other):
        torch.manual_seed(0)
        watch(one, [4, 5], [0.5, 2.5])
    assert held(store) == held(other)
    assert held(other)[-1] == 5


def test_a_store_of_nothing_is_refused():
    with pytest.raises(ValueError, match='HardImages needs size > 0'):
        HardImages(0)

import copy

import pytest
import tiny
import torch

from mmkd.memory import GIB, Memory
from mmkd.taps import Call, Record
from mmkd.teachers import Teacher

SHAPES = ((128, 128), (96, 128), (128, 112))


@pytest.fixture
def make(teacher_file, student_pixels):
    """Teachers with or without a cache, and a way to show them a batch."""

    def make(tap='neck', **settings):
        one = Teacher(
            config=dict(model=tiny.retinanet(base=16)),
            checkpoint=str(teacher_file),
            name='big',
            **settings,
        )
        one.tap(tap)
        one.load()
        one.shown = []
        plain = one.detector._forward

        def forward(images, samples):
            one.shown.append(len(images))
            one.samples = samples
            return plain(images, samples)

        one.detector._forward = forward
        one.show = lambda images, samples, **more: one.run(
            images, samples, student_pixels, **more
        )
        return one

    return make


@pytest.fixture
def student_pixels():
    from mmkd.pixels import Pixels

    mean, std = tiny.PIXELS['mean'], tiny.PIXELS['std']
    return Pixels(tuple(mean), tuple(std), True, 0, 32)


def part(batch, *wanted):
    images, samples = batch
    return images[list(wanted)], [samples[one] for one in wanted]


def assert_same(record, other, path='neck', **tolerance):
    assert len(record.at(path)) == len(other.at(path))
    for one, two in zip(record.at(path), other.at(path)):
        torch.testing.assert_close(one, two, **tolerance)


def test_it_gives_what_the_teacher_says(make):
    batch = tiny.batch(shapes=SHAPES)
    cached, plain = make(cache=1.0), make()
    expected = plain.show(*batch)
    for _ in range(2):
        record = cached.show(*batch)
        assert record.size == expected.size
        assert record.detector is cached.detector
        assert_same(record, expected)


def test_a_head_called_once_a_level_too(make):
    """Lists of maps, and a part that is called several times."""
    batch = tiny.batch(shapes=SHAPES)
    cached, plain = (
        make('bbox_head.retina_cls', cache=1.0),
        make('bbox_head.retina_cls'),
    )
    cached.show(*batch)
    path = 'bbox_head.retina_cls'
    assert len(plain.show(*batch).at(path)) == 5
    assert_same(cached.show(*batch), plain.show(*batch), path)


def test_what_it_knows_is_not_computed(make):
    batch = tiny.batch(shapes=SHAPES)
    one = make(cache=1.0)
    one.show(*batch)
    assert one.shown == [1, 1, 1, 3]  # and once together, to compare
    one.shown.clear()
    one.show(*batch)
    one.show(*part(batch, 2, 0))
    assert one.shown == []
    assert (one.memory.hits, one.memory.misses) == (5, 3)


def test_a_batch_is_waited_for_once(make, monkeypatch):
    """Whatever is read on the CPU waits for a GPU; outputs are not read."""
    batch = tiny.batch(shapes=SHAPES)
    one = make(cache=1.0)
    one.show(*batch)
    waited = []
    for name in ('cpu', 'item', 'tolist', 'numpy', 'nonzero', '__bool__'):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, reader(plain, waited))
    one.show(*batch)
    assert waited == ['cpu']
    assert one.memory.hits == 3


class Read(torch.Tensor):
    """Values that are on the CPU, and so may be asked for."""


def reader(function, waited):
    def read(tensor, *given, **named):
        found = function(tensor, *given, **named)
        if isinstance(tensor, Read):
            return found
        waited.append(function.__name__)
        return Read(found) if torch.is_tensor(found) else found

    return read


def test_only_what_is_new_is_computed(make):
    batch = tiny.batch(shapes=SHAPES)
    one = make(cache=1.0)
    one.show(*part(batch, 0, 1))
    one.shown.clear()
    one.show(*part(batch, 1, 2))
    assert one.shown == [1]


def test_a_hit_is_what_was_said_bit_for_bit(make):
    batch = tiny.batch(shapes=SHAPES)
    one = make(cache=1.0)
    first, again = (one.show(*batch).at('neck') for _ in range(2))
    assert one.memory.hits == 3
    assert all(torch.equal(*pair) for pair in zip(first, again))


@pytest.mark.parametrize('kind', ['parameters', 'buffers'])
def test_a_changed_teacher_is_asked_anew(make, kind):
    batch = tiny.batch(shapes=SHAPES)
    cached, plain = make(cache=1.0), make()
    before = cached.show(*batch).at('neck')
    for one in (cached, plain):
        with torch.no_grad():
            floats = [
                x
                for x in getattr(one.detector.backbone.layer4, kind)()
                if x.is_floating_point()
            ]
            floats[0].mul_(1.5).add_(0.1)
    after = cached.show(*batch)
    assert cached.memory.misses == 6
    assert_same(after, plain.show(*batch), atol=1e-3, rtol=1e-3)
    assert (before[2] - after.at('neck')[2]).abs().max() > 0.01


def test_an_images_outputs_do_not_follow_from_its_neighbours(make):
    """Bit for bit, so that a resumed training goes on as it would have."""
    batch = tiny.batch(shapes=SHAPES)
    one, other = make(cache=1.0), make(cache=1.0)
    together = one.show(*batch)
    for index in (2, 0, 1):
        alone = other.show(*part(batch, index))
        for whole, single in zip(together.at('neck'), alone.at('neck')):
            assert torch.equal(whole[index : index + 1], single)


@pytest.mark.parametrize('change', ['flip', 'pad', 'shape', 'colour'])
def test_another_view_is_another_image(make, change):
    images, samples = part(tiny.batch(), 0)
    cached, plain = make(cache=1.0), make()
    cached.show(images, samples)
    if change == 'flip':
        images = images.flip(-1)
    elif change == 'pad':
        images = torch.nn.functional.pad(images, (0, 32, 0, 0))
    elif change == 'colour':
        images = 1.01 * images
    else:
        samples = copy.deepcopy(samples)
        samples[0].set_metainfo(dict(img_shape=(64, 64)))
    assert_same(cached.show(images, samples), plain.show(images, samples))
    assert cached.memory.misses == 2


def test_a_sham_teachers_targets_stay_those_of_another_image(make):
    batch = tiny.batch(shapes=((128, 128),) * 3)
    sham, plain = make(cache=1.0, sham=True), make()
    expected = [one.roll(-1, 0) for one in plain.show(*batch).at('neck')]
    for _ in range(2):
        for one, other in zip(sham.show(*batch).at('neck'), expected):
            torch.testing.assert_close(one, other)


def test_what_a_term_does_to_its_targets_is_not_kept(make):
    batch = tiny.batch(shapes=SHAPES[:1])
    cached, plain = make(cache=1.0), make()
    cached.show(*batch)
    for one in cached.show(*batch).at('neck'):
        one.zero_()
    assert_same(cached.show(*batch), plain.show(*batch))


def test_a_graph_to_the_images_is_computed_anew(make):
    images, samples = tiny.batch()
    one = make(cache=1.0)
    one.show(images, samples)
    images = images.clone().requires_grad_()
    one.show(images, samples, grad=True).at('neck')[0].sum().backward()
    assert images.grad.abs().sum() > 0


def test_an_untrained_teacher_is_not_remembered(make):
    batch = tiny.batch()
    cached, plain = make(cache=1.0), make()
    cached.loaded = False
    cached.show(*batch)
    assert len(cached.memory) == 0
    cached.loaded = True
    assert_same(cached.show(*batch), plain.show(*batch))


def test_annotations_are_not_shown(make):
    """What follows from them cannot be kept by the pixels."""
    batch = tiny.batch()
    one = make(cache=1.0)
    one.show(*batch)
    assert 'gt_instances' in batch[1][0]
    assert 'gt_instances' not in one.samples[0]


def test_a_full_cache_keeps_what_it_has(make, monkeypatch):
    said = []
    monkeypatch.setattr(
        'mmkd.memory.print_log', lambda text, **_: said.append(text)
    )
    batch = tiny.batch(shapes=SHAPES)
    cached, plain = make(cache=1.0), make()
    cached.show(*part(batch, 0))
    one_image = cached.memory.size
    assert one_image == 4 * sum(
        map.numel() for map in plain.show(*part(batch, 0)).at('neck')
    )
    cached.memory.limit = int(2.5 * one_image)
    for _ in range(3):
        assert_same(cached.show(*batch), plain.show(*batch))
    assert len(cached.memory) == 2
    assert cached.memory.size <= cached.memory.limit
    (text,) = said
    assert 'full with 2 images' in text
    assert '1 of 4' in text
    assert 'cache=0' in text


def test_it_can_be_emptied(make):
    batch = tiny.batch()
    one = make(cache=1.0)
    one.show(*batch)
    one.memory.forget()
    assert (len(one.memory), one.memory.size) == (0, 0)
    one.show(*batch)
    assert len(one.memory) == 2


def test_arguments_of_a_tap_are_not_kept(make):
    with pytest.raises(RuntimeError, match='Set cache=0'):
        make(cache=1.0).show(*tiny.batch()).inputs('neck')


@pytest.mark.parametrize(
    'output',
    [
        lambda images: images.sum((0, 2, 3)),  # one for all images
        lambda images: images - images.mean(0),  # follows from neighbours
        lambda images: images.movedim(0, 1),  # another axis
        lambda images: [images, images][: len(images)],
    ],
    ids=['sum', 'mean', 'axis', 'number'],
)
def test_outputs_that_are_not_the_images_own_are_refused(output):
    def watch(images, samples):
        record = Record(None, ['head'])
        record.add('head', Call((), {}, output(images)))
        return record

    memory = Memory(torch.nn.Identity(), 1.0, "Teacher 'big'")
    images, samples = tiny.batch()
    with pytest.raises(ValueError, match="of 'head' in its cache"):
        memory.recall(images, samples, ['head'], watch)


def test_a_training_learns_the_same_from_a_cache(teachers, terms):
    """Losses and gradients, also when nothing is computed any more."""
    batch = tiny.batch(shapes=SHAPES)

    def train(**settings):
        given = copy.deepcopy(teachers)
        given['big'].update(settings)
        torch.manual_seed(0)
        student = tiny.build(tiny.distilled(tiny.retinanet(), given, terms))
        student.teachers.load()
        for _ in range(2):
            student.zero_grad()
            losses = student.loss(*batch)
            student.parse_losses(losses)[0].backward()
        return losses['loss_kd_pkd'], student.backbone.conv1.weight.grad

    for one, other in zip(train(cache=1.0), train()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_negative_size_is_refused(make):
    with pytest.raises(ValueError, match=r"Teacher 'big' .* cache=-1"):
        make(cache=-1)


def test_it_holds_what_gibibytes_hold():
    assert Memory(torch.nn.Identity(), 0.5, '').limit == GIB // 2

import json
import shutil

import numpy as np
import pictures
import pytest
import tiny
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import set_random_seed

from mmkd.analysis import caching
from mmkd.analysis.caching import main, views
from mmkd.registry import MODELS
from mmkd.store import Store

SQUARE = ((128, 128),) * 3
FLIP = dict(type='RandomFlip', prob=0.5)


@pytest.fixture
def make(tmp_path, monkeypatch, teachers, terms):
    """Writes a distillation config on pictures of some sizes."""
    monkeypatch.chdir(tmp_path)

    def make(
        *transforms,
        sizes=SQUARE,
        batch_size=2,
        model=None,
        wrap=lambda dataset: dataset,
        **loader,
    ):
        pictures.draw(tmp_path, sizes)
        dataset = pictures.dataset(tmp_path, *transforms)
        student = tiny.retinanet()
        taught = dict(
            big=dict(
                config=teachers['big']['config'],
                checkpoint=teachers['big']['checkpoint'],
                cache='cache',
            )
        )
        Config(
            dict(
                model=dict(
                    tiny.distilled(student, taught, terms), **(model or {})
                ),
                train_dataloader=dict(
                    batch_size=batch_size, dataset=wrap(dataset), **loader
                ),
            )
        ).dump('config.py')
        return Config.fromfile('config.py')

    return make


def run(capsys, *options):
    capsys.readouterr()
    status = main(['config.py', '--device', 'cpu', *options])
    told = capsys.readouterr()
    return status, told.out + told.err


def student(config, cache):
    """The model of a config, and a list of what its teacher is shown."""
    settings = config.copy().model
    settings.teachers.big.cache = cache
    torch.manual_seed(0)
    model = MODELS.build(settings)
    model.init_weights()
    shown = []
    detector = model.teachers['big'].detector
    plain = detector._forward

    def forward(images, samples):
        shown.append(len(images))
        return plain(images, samples)

    detector._forward = forward
    return model, shown


def batches(config, count=6):
    """What a loader draws, with the randomness of the pipeline."""
    dataset = DATASETS.build(config.train_dataloader.dataset)
    size = config.train_dataloader.batch_size
    set_random_seed(1)
    for _ in range(count):
        places = np.random.choice(len(dataset), size, replace=False)
        yield pseudo_collate([dataset[int(one)] for one in places])


def losses(model, data):
    with torch.no_grad():
        made = model.data_preprocessor(data, training=True)
        return model.loss(made['inputs'], made['data_samples'])


@pytest.mark.parametrize(
    ('precision', 'error'),
    [
        ('int8', 5e-3),
        pytest.param('fp16', 1e-4, marks=pytest.mark.slow),
        ('fp32', 1e-6),
    ],
)
def test_terms_are_those_of_the_teacher_that_runs(
    make, capsys, precision, error
):
    config = make(FLIP)
    assert run(capsys, '--precision', precision)[0] == 0
    cached, shown = student(config, 'cache')
    online, _ = student(config, 0.0)
    shown.clear()
    cached.teachers['big'].to = None  # nor does it go where the images are
    views = set()
    for data in batches(config):
        views.update(one.flip for one in data['data_samples'])
        ours, theirs = losses(cached, data), losses(online, data)
        expected = theirs['loss_kd_pkd']
        assert expected > 0.1
        torch.testing.assert_close(
            ours['loss_kd_pkd'], expected, rtol=error, atol=0
        )
    assert views == {True, False}
    assert shown == []


@pytest.mark.parametrize(
    'batch_size',
    [
        pytest.param(1, marks=pytest.mark.slow),
        2,
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_batches_of_images_of_several_sizes(make, capsys, batch_size):
    """Whatever comes together, the border is that of the batch."""
    sizes = ((128, 96), (96, 160), (64, 64), (160, 96))
    config = make(FLIP, sizes=sizes, batch_size=batch_size)
    status, told = run(capsys)
    assert status == 0
    assert 'dict(type="Pad", size=(160, 160))' in told
    cached, shown = student(config, 'cache')
    shown.clear()
    borders = set()
    for data in batches(config, 12):
        borders.add(tuple(cached.data_preprocessor(data)['inputs'].shape))
        losses(cached, data)
    assert shown == []
    assert len(borders) > 2


@pytest.mark.slow
def test_sizes_that_no_batch_has_are_not_shown(make, capsys):
    """Where batches are of one orientation."""
    sizes = ((128, 96), (160, 96), (96, 128), (96, 160))
    make(sizes=sizes)
    _, told = run(capsys)
    assert '8 sizes: 14 to be shown' in told
    make(sizes=sizes, batch_sampler=dict(type='AspectRatioBatchSampler'))
    _, told = run(capsys, '--overwrite')
    assert '4 sizes: 6 to be shown' in told


def test_an_image_that_is_left_out_does_not_stand_for_others(
    make, capsys, tmp_path
):
    """The first of a size may be the one whose box is too small."""
    make(FLIP, dict(type='FilterAnnotations', min_gt_bbox_wh=(8, 8)))
    file = tmp_path / 'pictures.json'
    told = json.loads(file.read_text())
    told['annotations'][0]['bbox'] = [8, 16, 4, 4]
    file.write_text(json.dumps(told))
    assert run(capsys)[0] == 0
    assert len(Store('cache', 'test')) == 2 * 2


def test_a_loader_may_say_that_it_has_no_batch_sampler(make, capsys):
    make(FLIP, batch_sampler=None)
    assert run(capsys)[0] == 0


def test_as_many_images_as_there_are_take_as_long(make):
    """Sizes of batches are found once a size and not once an image."""
    config = make(FLIP)
    model, _ = student(config, 0.0)
    shown = caching.Shown(config, model)
    (dataset,) = shown.sets
    asked = []
    plain = shown._padded
    shown._padded = lambda *given: asked.append(given) or plain(*given)
    shown.sets = [dataset] * 50
    shown.views = shown.views * 50
    assert len(shown.work()) == 50 * 3 * 2
    assert len(asked) == 1


@pytest.mark.slow
def test_each_scale_is_a_view(make, capsys):
    choice = dict(
        type='RandomChoiceResize',
        scales=[(128, 128), (160, 160), (96, 96)],
        keep_ratio=True,
    )
    config = make(choice, FLIP, batch_size=1)
    _, told = run(capsys)
    assert '3 images, 6 views of each, padded to 3 sizes: 18' in told
    cached, shown = student(config, 'cache')
    shown.clear()
    for data in batches(config, 12):
        losses(cached, data)
    assert shown == []


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (dict(prob=0.5), [(0.0, 'horizontal'), (1.0, 'horizontal')]),
        (dict(prob=1.0), [(1.0, 'horizontal')]),
        (dict(prob=0.0), [(0.0, 'horizontal')]),
        (
            dict(prob=[0.5, 0.5], direction=['horizontal', 'vertical']),
            [(1.0, 'horizontal'), (1.0, 'vertical')],
        ),
        (
            dict(prob=0.5, direction=['horizontal', 'diagonal']),
            [(0.0, 'horizontal'), (1.0, 'horizontal'), (1.0, 'diagonal')],
        ),
    ],
)
def test_flips_that_there_may_be(given, expected):
    from mmdet.registry import TRANSFORMS

    flip = TRANSFORMS.build(dict(type='RandomFlip', **given))
    found = [view[0][0] for view in views([flip])]
    assert [(one.prob, one.direction) for one in found] == expected
    assert flip.prob == given['prob']  # the training's own is left alone


@pytest.mark.parametrize(
    ('transforms', 'named'),
    [
        ([dict(type='PhotoMetricDistortion'), FLIP], 'PhotoMetricDistortion'),
        ([dict(type='RandomCrop', crop_size=(64, 64))], 'RandomCrop'),
        ([dict(type='RandomResize', scale=[(96, 96), (128, 128)])], 'Resize'),
    ],
)
def test_ever_new_views_are_refused_by_name(make, capsys, transforms, named):
    make(*transforms)
    status, told = run(capsys)
    assert status == 1
    assert f'{named} in the pipeline makes each view' in told
    assert 'cache=0' in told


def test_mixed_images_are_refused(make, capsys):
    def wrap(dataset):
        mosaic = dict(type='Mosaic', img_scale=(128, 128))
        return dict(
            type='MultiImageMixDataset', dataset=dataset, pipeline=[mosaic]
        )

    make(wrap=wrap)
    status, told = run(capsys)
    assert status == 1
    assert 'MultiImageMixDataset mixes images' in told


def test_batches_that_are_resized_are_refused(make, capsys):
    augment = dict(
        type='BatchSyncRandomResize',
        random_size_range=(96, 160),
        size_divisor=32,
    )
    pixels = dict(tiny.retinanet()['data_preprocessor'])
    pixels['batch_augments'] = [augment]
    make(model=dict(data_preprocessor=pixels))
    status, told = run(capsys)
    assert status == 1
    assert 'batch_augments' in told


@pytest.mark.slow
def test_repeated_and_joined_data_sets(make, capsys):
    def wrap(dataset):
        repeated = dict(type='RepeatDataset', dataset=dataset, times=3)
        return dict(type='ConcatDataset', datasets=[repeated])

    config = make(FLIP, wrap=wrap)
    _, told = run(capsys)
    assert '3 images, 2 views of each, padded to 1 sizes: 6' in told
    cached, shown = student(config, 'cache')
    shown.clear()
    for data in batches(config):
        losses(cached, data)
    assert shown == []


def test_what_is_there_is_not_asked_again(make, capsys, monkeypatch):
    """A cache that was interrupted goes on, and is not read before."""
    config = make(FLIP)
    asked = []
    plain = caching.Shown.show

    def show(self, teacher, several):
        asked.append(len(several))
        if len(asked) == 2 + caching.PROBES:
            raise KeyboardInterrupt
        return plain(self, teacher, several)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(caching.Shown, 'show', show)
        run(capsys)
    with pytest.raises(ValueError, match=r'not finished\. Type: python tools'):
        student(config, 'cache')
    store = Store('cache', 'test')
    begun = len(store)
    assert 0 < begun < 6
    store.close()
    written = []
    monkeypatch.setattr(
        Store, 'write', lambda self, *what: written.append(what)
    )
    assert run(capsys)[0] == 0
    assert len(written) == 6 - begun


def test_what_was_made_otherwise_is_replaced_only_when_told(make, capsys):
    make(FLIP)
    assert run(capsys)[0] == 0
    status, told = run(capsys, '--precision', 'fp16')
    assert status == 1
    assert 'precision differ' in told
    assert run(capsys, '--precision', 'fp16', '--overwrite')[0] == 0
    assert Store('cache', 'test').about['precision'] == 'fp16'


def test_another_teacher_is_told(make, capsys, tmp_path):
    config = make(FLIP)
    run(capsys)
    other = tiny.save_teacher(
        tiny.retinanet(base=16), tmp_path / 'other.pth', seed=8
    )
    config.model.teachers.big.checkpoint = str(other)
    with pytest.raises(ValueError, match=r'stale, for its weights are'):
        student(config, 'cache')


def test_a_tap_that_is_not_there_is_told(make, capsys):
    config = make(FLIP)
    run(capsys)
    config.model.terms.pkd.update(
        tap='backbone',
        align=dict(
            type='mmkd.ConvAdapt',
            in_channels=(8, 16, 32),
            out_channels=(16, 32, 64),
        ),
    )
    with pytest.raises(ValueError, match=r'holds neck.*ask for backbone'):
        student(config, 'cache')


def test_images_that_it_does_not_hold(make, capsys):
    """Another augmentation is another image: an error, or shown."""
    make()
    run(capsys)
    config = make(dict(type='RandomFlip', prob=1.0))
    data = next(batches(config))
    cached, _ = student(config, 'cache')
    with pytest.raises(ValueError, match=r'does not hold an image.*--device'):
        losses(cached, data)
    cached, shown = student(config, dict(folder='cache', missing='show'))
    online, _ = student(config, 0.0)
    shown.clear()
    ours, theirs = losses(cached, data), losses(online, data)
    torch.testing.assert_close(ours['loss_kd_pkd'], theirs['loss_kd_pkd'])
    assert sum(shown) >= 2


def test_a_missing_cache_is_told_while_the_model_is_built(make, capsys):
    config = make()
    with pytest.raises(FileNotFoundError, match=r'no cache in cache'):
        student(config, 'cache')


def test_what_would_not_fit_is_not_begun(make, capsys, tmp_path):
    make(FLIP)
    status, told = run(capsys, '--limit', '0.00002')
    assert status == 1
    assert 'are needed, and 0.0 MiB may be taken' in told
    assert not (tmp_path / 'cache').exists()


def test_the_estimate_is_near(make, capsys):
    make(FLIP, sizes=((128, 128),) * 12)
    _, told = run(capsys, '--precision', 'fp32')
    amount = float(told.split('about ')[1].split(' ')[0])
    assert amount == pytest.approx(Store('cache', '').size / 2**20, rel=0.3)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--teacher', 'bog'], "'bog'"),
        (['--cfg-options', 'model.teachers.big.cache=2.0'], 'Name a folder'),
    ],
)
def test_mistakes_are_told(make, capsys, options, message):
    make()
    status, told = run(capsys, *options)
    assert status == 1
    assert message in told


def test_a_teacher_that_changes_is_told(make, capsys):
    config = make(FLIP)
    run(capsys)
    cached, _ = student(config, 'cache')
    data = list(batches(config, 2))
    losses(cached, data[0])
    with torch.no_grad():
        next(cached.teachers['big'].detector.parameters()).mul_(2)
    with pytest.raises(ValueError, match=r"'big' has changed.*cache=0"):
        losses(cached, data[1])


@pytest.mark.slow
def test_a_folder_that_moves_is_found(make, capsys):
    config = make(FLIP)
    run(capsys)
    shutil.move('cache', 'elsewhere')
    cached, shown = student(config, 'elsewhere')
    shown.clear()
    losses(cached, next(batches(config)))
    assert shown == []


@pytest.mark.parametrize('cache', [dict(missing='show'), dict(dir='x'), [1]])
def test_what_cache_may_be_is_told(make, cache):
    config = make()
    with pytest.raises(ValueError, match=r'cache'):
        student(config, cache)

"""Maps of a teacher that move with the image and are laid over it."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.registry import init_default_scope

from mmkd.configs import read_config
from mmkd.datasets.attribution import IGOverlay, LoadIGMap, map_file, spread

ROOT = Path(__file__).parents[2]
#: Bright in the upper left, and one value for each quarter.
QUARTERS = np.array([[240, 120], [60, 0]], np.uint8)
META = ('img_id', 'img_shape', 'teacher_img')
#: Bounds of the power that leave a map as it is.
ONE = (1.0, 1.0)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture
def maps(tmp_path):
    """A folder with the maps of images 7 and 'a/b'."""
    folder = tmp_path / 'maps'
    folder.mkdir()
    index = folder / 'index.json'
    index.write_text(json.dumps(dict(complete=True)))
    big = QUARTERS.repeat(16, 0).repeat(16, 1)
    cv2.imwrite(str(map_file(folder, 7)), big)
    cv2.imwrite(str(map_file(folder, 'a/b')), big[::-1])
    return folder


def loaded(img_id=7, height=32, width=48, seed=0):
    """An image as ``LoadImageFromFile`` and ``LoadAnnotations`` leave it."""
    numbers = np.random.RandomState(seed)
    boxes = [[2.0, 3.0, 20.0, 30.0], [5.0, 5.0, 9.0, 40.0]]
    return dict(
        img=numbers.randint(0, 256, (height, width, 3), np.uint8),
        img_id=img_id,
        img_shape=(height, width),
        ori_shape=(height, width),
        gt_bboxes=HorizontalBoxes(boxes),
        gt_bboxes_labels=np.array([1, 0]),
        gt_ignore_flags=np.array([False, False]),
    )


def through(maps, *between, results=None, **overlay):
    """An image through the pipeline of a config."""
    pipeline = Compose(
        [
            dict(type='mmkd.LoadIGMap', ig_dir=maps),
            *between,
            dict(type='mmkd.IGOverlay', **overlay),
        ]
    )
    return pipeline(results or loaded())


def corners_of(picture):
    """Mean of each quarter, less a third of its sides that is blended."""
    height, width = picture.shape[:2]
    rows = slice(0, height // 3), slice(-(height // 3), None)
    columns = slice(0, width // 3), slice(-(width // 3), None)
    return np.array(
        [[picture[row, column].mean() for column in columns] for row in rows]
    )


# Loading ---------------------------------------------------------------------


def test_the_map_is_that_of_the_image_and_of_its_size(maps):
    found = LoadIGMap(maps)(loaded())['gt_seg_map']
    assert found.shape == (32, 48)
    assert found.dtype == np.float32
    np.testing.assert_allclose(corners_of(found), QUARTERS / 255, atol=1e-6)
    other = LoadIGMap(maps)(loaded('a/b'))['gt_seg_map']
    np.testing.assert_allclose(
        corners_of(other), QUARTERS[::-1] / 255, atol=1e-6
    )


def test_it_is_enlarged_without_steps(maps):
    found = LoadIGMap(maps)(loaded(height=512, width=512))['gt_seg_map']
    assert np.abs(np.diff(found, axis=1)).max() < 120 / 255 / 8


def test_a_folder_that_is_not_there_says_what_to_type(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        LoadIGMap(tmp_path / 'none')
    said = str(error.value)
    assert 'python tools/attribute.py CONFIG CHECKPOINT' in said
    assert f'--out {tmp_path / "none"}' in said


def test_maps_that_were_interrupted_say_what_to_type(maps):
    (maps / 'index.json').write_text(json.dumps(dict(complete=False)))
    with pytest.raises(ValueError, match=r'interrupted.*goes on.*attribute'):
        LoadIGMap(maps)


def test_an_image_without_a_map_says_what_to_type(maps):
    with pytest.raises(FileNotFoundError, match=r'image 8.*attribute\.py'):
        LoadIGMap(maps)(loaded(8))


def test_a_semantic_map_is_not_replaced(maps):
    results = dict(loaded(), gt_seg_map=np.zeros((32, 48), np.uint8))
    with pytest.raises(ValueError, match='with_seg=False'):
        LoadIGMap(maps)(results)


# Moving ----------------------------------------------------------------------


def test_the_map_follows_a_flip(maps):
    found = through(
        maps, dict(type='RandomFlip', prob=1.0), prob=1.0, alpha=1.0, power=ONE
    )
    np.testing.assert_allclose(
        corners_of(found['img']), QUARTERS[:, ::-1] / 240 * 255, atol=1
    )
    assert found['flip']


def test_the_map_follows_a_resize_that_changes_the_proportions(maps):
    found = through(
        maps,
        dict(type='Resize', scale=(50, 90), keep_ratio=False),
        prob=1.0,
        alpha=1.0,
        power=ONE,
    )
    assert found['img'].shape == (90, 50, 3)
    np.testing.assert_allclose(
        corners_of(found['img']), QUARTERS / 240 * 255, atol=1
    )


def test_the_map_follows_a_crop(maps):
    results = loaded(height=32, width=32)
    results['img'][..., 0] = np.arange(32)  # says where a pixel comes from
    results['img'][..., 1] = np.arange(32)[:, None]
    heat = LoadIGMap(maps)(dict(results))['gt_seg_map']
    found = Compose(
        [
            dict(type='mmkd.LoadIGMap', ig_dir=maps),
            dict(type='RandomCrop', crop_size=(20, 12), allow_negative_crop=1),
        ]
    )(results)
    left, top = found['img'][0, 0, :2]
    wanted = heat[top : top + 12, left : left + 20]
    np.testing.assert_array_equal(found['gt_seg_map'], wanted)


def test_a_border_is_as_dark_as_what_says_nothing(maps):
    found = through(
        maps,
        dict(type='Pad', size=(64, 64), pad_val=dict(img=(114,) * 3, seg=255)),
        prob=1.0,
        alpha=1.0,
        power=ONE,
    )['img']
    assert not found[40:].any()
    np.testing.assert_allclose(
        corners_of(found[:32, :48]), QUARTERS / 240 * 255, atol=1
    )


def test_a_map_that_was_left_behind_is_noticed(maps):
    def larger(results):
        results['img'] = np.pad(results['img'], ((0, 8), (0, 0), (0, 0)))
        return results

    results = larger(LoadIGMap(maps)(loaded()))
    with pytest.raises(ValueError, match=r'moved the image alone.*Mosaic'):
        IGOverlay()(results)


def test_without_a_map_it_says_what_to_put_where():
    with pytest.raises(ValueError, match=r'mmkd\.LoadIGMap'):
        IGOverlay()(loaded())


# Laying over -----------------------------------------------------------------


def test_a_pixel_by_hand(maps):
    """0.75 of the image, 0.25 of 255 times the spread square."""
    image = loaded()['img'].astype(float)
    found = through(maps, prob=1.0, alpha=0.25, power=(2.0, 2.0))['img']
    assert found.dtype == np.uint8
    for place, value in (((0, 0), 1.0), ((0, -1), 0.25), ((-1, 0), 1 / 16)):
        wanted = 0.75 * image[place] + 0.25 * 255 * value
        np.testing.assert_allclose(found[place], wanted, atol=0.51)
    np.testing.assert_allclose(found[-1, -1], 0.75 * image[-1, -1], atol=0.51)


def test_floats_stay_floats_and_are_not_rounded(maps):
    results = loaded()
    results['img'] = results['img'].astype(np.float32) + 0.25
    found = through(maps, results=results, prob=1.0)['img']
    assert found.dtype == np.float32
    assert (found != found.round()).any()


def test_the_power_is_drawn_evenly_on_a_scale_of_factors():
    np.random.seed(0)
    overlay = IGOverlay(prob=1.0, alpha=1.0, power=(1, 2))
    heat = np.array([[0.0, 0.5, 1.0]], np.float32)
    logs = []
    for _ in range(2000):
        results = dict(img=np.zeros((1, 3, 3)), gt_seg_map=heat.copy())
        value = overlay(results)['img'][0, 1, 0] / 255
        logs.append(math.log(-math.log2(value)))
    assert min(logs) >= -1e-6
    assert max(logs) <= math.log(2) + 1e-6
    # Evenly on the scale itself the mean would be 0.386.
    assert np.mean(logs) == pytest.approx(math.log(2) / 2, abs=0.015)


def test_a_map_of_one_value_says_nothing():
    for value in (0.0, 0.7):
        assert not spread(np.full((2, 3), value)).any()
    np.testing.assert_allclose(spread(np.array([0.2, 0.6, 0.4])), [0, 1, 0.5])


def test_boxes_and_labels_stay_as_they_are(maps):
    before, found = loaded(), through(maps, prob=1.0)
    assert torch.equal(found['gt_bboxes'].tensor, before['gt_bboxes'].tensor)
    for key in ('gt_bboxes_labels', 'gt_ignore_flags', 'img_shape'):
        np.testing.assert_array_equal(found[key], before[key])


@pytest.mark.parametrize('prob', [0.0, 1.0])
def test_the_map_is_not_left_to_the_sample(maps, prob):
    assert 'gt_seg_map' not in through(maps, prob=prob)


def test_with_probability_0_nothing_changes_and_nothing_is_drawn(maps):
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    before, found = loaded(), through(maps, prob=0.0)
    assert set(found) == set(before)
    np.testing.assert_array_equal(found['img'], before['img'])
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize('prob', [0.1, 0.6])
def test_as_many_images_as_asked_show_the_map(prob):
    np.random.seed(1)
    overlay, shown = IGOverlay(prob=prob), 0
    heat = np.array([[0.0, 1.0]])
    for _ in range(3000):
        image = np.zeros((1, 2, 3), np.uint8)
        found = overlay(dict(img=image, gt_seg_map=heat.copy()))
        shown += bool(found['img'].any())
        assert ('teacher_img' in found) == bool(found['img'].any())
    deviation = math.sqrt(prob * (1 - prob) / 3000)
    assert abs(shown / 3000 - prob) < 3 * deviation


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        (dict(prob=1.5), 'prob between 0 and 1'),
        (dict(alpha=-0.1), 'alpha between 0 and 1'),
        (dict(power=(2, 1)), r'\(1, 2\)'),
        (dict(power=(0, 1)), r'\(1, 2\)'),
    ],
)
def test_settings_without_sense_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        IGOverlay(**wrong)


def test_settings_are_seen(maps):
    assert 'maps' in repr(LoadIGMap(maps))
    assert 'prob=0.1, alpha=0.5, power=(1.0, 2.0)' in repr(IGOverlay())


# The view of the teacher -----------------------------------------------------


def test_the_sample_keeps_the_image_without_the_map(maps):
    pack = dict(type='PackDetInputs', meta_keys=META)
    found = Compose([pack])(through(maps, prob=1.0))
    sample = found['data_samples']
    image = loaded()['img']
    np.testing.assert_array_equal(sample.teacher_img, image)
    shown = found['inputs'].permute(1, 2, 0).numpy()
    assert np.abs(shown.astype(int) - image).mean() > 20
    assert 'gt_sem_seg' not in sample


def test_it_is_not_kept_unasked_or_twice(maps):
    assert 'teacher_img' not in through(maps, prob=1.0, keep_clean=False)
    earlier = np.zeros((32, 48, 3), np.uint8)
    found = through(
        maps, results=dict(loaded(), teacher_img=earlier), prob=1.0
    )
    assert found['teacher_img'] is earlier


# The configs -----------------------------------------------------------------


@pytest.mark.parametrize(
    'path',
    sorted((ROOT / 'configs' / 'ig').rglob('*.py')),
    ids=lambda path: path.stem,
)
def test_the_map_is_laid_over_in_training_alone(path):
    config = read_config(path)
    types = [one['type'] for one in config.train_dataloader.dataset.pipeline]
    assert types[0] == 'LoadImageFromFile'
    assert types.index('mmkd.LoadIGMap') < types.index('RandomFlip')
    assert types[-2:] == ['mmkd.IGOverlay', 'PackDetInputs']
    keys = config.train_dataloader.dataset.pipeline[-1].meta_keys
    assert 'teacher_img' in keys
    for phase in ('val_dataloader', 'test_dataloader'):
        assert 'mmkd.' not in str(config.get(phase))
    (command,) = config.prepare
    loads = config.train_dataloader.dataset.pipeline[2]
    assert f'--out {loads.ig_dir} ' in command
    for teacher in config.model.teachers.values():
        assert f'{teacher.config} {teacher.checkpoint} ' in command

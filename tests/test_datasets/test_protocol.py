import ast
import copy
import json
import pickle
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope

from mmkd.configs import read_config
from mmkd.datasets.check import check_dataset
from mmkd.recipes import RECIPES

ROOT = Path(__file__).parents[2]

CLASSES = ('disc', 'square', 'plus', 'star')
IMAGES, EACH = 120, 8


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    """Some 940 boxes of four classes; every 50th image is empty."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(IMAGES):
        images.append(
            dict(id=10 + number, file_name='a.png', width=100, height=80)
        )
        for _ in range(EACH if number % 50 else 0):
            x, y = generator.uniform(5, 60, 2).round(2).tolist()
            w, h = generator.uniform(8, 15, 2).round(2).tolist()
            annotations.append(
                dict(
                    id=len(annotations),
                    image_id=10 + number,
                    category_id=int(generator.integers(4)),
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=int(len(annotations) % 40 == 0),
                )
            )
    path = tmp_path_factory.mktemp('set') / 'train.json'
    path.write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[
                    dict(id=index, name=name)
                    for index, name in enumerate(CLASSES)
                ],
            )
        )
    )
    return path


@pytest.fixture
def coco(file):
    return dict(
        type='CocoDataset',
        ann_file=str(file),
        data_prefix=dict(img=''),
        metainfo=dict(classes=CLASSES),
        pipeline=[],
        serialize_data=False,  # collecting garbage took most of the time
    )


def read(config):
    """All entries by the id of their image."""
    return copy.deepcopy(_read(repr(config)))


@cache
def _read(config):
    built = DATASETS.build(ast.literal_eval(config))
    built.full_init()
    entries = [built.get_data_info(one) for one in range(len(built))]
    return {one['img_id']: one for one in entries}


def objects(entries, ids=None):
    """Objects that count, in order: (image, instance)."""
    return [
        (name, one)
        for name in ids or entries
        for one in entries[name]['instances']
    ]


def noisy(coco, **settings):
    return dict(type='mmkd.NoisyLabels', dataset=coco, **settings)


def thinned(coco, **settings):
    return dict(type='mmkd.ImbalancedSubset', dataset=coco, **settings)


def pairs(coco, config):
    """Each object before and after; none is lost."""
    before, after = read(coco), read(config)
    assert list(before) == list(after)
    both = list(zip(objects(before), objects(after)))
    assert len(both) == len(objects(before)) == len(objects(after))
    return [(one[1], other[1]) for one, other in both]


@pytest.mark.parametrize('p', [0.1, 0.3, 1.0])
def test_the_rate_of_wrong_labels_is_the_one_asked_for(coco, p):
    both = pairs(coco, noisy(coco, p=p))
    counted = [one for one in both if not one[0]['ignore_flag']]
    wrong = [a['bbox_label'] != b['bbox_label'] for a, b in counted]
    error = (p * (1 - p) / len(wrong)) ** 0.5
    assert abs(np.mean(wrong) - p) <= 3 * error
    assert all(a['bbox'] == b['bbox'] for a, b in both)


def test_a_wrong_label_is_any_other_alike(coco):
    both = pairs(coco, noisy(coco, p=1.0))
    steps = Counter(
        (b['bbox_label'] - a['bbox_label']) % len(CLASSES)
        for a, b in both
        if not a['ignore_flag']
    )
    assert set(steps) == {1, 2, 3}
    total = sum(steps.values())
    for count in steps.values():
        assert abs(count - total / 3) < 3 * (total * 2 / 9) ** 0.5


def test_without_noise_nothing_changes(coco):
    for config in (noisy(coco, p=0.0), thinned(coco, factor=1)):
        assert read(config) == read(coco)


def test_ignored_objects_stay(coco):
    both = pairs(coco, noisy(coco, p=1.0, box_jitter=0.5))
    ignored = [one for one in both if one[0]['ignore_flag']]
    assert ignored
    assert all(one == other for one, other in ignored)


def test_boxes_move_by_at_most_their_share_and_stay_in_the_image(coco):
    both = pairs(coco, noisy(coco, p=0.0, box_jitter=0.4))
    moves = []
    for one, other in both:
        assert one['bbox_label'] == other['bbox_label']
        if one['ignore_flag']:
            continue
        x1, y1, x2, y2 = other['bbox']
        assert 0 <= x1 < x2 <= 100
        assert 0 <= y1 < y2 <= 80
        a, b = np.asarray(one['bbox']), np.asarray(other['bbox'])
        sides = np.tile(a[2:] - a[:2], 2)
        moves.append((b - a) / sides)
    moves = np.asarray(moves)
    assert np.abs(moves).max() <= 0.4 + 1e-9
    # Evenly drawn around 0, edge by edge: the deviation is 0.8 / sqrt(12).
    inner = moves[np.abs(moves).max(1) > 0]
    assert np.abs(inner.mean(0)).max() < 0.03
    assert np.abs(inner.std(0) - 0.8 / 12**0.5).max() < 0.02
    assert np.abs(np.corrcoef(inner.T) - np.eye(4)).max() < 0.15


def test_edges_that_pass_each_other_leave_the_box_as_it_was(coco):
    both = pairs(coco, noisy(coco, p=0.0, box_jitter=1.0))
    for _, other in both:
        x1, y1, x2, y2 = other['bbox']
        assert min(x2 - x1, y2 - y1) >= 1


def test_what_is_wrong_at_one_rate_is_wrong_at_a_greater_one(coco):
    few, many = (
        [
            (place, b['bbox_label'])
            for place, (a, b) in enumerate(pairs(coco, noisy(coco, p=p)))
            if a['bbox_label'] != b['bbox_label']
        ]
        for p in (0.1, 0.4)
    )
    assert set(few) < set(many)


@pytest.mark.parametrize('order', ['index', [3, 1, 0, 2]])
def test_each_class_keeps_its_share(coco, order):
    after = read(thinned(coco, factor=27, order=order))
    before = objects(read(coco))
    found, kept = Counter(), Counter()
    for _, one in before:
        found[one['bbox_label']] += not one['ignore_flag']
    for _, one in objects(after):
        kept[one['bbox_label']] += not one['ignore_flag']
    ranks = range(4) if order == 'index' else (2, 1, 3, 0)
    for label, rank in enumerate(ranks):
        share = (1, 1 / 3, 1 / 9, 1 / 27)[rank]
        error = (share * (1 - share) * found[label]) ** 0.5
        assert abs(kept[label] - share * found[label]) <= 3 * error
        if rank == 0:
            assert kept[label] == found[label]


def test_the_most_frequent_class_comes_first(coco, file, tmp_path):
    content = json.loads(file.read_text())
    # 1, 0, 3, 2 by their numbers.
    spread = [1] * 8 + [0] * 4 + [3] * 3 + [2]
    for place, one in enumerate(content['annotations']):
        one['category_id'] = spread[place % 16]
    path = tmp_path / 'train.json'
    path.write_text(json.dumps(content))
    coco = dict(coco, ann_file=str(path))
    by_name = read(thinned(coco, factor=50, order='frequency'))
    assert by_name == read(thinned(coco, factor=50, order=[1, 0, 3, 2]))


def test_what_is_not_kept_is_ignored_and_images_without_any_leave(coco):
    before, after = read(coco), read(thinned(coco, factor=1000))
    left = set(before) - set(after)
    assert left
    for name in after:
        flags = [one['ignore_flag'] for one in after[name]['instances']]
        assert not before[name]['instances'] or 0 in flags
        pairs = zip(before[name]['instances'], after[name]['instances'])
        for one, other in pairs:
            assert other['ignore_flag'] >= one['ignore_flag']
            assert dict(one, ignore_flag=0) == dict(other, ignore_flag=0)
    assert {10, 60, 110} <= set(after)  # those that had none to begin with


def test_what_is_kept_at_one_factor_is_kept_at_a_smaller_one(coco):
    few, many = (
        {
            (name, str(one['bbox']))
            for name, one in objects(read(thinned(coco, factor=factor)))
            if not one['ignore_flag']
        }
        for factor in (100, 5)
    )
    assert few < many


@pytest.mark.parametrize('wrap', [noisy, thinned])
def test_the_seed_and_the_image_alone_decide(coco, file, wrap, tmp_path):
    setting = dict(p=0.5) if wrap is noisy else dict(factor=9)
    first = read(wrap(coco, **setting))
    _read.cache_clear()
    assert read(wrap(coco, **setting)) == first
    assert read(wrap(coco, **setting, seed=1)) != first
    content = json.loads(file.read_text())
    content['images'] = content['images'][::-3]
    ids = {one['id'] for one in content['images']}
    content['annotations'] = [
        one for one in content['annotations'] if one['image_id'] in ids
    ]
    path = tmp_path / 'train.json'
    path.write_text(json.dumps(content))
    fewer = read(wrap(dict(coco, ann_file=str(path)), **setting))
    assert 20 < len(fewer) < len(first)
    for name, one in fewer.items():
        assert one['instances'] == first[name]['instances']


@pytest.mark.parametrize('wrap', [noisy, thinned])
def test_validation_is_left_untouched(coco, wrap):
    setting = dict(p=0.5) if wrap is noisy else dict(factor=9)
    with pytest.raises(ValueError, match=r'for training.*test_mode=True'):
        DATASETS.build(wrap(dict(coco, test_mode=True), **setting))


def test_it_is_the_set_itself_with_its_filter_and_copies(coco):
    config = dict(coco, filter_cfg=dict(filter_empty_gt=True))
    built = DATASETS.build(noisy(config, p=0.5))
    assert type(built).__name__ == 'CocoDataset'
    assert len(built) == IMAGES - 3
    assert built.metainfo['classes'] == CLASSES
    other = pickle.loads(pickle.dumps(copy.deepcopy(built)))
    assert other.get_data_info(5) == built.get_data_info(5)
    wrong = [one['bbox_label'] for one in built.get_data_info(5)['instances']]
    assert built.get_cat_ids(5) == wrong


def test_one_stands_around_the_other_and_they_do_not_know_each_other(coco):
    both = read(noisy(thinned(coco, factor=9), p=0.5))
    thin = read(thinned(coco, factor=9))
    assert list(both) == list(thin)
    kept, lost = [], []
    plain = read(coco)
    noise = read(noisy(coco, p=0.5))
    for name, one in thin.items():
        rows = zip(
            one['instances'],
            plain[name]['instances'],
            noise[name]['instances'],
        )
        for after, before, noised in rows:
            if before['ignore_flag'] or before['bbox_label'] != 3:
                continue
            wrong = noised['bbox_label'] != before['bbox_label']
            (lost if after['ignore_flag'] else kept).append(wrong)
    # Whether an object is kept does not depend on whether it is wrong.
    assert abs(np.mean(kept) - np.mean(lost)) < 0.35
    ignored = [
        (one, other)
        for (_, one), (_, other) in zip(objects(thin), objects(both))
        if one['ignore_flag']
    ]
    assert all(one == other for one, other in ignored)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(p=1.5), 'p between 0 and 1'),
        (dict(p=0.1, box_jitter=-0.1), 'box_jitter between 0 and 1'),
    ],
)
def test_noise_out_of_range_is_told(coco, config, message):
    with pytest.raises(ValueError, match=message):
        DATASETS.build(noisy(coco, **config))


def test_other_wrong_settings_are_told(coco, tmp_path):
    with pytest.raises(ValueError, match='factor >= 1'):
        DATASETS.build(thinned(coco, factor=0.5))
    with pytest.raises(ValueError, match="Did you mean 'frequency'"):
        DATASETS.build(thinned(coco, factor=2, order='frequncy'))
    with pytest.raises(ValueError, match='each of the 4 classes once'):
        DATASETS.build(thinned(coco, factor=2, order=[0, 1, 2]))
    repeated = dict(type='RepeatDataset', times=2, dataset=coco)
    with pytest.raises(ValueError, match='Put NoisyLabels around the set'):
        DATASETS.build(noisy(repeated, p=0.1))
    single = dict(coco, metainfo=dict(classes=CLASSES[:1]))
    with pytest.raises(ValueError, match='the set has 1'):
        DATASETS.build(noisy(single, p=0.1))


def test_files_are_checked_inside_of_it(coco, file):
    with pytest.raises(FileNotFoundError, match=r'train\.dataset: 120 of'):
        check_dataset(noisy(coco, p=0.1), 'train')
    missing = dict(coco, ann_file=str(file.with_name('none.json')))
    with pytest.raises(FileNotFoundError, match='none.json'):
        check_dataset(thinned(missing, factor=2), 'train')


@pytest.mark.parametrize('name', ['noise', 'imbalance'])
def test_the_settings_of_the_laboratory_change_the_training_alone(
    name, monkeypatch
):
    monkeypatch.chdir(ROOT)
    setting = read_config(f'configs/laboratory/shapes/{name}.py').laboratory
    student = read_config(setting.student).to_dict()
    plain = read_config('configs/laboratory/shapes/student.py').to_dict()
    wrapped = student['train_dataloader'].pop('dataset')
    inside = plain['train_dataloader'].pop('dataset')
    assert wrapped.pop('type') in ('mmkd.NoisyLabels', 'mmkd.ImbalancedSubset')
    assert wrapped['dataset'] == inside
    assert student == plain
    assert {'soft_target', 'mimic', 'at', 'sp', 'rkd'} <= set(setting.methods)
    for one in setting.methods:
        assert one in RECIPES or Path(one).is_file()

"""Hypotheses: drawn from the teacher's probabilities, one set a visit."""

import json

import cv2
import numpy as np
import pytest
from mmengine.registry import init_default_scope

from mmkd.datasets.hypotheses import (
    Boxes,
    HypothesisDataset,
    agreement,
    annotations,
    candidates,
    generate,
    mbr,
    nbest,
    sample,
    write_cache,
)

CLASSES = ('disc', 'square', 'star')


def boxes(*rows):
    """Rows of x1 y1 x2 y2 score label."""
    table = np.array(rows, float).reshape(-1, 6)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].astype(int))


@pytest.fixture
def found():
    """An object of class 0 or 2, and one elsewhere of class 1."""
    return boxes(
        (0, 0, 10, 10, 0.2, 2),
        (0, 0, 10, 9, 0.6, 0),
        (30, 30, 50, 40, 0.3, 1),
    )


def rng(seed=0):
    return np.random.default_rng(seed)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other))


# Generators ------------------------------------------------------------------


def test_one_best_hypothesis_is_plain_pseudo_labelling(found):
    (one,) = nbest(found, 1, 0.3)
    assert same(one, found.at(np.array([1, 2])))


def test_each_further_best_hypothesis_asks_for_more(found):
    counts = [len(one.labels) for one in nbest(found, 5, 0.2)]
    assert counts == [3, 1, 1, 0, 0]  # 0.2, 0.36, 0.52, 0.68, 0.84


def test_boxes_on_one_object_become_its_class_scores(found):
    places, scores = candidates(found, 3)
    np.testing.assert_allclose(scores, [[0.6, 0, 0.2], [0, 0.3, 0]])
    np.testing.assert_allclose(places[0, 2], [0, 0, 10, 10])
    np.testing.assert_allclose(places[0, 0], [0, 0, 10, 9])
    np.testing.assert_allclose(places[0, 1], places[0, 0])


def test_frequencies_become_the_teachers_probabilities(found):
    sets = sample(found, 20000, 3, rng())
    counts = np.bincount(np.concatenate([one.labels for one in sets]))
    want = [0.6 * 0.75, 0.3, 0.6 * 0.25]
    np.testing.assert_allclose(counts / 20000, want, atol=0.015)


def test_cross_entropy_of_drawn_labels_becomes_that_of_soft_ones():
    teacher = np.array([0.5, 0.3, 0.1])
    found = boxes(*((0, 0, 8, 8, score, k) for k, score in enumerate(teacher)))
    logs = np.log([0.2, 0.5, 0.3])
    sets = sample(found, 20000, 3, rng())
    labels = np.concatenate([one.labels for one in sets])
    soft = -(teacher / teacher.sum() * logs).sum()
    assert -logs[labels].mean() == pytest.approx(soft, abs=0.01)


def test_temperature_sharpens_presence_and_class(found):
    sets = sample(found, 20000, 3, rng(), temperature=0.5)
    counts = np.bincount(np.concatenate([one.labels for one in sets]))
    present = 1 / (1 + (0.4 / 0.6) ** 2)
    share = 0.6**2 / (0.6**2 + 0.2**2)
    want = [present * share, 1 / (1 + (0.7 / 0.3) ** 2)]
    np.testing.assert_allclose(counts[:2] / 20000, want, atol=0.015)


def test_drawn_sets_differ_and_coincide_in_the_cold(found):
    warm = sample(found, 20, 3, rng())
    assert len({tuple(one.labels) for one in warm}) > 2
    cold = sample(found, 20, 3, rng(), temperature=1e-3)
    assert {tuple(one.labels) for one in cold} == {(0,)}


def test_jitter_is_a_share_of_the_sides():
    found = boxes((0, 0, 100, 10, 1.0, 0))
    sets = sample(found, 3000, 1, rng(), jitter=0.05)
    moved = np.concatenate([one.boxes for one in sets])
    np.testing.assert_allclose(moved.std(0), [5, 0.5, 5, 0.5], rtol=0.06)
    still = sample(found, 1, 1, rng())[0]
    np.testing.assert_array_equal(still.boxes, found.boxes)


def test_nothing_found_gives_empty_sets():
    for generator in ('nbest', 'sample', 'mbr'):
        sets = generate(boxes(), generator, 3, 3, rng())
        assert [len(one.labels) for one in sets] == [0, 0, 0]


def test_agreement_counts_pairs_of_one_class():
    one = boxes((0, 0, 10, 10, 1, 0), (20, 20, 30, 30, 1, 1))
    other = boxes((0, 0, 10, 8, 1, 0), (20, 20, 30, 30, 1, 2))
    assert agreement(one, one) == 1
    assert agreement(one, other) == 0.5
    assert agreement(one, boxes()) == 0
    assert agreement(boxes(), boxes()) == 1


def test_a_box_is_paired_once():
    twice = boxes((0, 0, 10, 10, 1, 0), (0, 0, 10, 10, 1, 0))
    assert agreement(twice, twice.at(np.array([0]))) == 2 / 3


def test_the_set_that_agrees_best_is_kept_first():
    one = boxes((0, 0, 10, 10, 1, 0))
    both = boxes((0, 0, 10, 10, 1, 0), (20, 20, 30, 30, 1, 1))
    assert [len(x.labels) for x in mbr([boxes(), one, both, one], 2)] == [1, 1]


def test_draws_repeat_with_their_seed(found):
    first, again = (generate(found, 'mbr', 3, 3, rng(5)) for _ in range(2))
    assert all(same(*pair) for pair in zip(first, again))


def test_unknown_generators_and_no_hypotheses_are_refused(found):
    with pytest.raises(ValueError, match='sample'):
        generate(found, 'sampel', 3, 3, rng())
    with pytest.raises(ValueError, match='--num-hypotheses 10'):
        generate(found, 'sample', 0, 3, rng())


# The data set ----------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Two pictures, annotated as stars, and two hypotheses of each."""
    images, truth = [], []
    for number in (7, 9):
        cv2.imwrite(str(tmp_path / f'{number}.png'), np.zeros((40, 40, 3)))
        images.append(
            dict(id=number, file_name=f'{number}.png', width=40, height=40)
        )
    truth = annotations(9, [boxes((1, 1, 5, 5, 1, 2))], 0, range(9))
    kinds = [dict(id=k, name=name) for k, name in enumerate(CLASSES)]
    data = dict(images=images, annotations=truth, categories=kinds)
    (tmp_path / 'train.json').write_text(json.dumps(data))
    said = [
        *annotations(7, [boxes((4, 4, 14, 14, 1, 0)), boxes()], 0, range(9)),
        *annotations(
            9,
            [boxes((2, 4, 12, 14, 1, 1)), boxes((2, 4, 12, 14, 1, 0))],
            1,
            range(9),
        ),
    ]
    info = dict(num_hypotheses=2, complete=True)
    cache = dict(data, annotations=said, info=info)
    write_cache(tmp_path / 'cache.json', cache)
    return tmp_path


def dataset(files, pipeline=(), **settings):
    init_default_scope('mmdet')
    return HypothesisDataset(
        dict(
            type='CocoDataset',
            data_root=str(files),
            ann_file='train.json',
            data_prefix=dict(img=''),
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(filter_empty_gt=True),
            pipeline=list(pipeline),
        ),
        files / 'cache.json',
        **settings,
    )


def labels(info):
    return [one['bbox_label'] for one in info['instances']]


def test_copies_show_every_hypothesis_of_its_own_image(files):
    data = dataset(files, copies=True)
    shown = [
        (one['img_id'], labels(one))
        for one in map(data.get_data_info, range(len(data)))
    ]
    assert shown == [(7, [0]), (7, []), (9, [1]), (9, [0])]


def test_a_visit_draws_one_hypothesis_and_never_the_truth(files):
    data = dataset(files)
    np.random.seed(0)
    seen = [labels(data.get_data_info(1)) for _ in range(100)]
    assert len(data) == 2
    assert 30 < seen.count([0]) < 70
    assert seen.count([0]) + seen.count([1]) == 100


def test_the_first_of_the_file_are_enough(files):
    data = dataset(files, copies=True, num_hypotheses=1)
    assert [labels(data.get_data_info(place)) for place in (0, 1)] == [
        [0],
        [1],
    ]
    data = dataset(files, num_hypotheses=1)
    seen = [labels(data.get_data_info(1)) for _ in range(20)]
    assert seen == [[1]] * 20


def test_hypotheses_are_renewed_after_so_many_epochs(files):
    data = dataset(files, num_hypotheses=1, refresh_epochs=2)
    seen = []
    for epoch in range(6):
        data.set_epoch(epoch)
        seen += labels(data.get_data_info(1))
    assert seen == [1, 1, 0, 0, 1, 1]
    data = dataset(files, num_hypotheses=1, refresh_epochs=1, copies=True)
    data.set_epoch(1)
    assert [labels(data.get_data_info(place)) for place in (0, 1)] == [[], [0]]


def test_each_visit_draws_from_the_present_ones_alone(files):
    path = files / 'cache.json'
    cache = json.loads(path.read_text())
    sets = [boxes((2, 4, 12, 14, 1, number % 3)) for number in range(4)]
    cache['annotations'] = annotations(9, sets, 0, range(9))
    cache['info']['num_hypotheses'] = 4
    write_cache(path, cache)
    data = dataset(files, num_hypotheses=2, refresh_epochs=1)
    for epoch, wanted in enumerate(({0, 1}, {2, 0}, {0, 1})):
        data.set_epoch(epoch)
        seen = {labels(data.get_data_info(1))[0] for _ in range(30)}
        assert seen == wanted


def test_the_truth_has_its_share_of_the_visits(files):
    data = dataset(files, gt_weight=0.5)
    np.random.seed(0)
    seen = [labels(data.get_data_info(1)) for _ in range(3000)]
    assert seen.count([2]) / 3000 == pytest.approx(1 / 3, abs=0.03)


def test_hypotheses_move_with_the_picture(files):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(80, 80)),
        dict(type='RandomFlip', prob=1.0),
        dict(type='PackDetInputs', meta_keys=('img_id',)),
    ]
    sample = dataset(files, pipeline, copies=True)[2]['data_samples']
    assert sample.img_id == 9
    assert sample.gt_instances.bboxes.tensor.tolist() == [[56, 8, 76, 28]]


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (dict(categories=[dict(id=0, name='cat')]), 'its own classes'),
        (dict(info=dict(num_hypotheses=2, complete=False)), 'interrupted'),
        (dict(images=[], annotations=[]), 'no hypothesis of image 7'),
    ],
)
def test_a_file_that_does_not_fit_is_refused(files, change, said):
    path = files / 'cache.json'
    write_cache(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(ValueError, match=said):
        dataset(files)


@pytest.mark.parametrize(
    'settings',
    [
        dict(num_hypotheses=3),
        dict(num_hypotheses=-1),
        dict(num_hypotheses=2, refresh_epochs=1),
        dict(refresh_epochs=1),
        dict(num_hypotheses=1, refresh_epochs=0),
    ],
)
def test_more_than_the_file_holds_is_refused(files, settings):
    with pytest.raises(ValueError, match=r'num_hypotheses|refresh_epochs'):
        dataset(files, **settings)


def test_wrong_settings_are_refused(files):
    with pytest.raises(ValueError, match='gt_weight'):
        dataset(files, gt_weight=-1)
    (files / 'cache.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'make_hypotheses\.py'):
        dataset(files)

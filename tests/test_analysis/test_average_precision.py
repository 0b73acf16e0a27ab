import contextlib
import io
import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmkd.analysis.average_precision import (
    ImageMatches,
    bootstrap,
    draw_counts,
    resample,
)

AREAS = ('all', 'small', 'medium', 'large')


def truth(boxes, images, classes, crowds=()):
    """Annotations of boxes (image, class, x, y, w, h), ids from 1 on."""
    return dict(
        images=[dict(id=i, width=640, height=640) for i in images],
        categories=[dict(id=c, name=f'class {c}') for c in classes],
        annotations=[
            dict(
                id=index + 1,
                image_id=image,
                category_id=label,
                bbox=list(box),
                area=box[2] * box[3],
                iscrowd=int(index in crowds),
            )
            for index, (image, label, *box) in enumerate(boxes)
        ],
    )


def detected(*boxes):
    """Detections (image, class, score, x, y, w, h)."""
    return [
        dict(image_id=image, category_id=label, score=score, bbox=list(box))
        for image, label, score, *box in boxes
    ]


def matches(folder, annotations, results):
    for name, content in (('ann', annotations), ('results', results)):
        (folder / f'{name}.json').write_text(json.dumps(content))
    return ImageMatches.from_files(
        folder / 'ann.json', folder / 'results.json'
    )


def scenes(rng, images=12, labels=3):
    """Objects of all sizes, crowds, an image without any, a class without."""
    boxes = []
    for image in range(2, images + 1):  # image 1 is empty
        for _ in range(rng.integers(0, 6)):
            side = np.exp(rng.uniform(np.log(12), np.log(200), 2))
            x, y = rng.uniform(0, 400, 2)
            boxes.append((image, int(rng.integers(labels)) + 1, x, y, *side))
    boxes = [(*one[:2], *map(float, one[2:])) for one in boxes]
    crowds = set(rng.choice(len(boxes), len(boxes) // 8, replace=False))
    ids = range(1, images + 1)
    return truth(boxes, ids, range(1, labels + 2), crowds)


def guesses(rng, annotations, digits=1):
    """Moved, doubled, missed and invented boxes; scores that often tie."""
    last = annotations['images'][-1]['id']
    results = []
    for one in annotations['annotations']:
        if one['image_id'] == last:  # nothing is found in the last image
            continue
        for _ in range(rng.integers(0, 4)):
            moved = np.array(one['bbox']) * rng.normal(1, 0.07, 4)
            results.append((one['image_id'], one['category_id'], moved))
    for _ in range(4 * last):
        image, label = rng.integers(1, last), rng.integers(1, 5)
        side = np.exp(rng.uniform(np.log(12), np.log(200), 2))
        results.append((image, label, [*rng.uniform(0, 400, 2), *side]))
    return [
        dict(
            image_id=int(image),
            category_id=int(label),
            score=round(float(rng.uniform()), digits),
            bbox=[float(x) for x in box],
        )
        for image, label, box in (
            results[index] for index in rng.permutation(len(results))
        )
    ]


def repeated(annotations, results, weights):
    """A set in which the i-th image stands weights[i] times in succession."""
    new = dict(annotations, images=[], annotations=[])
    copies = defaultdict(list)
    for image, times in zip(annotations['images'], weights):
        for _ in range(times):
            name = len(new['images']) + 1
            new['images'].append(dict(image, id=name))
            copies[image['id']].append(name)
    for one in annotations['annotations']:
        for name in copies[one['image_id']]:
            index = len(new['annotations']) + 1
            new['annotations'].append(dict(one, id=index, image_id=name))
    return new, [
        dict(one, image_id=name)
        for one in results
        for name in copies[one['image_id']]
    ]


def pycocotools(annotations, results):
    """The precisions (T, R, K, A) and the twelve numbers of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(annotations))
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.eval['precision'][..., -1], evaluation.stats


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_precision_and_recall_by_hand(tmp_path):
    # Right, wrong, right: precision is 1 up to half of the recall, the recalls
    # 0, 0.01, …, 0.5; then 2 / 3 at the other 50.
    ann = truth([(1, 1, 0, 0, 9, 9), (1, 1, 50, 0, 9, 9)], [1], [1])
    results = detected(
        (1, 1, 0.9, 0, 0, 9, 9),
        (1, 1, 0.8, 0, 50, 9, 9),
        (1, 1, 0.7, 50, 0, 9, 9),
    )
    one = matches(tmp_path, ann, results)
    assert one.ap() == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert one.ap(area='small') == pytest.approx(one.ap())
    assert one.ap(area='large') == -1


def test_a_weight_counts_objects_and_mistakes_by_hand(tmp_path):
    # Three times the image that is right, once the one that misses: the
    # recalls up to 3 / 4 are reached, 76 of 101. Its mistake comes first and
    # leaves a precision of 3 / 4 at best.
    ann = truth([(1, 1, 0, 0, 9, 9), (2, 1, 0, 0, 9, 9)], [1, 2], [1])
    results = detected((1, 1, 0.5, 0, 0, 9, 9), (2, 1, 0.9, 50, 50, 9, 9))
    one = matches(tmp_path, ann, results)
    assert one.ap([3, 1]) == pytest.approx(76 / 101 * 3 / 4)
    assert one.ap([1, 0]) == pytest.approx(1)
    assert one.ap([0, 1]) == 0
    assert one.ap([0, 0]) == -1


def test_recalls_are_reached_as_pycocotools_rounds_them(tmp_path):
    # k objects are found before any mistake, the other n − k each after one:
    # precision 1 up to a recall of k / n, then n / (2 n − k). In floats 0.07
    # of 100 is above 7, yet 7 / 100 is 0.07 and suffices.
    ann = truth([(1, 1, 0, 0, 9, 9), (2, 1, 0, 0, 9, 9)], [1, 2], [1])
    one = matches(
        tmp_path,
        ann,
        detected(
            (1, 1, 0.9, 0, 0, 9, 9),
            (2, 1, 0.8, 50, 50, 9, 9),
            (2, 1, 0.7, 0, 0, 9, 9),
        ),
    )
    assert one.ap([7, 93]) == pytest.approx((8 + 93 * 100 / 193) / 101)
    for n in range(2, 130):
        for k in {1, n // 3 + 1, n - 1}:
            first = (k / n >= np.linspace(0, 1, 101)).sum()
            expected = (first + (101 - first) * n / (2 * n - k)) / 101
            assert one.ap([k, n - k]) == pytest.approx(expected, abs=1e-12)


def test_the_iou_of_a_box_decides_up_to_where_it_counts(tmp_path):
    # 72 of 100 columns: right at 0.5, 0.55, 0.6, 0.65, 0.7
    ann = truth([(1, 1, 0, 0, 100, 10)], [1], [1])
    one = matches(tmp_path, ann, detected((1, 1, 0.9, 0, 0, 72, 10)))
    assert one.ap(iou=0.7) == pytest.approx(1)
    assert one.ap(iou=0.75) == 0
    assert one.ap() == pytest.approx(0.5)


@pytest.mark.parametrize('digits', [1, 6])
@pytest.mark.parametrize('seed', range(4))
def test_equals_pycocotools(tmp_path, seed, digits):
    rng = np.random.default_rng(seed)
    ann = scenes(rng)
    results = guesses(rng, ann, digits)
    one = matches(tmp_path, ann, results)
    precision, expected = pycocotools(ann, results)
    got = [one.ap(), one.ap(iou=0.5), one.ap(iou=0.75)]
    got += [one.ap(area=area) for area in AREAS[1:]]
    np.testing.assert_allclose(got, expected[:6], rtol=0, atol=1e-12)
    for index, area in enumerate(AREAS):
        for iou in (None, 0.6):
            chosen = precision if iou is None else precision[2:3]
            np.testing.assert_allclose(
                list(one.ap(area=area, iou=iou, by_class=True).values()),
                chosen[..., index].mean((0, 1)),
                rtol=0,
                atol=1e-12,
            )
    assert list(one.ap(by_class=True)) == [f'class {c}' for c in (1, 2, 3, 4)]
    assert one.ap(by_class=True)['class 4'] == -1


def test_equals_pycocotools_beyond_its_hundred_detections(tmp_path, rng):
    ann = scenes(rng, images=3)
    results = guesses(rng, ann)
    results += detected(
        *(
            (2, 1, round(float(score), 1), *box.tolist())
            for score, box in zip(
                rng.uniform(size=150), rng.uniform(5, 90, (150, 4))
            )
        )
    )
    one = matches(tmp_path, ann, results)
    assert np.bincount(one.image[one.label == 0])[1] == 100
    _, expected = pycocotools(ann, results)
    assert one.ap() == pytest.approx(expected[0], rel=0, abs=1e-12)


@pytest.mark.parametrize('digits', [1, 6])
@pytest.mark.parametrize('seed', range(4))
def test_weights_equal_images_that_are_repeated(tmp_path, seed, digits):
    rng = np.random.default_rng(10 + seed)
    ann = scenes(rng)
    results = guesses(rng, ann, digits)
    one = matches(tmp_path, ann, results)
    weights = rng.integers(0, 4, len(ann['images']))
    _, expected = pycocotools(*repeated(ann, results, weights))
    got = [one.ap(weights), one.ap(weights, 0.5), one.ap(weights, 0.75)]
    got += [one.ap(weights, area=area) for area in AREAS[1:]]
    np.testing.assert_allclose(got, expected[:6], rtol=0, atol=1e-12)


def test_a_tie_within_a_repeated_image_repeats_as_a_whole(tmp_path):
    # Wrong and right with one score, twice: 0/1 1/2 1/3 2/4. In pairs of two
    # it were 0/1 0/2 1/3 2/4, and the other way round 1/1 2/2.
    ann = truth([(1, 1, 0, 0, 9, 9)], [1], [1])
    wrong, right = (1, 1, 0.5, 50, 50, 9, 9), (1, 1, 0.5, 0, 0, 9, 9)
    one = matches(tmp_path, ann, detected(wrong, right))
    assert one.ap([2]) == pytest.approx(1 / 2)
    # Right and wrong: 1/1 1/2 2/3 2/4, so 1 up to half of the recall.
    one = matches(tmp_path, ann, detected(right, wrong))
    assert one.ap([2]) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_draws_are_the_ap_of_each_row(tmp_path, rng):
    ann = scenes(rng)
    one = matches(tmp_path, ann, guesses(rng, ann))
    weights, _ = draw_counts(len(ann['images']), 1, 50)
    np.testing.assert_allclose(
        one.ap_of_draws(weights),
        [one.ap(row) for row in weights],
        rtol=0,
        atol=1e-12,
    )


def test_blocks_do_not_change_the_draws(tmp_path, rng, monkeypatch):
    ann = scenes(rng)
    one = matches(tmp_path, ann, guesses(rng, ann))
    weights, _ = draw_counts(len(ann['images']), 1, 50)
    whole = one.ap_of_draws(weights)
    monkeypatch.setattr('mmkd.analysis.average_precision.BLOCK', 1000)
    np.testing.assert_array_equal(one.ap_of_draws(weights), whole)


def test_no_detections_have_an_ap_of_zero(tmp_path, rng):
    ann = scenes(rng)
    one = matches(tmp_path, ann, [])
    assert one.ap() == 0
    assert one.ap(by_class=True)['class 4'] == -1
    assert one.ap_of_draws(np.ones((2, 12), int)).tolist() == [0, 0]
    assert set(one.per_image()[np.isfinite(one.per_image())]) == {0}


def test_no_objects_have_no_ap(tmp_path):
    ann = truth([], [1], [1])
    one = matches(tmp_path, ann, detected((1, 1, 0.9, 0, 0, 9, 9)))
    assert one.ap() == -1
    assert np.isnan(one.ap_of_draws([[1], [2]])).all()


def test_pycocotools_is_silent(tmp_path, rng, capsys):
    ann = scenes(rng, images=3)
    matches(tmp_path, ann, guesses(rng, ann))
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('weights', [[1, 1], [0.5, 1, 1], [-1, 1, 1]])
def test_weights_that_count_nothing_are_an_error(tmp_path, rng, weights):
    one = matches(tmp_path, scenes(rng, images=3), [])
    with pytest.raises(ValueError, match='each of 3 images'):
        one.ap(weights)


def test_misspelt_areas_and_ious_are_errors(tmp_path, rng):
    one = matches(tmp_path, scenes(rng, images=3), [])
    with pytest.raises(ValueError, match="Did you mean 'small'"):
        one.ap(area='smal')
    with pytest.raises(ValueError, match='iou=0.72'):
        one.ap(iou=0.72)


@pytest.fixture
def arms(tmp_path, rng):
    """Two arms of two seeds on one set, as files' contents and as matches."""
    ann = scenes(rng, images=6)
    contents = {
        name: [guesses(rng, ann) for _ in range(2)] for name in ('a', 'b')
    }
    runs = {
        name: [matches(tmp_path, ann, one) for one in results]
        for name, results in contents.items()
    }
    return ann, contents, runs


@pytest.mark.parametrize('images_only', [False, True])
def test_resampling_equals_a_loop_over_repeated_sets(arms, images_only):
    ann, contents, runs = arms
    found = resample(runs, draws=12, seed=3, images_only=images_only)
    of_images, of_seeds = draw_counts(6, 2, 12, 3, images_only)
    for draw in range(12):
        for name, results in contents.items():
            aps = []
            for index, times in enumerate(of_seeds[draw]):
                new = repeated(ann, results[index], of_images[draw])
                aps += [pycocotools(*new)[1][0]] * times
            assert found[name][draw] == pytest.approx(np.mean(aps), abs=1e-12)


def test_the_bootstrap_is_the_quantiles_of_paired_draws(arms):
    _, _, runs = arms
    one = bootstrap(runs['a'], runs['b'], draws=200, seed=5, level=0.8)
    drawn = resample(runs, draws=200, seed=5)
    difference = np.sort(drawn['a'] - drawn['b'])
    # 10 % of 199 steps lie below: between the 20th and the 21st of 200
    assert difference[19] <= one.low <= difference[20]
    assert difference[179] <= one.high <= difference[180]
    aps = {name: [run.ap() for run in each] for name, each in runs.items()}
    assert one.mean == pytest.approx(np.mean(aps['a']) - np.mean(aps['b']))
    assert one.n == 200
    assert one.low < one.mean < one.high


def test_a_run_of_several_comparisons_is_drawn_once(arms, monkeypatch):
    a, b = arms[2].values()
    drawn, plain = [], ImageMatches.ap_of_draws

    def count(run, weights):
        drawn.append(run)
        return plain(run, weights)

    monkeypatch.setattr(ImageMatches, 'ap_of_draws', count)
    one, other = bootstrap(a, b, draws=9), bootstrap(b, a, draws=9)
    assert drawn == [*a, *b]
    assert (one.low, one.high) == (-other.high, -other.low)
    bootstrap(a[:1], b[1:], draws=9)  # other seeds, the same images
    assert drawn == [*a, *b]
    bootstrap(a, a, draws=9, seed=1)
    bootstrap(a, a, draws=8)
    assert drawn == [*a, *b, *a, *a]


def test_identical_arms_differ_by_exactly_nothing(arms):
    _, _, runs = arms
    one = bootstrap(runs['a'], list(runs['a']), draws=100)
    assert (one.mean, one.low, one.high, one.sd) == (0, 0, 0, 0)


def test_seeds_add_to_the_uncertainty_of_the_images(arms):
    # One seed of arm a finds what the other does not; arm b has no spread.
    _, _, runs = arms
    good = runs['a'][0]
    blind = replace(good, matched=np.zeros_like(good.matched))
    fixed, free = (
        bootstrap([good, blind], [good, good], draws=300, images_only=only)
        for only in (True, False)
    )
    assert fixed.mean == free.mean == pytest.approx(-good.ap() / 2)
    assert free.sd > fixed.sd


def test_counts_are_draws_with_replacement():
    images, seeds = draw_counts(40, 6, 2000, 1)
    assert images.shape == (2000, 40)
    assert set(images.sum(1)) == {40}
    assert set(seeds.sum(1)) == {6}
    # Binomial of n trials at 1 / n: mean 1, variance 1 − 1 / n
    for counts in (images, seeds):
        n = counts.shape[1]
        assert counts.mean(0) == pytest.approx(np.ones(n), abs=0.1)
        assert counts.var() == pytest.approx(1 - 1 / n, abs=0.03)
    same, once = draw_counts(40, 6, 2000, 1, images_only=True)
    assert (same == images).all()
    assert (once == 1).all()


def test_runs_that_do_not_belong_together_are_an_error(arms, tmp_path, rng):
    _, _, runs = arms
    with pytest.raises(ValueError, match="'a': 2, 'b': 1"):
        bootstrap(runs['a'], runs['b'][:1])
    with pytest.raises(ValueError, match='got none'):
        resample({})
    other = matches(tmp_path, scenes(rng, images=6), [])
    with pytest.raises(ValueError, match='one ann_file'):
        bootstrap(runs['a'], [other, other])


def test_the_score_of_an_image_by_hand(tmp_path):
    box, far = (0, 0, 100, 10), (300, 300, 9, 9)
    ann = truth(
        [(1, 1, *box), (1, 2, *far), (2, 1, *box), (5, 1, *box)],
        range(1, 7),
        [1, 2],
        crowds={3},
    )
    one = matches(
        tmp_path,
        ann,
        detected(
            (1, 1, 0.9, *box),
            (1, 1, 0.8, *far),  # the other class: wrong, and one missed
            (1, 2, 0.1, *far),  # below the threshold
            (2, 1, 0.3, 0, 0, 72, 10),  # right up to an IoU of 0.7
            (3, 1, 0.9, *box),  # wrong in an image without objects
            (4, 1, 0.2, *box),  # below the threshold, so nothing is there
            (5, 1, 0.9, *box),  # in a crowd, which does not count
        ),
    )
    nan = np.nan
    np.testing.assert_allclose(
        one.per_image(score_thr=0.3), [1 / 2, 1 / 2, 0, nan, nan, nan]
    )
    # Both right, one wrong: 2 / (2 + 1 / 2)
    np.testing.assert_allclose(
        one.per_image(score_thr=0)[[0, 3]], [2 / 2.5, 0]
    )


def test_the_score_of_an_image_does_not_see_below_the_threshold(tmp_path, rng):
    ann = scenes(rng)
    results = guesses(rng, ann)
    above = [one for one in results if one['score'] >= 0.5]
    whole, cut = (matches(tmp_path, ann, one) for one in (results, above))
    np.testing.assert_array_equal(whole.per_image(0.5), cut.per_image(0))

import json
from types import SimpleNamespace

import pytest

from mmkd.laboratory import results
from mmkd.laboratory.arms import Arm
from mmkd.laboratory.results import Trials

BOXES = [[4.0, 4.0, 20.0, 20.0], [40.0, 40.0, 12.0, 16.0]]


@pytest.fixture
def truth(tmp_path):
    """Four images, each with the same two objects of one class."""
    path = tmp_path / 'test.json'
    path.write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=i, file_name=f'{i}.png', width=64, height=64)
                    for i in range(4)
                ],
                annotations=[
                    dict(
                        id=2 * i + k + 1,
                        image_id=i,
                        category_id=1,
                        bbox=box,
                        area=box[2] * box[3],
                        iscrowd=0,
                    )
                    for i in range(4)
                    for k, box in enumerate(BOXES)
                ],
                categories=[dict(id=1, name='cell')],
            )
        )
    )
    return path


@pytest.fixture
def run(truth, tmp_path):
    """A finished run that finds so many of the eight objects exactly."""

    def run(name, found, status='done'):
        path = tmp_path / f'{name}.bbox.json'
        path.write_text(
            json.dumps(
                [
                    dict(
                        image_id=i // 2,
                        category_id=1,
                        bbox=BOXES[i % 2],
                        score=0.9,
                    )
                    for i in range(found)
                ]
            )
        )
        return SimpleNamespace(
            name=name,
            predictions=path,
            status=status,
            reason=None if status == 'done' else 'no memory',
            stale=False,
            folder=tmp_path / name,
            config=f'{name}.py',
            iterations=10,
            curve=lambda: [(10, 1.0)],
            seconds=lambda: 5.0,
            settings=SimpleNamespace(
                test_evaluator=SimpleNamespace(ann_file=str(truth))
            ),
        )

    return run


def arm(name, kind, method=None):
    return Arm(name, name, kind, settings=None, method=method)


@pytest.fixture
def trials(run):
    arms = [
        arm('alone', 'alone'),
        arm('alone_x1.40', 'time', 'pkd,fgd'),
        arm('pkd', 'distilled', 'pkd'),
        arm('pkd_sham', 'sham', 'pkd'),
        arm('fgd', 'distilled', 'fgd'),
    ]
    found = {
        'alone': (2, 4, 4),
        'alone_x1.40': (4, 4, 4),
        'pkd': (4, 6, 8),
        'pkd_sham': (2, 2, 2),
        'fgd': (2, 4, 4),
    }
    table = {
        (one.name, seed): run(f'{one.name}{seed}', found[one.name][seed])
        for one in arms
        for seed in range(3)
    }
    return Trials(arms, table, [0, 1, 2], run('teacher', 8))


def recall(found):
    """AP of a detector that finds so many of eight and nothing else.

    Precision is 1 up to its recall; COCO reads it at 0, 0.01, … 1.
    """
    return 100 * (int(100 * found / 8) + 1) / 101


def test_an_arm_has_every_seed_and_its_metrics(trials):
    entry = results.arm_entry(trials, trials.arms[2])
    assert [run['seed'] for run in entry['runs']] == [0, 1, 2]
    scores = [run['metrics']['AP'] for run in entry['runs']]
    assert scores == pytest.approx([recall(4), recall(6), recall(8)])
    assert entry['runs'][2]['metrics']['by_class'] == dict(cell=100.0)
    assert entry['runs'][0]['metrics']['APl'] is None, 'no large object'


def test_a_seed_that_failed_is_shown_and_left_out_of_pairs(trials):
    trials.runs['pkd', 1].status = 'failed'
    trials.runs['pkd', 1].reason = 'no memory'
    entry = results.arm_entry(trials, trials.arms[2])
    assert entry['runs'][1]['status'] == 'failed'
    assert entry['runs'][1]['metrics'] is None
    found = results.comparisons(trials, 100.0, draws=0)
    one = next(
        x for x in found if (x['arm'], x['against']) == ('pkd', 'alone')
    )
    assert set(one['differences']) == {'0', '2'}
    assert one['n'] == 2


def test_each_method_meets_its_own_controls(trials):
    pairs = [
        (one['arm'], one['against'])
        for one in results.comparisons(trials, 100.0, draws=0)
    ]
    assert pairs == [
        ('pkd', 'alone'),
        ('pkd', 'alone_x1.40'),
        ('pkd', 'pkd_sham'),
        ('fgd', 'alone'),
        ('fgd', 'alone_x1.40'),
    ]


def test_differences_are_paired_by_seed(trials):
    (one, *_) = results.comparisons(trials, 100.0, draws=50)
    expected = [
        recall(4) - recall(2),
        recall(6) - recall(4),
        recall(8) - recall(4),
    ]
    assert list(one['differences'].values()) == pytest.approx(expected)
    assert one['mean'] == pytest.approx(sum(expected) / 3)
    assert (one['wins'], one['losses']) == (3, 0)
    assert one['bootstrap']['draws'] == 50
    assert one['bootstrap']['low'] <= one['mean'] <= one['bootstrap']['high']


def test_methods_are_adjusted_together_against_one_kind_of_control(trials):
    found = results.comparisons(trials, 100.0, draws=0)
    alone = {x['arm']: x for x in found if x['against'] == 'alone'}
    # fgd equals alone in every seed: no test can be made of it.
    assert alone['pkd']['p_holm'] >= alone['pkd']['p']


def test_methods_that_seeds_cannot_tell_apart_share_a_rank(trials):
    assert sum(len(group) for group in results.ranking(trials)) == 2
    trials.runs['fgd', 1].status = trials.runs['fgd', 2].status = 'failed'
    assert len(results.ranking(trials)) == 1, 'one seed ranks nothing'


def test_versions_and_machine_are_named():
    assert results.versions()['torch']
    assert 'cores' in results.machine()

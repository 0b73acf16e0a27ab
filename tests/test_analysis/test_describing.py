"""The command that writes a teacher's hypotheses."""

import json

import pytest
import runs
import tiny
import torch

from mmkd.analysis.hypotheses import dropping, main
from mmkd.datasets.hypotheses import HypothesisDataset

IMAGES = 3


@pytest.fixture
def command(tmp_path):
    """Describes three pictures; returns the status, and the file if any."""
    data = tmp_path / 'data'
    runs.write_coco(data, images=IMAGES)
    cfg = runs.config(data, tmp_path / 'run', validate=True)
    cfg.merge_from_dict(runs.evaluation(data, 'test'))
    cfg.model = tiny.retinanet()
    cfg.dump(tmp_path / 'teacher.py')
    for number in range(2):
        tiny.save_teacher(
            tiny.retinanet(), tmp_path / f'{number}.pth', seed=number
        )

    def command(*options, weights=(0,)):
        files = [str(tmp_path / f'{number}.pth') for number in weights]
        out = tmp_path / 'cache.json'
        status = main(
            [
                str(tmp_path / 'teacher.py'),
                *files,
                *('--out', str(out), '--num-hypotheses', '2'),
                *('--score-thr', '0.0', *options),
            ]
        )
        return status, json.loads(out.read_text()) if out.exists() else None

    command.data = data
    command.out = tmp_path / 'cache.json'
    return command


def sets_of(cache):
    """Boxes of each image and hypothesis."""
    return {
        (image['id'], number): [
            one['bbox']
            for one in cache['annotations']
            if (one['image_id'], one['hyp_id']) == (image['id'], number)
        ]
        for image in cache['images']
        for number in range(2)
    }


@pytest.mark.parametrize(
    'generator',
    ['sample', 'mbr', pytest.param('nbest', marks=pytest.mark.slow)],
)
def test_every_image_is_described_in_the_ids_of_its_data(command, generator):
    status, cache = command('--generator', generator)
    assert status == 0
    assert cache['info']['complete']
    assert len(cache['images']) == IMAGES
    assert cache['annotations']
    assert {one['category_id'] for one in cache['annotations']} <= {1, 4, 7}
    loaded = HypothesisDataset(
        dict(runs.dataset(command.data), test_mode=False), command.out
    )
    labels = [
        one['bbox_label']
        for index in range(IMAGES)
        for one in loaded.get_data_info(index)['instances']
    ]
    assert set(labels) <= {0, 1, 2}


def test_it_says_the_same_twice_and_goes_on_where_it_stopped(command):
    _, whole = command()
    half = json.loads(json.dumps(whole))
    half['info']['complete'] = False
    half['images'] = whole['images'][:1]
    first = whole['images'][0]['id']
    half['annotations'] = [
        one for one in whole['annotations'] if one['image_id'] == first
    ]
    command.out.write_text(json.dumps(half))
    status, again = command()
    assert status == 0
    assert again == whole


def test_what_was_made_otherwise_is_not_replaced_unasked(command, capsys):
    _, before = command()
    status, after = command('--seed', '5')
    assert status == 1
    assert after == before
    said = capsys.readouterr().err
    assert 'seed differ' in said
    assert '--overwrite' in said
    status, after = command('--seed', '5', '--overwrite')
    assert status == 0
    assert after != before


def test_other_weights_are_another_file(command):
    command()
    assert command(weights=(1,))[0] == 1
    assert command('--overwrite-if-changed', weights=(1,))[0] == 0


def test_dropped_channels_give_sets_that_differ(command):
    status, cache = command('--generator', 'mc_dropout', '--dropout', '0.5')
    assert status == 0
    sets = sets_of(cache)
    ids = [one['id'] for one in cache['images']]
    assert any(sets[one, 0] != sets[one, 1] for one in ids)


def test_dropping_leaves_the_detector_and_the_random_state_as_they_were():
    detector = tiny.build(tiny.retinanet()).eval()
    images, _ = tiny.batch()
    before = detector(images)[0][0]
    state = torch.get_rng_state()
    with dropping(detector, 0.5, _Seed(3)):
        dropped = detector(images)[0][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(dropped, before)
    assert torch.equal(detector(images)[0][0], before)


class _Seed:
    def __init__(self, value):
        self.value = value

    def generate_state(self, _):
        return [self.value]


def test_several_checkpoints_give_one_set_each(command):
    status, cache = command('--generator', 'checkpoints', weights=(0, 1))
    assert status == 0
    sets = sets_of(cache)
    first = cache['images'][0]['id']
    assert sets[first, 0] != sets[first, 1]


def test_the_number_of_checkpoints_must_fit(command, capsys):
    assert command('--generator', 'checkpoints')[0] == 1
    assert 'needs 2 checkpoints' in capsys.readouterr().err
    assert command(weights=(0, 1))[0] == 1
    assert 'needs 1 checkpoints' in capsys.readouterr().err


def test_weights_that_are_nowhere_are_told_before_anything_is_built(
    command, capsys
):
    assert command(weights=(7,))[0] == 1
    said = capsys.readouterr().err
    assert said.startswith('make_hypotheses.py expected')
    assert '7.pth' in said

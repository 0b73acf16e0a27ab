import copy
import pickle

import numpy as np
import pytest
import runs
import torch
from mmdet.datasets import CocoDataset
from mmengine.dataset import DefaultSampler, InfiniteSampler, pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
)

from mmkd.engine.draws import Draw, Place, replayable

data, quick_starts = runs.data, runs.quick_starts


class Numbers(Dataset):
    """An index and three random numbers of each kind."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, torch.rand(1).item(), np.random.rand(), len(self)


def loader(workers=0, sampler=None, **settings):
    data = Numbers()
    sampler = sampler or DefaultSampler(data, seed=3)
    return replayable(
        DataLoader(
            data,
            batch_size=2,
            sampler=sampler,
            num_workers=workers,
            collate_fn=list,
            **settings,
        ),
        seed=3,
    )


def test_a_draw_is_its_index_and_keeps_its_key_in_a_worker():
    draw = pickle.loads(pickle.dumps(Draw(4, (1, 2, 3), 5)))
    assert (draw, draw.key, draw.epoch) == (4, (1, 2, 3), 5)
    assert [10, 11, 12, 13, 14][draw] == 14


def test_batches_after_a_place_are_those_of_a_whole_pass():
    whole = list(loader())
    later = loader()
    later.go_to(Place(epoch=0, batches=3))
    assert list(later) == whole[3:]


def test_skipping_loads_nothing():
    later = loader()
    seen = []
    later.dataset.__class__.__getitem__, read = (
        lambda data, index: seen.append(int(index)) or 0,
        later.dataset.__class__.__getitem__,
    )
    try:
        later.go_to(Place(0, 4))
        list(later)
    finally:
        later.dataset.__class__.__getitem__ = read
    assert len(seen) == 2


def test_passes_differ_and_repeat():
    passes = loader()
    first, second = list(passes), list(passes)
    assert first != second
    assert passes.place == Place(2, 0)
    later = loader()
    later.go_to(Place(1, 0))
    assert list(later) == second


class Epochs(Dataset):
    """Its index, and the epoch that it was told."""

    def __len__(self):
        return 5

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return self.epoch


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('nested', [False, True])
def test_a_data_set_is_told_the_epoch_wherever_it_is(workers, nested):
    data = ConcatDataset([Epochs()]) if nested else Epochs()
    sampler = DefaultSampler(data)
    settings = dict(num_workers=workers, persistent_workers=workers > 0)
    passes = replayable(DataLoader(data, 2, sampler=sampler, **settings), 0)
    told = [torch.cat(list(passes)).tolist() for _ in range(2)]
    assert told == [[0] * 5, [1] * 5]
    passes.go_to(Place(7, 1))
    assert torch.cat(list(passes)).tolist() == [7] * 3


def test_of_an_endless_sampler_the_epoch_is_told_by_the_draws():
    data = Epochs()
    passes = replayable(DataLoader(data, 2, sampler=InfiniteSampler(data)), 0)
    passes.go_to(Place(0, 2))
    batches = iter(passes)
    told = torch.cat([next(batches) for _ in range(4)]).tolist()
    assert told == [0, 1, 1, 1, 1, 1, 2, 2]


def test_an_image_drawn_twice_in_a_pass_differs():
    numbers = [one[1] for batch in loader(sampler=[4, 4]) for one in batch]
    assert numbers[0] != numbers[1]


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(loader(workers))
        assert bool((torch.get_rng_state() == before).all())


def test_workers_draw_what_one_process_draws():
    whole = [list(one) for one in (loader(), loader(2))]
    assert whole[0] == whole[1]


def test_spawned_workers_know_the_extended_data_set():
    data, draw = loader().dataset, Draw(1, (3, 0, 0, 0, 1))
    assert pickle.loads(pickle.dumps(data))[draw] == data[draw]


def test_a_sampler_of_global_random_numbers_is_repeatable():
    data, drawn = Numbers(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(list(loader(sampler=RandomSampler(data))))
    assert drawn[0] == drawn[1]


def test_the_data_set_keeps_its_type_and_attributes(data):
    init_default_scope('mmdet')
    config = dict(runs.dataset(data))
    del config['type']
    coco = CocoDataset(**config)
    replayable(DataLoader(coco, batch_size=1, collate_fn=pseudo_collate), 0)
    assert isinstance(coco, CocoDataset)
    assert type(coco).__name__ == 'CocoDataset'
    assert coco.metainfo['classes'] == runs.NAMES
    copied = copy.deepcopy(coco)
    assert type(copied) is type(coco)
    assert copied.get_data_info(1) == coco.get_data_info(1)
    # A plain index draws from the global stream, as ever.
    torch.manual_seed(0)
    np.random.seed(0)
    assert coco[0]['inputs'].shape[0] == 3


WRAPPED = {
    'ConcatDataset': lambda one: dict(
        type='ConcatDataset', datasets=[one, one]
    ),
    'RepeatDataset': lambda one: dict(
        type='RepeatDataset', times=2, dataset=one
    ),
    'ClassBalancedDataset': lambda one: dict(
        type='ClassBalancedDataset', oversample_thr=0.5, dataset=one
    ),
    'MultiImageMixDataset': lambda one: dict(
        type='MultiImageMixDataset',
        dataset=dict(
            one,
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
            ],
        ),
        pipeline=[
            dict(type='Mosaic', img_scale=(64, 64), pad_val=114.0),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ],
    ),
}


@pytest.mark.parametrize('kind', WRAPPED)
@pytest.mark.parametrize(
    'endless', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_mmdets_wrappers_and_samplers_replay(kind, endless, data):
    init_default_scope('mmdet')

    def batches(start, workers=0):
        sampler = 'InfiniteSampler' if endless else 'DefaultSampler'
        built = Runner.build_dataloader(
            dict(
                batch_size=2,
                num_workers=workers,
                sampler=dict(type=sampler, shuffle=True),
                batch_sampler=dict(type='AspectRatioBatchSampler'),
                dataset=WRAPPED[kind](runs.dataset(data)),
            ),
            seed=1,
        )
        built = replayable(built, seed=1)
        assert hasattr(built.batch_sampler.sampler, 'set_epoch')
        built.go_to(Place(0, start))
        return [batch for batch, _ in zip(built, range(4 - start))]

    def described(batch):
        return [
            (one.img_path, one.get('flip'), pixels.float().sum().item())
            for one, pixels in zip(batch['data_samples'], batch['inputs'])
        ]

    whole = [described(one) for one in batches(0)]
    assert [described(one) for one in batches(2)] == whole[2:]
    assert [described(one) for one in batches(0, workers=2)] == whole


def test_two_ranks_draw_different_numbers():
    first, second = loader(), loader()
    second.batch_sampler.rank = 1
    assert list(first) != list(second)


def test_a_stream_is_passed_over_by_reading_it():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(6))

    stream = replayable(DataLoader(Stream(), batch_size=2), seed=0)
    stream.go_to(Place(0, 1))
    assert [one.tolist() for one in stream] == [[2, 3], [4, 5]]

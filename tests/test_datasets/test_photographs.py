"""Photographs that nobody labelled: which ones, how shown, in which order."""

import json
from collections import Counter
from pathlib import Path

import mmdet
import numpy as np
import pictures
import pytest
from mmcv.transforms import BaseTransform, Compose
from mmdet.datasets.samplers import ClassAwareSampler
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.registry import init_default_scope

from mmkd.datasets.check import check_dataset
from mmkd.datasets.photographs import (
    PartlyLabelledBatchSampler,
    PartlyLabelledDataset,
    photographs,
)
from mmkd.registry import DATASETS, TRANSFORMS
from mmkd.structures.ground_truth import labelled

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture
def folder(tmp_path):
    """Six pictures, all annotated."""
    pictures.draw(tmp_path, [(96, 128)] * 6)
    return tmp_path


def first(folder, *transforms, images=2, **settings):
    """The annotated set, of which the first images count."""
    found = pictures.dataset(folder, *transforms)
    return dict(found, indices=list(range(images)), **settings)


def names(dataset, part):
    part = dataset.datasets[part]
    return [
        Path(part.get_data_info(one)['img_path']).name
        for one in range(len(part))
    ]


# Which ones ------------------------------------------------------------------


def test_what_is_labelled_or_tested_on_is_left_out(folder):
    (folder / 'more').mkdir()
    (folder / '5.png').rename(folder / 'more' / '9.PNG')
    (folder / 'notes.txt').write_text('no picture')
    tested = dict(first(folder), indices=[3])
    found = PartlyLabelledDataset(first(folder), folder, [tested])
    assert names(found, 0) == ['0.png', '1.png']
    assert names(found, 1) == ['2.png', '4.png', '9.PNG']
    assert len(found) == 5


def test_a_link_to_the_folder_is_the_folder(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp('elsewhere') / 'link'
    link.symlink_to(folder)
    found = PartlyLabelledDataset(first(folder), link)
    assert names(found, 1) == ['2.png', '3.png', '4.png', '5.png']


def test_sets_in_wrappers_are_left_out_too(folder):
    one, two = first(folder, images=1), dict(first(folder), indices=[4])
    several = dict(
        type='RepeatDataset',
        times=3,
        dataset=dict(type='ConcatDataset', datasets=[one, two]),
    )
    found = PartlyLabelledDataset(several, folder)
    assert len(found.datasets[0]) == 6
    assert names(found, 1) == ['1.png', '2.png', '3.png', '5.png']


def test_a_photograph_has_no_number_that_a_labelled_image_may_have(folder):
    """What a teacher predicted is stored by it."""
    found = PartlyLabelledDataset(first(folder), folder)
    ids = [one['data_samples'].img_id for one in found]
    assert ids == [0, 1, '2.png', '3.png', '4.png', '5.png']


def test_a_folder_without_others_is_refused(folder, tmp_path_factory):
    everything = first(folder, images=6)
    with pytest.raises(ValueError, match=r'All 6 .* labelled \(6\)'):
        PartlyLabelledDataset(everything, folder)
    with pytest.raises(FileNotFoundError, match='which is none'):
        photographs(folder / 'nowhere')
    with pytest.raises(FileNotFoundError, match='no file in it'):
        photographs(tmp_path_factory.mktemp('empty'))


def test_a_photograph_that_is_cut_off_is_told_beforehand(folder):
    whole = (folder / '4.png').read_bytes()
    (folder / '4.png').write_bytes(whole[: len(whole) // 2])
    config = dict(
        type='mmkd.PartlyLabelledDataset',
        dataset=first(folder),
        unlabelled=str(folder),
    )
    content = json.loads((folder / 'pictures.json').read_text())
    content['images'] = content['images'][:4]
    content['annotations'] = content['annotations'][:4]
    (folder / 'pictures.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'unlabelled: 1 of 6 .*4\.png'):
        check_dataset(config, 'train_dataloader.dataset')


# How they are shown ----------------------------------------------------------


def test_a_photograph_is_unlabelled_and_an_empty_image_is_not(folder):
    content = json.loads((folder / 'pictures.json').read_text())
    content['annotations'] = content['annotations'][1:]
    (folder / 'pictures.json').write_text(json.dumps(content))
    found = PartlyLabelledDataset(first(folder), folder)
    shown = [labelled(one['data_samples']) for one in found]
    assert shown == [True, True, False, False, False, False]
    assert not len(found[0]['data_samples'].gt_instances.bboxes)


def test_both_parts_go_through_the_same_pipeline(folder):
    resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
    flip = dict(type='RandomFlip', prob=1.0)
    found = PartlyLabelledDataset(first(folder, resize, flip), folder)
    everything = DATASETS.build(
        pictures.dataset(folder, resize, flip)
    )  # annotated
    for number in range(6):
        shown = found[number]['inputs']
        assert shown.equal(everything[number]['inputs'])
        assert found[number]['data_samples'].flip


@pytest.mark.parametrize(
    'transform',
    [
        dict(type='RandomCrop', crop_size=(40, 40)),
        dict(type='MinIoURandomCrop'),
        dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
        dict(type='CachedMosaic', img_scale=(64, 64), random_pop=False),
        dict(type='CachedMixUp', img_scale=(64, 64), prob=1.0),
        dict(type='RandomAffine'),
        dict(type='Expand'),
        dict(
            type='RandomChoice',
            transforms=[[dict(type='RandomCrop', crop_size=(40, 40))]],
        ),
    ],
    ids=lambda one: one['type'],
)
def test_transforms_that_look_at_boxes_keep_photographs(folder, transform):
    found = PartlyLabelledDataset(first(folder, transform), folder)
    photograph = found.datasets[1]
    seen = Counter()
    # Refetching would replace a dropped image by any other.
    photograph._rand_another = lambda: pytest.fail('an image was dropped')
    for number in list(range(len(photograph))) * 3:
        sample = photograph[number]['data_samples']
        assert not labelled(sample)
        seen[sample.img_id] += 1
    assert set(seen.values()) == {3}


def mosaic(folder):
    return dict(
        type='MultiImageMixDataset',
        dataset=first(folder),
        pipeline=[
            dict(type='Mosaic', img_scale=(64, 64)),
            dict(type='RandomCrop', crop_size=(64, 64)),
            dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
            dict(type='PackDetInputs'),
        ],
    )


def test_mixed_images_are_mixed_with_their_like(folder):
    config = mosaic(folder)
    config['dataset']['pipeline'] = config['dataset']['pipeline'][:2]
    found = PartlyLabelledDataset(config, folder)
    assert len(found) == 6
    for number in range(2, 6):
        shown = found[number]
        assert shown['inputs'].shape[1:] == (64, 64)
        assert not labelled(shown['data_samples'])
    found.update_skip_type_keys(['Mosaic', 'RandomCrop'])
    assert found[5]['inputs'].shape[1:] == (96, 128)
    assert found[0]['inputs'].shape[1:] == (96, 128)
    assert labelled(found[0]['data_samples'])


def test_a_hook_exchanges_both_pipelines(folder):
    found = PartlyLabelledDataset(first(folder), folder)
    found.pipeline = Compose(
        [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(32, 32), keep_ratio=False),
            dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
            dict(type='PackDetInputs'),
        ]
    )
    for number in range(6):
        shown = found[number]
        assert shown['inputs'].shape[1:] == (32, 32)
        assert labelled(shown['data_samples']) == (number < 2)


def test_the_labelled_set_keeps_its_own_pipeline(folder):
    """What keeps photographs would keep crops without an object."""
    crop = dict(type='RandomCrop', crop_size=(40, 40))
    found = PartlyLabelledDataset(first(folder, crop), folder)
    own, other = (
        next(one for one in part.pipeline.transforms if 'Crop' in str(one))
        for part in found.datasets
    )
    assert (own.allow_negative_crop, other.allow_negative_crop) == (
        False,
        True,
    )


#: Packages that some of mmdet's pipelines ask for.
OPTIONAL = (
    *('albumentations', 'instaboost', 'panopticapi', 'petrel_client'),
    'transformers',
)
#: Of detectors that are given proposals, and of videos.
OTHERS = ('LoadProposals', 'UniformRefFrameSample', 'TransformBroadcaster')


@pytest.mark.slow
def test_nearly_all_of_mmdet_s_training_pipelines_show_photographs(folder):
    seen, failed = set(), {}
    for path in sorted(CONFIGS.rglob('*.py')):
        if '_base_' in path.parts:
            continue
        try:
            layers = pipelines(Config.fromfile(path))
        except (KeyError, ImportError, FileNotFoundError):
            # Of another task, or names a file that the package lacks.
            continue
        if not layers or str(layers) in seen:
            continue
        seen.add(str(layers))
        config = dict(first(folder), pipeline=layers[-1]['pipeline'])
        for wrapper in reversed(layers[:-1]):
            config = dict(wrapper, dataset=config)
        try:
            found = PartlyLabelledDataset(config, folder)
        except (ImportError, RuntimeError, ValueError) as error:
            if not any(one in str(error) for one in OPTIONAL + OTHERS):
                raise
            failed[path.stem] = error
        else:
            assert not labelled(found[5]['data_samples']), path
    assert len(seen) - len(failed) >= 70


def pipelines(config):
    """A training set's config, and those inside of it, that have one."""
    loader = config.get('train_dataloader') or {}
    found, inner = [], loader.get('dataset')
    while inner is not None:
        if 'pipeline' in inner:
            found.append(inner.to_dict())
        inner = inner.get('dataset') or next(
            iter(inner.get('datasets', ())), None
        )
    for one in found[:-1]:
        del one['dataset']
    return found if found and 'ann_file' in str(found[-1]) else []


@TRANSFORMS.register_module()
class CentreOnFirst(BaseTransform):
    """Needs an object."""

    def transform(self, results):
        return dict(results, centre=results['gt_bboxes'].centers[0])


def test_a_transform_that_needs_annotations_is_named(folder):
    with pytest.raises(
        ValueError, match=r'cannot show.*CentreOnFirst.*size 0'
    ):
        PartlyLabelledDataset(
            first(folder, dict(type='CentreOnFirst')), folder
        )
    unpacked = first(folder)
    unpacked['pipeline'] = unpacked['pipeline'][:-1]
    with pytest.raises(ValueError, match='PackDetInputs|data_samples'):
        PartlyLabelledDataset(unpacked, folder)


def test_building_one_leaves_random_numbers_alone(folder):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    PartlyLabelledDataset(first(folder, dict(type='Expand')), folder)
    assert (np.random.get_state()[1] == before).all()


# In which order --------------------------------------------------------------


class Parts:
    """Two data sets of given sizes."""

    def __init__(self, *sizes):
        self.datasets = [range(size) for size in sizes]

    def __len__(self):
        return sum(map(len, self.datasets))


def sampler(*sizes, kind=DefaultSampler, rank=0, world=1, **settings):
    found = kind(Parts(*sizes), **{'seed': 0, **settings})
    found.rank, found.world_size = rank, world
    return found


def epochs(source, number, *args, **settings):
    batches = PartlyLabelledBatchSampler(source, *args, **settings)
    found = []
    for epoch in range(number):
        source.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


@pytest.mark.parametrize(('unlabelled', 'own'), [(None, 2), (1, 3), (3, 1)])
def test_every_batch_has_its_share_of_both(unlabelled, own):
    for batches in epochs(sampler(10, 7), 3, 4, unlabelled):
        assert len(batches) == 3  # of ten images in fours
        for batch in batches:
            assert [one < 10 for one in batch] == [True] * own + [False] * (
                4 - own
            )


def test_every_image_is_shown_before_any_is_shown_twice():
    """Ten labelled ones by two a batch: five batches of three an epoch."""
    shown = [
        one
        for batches in epochs(sampler(10, 7), 10, 4)
        for batch in batches
        for one in batch
    ]
    own = [one for one in shown if one < 10]
    others = [one for one in shown if one >= 10]
    assert len(own) == len(others) == 60
    for start in range(0, 60, 10):
        assert sorted(own[start : start + 10]) == list(range(10))
    for start in range(0, 56, 7):
        assert sorted(others[start : start + 7]) == list(range(10, 17))
    assert own[:10] != own[10:20]  # shuffled anew


def test_an_order_is_that_of_its_seed():
    one, same, other = (
        epochs(sampler(10, 7, seed=seed), 2, 4) for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_processes_share_one_order():
    """Two processes show together what one with twice the batch shows."""
    one = epochs(sampler(12, 20), 2, 4)
    both = [
        epochs(sampler(12, 20, rank=rank, world=2), 2, 2) for rank in (0, 1)
    ]
    for alone, left, right in zip(one, *both):
        assert len(alone) == len(left) == len(right) == 3
        for batch, *halves in zip(alone, left, right):
            assert sorted(batch) == sorted(halves[0] + halves[1])


def test_a_sampler_without_an_end_goes_on():
    source = sampler(5, 3, kind=InfiniteSampler)
    batches = iter(PartlyLabelledBatchSampler(source, 2))
    shown = [next(batches) for _ in range(30)]
    assert Counter(own for own, _ in shown) == dict.fromkeys(range(5), 6)
    assert set(Counter(one for _, one in shown).values()) == {10}


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match='0 unlabelled of 1'):
        PartlyLabelledBatchSampler(sampler(4, 4), 1)
    with pytest.raises(ValueError, match='4 unlabelled of 4'):
        PartlyLabelledBatchSampler(sampler(4, 4), 4, 4)
    with pytest.raises(ValueError, match='two parts'):
        PartlyLabelledBatchSampler(sampler(4), 2)
    chooses = ClassAwareSampler.__new__(ClassAwareSampler)
    chooses.dataset = Parts(4, 4)
    with pytest.raises(ValueError, match='has a ClassAwareSampler'):
        PartlyLabelledBatchSampler(chooses, 2)

"""One checkpoint, two configs, equal detections, and no teacher's file."""

import pickle

import mmcv
import pytest
import runs
import tiny
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

quick_starts = runs.quick_starts

SCALE = dict(type='Resize', scale=(96, 96), keep_ratio=True)
KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inference')
    runs.write_coco(folder, images=3)
    return folder


def distilled():
    """With a teacher whose file is nowhere, and weights of the term's own."""
    return tiny.distilled(
        tiny.retinanet(),
        teachers=dict(
            big=dict(
                config=dict(model=tiny.retinanet(base=16)),
                checkpoint='no/such/teacher.pth',
            )
        ),
        terms=dict(
            mimic=dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                levels=(0, 1),
                align=dict(
                    type='mmkd.ConvAdapt', in_channels=16, out_channels=16
                ),
                loss=dict(type='mmkd.MimicLoss'),
            )
        ),
    )


@pytest.fixture(scope='module')
def checkpoint(folder):
    """As training leaves it: the terms' weights beside the student's."""
    file = tiny.save_teacher(
        distilled(),
        folder / 'epoch_12.pth',
        meta=dict(dataset_meta=dict(classes=runs.NAMES)),
    )
    state = torch.load(file)['state_dict']
    assert any(key.startswith('terms.') for key in state)
    assert not any('big' in key for key in state)
    return str(file)


@pytest.fixture(scope='module')
def configs(folder):
    """Config files of the student, distilled and plain."""
    files = {}
    for name, model in (('mmkd', distilled()), ('mmdet', tiny.retinanet())):
        config = runs.config(folder, folder / 'work', model=model)
        config.merge_from_dict(runs.evaluation(folder, 'test'))
        config.test_dataloader.dataset.pipeline = [
            dict(type='LoadImageFromFile'),
            SCALE,
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs', meta_keys=KEYS),
        ]
        config.visualizer = dict(
            type='DetLocalVisualizer',
            vis_backends=[],
            name=f'visualizer_{name}',
        )
        files[name] = str(folder / f'{name}.py')
        config.dump(files[name])
    return files


def pictures(folder):
    return [str(one) for one in sorted((folder / 'images').iterdir())]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert len(one['scores']) > 0
    for key in one:
        assert torch.equal(
            torch.as_tensor(one[key]), torch.as_tensor(other[key])
        )


def test_init_detector(configs, checkpoint, folder):
    found = {}
    for name, config in configs.items():
        detector = init_detector(config, checkpoint, device='cpu')
        assert detector.dataset_meta['classes'] == runs.NAMES
        found[name] = [
            sample.pred_instances
            for sample in inference_detector(detector, pictures(folder))
        ]
    for one, other in zip(found['mmkd'], found['mmdet'], strict=True):
        assert_equal(dict(one.items()), dict(other.items()))


def test_a_picture_in_memory(configs, checkpoint, folder):
    image = mmcv.imread(pictures(folder)[0])
    one, other = (
        inference_detector(
            init_detector(config, checkpoint, device='cpu'), image
        ).pred_instances
        for config in configs.values()
    )
    assert_equal(dict(one.items()), dict(other.items()))


def test_det_inferencer(configs, checkpoint, folder):
    one, other = (
        DetInferencer(config, checkpoint, device='cpu', show_progress=False)(
            pictures(folder), no_save_vis=True
        )['predictions']
        for config in configs.values()
    )
    assert len(one) == 3
    for a, b in zip(one, other, strict=True):
        assert_equal(a, b)


def evaluate(config, checkpoint, dump, augmented=False):
    """Metrics and predictions of a test run."""
    config = Config.fromfile(config)
    config.load_from = checkpoint
    config.experiment_name = dump.stem
    config.test_evaluator = [
        config.test_evaluator,
        dict(type='DumpDetResults', out_file_path=str(dump)),
    ]
    if augmented:
        _augment(config)
    metrics = Runner.from_cfg(config).test()
    return metrics, pickle.loads(dump.read_bytes())


def _augment(config):
    """As mmdet's ``tools/test.py --tta`` changes a config."""
    config.model = ConfigDict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=20),
        module=config.model,
    )
    load, *_, pack = config.test_dataloader.dataset.pipeline
    pack.meta_keys = (*KEYS, 'flip', 'flip_direction')
    config.test_dataloader.dataset.pipeline = [
        load,
        dict(
            type='TestTimeAug',
            transforms=[
                [SCALE],
                [
                    dict(type='RandomFlip', prob=1.0),
                    dict(type='RandomFlip', prob=0.0),
                ],
                [dict(type='LoadAnnotations', with_bbox=True)],
                [pack],
            ],
        ),
    ]


@pytest.fixture(scope='module')
def evaluated(configs, checkpoint, folder):
    """Metrics and predictions by config, with augmentation or without."""
    return {
        (name, augmented): evaluate(
            config, checkpoint, folder / f'{name}{augmented}.pkl', augmented
        )
        for name, config in configs.items()
        for augmented in (False, True)
    }


@pytest.mark.parametrize('augmented', [False, True])
def test_runner(evaluated, augmented):
    metrics, found = evaluated['mmkd', augmented]
    expected, plain = evaluated['mmdet', augmented]
    assert 'coco/bbox_mAP' in metrics
    assert metrics == expected
    assert len(found) == 3
    for one, other in zip(found, plain, strict=True):
        assert one['img_id'] == other['img_id']
        assert_equal(one['pred_instances'], other['pred_instances'])


def test_augmentation_does_change_the_detections(evaluated):
    one, other = (
        evaluated['mmkd', augmented][1][0]['pred_instances']['scores']
        for augmented in (False, True)
    )
    assert one.shape != other.shape or not torch.equal(one, other)

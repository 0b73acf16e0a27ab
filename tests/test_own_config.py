"""A config for other data trains, and says nothing of the old data."""

import json
import re
import shutil
from pathlib import Path

import pytest
import runs
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmkd.classes import OTHERS, SETTINGS, with_classes
from mmkd.cli import main as mmkd
from mmkd.configs import read_config
from mmkd.datasets.splits import Split, classes_with_boxes, find_splits
from mmkd.own_config import config_for, main
from mmkd.registry import MODELS

#: One of each way in which mmdet's configs say how many classes there are.
CONFIGS = (
    'retinanet/retinanet_r18_fpn_1x_coco.py',
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',  # a list of heads
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',  # two kinds of heads
    'htc/htc-without-semantic_r50_fpn_1x_coco.py',
    'gfl/gfl_r50_fpn_1x_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'yolox/yolox_tiny_8xb8-300e_coco.py',  # data in a wrapper
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',  # in another one
    'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'centernet/centernet_r18_8xb16-crop512-140e_coco.py',
)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture
def data(tmp_path):
    """Train and validation split beside each other, pictures together."""
    folder = tmp_path / 'cells'
    train = runs.write_coco(folder, images=8)
    content = json.loads(train.read_text())
    content['categories'].insert(0, dict(id=0, name='everything'))
    for one in content['annotations']:
        x, y, width, height = one['bbox']
        one['segmentation'] = [
            [x, y, x + width, y, x + width, y + height, x, y + height]
        ]
    train.write_text(json.dumps(content))
    shutil.copy(train, folder / 'val.json')
    return folder


def counts(value):
    """What a model says of the number of classes of the data."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key == 'num_classes':
                yield one
            elif key not in OTHERS | SETTINGS:
                yield from counts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from counts(one)


def plain(value):
    """Without the package that MMEngine notes at what is inherited."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(one) for one in value)
    return value


def inner(loader):
    dataset = loader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


@pytest.mark.parametrize('name', CONFIGS)
def test_what_a_config_says_of_its_data_is_changed_and_no_more(
    name, data, tmp_path
):
    source = f'mmdet::{name}'
    out = tmp_path / 'mine.py'
    assert main([source, str(data), '--out', str(out)]) == 0
    old, new = read_config(source), read_config(out)

    assert set(counts(new.model.to_dict())) == {3}
    assert plain(new.model.to_dict()) == plain(
        with_classes(old.model, 3).to_dict()
    )
    for split in ('train', 'val', 'test'):
        dataset = inner(new[f'{split}_dataloader'])
        assert dataset.data_root == f'{data}/'
        assert dataset.metainfo.classes == runs.NAMES
        assert dataset.ann_file == ('val.json', 'train.json')[split == 'train']
        assert dataset.data_prefix.img == 'images/'
        assert plain(dataset.pipeline) == plain(
            inner(old[f'{split}_dataloader']).pipeline
        )
    for split in ('val', 'test'):
        evaluator = plain(dict(new[f'{split}_evaluator']))
        assert evaluator.pop('ann_file') == f'{data}/val.json'
        before = dict(old[f'{split}_evaluator'])
        before.pop('ann_file')
        assert evaluator == before
    assert new.auto_scale_lr.enable
    # And nothing else: schedule, hooks and optimiser are the base's.
    touched = {
        'model',
        'auto_scale_lr',
        'data_root',
        'metainfo',
        *(f'{one}_dataloader' for one in ('train', 'val', 'test')),
        *(f'{one}_evaluator' for one in ('val', 'test')),
    }
    for key in set(old) | set(new):
        if key not in touched:
            assert plain(new.get(key)) == plain(old.get(key)), key


def test_what_is_written_is_short(data, tmp_path):
    out = tmp_path / 'mine' / 'mine.py'
    source = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    main([source, str(data), '--out', str(out)])
    text = out.read_text()
    assert text.startswith('"""retinanet_r18_fpn_1x_coco for 3 classes of ')
    assert f'\n_base_ = {source!r}\n' in text
    assert '\nmodel = dict(bbox_head=dict(num_classes=3))\n' in text
    assert len(text.splitlines()) < 50
    assert not list(out.parent.glob('*.part*'))


def coco_like(data: Path, folder: Path, name: str, **model) -> Path:
    """A detector's config for other classes and other data."""
    cfg = runs.config(
        data,
        folder / 'unused',
        iters=2,
        model=tiny.retinanet(**model),
        auto_scale_lr=dict(enable=False, base_batch_size=8),
    )
    cfg.update(runs.evaluation(data, 'val'), **runs.evaluation(data, 'test'))
    cfg.val_evaluator = [cfg.val_evaluator]
    cfg.train_cfg.val_interval = 2
    cfg.pop('work_dir')
    cfg.model.bbox_head.num_classes = 80
    for one in ('train', 'val', 'test'):
        dataset = cfg[f'{one}_dataloader'].dataset
        dataset.update(data_root='nowhere/', ann_file='no.json')
        dataset.pop('metainfo')  # COCO's own names
    path = folder / f'{name}_coco.py'
    cfg.dump(path)
    return path


def test_a_detector_of_coco_teaches_another_on_own_data(
    data, tmp_path, capsys, monkeypatch
):
    """The README's way: two files are written, trained, and one teaches."""
    monkeypatch.chdir(tmp_path)
    for name, base in (('student', 8), ('teacher', 16)):
        source = coco_like(data, tmp_path, name, base=base)
        assert main([str(source), 'cells', '--out', f'mine/{name}.py']) == 0
    said = capsys.readouterr().out
    assert 'mine/student.py: 3 classes\ntrain: 8 images, ' in said
    assert said.endswith(
        'Train it with:\n  python tools/train.py mine/teacher.py\n'
    )
    assert (
        "_base_ = '../student_coco.py'" in Path('mine/student.py').read_text()
    )

    assert mmkd(['train', 'mine/teacher.py']) == 0
    weights = 'work_dirs/teacher/iter_2.pth'
    assert (
        mmkd(
            [
                *('train', 'mine/student.py', '--teacher', 'mine/teacher.py'),
                *('--teacher-checkpoint', weights, '--work-dir', 'taught'),
            ]
        )
        == 0
    )
    state = torch.load('taught/iter_2.pth', weights_only=False)
    student = MODELS.build(read_config('mine/student.py').model)
    student.load_state_dict(
        {k: v for k, v in state['state_dict'].items() if k[:6] != 'terms.'}
    )
    assert state['meta']['dataset_meta']['classes'] == runs.NAMES
    # Two of eight images that the rate of the config is for.
    rate = state['optimizer']['param_groups'][0]['initial_lr']
    assert rate == pytest.approx(0.01 * 2 / 8)


def test_evaluators_in_a_list_stay_a_list(data, tmp_path):
    source = coco_like(data, tmp_path, 'student')
    main([str(source), str(data), '--out', str(tmp_path / 'out.py')])
    (found,) = read_config(tmp_path / 'out.py').val_evaluator
    assert found.to_dict() == dict(
        type='CocoMetric', metric='bbox', ann_file=f'{data}/val.json'
    )


def test_it_can_start_from_weights(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({}, 'mine.pth')
    source = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    for given, said in (
        (['--pretrained', 'mine.pth'], 'mine.pth'),
        (['--pretrained'], r'https://.*/retinanet_r18_fpn_1x_coco.*\.pth'),
    ):
        out = tmp_path / f'{len(given)}.py'
        assert main([source, str(data), '--out', str(out), *given]) == 0
        assert re.fullmatch(said, read_config(out).load_from)


def test_a_test_split_is_used_where_there_is_one(data, tmp_path):
    shutil.copy(data / 'val.json', data / 'test.json')
    source = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    main([source, str(data), '--out', str(tmp_path / 'a.py')])
    found = read_config(tmp_path / 'a.py')
    assert found.test_dataloader.dataset.ann_file == 'test.json'
    assert found.test_evaluator.ann_file == f'{data}/test.json'
    assert found.val_evaluator.ann_file == f'{data}/val.json'


# What is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        (
            'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
            'CocoPanopticDataset with img, seg folders',
        ),
        ('htc/htc_r50_fpn_1x_coco.py', 'CocoDataset with img, seg folders'),
        ('pascal_voc/retinanet_r50_fpn_1x_voc0712.py', 'of ConcatDataset'),
        ('qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py', 'of QDTrack'),
        ('common/ms_3x_coco.py', 'must be a detector of mmdet'),
        (
            'gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py',
            'MMEngine takes letters, digits and _ - . /',
        ),
    ],
)
def test_a_config_of_something_else_is_refused(
    name, said, data, tmp_path, capsys
):
    out = tmp_path / 'a.py'
    assert main([f'mmdet::{name}', str(data), '--out', str(out)]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_distillation_config_is_refused(data, tmp_path, capsys):
    out = tmp_path / 'a.py'
    source = 'configs/pkd/tiny/pkd_tiny.py'
    assert main([source, str(data), '--out', str(out)]) == 1
    assert 'has teachers of its own. Name the plain' in capsys.readouterr().err


def test_masks_are_asked_for_where_they_are_learnt(data, tmp_path, capsys):
    train = data / 'train.json'
    content = json.loads(train.read_text())
    del content['annotations'][-1]['segmentation']
    train.write_text(json.dumps(content))
    source = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    out = str(tmp_path / 'a.py')
    assert main([source, str(data), '--out', out]) == 1
    assert (
        "learns masks, and 'train.json' has boxes" in capsys.readouterr().err
    )
    assert (
        main([source.replace('mask', 'faster'), str(data), '--out', out]) == 0
    )


def test_what_is_there_is_not_replaced(data, tmp_path, capsys):
    out = tmp_path / 'a.py'
    out.write_text('mine')
    source = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    assert main([source, str(data), '--out', str(out)]) == 1
    assert 'would replace' in capsys.readouterr().err
    assert out.read_text() == 'mine'


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['--train', 'trian.json'], "no file 'trian.json' in .*'train.json'"),
        (['--pretrained', 'no.pth'], "expected a checkpoint at 'no.pth'"),
    ],
)
def test_a_file_that_is_not_there_is_named(
    words, said, data, tmp_path, capsys
):
    source = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    out = tmp_path / 'a.py'
    assert main([source, str(data), '--out', str(out), *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith('write_config.py')
    assert re.search(said, error)
    assert not out.exists()


def test_weights_that_nobody_published_are_asked_for(data, tmp_path, capsys):
    source = coco_like(data, tmp_path, 'student')
    words = [str(source), str(data), '--pretrained', '--out', 'a.py']
    assert main(words) == 1
    assert 'Name a file: --pretrained FILE.pth' in capsys.readouterr().err
    assert main(['no.py', *words[1:]]) == 1
    assert "has no config file 'no.py'" in capsys.readouterr().err


def test_no_file_is_left_of_data_that_cannot_be_used(data, tmp_path, capsys):
    """A class that the validation split numbers otherwise."""
    val = data / 'val.json'
    content = json.loads(val.read_text())
    content['categories'].reverse()
    val.write_text(json.dumps(content))
    out = tmp_path / 'a.py'
    source = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    assert main([source, str(data), '--out', str(out)]) == 1
    assert 'names would be mixed up' in capsys.readouterr().err
    assert not out.exists()


def test_the_text_is_a_config_for_any_number_of_classes(data, tmp_path):
    splits = find_splits(data, 'me')
    one = Split('train.json', 'images', splits['train'].content)
    text = config_for(
        'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
        data,
        tmp_path / 'a.py',
        dict(train=one, val=one),
        ("ram's horn",),
    )
    (tmp_path / 'a.py').write_text(text)
    found = Config.fromfile(tmp_path / 'a.py')
    assert found.metainfo.classes == ("ram's horn",)
    assert found.model.bbox_head.num_classes == 1
    assert classes_with_boxes(one, 'me') == runs.NAMES

"""Files of strangers, tried on every reader: refused, and none of it runs."""

import ast
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import cv2
import hostile
import lmdb
import mmengine
import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import PIL.Image
import pytest
import runs
import torch
import yaml
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from PIL import EpsImagePlugin

from mmkd.analysis.average_precision import ImageMatches
from mmkd.analysis.pictures import read_image
from mmkd.backbones.efficientnet_lite import read_imagenet
from mmkd.compat.checkpoint import (
    load_from_url,
    read_checkpoint,
    state_dict_of,
)
from mmkd.configs import read_config
from mmkd.datasets.attribution import INDEX, LoadIGMap, map_file
from mmkd.datasets.check import check_dataset, is_whole
from mmkd.datasets.coco import CARD, CocoWriter
from mmkd.datasets.hypotheses import HypothesisDataset
from mmkd.datasets.own import prepare_own
from mmkd.datasets.sources import gather
from mmkd.datasets.tracking import LoadPredictions
from mmkd.datasets.yolo import read_layout
from mmkd.detectors.peer_ensemble import export_peer
from mmkd.engine.trainer import latest_checkpoint, prepare_resume
from mmkd.laboratory.compare import main as compare
from mmkd.laboratory.page import publish
from mmkd.laboratory.run_memory import RunMemory
from mmkd.laboratory.shuffled import save_shuffled
from mmkd.reading import MOST_JSON, decodes
from mmkd.store import ABOUT, PREDICTIONS, Store, packed

ROOT = Path(__file__).parents[1]

data = runs.data


@pytest.fixture
def mark(tmp_path):
    """What a file leaves that is opened carelessly."""
    return tmp_path / 'mark'


@pytest.fixture
def refused(mark):
    """That a reader refuses a file, in words, and that nothing ran."""

    def check(read, *arguments, match=''):
        with pytest.raises(ValueError, match=match) as caught:
            read(*arguments)
        assert not mark.exists()
        # A message for people, and not what a library happened to say.
        assert len(str(caught.value)) > 40
        assert type(caught.value) is not UnicodeDecodeError

    return check


# Checkpoints -----------------------------------------------------------------


def _by_address(path):
    return load_from_url(path.as_uri(), str(path.parent / 'fetched'))


def _to_go_on(path):
    (path.parent / 'last_checkpoint').write_text(str(path))
    found = latest_checkpoint(path.parent)
    return prepare_resume(Config(dict(load_from=found, work_dir='.')))


CHECKPOINTS = {
    'read_checkpoint': read_checkpoint,
    'by an address': _by_address,
    'MMEngine, for --resume, load_from and Pretrained': lambda path: (
        mmengine_checkpoint._load_checkpoint(str(path))
    ),
    '--resume': _to_go_on,
    'export_peer.py': lambda path: export_peer(path, path.with_name('out')),
    'the shuffled teacher': lambda path: save_shuffled(
        Config(), path, [], path.with_name('out')
    ),
    'EfficientNetLite': read_imagenet,
}


@pytest.mark.parametrize('wrapping', hostile.WRAPPINGS)
@pytest.mark.parametrize('attack', hostile.PICKLES)
def test_these_pickles_would_work(attack, wrapping, mark, tmp_path):
    """Else the tests below would prove nothing."""
    path = tmp_path / 'a.pth'
    hostile.WRAPPINGS[wrapping](hostile.PICKLES[attack](mark), path)
    if wrapping == 'bare':
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize('attack', {**hostile.PICKLES, **hostile.REACHING})
@pytest.mark.parametrize(
    ('reader', 'wrapping'),
    [
        *((reader, 'zipped') for reader in CHECKPOINTS),
        ('read_checkpoint', 'of old torch'),
        ('read_checkpoint', 'bare'),
    ],
)
def test_a_pickle_that_runs_code_is_refused(
    reader, attack, wrapping, mark, tmp_path, refused
):
    path = tmp_path / 'trojan.pth'
    make = {**hostile.PICKLES, **hostile.REACHING}[attack]
    hostile.WRAPPINGS[wrapping](make(mark), path)
    match = r'refuses .* nothing of it was run.*--trust-checkpoint .*trojan'
    if reader == 'EfficientNetLite':
        match = 'cannot read the weights'
    refused(CHECKPOINTS[reader], path, match=match)


def test_a_pickle_that_torch_never_wrote_is_not_begun(mark, tmp_path, refused):
    path = tmp_path / 'model.pkl'
    path.write_bytes(pickle.dumps(hostile.system(mark), 4))
    refused(read_checkpoint, path, match='damaged file')


@pytest.mark.parametrize('kind', ['packed', 'overlapping'])
@pytest.mark.parametrize('reader', ['read_checkpoint', 'by an address'])
def test_a_checkpoint_must_not_become_more_than_it_is(
    reader, kind, tmp_path, refused
):
    path = tmp_path / 'bomb.pth'
    if kind == 'packed':
        hostile.zip_bomb(path, 'archive/data.pkl', 10**7)
    else:
        hostile.overlapping(path)
    assert path.stat().st_size < 2 * 10**5
    refused(CHECKPOINTS[reader], path, match=r'would become \d+.*never writes')


def test_an_array_that_claims_all_memory_is_refused(tmp_path, refused):
    vast = hostile.Calls(
        np.empty(0).__reduce__()[0], np.ndarray, (2**60,), b'b'
    )
    torch.save(dict(state_dict=dict(w=torch.ones(1)), x=vast), tmp_path / 'a')
    refused(read_checkpoint, tmp_path / 'a', match='damaged file')


@pytest.mark.parametrize('lie', hostile.LYING)
def test_safetensors_that_lie_are_refused(lie, tmp_path, refused):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(hostile.LYING[lie])
    refused(read_checkpoint, path, match=r'damaged file of .* again')


def test_an_archive_of_the_oldest_torch_is_not_unpacked(tmp_path, refused):
    import tarfile

    path = tmp_path / 'a.pth'
    with tarfile.open(path, 'w') as archive:
        link = tarfile.TarInfo('storages')
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    refused(read_checkpoint, path, match='torch did not write')


@pytest.mark.parametrize('address', [True, False])
def test_the_program_in_a_checkpoint_is_left_out(
    address, mark, tmp_path, monkeypatch
):
    """MMEngine runs the text under ``meta.config`` when it resumes."""
    text = f'open({str(mark)!r}, "w")'
    Config.fromstring(text, '.py')
    assert mark.exists(), 'this would have worked'
    path = str(tmp_path / 'a.pth')
    torch.save(dict(meta=dict(config=text, epoch=1), state_dict={}), path)
    read = mmengine_checkpoint._load_checkpoint
    if address:
        monkeypatch.setattr(
            mmengine_checkpoint,
            'load_url',
            lambda url, **settings: torch.load(path, weights_only=True),
        )
    found = read('https://example.org/a.pth' if address else path)
    assert found['meta'] == dict(epoch=1)


def test_every_way_by_which_mmengine_reads_leaves_it_out():
    loaders = mmengine_checkpoint.CheckpointLoader._schemes
    assert {'', 'https://', 'pavi://'} <= set(loaders)
    bare = [
        prefix
        for prefix, loader in loaders.items()
        if not hasattr(loader, '__wrapped__')
    ]
    assert bare == []


# JSON ------------------------------------------------------------------------


def _annotations(path):
    folder = path.parent / 'data'
    runs.write_coco(folder, images=2)
    config = dict(runs.dataset(folder), ann_file=str(path))
    return check_dataset(config, 'train_dataloader.dataset')


def _hypotheses(path):
    folder = path.parent / 'data'
    runs.write_coco(folder, images=2)
    mmengine.registry.init_default_scope('mmdet')
    return HypothesisDataset(runs.dataset(folder, serialize_data=False), path)


def _index(path):
    path.rename(path.with_name(INDEX))
    return LoadIGMap(path.parent)


def _detections(path):
    truth = runs.write_coco(path.parent / 'data', images=2)
    return ImageMatches.from_files(truth, path)


def _card(path):
    folder = path.parent / 'set'
    folder.mkdir()
    path.rename(folder / CARD)
    try:
        return CocoWriter(folder, {}, ['a'])
    except FileExistsError as error:  # as for any folder of someone else
        raise ValueError(error) from error


READERS = {
    'annotations': _annotations,
    'hypotheses': _hypotheses,
    'index of attribution maps': _index,
    'memory of runs': RunMemory,
    'detections': _detections,
    'published results': lambda path: publish(path, 'x'),
    'card': _card,
    'config': lambda path: read_config(path, 'mmkd'),
}


@pytest.mark.parametrize('content', hostile.JSON)
@pytest.mark.parametrize('reader', READERS)
def test_json_that_is_none_or_too_deep_is_refused(
    reader, content, tmp_path, refused
):
    path = tmp_path / 'a.json'
    path.write_bytes(hostile.JSON[content])
    refused(READERS[reader], path, match='got|no memory|something else')


def test_json_of_absurd_size_is_not_begun(tmp_path, refused):
    path = tmp_path / 'a.json'
    with path.open('wb') as file:
        file.truncate(MOST_JSON + 1)  # takes no room on the disk
    refused(RunMemory, path, match='are not read')


def test_a_tool_says_it_without_a_traceback(tmp_path, capsys):
    path = tmp_path / 'a.json'
    path.write_bytes(b'[' * hostile.DEEP)
    assert compare(['--diff', str(path), str(path)]) == 1
    assert 'nested too deep' in capsys.readouterr().err


@pytest.mark.parametrize(
    'change',
    [
        lambda one: one['info'].update(num_hypotheses=10**12),
        lambda one: one['info'].update(num_hypotheses='9'),
        lambda one: one['annotations'][0].update(hyp_id='x'),
        lambda one: one['annotations'][0].update(image_id=[]),
        lambda one: one['annotations'][0].update(bbox=['a', 'b', 'c', 'd']),
        lambda one: one['annotations'][0].update(bbox={}),
        lambda one: one.update(annotations=7),
        lambda one: one.update(categories=None),
        lambda one: one.pop('info'),
    ],
)
def test_hypotheses_of_another_form_are_refused(change, tmp_path, refused):
    folder = tmp_path / 'data'
    truth = json.loads(runs.write_coco(folder, images=2).read_text())
    cache = dict(
        truth,
        info=dict(complete=True, num_hypotheses=1),
        annotations=[dict(one, hyp_id=0) for one in truth['annotations']],
    )
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(cache))
    assert len(_hypotheses(path)) == 2, 'as it should be'
    change(cache)
    path.write_text(json.dumps(cache))
    refused(_hypotheses, path, match='HypothesisDataset')


def test_a_memory_sets_numbers_and_nothing_else(tmp_path, refused):
    lr = dict(type='os.system', command='x')
    run = dict(features=dict(a=1), configuration=dict(lr=lr), result=1.0)
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(dict(runs=[run])))
    refused(RunMemory, path, match='is no number')


# YAML and configs ------------------------------------------------------------


def test_this_yaml_would_work(mark):
    text = hostile.YAML['apply'].format(mark=mark)
    yaml.load(text, yaml.UnsafeLoader)
    assert mark.exists()


def test_mmengine_alone_would_run_it(mark, tmp_path):
    path = tmp_path / 'a.yaml'
    path.write_text(hostile.YAML['apply'].format(mark=mark))
    Config.fromfile(path)
    assert mark.exists()


@pytest.mark.parametrize('content', hostile.YAML)
@pytest.mark.parametrize(
    'read', [read_layout, read_config], ids=['data.yaml', 'config']
)
def test_yaml_that_is_more_than_text_is_refused(
    read, content, mark, tmp_path, refused
):
    path = tmp_path / 'data.yaml'
    path.write_text(hostile.YAML[content].replace('{mark}', str(mark)))
    refused(read, path, match=r'YAML|names|config|repeats')


def test_yaml_of_absurd_size_is_not_begun(tmp_path, refused):
    path = tmp_path / 'data.yaml'
    path.write_text('#' * 2**20 + '\n')
    refused(read_layout, path, match='no more than')


@pytest.mark.parametrize(
    'content',
    [
        dict(custom_imports=dict(imports=['evil'])),
        dict(prepare=['evil.py a b --out c']),
        dict(model=dict(type='os.system', command='touch {mark}')),
        dict(model=dict(type='evil')),
        dict(model=[dict(a=dict(type='evil.run'))]),
        dict(model=dict(type='mmengine.load', file='evil.pkl')),
        dict(model=dict(type='mmdet.models.Evil')),
        dict(model=dict(type='RetinaNet', _scope_='evil')),
        dict(default_scope='evil'),
        dict(optim_wrapper=dict(constructor='evil.run')),
        dict(runner_type='evil.Runner'),
        dict(_base_='evil.py'),
        dict(_base_=['plain.json', './evil.py']),
        dict(_base_='evil::a.py'),
        dict(_base_='mmdet::../../evil.py'),
        dict(_base_='inherits.json'),
        dict(_base_='https://evil/a.json'),
    ],
    ids=lambda content: json.dumps(content)[:40],
)
@pytest.mark.parametrize('suffix', ['.json', '.yaml'])
def test_a_config_of_data_names_no_code(
    content, suffix, mark, tmp_path, monkeypatch, refused
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'evil.py').write_text(f'open({str(mark)!r}, "w")')
    (tmp_path / 'plain.json').write_text('{"lr": 1}')
    (tmp_path / 'inherits.json').write_text('{"_base_": "evil.py"}')
    path = tmp_path / f'config{suffix}'
    path.write_text(json.dumps(content).replace('{mark}', str(mark)))
    refused(read_config, path, match=r'refuses .* read it first')


def test_what_a_config_of_data_would_have_run(mark, tmp_path, monkeypatch):
    """MMEngine imports and calls what it finds in no registry."""
    from mmdet.registry import MODELS

    MODELS.build(dict(type='os.mkdir', path=str(mark)))
    assert mark.exists()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'evil_two.py').write_text(f'open({str(mark)!r} + "2", "w")')
    with pytest.raises(TypeError):
        MODELS.build(dict(type='evil_two'))
    assert mark.with_name('mark2').exists()


@pytest.mark.parametrize('suffix', ['.json', '.yaml'])
def test_a_config_of_data_works(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv('SECRET', 'known')
    base = dict(
        _base_='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        model=dict(bbox_head=dict(num_classes=3)),
    )
    (tmp_path / 'base.json').write_text(json.dumps(base))
    own = dict(
        _base_='base.json',
        model=dict(type='mmkd.Distiller', neck=dict(type='PAFPN')),
        note='{{$SECRET:nothing}}',
    )
    path = tmp_path / f'own{suffix}'
    path.write_text(json.dumps(own))
    config = read_config(path)
    assert config.model.bbox_head.num_classes == 3
    assert config.model.backbone.depth == 50
    assert config.model.neck.type == 'PAFPN'
    assert 'known' not in config.note


def test_configs_of_data_that_inherit_from_each_other_end(tmp_path, refused):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'a.json').write_text('{"_base_": "x/../b.json"}')
    (tmp_path / 'b.json').write_text('{"_base_": "x/../a.json"}')
    refused(read_config, tmp_path / 'a.json', match='each once')


# Caches ----------------------------------------------------------------------

SAID = dict(
    format=1,
    precision='fp32',
    taps=[PREDICTIONS],
    complete=True,
    classes=['a'],
)


def _cache(folder, about=SAID, entry=None):
    """A cache as someone else would write it."""
    key = next(_keys(b'7'))
    with lmdb.open(str(folder)) as file, file.begin(write=True) as part:
        given = about if isinstance(about, bytes) else json.dumps(about)
        part.put(ABOUT, given if isinstance(given, bytes) else given.encode())
        part.put(b'foreign', pickle.dumps(hostile.system(folder)))
        if entry is not None:
            part.put(key, entry)
    return folder


def _keys(image):
    from mmkd.store import _key

    yield _key(image, PREDICTIONS)


@pytest.mark.parametrize(
    'about',
    [
        b'\x80\x04N.',
        b'[1, 2]',
        b'{}',
        b'"text"',
        b'[' * hostile.DEEP,
        b'\xff\xfe',
        dict(SAID, format=2),
        dict(SAID, taps='x'),
        dict(SAID, classes=[dict(type='x')]),
    ],
)
def test_a_cache_that_says_nothing_of_use_is_refused(
    about, tmp_path, mark, refused
):
    folder = _cache(tmp_path / 'cache', about)
    refused(LoadPredictions, folder, match='--overwrite')


@pytest.mark.parametrize(
    'entry',
    [
        pickle.dumps(hostile.system(Path('/tmp'))),
        b'',
        struct.pack('<Q', 2**62),
        *hostile.LYING.values(),
        packed([torch.ones(2)], 'fp32'),
        packed(dict(points=torch.ones(2, 2)), 'fp32'),
        packed('text', 'fp32'),
        *(
            hostile.safetensors(
                json.dumps(dict(__metadata__=dict(form=form))).encode()
            )
            for form in (
                '[' * hostile.DEEP,
                '{"list":[' * 5000 + ']}' * 5000,
                '{"tensor":"absent"}',
                '{"tensor":"0","kind":"torch.load"}',
                '7',
                '{}',
            )
        ),
    ],
    ids=range(19),
)
def test_a_foreign_record_in_a_cache_is_refused(
    entry, tmp_path, mark, refused
):
    folder = _cache(tmp_path / 'cache', entry=entry)
    load = LoadPredictions(folder)
    part = type('Part', (), dict(image=7, matrix=np.eye(3)))
    refused(load._of, part, (8, 8), match=r'Make it anew.*--overwrite')


def test_a_cache_whose_end_is_gone_ends_no_process(tmp_path, refused):
    folder = _cache(tmp_path / 'cache', entry=bytes(10**6))
    file = folder / 'data.mdb'
    os.truncate(file, file.stat().st_size // 8 * 4096 // 4096)
    store = Store(folder, 'Teacher')
    refused(store.check, {}, [], match='the end is gone')


@pytest.mark.parametrize(
    'command',
    [
        'rm -rf ~',
        'python tools/cache_predictions.py a b; rm -rf ~',
        'python tools/cache_predictions.py $(rm -rf ~)',
        'python tools/cache_predictions.py `rm -rf ~`',
        'python tools/cache_predictions.py a\nrm -rf ~',
        'python tools/cache_predictions.py "',
        'python tools/cache_predictions.pyc a',
        'python tools/cache_predictions.py \x1b[2J',
        "python tools/cache_predictions.py '\x1b[2J rm -rf'",
        ['rm', '-rf', '~'],
    ],
)
def test_a_cache_tells_nobody_what_to_type(command, tmp_path):
    folder = _cache(tmp_path, dict(SAID, complete=False, command=command))
    with pytest.raises(ValueError, match='is not finished') as caught:
        LoadPredictions(folder)
    assert 'rm -rf' not in str(caught.value)
    assert str(caught.value).endswith('CONFIG CHECKPOINT')


def test_proposals_are_pickles_and_refused(data, refused):
    for name in ('a.pkl', 'a.pickle', 'a.yaml'):
        config = dict(runs.dataset(data), proposal_file=name)
        refused(
            check_dataset, config, 'train', match=f'{name}.*--no-data-check'
        )


# Pictures --------------------------------------------------------------------


def _one_picture(path):
    folder = path.parent / 'data'
    runs.write_coco(folder, images=2)
    path.rename(folder / 'images' / '000.png')
    return check_dataset(runs.dataset(folder), 'train_dataloader.dataset')


def _map(path):
    folder = path.parent
    (folder / INDEX).write_text('{"complete": true}')
    path.rename(map_file(folder, 7))
    results = dict(img_id=7, img_shape=(8, 8))
    return LoadIGMap(folder).transform(results)


def _own(path):
    folder = path.parent / 'mine'
    for name in ('Annotations', 'JPEGImages'):
        (folder / name).mkdir(parents=True)
    path.rename(folder / 'JPEGImages' / 'a.png')
    (folder / 'Annotations' / 'a.xml').write_text(
        '<annotation><object><name>a</name><bndbox><xmin>1</xmin><ymin>1'
        '</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>'
    )
    return prepare_own(folder, path.parent / 'out', 'voc', val=0, test=0)


PICTURES = {
    'data check': _one_picture,
    'attribution map': _map,
    "a user's own folder": _own,
    'a picture to show': read_image,
    'is it whole?': is_whole,
}


@pytest.mark.parametrize('reader', PICTURES)
def test_a_picture_that_claims_to_be_vast_is_refused(
    reader, tmp_path, refused
):
    path = tmp_path / 'vast.png'
    hostile.vast_png(path)
    refused(PICTURES[reader], path, match=r'more than \d+ pixels')


def test_opencv_refuses_what_training_would_read(tmp_path):
    path = tmp_path / 'vast.png'
    hostile.vast_png(path)
    with pytest.raises((cv2.error, AssertionError)):
        LoadImageFromFile().transform(dict(img_path=str(path)))


@pytest.mark.parametrize('reader', PICTURES)
def test_a_program_for_ghostscript_is_no_picture(
    reader, tmp_path, monkeypatch
):
    asked = []

    def run(*arguments, **settings):
        asked.append(arguments)
        return PIL.Image.new('RGB', (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', run)
    path = tmp_path / 'a.png'
    hostile.postscript(path)
    with PIL.Image.open(path) as image:
        image.load()
    assert asked, 'Pillow alone would run it'
    asked.clear()
    if reader == 'is it whole?':
        assert not is_whole(path)
        assert not decodes(path)
    else:
        with pytest.raises(ValueError, match=r'damaged|decoded'):
            PICTURES[reader](path)
    assert asked == []


# Places ----------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """A data set, and beside it a picture that is nobody's business."""
    home = tmp_path / 'home'
    runs.write_coco(home / 'set', images=2)
    secret = tmp_path / 'secret.png'
    secret.write_bytes((home / 'set' / 'images' / '000.png').read_bytes())
    (home / 'set' / 'other').mkdir()
    (home / 'set' / 'other' / '000.png').write_bytes(secret.read_bytes())
    (home / 'set' / 'images' / 'link').symlink_to(tmp_path / 'home')
    (home / 'set' / 'images' / 'linked.png').symlink_to(secret)
    return home / 'set'


def _names(house, name, **settings):
    path = house / 'train.json'
    content = json.loads(path.read_text())
    content['images'][0]['file_name'] = name.format(secret=house.parents[1])
    path.write_text(json.dumps(content))
    config = dict(runs.dataset(house), **settings)
    return check_dataset(config, 'train_dataloader.dataset')


@pytest.mark.parametrize(
    'name',
    [
        '../../../secret.png',
        '{secret}/secret.png',
        'link/../secret.png',
        '../../set-secret.png',  # begins as the folder does
        './a/../../../../secret.png',
    ],
)
@pytest.mark.parametrize('root', [True, False])
def test_annotations_name_no_picture_elsewhere(name, root, house, refused):
    settings = {}
    if not root:
        settings = dict(
            data_root='',
            ann_file=str(house / 'train.json'),
            data_prefix=dict(img=str(house / 'images')),
        )
    check = _names
    match = r'leave the folder .*secret\.png.*set data_root'
    refused(lambda: check(house, name, **settings), match=match)


@pytest.mark.parametrize('name', ['../other/000.png', 'linked.png'])
def test_annotations_may_name_a_neighbour_and_follow_links(name, house):
    (report,) = _names(house, name)
    assert report.images == 2


def test_the_way_out_is_a_root_that_holds_all(house):
    (report,) = _names(
        house,
        '../../../secret.png',
        data_root=str(house.parents[1]),
        ann_file='home/set/train.json',
        data_prefix=dict(img='home/set/images/'),
    )
    assert report.images == 2


@pytest.mark.parametrize('how', ['data.yaml', 'list', 'link'])
def test_a_folder_to_convert_takes_nothing_from_elsewhere(
    how, house, tmp_path, mark
):
    folder = tmp_path / 'yolo'
    (folder / 'images').mkdir(parents=True)
    (folder / 'labels').mkdir()
    shown = house / 'other' / '000.png'
    place = dict(train='images')
    if how == 'link':
        (folder / 'images' / '000.png').symlink_to(shown)
        (folder / 'labels' / '000.txt').write_text('0 0.5 0.5 0.5 0.5')
    else:
        shown.with_suffix('.txt').write_text('0 0.5 0.5 0.5 0.5')
    if how == 'data.yaml':
        place = dict(train=str(house / 'other'))
    elif how == 'list':
        (folder / 'list.txt').write_text(str(shown))
        place = dict(train='list.txt')
    (folder / 'data.yaml').write_text(yaml.safe_dump(dict(place, names=['a'])))
    settings = dict(kind='yolo', val=0, test=0, say=lambda line: None)
    with pytest.raises(ValueError, match='outside of that folder.*--outside'):
        prepare_own(folder, tmp_path / 'out', **settings)
    assert not (tmp_path / 'out').exists()
    card = prepare_own(folder, tmp_path / 'out', outside=True, **settings)
    assert card['splits']['train']['images'] == 1


@pytest.mark.parametrize('name', ['../a.png', '/a.png', 'b/../../a.png'])
def test_a_data_set_is_written_into_its_folder_alone(name, tmp_path):
    writer = CocoWriter(tmp_path / 'set', {}, ['a'])
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match='plain file name'):
        writer.add('train', name, image, np.zeros((0, 4)), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('image', ['../../x', '/etc/x', '..', 'a\0b'])
def test_maps_of_any_image_lie_in_their_folder(image, tmp_path):
    assert map_file(tmp_path, image).resolve().parent == tmp_path.resolve()


# Downloads -------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path):
    """An archive that would write elsewhere, with the file that is asked."""
    path = tmp_path / 'in' / 'a-1-py3-none-any.whl'
    path.parent.mkdir()
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('../../evil.txt', 'x')
        archive.writestr('/evil.txt', 'x')
        link = zipfile.ZipInfo('data/link.txt')
        link.external_attr = 0o120777 << 16
        archive.writestr(link, '/etc/passwd')
        archive.writestr('data/a.txt', 'content')
        archive.writestr('a-1.data/scripts/evil.py', 'x')
    return path


CONTENT = 'ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73'
LINK = '0d5a1a1f4b9ed7d5f9a0fae2a6a6a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5'


def test_of_an_archive_the_recorded_files_are_read_and_none_written(
    wheel, tmp_path
):
    before = sorted(tmp_path.rglob('*'))
    found = gather({'data/a.txt': CONTENT}, wheel, 'a==1', tmp_path / 'b')
    assert found == {'a.txt': b'content'}
    assert sorted(tmp_path.rglob('*')) == before


def test_a_link_in_an_archive_is_not_followed(wheel, tmp_path, refused):
    files = {'data/link.txt': LINK}
    refused(gather, files, wheel, 'a==1', tmp_path, match='expected SHA-256')


@pytest.mark.parametrize('folder', [True, False])
def test_a_file_that_would_become_vast_is_not_read(folder, tmp_path, refused):
    path = tmp_path / 'bomb.whl'
    if folder:
        path.mkdir()
        with (path / 'a.txt').open('wb') as file:
            file.truncate(10**10)
    else:
        hostile.zip_bomb(path, 'a.txt', 10**7)
    sizes = {'a.txt': 7}
    refused(
        gather,
        {'a.txt': CONTENT},
        path,
        'a==1',
        tmp_path,
        sizes,
        match='has 7 at most. It is not read',
    )


# All of them -----------------------------------------------------------------

#: What opens a file in a way that could run it, or unpacks one, and the
#: modules that may: each is tried above, or reads what mmkd itself wrote.
DANGEROUS = {
    'torch.load': {'compat/checkpoint.py', 'backbones/efficientnet_lite.py'},
    'torch.hub.load': set(),
    'torch.jit.load': set(),
    'pickle.load': set(),
    'pickle.loads': set(),
    'np.load': set(),
    'numpy.load': set(),
    'joblib.load': set(),
    'yaml.load': set(),
    'yaml.unsafe_load': set(),
    'yaml.full_load': set(),
    'mmengine.load': set(),
    'mmengine.fileio.load': set(),
    'Config.fromstring': set(),
    'Config.fromfile': {
        'configs.py',
        # What they wrote, or mmdet installed.
        'laboratory/runs.py',
        'laboratory/zoo_pairs.py',
        'laboratory/zoo_trial.py',
    },
    'Image.open': {'reading.py'},
    'json.load': {'reading.py'},
    'eval': set(),
    'exec': set(),
    'tarfile.open': set(),
    'shutil.unpack_archive': set(),
    'archive.extractall': set(),
    'wheel.extractall': set(),
    'urlopen': set(),
    'urllib.request.urlopen': set(),
    'requests.get': set(),
}


def test_nothing_else_opens_files_in_dangerous_ways():
    found = {}
    names = '|'.join(map(re.escape, [*DANGEROUS, 'extractall']))
    hint = re.compile(rf'(?<!\w)({names})\(')
    for path in sorted((ROOT / 'mmkd').rglob('*.py')):
        text = path.read_text()
        if not hint.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in DANGEROUS or name.endswith('.extractall'):
                    place = path.relative_to(ROOT / 'mmkd').as_posix()
                    found.setdefault(name, set()).add(place)
    assert found == {name: one for name, one in DANGEROUS.items() if one}


def test_every_reading_of_weights_is_by_weights_alone():
    for name in DANGEROUS['torch.load']:
        tree = ast.parse((ROOT / 'mmkd' / name).read_text())
        unsafe = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) == 'torch.load'
            and 'weights_only=True' not in ast.unparse(node)
        ]
        # The one behind --trust-checkpoint.
        assert len(unsafe) == (name == 'compat/checkpoint.py')


def test_a_state_dict_is_taken_from_a_plain_file(tmp_path):
    """That what is refused above is refused for what is in it."""
    torch.save(dict(state_dict=dict(w=torch.ones(1))), tmp_path / 'a.pth')
    state = state_dict_of(read_checkpoint(tmp_path / 'a.pth'))
    assert list(state) == ['w']

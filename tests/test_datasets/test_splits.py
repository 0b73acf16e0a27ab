"""Splits are found where people keep them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkd.datasets.splits import classes_with_boxes, find_splits


def write(folder: Path, annotations: str, pictures: str) -> None:
    """One picture and what stands on it."""
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    (folder / annotations).parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    picture.save(folder / pictures / 'a.png')
    content = dict(
        images=[dict(id=0, file_name='a.png')],
        categories=[
            dict(id=0, name='animals'),
            dict(id=7, name='yak'),
            dict(id=3, name='ox'),
        ],
        annotations=[dict(category_id=3), dict(category_id=7)],
    )
    (folder / annotations).write_text(json.dumps(content))


LAYOUTS = {
    'ours': [
        ('train.json', 'train'),
        ('val.json', 'val'),
        ('test.json', 'test'),
    ],
    'coco': [
        ('annotations/instances_train2017.json', 'train2017'),
        ('annotations/instances_val2017.json', 'val2017'),
    ],
    'coco, images together': [
        ('annotations/instances_train.json', 'images'),
        ('annotations/instances_val.json', 'images'),
    ],
    'yolo-like': [
        ('annotations/train.json', 'images/train'),
        ('annotations/val.json', 'images/val'),
    ],
    'beside': [
        ('train/_annotations.coco.json', 'train'),
        ('valid/_annotations.coco.json', 'valid'),
        ('test/_annotations.coco.json', 'test'),
    ],
    'in one folder': [('train.json', ''), ('validation.json', '')],
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_layout_is_found(layout, tmp_path):
    for annotations, pictures in LAYOUTS[layout]:
        write(tmp_path, annotations, pictures)
    found = find_splits(tmp_path, 'me')
    assert list(found) == ['train', 'val', 'test'][: len(LAYOUTS[layout])]
    got = [(one.annotations, one.pictures) for one in found.values()]
    assert got == LAYOUTS[layout]


def test_the_folder_with_the_picture_counts_not_the_first_there_is(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path, f'{split}.json', f'images/{split}')
        (tmp_path / split).mkdir()  # labels of something else
    found = find_splits(tmp_path, 'me')
    assert found['val'].pictures == 'images/val'


def test_another_name_is_told(tmp_path):
    write(tmp_path, 'lists/fold3.json', 'lists')
    write(tmp_path, 'val.json', 'val')
    found = find_splits(tmp_path, 'me', dict(train='lists/fold3.json'))
    assert found['train'].annotations == 'lists/fold3.json'
    assert found['train'].pictures == 'lists'


def test_only_categories_with_boxes_are_classes_in_the_files_order(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path, f'{split}.json', split)
    found = find_splits(tmp_path, 'me')
    assert classes_with_boxes(found['train'], 'me') == ('yak', 'ox')


def test_two_files_are_not_chosen_between(tmp_path):
    for year in (2014, 2017):
        path = f'annotations/instances_train{year}.json'
        write(tmp_path, path, f'train{year}')
    write(tmp_path, 'val.json', 'val')
    with pytest.raises(ValueError, match='me found several .*2014.*2017') as e:
        find_splits(tmp_path, 'me')
    typed = 'annotations/instances_train2014.json'
    assert str(e.value).endswith(f'--train {typed}')
    found = find_splits(tmp_path, 'me', dict(train=typed))
    assert found['train'].pictures == 'train2014'


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="me has no folder '.*no'"):
        find_splits(tmp_path / 'no', 'me')
    write(tmp_path, 'train.json', 'train')
    with pytest.raises(FileNotFoundError, match=r'of val in .*--val FILE'):
        find_splits(tmp_path, 'me')
    write(tmp_path, 'val.json', 'val')
    (tmp_path / 'val' / 'a.png').unlink()
    with pytest.raises(FileNotFoundError, match=r"first picture, 'a\.png'"):
        find_splits(tmp_path, 'me')


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ({}, 'with images; it lists none'),
        (dict(images=[]), 'with images; it lists none'),
        (dict(images=[dict(id=0)]), 'the first has None'),
        (dict(images=['a.png']), 'the first has None'),
        ([], 'expected'),
    ],
)
def test_what_is_no_annotations_is_refused(content, said, tmp_path):
    (tmp_path / 'train.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        find_splits(tmp_path, 'me')


def test_a_split_without_boxes_has_no_classes(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path, f'{split}.json', split)
    content = json.loads((tmp_path / 'train.json').read_text())
    content['annotations'] = []
    (tmp_path / 'train.json').write_text(json.dumps(content))
    train = find_splits(tmp_path, 'me')['train']
    with pytest.raises(ValueError, match='expected boxes of named'):
        classes_with_boxes(train, 'me')

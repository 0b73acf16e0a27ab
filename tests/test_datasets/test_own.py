import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from yaml import safe_dump

from mmkd.datasets.coco import CocoWriter
from mmkd.datasets.own import Sample, draw_splits, prepare_own
from mmkd.datasets.prepare import main
from mmkd.datasets.yolo import label_file, read_yolo

XML = """<annotation><filename>{name}.jpg</filename>
<size><width>{width}</width><height>{height}</height></size>
{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax>
</bndbox></object>"""

#: Three images, wider than high, of other sizes: corners of their boxes.
IMAGES = {
    'a': ((60, 40), [('cat', (3, 2, 13, 32)), ('dog', (20, 10, 60, 40))]),
    'b': ((70, 30), [('dog', (0, 0, 70, 30))]),
    'c': ((90, 50), [('cat', (7, 11, 24, 48)), ('cat', (31, 1, 33, 5))]),
}
NAMES = ('cat', 'dog')


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return noise.astype(np.uint8)


def voc_text(size, boxes, difficult=()):
    objects = ''.join(
        OBJECT.format(*box, name=name, difficult=int(number in difficult))
        for number, (name, box) in enumerate(boxes)
    )
    return XML.format(name='x', width=size[0], height=size[1], objects=objects)


def yolo_line(size, name, box):
    (width, height), (x1, y1, x2, y2) = size, box
    numbers = (
        (x1 + x2) / 2 / width,
        (y1 + y2) / 2 / height,
        (x2 - x1) / width,
        (y2 - y1) / height,
    )
    return f'{NAMES.index(name)} ' + ' '.join(f'{one:.6f}' for one in numbers)


def write_voc(folder, images=IMAGES):
    for name in ('Annotations', 'JPEGImages'):
        (folder / name).mkdir(parents=True)
    for seed, (name, (size, boxes)) in enumerate(images.items()):
        path = folder / 'JPEGImages' / f'{name}.jpg'
        cv2.imwrite(str(path), picture(*size, seed))
        (folder / 'Annotations' / f'{name}.xml').write_text(
            voc_text(size, boxes)
        )
    return folder


def write_yolo(folder, images=IMAGES):
    for name in ('images/train', 'labels/train'):
        (folder / name).mkdir(parents=True)
    for seed, (name, (size, boxes)) in enumerate(images.items()):
        path = folder / 'images' / 'train' / f'{name}.jpg'
        cv2.imwrite(str(path), picture(*size, seed))
        (folder / 'labels' / 'train' / f'{name}.txt').write_text(
            '\n'.join(yolo_line(size, *one) for one in boxes)
        )
    describe(folder)
    return folder


def describe(folder, **changes):
    content = dict(path='.', train='images/train', names=list(NAMES)) | changes
    (folder / 'data.yaml').write_text(safe_dump(content))


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / 'voc')


@pytest.fixture
def yolo(tmp_path):
    return write_yolo(tmp_path / 'yolo')


@pytest.fixture
def convert(tmp_path):
    """Write to ``out``, all of it train unless asked otherwise."""

    def call(source, out='out', **settings):
        said = []
        kind = 'voc' if (source / 'Annotations').is_dir() else 'yolo'
        settings = dict(kind=kind, val=0, test=0, say=said.append) | settings
        return prepare_own(source, tmp_path / out, **settings), said

    return call


def boxes_in(out, split='train'):
    """(class, box as x y width height, ignored) by image name."""
    content = json.loads((out / f'{split}.json').read_text())
    names = {one['id']: one['name'] for one in content['categories']}
    return {
        image['file_name']: [
            (names[one['category_id']], one['bbox'], one['iscrowd'])
            for one in content['annotations']
            if one['image_id'] == image['id']
        ]
        for image in content['images']
    }


def expected(images=IMAGES):
    return {
        f'{name}.jpg': [
            (label, [x1, y1, x2 - x1, y2 - y1], 0)
            for label, (x1, y1, x2, y2) in boxes
        ]
        for name, (_, boxes) in images.items()
    }


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def split_names(out):
    return {
        split: list(boxes_in(out, split))
        for split in ('train', 'val', 'test')
        if (out / f'{split}.json').is_file()
    }


# ---------------------------------------------------------------- both formats


def test_both_formats_give_the_boxes_that_were_annotated(
    voc, yolo, convert, tmp_path
):
    for source in (voc, yolo):
        card, said = convert(source, f'out-{source.name}')
        assert boxes_in(tmp_path / f'out-{source.name}') == expected()
        assert card['classes'] == ['cat', 'dog']
        assert {*card['dropped'].values(), *card['found'].values()} == {0}
        assert not any('warning' in line for line in said)
    one, other = (
        files(tmp_path / out)['train.json'].replace(name, b'')
        for out, name in (('out-voc', b'voc'), ('out-yolo', b'yolo'))
    )
    assert one == other


def test_mmdet_reads_what_was_written_and_images_are_the_users_bytes(
    voc, convert, tmp_path
):
    from mmdet.datasets import CocoDataset

    convert(voc)
    for name in IMAGES:
        copied = tmp_path / 'out' / 'train' / f'{name}.jpg'
        original = voc / 'JPEGImages' / f'{name}.jpg'
        assert copied.read_bytes() == original.read_bytes()
    data = CocoDataset(
        ann_file=str(tmp_path / 'out' / 'train.json'),
        data_prefix=dict(img=str(tmp_path / 'out' / 'train')),
        metainfo=dict(classes=NAMES),
        pipeline=[],
    )
    first = data.get_data_info(0)
    assert (first['width'], first['height']) == (60, 40)
    assert [one['bbox'] for one in first['instances']] == [
        [3, 2, 13, 32],
        [20, 10, 60, 40],
    ]


@pytest.mark.parametrize('write', [write_voc, write_yolo])
def test_bad_boxes_are_dropped_or_cut_and_counted(write, convert, tmp_path):
    images = {
        'a': (
            (100, 50),
            [
                ('cat', (10, 10, 10, 20)),  # no width
                ('cat', (110, 10, 130, 20)),  # outside
                ('dog', (90, 40, 110, 60)),  # half of each side inside
                ('dog', (1, 2, 3, 4)),
            ],
        )
    }
    card, said = convert(write(tmp_path / 'source', images))
    assert boxes_in(tmp_path / 'out')['a.jpg'] == [
        ('dog', [90, 40, 10, 10], 0),
        ('dog', [1, 2, 2, 2], 0),
    ]
    assert card['dropped'] == dict(zero_size=1, outside=1)
    assert card['found']['cut'] == 1
    assert sum('warning, 1 boxes' in line for line in said) == 3


@pytest.mark.parametrize('write', [write_voc, write_yolo])
def test_an_image_without_annotation_file_has_no_boxes(
    write, convert, tmp_path
):
    folder = write(tmp_path / 'source')
    for path in [*folder.rglob('b.xml'), *folder.rglob('b.txt')]:
        path.unlink()
    card, said = convert(folder)
    assert boxes_in(tmp_path / 'out') == expected() | {'b.jpg': []}
    assert card['found']['without_annotation'] == 1
    assert 'warning, 1 images have no annotation file' in said[-1]


@pytest.mark.parametrize('write', [write_voc, write_yolo])
def test_a_folder_without_any_box_is_refused(write, convert, tmp_path):
    folder = write(tmp_path / 'source')
    for path in [*folder.rglob('*.xml'), *folder.rglob('*.txt')]:
        path.unlink()
    with pytest.raises(ValueError, match='3 images, 3 of them without an'):
        convert(folder)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('write', [write_voc, write_yolo])
def test_classes_select_and_order_and_what_is_left_out_is_counted(
    write, convert, tmp_path
):
    folder = write(tmp_path / 'source')
    card, _ = convert(folder, classes=['dog'])
    assert card['classes'] == ['dog']
    assert card['found']['left_out'] == 3
    assert boxes_in(tmp_path / 'out')['c.jpg'] == []
    card, _ = convert(folder, 'other', classes=['dog', 'cat'])
    assert card['classes'] == ['dog', 'cat']
    assert boxes_in(tmp_path / 'other') == expected()
    with pytest.raises(
        ValueError, match="no class 'catt'. Did you mean 'cat'"
    ):
        convert(folder, 'third', classes=['catt'])


def test_drawn_splits_are_disjoint_and_whole_and_depend_on_the_seed():
    samples = [Sample(Path(f'{number:02d}.jpg')) for number in range(40)]
    draws = []
    for seed in (0, 0, 1):
        splits = draw_splits(samples, val=0.1, test=0.25, seed=seed)
        names = {
            split: [one.image.name for one in members]
            for split, members in splits.items()
        }
        assert {split: len(one) for split, one in names.items()} == dict(
            train=26, val=4, test=10
        )
        together = [name for one in names.values() for name in one]
        assert sorted(together) == [one.image.name for one in samples]
        draws.append(names)
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_splits_do_not_depend_on_the_order_of_the_files():
    samples = [Sample(Path(f'{number:02d}.jpg')) for number in range(40)]
    one = draw_splits(samples, 0.2, 0.2, seed=0)
    assert draw_splits(samples[::-1], 0.2, 0.2, seed=0) == one


@pytest.mark.parametrize(
    ('shares', 'message'),
    [
        ((0.5, 0.5), 'of 4 images 2 would be val and 2 test'),
        ((1.5, 0), 'val between 0 and 1'),
    ],
)
def test_splits_that_leave_nothing_to_train_on_are_refused(shares, message):
    samples = [Sample(Path(f'{name}.jpg')) for name in 'abcd']
    with pytest.raises(ValueError, match=message):
        draw_splits(samples, *shares, seed=0)


def test_a_call_broken_off_goes_on_and_ends_the_same(
    voc, convert, tmp_path, monkeypatch
):
    convert(voc, 'whole')
    add, written = CocoWriter.add, []

    def fails(self, *arguments, **settings):
        if written:
            raise KeyboardInterrupt
        written.append(add(self, *arguments, **settings))

    monkeypatch.setattr(CocoWriter, 'add', fails)
    with pytest.raises(KeyboardInterrupt):
        convert(voc)
    assert not (tmp_path / 'out').exists()
    again = []

    def notes(self, *arguments, **settings):
        again.append(add(self, *arguments, **settings))

    monkeypatch.setattr(CocoWriter, 'add', notes)
    convert(voc)
    assert again == [False, True, True]
    assert files(tmp_path / 'out') == files(tmp_path / 'whole')


def test_a_second_call_does_nothing_even_after_the_folder_moved(
    voc, convert, tmp_path
):
    card, _ = convert(voc)
    before = files(tmp_path / 'out')
    moved = voc.rename(tmp_path / 'moved')
    assert convert(moved) == (card, [f'{tmp_path / "out"}: done before'])
    assert files(tmp_path / 'out') == before


@pytest.mark.parametrize(
    ('change', 'key'),
    [
        (lambda voc: cv2.imwrite(str(voc), picture(60, 40, 9)), 'sha256'),
        (lambda voc: None, 'splits'),
    ],
)
def test_changed_sources_or_settings_overwrite_nothing(
    change, key, voc, convert, tmp_path
):
    convert(voc)
    before = files(tmp_path / 'out')
    change(voc / 'JPEGImages' / 'a.jpg')
    settings = dict(seed=1) if key == 'splits' else {}
    with pytest.raises(FileExistsError, match=f'recipe differs in {key}'):
        convert(voc, **settings)
    assert files(tmp_path / 'out') == before


def test_a_folder_of_other_content_is_never_touched(voc, convert, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('precious')
    with pytest.raises(FileExistsError, match='choose another folder'):
        convert(voc)
    assert files(tmp_path / 'out') == {'mine.txt': b'precious'}


@pytest.mark.parametrize('share', [0, 0.3, 0.95])
def test_a_picture_that_was_cut_off_is_an_error_before_anything_is_written(
    share, voc, convert, tmp_path
):
    path = voc / 'JPEGImages' / 'c.jpg'
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r'c\.jpg cannot be decoded'):
        convert(voc)
    assert [one.name for one in tmp_path.iterdir()] == ['voc']


# ------------------------------------------------------------------------- VOC


def write_lists(folder, **lists):
    lists_folder = folder / 'ImageSets' / 'Main'
    lists_folder.mkdir(parents=True)
    for split, names in lists.items():
        (lists_folder / f'{split}.txt').write_text('\n'.join(names) + '\n')


def test_voc_lists_are_the_splits(voc, convert, tmp_path):
    write_lists(voc, train=['c'], val=['a'])
    card, said = convert(voc, val=0.4, test=0.4)
    assert split_names(tmp_path / 'out') == dict(
        train=['c.jpg'], val=['a.jpg']
    )
    assert card['seed'] is None
    assert card['found']['in_no_split'] == 1
    assert 'warning, 1 images are in none of the splits' in said[-1]


def test_voc_without_lists_is_divided_by_the_shares(voc, convert, tmp_path):
    card, _ = convert(voc, val=0.3, test=0.3, seed=5)
    splits = split_names(tmp_path / 'out')
    assert {split: len(names) for split, names in splits.items()} == dict(
        train=1, val=1, test=1
    )
    names = [name for members in splits.values() for name in members]
    assert sorted(names) == sorted(expected())
    assert card['seed'] == 5
    assert boxes_in(tmp_path / 'out', 'val').items() <= expected().items()


def test_voc_pictures_may_lie_in_images(voc, convert, tmp_path):
    (voc / 'JPEGImages').rename(voc / 'images')
    convert(voc)
    assert boxes_in(tmp_path / 'out') == expected()


def test_voc_objects_marked_difficult_are_ignored(voc, convert, tmp_path):
    size, boxes = IMAGES['a']
    text = voc_text(size, [('cat', (5, 5, 5, 9)), *boxes], difficult=[2])
    (voc / 'Annotations' / 'a.xml').write_text(text)
    convert(voc)
    assert boxes_in(tmp_path / 'out')['a.jpg'] == [
        ('cat', [3, 2, 10, 30], 0),
        ('dog', [20, 10, 40, 30], 1),
    ]


def test_voc_annotations_without_image_are_counted(voc, convert):
    (voc / 'JPEGImages' / 'b.jpg').unlink()
    card, said = convert(voc)
    assert card['found']['without_image'] == 1
    assert 'warning, 1 annotations have no image' in said[-1]


def rename(folder, old, new):
    (folder / old).rename(folder / new)


def swap_size(folder):
    text = voc_text((40, 60), IMAGES['a'][1])
    (folder / 'Annotations' / 'a.xml').write_text(text)


def not_a_number(folder):
    text = voc_text((60, 40), [('cat', (1, 'nan', 3, 4))])
    (folder / 'Annotations' / 'a.xml').write_text(text)


def another_b(folder):
    cv2.imwrite(str(folder / 'JPEGImages' / 'b.png'), picture(9, 9))


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (swap_size, r'a\.xml was drawn on .*\(40, 60\).*\(60, 40\)'),
        (not_a_number, "<bndbox/ymin> .*'nan'"),
        (another_b, r'b\.jpg and b\.png, so that b\.xml could'),
        (
            lambda voc: rename(voc, 'JPEGImages', 'JPEGImage'),
            "JPEGImages or images. Did you mean 'JPEGImage'",
        ),
        (
            lambda voc: write_lists(voc, train=['a', 'bb']),
            "train.txt in .* lists 'bb'",
        ),
        (lambda voc: write_lists(voc, test=['a']), 'none in train.txt'),
        (
            lambda voc: write_lists(voc, train=['a', 'b'], test=['b']),
            r'train and test of .* share 1 images, such as .*b\.jpg',
        ),
    ],
)
def test_voc_folders_that_cannot_be_used_say_why(
    spoil, message, voc, convert, tmp_path
):
    spoil(voc)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        convert(voc)
    assert not (tmp_path / 'out').exists()


# ------------------------------------------------------------------------ YOLO


def test_yolo_boxes_are_worked_out_from_centre_and_size(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('\ufeff1 0.5 0.25 0.5 0.1\n\n0 0.1 0.2 0.3 0.2 0.3 0.9\n')
    names, boxes = read_yolo(path, {0: 'cat', 1: 'dog'})
    assert names == ('dog', 'cat')
    np.testing.assert_allclose(
        boxes, [[0.25, 0.2, 0.75, 0.3], [0.1, 0.2, 0.3, 0.9]]
    )


@pytest.mark.parametrize(
    ('image', 'label'),
    [
        ('a/images/train/b.jpg', 'a/labels/train/b.txt'),
        ('images/x/images/b.c.png', 'images/x/labels/b.c.txt'),
        ('a/b.jpg', 'a/b.txt'),
    ],
)
def test_yolo_labels_stand_where_ultralytics_looks(image, label):
    assert label_file(Path(image)) == Path(label)


@pytest.mark.parametrize(
    'changes',
    [
        dict(names={1: 'dog', 0: 'cat'}, nc=2),
        dict(path='/gone/with/the/old/machine'),
        dict(path=None, train='./images/train'),
        dict(path='', train='../images/train'),
        dict(train=['images/train']),
        dict(train='list.txt'),
        dict(val='', test=None),
    ],
)
def test_yolo_descriptions_are_understood(changes, yolo, convert, tmp_path):
    (yolo / 'list.txt').write_text(
        'images/train/a.jpg\n./images/train/b.jpg\n\nimages/train/c.jpg\n'
    )
    describe(yolo, **changes)
    convert(yolo)
    assert boxes_in(tmp_path / 'out') == expected()


def test_yolo_names_may_have_gaps(yolo, convert, tmp_path):
    describe(yolo, names={0: 'cat', 1: 'dog', 7: 'owl'})
    with open(yolo / 'labels' / 'train' / 'b.txt', 'a') as file:
        file.write('\n7 0.5 0.5 1 1')
    card, _ = convert(yolo)
    assert card['classes'] == ['cat', 'dog', 'owl']
    assert boxes_in(tmp_path / 'out')['b.jpg'][1] == ('owl', [0, 0, 70, 30], 0)


def test_yolo_splits_are_those_of_the_description(yolo, convert, tmp_path):
    for kind, suffix in (('images', 'jpg'), ('labels', 'txt')):
        (yolo / kind / 'valid').mkdir()
        rename(yolo, f'{kind}/train/b.{suffix}', f'{kind}/valid/b.{suffix}')
    describe(yolo, val='images/valid')
    convert(yolo, val=0.4, test=0.4)
    assert split_names(tmp_path / 'out') == dict(
        train=['a.jpg', 'c.jpg'], val=['b.jpg']
    )
    assert boxes_in(tmp_path / 'out', 'val') == expected({'b': IMAGES['b']})


def test_yolo_with_train_alone_is_divided_by_the_shares(
    yolo, convert, tmp_path
):
    card, _ = convert(yolo, val=0.3, test=0)
    sizes = {
        split: len(one) for split, one in split_names(tmp_path / 'out').items()
    }
    assert sizes == dict(train=2, val=1)
    assert card['seed'] == 0


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('0 0.5 0.5 0.1', "four numbers.* in line 2 .*got '0 0.5 0.5 0.1'"),
        ('0 0.5 0.5 0.1 0.1 0.9', 'expects a class id and four numbers'),
        ('cat 0.5 0.5 0.1 0.1', "got 'cat 0.5"),
        ('0.5 0.5 0.5 0.1 0.1', 'expects a class id'),
        ('0 0.5 nan 0.1 0.1', 'expects finite numbers in line 2'),
        ('0 0.5 0.5 inf 0.1', 'expects finite numbers in line 2'),
        ('0 30 20 10 10', 'expects shares .* divide x and w'),
        ('2 0.5 0.5 0.1 0.1', "0 'cat', 1 'dog', got the id 2 in line 2"),
        ('-1 0.5 0.5 0.1 0.1', 'got the id -1'),
    ],
)
def test_yolo_lines_that_mean_nothing_name_file_and_line(
    line, message, yolo, convert, tmp_path
):
    path = yolo / 'labels' / 'train' / 'a.txt'
    path.write_text(f'0 0.5 0.5 0.1 0.1\n{line}\n')
    with pytest.raises(ValueError, match=message) as caught:
        convert(yolo)
    assert str(path) in str(caught.value)
    assert not (tmp_path / 'out').exists()


def test_yolo_labels_that_are_no_text_are_malformed(yolo, convert):
    path = yolo / 'labels' / 'train' / 'a.txt'
    path.write_bytes(b'\xff\xfe0\x00 \x00')
    with pytest.raises(ValueError, match='expects a class id'):
        convert(yolo)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(train='images/trian'), "no .*trian. Did you mean 'train'"),
        (dict(train=None), 'names no images to train on'),
        (dict(train='labels/train'), 'where there is no image'),
        (dict(names=None), 'should name each class once.*got None'),
        (dict(names=['cat', 'cat']), 'should name each class once'),
        (dict(nc=3), 'has nc: 3, but names 2 classes'),
        (dict(val='images/train'), 'train and val of .* share 3 images'),
        (dict(val='list.txt'), r"lists 'gone\.jpg', but there is no"),
    ],
)
def test_yolo_descriptions_that_cannot_be_used_say_why(
    changes, message, yolo, convert, tmp_path
):
    (yolo / 'list.txt').write_text('gone.jpg')
    describe(yolo, **changes)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        convert(yolo)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [('a: [', 'is no YAML'), ('- a', 'should hold names: .* got a list')],
)
def test_yolo_descriptions_that_are_none_are_refused(
    text, message, yolo, convert
):
    (yolo / 'data.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(yolo)


def test_a_single_description_of_another_name_is_found(
    yolo, convert, tmp_path
):
    rename(yolo, 'data.yaml', 'cats.yml')
    convert(yolo)
    assert boxes_in(tmp_path / 'out') == expected()
    rename(yolo, 'cats.yml', 'data.yaml.txt')
    with pytest.raises(
        FileNotFoundError, match="Did you mean 'data.yaml.txt'"
    ):
        convert(yolo, 'other')


def test_yolo_images_of_one_name_are_an_error(yolo, convert):
    (yolo / 'images' / 'train' / 'more').mkdir()
    image = yolo / 'images' / 'train' / 'more' / 'a.jpg'
    cv2.imwrite(str(image), picture(9, 9))
    with pytest.raises(ValueError, match='train has two images of one name'):
        convert(yolo)


# ----------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ('kind', 'write'), [('voc', write_voc), ('yolo', write_yolo)]
)
def test_the_command_converts_a_folder(kind, write, tmp_path, capsys):
    folder, out = write(tmp_path / 'mine'), tmp_path / 'out'
    words = [kind, str(folder), '--out', str(out), '--val', '0.3']
    assert main([*words, '--test', '0', '--classes', 'dog', 'cat']) == 0
    assert 'train, 2 images' in capsys.readouterr().out
    card = json.loads((out / 'card.json').read_text())
    assert card['classes'] == ['dog', 'cat']
    assert card['recipe']['splits'] == dict(seed=0, val=0.3, test=0)
    assert main([kind, str(tmp_path / 'gone'), '--out', str(out)]) == 1
    assert 'There is no folder' in capsys.readouterr().err


# ------------------------------------------------------------------------ coco


def write_coco(folder, images=IMAGES, file='result.json', pictures='images'):
    """One file for all pictures, as tools for labelling export it."""
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    ids = {name: 5 * number for number, name in enumerate(NAMES, 1)}
    content = dict(
        images=[],
        annotations=[],
        categories=[dict(id=1, name='animals')]
        + [dict(id=number, name=name) for name, number in ids.items()],
    )
    for seed, (name, (size, boxes)) in enumerate(images.items()):
        path = folder / pictures / f'{name}.jpg'
        cv2.imwrite(str(path), picture(*size, seed))
        content['images'].append(
            dict(
                id=f'i{seed}',
                file_name=path.name,
                width=size[0],
                height=size[1],
            )
        )
        for label, (x1, y1, x2, y2) in boxes:
            content['annotations'].append(
                dict(
                    image_id=f'i{seed}',
                    category_id=ids[label],
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                )
            )
    change_coco(folder / file, lambda _: content)
    return folder


def change_coco(path, change):
    """Write what ``change`` makes of a file, or does to it."""
    content = json.loads(path.read_text()) if path.is_file() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(change(content) or content))


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / 'coco')


def convert_coco(source, out, **settings):
    said = []
    settings = dict(val=0, test=0) | settings
    return prepare_own(source, out, 'coco', say=said.append, **settings), said


@pytest.mark.parametrize(
    ('file', 'pictures'),
    [
        ('result.json', 'images'),
        ('annotations/instances_default.json', 'images'),
        ('annotations/instances_default.json', 'images/default'),
        ('_annotations.coco.json', ''),
    ],
)
def test_coco_gives_the_boxes_that_were_annotated(file, pictures, tmp_path):
    folder = write_coco(tmp_path / 'a', file=file, pictures=pictures)
    for number, source in enumerate((folder, folder / file)):
        out = tmp_path / f'out{number}'
        card, said = convert_coco(source, out)
        assert boxes_in(out) == expected()
        # A category without an example is no class.
        assert card['classes'] == ['cat', 'dog']
        assert not any('warning' in line for line in said)


def test_coco_of_one_file_is_divided_by_the_shares(coco, tmp_path):
    card, _ = convert_coco(coco, tmp_path / 'out', val=0.3, test=0.3)
    sizes = {split: one['images'] for split, one in card['splits'].items()}
    assert sizes == dict(train=1, val=1, test=1)
    found = {}
    for split in sizes:
        found |= boxes_in(tmp_path / 'out', split)
    assert found == expected()


def test_coco_splits_of_the_folder_are_kept(tmp_path):
    parts = dict(train=('a', 'c'), val=('b',))
    for split, names in parts.items():
        write_coco(
            tmp_path / 'a',
            {name: IMAGES[name] for name in names},
            f'annotations/instances_{split}2017.json',
            f'{split}2017',
        )
    card, _ = convert_coco(tmp_path / 'a', tmp_path / 'out', val=0.5)
    assert card['recipe']['splits'] == 'as in the folder'
    assert split_names(tmp_path / 'out') == {
        'train': ['a.jpg', 'c.jpg'],
        'val': ['b.jpg'],
    }


def test_coco_crowds_are_ignored_masks_and_lost_pictures_counted(
    coco, tmp_path
):
    def change(content):
        content['annotations'][0].update(iscrowd=1, segmentation=[[1] * 8])

    change_coco(coco / 'result.json', change)
    (coco / 'images' / 'b.jpg').unlink()
    card, said = convert_coco(coco, tmp_path / 'out')
    found = boxes_in(tmp_path / 'out')
    assert [ignored for *_, ignored in found['a.jpg']] == [1, 0]
    assert 'b.jpg' not in found
    assert (card['found']['masks'], card['found']['without_image']) == (1, 1)
    assert sum('warning, 1 ' in line for line in said) == 2


def test_coco_changed_boxes_are_another_data_set(coco, tmp_path):
    """Though they stand in no file of their own."""
    convert_coco(coco, tmp_path / 'out')
    convert_coco(coco, tmp_path / 'out')  # done before

    def change(content):
        content['annotations'][0]['bbox'][2] += 1

    change_coco(coco / 'result.json', change)
    with pytest.raises(FileExistsError, match='sha256'):
        convert_coco(coco, tmp_path / 'out')


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (
            lambda all: all['annotations'][0].update(category_id=2),
            'of the category 2, which it does not list',
        ),
        (
            lambda all: all['annotations'][0].update(image_id='i9'),
            "of the image 'i9', which it does not list",
        ),
        (
            lambda all: all['images'][1].update(id='i0'),
            "two images of the id 'i0'",
        ),
        (
            lambda all: all['annotations'][2].update(bbox=[1, 2, 3]),
            r'needs bbox=\[x, y, width, height\] in pixels, got \[\[1, 2, 3\]',
        ),
        (
            lambda all: all['annotations'][2].update(bbox=[1, 2, 3, 'a']),
            'needs bbox=',
        ),
        (
            lambda all: all['annotations'][2].update(bbox=[1, 2, 3, None]),
            'needs bbox=',
        ),
        (
            lambda all: all['annotations'][1].update(image_id=[1]),
            'needs image_id, category_id, bbox in each of its annotations, '
            'but number 1 is',
        ),
        (lambda all: all.update(categories=None), 'a list of categories'),
        (lambda all: all.update(annotations=[]), 'not a single box'),
        (
            lambda all: all['images'][0].update(width=61),
            r'A box was drawn on an image of \(61, 40\)',
        ),
    ],
)
def test_coco_that_cannot_be_used_says_why(change, said, coco, tmp_path):
    change_coco(coco / 'result.json', change)
    with pytest.raises(ValueError, match=said):
        convert_coco(coco, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_coco_files_are_not_chosen_between(coco, tmp_path, capsys):
    (coco / 'other.json').write_text('{}')
    out = str(tmp_path / 'out')
    assert main(['coco', str(coco), '--out', out]) == 1
    assert 'other.json, result.json. Name the file' in capsys.readouterr().err
    words = ['coco', str(coco / 'result.json'), '--out', out]
    assert main([*words, '--val', '0.3', '--test', '0']) == 0
    write_coco(coco, file='test.json')
    assert main(['coco', str(coco), '--out', f'{out}2']) == 1
    assert 'annotations of test alone' in capsys.readouterr().err
    assert main(['coco', str(coco / 'no'), '--out', f'{out}2']) == 1
    assert 'There is no folder' in capsys.readouterr().err


def test_coco_does_not_take_pictures_from_elsewhere(coco, tmp_path):
    """What is copied may be published; the file is somebody else's."""
    cv2.imwrite(str(tmp_path / 'private.jpg'), picture(60, 40))

    def change(content):
        content['images'][0]['file_name'] = '../../private.jpg'

    change_coco(coco / 'result.json', change)
    with pytest.raises(ValueError, match='outside of that folder.*--outside'):
        convert_coco(coco, tmp_path / 'out')
    convert_coco(coco, tmp_path / 'out', outside=True)
    assert 'private.jpg' in boxes_in(tmp_path / 'out')

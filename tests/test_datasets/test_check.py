import json

import numpy as np
import pytest
import runs
from mmdet.datasets import CocoDataset, ConcatDataset
from mmengine.registry import init_default_scope
from PIL import Image

from mmkd.datasets.check import (
    check_dataset,
    is_whole,
    named_classes,
    same_pictures,
)


@pytest.fixture
def folder(tmp_path):
    runs.write_coco(tmp_path, images=4)
    return tmp_path


def edit(folder, change):
    """Change the annotations in place."""
    path = folder / 'train.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def check(folder, training=True, **settings):
    config = dict(runs.dataset(folder), **settings)
    (report,) = check_dataset(config, 'train_dataloader.dataset', training)
    return report


def box(content, number=0, **settings):
    content['annotations'][number].update(settings)


def test_good_data_is_counted_without_a_warning(folder):
    report = check(folder)
    assert report.warnings == []
    # One box in even images, two in odd ones.
    assert (report.images, report.boxes) == (4, 6)
    assert report.classes == runs.NAMES


def test_every_set_in_a_nest_of_wrappers_is_checked(folder):
    one = runs.dataset(folder)
    nest = dict(
        type='RepeatDataset',
        dataset=dict(
            type='ConcatDataset',
            datasets=[one, dict(type='ClassBalancedDataset', dataset=one)],
        ),
    )
    assert [report.boxes for report in check_dataset(nest)] == [6, 6]
    one['ann_file'] = 'gone.json'
    with pytest.raises(
        FileNotFoundError,
        match=r'dataset\.dataset\.datasets\[0\]\.ann_file expected',
    ):
        check_dataset(nest)


def test_missing_annotations_suggest_the_nearest_name(folder):
    with pytest.raises(FileNotFoundError, match=r"mean 'train\.json'\?"):
        check(folder, ann_file='trian.json')


def test_missing_folder_of_annotations_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r'folder .* not exist either'):
        check(folder, data_root=str(folder / 'nowhere'))


def test_broken_json_says_where(folder):
    path = folder / 'train.json'
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r'no JSON \(.*line 1 column'):
        check(folder)


@pytest.mark.parametrize(
    ('content', 'complaint'),
    [('[1, 2]', 'got a list'), ('{"images": []}', "got the keys 'images'")],
)
def test_json_of_another_kind_says_what_it_is(folder, content, complaint):
    (folder / 'train.json').write_text(content)
    with pytest.raises(ValueError, match=complaint):
        check(folder)


def test_annotations_without_a_key_mmdet_reads_are_an_error(folder):
    edit(folder, lambda content: content['annotations'][1].pop('area'))
    with pytest.raises(ValueError, match=r"id 2\) has no 'area'"):
        check(folder)


@pytest.mark.parametrize('kind', ['images', 'annotations'])
def test_ids_must_be_unique(folder, kind):
    def repeat(content):
        content[kind][1]['id'] = content[kind][0]['id']

    edit(folder, repeat)
    with pytest.raises(ValueError, match='ids occur more than once'):
        check(folder)


def test_category_ids_with_gaps_are_fine(folder):
    def spread(content):
        for one in content['categories']:
            one['id'] *= 100
        for one in content['annotations']:
            one['category_id'] *= 100

    edit(folder, spread)
    assert check(folder).warnings == []


def test_another_class_list_names_what_to_type(folder):
    def rename(content):
        content['categories'][1]['name'] = 'sqare'

    edit(folder, rename)
    with pytest.raises(
        ValueError,
        match=r"no category 'square'.*Did you mean 'sqare'\?.*"
        r"classes=\('disc', 'sqare', 'bar'\)",
    ):
        check(folder)


def test_classes_in_another_order_are_an_error(folder):
    # mmdet would give 'bar' the label of 'disc'.
    with pytest.raises(ValueError, match=r"classes=\('disc', 'square', 'bar'"):
        check(folder, metainfo=dict(classes=('bar', 'square', 'disc')))


def test_a_single_class_must_be_a_tuple(folder):
    with pytest.raises(ValueError, match=r"classes=\('disc',\)"):
        check(folder, metainfo=dict(classes='disc'))


@pytest.mark.parametrize(
    ('change', 'warning'),
    [
        (dict(bbox=[3, 3, 0, 9], area=0), 'smaller than a pixel'),
        (dict(bbox=[3, 3, 9, 0.5]), 'smaller than a pixel'),
        (dict(area=0), 'smaller than a pixel'),
        (dict(bbox=[64, 3, 9, 9]), 'outside of their image'),
        (dict(bbox=[-9, 3, 9, 9]), 'outside of their image'),
        (dict(category_id=99), 'that the file does not list'),
        (dict(image_id=99), 'belong to no image'),
    ],
)
def test_unusable_boxes_are_counted(folder, change, warning):
    # Two of an image's boxes, so that the image itself keeps one.
    edit(folder, lambda content: box(content, 1, **change))
    report = check(folder)
    assert report.boxes == 5
    (said,) = report.warnings
    assert warning in said
    assert '1 of 6 boxes' in said
    assert 'annotation 2' in said


def test_the_count_of_usable_boxes_is_mmdets(folder):
    def spoil(content):
        box(content, 0, bbox=[3, 3, 0, 9])
        box(content, 1, bbox=[63.5, 3, 9, 9])
        box(content, 2, bbox=[80, 80, 9, 9])
        box(content, 3, category_id=99)

    edit(folder, spoil)
    init_default_scope('mmdet')
    config = runs.dataset(folder)
    del config['type']
    kept = CocoDataset(**config)
    assert check(folder).boxes == sum(
        len(kept.get_data_info(number)['instances']) for number in range(4)
    )


def test_boxes_of_classes_left_out_are_counted(folder):
    report = check(folder, metainfo=dict(classes=('disc', 'square')))
    left_out = 6 - report.boxes
    assert left_out > 0
    assert f'{left_out} of 6 boxes are of categories' in report.warnings[0]


@pytest.mark.parametrize('bad', [[1, 2, 3], None, [1, 2, float('nan'), 4]])
def test_a_malformed_box_is_an_error(folder, bad):
    edit(folder, lambda content: box(content, 0, bbox=bad))
    with pytest.raises(ValueError, match='annotation 1 expected bbox='):
        check(folder)


def test_data_without_any_box_cannot_be_trained_on(folder):
    edit(folder, lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match='no box to train'):
        check(folder)
    # A test set may come without annotations.
    assert check(folder, training=False).boxes == 0


def test_images_without_boxes_are_counted(folder):
    edit(folder, lambda content: content['annotations'].pop(0))
    (kept,) = check(folder).notes
    assert '1 of 4 images have no box (image 0); they are kept' in kept
    (dropped,) = check(folder, filter_cfg=dict(filter_empty_gt=True)).notes
    assert 'left out' in dropped


def test_a_filter_that_leaves_nothing_is_an_error(folder):
    assert check(folder, filter_cfg=dict(min_size=64)).images == 4
    with pytest.raises(ValueError, match='leaves none of 4 images'):
        check(folder, filter_cfg=dict(min_size=65))


def test_missing_images_are_counted_and_the_folder_is_named(folder):
    (folder / 'images' / '002.png').unlink()
    with pytest.raises(
        FileNotFoundError, match=r'1 of 4 images do not exist.*images/002\.png'
    ):
        check(folder)
    with pytest.raises(FileNotFoundError, match=r'4 of 4.*does not exist'):
        check(folder, data_prefix=dict(img='pictures/'))


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.bmp'])
def test_a_picture_that_was_cut_off_is_found(name, tmp_path):
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    assert is_whole(path)
    content = path.read_bytes()
    for share in (0, 0.3, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        assert not is_whole(path)


def test_a_photograph_with_notes_after_its_end_is_whole(tmp_path):
    path = tmp_path / 'a.jpg'
    Image.new('RGB', (32, 32)).save(path)
    path.write_bytes(path.read_bytes() + b'notes of the camera')
    assert is_whole(path)


def test_damaged_pictures_are_counted(folder):
    path = folder / 'images' / '001.png'
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r'1 of 4 images .* cut off.*001'):
        check(folder)


def test_another_size_than_annotated_is_a_warning(folder):
    edit(folder, lambda content: content['images'][0].update(width=65))
    (said,) = check(folder).warnings
    assert 'another size' in said
    assert '000.png' in said


def test_data_that_is_not_on_this_disk_is_left_to_its_reader(folder):
    assert check(folder, data_root='s3://bucket/').images == 0
    assert check(folder, backend_args=dict(backend='petrel')).images == 0


def test_classes_are_those_of_the_config_or_of_the_type():
    assert named_classes(CocoDataset, {})[:2] == ('person', 'bicycle')
    metainfo = dict(classes=('disc', 'bar'))
    assert named_classes(CocoDataset, dict(metainfo=metainfo)) == (
        'disc',
        'bar',
    )


def test_joined_sets_have_no_classes_of_their_own():
    assert named_classes(ConcatDataset, dict(datasets=[])) is None


# What is counted, and what stands there twice --------------------------------


def test_boxes_are_counted_by_class_and_size_without_crowds(folder):
    def change(content):
        box(content, 0, bbox=[0, 0, 32, 32], area=1024, category_id=1)
        box(content, 1, bbox=[0, 0, 32, 31], area=992, category_id=4)
        box(content, 2, bbox=[0, 0, 9, 9], area=81, iscrowd=1)
        del content['annotations'][3:]

    edit(folder, change)
    report = check(folder)
    # As large as the largest small object of COCO's is the smallest medium.
    assert report.of_sizes == dict(small=1, medium=1, large=0)
    assert report.of_classes == dict(disc=1, square=1, bar=0)
    assert report.boxes == 3


def test_a_box_that_stands_there_twice_is_counted_once_as_such(folder):
    def repeat(content):
        first = content['annotations'][0]
        content['annotations'].append(dict(first, id=7))
        content['annotations'].append(dict(first, id=8))

    edit(folder, repeat)
    (said,) = check(folder).warnings
    assert '2 of 8 boxes stand there for the second time' in said
    assert '(annotation 7, 8)' in said


def test_an_object_of_two_classes_is_no_repetition(folder):
    def both(content):
        first = content['annotations'][0]
        other = 4 if first['category_id'] == 1 else 1
        content['annotations'].append(dict(first, id=7, category_id=other))

    edit(folder, both)
    assert check(folder).warnings == []


def test_boxes_that_are_left_out_are_not_told_again_as_repeated(folder):
    def spoil(content):
        box(content, 1, bbox=[3, 3, 0, 9])
        content['annotations'].append(dict(content['annotations'][1], id=7))

    edit(folder, spoil)
    (said,) = check(folder).warnings
    assert '2 of 7 boxes are smaller than a pixel' in said


def test_a_picture_under_two_ids_is_told(folder):
    def rename(content):
        content['images'][1]['file_name'] = content['images'][0]['file_name']

    edit(folder, rename)
    (said,) = check(folder).warnings
    assert "1 images stand there more than once ('000.png')" in said


def test_pictures_of_the_same_bytes_are_grouped(tmp_path):
    contents = dict(a=b'one', b=b'two', c=b'one', d=b'three', e=b'one')
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in 'abcdea']
    assert same_pictures(paths) == [[str(tmp_path / one) for one in 'ace']]

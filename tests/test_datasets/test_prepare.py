import hashlib
import io
import json
import subprocess
import zipfile
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmkd.datasets import sources, trees
from mmkd.datasets.bccd import CLASSES, prepare_bccd
from mmkd.datasets.coco import CARD, CocoWriter
from mmkd.datasets.prepare import main
from mmkd.datasets.tiles import windows
from mmkd.datasets.trees import REGIONS, prepare_trees
from mmkd.datasets.voc import clean_boxes, cut_boxes, merged_labels, read_voc

XML = """<annotation>
  <filename>{name}.png</filename>
  <size><width>{width}</width><height>{height}</height></size>
  {objects}
</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox>
  <xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax>
</bndbox></object>"""

# One photograph of 60 x 40 pixels: the left half trains, the right half
# validates. Box by box: whole in the left half; across the border, 3 of 10
# columns on the left; no area; outside; across the image's edge.
BOXES = [
    ('Tree', (2, 2, 12, 12)),
    ('Dead', (27, 20, 37, 30)),
    ('Tree', (5, 5, 5, 9)),
    ('Tree', (70, 5, 80, 9)),
    ('Alive', (50, 30, 64, 40)),
]
TINY = {'tiny': dict(train=(0, 0, 30, 40), val=(30, 0, 60, 40))}


def voc(boxes=BOXES, width=60, height=40):
    objects = '\n'.join(OBJECT.format(*box, name=name) for name, box in boxes)
    return XML.format(
        name='tiny', width=width, height=height, objects=objects
    ).encode()


def photograph(width=60, height=40):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return noise.astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'photographs'
    folder.mkdir()
    (folder / 'tiny.xml').write_bytes(voc())
    cv2.imwrite(str(folder / 'tiny.png'), photograph())
    return folder


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }


def prepare(folder, out, source=None, **settings):
    said = []
    settings = dict(regions=TINY, tile=20, overlap=8, eval_tile=40) | settings
    card = prepare_trees(
        out,
        source or folder,
        say=said.append,
        sha256=digests(folder),
        **settings,
    )
    return card, said


def boxes_of(path):
    content = json.loads(path.read_text())
    windows = {one['id']: one['window'] for one in content['images']}
    return [
        (windows[one['image_id']], one['bbox'], one['iscrowd'])
        for one in content['annotations']
    ]


def test_boxes_are_read_as_they_stand(folder):
    annotation = read_voc(folder / 'tiny.xml')
    assert annotation.size == (60, 40)
    assert annotation.names == tuple(name for name, _ in BOXES)
    assert annotation.boxes.tolist() == [list(box) for _, box in BOXES]


def test_boxes_without_area_or_outside_are_dropped_and_counted():
    boxes = np.array([box for _, box in BOXES], float)
    kept, index, found = clean_boxes(boxes, 60, 40)
    assert index.tolist() == [0, 1, 4]
    assert kept[2].tolist() == [50, 30, 60, 40]
    assert dict(found) == dict(zero_size=1, outside=1, cut=1)


def test_boxes_of_swapped_corners_are_dropped():
    _, index, found = clean_boxes(np.array([[9.0, 2, 3, 8]]), 60, 40)
    assert index.size == 0
    assert found['zero_size'] == 1


def test_cut_box_counts_if_half_of_it_is_visible():
    boxes = np.array([[10.0, 0, 20, 10], [14, 0, 24, 10], [16, 0, 26, 10]])
    cut, index, ignored = cut_boxes(boxes, (5, 0, 20, 40), 0.5)
    assert cut.tolist() == [[5, 0, 15, 10], [9, 0, 15, 10], [11, 0, 15, 10]]
    assert index.tolist() == [0, 1, 2]
    assert ignored.tolist() == [False, False, True]  # 10, 6, 4 of 10 columns


def test_box_that_only_touches_the_window_is_not_in_it():
    _, index, _ = cut_boxes(np.array([[20.0, 0, 30, 10]]), (0, 0, 20, 20), 0.5)
    assert index.size == 0


def test_unknown_class_is_an_error():
    with pytest.raises(ValueError, match="got an object 'Bush'"):
        merged_labels(['Tree', 'Bush'], {}, ['Tree'])


@pytest.mark.parametrize('overlap', [0, 7])
@pytest.mark.parametrize('region', [(0, 0, 50, 33), (10, 20, 75, 30)])
def test_windows_cover_the_region_and_stay_in_it(region, overlap):
    x1, y1, x2, y2 = region
    seen = np.zeros((100, 100), int)
    for left, top, right, bottom in windows(region, 16, overlap):
        assert right - left <= 16
        assert bottom - top <= 16
        seen[top:bottom, left:right] += 1
    assert (seen[y1:y2, x1:x2] >= 1).all()
    assert seen.sum() == seen[y1:y2, x1:x2].sum()
    if not overlap:
        assert seen.max() == 1


def test_overlapping_windows_share_what_was_asked():
    spans = sorted(
        {(x1, x2) for x1, _, x2, _ in windows((0, 0, 50, 9), 16, 7)}
    )
    shared = [end - begin for (_, end), (begin, _) in pairwise(spans)]
    assert min(shared) >= 7


@pytest.mark.parametrize(
    'settings', [((0, 0, 0, 9), 8, 0), ((0, 0, 9, 9), 8, 8)]
)
def test_windows_refuse_what_cannot_be_covered(settings):
    with pytest.raises(ValueError, match='windows needs'):
        windows(*settings)


def test_splits_of_the_photographs_share_no_pixel():
    for splits in REGIONS.values():
        seen = np.zeros((2500, 2500), int)
        for x1, y1, x2, y2 in splits.values():
            seen[y1:y2, x1:x2] += 1
        assert seen.max() == 1


def test_tiles_are_the_pixels_of_their_own_region(folder, tmp_path):
    out = tmp_path / 'trees'
    prepare(folder, out)
    image = photograph()
    for split, region in TINY['tiny'].items():
        content = json.loads((out / f'{split}.json').read_text())
        for one in content['images']:
            x1, y1, x2, y2 = one['window']
            assert region[0] <= x1 < x2 <= region[2]
            assert region[1] <= y1 < y2 <= region[3]
            tile = cv2.imread(str(out / split / one['file_name']))
            assert np.array_equal(tile, image[y1:y2, x1:x2])
            assert (one['width'], one['height']) == (x2 - x1, y2 - y1)


def test_boxes_of_a_region_come_out_as_worked_out_by_hand(folder, tmp_path):
    out = tmp_path / 'trees'
    card, _ = prepare(folder, out)
    # The tile of val is the right half: 7 of 10 columns of the second box
    # are visible, and all that the photograph shows of the last.
    assert boxes_of(out / 'val.json') == [
        ([30, 0, 60, 40], [0, 20, 7, 10], 0),
        ([30, 0, 60, 40], [20, 30, 10, 10], 0),
    ]
    # Tiles of train: columns 0-20 and 10-30, rows 0-20, 10-30 and 20-40.
    # 3 of 10 columns of the second box are too few.
    assert boxes_of(out / 'train.json') == [
        ([0, 0, 20, 20], [2, 2, 10, 10], 0),
        ([10, 0, 30, 20], [0, 2, 2, 10], 1),
        ([0, 10, 20, 30], [2, 0, 10, 2], 1),
        ([10, 10, 30, 30], [0, 0, 2, 2], 1),
        ([10, 10, 30, 30], [17, 10, 3, 10], 1),
        ([10, 20, 30, 40], [17, 0, 3, 10], 1),
    ]
    assert card['dropped'] == dict(zero_size=1, outside=1)
    assert card['cut_at_the_photograph'] == 1
    assert card['splits']['train']['boxes'] == 1
    assert card['splits']['train']['boxes_ignored'] == 5
    assert card['splits']['val']['boxes_by_class'] == dict(Tree=2)


def test_pycocotools_and_mmdet_read_what_was_written(folder, tmp_path):
    from mmdet.datasets import CocoDataset

    out = tmp_path / 'trees'
    prepare(folder, out)
    coco = COCO(str(out / 'val.json'))
    assert coco.getCatIds(catNms=['Tree']) == [1]
    data = CocoDataset(
        ann_file=str(out / 'train.json'),
        data_prefix=dict(img=str(out / 'train')),
        metainfo=dict(classes=('Tree',)),
        pipeline=[],
    )
    first = data.get_data_info(0)
    assert Path(first['img_path']).is_file()
    assert first['instances'][0]['bbox'] == [2, 2, 12, 12]
    assert first['instances'][0]['ignore_flag'] == 0


def test_folder_and_wheel_give_the_same_bytes(folder, tmp_path):
    wheel = tmp_path / 'some.whl'
    with zipfile.ZipFile(wheel, 'w') as file:
        for path in folder.iterdir():
            file.write(path, f'{trees.FOLDER}/{path.name}')
        file.writestr('../escaped.txt', 'never read')
    prepare(folder, tmp_path / 'a')
    prepare(folder, tmp_path / 'b', source=wheel)
    first, second = (
        {
            path.relative_to(out).as_posix(): path.read_bytes()
            for path in sorted(out.rglob('*'))
            if path.is_file()
        }
        for out in (tmp_path / 'a', tmp_path / 'b')
    )
    assert first == second
    assert not list(tmp_path.rglob('escaped.txt'))


def test_second_call_does_nothing(folder, tmp_path):
    out = tmp_path / 'trees'
    card, _ = prepare(folder, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    again, said = prepare(folder, out, source=tmp_path / 'gone')
    assert again == card
    assert said == [f'{out}: done before']
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == times


def test_broken_off_call_goes_on_and_ends_the_same(
    folder, tmp_path, monkeypatch
):
    whole, _ = prepare(folder, tmp_path / 'whole')
    add, count = CocoWriter.add, []

    def fails_later(self, *arguments, **settings):
        if len(count) == 4:
            raise KeyboardInterrupt
        count.append(1)
        return add(self, *arguments, **settings)

    out = tmp_path / 'trees'
    monkeypatch.setattr(CocoWriter, 'add', fails_later)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, out)
    assert not out.exists()
    written = []

    def notes(self, *arguments, **settings):
        written.append(add(self, *arguments, **settings))
        return written[-1]

    monkeypatch.setattr(CocoWriter, 'add', notes)
    card, _ = prepare(folder, out)
    assert written[:4] == [False] * 4
    assert all(written[4:])
    assert card == whole
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        'photographs',
        'trees',
        'whole',
    ]


def test_folder_of_other_content_is_never_touched(folder, tmp_path):
    out = tmp_path / 'trees'
    out.mkdir()
    (out / 'mine.txt').write_text('precious')
    with pytest.raises(FileExistsError, match='choose another folder'):
        prepare(folder, out)
    assert (out / 'mine.txt').read_text() == 'precious'


def test_other_settings_say_what_differs(folder, tmp_path):
    out = tmp_path / 'trees'
    prepare(folder, out)
    with pytest.raises(FileExistsError, match='differs in min_visible'):
        prepare(folder, out, min_visible=0.9)


def test_photograph_that_is_not_the_expected_one_is_refused(folder, tmp_path):
    expected = digests(folder)
    (folder / 'tiny.xml').write_bytes(voc(BOXES[:1]))
    with pytest.raises(ValueError, match=r'tiny\.xml .* expected SHA-256'):
        prepare_trees(
            tmp_path / 'trees', folder, regions=TINY, sha256=expected
        )
    assert not (tmp_path / 'trees').exists()


def test_annotation_of_another_image_size_is_refused(folder, tmp_path):
    (folder / 'tiny.xml').write_bytes(voc(width=61))
    with pytest.raises(ValueError, match=r'\(61, 40\).*\(60, 40\)'):
        prepare(folder, tmp_path / 'trees')


def test_missing_file_suggests_the_nearest(folder, tmp_path):
    expected = digests(folder)
    (folder / 'tiny.png').rename(folder / 'tinny.png')
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'tinny\.png'"):
        prepare_trees(
            tmp_path / 'trees', folder, regions=TINY, sha256=expected
        )


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'<annotation><obj', 'cannot read'),
        (b'<other/>', 'got <other>'),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', 'DOCTYPE'),
        (voc([('Tree', (1, 2, 'x', 4))]), "<bndbox/xmax> .*'x'"),
        (voc([('Tree', (1, 'nan', 3, 4))]), "<bndbox/ymin> .*'nan'"),
        (voc([('', (1, 2, 3, 4))]), 'expects <name> in object 0'),
    ],
)
def test_broken_annotations_name_file_and_place(tmp_path, content, message):
    path = tmp_path / 'broken.xml'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_voc(path)
    assert str(path) in str(caught.value)


def test_truncated_wheel_is_named(folder, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        file.writestr('a', b'0' * 100)
    wheel = tmp_path / 'half.whl'
    wheel.write_bytes(buffer.getvalue()[:60])
    with pytest.raises(ValueError, match='cannot be read as a wheel'):
        prepare(folder, tmp_path / 'trees', source=wheel)


def test_failing_pip_says_what_to_do(tmp_path, monkeypatch):
    def pip(command, **settings):
        assert command[-1] == 'deepforest==2.1.0'
        assert '--no-deps' in command
        return subprocess.CompletedProcess(command, 1, '', 'no network')

    monkeypatch.setattr(sources.subprocess, 'run', pip)
    with pytest.raises(RuntimeError, match=r'--source.*no network'):
        sources.download('deepforest==2.1.0', tmp_path)


def test_wheel_at_hand_is_not_downloaded_again(tmp_path, monkeypatch):
    wheel = tmp_path / 'deepforest-2.1.0-py3-none-any.whl'
    wheel.touch()
    monkeypatch.setattr(sources.subprocess, 'run', None)
    assert sources.download('deepforest==2.1.0', tmp_path) == wheel


@pytest.mark.parametrize('change', ['content', 'more', None])
def test_another_wheel_than_recorded_is_removed(change, tmp_path):
    wheel = tmp_path / 'a-1-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as file:
        file.writestr('a.txt', 'content')
    data = wheel.read_bytes()
    recorded = sources.Recorded(hashlib.sha256(data).hexdigest(), len(data))
    content = hashlib.sha256(b'content').hexdigest()
    if change == 'content':
        wheel.write_bytes(data.replace(b'content', b'comment'))
    elif change == 'more':
        wheel.write_bytes(data + b'x')
    arguments = ({'a.txt': content}, None, 'a==1', tmp_path, None, recorded)
    if change is None:
        assert sources.gather(*arguments) == {'a.txt': b'content'}
        return
    with pytest.raises(ValueError, match='not what was recorded.*removed'):
        sources.gather(*arguments)
    assert not wheel.exists()


def test_every_recorded_file_has_a_size():
    assert trees.SIZE.keys() == trees.SHA256.keys()
    assert sum(trees.SIZE.values()) < 2**25


def test_command_reports_a_missing_source(tmp_path, capsys):
    out = tmp_path / 'trees'
    arguments = ['trees', '--out', str(out), '--source', str(tmp_path / 'no')]
    assert main(arguments) == 1
    assert 'There is no --source' in capsys.readouterr().err
    assert not out.exists()


def test_card_is_the_last_file_and_holds_what_decides(folder, tmp_path):
    card, _ = prepare(folder, tmp_path / 'trees')
    assert card == json.loads((tmp_path / 'trees' / CARD).read_text())
    assert card['recipe']['sha256'] == digests(folder)
    assert card['recipe']['tile'] == 20
    assert set(card['versions']) == {'mmkd', 'python', 'numpy', 'opencv'}


@pytest.fixture
def blood(tmp_path):
    """Three photographs in the folders of BCCD, one a split."""
    folder = tmp_path / 'BCCD'
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    boxes = [('RBC', (1, 2, 11, 22)), ('WBC', (5, 5, 5, 5))]
    for split in ('train', 'val', 'test'):
        (folder / 'Annotations' / f'{split}.xml').write_bytes(
            voc([*boxes, ('Platelets', (50, 30, 60, 40))])
        )
        image = str(folder / 'JPEGImages' / f'{split}.jpg')
        cv2.imwrite(image, photograph())
        listed = folder / 'ImageSets' / 'Main' / f'{split}.txt'
        listed.write_text(f'{split}\n')
    return folder


def test_blood_cells_keep_their_splits_classes_and_bytes(blood, tmp_path):
    out = tmp_path / 'out'
    card = prepare_bccd(out, blood.parent, say=list, sha256=None)
    assert card['dropped'] == dict(zero_size=3, outside=0)
    assert card['splits']['val']['boxes_by_class'] == dict(
        RBC=1, WBC=0, Platelets=1
    )
    coco = json.loads((out / 'val.json').read_text())
    assert [
        (one['category_id'], one['bbox']) for one in coco['annotations']
    ] == [(1, [1, 2, 10, 20]), (3, [50, 30, 10, 10])]
    for split in card['splits']:
        copied = (out / split / f'{split}.jpg').read_bytes()
        original = blood / 'JPEGImages' / f'{split}.jpg'
        assert copied == original.read_bytes()


def test_blood_cells_of_another_source_are_refused(blood, tmp_path):
    with pytest.raises(ValueError, match='are not those of Shenggan'):
        prepare_bccd(tmp_path / 'out', blood, say=list)
    (blood / 'JPEGImages' / 'val.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r"no file 'val\.jpg'"):
        prepare_bccd(tmp_path / 'out', blood, say=list, sha256=None)
    with pytest.raises(FileNotFoundError, match='has no folder Annotations'):
        prepare_bccd(tmp_path / 'out', tmp_path / 'none', say=list)


def test_blood_cells_without_a_source_say_where_to_get_them(tmp_path, capsys):
    assert main(['bccd', '--out', str(tmp_path / 'out')]) == 1
    assert '--source' in capsys.readouterr().err


def test_the_published_blood_cells_have_their_known_numbers(tmp_path):
    source = Path(__file__).parents[3] / 'shared' / 'data' / 'bccd'
    if not source.is_dir():
        pytest.skip(f'{source} is not there')
    card = prepare_bccd(tmp_path / 'out', source, say=list)
    splits = card['splits']
    assert [splits[name]['images'] for name in splits] == [205, 87, 72]
    boxes = [splits[name]['boxes_by_class'] for name in splits]
    totals = [sum(one[name] for one in boxes) for name in CLASSES]
    assert sum(totals) + card['dropped']['zero_size'] == 4888
    assert card['dropped'] == dict(zero_size=2, outside=0)

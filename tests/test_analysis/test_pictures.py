import matplotlib.colors
import mmcv
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmkd.analysis.pictures import (
    COLOURS,
    MOST_SCORES,
    attention_over,
    grid,
    instances,
    read_image,
    side_by_side,
)

GREY = np.full((60, 80, 3), 128, np.uint8)
BOX = [[20, 10, 60, 40]]
GAP, TITLE = 8, 30
NOTHING = ([], None, [])


def colour(label):
    return 255 * np.array(matplotlib.colors.to_rgb(COLOURS[label]))


def is_at(picture, x, y, label, reach=1):
    """Whether the label's colour is on the pixel or its neighbour."""
    near = picture[y - reach : y + reach + 1, x - reach : x + reach + 1]
    return (np.abs(near - colour(label)).max(-1) < 12).any()


def draw(tmp_path, cells, tile=400, classes=('cell', 'plate'), image=GREY):
    titles = [f'column {index}' for index in range(len(cells))]
    path = grid([(image, cells)], titles, tmp_path / 'a.png', classes, tile)
    return mmcv.imread(path, channel_order='rgb').astype(float)


def test_box_stands_where_its_corners_are(tmp_path):
    picture = draw(tmp_path, [(BOX, None, [1])])
    scale = 400 / 80
    left, right = (round(GAP + scale * x) for x in (20, 60))
    top, bottom = (round(TITLE + scale * y) for y in (10, 40))
    middle = (left + right) // 2, (top + bottom) // 2
    assert is_at(picture, left, middle[1], 1)
    assert is_at(picture, right, middle[1], 1)
    assert is_at(picture, middle[0], top, 1)
    assert is_at(picture, middle[0], bottom, 1)
    assert not is_at(picture, *middle, 1)
    assert not is_at(picture, left - 6, middle[1], 1)


def test_each_column_has_its_own_boxes(tmp_path):
    picture = draw(tmp_path, [NOTHING, (BOX, None, [0])])
    half = picture.shape[1] // 2
    drawn = np.abs(picture - colour(0)).max(-1) < 12
    assert not drawn[:, :half].any()
    assert drawn[:, half:].any()


@pytest.mark.parametrize('shape', [(48, 64), (64, 48), (480, 640)])
def test_tiles_have_the_size_asked_for(tmp_path, shape):
    image = np.full((*shape, 3), 128, np.uint8)
    picture = draw(tmp_path, [NOTHING, NOTHING], tile=320, image=image)
    height, width = (320 * side // max(shape) for side in shape)
    assert picture.shape[:2] == (TITLE + height + GAP, 3 * GAP + 2 * width)


def test_rows_may_differ_in_shape(tmp_path):
    rows = [(GREY, [NOTHING]), (GREY.transpose(1, 0, 2), [NOTHING])]
    path = grid(rows, ['one'], tmp_path / 'a.png', tile=320)
    picture = mmcv.imread(path)
    assert picture.shape[:2] == (TITLE + 240 + 320 + 2 * GAP, 320 + 2 * GAP)


def test_image_is_drawn_in_its_own_colours(tmp_path):
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    picture = draw(tmp_path, [NOTHING], image=red)
    assert picture[200, 200].tolist() == [200, 0, 0]


def test_a_class_keeps_its_colour_when_another_is_absent(tmp_path):
    picture = draw(tmp_path, [(BOX, None, [1])])
    drawn = np.abs(picture - colour(0)).max(-1) < 12
    assert not drawn.any()


def test_a_few_classes_share_a_legend_and_many_name_each_box(tmp_path):
    names = [f'thing {index}' for index in range(40)]
    boxes = [[2 * i, 10, 2 * i + 8, 20] for i in range(20)]
    few = draw(tmp_path, [(boxes, None, [0, 7] * 10)], classes=names)
    many = draw(tmp_path, [(boxes, None, range(20))], classes=names)
    assert few.shape[0] > many.shape[0]


def test_scores_are_left_out_where_they_would_hide_the_image(tmp_path):
    # The text's background fills what the box leaves open.
    def filled(count):
        many = BOX * count, np.full(count, 0.5), [0] * count
        picture = draw(tmp_path, [many])
        return (np.abs(picture - colour(0)).max(-1) < 12).sum()

    bare = draw(tmp_path, [(BOX, None, [0])])
    outline = (np.abs(bare - colour(0)).max(-1) < 12).sum()
    assert filled(MOST_SCORES + 1) < 1.2 * outline


def test_side_by_side_is_a_row_of_the_grid(tmp_path):
    cells = [(BOX, [0.9], [0]), (BOX, [0.5], [1])]
    one = side_by_side(
        GREY,
        [('column 0', *cells[0]), ('column 1', *cells[1])],
        ('cell', 'plate'),
        tmp_path / 'b.png',
        tile=400,
    )
    expected = draw(tmp_path, cells)
    np.testing.assert_array_equal(
        mmcv.imread(one, channel_order='rgb'), expected
    )


def test_a_label_without_a_name_is_a_number(tmp_path):
    assert draw(tmp_path, [(BOX * 2, None, [0, 5])], classes=('a',)).any()


def test_missing_folder_of_the_picture_is_made(tmp_path):
    path = grid([(GREY, [NOTHING])], ['a'], tmp_path / 'new' / 'a.png')
    assert path.is_file()


def test_row_with_too_few_columns_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='Row 1 has boxes for 1 columns'):
        grid([(GREY, [NOTHING] * 2), (GREY, [NOTHING])], ['a', 'b'], tmp_path)


def test_boxes_without_labels_are_an_error(tmp_path):
    with pytest.raises(ValueError, match='1 boxes and 0 labels'):
        draw(tmp_path, [(BOX, None, [])])


def test_instances_below_the_threshold_are_left_out():
    found = InstanceData(
        bboxes=torch.arange(12.0).view(3, 4),
        scores=torch.tensor([0.2, 0.3, 0.9]),
        labels=torch.tensor([0, 1, 2]),
    )
    sample = DetDataSample(pred_instances=found)
    for one in (sample, found):
        boxes, scores, labels = instances(one, 0.3)
        assert boxes.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
        np.testing.assert_allclose(scores, [0.3, 0.9])
        assert labels.tolist() == [1, 2]


def test_instances_of_an_annotation_have_no_scores():
    known = InstanceData(
        bboxes=torch.zeros(2, 4), labels=torch.zeros(2, dtype=torch.long)
    )
    boxes, scores, _ = instances(known, 0.5)
    assert boxes.shape == (2, 4)
    assert scores is None


def test_file_that_is_no_image_is_an_error(tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_text('no image')
    with pytest.raises(ValueError, match='8 bytes is no image'):
        read_image(path)


def test_attention_is_brightest_where_the_map_is_strong():
    feature = torch.zeros(4, 4, 4)
    feature[:, 3, 0] = -1.0  # the sign does not matter
    image = attention_over(np.zeros((64, 64, 3), np.uint8), feature, 1.0)
    brightness = image.sum(-1)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert y >= 48
    assert x < 16


def test_attention_without_strength_is_the_image():
    feature = torch.rand(4, 4, 4)
    np.testing.assert_array_equal(attention_over(GREY, feature, 0.0), GREY)


def test_flat_attention_is_defined():
    assert attention_over(GREY, torch.ones(2, 4, 4)).shape == GREY.shape

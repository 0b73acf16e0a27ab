import hashlib
import json
import math
from collections import Counter

import cv2
import numpy as np
import pytest

from mmkd.datasets.coco import CocoWriter
from mmkd.datasets.prepare import main
from mmkd.datasets.shapes import (
    CLASSES,
    COLOURS,
    DISTRACTORS,
    HINTED,
    RADII,
    Dice,
    Shape,
    _colour,
    annotate,
    compose,
    draw_scene,
    prepare_shapes,
)

SIZE = 96
FEW = dict(train=3, val=2, test=2)


def scene(number=0, seed=0, split=0, size=SIZE):
    return draw_scene((seed, split, number), size)


def prepare(out, **settings):
    said = []
    settings = dict(size=SIZE, counts=FEW) | settings
    return prepare_shapes(out, say=said.append, **settings), said


def files(out):
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob('*'))
        if path.is_file()
    }


# ------------------------------------------------------------------- forms

#: Corners of the polygons: distance from the centre, and degrees. The inner
#: corners of a star lie where the lines between its outer ones cross.
INNER = math.cos(math.radians(72)) / math.cos(math.radians(36))
CORNERS = dict(
    square=[(1, 45 + 90 * k) for k in range(4)],
    triangle=[(1, 90 + 120 * k) for k in range(3)],
    star=[((1, INNER)[k % 2], 36 * k - 90) for k in range(10)],
)


def holds(form, x, y):
    """Whether the form on the unit circle holds a point, said otherwise."""
    if form in CORNERS:
        return in_polygon(x, y, CORNERS[form])
    if form == 'plus':
        upright = abs(x) <= 0.3 and abs(y) <= 0.95
        return upright or (abs(y) <= 0.3 and abs(x) <= 0.95)
    bitten = form == 'crescent' and math.hypot(x - 0.5, y) <= 0.8
    return math.hypot(x, y) <= 1 and not bitten


def in_polygon(x, y, corners):
    """By the number of edges that a ray to the right meets."""
    points = [
        (far * math.cos(math.radians(a)), far * math.sin(math.radians(a)))
        for far, a in corners
    ]
    inside = False
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            inside = not inside
    return inside


def pixels_of(shape):
    """Pixels whose centre, turned back and scaled, lies in the form."""
    angle = math.atan2(shape.turn[1], shape.turn[0])
    found = set()
    for row in range(SIZE):
        for column in range(SIZE):
            far = math.hypot(column + 0.5 - shape.x, row + 0.5 - shape.y)
            way = math.atan2(row + 0.5 - shape.y, column + 0.5 - shape.x)
            u = far * math.cos(way - angle) / (shape.radius * shape.stretch)
            v = far * math.sin(way - angle) * shape.stretch / shape.radius
            if holds(shape.form, u, v):
                found.add((row, column))
    return found


def extent(pixels):
    rows, columns = zip(*pixels)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


@pytest.mark.parametrize('form', CLASSES)
def test_a_box_is_the_extent_of_the_drawn_pixels(form):
    # Irregular numbers, so that no centre of a pixel lies on an edge.
    for angle in (0.123, 1.234, 4.321):
        turn = (math.cos(angle), math.sin(angle))
        shape = Shape(form, 40.37, 51.83, 17.19, turn, 1.071)
        boxes, labels, ignored = annotate([shape], SIZE)
        assert boxes.tolist() == [extent(pixels_of(shape))]
        assert labels == [CLASSES.index(form)]
        assert ignored.tolist() == [False]


@pytest.mark.parametrize('form', CLASSES)
def test_a_mask_has_the_pixels_of_its_form(form):
    shape = Shape(form, 40.37, 51.83, 11.19, (0.8, 0.6), 0.913)
    left, top, mask = shape.mask()
    rows, columns = np.nonzero(mask)
    drawn = set(zip((rows + top).tolist(), (columns + left).tolist()))
    assert drawn == pixels_of(shape)


def test_a_disc_at_the_border_is_cut_and_ignored_when_mostly_outside():
    half = Shape('disc', 0.7, 40.3, 10.1)
    boxes, _, ignored = annotate([half], SIZE)
    assert boxes.tolist() == [extent(pixels_of(half))]
    assert boxes[0, 0] == 0
    assert ignored.tolist() == [False]
    most = Shape('disc', -0.7, 40.3, 10.1)
    assert annotate([most], SIZE)[2].tolist() == [True]


@pytest.mark.parametrize(('x', 'hidden'), [(52.2, False), (43.2, True)])
def test_a_shape_that_others_hide_is_ignored_and_keeps_its_box(x, hidden):
    behind = Shape('disc', 40.2, 40.3, 10.1)
    front = Shape('square', x, 40.3, 14.2)
    boxes, _, ignored = annotate([behind, front], SIZE)
    whole = pixels_of(behind)
    assert (len(whole - pixels_of(front)) < len(whole) / 2) == hidden
    assert boxes[0].tolist() == extent(whole)
    assert ignored.tolist() == [hidden, False]


def test_a_shape_of_which_nothing_is_visible_has_no_box():
    behind = Shape('plus', 40.2, 40.3, 8.1)
    front = Shape('square', 40.2, 40.3, 20.2)
    outside = Shape('disc', -30.0, 40.3, 8.1)
    _, labels, _ = annotate([behind, front, outside], SIZE)
    assert labels == [CLASSES.index('square')]


def test_a_crowd_is_one_ignored_box_around_its_members():
    members = [
        Shape('star', x, y, 7.3, crowd=True)
        for x, y in [(30.2, 40.3), (38.4, 45.1), (35.3, 52.9)]
    ]
    single = Shape('star', 70.2, 20.3, 7.3)
    boxes, labels, ignored = annotate([*members, single], SIZE)
    union = set().union(*map(pixels_of, members))
    assert boxes.tolist() == [extent(pixels_of(single)), extent(union)]
    assert labels == [CLASSES.index('star')] * 2
    assert ignored.tolist() == [False, True]


def test_what_resembles_a_class_has_no_box():
    shapes = [Shape(form, 40.2, 40.3, 9.0) for form in DISTRACTORS]
    assert annotate(shapes, SIZE)[1] == []


# ------------------------------------------------------------------- drawing


def test_the_same_key_draws_the_same_picture():
    one, other = scene(5), scene(5)
    assert np.array_equal(one.image, other.image)
    assert np.array_equal(one.boxes, other.boxes)
    assert one.labels == other.labels


@pytest.mark.parametrize(
    'other', [dict(seed=1), dict(split=1), dict(number=1)]
)
def test_another_seed_split_or_number_draws_another_picture(other):
    one, two = scene(), scene(**other)
    # Not a shifted copy or a changed corner: hardly a pixel stays.
    assert (one.image == two.image).all(-1).mean() < 0.02


def test_pictures_are_those_that_published_numbers_refer_to():
    """A change here takes a new ``DRAWING``, and makes results of old void.

    That of drawing 1 was the same with numpy 1.26 and 2.4, with and without
    the vector instructions of the processor.
    """
    digest = hashlib.sha256()
    for number in range(20):
        one = scene(number, size=128)
        digest.update(one.image.tobytes() + one.boxes.tobytes())
        digest.update(bytes(one.labels) + one.ignored.tobytes())
    assert digest.hexdigest()[:16] == '7ad43dba7936159f'


def test_dice_are_uniform_and_directions_have_length_one():
    dice = Dice((1, 2, 3))
    numbers = dice.field(200, 200)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # The mean of n uniform numbers deviates by 1 / sqrt(12 n).
    assert abs(numbers.mean() - 0.5) < 4 / math.sqrt(12 * numbers.size)
    counts = np.bincount([dice.below(6) for _ in range(6000)], minlength=6)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 4 * math.sqrt(1000)
    angles = [math.atan2(*dice.direction()) for _ in range(4000)]
    assert abs(np.exp(4j * np.array(angles)).mean()) < 4 / math.sqrt(4000)
    assert math.hypot(*dice.direction()) == pytest.approx(1)


def test_boxes_lie_in_the_image_and_labels_among_the_classes():
    for number in range(60):
        one = scene(number)
        assert one.image.shape == (SIZE, SIZE, 3)
        assert one.image.dtype == np.uint8
        assert len(one.boxes) == len(one.labels) == len(one.ignored)
        assert (one.boxes >= 0).all()
        assert (one.boxes <= SIZE).all()
        assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
        assert set(one.labels) <= set(range(len(CLASSES)))


@pytest.fixture(scope='module')
def many():
    """What 600 pictures show, not drawn."""
    return [
        (shapes, *annotate(shapes, 128))
        for shapes in (compose(Dice((0, 0, n)), 128) for n in range(600))
    ]


def test_classes_are_equally_frequent_and_sizes_small_and_medium(many):
    labels = [
        label
        for _, _, labels, ignored in many
        for label, skip in zip(labels, ignored)
        if not skip
    ]
    share = np.bincount(labels, minlength=len(CLASSES)) / len(labels)
    assert (abs(share - 1 / len(CLASSES)) < 0.04).all()
    boxes = np.concatenate([boxes[~ignored] for _, boxes, _, ignored in many])
    sides = boxes[:, 2:] - boxes[:, :2]
    medium = sides.prod(1) >= 32**2
    assert 0.15 < medium.mean() < 0.5
    assert np.quantile(sides.max(1), 0.01) >= 8
    assert sides.max() <= 2 * RADII[-1] * 1.14 + 1


def test_empty_images_clusters_crowds_and_hidden_shapes_occur(many):
    empty = np.mean([len(labels) == 0 for _, _, labels, _ in many])
    # Three deviations of a share of 8 % among 600.
    assert abs(empty - 0.08) < 3 * math.sqrt(0.08 * 0.92 / 600)
    crowds = [any(one.crowd for one in shapes) for shapes, *_ in many]
    assert 0.04 < np.mean(crowds) < 0.12
    hidden = sum(
        ignored.sum() - crowd
        for (_, _, _, ignored), crowd in zip(many, crowds)
    )
    assert hidden > 30
    # A cluster that is counted: six or more of one class among the boxes.
    assert any(
        max(np.bincount(labels, minlength=1)) >= 6 for _, _, labels, _ in many
    )


def test_a_colour_is_a_hint_and_no_proof():
    """Of a class's shapes about three in four have its colour, and of what
    is no class as many have some class's."""
    hits, tries = Counter(), Counter()
    for number in range(400):
        dice = Dice((1, 0, number))
        pixels = np.full((9, 3), 128.0)
        for form in (*CLASSES, *DISTRACTORS):
            colour = _colour(dice, form, pixels)
            near = {
                name: abs(colour - np.array(known)).max()
                for name, known in COLOURS.items()
            }
            nearest = min(near, key=near.get)
            tries[form] += 1
            hits[form] += near[nearest] <= 30 and form in (
                nearest,
                *DISTRACTORS,
            )
    for form in tries:
        # Four deviations; a few of any colour are near one by chance.
        error = 4 * math.sqrt(HINTED * (1 - HINTED) / tries[form])
        share = hits[form] / tries[form]
        assert HINTED - error < share < HINTED + error + 0.05, form


def test_place_and_size_do_not_give_the_class_away(many):
    found = {form: [] for form in CLASSES}
    for shapes, *_ in many:
        # One of a class in an image, as those of a cluster are of a kind.
        for form, shape in {one.form: one for one in shapes}.items():
            if form in found:
                found[form].append((shape.x, shape.y, shape.radius))
    everything = np.concatenate(list(found.values()))
    for one in found.values():
        error = everything.std(0) / math.sqrt(len(one))
        off = abs(np.mean(one, axis=0) - everything.mean(0))
        assert (off < 4 * error).all()


# ------------------------------------------------------------------- data set


def test_the_set_holds_the_pictures_boxes_and_crowds_that_are_drawn(tmp_path):
    card, _ = prepare(tmp_path / 'a', counts=dict(train=12))
    content = json.loads((tmp_path / 'a' / 'train.json').read_text())
    for number, entry in enumerate(content['images']):
        drawn = scene(number)
        path = tmp_path / 'a' / 'train' / entry['file_name']
        assert np.array_equal(cv2.imread(str(path)), drawn.image)
        written = [
            (one['bbox'], one['category_id'] - 1, one['iscrowd'])
            for one in content['annotations']
            if one['image_id'] == entry['id']
        ]
        assert written == [
            ([x1, y1, x2 - x1, y2 - y1], label, int(skip))
            for (x1, y1, x2, y2), label, skip in zip(
                drawn.boxes.tolist(), drawn.labels, drawn.ignored
            )
        ]
    assert card['classes'] == list(CLASSES)
    assert card['splits'].keys() == {'train'}


def test_the_same_seed_gives_the_same_files_and_another_others(tmp_path):
    prepare(tmp_path / 'a')
    prepare(tmp_path / 'b')
    prepare(tmp_path / 'c', seed=1)
    assert files(tmp_path / 'a') == files(tmp_path / 'b')
    one, other = files(tmp_path / 'a'), files(tmp_path / 'c')
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_more_images_of_one_split_change_no_other(tmp_path):
    prepare(tmp_path / 'a')
    prepare(tmp_path / 'b', counts=dict(train=5, val=2, test=2))
    one, other = files(tmp_path / 'a'), files(tmp_path / 'b')
    told = {'card.json', 'train.json'}
    assert all(one[name] == other[name] for name in one.keys() - told)
    assert len(other) == len(one) + 2


def test_no_picture_stands_in_two_splits(tmp_path):
    prepare(tmp_path / 'a', counts=dict(train=10, val=10, test=10))
    pictures = [
        data
        for name, data in files(tmp_path / 'a').items()
        if name.endswith('.png')
    ]
    assert len(set(pictures)) == len(pictures) == 30


def test_a_second_call_does_nothing_and_other_settings_are_refused(tmp_path):
    card, _ = prepare(tmp_path / 'a')
    before = files(tmp_path / 'a')
    assert prepare(tmp_path / 'a') == (
        card,
        [f'{tmp_path / "a"}: done before'],
    )
    with pytest.raises(FileExistsError, match='differs in seed'):
        prepare(tmp_path / 'a', seed=1)
    assert files(tmp_path / 'a') == before


def test_a_call_broken_off_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    prepare(tmp_path / 'whole')
    add, written = CocoWriter.add, []

    def fails(self, *arguments, **settings):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(add(self, *arguments, **settings))

    monkeypatch.setattr(CocoWriter, 'add', fails)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / 'a')
    monkeypatch.undo()
    prepare(tmp_path / 'a')
    assert files(tmp_path / 'a') == files(tmp_path / 'whole')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(counts=dict(tain=3)), "no split 'tain'.*mean 'train'"),
        (dict(counts=dict(train=-1)), 'none below 0'),
        (dict(counts=dict(train=0)), 'at least one image'),
        (dict(size=40), 'size >= 70.*got size=40'),
        (dict(seed=-1), 'seed >= 0.*seed=-1'),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(
    settings, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / 'a', **settings)
    assert not list(tmp_path.iterdir())


def test_the_command_draws_what_it_is_asked(tmp_path, capsys):
    out = str(tmp_path / 'a')
    words = ['shapes', '--out', out, '--size', '96', '--train', '2']
    assert main([*words, '--val', '1', '--test', '0', '--seed', '3']) == 0
    assert 'train, 2 images' in capsys.readouterr().out
    drawn = scene(seed=3).image
    path = tmp_path / 'a' / 'train' / '00000.png'
    assert np.array_equal(cv2.imread(str(path)), drawn)
    assert not (tmp_path / 'a' / 'test').exists()
    assert main(['shapes', '--out', out, '--size', '8']) == 1
    assert 'size >= 70' in capsys.readouterr().err

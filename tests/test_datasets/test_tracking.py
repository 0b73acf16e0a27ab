import copy
import pickle

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed

from mmkd.datasets.tracking import (
    LoadPredictions,
    Part,
    TrackedBoxes,
    check_upright,
    moved,
)
from mmkd.store import PREDICTIONS, Store

HEIGHT, WIDTH = 96, 128
#: Where a spot is, and its colour; far from each other and the border.
SPOTS = {
    (28, 30): (250, 20, 20),
    (92, 28): (20, 250, 20),
    (30, 70): (20, 20, 250),
    (96, 66): (250, 250, 20),
}
PIPELINES = {
    'nothing': [],
    'flip': [dict(type='RandomFlip', prob=1.0)],
    'vertical': [dict(type='RandomFlip', prob=1.0, direction='vertical')],
    'diagonal': [dict(type='RandomFlip', prob=1.0, direction='diagonal')],
    'resize': [dict(type='Resize', scale=(200, 300), keep_ratio=True)],
    'stretch': [dict(type='Resize', scale=(200, 96), keep_ratio=False)],
    'crop': [dict(type='RandomCrop', crop_size=(60, 80))],
    'iou crop': [dict(type='MinIoURandomCrop')],
    'expand': [dict(type='Expand', prob=1.0)],
    'shift': [dict(type='RandomShift', prob=1.0, max_shift_px=20)],
    'affine': [
        dict(type='RandomAffine', max_rotate_degree=20, border=(-8, -8))
    ],
    'rotate': [dict(type='Rotate', prob=1.0, level=5)],
    'shear': [dict(type='ShearX', prob=1.0, level=5)],
    'translate': [dict(type='TranslateY', prob=1.0, level=3)],
    'pad': [dict(type='Pad', size=(200, 160))],
    'mosaic': [dict(type='CachedMosaic', img_scale=(HEIGHT, WIDTH))],
    'mixup': [dict(type='CachedMixUp', img_scale=(HEIGHT, WIDTH))],
    'rtmdet': [
        dict(type='CachedMosaic', img_scale=(160, 160), pad_val=0.0),
        dict(
            type='RandomResize',
            scale=(320, 320),
            ratio_range=(0.5, 2.0),
            keep_ratio=True,
        ),
        dict(type='RandomCrop', crop_size=(160, 160)),
        dict(type='RandomFlip', prob=0.5),
        dict(type='Pad', size=(160, 160)),
    ],
}


def results(image_id=0, annotated=True, turn=0):
    """An image of spots whose order of colours says which image it is."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colours = list(SPOTS.values())
    colours = colours[turn:] + colours[:turn]
    for (x, y), colour in zip(SPOTS, colours):
        cv2.rectangle(picture, (x - 9, y - 9), (x + 9, y + 9), colour, -1)
    found = dict(
        img=picture,
        img_id=image_id,
        img_path='',
        img_shape=(HEIGHT, WIDTH),
        ori_shape=(HEIGHT, WIDTH),
        height=HEIGHT,
        width=WIDTH,
    )
    if annotated:
        centres = np.array(list(SPOTS), np.float32)
        found.update(
            gt_bboxes=HorizontalBoxes(
                np.concatenate([centres - 9, centres + 9], 1)
            ),
            gt_bboxes_labels=np.arange(4),
            gt_ignore_flags=np.zeros(4, bool),
        )
    return found, colours


def predictions():
    centres = torch.tensor(list(SPOTS), dtype=torch.float32)
    return dict(
        points=centres,
        strides=torch.full((4,), 8.0),
        bboxes=torch.cat([centres - 9, centres + 9], 1),
        labels=torch.arange(8).view(4, 2).short(),
        logits=torch.randn(4, 2).half(),
    )


def build(*transforms):
    init_default_scope('mmdet')
    init = dict(type='mmkd.TrackPixels')
    return Compose(
        [TRANSFORMS.build(one) for one in (init, *transforms)],
    )


@pytest.mark.parametrize('name', PIPELINES)
def test_points_are_where_their_pixels_are(name):
    """The picture itself says where a point went."""
    pipeline = build(*PIPELINES[name])
    set_random_seed(0)
    seen = sources = 0
    for turn in range(12):
        given, colours = results(turn % 4, turn=turn % 4)
        found = pipeline(copy.deepcopy(given))
        if found is None:
            continue
        height, width = found['img'].shape[:2]
        parts = found['gt_bboxes'].parts
        sources = max(sources, len(parts))
        for part in parts:
            _, colours = results(turn=part.image)
            where = moved(
                dict(predictions(), labels=torch.arange(4)[:, None]),
                part.matrix,
                (height, width),
            )
            for (x, y), number in zip(
                where.points.tolist(), where.labels[:, 0].tolist()
            ):
                if min(x, y, width - x, height - y) < 2:
                    continue
                pixel = found['img'][int(y), int(x)].astype(int)
                if name in ('mixup', 'translate', 'rotate', 'shear'):
                    wanted = np.array(colours[number]) > 100
                    assert (pixel > 60)[wanted].all(), (name, x, y)
                else:
                    assert abs(pixel - colours[number]).max() < 40, (name, x)
                seen += 1
    assert seen > 12
    assert (sources > 1) == (name in ('mosaic', 'mixup', 'rtmdet'))


@pytest.mark.parametrize('name', PIPELINES)
def test_boxes_move_as_those_that_are_annotated(name):
    """MMDetection's own boxes, of the same corners, are at the same place."""
    pipeline = build(*PIPELINES[name])
    set_random_seed(1)
    compared = 0
    for turn in range(8):
        given, _ = results(turn)
        found = pipeline(given)
        if found is None:
            continue
        size = found['img'].shape[:2]
        moved_boxes = torch.cat(
            [
                moved(predictions(), part.matrix, size).bboxes
                for part in found['gt_bboxes'].parts
            ]
        )
        annotated = found['gt_bboxes'].clone()
        annotated.clip_(size)
        for box in annotated.tensor:
            inside = (box[:2] > 1).all() and box[2] < size[1] - 1
            if inside and box[3] < size[0] - 1:
                distance = (moved_boxes - box).abs().amax(1)
                # Rotations are rounded to boxes at each step there.
                assert distance.min() < 1.0
                compared += 1
    assert compared > 4


def test_decisions_of_the_pipeline_stay_those_of_its_annotations():
    """Bit for bit the image and boxes that it gives without."""
    for name, transforms in PIPELINES.items():
        plain = Compose([TRANSFORMS.build(one) for one in transforms])
        tracked = build(*transforms)
        for turn in range(4):
            ends = []
            for pipeline in (plain, tracked):
                set_random_seed(turn)
                ends.append(pipeline(results(turn)[0]))
            one, other = ends
            assert (one is None) == (other is None), name
            if one is not None:
                assert np.array_equal(one['img'], other['img']), name
                assert torch.equal(
                    one['gt_bboxes'].tensor, other['gt_bboxes'].tensor
                )


def test_a_cell_grows_with_its_pixels():
    matrix = np.diag([3.0, 0.75, 1])
    found = moved(predictions(), matrix, (999, 999))
    torch.testing.assert_close(found.strides, torch.full((4,), 12.0))


def test_what_left_the_image_is_dropped_and_what_is_cut_is_cut():
    matrix = np.eye(3)
    matrix[0, 2] = -29  # the spots at 28 are out, those at 30 just in
    found = moved(predictions(), matrix, (HEIGHT, WIDTH))
    assert found.points[:, 0].tolist() == [63, 1, 67]
    assert found.bboxes[1].tolist() == [0, 61, 10, 79]
    assert found.labels.tolist() == [[2, 3], [4, 5], [6, 7]]


def test_the_first_pixel_is_in_the_image_and_its_end_is_not():
    matrix = np.eye(3)
    matrix[:2, 2] = -28, -30
    found = moved(predictions(), matrix, (HEIGHT, 64))
    # Spots at 28, 30 and at 92, 28; 30, 70 and 96, 66.
    assert found.points.tolist() == [[0, 0], [2, 40]]
    matrix[:2, 2] = -28, 0
    for width, there in ((64, False), (65, True)):
        found = moved(predictions(), matrix, (HEIGHT, width))
        assert ([64, 28] in found.points.tolist()) is there


def test_points_in_perspective_are_divided_by_their_distance():
    """As OpenCV has it."""
    matrix = np.array([[1, 0.1, 5], [0.05, 1, 3], [1e-3, 2e-3, 1.1]])
    found = moved(predictions(), matrix, (HEIGHT, WIDTH))
    points = np.array(list(SPOTS), np.float32)[None]
    wanted = cv2.perspectiveTransform(points, matrix)[0]
    np.testing.assert_allclose(found.points, wanted, rtol=1e-5)


def distributed():
    """Predictions whose boxes are the means of their edges."""
    generator = torch.Generator().manual_seed(0)
    found = predictions()
    found['edges'] = torch.randn(4, 4, 5, generator=generator)
    found['origins'] = found['points'] - 4
    found['steps'] = torch.tensor([[8.0, 6.0]]).expand(4, 2)
    away = (found['edges'].softmax(2) * torch.arange(5)).sum(2)
    away = away * found['steps'].repeat(1, 2)
    low, high = found['origins'] - away[:, :2], found['origins'] + away[:, 2:]
    found['bboxes'] = torch.cat([low, high], 1)
    return found


TURNED = ('affine', 'rotate', 'shear')


@pytest.mark.parametrize('name', [one for one in PIPELINES if one != 'shift'])
def test_distributions_move_with_their_boxes(name):
    """Their means are the moved boxes, and bins stay as far apart."""
    pipeline = build(*PIPELINES[name])
    set_random_seed(2)
    said, seen = distributed(), 0
    for turn in range(8):
        found = pipeline(results(turn)[0])
        if found is None:
            continue
        size = found['img'].shape[:2]
        for part in found['gt_bboxes'].parts:
            if name in TURNED:
                with pytest.raises(ValueError, match='max_rotate_degree=0'):
                    check_upright(part.matrix, size)
                continue
            check_upright(part.matrix, size)
            here = moved(said, part.matrix, size, clip=False, edges=True)
            mean = (here.edges.softmax(2) * here.places).sum(2)
            torch.testing.assert_close(mean, here.bboxes, atol=1e-3, rtol=1e-4)
            steps = here.places.diff(dim=2)
            growth = torch.from_numpy(abs(np.diag(part.matrix)[:2])).float()
            wanted = growth * said['steps'][0] * torch.tensor([[-1], [1]])
            wanted = wanted.view(1, 4, 1).expand_as(steps)
            torch.testing.assert_close(steps, wanted, atol=1e-3, rtol=1e-4)
            seen += len(here)
    assert seen > 8 or name in TURNED


def test_in_a_mirror_left_is_right():
    said = distributed()
    flip = np.array([[-1.0, 0, WIDTH], [0, 1, 0], [0, 0, 1]])
    # A homography is the same times any number.
    here = moved(said, 2 * flip, (HEIGHT, WIDTH), clip=False, edges=True)
    assert torch.equal(here.edges, said['edges'][:, [2, 1, 0, 3]])
    x = said['origins'][:, 0]
    torch.testing.assert_close(here.places[:, 0, 0], WIDTH - x)
    torch.testing.assert_close(here.places[:, 0, 3], WIDTH - x - 3 * 8)
    torch.testing.assert_close(here.places[:, 2, 3], WIDTH - x + 3 * 8)


def test_after_a_quarter_turn_top_is_left():
    said = distributed()
    turn = np.array([[0, 1.0, 0], [-1.0, 0, WIDTH], [0, 0, 1]])
    check_upright(turn, (WIDTH, HEIGHT))
    here = moved(said, turn, (WIDTH, HEIGHT), clip=False, edges=True)
    assert torch.equal(here.edges, said['edges'][:, [1, 2, 3, 0]])
    mean = (here.edges.softmax(2) * here.places).sum(2)
    torch.testing.assert_close(mean, here.bboxes)


def test_bins_beyond_the_border_lie_on_it_where_boxes_are_cut():
    said = distributed()
    here = moved(said, np.eye(3), (HEIGHT, WIDTH), edges=True)
    assert here.places.min() == 0
    free = moved(said, np.eye(3), (HEIGHT, WIDTH), clip=False, edges=True)
    assert free.places.min() < 0
    limits = torch.tensor([WIDTH, HEIGHT] * 2)[:, None]
    wanted = free.places.clamp(min=0).minimum(limits)
    assert torch.equal(here.places, wanted)


@pytest.mark.parametrize('lean', ['rotation', 'shear', 'perspective'])
def test_what_leans_by_less_than_a_pixel_is_upright(lean):
    matrix = np.eye(3)
    place = dict(rotation=(0, 1), shear=(1, 0), perspective=(2, 0))[lean]
    for size, fine in ((1e-6, True), (1e-3, False)):
        matrix[place] = size / (WIDTH if lean == 'perspective' else 1)
        if fine:
            check_upright(matrix, (HEIGHT, WIDTH))
        else:
            with pytest.raises(ValueError, match='quarter turns'):
                check_upright(matrix, (HEIGHT, WIDTH))


@pytest.fixture
def folder(tmp_path):
    store = Store(tmp_path / 'said', 'test')
    about = dict(
        precision='fp32',
        taps=[PREDICTIONS],
        complete=True,
        classes=['a'],
        command='python tools/cache_predictions.py a.py',
    )
    store.begin(about, 2**20)
    for image in range(3):
        store.write(str(image).encode(), {PREDICTIONS: predictions()})
    store.close()
    return tmp_path / 'said'


def whole(folder, *transforms):
    return build(
        *transforms,
        dict(type='PackDetInputs'),
        dict(type='mmkd.LoadPredictions', folder=str(folder)),
    )


def test_a_sample_brings_its_predictions(folder):
    pipeline = whole(folder, dict(type='RandomFlip', prob=1.0))
    sample = pipeline(results(1)[0])['data_samples']
    found = sample.teacher_predictions
    wanted = WIDTH - predictions()['points'][:, 0]
    torch.testing.assert_close(found.points[:, 0], wanted)
    assert type(sample.gt_instances.bboxes) is HorizontalBoxes
    assert type(sample.ignored_instances.bboxes) is HorizontalBoxes
    assert found.logits.dtype == torch.float32
    assert sample.teacher_classes == ('a',)


def test_an_image_without_annotations_stays_one(folder):
    sample = whole(folder)(results(1, annotated=False)[0])['data_samples']
    assert len(sample.teacher_predictions) == 4
    assert 'gt_instances' not in sample


def test_an_image_without_objects_is_annotated(folder):
    given, _ = results(1)
    given.update(
        gt_bboxes=given['gt_bboxes'][:0],
        gt_bboxes_labels=np.zeros(0, int),
        gt_ignore_flags=np.zeros(0, bool),
    )
    sample = whole(folder)(given)['data_samples']
    assert len(sample.gt_instances.bboxes) == 0
    assert len(sample.teacher_predictions) == 4


def test_an_image_that_was_not_asked_about_is_told(folder):
    with pytest.raises(ValueError, match=r'on image 7\..*py a\.py'):
        whole(folder)(results(7)[0])


def test_where_track_was_lost_it_is_told(folder):
    class Loses:
        def __call__(self, given):
            given['gt_bboxes'] = HorizontalBoxes(given['gt_bboxes'].tensor)
            return given

    pipeline = whole(folder)
    pipeline.transforms.insert(1, Loses())
    with pytest.raises(ValueError, match=r'where the pixels of image 0 went'):
        pipeline(results()[0])


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'cache_predictions\.py'):
        LoadPredictions(tmp_path / 'none')


def test_turned_boxes_are_told_only_where_distributions_are_wanted(tmp_path):
    store = Store(tmp_path / 'said', 'test')
    about = dict(precision='fp32', taps=[PREDICTIONS], complete=True, edges=5)
    store.begin(about, 2**20)
    store.write(b'1', {PREDICTIONS: distributed()})
    store.close()
    rotate, flip = PIPELINES['rotate'], PIPELINES['flip']
    load = dict(type='mmkd.LoadPredictions', folder=str(tmp_path / 'said'))

    def sample(transforms, **more):
        pack = dict(type='PackDetInputs')
        pipeline = build(*transforms, pack, dict(load, **more))
        return pipeline(results(1)[0])['data_samples'].teacher_predictions

    assert 'edges' not in sample(rotate)
    with pytest.raises(ValueError, match=r'edge_weight=0 of Stored'):
        sample(rotate, edges=True)
    found = sample(flip, edges=True)
    assert found.places.shape == found.edges.shape == (4, 4, 5)


def test_it_can_be_sent_to_a_worker(folder):
    pipeline = whole(folder)
    again = pickle.loads(pickle.dumps(pipeline))
    assert len(again(results()[0])['data_samples'].teacher_predictions) == 4


@pytest.mark.parametrize(
    'change',
    [
        lambda boxes: boxes[[0]],
        lambda boxes: boxes.clone(),
        lambda boxes: copy.deepcopy(boxes),
        lambda boxes: boxes.detach(),
        lambda boxes: boxes.to(torch.float64),
        lambda boxes: boxes[np.zeros(4, bool)],
    ],
)
def test_what_is_made_of_them_remembers(change):
    boxes = TrackedBoxes(torch.rand(4, 4))
    boxes.parts = (Part(3, np.eye(3), True),)
    boxes.translate_([1, 2])
    found = change(boxes)
    assert isinstance(found, TrackedBoxes)
    (part,) = found.parts
    assert part.matrix[:2, 2].tolist() == [1, 2]
    found.translate_([5, 5])
    assert boxes.parts[0].matrix[:2, 2].tolist() == [1, 2]

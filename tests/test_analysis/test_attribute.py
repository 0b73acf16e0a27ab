"""The command that writes a teacher's attribution maps."""

import json
from argparse import Namespace

import cv2
import numpy as np
import pytest
import runs
import tiny
import torch
from mmengine.config import Config
from PIL import Image
from torchvision.ops import box_iou

from mmkd.analysis import attribute
from mmkd.analysis.attribute import (
    check_explainable,
    explain,
    look,
    main,
    objects,
    reduced,
    scorer,
)
from mmkd.datasets.attribution import LoadIGMap
from mmkd.ops.integrated_gradients import integrated_gradients
from mmkd.teachers import Teacher

IMAGES = 2
STEPS = 2


@pytest.fixture
def command(tmp_path):
    """Explains two pictures; returns the status, and the maps if any."""
    data = tmp_path / 'data'
    runs.write_coco(data, images=IMAGES)
    cfg = runs.config(data, tmp_path / 'run', validate=True)
    cfg.merge_from_dict(runs.evaluation(data, 'test'))
    cfg.model = tiny.retinanet()
    # Other pixels than those of the annotations.
    cfg.test_dataloader.dataset.pipeline[1].scale = (96, 96)
    cfg.dump(tmp_path / 'teacher.py')
    for number in range(2):
        tiny.save_teacher(
            tiny.retinanet(), tmp_path / f'{number}.pth', seed=number
        )
    out = tmp_path / 'maps'

    def command(*options, weights=0):
        status = main(
            [
                str(tmp_path / 'teacher.py'),
                str(tmp_path / f'{weights}.pth'),
                *('--out', str(out), '--steps', str(STEPS), *options),
            ]
        )
        return status, {one.name: one.read_bytes() for one in out.glob('*')}

    command.data, command.out, command.folder = data, out, tmp_path
    return command


def picture_of(folder, image):
    """A map, (h, w)."""
    return cv2.imread(str(folder / f'{image}.png'), cv2.IMREAD_UNCHANGED)


def literal(command, image):
    """The map of an image, written once more, point by point."""
    detector = tiny.build(tiny.retinanet()).eval()
    state = torch.load(command.folder / '0.pth')['state_dict']
    detector.load_state_dict(state)
    truth = json.loads((command.data / 'train.json').read_text())
    name = truth['images'][image]['file_name']
    pixels = np.array(Image.open(command.data / 'images' / name))
    pixels = cv2.resize(pixels, (96, 96)).astype(np.float32)  # RGB
    mean, std = (np.array(tiny.PIXELS[key]) for key in ('mean', 'std'))
    shown = torch.tensor((pixels - mean) / std).permute(2, 0, 1).float()

    def probabilities(images):
        scores, _ = detector.bbox_head(detector.extract_feat(images))
        return torch.cat(
            [one[0].permute(1, 2, 0).reshape(-1, 3) for one in scores]
        ).sigmoid()

    with torch.no_grad():
        _, offsets = detector.bbox_head(detector.extract_feat(shown[None]))
    priors = detector.bbox_head.prior_generator.grid_priors(
        [tuple(one.shape[-2:]) for one in offsets], device='cpu'
    )
    boxes = torch.cat(
        [
            detector.bbox_head.bbox_coder.decode(
                prior, one[0].permute(1, 2, 0).reshape(-1, 4)
            )
            for prior, one in zip(priors, offsets)
        ]
    )
    followed = []
    for one in truth['annotations']:
        if one['image_id'] != truth['images'][image]['id']:
            continue
        x, y, width, height = (1.5 * side for side in one['bbox'])
        label = one['category_id'] // 3
        overlap = box_iou(
            torch.tensor([[x, y, x + width, y + height]]), boxes
        )[0]
        fit = overlap * probabilities(shown[None])[:, label]
        followed.append((int(fit.argmax()), label))
    total = torch.zeros_like(shown)
    for step in range(STEPS):
        point = ((step + 0.5) / STEPS * shown).requires_grad_()
        probs = probabilities(point[None])
        sum(probs[place, label] for place, label in followed).backward()
        total += point.grad
    heat = (shown * total / STEPS).abs().sum(0).numpy()
    heat = cv2.resize(heat, (64, 64), interpolation=cv2.INTER_AREA)
    return 255 * heat / heat.max()


def test_every_image_has_its_own_map_by_its_id(command):
    status, files = command()
    assert status == 0
    assert set(files) == {'index.json', '0.png', '1.png'}
    index = json.loads(files['index.json'])
    assert index['complete']
    assert (index['steps'], index['baseline']) == (STEPS, 'zero')
    for image in range(IMAGES):
        found = picture_of(command.out, image)
        assert found.shape == (64, 64)
        assert found.dtype == np.uint8
        assert found.max() == 255
        assert np.abs(found - literal(command, image)).max() < 2
        other = picture_of(command.out, (image + 1) % IMAGES)
        assert np.abs(found.astype(float) - other).mean() > 2
    loaded = LoadIGMap(command.out)(dict(img_id=1, img_shape=(64, 64)))
    np.testing.assert_allclose(
        loaded['gt_seg_map'] * 255, picture_of(command.out, 1), atol=0.01
    )


def test_it_says_the_same_twice_and_goes_on_where_it_stopped(command):
    _, whole = command()
    index = json.loads(whole['index.json'])
    index['complete'] = False
    (command.out / 'index.json').write_text(json.dumps(index))
    (command.out / '1.png').unlink()
    (command.out / '0.png').write_bytes(b'kept')
    status, again = command()
    assert status == 0
    assert again.pop('0.png') == b'kept'
    assert again.items() <= whole.items()
    assert command('--overwrite') == (0, whole)
    (command.out / '0.png').write_bytes(b'kept')
    _, again = command('--overwrite-if-changed')
    assert again['0.png'] == b'kept'


def test_what_was_made_otherwise_is_not_replaced_unasked(command, capsys):
    _, before = command()
    status, after = command('--baseline', 'blur')
    assert status == 1
    assert after == before
    said = capsys.readouterr().err
    assert 'attribute.py would replace' in said
    assert 'baseline differ' in said
    assert '--overwrite' in said
    status, after = command('--baseline', 'blur', '--overwrite')
    assert status == 0
    assert all(after[one] != before[one] for one in before)


def test_other_weights_or_annotations_are_other_maps(command):
    _, before = command()
    assert command(weights=1)[0] == 1
    status, after = command('--overwrite-if-changed', weights=1)
    assert status == 0
    assert after['0.png'] != before['0.png']
    path = command.data / 'train.json'
    truth = json.loads(path.read_text())
    truth['annotations'][0]['bbox'][2] += 3
    path.write_text(json.dumps(truth))
    assert command(weights=1)[0] == 1


def test_files_of_another_origin_are_not_replaced_unasked(command, capsys):
    command.out.mkdir()
    (command.out / '1.png').write_bytes(b'mine')
    (command.out / 'note.txt').write_bytes(b'mine')
    status, files = command('--overwrite-if-changed')
    assert status == 1
    assert files == {'1.png': b'mine', 'note.txt': b'mine'}
    assert '--overwrite' in capsys.readouterr().err
    _, files = command('--overwrite')
    assert len(files) == IMAGES + 2
    assert files['note.txt'] == b'mine'
    assert files['1.png'] != b'mine'


def test_a_map_is_as_long_as_asked(command):
    command('--size', '16')
    assert picture_of(command.out, 0).shape == (16, 16)


def test_points_seen_at_once_change_no_map(command):
    _, before = command('--batch', '1')
    _, after = command('--batch', '2', '--overwrite')
    for image in range(IMAGES):
        one, other = (
            cv2.imdecode(np.frombuffer(files[f'{image}.png'], np.uint8), 0)
            for files in (before, after)
        )
        assert np.abs(one.astype(int) - other).max() <= 1


def test_wrong_use_is_told_before_anything_is_written(command, capsys):
    assert command('--steps', '0')[0] == 1
    assert '--steps of 1 or more' in capsys.readouterr().err
    assert command(weights=7)[0] == 1
    said = capsys.readouterr().err
    assert said.startswith('attribute.py expected')
    assert not command.out.exists()


# What is explained -----------------------------------------------------------


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    file = tmp_path_factory.mktemp('teacher') / '0.pth'
    tiny.save_teacher(tiny.retinanet(), file)
    teacher = Teacher(Config(dict(model=tiny.retinanet())), file)
    teacher.load()
    teacher.tap('bbox_head')
    return teacher


@pytest.fixture
def view():
    images, samples = tiny.batch()
    meta = samples[0].new(data={})
    gt = samples[0].gt_instances
    return images[0], meta, gt.bboxes, gt.labels


@pytest.mark.parametrize('objects', [3, 0])
def test_it_is_complete_on_a_detector(teacher, view, objects):
    """Half of the way: a network of random weights has many folds."""
    image, meta, boxes, labels = view
    score = scorer(teacher, image, meta, boxes[:objects], labels[:objects])
    found = integrated_gradients(score, image, image / 2, 128, 16).sum()
    with torch.no_grad():
        high, low = score(torch.stack([image, image / 2]))
    assert found.item() == pytest.approx((high - low).item(), rel=0.05)


@pytest.fixture
def said(monkeypatch):
    """A teacher of four predictions and two classes, brighter with images."""
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.5], [0.3, 0.7]])
    boxes = torch.tensor(
        [[0.0, 0, 9, 9], [0, 0, 10, 10], [40, 40, 60, 60], [42, 40, 60, 60]]
    )

    def look(_, images, __, grad=False):
        light = images.mean((1, 2, 3))[:, None, None]
        return probs * light, boxes.expand(len(images), 4, 4)

    monkeypatch.setattr(attribute, 'look', look)
    return probs


def explained(boxes, labels, topk=3):
    images = torch.ones(2, 3, 2, 2) * torch.tensor([1.0, 0.5]).reshape(
        -1, 1, 1, 1
    )
    score = scorer(None, images[0], None, boxes, torch.tensor(labels), topk)
    return score(images).tolist()


def test_an_object_is_followed_where_its_class_fits_best(said):
    """0.9 * 0.81 beats 0.4 * 1, but 0.6 * 1 beats 0.1 * 0.81."""
    box = torch.tensor([[0.0, 0, 10, 10]])
    assert explained(box, [0]) == pytest.approx([0.9, 0.45])
    assert explained(box, [1]) == pytest.approx([0.6, 0.3])


def test_objects_are_added(said):
    boxes = torch.tensor([[0.0, 0, 10, 10], [40, 40, 60, 60]])
    assert explained(boxes, [1, 1]) == pytest.approx([0.6 + 0.7, 0.65])


def test_an_object_that_no_prediction_meets_counts_nothing(said):
    boxes = torch.tensor([[0.0, 0, 10, 10], [80, 80, 90, 90]])
    assert explained(boxes, [1, 0]) == pytest.approx([0.6, 0.3])


def test_without_objects_the_largest_scores_are_followed(said):
    none = torch.zeros(0, 4)
    assert explained(none, []) == pytest.approx([0.9 + 0.7 + 0.6, 1.1])
    assert explained(none, [], topk=99)[0] == pytest.approx(said.sum().item())


def test_boxes_are_moved_as_the_image_was_and_ignored_ones_left_out():
    info = dict(
        instances=[
            dict(bbox=[1, 2, 3, 4], bbox_label=2, ignore_flag=0),
            dict(bbox=[1, 2, 3, 4], bbox_label=1, ignore_flag=1),
        ]
    )
    meta, image = Namespace(scale_factor=(2.0, 10.0)), torch.zeros(1)
    boxes, labels = objects(info, meta, image)
    assert boxes.tolist() == [[2, 20, 6, 40]]
    assert labels.tolist() == [2]
    boxes, labels = objects(dict(instances=[]), meta, image)
    assert (boxes.shape, labels.shape) == ((0, 4), (0,))


def test_softmax_scores_are_read_without_the_background(teacher, view):
    probs, corners = look(teacher, view[0][None], view[1])
    assert probs.shape[2] == tiny.CLASSES
    assert corners.shape == (*probs.shape[:2], 4)
    head = teacher.detector.bbox_head
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, 'use_sigmoid_cls', False)
        others, _ = look(teacher, view[0][None], view[1])
    logits = probs.logit()
    torch.testing.assert_close(others, logits.softmax(2)[..., :-1])


def test_a_map_has_the_proportions_of_its_image_and_ends_at_one():
    heat = np.zeros((80, 80), np.float32)
    heat[:40] = 3
    found = reduced(heat, (300, 600), 60)
    assert found.shape == (30, 60)
    assert (found[:14] == 1).all()
    assert not found[16:].any()
    assert reduced(heat, (30, 20), 60).shape == (30, 20)
    assert not reduced(0 * heat, (30, 20), 60).any()


def test_the_border_of_a_batch_is_not_part_of_the_map(teacher, view):
    """An image of 64 x 96 in a batch of 64 x 96, cut before it is reduced."""
    image = np.random.RandomState(0).randint(0, 256, (40, 70, 3), np.uint8)
    _, samples = tiny.batch(((40, 70),))
    data = dict(
        inputs=torch.from_numpy(image).permute(2, 0, 1),
        data_samples=samples[0].new(data={}),
    )
    info = dict(height=80, width=140, instances=[])

    class Images(list):
        def get_data_info(self, _):
            return info

    options = Namespace(steps=2, baseline='blur', topk=3, size=70, batch=4)
    found = explain(teacher, Images([data]), 0, options)
    assert found.shape == (40, 70)
    assert found.max() == 1
    assert (found > 0).mean() > 0.9


@pytest.mark.parametrize('kind', ['two stages', 'strange scores'])
def test_a_teacher_without_dense_scores_is_refused(kind):
    model = tiny.faster_rcnn() if kind == 'two stages' else tiny.retinanet()
    teacher = Teacher(Config(dict(model=model)))
    if kind != 'two stages':
        del teacher.detector.bbox_head.bbox_coder
    with pytest.raises(ValueError, match=r'one stage.*name a RetinaNet'):
        check_explainable(teacher)

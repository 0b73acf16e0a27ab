"""Each fault alone is found and named; a sound training passes silently."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch
from mmdet.models import RetinaNet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from scipy import ndimage
from torch import nn

from mmkd.analysis.checking import check
from mmkd.analysis.sheet import written
from mmkd.analysis.teacher_check import Seen, better, confused, evaluate
from mmkd.compat.checkpoint import sha256_of
from mmkd.datasets.photographs import with_photographs
from mmkd.engine.random_state import capture
from mmkd.registry import MODELS as OWN

quick_starts = runs.quick_starts


@MODELS.register_module()
class PaletteRetinaNet(RetinaNet):
    """Finds what is bright in one colour, in normalised pixels, and names it.

    So that a teacher of nearly perfect AP costs no training: objects of
    :func:`runs.write_coco` are as bright in the channel of their class.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.palette = nn.Parameter(torch.eye(3))

    def predict(self, images, samples, rescale=True):
        for image, sample in zip(images, samples):
            height, width = sample.img_shape
            boxes, labels = [], []
            seen = image[:, :height, :width].flatten(1)
            seen = (self.palette @ seen).view(3, height, width).numpy()
            for label, channel in enumerate(seen):
                for rows, columns in ndimage.find_objects(
                    ndimage.label(channel > 1)[0]
                ):
                    boxes.append(
                        [columns.start, rows.start, columns.stop, rows.stop]
                    )
                    labels.append(label)
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
                scores=torch.ones(len(boxes)),
                labels=torch.tensor(labels, dtype=torch.long),
            )
        return samples


@OWN.register_module()
class BrokenLoss(nn.Module):
    """Of a fault that a config can name."""

    def __init__(self, kind, loss_weight=1.0):
        super().__init__()
        self.kind, self.steps = kind, 0

    def forward(self, student, teacher, gt=None):
        self.steps += student.requires_grad
        if self.kind == 'second' and self.steps > 1:
            return student.square().mean()
        if self.kind == 'nan':
            return student.mean() * float('nan')
        if self.kind == 'detached':
            return (student.detach() - teacher).square().mean()
        return 0 * student.mean()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Data to train and to evaluate on, and the weights of a teacher."""
    train, val = (tmp_path_factory.mktemp(one) for one in ('train', 'val'))
    runs.write_coco(train, images=12, seed=4)
    runs.write_coco(val, images=64, seed=1)
    tiny.save_teacher(teacher_model(), train / 'teacher.pth', meta=meta())
    return train, val


def teacher_model(**pixels):
    model = tiny.retinanet(base=16)
    model.type = 'PaletteRetinaNet'
    model.data_preprocessor = dict(tiny.PIXELS, **pixels)
    return model


def meta(classes=runs.NAMES):
    return dict(dataset_meta=dict(classes=classes))


PKD = dict(
    type='mmkd.FeatureTerm',
    teacher='big',
    levels=(0, 1, 2),
    loss=dict(type='mmkd.PKDLoss', loss_weight=2.0),
)


def training(folders, file=None, teacher=None, **terms):
    """A sound training, but for what is said otherwise."""
    train, val = folders
    big = dict(
        config=dict(model=teacher or teacher_model()),
        checkpoint=str(file or train / 'teacher.pth'),
    )
    model = tiny.distilled(
        tiny.retinanet(), dict(big=big), terms or dict(pkd=PKD)
    )
    config = runs.config(train, train / 'never', model=model)
    config.merge_from_dict(runs.evaluation(val, 'val'))
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.serialize_data = False  # MMEngine's way takes longer
    return config


def broken(kind):
    return dict(PKD, loss=dict(type='mmkd.BrokenLoss', kind=kind))


def said(sheet, mark):
    return [f'{one}' for one in sheet.named(mark)]


def spoilt(file, folder, name, change):
    """A copy of a checkpoint of which one tensor is another."""
    content = torch.load(file)
    content['state_dict'][name] = change(content['state_dict'][name])
    path = folder / 'spoilt.pth'
    torch.save(content, path)
    return path


# A sound training ------------------------------------------------------------


@pytest.fixture(scope='module')
def sound(folders):
    return check(training(folders), 'sound.py', images=64, device='cpu')


def test_a_sound_training_passes_silently(sound):
    assert said(sound, 'fail') == said(sound, 'warn') == []
    assert sound.status() == sound.status(strict=True) == 0


def test_the_page_has_all_parts_and_fits_a_terminal(sound):
    titles = [one.title for one in sound.sections]
    assert titles == [
        'Files',
        'Data',
        'Model',
        "Teacher 'big'",
        'Pre-processing',
        'One step',
    ]
    lines = str(sound).splitlines()
    assert lines[-1].startswith('0 failures, 0 warnings in ')
    tables = [one for part in sound.sections for one in part.table]
    long = [
        one
        for one in lines
        if len(one) > 79 and one.strip() not in map(str.strip, tables)
    ]
    assert [one for one in long if ' ' in one.strip()] == []  # but paths


def test_the_page_counts_boxes_as_the_file_does(sound, folders):
    content = json.loads((folders[0] / 'train.json').read_text())
    facts = sound.sections[1].facts['train_dataloader.dataset']
    names = {one['id']: one['name'] for one in content['categories']}
    boxes = content['annotations']
    for name, count in facts['of_classes'].items():
        assert count == sum(names[one['category_id']] == name for one in boxes)
    small = sum(one['bbox'][2] * one['bbox'][3] < 32**2 for one in boxes)
    assert facts['of_sizes'] == dict(
        small=small, medium=len(boxes) - small, large=0
    )


def test_shares_of_loss_and_gradient_add_up(sound):
    pushes = sound.sections[-1].facts['pushes']
    assert [one['name'] for one in pushes] == ['detection', 'pkd']
    for key in ('share', 'part'):
        assert sum(one[key] for one in pushes) == pytest.approx(1)
    value = [one['value'] for one in pushes]
    assert pushes[1]['share'] == pytest.approx(value[1] / sum(value))


def test_a_good_teacher_is_believed(sound):
    facts = sound.sections[3].facts
    assert facts['ap'] > 80
    assert facts['ap_low'] < facts['ap'] < facts['ap_high'] <= 100
    assert (facts['images'], facts['objects']) == (64, 96)


def test_scripts_get_the_same_as_json(sound, tmp_path):
    written(sound, tmp_path / 'deep' / 'found.json')
    content = json.loads((tmp_path / 'deep' / 'found.json').read_text())
    assert content['verdict'] == 'note' or content['verdict'] == 'ok'
    assert [one['title'] for one in content['sections']] == [
        one.title for one in sound.sections
    ]


def test_nothing_is_left_behind(folders):
    before = sorted(folders[0].rglob('*')), capture()
    hub = MessageHub.get_current_instance()
    config = training(folders)
    text = config.pretty_text
    check(config, images=4, device='cpu')
    after = sorted(folders[0].rglob('*')), capture()
    assert runs.differences(before, after) == []
    assert MessageHub.get_current_instance() is hub
    assert config.pretty_text == text


def test_a_plain_student_is_checked_as_far_as_there_is_something(folders):
    config = training(folders)
    config.model = tiny.retinanet()
    sheet = check(config, device='cpu')
    assert sheet.status(strict=True) == 0
    assert "Teacher 'big'" not in [one.title for one in sheet.sections]
    (push,) = sheet.sections[-1].facts['pushes']
    assert push['gradient'] > 0


# Teachers --------------------------------------------------------------------


def evaluated(folders, **settings):
    return check(
        training(folders, **settings), images=64, device='cpu', data=False
    )


def test_a_key_that_nobody_reads_is_named(folders):
    config = training(folders)
    config.custom_hoks = []
    (warning,) = said(check(config, images=0, data=False), 'warn')
    assert warning.endswith("Did you mean 'custom_hooks'?")


def test_a_teacher_whose_file_was_changed_is_named_by_its_hash(
    folders, tmp_path
):
    """The zoos' files say in their names how their hash begins."""
    file = folders[0] / 'teacher.pth'
    right = tmp_path / f'net_20200131-{sha256_of(file)[:8]}.pth'
    shutil.copy(file, right)
    quick = dict(images=0, device='cpu', data=False)
    assert check(training(folders, right), **quick).status(strict=True) == 0
    changed = spoilt(
        file, tmp_path, 'neck.fpn_convs.0.conv.bias', lambda one: one + 1
    )
    changed.replace(right)
    sheet = check(training(folders, right), **quick)
    (warning,) = said(sheet, 'warn')
    assert 'teachers.big.checkpoint: the name' in warning
    assert sha256_of(right)[:8] in warning


def test_a_teacher_that_is_not_its_file_is_named_tensor_by_tensor(
    folders, monkeypatch
):
    """Something writes into it after it was loaded."""
    from mmkd.teachers import Teachers

    load = Teachers.load

    def touched(self):
        load(self)
        self['big'].detector.neck.fpn_convs[0].conv.bias.data += 1

    monkeypatch.setattr(Teachers, 'load', touched)
    sheet = check(training(folders), images=0, device='cpu', data=False)
    (failure,) = said(sheet, 'fail')
    assert '1 tensors are not those of' in failure
    assert 'neck.fpn_convs.0.conv.bias' in failure
    monkeypatch.undo()
    # Nor may one that is cut: all but what is written to is a second loading.
    config = cut(folders)
    monkeypatch.setattr(Teachers, 'load', touched)
    (failure,) = said(
        check(config, images=0, device='cpu', data=False), 'fail'
    )
    assert '1 tensors are not those of' in failure


def cut(folders):
    """A training whose teacher is cut to some classes, in another order."""
    config = training(folders)
    names = ('bar', None, 'disc')
    config.model.teachers.big.update(
        classes=names, config=dict(model=tiny.retinanet(base=16))
    )
    file = folders[0] / 'plain.pth'
    tiny.save_teacher(tiny.retinanet(base=16), file, meta=meta())
    config.model.teachers.big.checkpoint = str(file)
    return config


def test_a_teacher_that_is_cut_to_classes_is_its_file(folders):
    sheet = check(cut(folders), images=0, device='cpu', data=False)
    assert sheet.status(strict=True) == 0
    (text,) = [one for one in said(sheet, 'ok') if 'tensors are those' in one]
    # Of a class that is left out, the classifier's weight and bias.
    assert '2 of them cut or renamed' in text


def test_a_tensor_that_is_not_finite_is_named(folders, tmp_path):
    name = 'bbox_head.retina_cls.bias'
    file = spoilt(
        folders[0] / 'teacher.pth',
        tmp_path,
        name,
        lambda one: one * float('inf'),
    )
    sheet = check(training(folders, file), images=0, device='cpu', data=False)
    assert f'not finite: {name}' in said(sheet, 'fail')[0]


def test_a_teacher_that_finds_nothing_is_named(folders, tmp_path):
    file = spoilt(
        folders[0] / 'teacher.pth', tmp_path, 'palette', torch.zeros_like
    )
    sheet = evaluated(folders, file=file)
    (warning,) = said(sheet, 'warn')
    assert '0.0 AP on 64 images' in warning
    assert 'It detects next to nothing' in warning
    # What so few images allow: a part that is missed 96 times of 96.
    most = 100 * (1 - 0.01 ** (1 / 96))
    assert f'between 0.0 and {most:.1f}' in warning


def test_few_images_condemn_no_teacher(folders, tmp_path):
    file = spoilt(
        folders[0] / 'teacher.pth', tmp_path, 'palette', torch.zeros_like
    )
    sheet = check(training(folders, file), images=4, device='cpu', data=False)
    assert said(sheet, 'warn') == []


@pytest.mark.slow
def test_a_teacher_in_another_normalisation_is_named(folders):
    wrong = teacher_model(mean=[0.0] * 3, std=[1.0] * 3)
    sheet = evaluated(folders, teacher=wrong)
    (warning,) = said(sheet, 'warn')
    assert "Normalised by the student's it has" in warning
    assert 'mean=[123.675,116.28,103.53]' in warning
    (note,) = [one for one in said(sheet, 'note') if 'differ' in one]
    assert 'differ in mean, std;' in note


@pytest.mark.slow
def test_channels_in_another_order_are_named(folders):
    wrong = teacher_model(bgr_to_rgb=False)
    (warning,) = said(evaluated(folders, teacher=wrong), 'warn')
    assert 'bgr_to_rgb=True' in warning


def test_outputs_in_another_order_than_the_file_says_are_named(
    folders, tmp_path
):
    file = spoilt(
        folders[0] / 'teacher.pth',
        tmp_path,
        'palette',
        lambda one: one.roll(1, 0),
    )
    (warning,) = said(evaluated(folders, file=file), 'warn')
    assert 'calls them otherwise' in warning
    # Row 0 shows the last channel, as the palette was rolled.
    assert "stand for ('bar', 'disc', 'square')" in warning


def permuted_file(folders, tmp_path, classes):
    content = torch.load(folders[0] / 'teacher.pth')
    content['meta'] = meta(classes)
    content['state_dict']['palette'] = torch.eye(3).roll(1, 0)
    torch.save(content, tmp_path / 'permuted.pth')
    return tmp_path / 'permuted.pth'


def test_a_permuted_class_list_is_named_where_classes_are_compared(
    folders, tmp_path
):
    file = permuted_file(folders, tmp_path, ('bar', 'disc', 'square'))
    soft = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='bbox_head',
        output=0,
        loss=dict(type='mmkd.SoftTargetLoss', num_classes=3),
    )
    sheet = evaluated(folders, file=file, soft=soft)
    failures = said(sheet, 'fail')
    assert "Term 'soft' compares them place by place" in failures[0]
    assert "classes=('disc', 'square', 'bar')" in failures[0]
    # Where only features are compared, its AP by name is what it is.
    sheet = evaluated(folders, file=file)
    assert sheet.status(strict=True) == 0
    assert sheet.sections[2].facts['ap'] > 80
    assert any('No term compares them' in one for one in said(sheet, 'note'))


@pytest.mark.slow
def test_the_card_is_believed_on_the_data_it_speaks_of(folders, tmp_path):
    path = tmp_path / 'carded.py'
    training(folders).dump(path)
    card = 'PKD: A (10.0 AP alone) learns from B (99.9 AP).'
    path.write_text(f'"""{card}"""\n{path.read_text()}')
    config = Config.fromfile(path)
    plain = check(config, images=64, device='cpu', data=False)
    assert plain.status(strict=True) == 0
    _, val = folders
    shutil.copy(val / 'train.json', val / 'instances_val2017.json')
    config.val_dataloader.dataset.ann_file = 'instances_val2017.json'
    (warning,) = said(
        check(config, images=64, device='cpu', data=False), 'warn'
    )
    assert 'Its card states 99.9' in warning


# Terms -----------------------------------------------------------------------


def stepped(folders, **terms):
    return check(
        training(folders, **terms), images=0, device='cpu', data=False
    )


def test_a_term_of_a_million_is_named_with_a_weight_to_type(folders):
    heavy = copy.deepcopy(PKD)
    heavy['loss']['loss_weight'] = 1e6
    sheet = stepped(folders, pkd=PKD, heavy=heavy)
    (warning,) = said(sheet, 'warn')
    assert warning.startswith("Term 'heavy' is")
    assert 'times the rest of the gradient' in warning
    lower = float(warning.partition('heavy.loss.loss_weight=')[2])
    pushes = {one['name']: one for one in sheet.sections[-1].facts['pushes']}
    rest = pushes['detection']['gradient'] + pushes['pkd']['gradient']
    balanced = lower / 1e6 * pushes['heavy']['gradient']
    assert balanced == pytest.approx(rest, rel=0.05)


def test_checkpointed_activations_are_no_failure(folders):
    config = training(folders)
    config.model.backbone.with_cp = True
    quick = dict(images=0, device='cpu', data=False)
    assert check(config, **quick).status(strict=True) == 0


def test_a_term_that_ignores_the_student_is_named(folders):
    sheet = stepped(folders, pkd=PKD, deaf=broken('detached'))
    (failure,) = said(sheet, 'fail')
    assert failure.startswith("Term 'deaf' does not move the student")


def test_a_term_on_a_frozen_part_is_named(folders):
    config = training(
        folders, early=dict(PKD, tap='backbone.layer1', levels=None)
    )
    config.model.backbone.frozen_stages = 1
    quick = dict(images=0, device='cpu', data=False)
    config.model.terms.early.align = dict(
        type='mmkd.ConvAdapt', in_channels=(8,), out_channels=(16,)
    )
    (failure,) = said(check(config, **quick), 'fail')
    assert "Term 'early' does not move the student" in failure
    assert 'frozen_stages=-1' in failure


def test_a_term_that_is_no_number_is_named(folders):
    (failure,) = said(stepped(folders, pkd=PKD, odd=broken('nan')), 'fail')
    assert "Term 'odd' is not finite: loss_kd_odd = nan" in failure


def test_a_term_of_zero_is_named(folders):
    (failure,) = said(stepped(folders, pkd=PKD, none=broken('zero')), 'fail')
    assert failure.startswith("Term 'none' is 0, and its gradient")


def test_a_term_of_zero_in_one_batch_is_no_failure(folders):
    sheet = stepped(folders, pkd=PKD, rare=broken('second'))
    assert sheet.status(strict=True) == 0
    assert said(sheet, 'note') == []


def test_a_term_that_rests_is_told_and_looked_at_later(folders):
    late = dict(PKD, schedule=dict(type='mmkd.LinearWarmup', end=0.5))
    sheet = stepped(folders, pkd=PKD, late=late)
    assert sheet.status(strict=True) == 0
    assert any('of the training: late' in one for one in said(sheet, 'note'))
    at = {
        one['name']: one['progress']
        for one in sheet.sections[-1].facts['pushes']
    }
    assert at['pkd'] == 0 < at['late']


def test_a_term_of_a_later_phase_is_looked_at_in_it(folders):
    deaf = broken('detached')
    config = training(folders, pkd=PKD, deaf=deaf)
    config.model.phases = [
        dict(length=1, terms=('pkd',)),
        dict(length=1, terms=('deaf',)),
    ]
    sheet = check(config, images=0, device='cpu', data=False)
    (failure,) = said(sheet, 'fail')
    assert failure.startswith("Term 'deaf' does not move the student")


# Data ------------------------------------------------------------------------


@pytest.fixture
def data(folders, tmp_path):
    """A copy of the training data, and what finds faults in it."""
    shutil.copytree(folders[0], tmp_path / 'data')
    path = tmp_path / 'data' / 'train.json'

    def spoil(change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        config = training((tmp_path / 'data', folders[1]))
        config.model = tiny.retinanet()
        return check(config, images=0, device='cpu')

    spoil.folder = Path(tmp_path / 'data')
    return spoil


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (dict(category_id=99), '1 of 18 boxes have a category'),
        (dict(bbox=[3, 3, 0, 9], area=0), '1 of 18 boxes are smaller'),
        (dict(bbox=[70, 3, 9, 9]), '1 of 18 boxes lie outside'),
    ],
)
def test_a_box_that_cannot_be_used_is_named(data, change, words):
    (warning,) = said(
        data(lambda content: content['annotations'][1].update(change)), 'warn'
    )
    assert words in warning
    assert 'annotation 2' in warning


def test_photographs_are_counted_and_copies_of_tested_ones_told(
    folders, tmp_path
):
    """Those under the paths of evaluation are left out; copies would teach."""
    train, val = folders
    config = training(folders)
    config.model = tiny.retinanet()
    loader = config.train_dataloader
    tested = [config.val_dataloader.dataset]
    for folder, warnings in ((val, 0), (tmp_path, 1)):
        if folder is tmp_path:
            shutil.copy(val / 'images' / '007.png', tmp_path / 'a.png')
            shutil.copy(train / 'images' / '003.png', tmp_path / 'b.png')
        mixed = Config(config.to_dict())
        for key, value in with_photographs(loader, folder, tested).items():
            mixed.train_dataloader[key] = value
        sheet = check(mixed, images=0, device='cpu')
        number = 64 if folder is val else 2
        assert any(
            f'unlabelled: {number} photographs' in one
            for one in said(sheet, 'ok')
        )
        found = said(sheet, 'warn')
        assert len(found) == warnings, found
    assert "a.png'" in found[0]
    assert "007.png'" in found[0]
    assert found[0].startswith('1 pictures of evaluation are among')


def test_boxes_and_images_that_are_there_twice_are_named(data):
    picture = data.folder / 'images' / '001.png'
    shutil.copy(picture, data.folder / 'images' / '012.png')

    def repeat(content):
        one = dict(content['annotations'][0], id=100)
        content['annotations'].append(one)
        content['images'].append(
            dict(content['images'][1], id=12, file_name='012.png')
        )
        content['annotations'].append(
            dict(content['annotations'][1], id=101, image_id=12)
        )

    warnings = said(data(repeat), 'warn')
    assert len(warnings) == 2
    assert '1 of 20 boxes stand there for the second time' in warnings[0]
    assert 'annotation 100' in warnings[0]
    assert '2 pictures are one and the same' in warnings[1]
    assert '012.png' in warnings[1]


def test_an_unreadable_image_is_named(data):
    picture = data.folder / 'images' / '005.png'
    picture.write_bytes(picture.read_bytes()[:200])
    sheet = data(lambda content: None)
    assert sheet.status() == 2
    (failure,) = said(sheet, 'fail')
    assert '005.png' in failure
    # What needs no data is looked at nonetheless.
    assert 'Model' not in [one.title for one in sheet.sections]


def test_a_class_without_a_box_is_named(data):
    def drop(content):
        content['annotations'] = [
            one for one in content['annotations'] if one['category_id'] != 7
        ]

    (warning,) = said(data(drop), 'warn')
    assert "no box is of 'bar', of 3 classes" in warning


def test_images_normalised_twice_are_named(folders):
    config = training(folders)
    config.train_dataloader.dataset.pipeline.insert(
        -1,
        dict(
            type='Normalize',
            mean=[123.0, 116.0, 103.0],
            std=[58.0, 57.0, 57.0],
            to_rgb=False,
        ),
    )
    sheet = check(config, images=0, device='cpu', data=False)
    (warning,) = said(sheet, 'warn')
    assert 'normalised twice' in warning


# By hand ---------------------------------------------------------------------


def test_numbers_that_json_has_not_are_none(sound, tmp_path):
    other = copy.deepcopy(sound)
    other.sections[0].facts = dict(ap=float('nan'), high=np.inf)
    written(other, tmp_path / 'a.json')
    facts = json.loads((tmp_path / 'a.json').read_text())['sections'][0]
    assert facts['facts'] == dict(ap=None, high=None)


def one_each(images, found):
    """An object of class 0 in each image, found in some as class 1."""
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    none = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
    seen = Seen(
        sizes=[(20, 20)] * images,
        boxes=[box] * images,
        labels=[np.zeros(1, int)] * images,
        ignored=[np.zeros(1, bool)] * images,
    )
    said = [
        (box, np.ones(1), np.ones(1, int)) if place < found else none
        for place in range(images)
    ]
    keys = 'boxes', 'scores', 'labels'
    return seen, [dict(zip(keys, one)) for one in said]


@pytest.mark.parametrize(('found', 'order'), [(9, None), (10, [None, 0])])
def test_how_it_calls_objects_is_said_of_enough_of_them(found, order):
    assert confused(*one_each(20, found), [0, 1], 2) == order


@pytest.mark.parametrize(('images', 'sure'), [(2, False), (64, True)])
def test_twice_as_many_objects_are_better_if_there_are_enough(images, sure):
    classes, names = ('disc', 'square'), [1, 0]
    own, other = (
        evaluate(*one_each(images, found), classes, names)
        for found in (images // 2, images)
    )
    # Every second object without a false one: precision 1 up to recall 1/2,
    # which is 51 of COCO's 101 points.
    assert own.ap == pytest.approx(100 * 51 / 101)
    assert other.ap == pytest.approx(100)
    assert better(other, own) is sure
    assert not better(own, other)

"""Every detector of mmdet's zoo learns: how pairs are found, tried, told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import families as detectors
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmkd.laboratory import zoo as command
from mmkd.laboratory import zoo_trial
from mmkd.laboratory.digests import source_digest
from mmkd.laboratory.results import versions
from mmkd.laboratory.runs import PACKAGE
from mmkd.laboratory.zoo import (
    CANNOT,
    FAILED,
    NOT_RUN,
    OTHER,
    PASSED,
    Trial,
    carry_out,
    families,
    main,
    outcome,
    page,
    verdict,
)
from mmkd.laboratory.zoo_pairs import (
    LARGER,
    Choice,
    Entry,
    build_structure,
    choose,
    folders,
    make,
    other_task,
    pair,
    said,
    usual,
    zoo,
)
from mmkd.laboratory.zoo_trial import (
    STEPS,
    Shown,
    batch,
    fixed_side,
    learned,
    plain,
    read,
    shrunk,
)
from mmkd.recipes import FAMILIES, RECIPES
from mmkd.registry import DETECTORS
from tools import make_docs


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


# What a config is for --------------------------------------------------------


def model_of(file):
    return Config.fromfile(zoo() / file).model


@pytest.mark.parametrize(
    ('file', 'task'),
    [
        ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 'things and stuff'),
        ('maskformer/maskformer_r50_ms-16xb1-75e_coco.py', 'things and stuff'),
        (
            'mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py',
            'segments videos',
        ),
        (
            'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.'
            '1-coco.py',
            'unlabelled',
        ),
        ('misc/d2_retinanet_r50-caffe_fpn_ms-90k_coco.py', 'another package'),
        (
            'reid/reid_r50_8xb32-6e_mot15train80_test-mot15val20.py',
            'tells persons apart',
        ),
    ],
)
def test_what_finds_no_boxes_by_labels_says_what_it_does(file, task):
    assert task in other_task(model_of(file))


def test_a_detector_that_reads_is_another_matter():
    """Two packages would have to be there for one of the zoo."""
    model = dict(tiny.retinanet(), language_model=dict(type='BertModel'))
    assert other_task(model) == 'finds what a text names'


@pytest.mark.parametrize(
    'file',
    [
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        'htc/htc_r50_fpn_1x_coco.py',
        'rpn/rpn_r50_fpn_1x_coco.py',
    ],
)
def test_boxes_and_instances_are_what_it_is_about(file):
    assert other_task(model_of(file)) is None


def test_a_type_that_nobody_knows_is_named():
    assert other_task(dict(type='NoSuchNet')) == (
        'its NoSuchNet is not registered'
    )


def test_bases_are_no_folder_of_their_own():
    found = folders(zoo())
    assert '_base_' not in found
    assert {'retinanet', 'dino', 'mask_rcnn'} <= set(found)


# Pairs -----------------------------------------------------------------------


def entry(name, weights, kind='GFL', classes=80):
    return Entry(f'folder/{name}.py', (kind, 'FPN', 'Head'), weights, classes)


def test_the_teacher_is_the_nearest_larger_sibling():
    small, near, middle, huge = (
        entry(name, weights)
        for name, weights in (('s', 100), ('n', 119), ('m', 120), ('l', 300))
    )
    assert LARGER == 1.2
    assert pair([huge, middle, near, small]) == (small, middle)


def test_of_two_as_small_the_shorter_name_is_the_plain_one():
    one, other = entry('r50_fpn', 5), entry('r50_fpn_ms-2x', 5)
    large = entry('r101_fpn', 9)
    assert pair([other, large, one])[0] == one


def test_a_teacher_knows_the_same_classes_and_is_of_the_same_make():
    student = entry('s', 100)
    others = [entry('a', 200, classes=20), entry('b', 200, kind='ATSS')]
    assert pair([student, *others]) == (student, student)


def test_a_make_with_a_larger_sibling_comes_first():
    lonely = entry('a', 1, kind='ATSS')
    small, large = entry('s', 10), entry('l', 20)
    assert pair([lonely, small, large]) == (small, large)


def test_the_usual_make_is_that_of_most():
    gfl, other = [entry('a', 1), entry('b', 2)], entry('c', 3, kind='ATSS')
    assert usual([gfl[0], other, gfl[1]]) == gfl
    assert usual([gfl[0], other]) == [gfl[0], other]
    assert usual([]) == []


def test_a_make_is_told_by_detector_neck_and_head():
    assert make(model_of('htc/htc_r50_fpn_1x_coco.py')) == (
        'HybridTaskCascade',
        'FPN',
        'Shared2FCBBoxHead',
    )
    assert make(dict(type='DETR', bbox_head=dict(type='DETRHead'))) == (
        'DETR',
        '-',
        'DETRHead',
    )


@pytest.fixture
def small_zoo(tmp_path):
    """A folder of tiny configs, some of them broken or of no use."""
    folder = tmp_path / 'zoo' / 'some'
    folder.mkdir(parents=True)
    for name, width in (('small', 8), ('large', 16)):
        Config(dict(model=tiny.retinanet(base=width))).dump(
            folder / f'{name}.py'
        )
    (folder / 'part.py').write_text('train_cfg = dict()')
    (folder / 'video.py').write_text("model = dict(type='ByteTrack')")
    (folder / 'broken.py').write_text("_base_ = 'nowhere.py'")
    lacking = tiny.retinanet()
    lacking['backbone'] = dict(type='NoSuchNet')
    Config(dict(model=lacking)).dump(folder / 'lacking.py')
    return tmp_path / 'zoo'


def test_a_folder_is_read_around_what_is_broken_in_it(small_zoo):
    found = choose(small_zoo, 'some')
    assert found.student.file == 'some/small.py'
    assert found.teacher.file == 'some/large.py'
    detector = DETECTORS.build(tiny.retinanet(base=8))
    assert found.student.weights == sum(
        one.numel() for one in detector.parameters()
    )
    assert found.student.classes == detector.bbox_head.num_classes
    assert found.others['tracks objects through videos'] == 1
    assert [one.partition(':')[0] for one in found.broken] == [
        'FileNotFoundError',
        'KeyError',
    ]


def test_a_folder_without_a_detector_has_no_pair(small_zoo):
    for name in ('small', 'large', 'lacking', 'broken'):
        (small_zoo / 'some' / f'{name}.py').unlink()
    assert choose(small_zoo, 'some') == Choice(
        others={'tracks objects through videos': 1}
    )


def test_where_the_usual_make_cannot_be_built_another_is_taken(small_zoo):
    folder = small_zoo / 'some'
    for name in ('small', 'large'):
        config = Config.fromfile(folder / f'{name}.py')
        config.model.backbone = dict(type='NoSuchNet')
        config.dump(folder / f'{name}.py')
    Config(dict(model=tiny.faster_rcnn())).dump(folder / 'two-stage.py')
    found = choose(small_zoo, 'some')
    assert found.student == found.teacher
    assert found.student.file == 'some/two-stage.py'


def test_a_structure_takes_no_memory():
    detector = build_structure(tiny.retinanet())
    assert {one.device.type for one in detector.parameters()} == {'meta'}


def test_an_error_is_one_line_without_the_place_of_packages():
    place = Path(torch.__file__).resolve().parents[1]
    error = FileNotFoundError(f'no file\n  {place}/mmdet/x.py')
    assert said(error) == 'FileNotFoundError: no file mmdet/x.py'
    assert said(KeyError()) == 'KeyError'


# A config, made ready --------------------------------------------------------


def test_nothing_is_downloaded():
    model = dict(
        type='A',
        pretrained='torchvision://resnet50',
        teacher_ckpt='https://somewhere',
        backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='x')),
        other=dict(init_cfg=dict(checkpoint='https://elsewhere')),
        neck=dict(
            init_cfg=[
                dict(type='Xavier', layer='Conv2d'),
                dict(type='Pretrained', checkpoint='y'),
            ]
        ),
        levels=(1, 2),
    )
    config = Config(dict(model=model))
    assert plain(config).model == dict(
        type='A',
        pretrained=None,
        teacher_ckpt=None,
        backbone=dict(),
        other=dict(),
        neck=dict(init_cfg=[dict(type='Xavier', layer='Conv2d')]),
        levels=(1, 2),
    )
    assert config.model == model


def test_batches_are_padded_to_the_side_alone():
    config = Config.fromfile(
        zoo() / 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
    )
    before = config.model.data_preprocessor.batch_augments[0]['size']
    small = shrunk(config, 128).model.data_preprocessor
    assert small.batch_augments[0]['size'] == (128, 128)
    assert before == (1024, 1024)
    assert config.model.data_preprocessor.batch_augments[0]['size'] == before


def test_second_stages_are_given_fewer_regions_and_no_fewer_than_asked():
    config = Config.fromfile(
        zoo() / 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'
    )
    config.model.test_cfg.rpn.max_per_img = 12
    model = shrunk(config, 128).model
    assert [one.sampler.num for one in model.train_cfg.rcnn] == [16] * 3
    assert model.train_cfg.rpn_proposal.max_per_img == 16
    assert model.test_cfg.rpn.max_per_img == 12
    # What is told at the end is as the config says.
    assert model.test_cfg.rcnn.max_per_img == 100
    assert config.model.train_cfg.rcnn[0].sampler.num == 512


def test_an_ssd_has_a_size_of_its_own():
    config = Config.fromfile(zoo() / 'ssd/ssd300_coco.py')
    assert fixed_side(config) == (300,)
    assert fixed_side(Config(dict(model=tiny.retinanet()))) == ()


def test_a_preprocessor_beside_the_model_is_the_model_s(tmp_path):
    path = tmp_path / 'config.py'
    preprocessor = dict(type='DetDataPreprocessor', mean=[1.0, 2.0, 3.0])
    Config(dict(model=dict(type='A'), data_preprocessor=preprocessor)).dump(
        path
    )
    assert read(path).model.data_preprocessor == preprocessor


# Pictures --------------------------------------------------------------------

SHOWN = Shown(64, masks=True)


def fast_rcnn():
    """It is given proposals."""
    model = tiny.faster_rcnn()
    del model['rpn_head'], model['train_cfg']['rpn']
    return dict(model, type='FastRCNN')


@pytest.mark.parametrize(
    ('file', 'masks', 'square'),
    [
        ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', False, False),
        ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', True, False),
        ('yolact/yolact_r50_1xb8-55e_coco.py', True, True),
        ('ssd/ssd300_coco.py', False, True),
    ],
)
def test_pictures_are_annotated_as_the_pipeline_would(file, masks, square):
    config = Config.fromfile(zoo() / file)
    assert Shown.to(config, 96) == Shown(96, masks, square)


def test_boxes_alone_and_one_shape_where_that_is_asked():
    detector = DETECTORS.build(tiny.retinanet())
    data = batch(detector, Shown(64, square=True))
    assert [one.shape for one in data['inputs']] == [(3, 64, 64)] * 2
    for sample in data['data_samples']:
        assert set(sample.gt_instances.keys()) == {'bboxes', 'labels'}
        assert len(sample.ignored_instances) == 0


def test_annotations_fit_their_pictures_and_the_head():
    detector = DETECTORS.build(tiny.retinanet())
    classes = detector.bbox_head.num_classes
    for seed in range(5):
        data = batch(detector, SHOWN, seed)
        shapes = [one.shape for one in data['inputs']]
        assert shapes == [(3, 64, 64), (3, 64, 56)]
        for image, sample in zip(data['inputs'], data['data_samples']):
            height, width = image.shape[1:]
            assert sample.img_shape == (height, width)
            found = sample.gt_instances
            assert image.dtype == torch.uint8
            assert len(found) == 3
            assert 0 <= found.labels.min() <= found.labels.max() < classes
            limit = torch.tensor([width, height, width, height])
            for boxes in (found.bboxes, sample.proposals.bboxes):
                assert (boxes >= 0).all()
                assert (boxes <= limit).all()
            for box, mask in zip(found.bboxes, found.masks.masks):
                rows, columns = np.nonzero(mask)
                inside = (
                    columns.min(),
                    rows.min(),
                    columns.max() + 1,
                    rows.max() + 1,
                )
                np.testing.assert_allclose(box, inside, atol=1.5)
            assert set(sample.gt_sem_seg.sem_seg.unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ('make', 'given'),
    [(tiny.faster_rcnn, False), (fast_rcnn, True)],
)
def test_proposals_are_given_to_detectors_that_make_none(make, given):
    """Else mmdet would predict by them, and not by its own."""
    data = batch(DETECTORS.build(make()), SHOWN)
    assert ['proposals' in one for one in data['data_samples']] == [given] * 2


def test_a_batch_is_the_same_each_time_and_another_for_another_seed():
    detector = DETECTORS.build(tiny.retinanet())
    one, same, other = (batch(detector, SHOWN, seed) for seed in (3, 3, 4))
    assert torch.equal(one['inputs'][0], same['inputs'][0])
    assert not torch.equal(one['inputs'][0], other['inputs'][0])


# Families --------------------------------------------------------------------


def test_every_recipe_but_three_is_of_one_family():
    """Two are made of others, ``inherit`` compares nothing."""
    names = [name for family in FAMILIES.values() for name in family]
    names += ['default', 'default_predicted', 'inherit']
    assert sorted(names) == sorted(RECIPES)


def test_families_are_those_of_the_catalogue():
    """But recipes for queries, of methods that dense detectors have too."""
    cards = make_docs.read_configs(make_docs.ROOT / 'configs')
    of = {one.folder: one.family for one in cards if 'Family' in one.fields}
    for family, names in FAMILIES.items():
        assert family in make_docs.FAMILIES
        for name in names:
            known = of.get(name.replace('_', '-'), family)
            assert family in ('query', known), name


# What a trial asks -----------------------------------------------------------


@pytest.fixture
def distilled(tmp_path):
    """A tiny student that imitates, and the config of its optimiser."""
    weights = tmp_path / 'teacher.pth'
    tiny.save_teacher(tiny.retinanet(base=16), weights)
    teacher = dict(
        config=dict(model=tiny.retinanet(base=16)), checkpoint=str(weights)
    )
    optimiser = dict(optimizer=dict(type='SGD', lr=1.0))
    config = Config(dict(optim_wrapper=optimiser))

    def build(**loss):
        model = tiny.distilled(
            tiny.retinanet(base=8), dict(teacher=teacher), imitation(**loss)
        )
        model = DETECTORS.build(model) if isinstance(model, dict) else model
        model.init_weights()
        return model

    return build, config


def imitation(**loss):
    return dict(
        mimic=dict(
            type='mmkd.FeatureTerm',
            teacher='teacher',
            tap='neck',
            levels=(0, 1),
            loss=dict(type='mmkd.MimicLoss', **loss),
        )
    )


def test_two_steps_of_a_student_that_learns(distilled):
    build, config = distilled
    found = zoo_trial._distil(build(), config, SHOWN)
    assert len(found['losses']) == 2
    assert found['terms']['loss_kd_mimic'] > 0
    assert found['gradient'] > 0


def test_a_term_that_says_nothing_is_a_failure(distilled):
    build, config = distilled
    with pytest.raises(ArithmeticError, match='no term says anything'):
        zoo_trial._distil(build(loss_weight=0.0), config, SHOWN)


def test_a_student_that_hears_nothing_is_a_failure(distilled, monkeypatch):
    build, config = distilled
    model = build()
    term = model.terms['mimic']
    plain_forward = type(term).forward
    monkeypatch.setattr(
        type(term),
        'forward',
        lambda self, step: (plain_forward(self, step)).detach(),
    )
    with pytest.raises(ArithmeticError, match='no gradient'):
        zoo_trial._distil(model, config, SHOWN)
    told = zoo_trial._hear(model, dict(mimic=imitation()), SHOWN)
    assert told == {'mimic': 'it gives the backbone no gradient'}


def test_a_student_that_stays_as_it_is_is_a_failure(distilled):
    build, config = distilled
    config.optim_wrapper.optimizer.lr = 0.0
    with pytest.raises(ArithmeticError, match='did not learn'):
        zoo_trial._distil(build(), config, SHOWN)


def test_what_does_not_learn_in_plain_mmdet_need_not_here(distilled):
    """Clipping leaves nothing of a gradient whose norm is infinite."""
    build, config = distilled
    config.optim_wrapper.optimizer.lr = 0.0
    found = zoo_trial._distil(build(), config, SHOWN, learns=False)
    assert found['gradient'] > 0


def test_a_frozen_backbone_need_not_hear(distilled):
    build, config = distilled
    model = build()
    model.backbone.requires_grad_(False)
    assert learned(model.backbone) == []
    zoo_trial._distil(model, config, SHOWN)


def test_a_loss_that_is_no_number_is_a_failure():
    with pytest.raises(ArithmeticError, match='loss_cls is not finite'):
        zoo_trial._total(
            dict(loss_cls=torch.tensor(float('nan')), loss=torch.tensor(1.0))
        )


def test_deployed_means_equal_to_the_last_bit():
    one = DETECTORS.build(tiny.retinanet()).eval()
    other = DETECTORS.build(tiny.retinanet()).eval()
    other.load_state_dict(one.state_dict())
    # Class scores and boxes of five levels.
    assert zoo_trial._same_outputs(one, other, SHOWN) == 10
    with torch.no_grad():
        other.bbox_head.retina_cls.bias[0] += 1e-3
    with pytest.raises(ArithmeticError, match='something else'):
        zoo_trial._same_outputs(one, other, SHOWN)


def test_mixed_precision_and_warm_up_are_taken_out():
    model = DETECTORS.build(tiny.retinanet())
    settings = dict(
        type='AmpOptimWrapper',
        loss_scale='dynamic',
        optimizer=dict(type='SGD', lr=0.02),
        clip_grad=dict(max_norm=35),
    )
    found = zoo_trial._optimiser(model, Config(dict(optim_wrapper=settings)))
    assert type(found).__name__ == 'OptimWrapper'
    assert found.get_lr()['lr'] == [pytest.approx(2e-5)]
    assert settings['optimizer']['lr'] == 0.02


def test_scales_that_random_weights_lack_are_given():
    """Weights that are standardised and not scaled let layers overflow."""
    model = tiny.retinanet()
    model.backbone.conv_cfg = dict(type='ConvAWS')
    detector = DETECTORS.build(model)
    layer = detector.backbone.layer1[0].conv1
    assert layer.weight_gamma.abs().max() == 0 or layer.weight_gamma.min() == 1
    weight = layer.weight.clone()
    zoo_trial.settle(detector)
    assert torch.equal(layer.weight, weight)
    expected = weight.flatten(1).var(1).add(1e-5).sqrt()
    torch.testing.assert_close(layer.weight_gamma.flatten(), expected)


def test_weights_that_only_a_file_sets_are_drawn():
    """Till then they are what was in the memory."""
    detector = DETECTORS.build(detectors.trident())
    layer = detector.backbone.layer3[-1].conv2
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    others = detector.backbone.layer3[-1].conv1.weight.clone()
    zoo_trial.settle(detector)
    assert torch.isfinite(layer.weight).all()
    assert layer.weight.std() > 0
    assert torch.equal(detector.backbone.layer3[-1].conv1.weight, others)


# A trial of one folder -------------------------------------------------------


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """What plain mmdet is asked, side by side, of a detector that predicts
    from so many pixels on."""

    def ask(least, sides=(64, 96, 128), teacher=None):
        trial = zoo_trial.Trial('some', tmp_path / 'x.json', zoo(), sides)
        asked = dict(trained=[], predicted=[])

        def train(config, shown):
            asked['trained'].append(shown.side)
            trial.record['steps']['build'] = dict(error=None)

        def predict(model, shown):
            asked['predicted'].append(shown.side)
            if shown.side < least:
                raise RuntimeError('too small')
            return []

        trial._train_with = train
        monkeypatch.setattr(zoo_trial, 'predict', predict)
        student, other = (
            Config(dict(model=one or {})) for one in (None, teacher)
        )
        shown, _ = trial._plain_training(student, other)
        return shown.side, asked, trial.record['steps']['predict']

    return ask


def test_what_predicts_at_once_is_asked_once(alone):
    side, asked, note = alone(least=0)
    assert side == 64
    assert asked == dict(trained=[64], predicted=[64])
    assert 'cannot' not in note


def test_a_teacher_of_one_side_alone_decides(alone):
    ssd = dict(bbox_head=dict(anchor_generator=dict(input_size=300)))
    side, asked, _ = alone(least=0, teacher=ssd)
    assert side == 300
    assert asked == dict(trained=[300], predicted=[300])


def test_the_side_is_one_on_which_it_predicts(alone):
    side, asked, note = alone(least=100)
    assert side == 128
    assert asked == dict(trained=[64, 128], predicted=[64, 96, 128, 128])
    assert 'cannot' not in note


def test_what_predicts_at_no_side_is_not_trained_at_each(alone):
    side, asked, note = alone(least=1000)
    assert side == 64
    assert asked == dict(trained=[64], predicted=[64, 96, 128])
    assert note['cannot'] == 'RuntimeError: too small'


def run_trial(folder, tmp_path, monkeypatch, root=None):
    (tmp_path / 'inside').mkdir()
    monkeypatch.chdir(tmp_path / 'inside')
    out = tmp_path / f'{folder}.json'
    found = zoo_trial.Trial(folder, out, root or zoo()).run()
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    return found


def test_a_folder_of_the_zoo_goes_through_every_step(tmp_path, monkeypatch):
    """The smallest pair: YOLOX-tiny teaches YOLOX-nano's like."""
    found = run_trial('yolox', tmp_path, monkeypatch)
    assert outcome(found) == PASSED
    assert list(found['steps']) == list(STEPS)
    assert len(families(found)) >= 3
    assert found['steps']['export']['outputs'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('folder', ['rpn', 'detr', 'centernet', 'condinst'])
def test_folders_of_other_kinds_go_through_every_step(
    folder, tmp_path, monkeypatch
):
    found = run_trial(folder, tmp_path, monkeypatch)
    assert outcome(found) == PASSED
    assert len(families(found)) >= 3


def test_a_step_that_fails_is_the_last_and_says_why(
    small_zoo, tmp_path, monkeypatch
):
    found = run_trial('some', tmp_path, monkeypatch, small_zoo)
    # These configs have no optimiser.
    assert list(found['steps']) == ['choose', 'build', 'train']
    assert 'optim_wrapper' in found['steps']['train']['error']
    assert verdict(found) == CANNOT
    assert found['side'] == zoo_trial.SIDES[-1]
    assert 'plan.py' in found['sources']


@pytest.mark.parametrize('cannot', [{}, dict(cannot='RuntimeError')])
def test_a_teacher_predicts_where_plain_mmdet_can(
    cannot, tmp_path, monkeypatch
):
    trial = zoo_trial.Trial('some', tmp_path / 'x.json', zoo())
    fits = dict.fromkeys(RECIPES, 'it does not fit')
    fits |= dict(pkd=None, predicted=None)
    trial.record['steps'] = dict(predict=cannot, methods=dict(fits=fits))
    monkeypatch.setattr(zoo_trial, 'recipe', lambda name, pair: {})
    monkeypatch.setattr(
        zoo_trial, '_hear', lambda model, terms, shown: dict.fromkeys(terms)
    )
    found = type('Plan', (), dict(pair=None))
    trial._families(None, found, SHOWN)
    response = [] if cannot else ['response']
    assert families(trial.record) == ['feature', *response]
    assert trial.record['steps']['methods']['fits']['predicted'] is None


# The sweep -------------------------------------------------------------------


def stand_in(words):
    """For the work of a trial: folders do what they are called."""
    folder, _, out = words
    out = Path(out)
    out.with_suffix('.runs').open('a').write('x')
    steps = dict(choose=dict(error=None), train=dict(error=None, running=True))
    if folder in ('dies', 'long', 'asleep'):
        out.write_text(json.dumps(dict(folder=folder, steps=steps)))
    if folder == 'dies':
        os._exit(3)
    while folder == 'long':
        pass
    if folder == 'large':
        held = bytearray(2**30)
        held[:: 2**10] = b'x' * len(held[:: 2**10])
    if folder in ('asleep', 'large'):
        time.sleep(60)
    error = 'ValueError: no such thing' if folder == 'wrong' else None
    record = dict(
        folder=folder,
        steps=dict(train=dict(error=error)),
        student=f'{folder}/x.py',
        teacher=f'{folder}/x.py',
        weights=[1, 1],
        versions=versions(),
        sources={'plan.py': source_digest(PACKAGE / 'plan.py')},
        finished=True,
        seconds=1.5,
    )
    out.write_text(json.dumps(record))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_trial, 'main', stand_in)
    names = ['good', 'wrong', 'dies', 'better']
    monkeypatch.setattr(command, 'folders', lambda root: names)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ['--work-dir', 'work', '--page', 'docs/zoo.md']


def times(folder):
    """How often a folder's process was begun."""
    return len(Path(f'work/{folder}.runs').read_text())


def test_a_failure_is_told_and_the_others_run(fake, capsys):
    assert main(WORDS) == 0  # plain mmdet's own failures are none of ours
    said = capsys.readouterr().out
    assert 'wrong: not in plain mmdet: train: ValueError: no such' in said
    assert 'dies: not in plain mmdet: train: its process ended with' in said
    assert 'good: passed in' in said
    assert 'better: passed in' in said
    assert '4 of 4' in said
    text = Path('docs/zoo.md').read_text()
    assert '| wrong | train: ValueError: no such thing |' in text


def test_what_is_done_is_not_done_again(fake, capsys):
    main(WORDS)
    before = Path('docs/zoo.md').read_text()
    assert main(WORDS) == 0
    assert [times(one) for one in ('good', 'wrong', 'dies')] == [1, 1, 1]
    assert Path('docs/zoo.md').read_text() == before


def test_other_code_or_another_mmdet_is_done_again(fake):
    main([*WORDS, 'good', 'better'])
    for name, key, value in (
        ('good', 'sources', {'plan.py': 'of yesterday'}),
        ('better', 'versions', dict(versions(), mmdet='3.2.0')),
    ):
        file = Path(f'work/{name}.json')
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {key: value})
        )
    main([*WORDS, '--failed', 'good', 'better'])
    assert [times('good'), times('better')] == [1, 1]
    main([*WORDS, 'good', 'better'])
    assert [times('good'), times('better')] == [2, 2]


def test_a_module_that_is_gone_makes_it_old(fake):
    main([*WORDS, 'good'])
    trial = Trial('good', Path('work'))
    assert trial.done
    record = dict(trial.record, sources={'no_such.py': 'x'})
    trial.file.write_text(json.dumps(record))
    assert not trial.done


def test_only_what_failed_may_be_run_again(fake):
    main([*WORDS, 'good', 'wrong'])
    main([*WORDS, '--failed'])
    counts = {one: times(one) for one in ('good', 'wrong', 'dies', 'better')}
    assert counts == dict(good=1, wrong=2, dies=1, better=1)


def test_a_page_can_be_written_without_running(fake):
    assert main([*WORDS, '--report-only']) == 0
    assert '4 were not run' in Path('docs/zoo.md').read_text()
    assert not list(Path('work').glob('*.json'))


@pytest.mark.parametrize(
    ('folder', 'limits', 'reason'),
    [
        ('long', dict(minutes=0.01), 'train: longer than 0.01 minutes'),
        ('asleep', dict(minutes=0.005), 'train: longer than 0.005 minutes'),
        ('large', dict(memory=1.0), 'more than 1 GiB of memory'),
    ],
)
def test_more_than_it_may_take_ends_a_folder(fake, folder, limits, reason):
    if not Path('/proc/self/status').is_file():
        pytest.skip('the system does not say what a process holds')
    trial = Trial(folder, Path('work'), **limits)
    begin = time.time()
    carry_out([trial], 1)
    assert time.time() - begin < 30
    assert reason in outcome(trial.record)
    assert trial.done


def test_ctrl_c_leaves_nothing_behind_and_goes_on_later(fake, capsys):
    """What was cut off has no record, so that it is run again."""
    names = ['good', 'long']
    command.folders = lambda root: names
    timer = threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert main(WORDS) == 130
    timer.cancel()
    assert Trial('good', Path('work')).verdict == PASSED
    assert Trial('long', Path('work')).verdict == NOT_RUN
    assert 'goes on from here' in capsys.readouterr().out


def test_quick_folders_come_first(fake, capsys):
    Path('work').mkdir()
    for name, seconds in (('good', 90), ('wrong', 50), ('better', 10)):
        Path(f'work/{name}.json').write_text(json.dumps(dict(seconds=seconds)))
    main(WORDS)  # 'dies' is unknown: a minute
    said = capsys.readouterr().out
    order = [line.partition(':')[0] for line in said.splitlines()[:4]]
    assert order == ['better', 'wrong', 'dies', 'good']


def test_an_unknown_folder_suggests_the_nearest(fake, capsys):
    assert main([*WORDS, 'goood']) == 1
    assert "'good'" in capsys.readouterr().err


def test_no_jobs_are_refused(fake, capsys):
    assert main([*WORDS, '--jobs', '0']) == 1
    assert '--jobs' in capsys.readouterr().err


# The page --------------------------------------------------------------------


def record(folder, **changes):
    """Of a folder that passed."""
    fits = dict.fromkeys(RECIPES)
    steps = {name: dict(error=None) for name in STEPS}
    steps['plan'] |= dict(
        rows=[
            [
                'd.pkd',
                'neck[0]',
                'neck[0]',
                '8',
                '',
                'ConvAdapt',
                'PKDLoss, x',
            ],
            ['', 'neck[1]', 'neck[1]', '16', '', '', ''],
            ['d.cwd', 'bbox_head[0]', '', '8', '', '-', 'CWDLoss, share 1'],
        ]
    )
    steps['methods'] |= dict(fits=fits)
    steps['families'] |= dict(
        learn={family: [names[0], None] for family, names in FAMILIES.items()}
    )
    found = dict(
        folder=folder,
        kind='GFL',
        student=f'{folder}/small.py',
        teacher=f'{folder}/large.py',
        weights=[20_300_000, 40_000_000],
        side=128,
        steps=steps,
        versions=versions(),
        sources={},
        finished=True,
    )
    return found | changes


def written(tmp_path, *records):
    for one in records:
        path = tmp_path / f'{one["folder"]}.json'
        path.write_text(json.dumps(one))
    return page([Trial(one['folder'], tmp_path) for one in records])


def test_the_page_says_pair_plan_methods_and_outcome(tmp_path):
    text = written(tmp_path, record('gfl'))
    number = len(RECIPES)
    assert (
        f'| gfl | GFL | large (40.0 M) → small (20.3 M) | 128 | PKDLoss on '
        f'neck (2 levels) by ConvAdapt; CWDLoss on bbox_head (1 level) | '
        f'{number} of {number}, {len(FAMILIES)} families | passed |'
    ) in text
    assert '| pkd | feature | 1 of 1 |' in text
    assert '1 folders: plain mmdet trains 1 of them' in text
    assert 'at least 95%' in text


def test_a_detector_that_teaches_its_like_is_told_so(tmp_path):
    one = record('lad', teacher='lad/small.py', weights=[5_000_000] * 2)
    assert '| its like → small (5.0 M) |' in written(tmp_path, one)


def failing(step, error='ValueError: a | b < c'):
    found = record('x')
    names = STEPS[: STEPS.index(step)]
    found['steps'] = {name: found['steps'][name] for name in names}
    found['steps'][step] = dict(error=error)
    return found


@pytest.mark.parametrize(
    ('step', 'word'),
    [
        ('build', CANNOT),
        ('train', CANNOT),
        ('teacher', CANNOT),
        ('plan', FAILED),
        ('export', FAILED),
        ('families', FAILED),
    ],
)
def test_whose_failure_it_is_depends_on_the_step(step, word, tmp_path):
    found = failing(step)
    assert verdict(found) == word
    assert f'{step}: ValueError: a \\| b &lt; c |' in written(tmp_path, found)


def test_a_method_that_fits_and_does_not_teach_is_a_failure(tmp_path):
    found = record('x')
    learn = found['steps']['families']['learn']
    learn['feature'] = ['pkd', 'it gives the backbone no gradient']
    assert verdict(found) == FAILED
    assert 'feature' not in families(found)
    assert 'FAILED: pkd: it gives the backbone' in written(tmp_path, found)


def test_less_than_three_families_are_counted_as_less(tmp_path):
    few = record('few')
    learn = few['steps']['families']['learn']
    few['steps']['families']['learn'] = dict(list(learn.items())[:2])
    text = written(tmp_path, few, record('many'))
    assert '1 learn by methods of 3 families or more (less than 95%)' in text


def test_other_tasks_and_what_cannot_be_read_are_listed_apart(tmp_path):
    other = dict(
        record('sort'),
        student=None,
        steps={},
        others={'tracks objects through videos': 3},
    )
    cannot = dict(other, folder='convnext', broken=['ImportError: no such'])
    parts = dict(other, folder='common', others={})
    assert [verdict(x) for x in (other, cannot, parts)] == [
        OTHER,
        CANNOT,
        OTHER,
    ]
    text = written(tmp_path, other, cannot, parts, dict(folder='y', steps={}))
    assert '| sort | tracks objects through videos |' in text
    assert '| convnext | ImportError: no such |' in text
    assert '| common | holds parts of other configs |' in text
    assert '| y |  |' in text
    assert '1 were not run' in text


def test_results_of_earlier_code_are_counted(tmp_path):
    old = record('old', sources={'plan.py': 'of yesterday'})
    text = written(tmp_path, old, record('new'))
    assert '1 folders were run with exactly the present code' in text
    assert 'exactly' not in written(tmp_path / '.', record('new'))

import pytest
import runs
import tiny
import torch
from mutants import misspelt

from mmkd.compat.checkpoint import sha256_of
from mmkd.engine.preflight import (
    check_classes,
    check_named_hash,
    check_phases,
    check_testing,
    check_training,
    named_weights,
    unread_keys,
)

data, quick_starts = runs.data, runs.quick_starts


@pytest.fixture
def cfg(data, tmp_path):
    return runs.config(data, tmp_path / 'run', validate=True)


def test_a_sound_config_passes_and_names_its_classes(cfg):
    report = check_training(cfg)
    assert report.classes == runs.NAMES
    assert report.warnings == []


@pytest.mark.parametrize(
    'key',
    [
        'custom_hooks',
        'param_scheduler',
        'val_dataloader',
        'randomness',
        'tta_model',
    ],
)
def test_a_key_that_is_nearly_one_is_told(cfg, key):
    for wrong in misspelt(key):
        cfg[wrong] = {}
        assert check_training(cfg).warnings == [
            f'Nothing reads {wrong!r} of the config. Did you mean {key!r}?'
        ]
        cfg.pop(wrong)


def test_a_component_of_mmkd_that_there_is_not_is_told_with_its_place(cfg):
    check_training(cfg)
    cfg.custom_hooks = [dict(type='mmkd.FiniteLosHook')]
    with pytest.raises(
        ValueError,
        match=r"custom_hooks\[0\] has no type 'mmkd\.FiniteLosHook'\. "
        r"Did you mean 'mmkd\.FiniteLossHook'\?",
    ):
        check_training(cfg)


@pytest.mark.parametrize(
    ('place', 'kind', 'settings', 'message'),
    [
        (
            'custom_hooks',
            'FiniteLossHook',
            dict(polcy='skip'),
            r"custom_hooks\[0\].* has no setting 'polcy'.*'policy'\?",
        ),
        (
            'custom_hooks',
            'DiagnosticsHook',
            dict(interval='often'),
            r"custom_hooks\[0\].* takes interval as .*got interval='often'",
        ),
        (
            'batch_sampler',
            'PartlyLabelledBatchSampler',
            dict(unlabeled=1),
            r"batch_sampler.* no setting 'unlabeled'.*'unlabelled'\?",
        ),
        (
            'batch_sampler',
            'PartlyLabelledBatchSampler',
            dict(unlabelled=2),
            'got 2 unlabelled of 2. Set',
        ),
    ],
)
def test_settings_outside_of_the_model_are_held_against_what_they_set(
    cfg, place, kind, settings, message
):
    """Before the model is built, which can take minutes."""
    wrong = dict(type=f'mmkd.{kind}', **settings)
    if place == 'custom_hooks':
        cfg.custom_hooks = [wrong]
    else:
        cfg.train_dataloader[place] = wrong
    with pytest.raises(ValueError, match=message):
        check_training(cfg)


def test_a_sampler_that_chooses_images_cannot_be_mixed(cfg):
    loader = cfg.train_dataloader
    loader.sampler.type = 'ClassAwareSampler'
    check_training(cfg)
    loader.batch_sampler = dict(type='mmkd.PartlyLabelledBatchSampler')
    with pytest.raises(ValueError, match='config has a ClassAwareSampler'):
        check_training(cfg)
    loader.sampler.type = 'DefaultSampler'
    check_training(cfg)


def test_names_of_the_parts_of_a_config_are_their_own():
    own = (
        'train_pipeline',
        'conv_cfg',
        'train_dataset',
        'iterations',
        'teacher',
    )
    assert unread_keys(dict.fromkeys(own)) == []


def test_checkpoints_are_checked_before_data(cfg, teachers, terms):
    cfg.model = tiny.distilled(tiny.retinanet(), teachers, terms)
    cfg.model.teachers.big.checkpoint = 'checkpoints/gone.pth'
    cfg.train_dataloader.dataset.ann_file = 'gone.json'
    with pytest.raises(
        FileNotFoundError, match=r'model\.teachers\.big\.checkpoint expected'
    ):
        check_training(cfg)


@pytest.mark.parametrize(
    'cache', ['gone', dict(folder='gone', missing='show')]
)
def test_a_cache_that_is_not_there_is_told_before_data(
    cfg, teachers, terms, cache
):
    cfg.model = tiny.distilled(tiny.retinanet(), teachers, terms)
    cfg.model.teachers.big.cache = cache
    cfg.train_dataloader.dataset.ann_file = 'gone.json'
    with pytest.raises(
        FileNotFoundError, match=r'teachers\.big\.cache: .*cache_teacher\.py'
    ):
        check_training(cfg)


def test_room_in_memory_is_no_folder(cfg, teachers, terms):
    cfg.model = tiny.distilled(tiny.retinanet(), teachers, terms)
    cfg.model.teachers.big.cache = 2.0
    check_training(cfg)


def test_predictions_that_are_not_there_are_told(cfg):
    cfg.train_dataloader.dataset.pipeline.append(
        dict(type='mmkd.LoadPredictions', folder='gone')
    )
    with pytest.raises(
        FileNotFoundError, match=r'\]\.folder: .*cache_predictions\.py'
    ):
        check_training(cfg)


@pytest.mark.parametrize('kind', ['mmkd.KeepForTeacher', 'mmkd.IGOverlay'])
def test_pixels_that_are_kept_must_be_packed(cfg, kind):
    """Else teachers would be shown the student's, without a word."""
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline.insert(-1, dict(type=kind))
    with pytest.raises(ValueError, match=f"{kind} keeps.*'teacher_img'"):
        check_training(cfg)
    pipeline[-1].meta_keys = ('img_id', 'img_shape')
    with pytest.raises(ValueError, match=f"{kind} keeps.*'teacher_img'"):
        check_training(cfg)
    pipeline[-1].meta_keys = ('img_id', 'img_shape', 'teacher_img')
    check_training(cfg)


def test_an_overlay_that_keeps_nothing_needs_nothing_packed(cfg):
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline.insert(-1, dict(type='mmkd.IGOverlay', keep_clean=False))
    check_training(cfg)


def test_weights_to_start_from_must_exist(cfg):
    cfg.load_from = 'gone.pth'
    with pytest.raises(FileNotFoundError, match='load_from expected'):
        check_training(cfg)
    cfg.load_from = None
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='gone.pth'
    )
    with pytest.raises(FileNotFoundError, match=r'backbone\.init_cfg\.check'):
        check_training(cfg)


def test_addresses_are_left_for_later(cfg):
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='torchvision://resnet18'
    )
    check_training(cfg)


def test_the_annotations_of_a_metric_must_exist(cfg):
    cfg.val_evaluator.ann_file = 'gone.json'
    with pytest.raises(FileNotFoundError, match=r'val_evaluator\.ann_file'):
        check_training(cfg)


def test_a_config_of_a_model_alone_cannot_be_trained(cfg):
    cfg.pop('train_dataloader')
    with pytest.raises(ValueError, match='has no train_dataloader'):
        check_training(cfg)


def test_a_test_needs_no_file_of_a_teacher(
    data, cfg, teachers, terms, tmp_path
):
    cfg.merge_from_dict(runs.evaluation(data, 'test'))
    cfg.model = tiny.distilled(tiny.retinanet(), teachers, terms)
    cfg.model.teachers.big.checkpoint = 'checkpoints/gone.pth'
    cfg.load_from = str(tmp_path / 'student.pth')
    torch.save(dict(state_dict={}), cfg.load_from)
    check_testing(cfg)


def test_several_processes_must_not_wait_for_what_rests(cfg):
    cfg.launcher = 'pytorch'
    check_phases(cfg)
    cfg.model.phases = [dict(train='backbone'), dict(train='neck')]
    with pytest.raises(ValueError, match='2 phases, which needs find_unused'):
        check_training(cfg)
    cfg.find_unused_parameters = True
    check_phases(cfg)
    cfg.find_unused_parameters, cfg.launcher = False, 'none'
    check_training(cfg)


def test_heads_must_have_the_classes_of_the_data():
    model = tiny.build(tiny.retinanet(classes=80))
    with pytest.raises(
        ValueError,
        match=r"bbox_head has num_classes=80, .* has 3 \('disc', 'square', "
        r"'bar'\).*--cfg-options model\.bbox_head\.num_classes=3",
    ):
        check_classes(model, runs.NAMES)
    check_classes(tiny.build(tiny.retinanet()), runs.NAMES)
    check_classes(model, None)


def test_proposal_heads_have_no_classes_to_match():
    model = tiny.build(tiny.faster_rcnn())
    check_classes(model, runs.NAMES)
    with pytest.raises(ValueError, match=r'model\.roi_head\.bbox_head\.num_'):
        check_classes(model, runs.NAMES[:2])


def test_every_named_file_is_found():
    model = dict(
        backbone=dict(init_cfg=dict(checkpoint='a.pth')),
        teachers=dict(one=dict(checkpoint='b.pth'), two=dict(checkpoint=None)),
        heads=[dict(checkpoint='c.pth')],
    )
    assert list(named_weights(model, 'model')) == [
        ('model.backbone.init_cfg.checkpoint', 'a.pth'),
        ('model.teachers.one.checkpoint', 'b.pth'),
        ('model.heads[0].checkpoint', 'c.pth'),
    ]


# Names that tell a hash ------------------------------------------------------


def test_a_file_that_was_changed_is_told_by_its_name(tmp_path, cfg):
    file = tmp_path / 'net.pth'
    torch.save(dict(state_dict=dict(a=torch.ones(1))), file)
    named = file.rename(tmp_path / f'net-{sha256_of(file)[:8]}.pth')
    assert check_named_hash(named, 'load_from') is None
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), named)
    found = check_named_hash(named, 'load_from')
    assert found.mark == 'warn'
    assert f'begins with {sha256_of(named)[:8]}' in found.text
    # A training says so before it begins, unless it is not to look.
    init = dict(type='Pretrained', checkpoint=str(named))
    cfg.model.backbone.init_cfg = init
    (warning,) = check_training(cfg).warnings
    assert 'backbone.init_cfg.checkpoint: the name' in warning
    assert check_training(cfg, data=False).warnings == []

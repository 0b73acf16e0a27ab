"""SSKD's procedure: stage by stage, then the head alone."""

from pathlib import Path

import pytest
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmkd.configs import read_config

ROOT = Path(__file__).parents[2]
STAGES = ['backbone.layer1', 'backbone.layer2', 'backbone.layer3']
STAGES += ['backbone.layer4', 'neck', 'bbox_head']
STEM = ('backbone.conv1.', 'backbone.bn1.')
STEPS = 160


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    init_default_scope('mmdet')
    config = read_config('configs/sskd/tiny/sskd_tiny.py')
    config.model.backbone.norm_eval = False  # statistics move as well
    teacher = config.model.teachers.big
    teacher.checkpoint = str(
        tiny.save_teacher(
            read_config(teacher.config).model, tmp_path / 'teacher.pth'
        )
    )
    return config


@pytest.fixture
def student(config):
    torch.manual_seed(0)
    student = MODELS.build(config.model)
    student.init_weights()
    return student.train()


def move_to(hub, student, phase):
    """The training stands at the first step of a phase, counted from 0."""
    before = sum(one.length for one in list(student.phases)[:phase])
    hub.update_info('max_iters', STEPS)
    hub.update_info('iter', int(before))


def state(student):
    return {key: one.clone() for key, one in student.state_dict().items()}


def data(classes=6, **settings):
    return tiny.batch(classes=classes, **settings)


def stage_of(key):
    return 'backbone.layer1.' if key.startswith(STEM) else key


def test_in_its_phase_a_stage_changes_and_nothing_else_does(
    config, student, hub
):
    optimiser = build_optim_wrapper(student, config.optim_wrapper)
    for phase, stage in enumerate(STAGES):
        move_to(hub, student, phase)
        before = state(student)
        for seed in range(2):
            student.train_step(tiny.pixels(*data(seed=seed)), optimiser)
        names = [*(f'stage{i}' for i in (1, 2, 3, 4)), 'pyramid', None]
        own = (f'{stage}.', f'terms.{names[phase]}.')
        changed = {
            key
            for key, one in student.state_dict().items()
            if not torch.equal(one, before[key])
        }
        assert {
            key for key in changed if not stage_of(key).startswith(own)
        } == set()
        # The last blocks of an untrained stage may end in dead units.
        assert any(key.startswith(f'{stage}.') for key in changed)
        if phase < 4:
            assert any('running_mean' in key for key in changed)
            assert any(key.startswith(own[1]) for key in changed)


def test_labels_do_not_matter_before_the_phase_of_the_head(student, hub):
    images, samples = data()
    others = data(seed=8)[1]
    for phase in range(5):
        move_to(hub, student, phase)
        with torch.no_grad():
            student.eval()  # no statistic moves between the two
            found = student.loss(images, samples)
            assert student.loss(images, others) == found
        assert sum(value > 0 for value in found.values()) == 1


def test_the_head_learns_from_labels_alone(student, hub):
    move_to(hub, student, 5)
    losses = student.loss(*data())
    assert {
        key for key, one in losses.items() if 'kd' in key and one != 0
    } == set()
    assert {'loss_cls', 'loss_bbox'} <= set(losses)


def test_a_stage_ends_nearer_to_the_teacher(config, student, hub):
    optimiser = build_optim_wrapper(student, config.optim_wrapper)
    batch = tiny.pixels(*data())
    for phase, name in enumerate(['stage1', 'stage2']):
        move_to(hub, student, phase)
        errors = [
            student.train_step(batch, optimiser)[f'loss_kd_{name}']
            for _ in range(8)
        ]
        assert errors[-1] < 0.9 * errors[0]


# A DETR, whose encoder has stages as well ------------------------------------

QUERY = ['query_embedding', 'reference_points_fc', 'decoder', 'bbox_head']
DETR_PHASES = [
    *(('backbone.layer1', *STEM),),
    *((f'backbone.layer{i}.',) for i in (2, 3, 4)),
    ('neck.',),
    ('encoder.', 'level_embed'),
    tuple(QUERY),
]
DETR_TERMS = ['stage1', 'stage2', 'stage3', 'stage4', 'pyramid', 'memory']


@pytest.fixture
def detr_config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    init_default_scope('mmdet')
    config = read_config('configs/sskd/tiny/sskd-query_tiny.py')
    teacher = config.model.teachers.big
    teacher.checkpoint = str(
        tiny.save_teacher(
            read_config(teacher.config).model, tmp_path / 'teacher.pth'
        )
    )
    return config


@pytest.fixture
def detr(detr_config):
    torch.manual_seed(0)
    detr = MODELS.build(detr_config.model)
    detr.init_weights()
    return detr.train()


def test_stages_of_a_detr_learn_one_by_one(detr_config, detr, hub):
    optimiser = build_optim_wrapper(detr, detr_config.optim_wrapper)
    for phase, parts in enumerate(DETR_PHASES):
        move_to(hub, detr, phase)
        before = state(detr)
        # Labels, which a phase of imitation does not read.
        losses = detr.train_step(tiny.pixels(*data()), optimiser)
        own = (*parts, *(f'terms.{one}.' for one in DETR_TERMS[phase:][:1]))
        changed = {
            key
            for key, one in detr.state_dict().items()
            if not torch.equal(one, before[key])
        }
        assert {key for key in changed if not key.startswith(own)} == set()
        assert any(key.startswith(parts) for key in changed)
        imitates = {
            key.removeprefix('loss_kd_')
            for key, one in losses.items()
            if key.startswith('loss_kd_') and one != 0
        }
        assert imitates == {*DETR_TERMS[phase:][:1]}
        assert ('loss_cls' in losses) == (phase == len(DETR_TERMS))


def test_the_encoder_of_a_detr_ends_nearer_to_the_teacher(
    detr_config, detr, hub
):
    optimiser = build_optim_wrapper(detr, detr_config.optim_wrapper)
    batch = tiny.pixels(*data())
    move_to(hub, detr, 5)
    errors = [
        detr.train_step(batch, optimiser)['loss_kd_memory'] for _ in range(8)
    ]
    assert errors[-1] < 0.9 * errors[0]

"""MMEngine's and mmdet's own hooks find in a distilled student what they seek.

Each is run on the student alone as well, and must do the same there.
"""

import pytest
import runs
import tiny
import torch
from mmdet.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

data = runs.data
quick_starts = runs.quick_starts

EPOCHS = 3


def yolox(widen: float = 0.125) -> ConfigDict:
    channels = [int(widen * full) for full in (256, 512, 1024)]
    return ConfigDict(
        type='YOLOX',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            pad_size_divisor=32,
            batch_augments=[
                dict(
                    type='BatchSyncRandomResize',
                    random_size_range=(64, 96),
                    size_divisor=32,
                    interval=1,
                )
            ],
        ),
        backbone=dict(
            type='CSPDarknet',
            deepen_factor=0.33,
            widen_factor=widen,
            out_indices=(2, 3, 4),
        ),
        neck=dict(
            type='YOLOXPAFPN',
            in_channels=channels,
            out_channels=16,
            num_csp_blocks=1,
        ),
        bbox_head=dict(
            type='YOLOXHead',
            num_classes=len(runs.NAMES),
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
        ),
        train_cfg=dict(assigner=dict(type='SimOTAAssigner')),
        test_cfg=dict(
            score_thr=0.01, nms=dict(type='nms', iou_threshold=0.65)
        ),
    )


def mosaic(folder):
    """mmdet's way of mixing images, which the mode switch turns off."""
    inner = runs.dataset(folder)
    inner['pipeline'] = runs.PIPELINE[:2]
    return dict(
        type='MultiImageMixDataset',
        dataset=inner,
        pipeline=[
            dict(type='Mosaic', img_scale=(64, 64)),
            dict(
                type='RandomAffine',
                scaling_ratio_range=(0.5, 1.0),
                border=(-32, -32),
            ),
            dict(type='Resize', scale=(64, 64)),
            dict(type='PackDetInputs'),
        ],
    )


class Listen(Hook):
    """Keeps what each step logged, and whether images were mixed."""

    def __init__(self):
        self.logs, self.skipped = [], []

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        self.logs.append({key: one.item() for key, one in outputs.items()})
        dataset = runner.train_dataloader.dataset
        self.skipped.append(dataset._skip_type_keys)


def trained(model, folder, work_dir):
    """A stock runner after a training with EMA and the mode switch."""
    config = runs.config(
        folder,
        work_dir,
        epochs=EPOCHS,
        model=model,
        custom_hooks=[
            dict(type='YOLOXModeSwitchHook', num_last_epochs=1),
            dict(
                type='EMAHook',
                ema_type='ExpMomentumEMA',
                momentum=0.1,
                gamma=1,
                update_buffers=True,
                priority=49,
            ),
        ],
    )
    config.train_dataloader.dataset = mosaic(folder)
    config.train_dataloader.pop('batch_sampler')
    runner = Runner.from_cfg(config)
    runner.register_hook(Listen())
    runner.train()
    return runner


def hook(runner, kind):
    return next(one for one in runner.hooks if type(one).__name__ == kind)


def distilled(teacher_file, loss_weight):
    return tiny.distilled(
        yolox(),
        teachers=dict(
            wide=dict(
                config=dict(model=yolox(0.25)), checkpoint=str(teacher_file)
            )
        ),
        terms=dict(
            pkd=dict(
                type='mmkd.FeatureTerm',
                teacher='wide',
                levels=(0, 1, 2),
                align=dict(
                    type='mmkd.ConvAdapt', in_channels=16, out_channels=16
                ),
                loss=dict(type='mmkd.PKDLoss', loss_weight=loss_weight),
                schedule=dict(type='mmkd.StopAfter', fraction=2 / 3),
            )
        ),
    )


@pytest.fixture(scope='module')
def wide_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('yolox') / 'wide.pth'
    return tiny.save_teacher(yolox(0.25), path)


@pytest.fixture(scope='module')
def runners(data, wide_file, tmp_path_factory):
    """The student alone, with a term of weight 0, and with a real one."""
    models = dict(
        alone=yolox(),
        zero=distilled(wide_file, 0.0),
        taught=distilled(wide_file, 1.0),
    )
    return {
        name: trained(model, data, tmp_path_factory.mktemp(name))
        for name, model in models.items()
    }


# YOLOX's change of mode ------------------------------------------------------


@pytest.mark.parametrize('name', ['alone', 'taught'])
def test_the_mode_switch_finds_the_head(runners, name):
    logs = hook(runners[name], 'Listen').logs
    steps = len(logs) // EPOCHS
    assert not any('loss_l1' in log for log in logs[:steps])
    assert all(log['loss_l1'] > 0 for log in logs[steps:])
    assert runners[name].model.bbox_head.use_l1


@pytest.mark.parametrize('name', ['alone', 'taught'])
def test_the_mode_switch_stops_mixing_images(runners, name):
    skipped = hook(runners[name], 'Listen').skipped
    assert skipped[0] is None
    assert 'Mosaic' in skipped[-1]


def test_the_runner_tells_the_term_when_to_stop(runners):
    """Two of three epochs, the second after the switch."""
    logs = hook(runners['taught'], 'Listen').logs
    steps = len(logs) // EPOCHS
    counts = [log['loss_kd_pkd'] > 0 for log in logs]
    assert counts == [True] * 2 * steps + [False] * steps


def test_with_weight_zero_each_step_is_that_of_the_student_alone(runners):
    alone, zero = (
        hook(runners[name], 'Listen').logs for name in ('alone', 'zero')
    )
    assert len(alone) == len(zero)
    for one, other in zip(alone, zero):
        assert other.pop('loss_kd_pkd') == 0
        assert one == other


# Averaged weights ------------------------------------------------------------


def average(runner):
    return hook(runner, 'EMAHook').ema_model


def test_the_average_is_that_of_the_student_alone(runners):
    alone, zero = (
        average(runners[name]).state_dict() for name in ('alone', 'zero')
    )
    assert set(zero) - set(alone) == {
        key for key in zero if key.startswith('module.terms.')
    }
    assert [k for k in alone if not torch.equal(alone[k], zero[k])] == []


def test_the_average_holds_no_teacher_and_shares_it(runners):
    runner = runners['taught']
    own, teacher = runner.model, runner.model.teachers['wide']
    copy = average(runner).module
    assert copy is not own
    assert copy.teachers['wide'] is teacher
    theirs = {id(one) for one in teacher.detector.parameters()}
    assert theirs.isdisjoint(id(one) for one in average(runner).parameters())
    own_count = sum(one.numel() for one in own.parameters())
    assert sum(one.numel() for one in copy.parameters()) == own_count


def test_the_terms_own_weights_are_averaged_too(runners):
    runner = runners['taught']
    name = 'terms.pkd.align.adapts.0.0.weight'
    own = runner.model.state_dict()[name]
    assert not torch.equal(average(runner).module.state_dict()[name], own)


def test_a_checkpoint_with_an_average_holds_no_teacher(runners):
    from pathlib import Path

    file = Path(runners['taught'].work_dir) / f'epoch_{EPOCHS}.pth'
    saved = torch.load(file, weights_only=False)
    plain = MODELS.build(yolox())
    for part in ('state_dict', 'ema_state_dict'):
        assert not any('wide' in key for key in saved[part])
        keys = {key.removeprefix('module.') for key in saved[part]}
        extra = keys - set(plain.state_dict()) - {'steps'}
        assert extra
        assert all(key.startswith('terms.') for key in extra)


def test_the_teacher_of_an_averaged_run_is_still_its_file(runners, wide_file):
    saved = torch.load(wide_file)['state_dict']
    teacher = runners['taught'].model.teachers['wide'].detector.state_dict()
    assert [k for k in saved if not torch.equal(saved[k], teacher[k])] == []


# Learning rates by depth -----------------------------------------------------


class TinyConvNeXt(nn.Module):
    """The names of a ConvNeXt, by which the constructor sorts weights."""

    def __init__(self):
        super().__init__()
        widths = (8, 16, 32)
        self.downsample_layers = nn.ModuleList(
            nn.Conv2d(one, other, 2, 2)
            for one, other in zip((3, *widths), widths)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(one, one, 3, padding=1)) for one in widths
        )

    def forward(self, x):
        maps = []
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
            maps.append(x)
        return tuple(maps)


@pytest.fixture
def convnext(monkeypatch):
    monkeypatch.setitem(MODELS._module_dict, 'TinyConvNeXt', TinyConvNeXt)
    model = tiny.retinanet()
    model.backbone = dict(type='TinyConvNeXt')
    model.neck.in_channels = [8, 16, 32]
    return model


def groups(model, decay_type):
    """Learning rate and weight decay by the name of each weight."""
    names = {id(one): name for name, one in model.named_parameters()}
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type='LearningRateDecayOptimizerConstructor',
            optim_wrapper_cfg=dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=1.0, weight_decay=0.1),
            ),
            paramwise_cfg=dict(
                decay_rate=0.5, decay_type=decay_type, num_layers=6
            ),
        )
    )
    return {
        names[id(one)]: (group['lr'], group['weight_decay'])
        for group in constructor(model).optimizer.param_groups
        for one in group['params']
    }


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_layer_decay_groups_the_student_as_it_would_alone(
    convnext, tmp_path, decay_type
):
    file = tiny.save_teacher(convnext, tmp_path / 'teacher.pth')
    model = tiny.build(
        tiny.distilled(
            convnext,
            teachers=dict(
                same=dict(config=dict(model=convnext), checkpoint=str(file))
            ),
            terms=dict(
                mgd=dict(
                    type='mmkd.FeatureTerm',
                    teacher='same',
                    levels=(0,),
                    loss=dict(type='mmkd.MGDLoss', channels=16),
                )
            ),
        )
    )
    alone, distilled = (
        groups(one, decay_type) for one in (tiny.build(convnext), model)
    )
    extra = {name: distilled.pop(name) for name in set(distilled) - set(alone)}
    assert distilled == alone
    assert len({rate for rate, _ in alone.values()}) > 2
    assert extra
    assert all(name.startswith('terms.mgd.') for name in extra)
    assert all(rate == 1.0 for rate, _ in extra.values()), 'as a head learns'

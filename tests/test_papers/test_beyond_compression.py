"""The nine methods that one study compares, and what it trains them under."""

from itertools import combinations
from pathlib import Path

import pytest
import runs
import tiny
import torch
from mmengine.registry import init_default_scope

from mmkd.configs import read_config
from mmkd.datasets.shapes import TINY, prepare_shapes
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

ROOT = Path(__file__).parents[2]

#: Those that compare maps or scores of two models, as the study has them.
LOSSES = dict(
    hinton=dict(type='mmkd.SoftTargetLoss', num_classes=4),
    fitnets=dict(type='mmkd.MimicLoss'),
    fsp=dict(type='mmkd.FSPLoss'),
    at=dict(type='mmkd.ATLoss'),
    sp=dict(type='mmkd.SPLoss'),
    rkd=dict(type='mmkd.RKDLoss'),
)
#: Folders of the configs of all but the one of peers.
FOLDERS = dict(
    hinton='soft-target',
    fitnets='mimic',
    fsp='fsp',
    at='at',
    sp='sp',
    rkd='rkd',
    bss='bss',
    one='one',
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    init_default_scope('mmdet')


def value(config, student, teacher, gt):
    loss = MODELS.build(config)
    if getattr(loss, 'scope', 'level') == 'level':
        found = sum(
            _total(loss(one, other, gt))
            for one, other in zip(student, teacher)
        )
    else:
        found = _total(loss(student, teacher, gt))
    return found.item()


def _total(found):
    return sum(found.values()) if isinstance(found, dict) else found


def test_nine_names_are_not_one_loss():
    torch.manual_seed(0)
    student, teacher = (
        [torch.randn(2, 8, cells, cells) for cells in (16, 8)]
        for _ in range(2)
    )
    boxes = [8 + 40 * torch.rand(4, 2) for _ in range(2)]
    gt = GroundTruth.from_boxes(
        [torch.cat([one, one + 48], 1) for one in boxes], shape=(128, 128)
    )
    found = {
        name: value(config, student, teacher, gt)
        for name, config in LOSSES.items()
    }
    assert all(one > 0 for one in found.values())
    # No one is another times a factor that does not depend on the maps.
    other = {
        name: value(config, [3 * one.flip(0) for one in student], teacher, gt)
        for name, config in LOSSES.items()
    }
    for one, two in combinations(found, 2):
        assert found[one] != pytest.approx(found[two], rel=1e-3)
        ratios = (found[one] / found[two], other[one] / other[two])
        assert ratios[0] != pytest.approx(ratios[1], rel=1e-3), (one, two)


def test_each_has_an_experiment_with_a_component_of_its_own():
    used = {}
    for name, folder in FOLDERS.items():
        assert list((ROOT / 'configs' / folder).glob('*_coco.py'))
        path = f'configs/{folder}/tiny/{folder}_tiny.py'
        terms = read_config(path).model.terms
        used[name] = {str(one.get('loss', one).type) for one in terms.values()}
    # BSS has Hinton's beside it.
    assert used['hinton'] < used['bss']
    used['bss'] -= used['hinton']
    for one, two in combinations(used.values(), 2):
        assert not one & two


def test_a_method_trains_under_noise_and_imbalance(tmp_path):
    pictures = tmp_path / 'shapes'
    counts = {'train': 16, 'val': 0, 'test': 0}
    prepare_shapes(pictures, size=TINY['size'], counts=counts, say=len)
    config = read_config('configs/fsp/tiny/fsp_tiny.py')
    teacher = config.model.teachers.big
    file = tiny.save_teacher(
        read_config(teacher.config).model, tmp_path / 'teacher.pth'
    )
    teacher.checkpoint = str(file)
    inside = config.train_dataloader.dataset
    inside.data_root = str(pictures)
    few = dict(type='mmkd.ImbalancedSubset', dataset=inside, factor=4)
    config.train_dataloader.dataset = dict(
        type='mmkd.NoisyLabels', dataset=few, p=0.5, box_jitter=0.2
    )
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        config[key] = None
    config.train_cfg.max_iters = 2
    config.default_hooks.logger.interval = 1
    config.work_dir, config.experiment_name = str(tmp_path), 'protocol'
    log = runs.train(config)['log']
    values = log['train/loss_kd_fsp'][0]
    assert len(values) == 2
    assert all(one > 0 for one in values)

"""A COCO config trains and validates by the command, on three pictures.

Of the configs that differ in ``model`` alone one is trained, with a tiny
student in its place: what is looked at is all the rest as MMEngine hands it
on, with the package of its base noted in every part. Those that train on data
which a tool has to prepare first are left to ``test_configs``.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import rotation
import runs
import tiny
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmkd.cli import main
from mmkd.configs import read_config
from mmkd.laboratory.preparation import preparations

ROOT = Path(__file__).parents[1]
CLASSES = CocoDataset.METAINFO['classes']

quick_starts = runs.quick_starts


@cache
def rest_of(path: Path) -> str:
    """All of a config but its model."""
    config = read_config(path).to_dict()
    del config['model']
    return repr(sorted(config.items()))


def one_of_each() -> list[Path]:
    found: dict[str, Path] = {}
    for path in sorted((ROOT / 'configs').glob('*/*_coco.py')):
        if not preparations(read_config(path), path.name):
            found.setdefault(rest_of(path), path)
    return list(found.values())


PATHS = one_of_each()
MARKS = rotation.marks(PATHS, count=5)


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """Three pictures where configs look for COCO's."""
    runs.write_where_coco_is(tmp_path)
    monkeypatch.chdir(tmp_path)


def small(path: Path) -> Config:
    """A config whose pictures, and training, are small."""
    text = str(read_config(path).to_dict())
    text = re.sub(r'\((1333|640|320), \d+\)', '(64, 64)', text)
    config = Config(ast.literal_eval(text))
    config.model = tiny.retinanet(classes=len(CLASSES))
    config.train_cfg.max_epochs = 1
    config.train_cfg.val_interval = 1
    config.val_evaluator.metric = 'bbox'  # the student has no masks
    for name in ('train', 'val', 'test'):
        loader = config[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.batch_size = min(loader.batch_size, 2)
    return config


@pytest.mark.parametrize(
    'path',
    [pytest.param(one, id=one.stem, marks=MARKS[one]) for one in PATHS],
)
def test_it_trains_and_validates_by_the_command(path, coco, capsys):
    init_default_scope('mmdet')
    config = small(path)
    assert config.train_cfg['_scope_'] == 'mmdet'  # what a file hands on
    config.dump('small.py')
    assert main(['train', 'small.py', '--work-dir', 'run']) == 0
    state = torch.load('run/epoch_1.pth', weights_only=False)
    assert state['meta']['iter'] == 2
    assert 'bbox_mAP' in capsys.readouterr().out + ''.join(
        one.read_text() for one in Path('run').rglob('*.log')
    )

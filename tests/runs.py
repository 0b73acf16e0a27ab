"""Whole trainings of a second: pictures, annotations and config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from PIL import Image

from mmkd.engine.random_state import capture
from mmkd.engine.trainer import Trainer

NAMES = ('disc', 'square', 'bar')
SIDE = 64
_RUNS = count()


def write_coco(folder: Path, images: int = 6, seed: int = 0) -> Path:
    """Pictures of noise with one or two bright rectangles, and their boxes."""
    numbers = np.random.RandomState(seed)
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    content = dict(
        images=[],
        annotations=[],
        # Ids with gaps, as COCO's own.
        categories=[
            dict(id=3 * label + 1, name=name)
            for label, name in enumerate(NAMES)
        ],
    )
    for number in range(images):
        picture = numbers.randint(0, 90, (SIDE, SIDE, 3), np.uint8)
        name = f'{number:03d}.png'
        for _ in range(1 + number % 2):
            left, top = numbers.randint(0, SIDE // 2, 2).tolist()
            width, height = numbers.randint(12, SIDE // 2, 2).tolist()
            label = int(numbers.randint(len(NAMES)))
            picture[top : top + height, left : left + width, label] = 230
            content['annotations'].append(
                dict(
                    id=len(content['annotations']) + 1,
                    image_id=number,
                    category_id=3 * label + 1,
                    bbox=[left, top, width, height],
                    area=width * height,
                    iscrowd=0,
                )
            )
        Image.fromarray(picture).save(folder / 'images' / name)
        content['images'].append(
            dict(id=number, file_name=name, width=SIDE, height=SIDE)
        )
    path = folder / 'train.json'
    path.write_text(json.dumps(content))
    return path


def write_where_coco_is(folder: Path, images: int = 3) -> None:
    """Pictures, boxes and masks where the zoo's configs look for COCO's."""
    truth = json.loads(write_coco(folder, images).read_text())
    truth['categories'] = [
        dict(id=number, name=name)
        for number, name in enumerate(CocoDataset.METAINFO['classes'], 1)
    ]
    for one in truth['annotations']:
        left, top, width, height = one['bbox']
        right, bottom = left + width, top + height
        corners = [left, top, right, top, right, bottom, left, bottom]
        one['segmentation'] = [corners]
    coco = folder / 'data' / 'coco'
    (coco / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        file = coco / 'annotations' / f'instances_{split}2017.json'
        file.write_text(json.dumps(truth))
        (coco / f'{split}2017').symlink_to(folder / 'images')


PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='RandomChoiceResize',
        scales=[(48, 48), (64, 64), (72, 72)],
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
TEST_PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
        ),
    ),
]


def dataset(folder: Path, **settings) -> dict:
    return dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='train.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=NAMES),
        pipeline=PIPELINE,
        **settings,
    )


def config(
    folder: Path,
    work_dir: Path,
    epochs: int | None = 2,
    iters: int | None = None,
    workers: int = 0,
    persistent: bool = False,
    validate: bool = False,
    model: dict | None = None,
    **settings,
) -> Config:
    """A training on what :func:`write_coco` wrote into ``folder``."""
    loader = dict(
        batch_size=2,
        num_workers=workers,
        persistent_workers=persistent,
        dataset=dataset(folder),
    )
    if iters is None:
        loader['sampler'] = dict(type='DefaultSampler', shuffle=True)
        loader['batch_sampler'] = dict(type='AspectRatioBatchSampler')
        train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs)
    else:
        loader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
        train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters)
    by_epoch = iters is None
    cfg = dict(
        default_scope='mmdet',
        model=model or tiny.retinanet(),
        train_dataloader=loader,
        train_cfg=train_cfg,
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.01, momentum=0.9),
        ),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4),
            dict(
                type='CosineAnnealingLR',
                by_epoch=by_epoch,
                T_max=epochs if by_epoch else iters,
            ),
        ],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=2),
            checkpoint=dict(
                type='CheckpointHook', interval=1, by_epoch=by_epoch
            ),
        ),
        custom_hooks=[],
        randomness=dict(seed=5),
        work_dir=str(work_dir),
        # MMEngine tells runs apart by second and name.
        experiment_name=f'run{next(_RUNS)}',
        log_level='ERROR',
        env_cfg=dict(
            mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0)
        ),
    )
    if validate:
        loop = train_cfg
        loop['val_interval'] = 1 if by_epoch else 2
        cfg.update(evaluation(folder, 'val'))
    cfg.update(settings)
    return Config(cfg)


def evaluation(folder: Path, phase: str) -> dict:
    """Data, loop and metric of ``val`` or ``test``."""
    data = dict(dataset(folder), pipeline=TEST_PIPELINE, test_mode=True)
    return {
        f'{phase}_dataloader': dict(
            batch_size=1,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=data,
        ),
        f'{phase}_cfg': dict(type=f'{phase.title()}Loop'),
        f'{phase}_evaluator': dict(
            type='CocoMetric',
            ann_file=str(folder / 'train.json'),
            metric='bbox',
        ),
    }


def train(cfg: Config, resume: Path | None = None) -> dict:
    """Train to the end and return all that the training has become."""
    if resume is not None:
        cfg.resume, cfg.load_from = True, str(resume)
    trainer = Trainer.from_cfg(cfg)
    trainer.train()
    return state(trainer)


def state(trainer: Trainer) -> dict[str, Any]:
    """What must not differ between two runs that should be one."""
    hub = trainer.message_hub
    return dict(
        weights=dict(trainer.model.state_dict()),
        optimizer=trainer.optim_wrapper.state_dict(),
        averages=[
            dict(hook.ema_model.state_dict())
            for hook in trainer.hooks
            if hasattr(hook, 'ema_model')
        ],
        schedulers=[one.state_dict() for one in trainer.param_schedulers],
        log={
            key: buffer.data
            for key, buffer in hub.log_scalars.items()
            if 'time' not in key
        },
        info={
            key: hub.get_info(key)
            for key in ('epoch', 'iter', 'best_score')
            if key in hub.runtime_info
        },
        random=capture(),
    )


def differences(one: Any, other: Any, where: str = '') -> list[str]:
    """Paths at which two nested states are not bit for bit the same."""
    if isinstance(one, Mapping):
        if set(one) != set(other):
            return [f'{where} has other keys']
        return [
            path
            for key in one
            for path in differences(one[key], other[key], f'{where}.{key}')
        ]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f'{where} has another length']
        return [
            path
            for number, pair in enumerate(zip(one, other))
            for path in differences(*pair, f'{where}[{number}]')
        ]
    if isinstance(one, (torch.Tensor, np.ndarray)):
        same = one.shape == other.shape and bool((one == other).all())
    else:
        same = one == other
    return [] if same else [where]


# A test module takes these by assignment: data = runs.data


@pytest.fixture(autouse=True, scope='session')
def quick_starts():
    """Spare what takes MMEngine longer than a whole training here."""
    with pytest.MonkeyPatch.context() as patch:
        # The versions of all compilers of the machine.
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        # A beautified config in every checkpoint; the stacks import the
        # function at different times.
        for place in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):
            patch.setattr(
                f'{place}.FormatCode',
                lambda text, **style: (text, True),
                raising=False,
            )
        yield


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Folder with the annotations and pictures of :func:`write_coco`."""
    folder = tmp_path_factory.mktemp('data')
    write_coco(folder)
    return folder

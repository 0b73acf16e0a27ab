"""Photographs that nobody labelled, beside a data set of labelled ones.

::

    train_dataloader = dict(
        batch_sampler=dict(
            _delete_=True, type='mmkd.PartlyLabelledBatchSampler'
        ),
        dataset=dict(
            _delete_=True,
            type='mmkd.PartlyLabelledDataset',
            dataset=_base_.train_dataloader.dataset,
            unlabelled='photographs',
            without=[_base_.val_dataloader.dataset],
        ),
    )

A distiller has no detection loss of them, and lets its teachers teach on them
through every term.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, Compose
from mmdet.datasets import BaseDetDataset
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.logging import print_log
from torch.utils.data import ConcatDataset, Sampler

from mmkd.randomness import preserved
from mmkd.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS
from mmkd.structures.ground_truth import labelled

#: What a photograph's name ends with.
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
#: What annotations become in a pipeline.
LABELS = (
    'gt_bboxes',
    'gt_bboxes_labels',
    'gt_ignore_flags',
    'gt_masks',
    'gt_seg_map',
)
#: Arguments of transforms that drop images without objects, and what keeps
#: them.
_KEEPING = dict(allow_negative_crop=True, skip_img_without_anno=False)


def photographs(folder: str | Path) -> list[str]:
    """Paths of all pictures in a folder and the folders in it, in order.

    Raises:
        FileNotFoundError: If there is no such folder, or none in it.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f'Photographs without labels are expected in a folder, got '
            f'{str(folder)!r}, which is none. Name the folder that they lie '
            f'in.'
        )
    found = sorted(
        str(path)
        for path in Path(folder).rglob('*')
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
        raise FileNotFoundError(
            f'The folder {str(folder)!r} of photographs without labels has '
            f'none: no file in it or below ends with {", ".join(SUFFIXES)}.'
        )
    return found


def with_photographs(
    loader: Mapping, folder: str | Path, tested: Sequence
) -> dict:
    """The two settings by which a training loader shows photographs, too.

    Args:
        loader: A config's ``train_dataloader``.
        folder: Where the photographs lie.
        tested: Configs of the data sets that are validated or tested on.

    Raises:
        FileNotFoundError: If the folder has no photographs.
        ValueError: If a batch holds a single image, or the loader's sampler
            chooses images by itself.
    """
    photographs(folder)
    check_loader(loader)
    return dict(
        batch_sampler=dict(type='mmkd.PartlyLabelledBatchSampler'),
        dataset=dict(
            type='mmkd.PartlyLabelledDataset',
            dataset=loader['dataset'],
            unlabelled=str(folder),
            without=list(tested),
        ),
    )


def mixed(config: Config, folder: str | Path) -> Config:
    """A copy of a training config that shows photographs, too.

    Args:
        config: A whole training config.
        folder: Where the photographs lie.

    Raises:
        FileNotFoundError: As :func:`with_photographs`.
        ValueError: As :func:`with_photographs`.
    """
    config = copy.deepcopy(config)
    loader = config.train_dataloader
    sets = [config[key].dataset for key in tested(config)]
    for key, value in with_photographs(loader, folder, sets).items():
        loader[key] = value  # update() would merge it into what it holds
    return config


def tested(config: Mapping) -> list[str]:
    """The loaders of a config that validate or test, each set once."""
    found = []
    for key in ('val_dataloader', 'test_dataloader'):
        dataset = (config.get(key) or {}).get('dataset')
        if dataset and dataset not in [config[one].dataset for one in found]:
            found.append(key)
    return found


def check_loader(loader: Mapping) -> None:
    """Whether a part of a training loader's batches can lack labels.

    Args:
        loader: A config's ``train_dataloader``, with this batch sampler or
            without.

    Raises:
        ValueError: If a batch holds a single image, or the loader's sampler
            chooses images by itself.
    """
    size = loader.get('batch_size', 1)
    others = (loader.get('batch_sampler') or {}).get('unlabelled')
    _check_half(size, size // 2 if others is None else others)
    kind = (loader.get('sampler') or dict(type=DefaultSampler))['type']
    named = DATA_SAMPLERS.get(kind) if isinstance(kind, str) else None
    _check_sampler(named or kind)


class _Photographs(BaseDetDataset):
    """Pictures alone, annotated with nothing."""

    def __init__(
        self,
        paths: Sequence[str],
        folder: str,
        metainfo: Mapping,
        **settings: Any,
    ) -> None:
        self.paths, self.folder = paths, folder
        super().__init__(**settings)
        self._metainfo = metainfo  # as it is, not read once more

    def load_data_list(self) -> list[dict]:
        # Named by their place, so that none is taken for a labelled one
        # where something is kept by the name of an image.
        return [
            dict(
                img_path=path,
                img_id=os.path.relpath(path, self.folder),
                instances=[],
            )
            for path in self.paths
        ]


@TRANSFORMS.register_module()
class DropLabels(BaseTransform):
    """Take away what was annotated, so that an image counts as unlabelled.

    It stands before ``PackDetInputs``. Transforms before it see an image
    without an object.

    Example:
        >>> DropLabels()(dict(img=0, gt_bboxes=1, gt_bboxes_labels=2))
        {'img': 0}
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return {key: results[key] for key in results if key not in LABELS}


@DATASETS.register_module()
class PartlyLabelledDataset(ConcatDataset):
    """A labelled data set, and after it photographs of the same kind.

    The photographs go through the labelled set's own pipeline, as images
    without an object that no transform drops, and lose the empty annotations
    at its end. A hook that exchanges the pipeline in the last epochs
    (``PipelineSwitchHook``, ``YOLOXModeSwitchHook``) exchanges both.

    What is labelled and what is validated or tested on is left out, so that
    ``unlabelled`` may be the folder of all photographs: files are compared by
    where they lie, so that copies under another path are not noticed. What the
    labelled set itself leaves out, as by ``filter_empty_gt`` or ``indices``,
    counts as unlabelled.

    Args:
        dataset: The labelled set, any of mmdet's with its wrappers.
        unlabelled: Folder of the photographs, and of folders with more.
        without: Data sets whose images are left out as well.

    Raises:
        FileNotFoundError: If the folder has no photographs.
        ValueError: If none is left, or the pipeline cannot show an image
            without annotations.
    """

    def __init__(
        self,
        dataset: Mapping,
        unlabelled: str | Path,
        without: Sequence[Mapping] = (),
    ) -> None:
        annotated = DATASETS.build(dataset)
        known = set(_pictures(annotated))
        tested = {
            path
            for one in without
            for path in _pictures(DATASETS.build(copy.deepcopy(one)))
        }
        everything = photographs(unlabelled)
        new = [one for one in everything if _place(one) not in known]
        left = [one for one in new if _place(one) not in tested]
        own, others = len(everything) - len(new), len(new) - len(left)
        if not left:
            raise ValueError(
                f'All {len(everything)} photographs in {str(unlabelled)!r} '
                f'are labelled ({own}), or validated or tested on ({others}). '
                f'Name a folder that has others.'
            )
        print_log(
            f'{len(left)} photographs without labels in {str(unlabelled)!r}'
            f'; left out: {own} that are labelled, {others} that are '
            f'validated or tested on.',
            logger='current',
        )
        super().__init__([annotated, _alike(annotated, left, str(unlabelled))])
        self._check_shown(str(unlabelled))

    def _check_shown(self, folder: str) -> None:
        """Whether the pipeline shows an image without annotations."""
        try:
            with preserved():
                sample = self.datasets[1][0]['data_samples']
        except Exception as error:  # of any transform
            raise ValueError(
                f'The training pipeline cannot show a photograph of '
                f'{folder!r}, which has no annotations: '
                f'{_failed(error)} says {type(error).__name__}: {error}. '
                f'Take what needs them out of the pipeline, or train on '
                f'labelled images alone.'
            ) from error
        if labelled(sample):
            raise ValueError(
                f'The training pipeline ends with no PackDetInputs, so that '
                f'the photographs of {folder!r} would count as labelled with '
                f'nothing. Let it end with one.'
            )

    @property
    def metainfo(self) -> dict:
        """That of the labelled set."""
        return self.datasets[0].metainfo

    def full_init(self) -> None:
        """Nothing is left to be read."""

    def get_data_info(self, index: int) -> dict:
        """Annotations of an image, as MMEngine's data sets give them."""
        own, others = self.datasets
        if index < len(own):
            return own.get_data_info(index)
        return others.get_data_info(index - len(own))

    @property
    def pipeline(self) -> Any:
        """What hooks exchange; that of the labelled set."""
        return self.datasets[0].pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Compose) -> None:
        self.datasets[0].pipeline = pipeline
        self.datasets[1].pipeline = without_objects(pipeline)

    def update_skip_type_keys(self, skip_type_keys: Sequence[str]) -> None:
        """Leave transforms out, as ``MultiImageMixDataset`` does."""
        for one in self.datasets:
            one.update_skip_type_keys(skip_type_keys)


def _failed(error: Exception) -> str:
    """The transform in which something failed."""
    steps = [
        type(frame.f_locals['self']).__name__
        for frame, _ in walk_tb(error.__traceback__)
        if isinstance(frame.f_locals.get('self'), BaseTransform)
        and not isinstance(frame.f_locals['self'], Compose)
    ]
    return steps[-1] if steps else 'It'


def without_objects(pipeline: Compose) -> Compose:
    """A pipeline that shows images without objects as unlabelled ones.

    Args:
        pipeline: Of a labelled set; it is copied, not changed.
    """
    pipeline = copy.deepcopy(pipeline)
    _keep_empty(pipeline)
    pipeline.transforms = [
        step
        for one in pipeline.transforms
        for step in ([DropLabels(), one] if _packs(one) else [one])
    ]
    return pipeline


def _keep_empty(transform: Any) -> None:
    for name, value in _KEEPING.items():
        if hasattr(transform, name):
            setattr(transform, name, value)
    inner = getattr(transform, 'transforms', ())
    for one in inner if isinstance(inner, Sequence) else [inner]:
        _keep_empty(one)


def _packs(transform: Any) -> bool:
    return type(transform).__name__.endswith('PackDetInputs')


def _alike(dataset: Any, paths: Sequence[str], folder: str) -> Any:
    """Photographs as a labelled set shows its images."""
    layers = list(_layers(dataset))
    single = layers[-1]
    found = _Photographs(
        paths,
        folder,
        metainfo=dataset.metainfo,
        pipeline=without_objects(single.pipeline).transforms,
        backend_args=getattr(single, 'backend_args', None),
    )
    mixing = [one for one in layers[:-1] if hasattr(one, 'pipeline')]
    for one in reversed(mixing):
        found = _mixed(one, found)
    return found


def _layers(dataset: Any) -> Iterator[Any]:
    """A data set, and those inside of it; of several the first."""
    while True:
        yield dataset
        inner = getattr(dataset, 'dataset', None)
        if inner is None:
            inner = next(iter(getattr(dataset, 'datasets', ())), None)
        if inner is None:
            return
        dataset = inner


def _mixed(wrapper: Any, dataset: Any) -> Any:
    """A ``MultiImageMixDataset`` as it is, of other images."""
    found = copy.copy(wrapper)
    found.dataset, found.num_samples = dataset, len(dataset)
    found._ori_len = len(dataset)
    found.pipeline, found.pipeline_types = [], []
    for one, kind in zip(wrapper.pipeline, wrapper.pipeline_types):
        if _packs(one):
            found.pipeline.append(DropLabels())
            found.pipeline_types.append('mmkd.DropLabels')
        one = copy.deepcopy(one)
        _keep_empty(one)
        found.pipeline.append(one)
        found.pipeline_types.append(kind)
    return found


def _pictures(dataset: Any) -> Iterator[str]:
    """Where the images of a data set lie, those in its wrappers once."""
    if hasattr(dataset, 'datasets'):
        for one in dataset.datasets:
            yield from _pictures(one)
    elif hasattr(dataset, 'dataset'):
        yield from _pictures(dataset.dataset)
    else:
        for index in range(len(dataset)):
            yield _place(dataset.get_data_info(index)['img_path'])


def _place(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(_real(folder), name)


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


@DATA_SAMPLERS.register_module()
class PartlyLabelledBatchSampler(Sampler):
    """Batches of labelled images and of others, in a fixed proportion.

    A pass has as many batches as the labelled images alone would make, so that
    schedules by epoch or iteration mean what they did. Each of the two sets is
    shuffled as often as it is used up: every image is shown once before any is
    shown twice. Images are not grouped by aspect ratio.

    Args:
        sampler: The config's ``DefaultSampler`` or ``InfiniteSampler``, over
            a :class:`PartlyLabelledDataset`. It tells seed, epoch and
            process, whether to shuffle, and whether to go on for ever.
        batch_size: Of the loader.
        unlabelled: Images of each batch that have no labels; half of them if
            None.
        drop_last: Ignored, since all batches are full.

    Raises:
        ValueError: If there would be no labelled or no other image in a
            batch, the data set has no two parts, or the sampler chooses
            images by itself.

    Example:
        >>> parts = ConcatDataset([range(4), range(9)])
        >>> sampler = DefaultSampler(parts, shuffle=False)
        >>> list(PartlyLabelledBatchSampler(sampler, 2))
        [[0, 4], [1, 5]]
        >>> sampler.set_epoch(1)
        >>> list(PartlyLabelledBatchSampler(sampler, 2))
        [[2, 6], [3, 7]]
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        unlabelled: int | None = None,
        drop_last: bool = False,
    ) -> None:
        others = batch_size // 2 if unlabelled is None else unlabelled
        _check_half(batch_size, others)
        parts = getattr(sampler.dataset, 'datasets', ())
        if len(parts) != 2:
            raise ValueError(
                f'PartlyLabelledBatchSampler draws from a data set of two '
                f'parts, got a {type(sampler.dataset).__name__}. Set '
                f"train_dataloader.dataset=dict(type='mmkd."
                f"PartlyLabelledDataset', dataset=…, unlabelled='FOLDER')."
            )
        _check_sampler(type(sampler))
        self.sampler, self.batch_size = sampler, batch_size
        self.sizes = tuple(len(part) for part in parts)
        self.counts = batch_size - others, others
        self.orders: dict[int, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        shown = self.batch_size * self.sampler.world_size
        return math.ceil(self.sizes[0] / shown)

    def __iter__(self) -> Iterator[list[int]]:
        batches = count()
        if isinstance(self.sampler, DefaultSampler):
            first = len(self) * self.sampler.epoch
            batches = range(first, first + len(self))
        for batch in batches:
            number = batch * self.sampler.world_size + self.sampler.rank
            yield self._part(0, number) + self._part(1, number)

    def _part(self, part: int, number: int) -> list[int]:
        """What a batch, of those of all processes, has of one of the sets."""
        size, images = self.sizes[part], self.counts[part]
        before = part * self.sizes[0]
        return [
            before + self._order(part, place // size)[place % size]
            for place in range(number * images, (number + 1) * images)
        ]

    def _order(self, part: int, turn: int) -> Sequence[int]:
        """A set's images as they come when it is used the nth time."""
        if not self.sampler.shuffle:
            return range(self.sizes[part])
        if self.orders.get(part, (None,))[0] != turn:
            draws = np.random.default_rng([self.sampler.seed, part, turn])
            order = draws.permutation(self.sizes[part]).tolist()
            self.orders[part] = turn, order
        return self.orders[part][1]


def _check_half(batch_size: int, unlabelled: int) -> None:
    if not 0 < unlabelled < batch_size:
        raise ValueError(
            f'PartlyLabelledBatchSampler needs a labelled and an unlabelled '
            f'image in each batch, got {unlabelled} unlabelled of '
            f'{batch_size}. Set train_dataloader.batch_size to 2 or more, and '
            f'batch_sampler.unlabelled to less than that.'
        )


def _check_sampler(kind: Any) -> None:
    if kind not in (DefaultSampler, InfiniteSampler):
        raise ValueError(
            f'PartlyLabelledBatchSampler chooses the images of each batch, '
            f'but the config has a {getattr(kind, "__name__", kind)} for '
            f"that. Set train_dataloader.sampler=dict(type='DefaultSampler', "
            f'shuffle=True).'
        )

"""A detector's config for other data: classes, heads, loaders, evaluators.

What MMDetection asks to be written by hand, in some eight places that must
agree, follows from the config and the annotations. It is written as a config
file, to read, to edit and to commit.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmkd.classes import with_classes
from mmkd.compat.checkpoint import check_file
from mmkd.configs import read_config, student_config
from mmkd.datasets.check import check_dataset
from mmkd.datasets.splits import Split, classes_with_boxes, find_splits
from mmkd.files import whole
from mmkd.plan import (
    Typed,
    check_detector,
    from_folder,
    published_weights,
    written,
)

WHO = 'write_config.py'
#: Loaders and evaluators of a config, and the split that each is of.
TESTED = ('val', 'test')
#: Names of packaged configs from which a file can inherit.
INHERITED = r'\w+::[\w./-]+'


def config_for(
    source: str,
    data: str | Path,
    out: str | Path,
    splits: Mapping[str, Split],
    classes: Sequence[str],
    weights: str | None = None,
) -> str:
    """A config file that trains a detector on other data.

    Args:
        source: The detector's plain config, for COCO's format: a path or
            ``'mmdet::…'``.
        data: Folder of the data set.
        out: Where the file is going to stand.
        splits: As :func:`mmkd.datasets.splits.find_splits` returns them. The
            validation split is tested on where there is no test split.
        classes: Names, in the order of the annotations.
        weights: What the training starts from.

    Returns:
        The file's text.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the config has teachers of its own, is none of a
            detector, or asks for something else than boxes, or masks, in
            COCO's format.
    """
    config = read_config(source, WHO)
    init_default_scope(config.get('default_scope', 'mmdet'))
    check_detector('config', config)
    if student_config(config.model) != config.model:
        raise ValueError(
            f'{source} has teachers of its own. Name the plain configs '
            f'of student and teacher, one after the other, and teach then.'
        )
    if '::' in source and not re.fullmatch(INHERITED, source):
        raise ValueError(
            f'{WHO} cannot write a config that inherits from {source!r}: '
            f'MMEngine takes letters, digits and _ - . / in such a name. Take '
            f'another config, for instance '
            f'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
        )
    _check_masks(source, config, splits['train'])
    root = Path(data).as_posix() + '/'
    said = [
        f'"""{Path(source.partition("::")[2] or source).stem} for '
        f'{len(classes)} classes of {root}, written by mmkd."""',
        f'_base_ = {from_folder(source, Path(out).parent)!r}',
        f'data_root = {root!r}\n'
        f'metainfo = {written(dict(classes=tuple(classes)))}',
    ]
    model = _difference(
        config.model.to_dict(),
        with_classes(config.model, len(classes)).to_dict(),
    )
    if model:
        said.append(f'model = {written(model)}')
    for name in ('train', *TESTED):
        split = splits.get(name, splits['val'])
        loader = f'{name}_dataloader'
        said.append(f'{loader} = {written(_loader(config, loader, split))}')
        if name in TESTED:
            evaluator = f'{name}_evaluator'
            change = _evaluator(config, evaluator, split)
            said.append(f'{evaluator} = {written(change)}')
    if (config.get('auto_scale_lr') or {}).get('base_batch_size'):
        said.append(
            '# By the images of a step, however many GPUs there are.\n'
            'auto_scale_lr = dict(enable=True)'
        )
    if weights is not None:
        said.append(f'load_from = {weights!r}')
    return '\n\n'.join(said) + '\n'


def _check_masks(source: str, config: Config, split: Split) -> None:
    boxes = split.content.get('annotations') or []
    if not _asks('with_mask', config.get('train_dataloader')):
        return
    if all(
        isinstance(one, Mapping) and one.get('segmentation') for one in boxes
    ):
        return
    raise ValueError(
        f'{source} learns masks, and {split.annotations!r} has boxes without '
        f'one. Take a detector of boxes, for instance '
        f'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    )


def _asks(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value.get(key)) or any(
            _asks(key, one) for one in value.values()
        )
    if isinstance(value, (list, tuple)):
        return any(_asks(key, one) for one in value)
    return False


def _difference(old: Mapping, new: Mapping) -> dict:
    """What is to be merged into one dict of the same keys for another.

    A list can only be replaced as a whole.
    """
    found = {}
    for key, value in new.items():
        if value == old[key]:
            continue
        nested = isinstance(value, Mapping)
        found[key] = _difference(old[key], value) if nested else value
    return found


def _loader(config: Config, name: str, split: Split) -> dict:
    """Changes of a loader, down to the data set inside of its wrappers."""
    dataset = (config.get(name) or {}).get('dataset') or {}
    depth = 1
    while isinstance(dataset.get('dataset'), Mapping):
        dataset, depth = dataset['dataset'], depth + 1
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    folders = dataset.get('data_prefix') or {}
    if not (isinstance(kind, type) and issubclass(kind, CocoDataset)) or set(
        folders
    ) != {'img'}:
        raise ValueError(
            f'{config.filename}: {name} has a data set of '
            f'{dataset.get("type")} with {", ".join(folders) or "no"} '
            f'folders, and this writes one of CocoDataset with images. '
            f'Take a config that ends in _coco.py and learns boxes or masks.'
        )
    change: dict = dict(
        data_root=Typed('data_root'),
        metainfo=Typed('metainfo'),
        ann_file=split.annotations,
        data_prefix=dict(img=split.pictures and split.pictures + '/'),
    )
    for _ in range(depth):
        change = dict(dataset=change)
    return change


def _evaluator(config: Config, name: str, split: Split) -> Any:
    """Changes of an evaluator, which may be a list of several."""
    found = config.get(name)
    several = isinstance(found, (list, tuple))
    told = Typed(f'data_root + {split.annotations!r}')
    changes = []
    for one in found if several else [found or {}]:
        if one.get('type') != 'CocoMetric':
            raise ValueError(
                f'{config.filename}: {name} is a {one.get("type")}, and '
                f'this writes a CocoMetric.'
            )
        kept = one.to_dict() if several else {}
        changes.append(dict(kept, ann_file=told))
    return changes if several else changes[0]


# -------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``write_config.py``.

    Returns:
        Exit status: 0, or 1 after a message on what to do.
    """
    options = _parser().parse_args(arguments)
    try:
        for line in _run(options):
            print(line, flush=True)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> Iterator[str]:
    out = options.out
    if out.exists():
        raise ValueError(
            f'{WHO} would replace {out}, which is there already. Name '
            f'another file: --out FILE.py'
        )
    named = {
        name: getattr(options, name)
        for name in ('train', *TESTED)
        if getattr(options, name) is not None
    }
    splits = find_splits(options.data, WHO, named)
    classes = classes_with_boxes(splits['train'], WHO)
    weights = _weights(options)
    text = config_for(
        options.config, options.data, out, splits, classes, weights
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as partial:
        partial.write_text(text, encoding='utf-8')
    try:
        yield from _looked_at(out)
    except (OSError, ValueError):
        out.unlink()
        raise
    yield f'\nTrain it with:\n  python tools/train.py {shlex.quote(str(out))}'


def _weights(options: argparse.Namespace) -> str | None:
    """What ``--pretrained`` asks for."""
    given = options.pretrained
    if given == '':
        try:
            return published_weights(options.config)
        except FileNotFoundError as error:
            read_config(options.config, WHO)  # whether there is one at all
            raise FileNotFoundError(
                f'{WHO}: no weights are published for {options.config}. Name '
                f'a file: --pretrained FILE.pth, or leave it out.'
            ) from error
    if given is not None and '://' not in given:
        check_file(given, f'{WHO} --pretrained')
    return given


def _looked_at(out: Path) -> Iterator[str]:
    """What is seen of the data by the config that was written."""
    config = read_config(out, WHO)
    yield f'{out}: {len(config.metainfo.classes)} classes'
    for name in ('train', *TESTED):
        loader = f'{name}_dataloader'
        for report in check_dataset(
            config[loader].dataset, f'{loader}.dataset', name == 'train'
        ):
            yield f'{name}: {report.images} images, {report.boxes} boxes'
            yield from (f'warning: {one}' for one in report.warnings)
            yield from report.notes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=WHO,
        description="Write a detector's config for your own data: classes, "
        'heads, loaders, evaluators.',
    )
    parser.add_argument(
        'config', help='a path or mmdet::folder/file.py, trained on COCO'
    )
    parser.add_argument(
        'data',
        type=Path,
        metavar='FOLDER',
        help="of a data set in COCO's format, as prepare_data.py writes it, "
        'COCO itself is laid out, or with _annotations.coco.json in train '
        'and valid',
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='the file to write'
    )
    for name in ('train', *TESTED):
        parser.add_argument(
            f'--{name}',
            metavar='FILE',
            help=f'annotations of {name}, from the folder, if they are '
            f'called otherwise',
        )
    parser.add_argument(
        '--pretrained',
        nargs='?',
        const='',
        metavar='FILE',
        help='start from the weights that mmdet publishes for the config, or '
        'from a file; what counts classes starts anew',
    )
    return parser

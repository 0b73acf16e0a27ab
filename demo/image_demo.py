"""Draw what a detector finds in a picture, beside what its teacher finds.

python demo/image_demo.py IMAGE CONFIG CHECKPOINT
python demo/image_demo.py IMAGE CONFIG CHECKPOINT --teacher
python demo/image_demo.py IMAGE CONFIG CHECKPOINT --teacher CONFIG CHECKPOINT
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn

from mmkd.analysis.pictures import (
    Boxes,
    instances,
    read_image,
    side_by_side,
)
from mmkd.checks import check_fraction, check_name
from mmkd.compat.checkpoint import add_trust_option, classes_of, trusting
from mmkd.configs import read_config, student_config
from mmkd.engine.fit import load_strictly


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with trusting(*options.trust_checkpoint):
            print(draw(options))
    except (FileNotFoundError, ValueError) as error:
        print(f'image_demo.py: {error}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Detections of a student and its teacher, side by side.'
    )
    parser.add_argument('image', help='any picture')
    parser.add_argument(
        'config',
        help="the student's config, plain or with teachers: a path, "
        "'mmdet::folder/file.py' or 'mmkd::folder/file.py'",
    )
    parser.add_argument('checkpoint', help="the student's weights")
    parser.add_argument(
        '--teacher',
        nargs='*',
        metavar='',
        help='CONFIG CHECKPOINT of another detector; or the name of a teacher '
        'in the config; or nothing for the only one there',
    )
    parser.add_argument(
        '--out', help='picture to write; IMAGE_detections.png by default'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='detections below this score are not drawn (default: 0.3)',
    )
    parser.add_argument(
        '--device', help="'cpu', 'cuda:1', …; a GPU where there is one"
    )
    add_trust_option(parser)
    return parser


def draw(options: argparse.Namespace) -> str:
    """Detect, draw, and say what was found.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file or an option does not fit.
    """
    check_fraction('--score-thr', score_thr=options.score_thr)
    image = read_image(options.image)
    config = read_config(options.config, 'image_demo.py')
    detectors = {'student': (config, options.checkpoint, True)}
    if options.teacher is not None:
        detectors['teacher'] = find_teacher(options.teacher, config)
    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    found, classes = {}, []
    for name, (source, checkpoint, ema) in detectors.items():
        source = _with_pipeline(source, config)
        detector = load(source, checkpoint, device, ema)
        boxes, scores, labels = detect(detector, image, options.score_thr)
        labels = _relabel(labels, detector.dataset_meta['classes'], classes)
        found[f'{name}: {type(detector).__name__}'] = boxes, scores, labels
    out = options.out or f'{Path(options.image).stem}_detections.png'
    side_by_side(
        image,
        [(title, *boxes) for title, boxes in found.items()],
        classes,
        out,
    )
    lines = [
        _summary(title, boxes, classes, options.score_thr)
        for title, boxes in found.items()
    ]
    return '\n'.join([*lines, f'drawn in {out}'])


def _with_pipeline(source: Config, student: Config) -> Config:
    """A config that says how images are read; a bare one gets the student's.

    Raises:
        ValueError: If the student's does not say either.
    """
    if 'test_dataloader' in source:
        return source
    if 'test_dataloader' not in student:
        raise ValueError(
            f'{student.filename or "The config"} has no test_dataloader, '
            f'which says how images are read and resized. Name the whole '
            f'config the detector was trained with.'
        )
    source = source.copy()
    source.test_dataloader = student.test_dataloader
    return source


def find_teacher(
    words: Sequence[str], config: Config
) -> tuple[Config, str, bool]:
    """Config and checkpoint of the teacher that ``--teacher`` names.

    Args:
        words: What stands behind the option.
        config: The student's config.

    Returns:
        Config, checkpoint, and whether averaged weights are preferred.

    Raises:
        ValueError: If no single teacher is meant.
    """
    if len(words) == 2:
        return read_config(words[0], '--teacher'), words[1], True
    teachers = config.model.get('teachers')
    if len(words) > 2 or not teachers:
        raise ValueError(
            f'--teacher expected CONFIG CHECKPOINT'
            f'{", a name, or nothing" if teachers else ""}, got '
            f'{" ".join(words) or "nothing"}'
            f'{"" if teachers else "; the config names no teacher"}.'
        )
    name = words[0] if words and words[0] != 'auto' else None
    if name is None and len(teachers) > 1:
        raise ValueError(
            f'The config names {len(teachers)} teachers, say which: '
            f'--teacher {" or --teacher ".join(teachers)}.'
        )
    name = name or next(iter(teachers))
    check_name('The config', 'teacher', name, teachers)
    teacher: Mapping[str, Any] = teachers[name]
    if teacher.get('checkpoint') is None:
        raise ValueError(
            f'The config names no checkpoint for teacher {name!r}. Type: '
            f'--teacher CONFIG CHECKPOINT'
        )
    source = read_config(
        teacher['config'], f'Teacher {name!r}', teacher.get('cfg_options')
    )
    return source, teacher['checkpoint'], teacher.get('ema', True)


def load(
    config: Config, checkpoint: str | Path, device: str, ema: bool = True
) -> nn.Module:
    """A detector with all of its weights, ready for ``inference_detector``.

    Args:
        config: Of a distillation config, the student.
        checkpoint: A file, or an address.
        device: Where it runs.
        ema: Take the averaged weights where the file has them.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint is another detector's.
    """
    # Here, because it needs mmcv's operators, which mmkd provides.
    from mmdet.apis import init_detector

    config = config.copy()
    config.model = student_config(config.model)
    # It warns that it got no checkpoint; its own way of loading one would not
    # notice that half of it is missing.
    with warnings.catch_warnings(record=True):
        detector = init_detector(config, palette='random', device=device)
    weights = load_strictly(detector, checkpoint, 'image_demo.py', ema)
    detector.dataset_meta['classes'] = classes_of(weights) or _classes(config)
    return detector


def detect(detector: nn.Module, image: np.ndarray, score_thr: float) -> Boxes:
    """Boxes, scores and labels of an RGB image, (H, W, 3)."""
    from mmdet.apis import inference_detector

    bgr = np.ascontiguousarray(image[..., ::-1])  # as its pipeline loads it
    return instances(inference_detector(detector, bgr), score_thr)


def _classes(config: Config) -> tuple[str, ...]:
    """What the classes are called where a checkpoint does not say."""
    dataset = dict(config.test_dataloader.dataset, lazy_init=True)
    return tuple(DATASETS.build(dataset).metainfo.get('classes', ()))


def _relabel(
    labels: np.ndarray, own: Sequence[str], shared: list[str]
) -> np.ndarray:
    """Number labels by one list of names, which grows as needed."""
    names = [
        own[label] if label < len(own) else f'class {label}'
        for label in labels
    ]
    for name in [*own, *names]:
        if name not in shared:
            shared.append(name)
    return np.array([shared.index(name) for name in names], dtype=int)


def _summary(
    title: str, boxes: Boxes, classes: Sequence[str], score_thr: float
) -> str:
    labels = boxes[2]
    counts = [
        f'{int((labels == label).sum())} {classes[label]}'
        for label in sorted(set(labels.tolist()))
    ]
    found = ', '.join(counts) or 'nothing'
    return f'{title} finds {found} above {score_thr:g}'


if __name__ == '__main__':
    sys.exit(main())

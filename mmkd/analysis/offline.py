"""What tools share that ask a teacher about a training set beforehand."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS

from mmkd.compat.checkpoint import add_trust_option, check_file, trusting
from mmkd.store import Store
from mmkd.teachers import Teacher

#: Seconds between two times that progress is told.
EVERY = 60.0


def command(
    make: Callable[[argparse.Namespace], None], options: argparse.Namespace
) -> int:
    """Run a tool; what a user can mend is told without a traceback."""
    try:
        with trusting(*options.trust_checkpoint):
            make(options)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def add_images(parser: argparse.ArgumentParser) -> None:
    """Options that say which images, where, and what may be replaced."""
    parser.add_argument(
        '--ann-file', help='images to describe, COCO; default: training set'
    )
    parser.add_argument('--img-prefix', help='their folder')
    parser.add_argument('--device', default='cpu')
    add_trust_option(parser)
    parser.add_argument(
        '--overwrite', action='store_true', help='begin anew in any case'
    )
    parser.add_argument(
        '--overwrite-if-changed',
        action='store_true',
        help='begin anew if --out was made otherwise',
    )


def check_weights(who: str, files: Sequence[str]) -> None:
    """Fail before anything is built if weights are nowhere.

    Args:
        who: Name of the tool, for messages.
        files: Each a file, or an address from which it is fetched later.

    Raises:
        FileNotFoundError: If a file does not exist.
        CheckpointError: If it is empty, cut off, or no checkpoint.
    """
    for file in files:
        if '://' not in file:
            check_file(file, who)


def images_of(config: Any, options: argparse.Namespace) -> Any:
    """The training set, seen through the pipeline of tests."""
    tested = config.test_dataloader.dataset
    settings = dict(config.train_dataloader.dataset)
    while 'dataset' in settings:
        settings = dict(settings['dataset'])
    if options.ann_file:
        settings.update(data_root='', ann_file=options.ann_file)
        settings['data_prefix'] = dict(img=options.img_prefix or '')
    settings.update(filter_cfg=None, pipeline=tested.pipeline, test_mode=True)
    return DATASETS.build(settings)


def loaded(options: argparse.Namespace, file: str) -> Teacher:
    """The teacher of a command, with the weights of a file."""
    teacher = Teacher(options.config, file)
    teacher.load()
    teacher.to(torch.device(options.device))
    return teacher


def fingerprint(
    config: Any,
    dataset: Any,
    teachers: Sequence[Teacher],
    annotated: bool = False,
) -> str:
    """A digest of config, weights and images.

    Args:
        config: The teacher's.
        dataset: The images.
        teachers: Those that are asked.
        annotated: Whether what is annotated counts as well.
    """
    digest = hashlib.sha256(config.pretty_text.encode())
    for teacher in teachers:
        for name, value in teacher.detector.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    for index in range(len(dataset)):
        one = dataset.get_data_info(index)
        said = [one['img_id'], one['img_path'], one['width'], one['height']]
        if annotated:
            said += [
                [list(each['bbox']), each['bbox_label'], each['ignore_flag']]
                for each in one['instances']
            ]
        digest.update(json.dumps(said).encode())
    return digest.hexdigest()


def goes_on(
    who: str,
    options: argparse.Namespace,
    info: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> bool:
    """Whether what is there was begun by the same command.

    Args:
        who: Name of the tool, for messages.
        options: Of the command.
        info: What would be made, with ``complete=False``.
        theirs: What is there.

    Returns:
        True to go on, False to begin anew.

    Raises:
        FileExistsError: If it was made otherwise and may not be replaced.
    """
    if options.overwrite:
        return False
    changed = [
        key
        for key in info
        if key != 'complete' and theirs.get(key) != info[key]
    ]
    if not changed:
        return True
    if options.overwrite_if_changed:
        return False
    raise FileExistsError(
        f'{who} would replace {Path(options.out)}, which was made otherwise '
        f'({", ".join(changed)} differ). Name another --out, or type '
        f'--overwrite.'
    )


def store_goes_on(
    who: str,
    store: Store,
    options: argparse.Namespace,
    about: Mapping[str, Any],
) -> bool:
    """Whether a store that is there was begun by the same command.

    Args:
        who: Name of the tool, for messages.
        store: What would be written to; it is closed again.
        options: Of the command.
        about: What the store would hold.

    Raises:
        FileExistsError: If it was made otherwise and may not be replaced.
    """
    try:
        theirs = store.about
    except FileNotFoundError:
        return False
    finally:
        store.close()
    told = {key: one for key, one in about.items() if key != 'command'}
    return goes_on(who, options, told, theirs)


def typed(tool: str, arguments: Sequence[str]) -> str:
    """The command as it was typed, without what replaces files.

    Example:
        >>> typed('tools/x.py', ['a b.py', '--overwrite'])
        "python tools/x.py 'a b.py'"
    """
    kept = [one for one in arguments if not one.startswith('--overwrite')]
    return shlex.join(['python', tool, *kept])

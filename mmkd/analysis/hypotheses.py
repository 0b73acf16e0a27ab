"""Write what a teacher says of a set of images, several times, to one file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmkd.analysis.box_draws import BoxDraws
from mmkd.analysis.offline import (
    EVERY,
    add_images,
    check_weights,
    command,
    fingerprint,
    goes_on,
    images_of,
    loaded,
)
from mmkd.configs import read_config
from mmkd.datasets.hypotheses import (
    DRAWN,
    GENERATORS,
    Boxes,
    annotations,
    generate,
    nbest,
    write_cache,
)
from mmkd.reading import read_json
from mmkd.teachers import Teacher

#: Settings that say which file it is; others change nothing in it.
SETTINGS = ('generator', 'num_hypotheses', 'score_thr', 'temperature')
SETTINGS += ('jitter', 'bins', 'dropout', 'seed')


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``tools/make_hypotheses.py``."""
    return command(make, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='make_hypotheses.py', description=__doc__
    )
    parser.add_argument('config', help="the teacher's config")
    parser.add_argument(
        'checkpoint',
        nargs='+',
        help='its weights, a file or an address; several for checkpoints',
    )
    parser.add_argument('--out', required=True, help='the JSON file')
    parser.add_argument('--generator', choices=GENERATORS, default='sample')
    parser.add_argument('--num-hypotheses', type=int, default=10)
    parser.add_argument('--score-thr', type=float, default=0.3)
    parser.add_argument('--temperature', type=float, default=1.0)
    parser.add_argument('--jitter', type=float, default=0.0)
    parser.add_argument(
        '--bins',
        action='store_true',
        help="draw boxes from the distributions of a GFL's head, too",
    )
    parser.add_argument('--dropout', type=float, default=0.1)
    parser.add_argument('--seed', type=int, default=0)
    add_images(parser)
    return parser


def make(options: argparse.Namespace) -> None:
    """Make the file, or go on with one that was interrupted.

    Raises:
        FileExistsError: If there is a file of other settings, weights or
            data, and ``overwrite`` is not set.
        ValueError: If ``checkpoints`` is not given one for each hypothesis.
    """
    number, several = options.num_hypotheses, options.checkpoint
    wanted = number if options.generator == 'checkpoints' else 1
    if number < 1 or len(several) != wanted:
        raise ValueError(
            f'make_hypotheses.py needs {max(wanted, 1)} checkpoints for '
            f'--generator {options.generator} --num-hypotheses {number}, got '
            f'{len(several)}. Name one for each hypothesis with checkpoints, '
            f'and one alone with any other generator.'
        )
    check_weights('make_hypotheses.py', several)
    init_default_scope('mmdet')
    config = read_config(options.config, 'make_hypotheses.py')
    dataset = images_of(config, options)
    teachers = [loaded(options, file) for file in several]
    info = dict(
        {name: getattr(options, name) for name in SETTINGS},
        fingerprint=fingerprint(config, dataset, teachers),
        complete=False,
    )
    cache = _begun(options, info, dataset)
    known = {one['id'] for one in cache['images']}
    describe = _describer(options, teachers, len(dataset.metainfo['classes']))
    ids = [one['id'] for one in cache['categories']]
    written = time.monotonic()
    for index in range(len(dataset)):
        image = dataset.get_data_info(index)
        if image['img_id'] in known:
            continue
        sets = describe(dataset[index], image['img_id'])
        cache['annotations'] += annotations(
            image['img_id'], sets, len(cache['annotations']), ids
        )
        cache['images'].append(
            dict(
                id=image['img_id'],
                file_name=Path(image['img_path']).name,
                width=image['width'],
                height=image['height'],
            )
        )
        if time.monotonic() - written > EVERY:
            write_cache(options.out, cache)
            written = time.monotonic()
            print(f'{index + 1} of {len(dataset)} images', flush=True)
    cache['info']['complete'] = True
    write_cache(options.out, cache)
    print(f'{options.out}: {len(cache["annotations"])} boxes')


def _begun(
    options: argparse.Namespace, info: Mapping[str, Any], dataset: Any
) -> dict:
    out = Path(options.out)
    if not options.overwrite and out.is_file():
        cache = read_json(out, 'make_hypotheses.py', kind=dict)
        theirs = cache.get('info', {})
        if goes_on('make_hypotheses.py', options, info, theirs):
            return cache
    return _empty(info, dataset)


def _empty(info: Mapping[str, Any], dataset: Any) -> dict:
    classes = dataset.metainfo['classes']
    ids = getattr(dataset, 'cat_ids', range(len(classes)))
    return dict(
        info=dict(info),
        categories=[
            dict(id=number, name=name) for number, name in zip(ids, classes)
        ],
        images=[],
        annotations=[],
    )


def _describer(
    options: argparse.Namespace, teachers: Sequence[Teacher], classes: int
) -> Callable[[dict, int], list[Boxes]]:
    number, low = options.num_hypotheses, options.score_thr
    drawn = options.generator in DRAWN
    if options.bins and not drawn:
        raise ValueError(
            f'make_hypotheses.py --bins draws boxes, but --generator '
            f'{options.generator} draws nothing. Choose sample or mbr.'
        )
    draws = BoxDraws(teachers[0].detector) if options.bins else None

    def describe(data: dict, image: int) -> list[Boxes]:
        seed = np.random.SeedSequence([options.seed, image])
        if options.generator == 'mc_dropout':
            with dropping(teachers[0].detector, options.dropout, seed):
                found = [find(teachers[0], data) for _ in range(number)]
            return [nbest(one, 1, low)[0] for one in found]
        if options.generator == 'checkpoints':
            found = [find(teacher, data) for teacher in teachers]
            return [nbest(one, 1, low)[0] for one in found]
        random, boxes = np.random.default_rng(seed), None
        with draws.listening() if draws else nullcontext():
            found = find(teachers[0], data)
        if draws:
            sample = data['data_samples']
            boxes = partial(
                draws.draw, found, sample, random, options.temperature
            )
        return generate(
            found,
            options.generator,
            number,
            classes,
            random if drawn else None,
            low,
            options.temperature,
            options.jitter,
            boxes,
        )

    return describe


@torch.no_grad()
def find(teacher: Teacher, data: dict) -> Boxes:
    """A teacher's boxes of one image, in pixels of the image as stored."""
    (sample,) = teacher.detector.test_step(pseudo_collate([data]))
    found = sample.pred_instances
    return Boxes(
        found.bboxes.cpu().double().numpy(),
        found.scores.cpu().double().numpy(),
        found.labels.cpu().numpy(),
    )


@contextmanager
def dropping(
    detector: nn.Module, rate: float, seed: np.random.SeedSequence
) -> Iterator[None]:
    """Drop channels of the maps that the neck gives, and what is dropped
    in training, with draws of their own.

    Args:
        detector: Any of mmdet with a neck.
        rate: Share of channels that is dropped; the others grow by as much.
        seed: Of the draws.
    """

    def drop(_: nn.Module, __: tuple, maps: Sequence[Tensor]) -> tuple:
        return tuple(nn.functional.dropout2d(one, rate) for one in maps)

    layers = [
        one
        for one in detector.modules()
        if isinstance(one, nn.modules.dropout._DropoutNd) and one.p
    ]
    if not getattr(detector, 'with_neck', False):
        raise ValueError(
            f'make_hypotheses.py drops channels behind the neck, which '
            f'{type(detector).__name__} has not. Choose another --generator, '
            f'for instance sample.'
        )
    hook = detector.neck.register_forward_hook(drop)
    with torch.random.fork_rng():
        torch.manual_seed(int(seed.generate_state(1)[0]))
        try:
            for one in layers:
                one.train()
            yield
        finally:
            hook.remove()
            for one in layers:
                one.eval()

"""The command that times detectors as they are deployed.

What counts after a training is how long the student takes for an image: from
the image in memory, as a data loader gives it, to its boxes. Normalisation and
post-processing count, the teacher and the terms do not. Several detectors take
turns, in an order drawn anew each round, so that a machine that slows down
slows all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from torch import nn

from mmkd.analysis.cost import gflops, parameters, quiet, sample
from mmkd.analysis.focus import spaced
from mmkd.checks import check_positive
from mmkd.compat.checkpoint import add_trust_option, trusting
from mmkd.configs import read_config, student_config
from mmkd.engine.fit import load_strictly
from mmkd.files import whole
from mmkd.laboratory.results import machine, versions
from mmkd.randomness import preserved
from mmkd.registry import MODELS
from mmkd.teachers import without_init

#: Exit status if no detector keeps to the budget.
OVER = 2
#: Share of images that the slower figure is not below.
SLOW = 0.9


@dataclass(frozen=True)
class Deployed:
    """What one detector takes.

    Attributes:
        name: Its config, and its checkpoint if it has one.
        weights: Its checkpoint; random ones if None.
        parameters: Of the student alone.
        gflops: Billions of multiply-accumulates at ``size``.
        size: Height and width of a median image, pixels.
        milliseconds: Of each image in each round.
    """

    name: str
    weights: str | None
    parameters: int
    gflops: float
    size: tuple[int, int]
    milliseconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def slow(self) -> float:
        """What nine of ten images do not exceed."""
        taken = sorted(self.milliseconds)
        return taken[math.ceil(SLOW * len(taken)) - 1]

    def fits(self, budget: float) -> bool:
        """Whether nine of ten images take no more milliseconds."""
        return self.slow <= budget


def latency(
    detectors: Mapping[str, tuple[nn.Module, Sequence[Any]]],
    rounds: int = 15,
    amp: bool = False,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds to detect in an image, post-processing included.

    In each round every detector takes one of its images. One round, which is
    not counted, warms up.

    Args:
        detectors: Each with its images, batches as a data loader gives them.
        rounds: Of the clock.
        amp: Whether they run in mixed precision.
        seed: Of the order in which they take turns.

    Returns:
        One number a round, by detector.
    """
    times: dict[str, list[float]] = {name: [] for name in detectors}
    dice = random.Random(seed)
    for turn in range(rounds + 1):
        for name in dice.sample(list(detectors), len(detectors)):
            detector, images = detectors[name]
            taken = _timed(detector.eval(), images[turn % len(images)], amp)
            if turn:
                times[name].append(1000 * taken)
    return times


@torch.no_grad()
def _timed(detector: nn.Module, image: Any, amp: bool) -> float:
    device = next(detector.parameters()).device
    wait = torch.cuda.synchronize if device.type == 'cuda' else _nothing
    precision = torch.autocast(device.type) if amp else nullcontext()
    wait(device)
    begin = time.perf_counter()
    with precision:
        detector.test_step(image)
    wait(device)
    return time.perf_counter() - begin


def _nothing(device: torch.device) -> None:
    pass


def noise(size: tuple[int, int]) -> dict[str, list]:
    """A made-up image of a height and a width, in pixels."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return dict(inputs=[image], data_samples=[sample(size)])


def images_of(config: Config, count: int) -> list[Any]:
    """Test images through their pipeline, from all over the data set.

    Raises:
        FileNotFoundError: If there are none; the message names the option
            that does without.
        ValueError: If the config has no data.
    """
    loader = config.get('test_dataloader')
    if loader is None:
        raise ValueError(
            f'latency.py: {config.filename} has no test_dataloader, which '
            f'says how images are read and resized. For images of noise add '
            f'--size HEIGHT WIDTH.'
        )
    try:
        with redirect_stdout(None):  # pycocotools chats
            dataset = DATASETS.build(loader.dataset)
        return [
            pseudo_collate([dataset[place]])
            for place in spaced(len(dataset), count)
        ]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{error} Put the data there, or take images of noise with '
            f'--size HEIGHT WIDTH.'
        ) from error


def measure(
    names: Iterable[str], options: argparse.Namespace
) -> list[Deployed]:
    """Build, load and time what is named.

    Args:
        names: Configs, each with ``=CHECKPOINT`` behind it or not.
        options: Of the command line.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a checkpoint is another detector's.
    """
    built, facts = {}, {}
    for name in names:
        source, _, weights = name.partition('=')
        config = read_config(source, 'latency.py')
        init_default_scope(config.get('default_scope', 'mmdet'))
        detector = MODELS.build(without_init(student_config(config.model)))
        detector.init_weights()
        if weights:
            load_strictly(detector, weights, 'latency.py')
        images = (
            images_of(config, options.images)
            if options.size is None
            else [noise(tuple(options.size))]
        )
        sizes = [tuple(one['inputs'][0].shape[-2:]) for one in images]
        size = sorted(sizes, key=math.prod)[len(sizes) // 2]
        facts[name] = dict(
            weights=weights or None,
            parameters=parameters(detector),
            gflops=gflops(detector, size),
            size=size,
        )
        built[name] = detector.to(options.device), images
    times = latency(built, options.rounds, options.amp, options.seed)
    return [
        Deployed(name, milliseconds=times[name], **facts[name])
        for name in built
    ]


def report(found: Sequence[Deployed], options: argparse.Namespace) -> str:
    """A table, and how it was measured."""
    budget = options.budget
    within = '' if budget is None else f' within {budget:g} ms |'
    lines = [
        f'| detector | parameters | GFLOPs | ms an image | nine of ten within '
        f'| images a second |{within}',
        f'|---|---|---|---|---|---|{"---|" * bool(within)}',
    ]
    for one in found:
        fits = (
            '' if budget is None else f' {"yes" * one.fits(budget) or "no"} |'
        )
        lines.append(
            f'| {one.name} | {one.parameters / 1e6:.2f} M | {one.gflops:.3g} '
            f'| {one.median:.1f} | {one.slow:.1f} ms | '
            f'{1000 / one.median:.1f} |{fits}'
        )
    sizes = {f'{one.size[0]}×{one.size[1]}' for one in found}
    used = versions()
    threads = f'{options.threads} thread{"s" * (options.threads > 1)}'
    lines += [
        '',
        f'{machine()}; on {options.device}, {threads}, '
        f'{"mixed precision" if options.amp else "float32"}, one image of '
        f'{" or ".join(sorted(sizes))} (height×width, '
        f'{"noise" if options.size else "median of test images"}), '
        f'{options.rounds} rounds, torch {used["torch"]}.',
    ]
    if any(one.weights is None for one in found):
        lines.append(
            'With random weights many detectors find next to nothing, and '
            'post-processing costs less than it will: name CONFIG=CHECKPOINT.'
        )
    return '\n'.join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``latency.py``.

    Returns:
        Exit status: 0, 1 after a message on what to do, 2 if there is a budget
        and no detector keeps to it.
    """
    options = _parser().parse_args(arguments)
    options.device = options.device or get_device()
    # mmdet 3.3.0 warns of its own attributes at each detector.
    warnings.simplefilter('ignore')
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        check_positive(
            'latency.py',
            rounds=options.rounds,
            images=options.images,
            threads=options.threads,
            **dict(zip(('height', 'width'), options.size or ())),
            **({} if options.budget is None else dict(budget=options.budget)),
        )
        with (
            trusting(*options.trust_checkpoint),
            preserved(options.seed),
            quiet(),
        ):
            found = measure(dict.fromkeys(options.detectors), options)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    print(report(found, options))
    if options.json:
        with whole(options.json) as part:
            part.write_text(
                json.dumps([asdict(one) for one in found], indent=1) + '\n'
            )
    budget = options.budget
    if budget is None or any(one.fits(budget) for one in found):
        return 0
    return OVER


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='latency.py',
        description='How long do detectors take for an image, as they are '
        'deployed? Without teachers and terms, one image at a time.',
    )
    parser.add_argument(
        'detectors',
        nargs='+',
        metavar='CONFIG[=CHECKPOINT]',
        help='a path, mmdet::folder/file.py or mmkd::folder/file.py; of a '
        'distillation config the student is timed',
    )
    parser.add_argument(
        '--budget',
        type=float,
        metavar='MS',
        help='milliseconds that nine of ten images may take; if no detector '
        f'keeps to them the exit status is {OVER}',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help="an image of noise, not the config's own test images",
    )
    for name, value in dict(images=8, rounds=40, threads=1).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--device', help='a GPU where there is one')
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', type=Path, metavar='FILE')
    add_trust_option(parser)
    return parser

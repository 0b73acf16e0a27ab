"""Faster ways to run a frozen detector, and whether they say the same.

A teacher only ever runs forward, so its BatchNorm can be folded into the
convolutions before it, its maps can lie channels last, and its products can be
those of half precision. That is done to a copy; the teacher itself stays what
its checkpoint says, for whatever reads its weights or runs its layers. The
copy's answers to the first batch are compared with the teacher's own, and
where they differ by more than is tolerated the next slower way is taken.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.memory import versions_of
from mmkd.structures.nested import leaves
from mmkd.taps import Record

#: What products are computed in.
PRECISIONS = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
#: Parts that can be compiled, where nothing below them is tapped.
PARTS = ('backbone', 'neck')

Run = Callable[[nn.Module, Tensor], Record]


@dataclass(frozen=True)
class Speed:
    """How a frozen detector is run.

    Attributes:
        precision: A key of :data:`PRECISIONS`. ``'fp32'`` leaves it to the
            mixed precision of the training, if there is any.
        channels_last: Whether maps lie channels last.
        fuse_bn: Whether BatchNorm is folded into convolutions.
        compile: Whether backbone and neck are compiled, where nothing below
            them is tapped. Pays where images have few sizes.
        tolerance: Greatest relative error of an output, by its norm, that the
            first batch may show.

    Raises:
        ValueError: If there is no such precision, or the tolerance is not
            positive.
    """

    precision: str = 'fp32'
    channels_last: bool = False
    fuse_bn: bool = False
    compile: bool = False
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        check_name('Teacher(fast=…)', 'precision', self.precision, PRECISIONS)
        check_positive('Teacher(fast=…)', tolerance=self.tolerance)

    @property
    def plain(self) -> bool:
        """Whether nothing is changed."""
        return self.precision == 'fp32' and not (
            self.channels_last or self.fuse_bn or self.compile
        )

    def slower(self) -> list[Speed]:
        """This and what to try after it, the least change first.

        Example:
            >>> one = Speed('bf16', fuse_bn=True)
            >>> [(each.precision, each.fuse_bn) for each in one.slower()]
            [('bf16', True), ('bf16', False), ('fp32', True)]
        """
        ways = itertools.product(
            dict.fromkeys([self.precision, 'fp32']),
            dict.fromkeys([self.channels_last, False]),
            dict.fromkeys([self.fuse_bn, False]),
        )
        found = [
            replace(self, precision=one, channels_last=other, fuse_bn=third)
            for one, other, third in ways
        ]
        return [one for one in found if not one.plain]


def fastest(device: torch.device) -> Speed:
    """What is known to be fast on a device, and safe.

    Half precision on GPUs with units for bfloat16. Not on CPUs, of which many
    have its instructions and run convolutions slower by them:
    ``fast=dict(precision='bf16')`` asks for it, and ``tools/benchmark.py
    --ways`` says whether it pays.
    """
    half = device.type == 'cuda' and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return Speed('bf16' if half else 'fp32', channels_last=True, fuse_bn=True)


def speed_of(
    fast: bool | Mapping[str, Any], device: torch.device
) -> Speed | None:
    """The speed that a config asks for; None where a teacher runs plainly.

    Args:
        fast: Whether to take what is fastest on the device, or what of it is
            to be otherwise, by the names of :class:`Speed`.
        device: Where it runs.

    Raises:
        ValueError: If a name or value is unknown.
    """
    if fast is False:
        return None
    given = {} if fast is True else dict(fast)
    for name in given:
        check_name(
            'Teacher(fast=…)', 'setting', name, Speed.__dataclass_fields__
        )
    speed = replace(fastest(device), **given)
    return None if speed.plain else speed


class Fast:
    """Runs a copy of a detector that does the same in less time.

    Args:
        detector: Frozen, in eval mode; it is left as it is.
        speed: How the copy runs.
        who: Named in messages.
    """

    def __init__(self, detector: nn.Module, speed: Speed, who: str) -> None:
        self.detector, self.speed, self.who = detector, speed, who
        self._chosen: Speed | None = None
        self._copy: nn.Module | None = None
        self._compared: frozenset[str] | None = None
        self._versions: list = []

    @property
    def fell_back(self) -> bool:
        """Whether the first batch ruled out what was asked for."""
        return self._compared is not None and self._chosen != self.speed

    def watch(self, run: Run, images: Tensor, paths: Sequence[str]) -> Record:
        """What the detector's taps return for a batch.

        Args:
            run: Runs a detector on images and records its taps.
            images: (N, 3, H, W).
            paths: The taps. Where some of them were not compared yet, the
                detector itself runs as well.
        """
        self._check_weights()
        if self._compared is None or not self._compared.issuperset(paths):
            return self._choose(run, images, paths)
        if self._chosen is None:
            return run(self.detector, images)
        return self._run(self._chosen, run, images)

    def _check_weights(self) -> None:
        """Forget a copy of weights that have changed or moved since."""
        versions = versions_of(self.detector)
        if versions != self._versions:
            self._copy, self._versions = None, versions

    def _choose(
        self, run: Run, images: Tensor, paths: Sequence[str]
    ) -> Record:
        """The first way that says the same, tried on one batch."""
        plain = run(self.detector, images)
        self._chosen, self._compared = None, frozenset(paths)
        failed: list[str] = []
        for speed in self.speed.slower():
            self._copy = None
            try:
                record = self._run(speed, run, images)
                error = difference(plain, record)
            except (RuntimeError, TypeError) as problem:
                failed.append(f'{_named(speed)} fails ({problem})')
                continue
            if error <= speed.tolerance:
                self._chosen = speed
                self._say(
                    f'{_named(speed)}, which differs by {error:.1g} of the '
                    f'norm',
                    failed,
                )
                return record
            failed.append(f'{_named(speed)} differs by {error:.2g}')
        self._copy = None
        self._say('plainly, for no faster way says the same', failed)
        return plain

    def _say(self, said: str, failed: Sequence[str]) -> None:
        more = f' {"; ".join(failed)}.' if failed else ''
        print_log(
            f'{self.who} runs {said}.{more}',
            logger='current',
            level=logging.WARNING if failed else logging.INFO,
        )

    def _run(self, speed: Speed, run: Run, images: Tensor) -> Record:
        if self._copy is None:
            self._copy = _copied(self.detector, speed)
        if speed.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with _precision(speed, images):
            record = run(self._copy, images)
        record.detector = self.detector
        if speed.precision != 'fp32':
            record.convert(_whole)
        return record


def difference(plain: Record, fast: Record) -> float:
    """Greatest relative error of what two passes of a detector returned.

    Of floating point tensors, by their norms; infinite where anything else
    differs, or a value is not finite on one side alone.
    """
    worst = 0.0
    for path in plain.paths:
        ours, theirs = (leaves(one.outputs(path)) for one in (plain, fast))
        if [one.shape for one in ours] != [one.shape for one in theirs]:
            return float('inf')
        for one, other in zip(ours, theirs):
            worst = max(worst, _error(one, other))
    return worst


def _error(one: Tensor, other: Tensor) -> float:
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else float('inf')
    one, other = one.float(), other.float()
    distance, size = (one - other).norm(), one.norm()
    if not distance.isfinite():
        return float('inf')
    return (distance / size.clamp(min=1e-6)).item()


def _copied(detector: nn.Module, speed: Speed) -> nn.Module:
    found = copy.deepcopy(detector)
    if speed.fuse_bn:
        found = fuse_conv_bn(found)
    if speed.precision != 'fp32':
        # Autocast would do so anew in each pass: what needs no gradient it
        # does not keep.
        kind = PRECISIONS[speed.precision]
        for one in found.modules():
            if isinstance(one, (nn.Conv2d, nn.Linear)):
                one.to(kind)
    if speed.channels_last:
        found = found.to(memory_format=torch.channels_last)
    if speed.compile:
        for name in PARTS:
            part = getattr(found, name, None)
            if isinstance(part, nn.Module):
                part.__dict__['forward'] = torch.compile(part.forward)
    return found.eval().requires_grad_(False)


def _precision(speed: Speed, images: Tensor) -> AbstractContextManager:
    if speed.precision == 'fp32':
        return nullcontext()
    return torch.autocast(images.device.type, PRECISIONS[speed.precision])


def _whole(value: Tensor) -> Tensor:
    half = value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _named(speed: Speed) -> str:
    said = [speed.precision]
    for name in ('channels_last', 'fuse_bn', 'compile'):
        if getattr(speed, name):
            said.append(name)
    return ', '.join(said)

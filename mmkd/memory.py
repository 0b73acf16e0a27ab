"""Memory: what a teacher said of an image is not asked twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.store import Outputs, Store
from mmkd.structures.nested import apply, join, leaves
from mmkd.taps import Call, Record

#: Bytes of a gibibyte.
GIB = 2**30
#: An image's outputs may differ by this share of the largest value between
#: a batch and the image alone; half precision stays below it.
TOLERANCE = 0.02


class Memory:
    """A frozen detector's outputs by the content of the image.

    The key is a digest of the image's pixels as the teacher sees them, borders
    included: another crop, size, padding, flip or colour is another image, and
    nothing has to be known of the augmentation. Where a training shows few
    views of few images (resize and flip of a small data set), the teacher soon
    has nothing left to do; where every view is new (mosaic, random crops),
    nothing is gained.

    Images that are new are shown to the teacher one by one. What is kept then
    follows from the image alone and not from its neighbours, so that a
    training that is resumed goes on bit for bit. Once a weight of the detector
    is written to, all of it is forgotten.

    Args:
        detector: The detector whose outputs they are.
        gib: Room for outputs in main memory, gibibytes. Once it is full, what
            is there stays, and other images are shown anew each time.
        who: Named in messages.
        store: Where they are on disk, in place of main memory.

    Raises:
        ValueError: If ``gib`` is negative.
    """

    def __init__(
        self,
        detector: nn.Module,
        gib: float,
        who: str,
        store: Store | None = None,
    ) -> None:
        if store is None:
            check_positive(who, cache=gib)
        self.detector, self.limit, self.who = detector, int(gib * GIB), who
        self.store = store
        self.size = self.hits = self.misses = 0
        self._kept: dict[tuple, Outputs] = {}
        self._full = self._compared = False
        self._versions: list = []

    def __len__(self) -> int:
        return len(self._kept)

    def forget(self) -> None:
        """Empty it."""
        self._kept.clear()
        self.size, self._full = 0, False

    def recall(
        self,
        images: Tensor,
        samples: Sequence,
        paths: Sequence[str],
        watch: Callable[[Tensor, list], Record],
    ) -> Record:
        """Outputs for a batch, the detector run for what is new.

        Args:
            images: As the detector wants them, (N, 3, H, W).
            samples: mmdet's sample of each image.
            paths: Taps whose outputs are wanted.
            watch: Runs the detector on a batch and records the taps.

        Raises:
            ValueError: If a tap's output of a batch is not those of its
                images one after the other.
        """
        samples = [one.new(data={}) for one in samples]  # no annotations
        versions = versions_of(self.detector)
        if versions != self._versions:
            self._check_same(versions)
            self.forget()
            self._versions = versions
        # A name is looked up, so it is waited for: once, for all images.
        names = [digest(one[None]) for one in images.detach().cpu()]
        entries = [
            self._outputs(name, images[at : at + 1], [sample], paths, watch)
            for at, (name, sample) in enumerate(zip(names, samples))
        ]
        record = Remembered(self.detector, paths)
        record.size = tuple(images.shape[-2:])
        record.fill(entries, images.device)
        if self.misses and not self._compared and len(images) > 1:
            self._compare(record, watch(images, samples), paths)
            self._compared = True
        return record

    def _check_same(self, versions: list) -> None:
        moved = versions[:1] != self._versions[:1]
        if self.store is not None and not moved:
            raise ValueError(
                f'{self.who} has changed, and what the cache in '
                f'{self.store.folder} holds is what it said before. A teacher '
                f'that learns needs cache=0.'
            )

    def _outputs(
        self,
        pixels: bytes,
        image: Tensor,
        sample: list,
        paths: Sequence[str],
        watch: Callable[[Tensor, list], Record],
    ) -> Outputs:
        shape = tuple(sample[0].metainfo.get('img_shape', ()))
        key = (pixels, shape, *paths)
        if key in self._kept:
            self.hits += 1
            return self._kept[key]
        name = key[0] + str(shape).encode()
        if self.store is not None:
            entry = self.store.read(name, paths, image.device)
            if entry is not None:
                self.hits += 1
                return entry
            self.store.check_absent()
        self.misses += 1
        record = watch(image, sample)
        entry = {path: record.outputs(path) for path in paths}
        if self.store is None:
            self._keep(key, entry)
        elif self.store.writable:
            self.store.write(name, entry)
        return entry

    def _keep(self, key: tuple, entry: Outputs) -> None:
        if self._full:
            return
        size = sum(one.numel() * one.element_size() for one in leaves(entry))
        if self.size + size > self.limit:
            self._full = True
            print_log(
                f'{self.who}: the cache of {self.limit / GIB:g} GiB is full '
                f'with {len(self)} images, and {self.hits} of '
                f'{self.hits + self.misses} so far had been seen before. '
                f'Others are shown to it each time: raise cache, or, where '
                f'the augmentation makes every image a new one, set cache=0.',
                logger='current',
            )
            return
        self.size += size
        self._kept[key] = apply(Tensor.cpu, entry)

    def _compare(
        self, record: Record, batch: Record, paths: Sequence[str]
    ) -> None:
        for path in paths:
            ours, theirs = record.outputs(path), batch.outputs(path)
            if not _alike(ours, theirs):
                raise ValueError(
                    f'{self.who} cannot keep outputs of {path!r} in its '
                    f'cache: those of a batch are not those of its images '
                    f'one after the other along the first axis. Set cache=0 '
                    f'for this teacher.'
                )


class Remembered(Record):
    """A record put together from those of single images."""

    def fill(self, entries: Sequence[Outputs], device: torch.device) -> None:
        """Join the images' outputs, call by call."""
        for path in entries[0]:
            for calls in zip(*(one[path] for one in entries), strict=True):
                self.add(path, Call((), {}, join(calls, device)))

    def inputs(self, path: str) -> tuple[tuple, dict]:
        raise RuntimeError(
            f'A teacher with a cache keeps what {path!r} returned and not '
            f'what it was called with. Set cache=0 for this teacher.'
        )


def digest(image: Tensor) -> bytes:
    """A name for an image that no other image has.

    Example:
        >>> one = torch.arange(12.0).reshape(1, 3, 2, 2)
        >>> digest(one) == digest(one.clone()), digest(one) == digest(-one)
        (True, False)
    """
    data = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    name = hashlib.blake2b(data, digest_size=16)
    name.update(str(tuple(image.shape)).encode())
    return name.digest()


def _alike(one: Any, other: Any) -> bool:
    mine, theirs = leaves(one), leaves(other)
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and _close(a, b) for a, b in zip(mine, theirs)
    )


def _close(one: Tensor, other: Tensor) -> bool:
    if not other.numel():
        return True
    scale = other.float().abs().max().clamp(min=1e-6)
    return bool((one.float() - other.float()).abs().max() <= TOLERANCE * scale)


def versions_of(detector: nn.Module) -> list:
    """What changes when a weight is written to, the device first."""
    weights = list(weights_of(detector))
    device = weights[0].device if weights else None
    return [device, *(one._version for one in weights)]


def weights_of(detector: nn.Module) -> Iterator[Tensor]:
    """All that a detector has learnt."""
    yield from detector.parameters()
    yield from detector.buffers()

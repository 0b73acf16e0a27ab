"""Training data that depends on seed and position alone.

A stock data loader's workers each own a random stream, so what is drawn
depends on their number, on who got which image, and on all that was drawn
before: no checkpoint could store it. Here every index knows which draw of the
training it is, and the data set seeds its random numbers from that. A run can
then go on anywhere by passing over indices, without loading a single image.
"""

from __future__ import annotations

import math
import operator
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
from mmengine.dist import get_world_size
from torch.utils.data import DataLoader, IterableDataset

from mmkd.engine.random_state import keyed
from mmkd.randomness import preserved

_END = object()


@dataclass
class Place:
    """Where in its data a training stands.

    Attributes:
        epoch: Passes over the data that are complete.
        batches: Batches of the present pass that the loop has received.
    """

    epoch: int = 0
    batches: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Draw(int):
    """An index that carries the key of its random numbers.

    It pickles, so that it reaches a worker as it is.

    Attributes:
        key: Of the random numbers.
        epoch: How often all of the data was drawn before.
    """

    key: tuple[int, ...]
    epoch: int

    def __new__(cls, index: int, key: tuple[int, ...], epoch: int = 0) -> Draw:
        draw = super().__new__(cls, index)
        draw.key, draw.epoch = key, epoch
        return draw

    def __reduce__(self) -> tuple:
        return Draw, (int(self), self.key, self.epoch)


class NumberedBatches:
    """A batch sampler whose indices are draws, from a given place on.

    It answers for the sampler it wraps in everything else.

    Args:
        batches: The sampler: of batches, or of single indices.
        place: Shared with the loader, which moves it on.
        seed: Of the training.
        rank: Of this process.
        share: How many draws of this process are one of all data; of a
            sampler that never ends, they are all that tells the epoch.
    """

    def __init__(
        self, batches: Any, place: Place, seed: int, rank: int, share: int
    ) -> None:
        self.batches, self.place = batches, place
        self.seed, self.rank, self.share = seed, rank, share

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self.place.epoch, self.place.batches
        inner, drawn = None, 0
        for position in count():
            # Samplers may shuffle by global random numbers, and then expect
            # the same on every rank.
            with keyed(self.seed, epoch, position):
                inner = iter(self.batches) if inner is None else inner
                batch = next(inner, _END)
            if batch is _END:
                return
            size = len(batch) if isinstance(batch, list) else 1
            if position >= skip:
                yield self._number(batch, epoch, drawn)
            drawn += size

    def _number(self, batch: Any, epoch: int, drawn: int) -> Any:
        if isinstance(batch, list):
            return [
                self._draw(index, epoch, drawn + offset)
                for offset, index in enumerate(batch)
            ]
        return self._draw(batch, epoch, drawn)

    def _draw(self, index: Any, epoch: int, number: int) -> Any:
        if not isinstance(index, (int, np.integer)):
            return index  # a video sampler's pair
        index = operator.index(index)
        key = (self.seed, self.rank, epoch, number, index)
        return Draw(index, key, epoch + number // self.share)


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Tell a data set, and those inside of it, that asks by ``set_epoch``.

    It is told in the process that loads the image, before each of them.
    """
    if hasattr(dataset, 'set_epoch'):
        dataset.set_epoch(epoch)
    inner = getattr(dataset, 'dataset', None)
    for one in (inner, *getattr(dataset, 'datasets', ())):
        if one is not None:
            tell_epoch(one, epoch)


@cache
def keyed_class(plain: type) -> type:
    """A data set's class, extended: random numbers follow from the draw.

    Applied to an object's class, so that hooks that set ``pipeline`` or ask
    for the type find what they look for.
    """

    # Not a mixin: with two bases Python may refuse to exchange the class of
    # an object that exists.
    class Keyed(plain):
        plain_class = plain

        def __getitem__(self, index: Any) -> Any:
            if not isinstance(index, Draw):
                return super().__getitem__(index)
            tell_epoch(self, index.epoch)
            with keyed(*index.key):
                return super().__getitem__(int(index))

        def __getitems__(self, indices: list) -> list:
            return [self[index] for index in indices]

        def __reduce_ex__(self, protocol: int) -> tuple:
            # Made at run time, so pickle cannot find the class by its name.
            if hasattr(self, '__getstate__'):
                state = self.__getstate__()
            else:
                state = self.__dict__
            return _revive, (plain,), state

    return _named_as(plain, Keyed)


def _revive(plain: type) -> Any:
    return object.__new__(keyed_class(plain))


def _named_as(plain: type, extended: type) -> type:
    extended.__name__, extended.__qualname__ = (
        plain.__name__,
        plain.__qualname__,
    )
    extended.__module__ = plain.__module__
    return extended


@cache
def replayable_class(plain: type[DataLoader]) -> type[DataLoader]:
    """A data loader's class, extended: it counts, and starts where told.

    Instances have a ``place``.
    """

    class Replayable(plain):
        place: Place

        def __iter__(self) -> Iterator[Any]:
            # A generator on purpose: workers start with the first batch,
            # when the place is known, and not when a loop is built.
            with preserved():  # torch draws the workers' seed
                batches = super().__iter__()
            if isinstance(self.dataset, IterableDataset):
                for _ in range(self.place.batches):
                    next(batches, None)
            for batch in batches:
                self.place.batches += 1
                yield batch
            self.place.epoch += 1
            self.place.batches = 0

        def go_to(self, place: Place) -> None:
            # In place: the sampler shares the object.
            self.place.epoch = place.epoch
            self.place.batches = place.batches

    return _named_as(plain, Replayable)


def replayable(loader: DataLoader, seed: int, rank: int = 0) -> DataLoader:
    """Extend a data loader so that its data depends on seed and place alone.

    Args:
        loader: Any loader; it is changed and returned.
        seed: Of the training.
        rank: Of this process, so that no two draw the same numbers.
    """
    place = Place()
    name = 'sampler' if loader.batch_sampler is None else 'batch_sampler'
    if not isinstance(loader.dataset, IterableDataset):
        share = math.ceil(max(len(loader.dataset), 1) / get_world_size())
        numbered = NumberedBatches(
            getattr(loader, name), place, seed, rank, share
        )
        # torch refuses to exchange a sampler, because that would be too late
        # for a loader that has been iterated; this one has not.
        object.__setattr__(loader, name, numbered)
        dataset = loader.dataset
        if not hasattr(dataset, 'plain_class'):
            dataset.__class__ = keyed_class(type(dataset))
    loader.__class__ = replayable_class(type(loader))
    loader.place = place
    return loader


def patient(loader: DataLoader) -> DataLoader:
    """Let a loader's workers leave Ctrl-C to the main process.

    The terminal sends it to them as well; they would be gone before the
    iteration that is to be finished has its batch.
    """
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(init: Callable[[int], None] | None, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if init is not None:
        init(number)

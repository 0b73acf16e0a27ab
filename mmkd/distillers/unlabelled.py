"""Images without annotations: no detection loss, and all of the terms.

An image is unlabelled if its pipeline has no ``LoadAnnotations``; one that was
annotated and holds no object is labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmkd.structures.ground_truth import labelled
from mmkd.structures.nested import join, leaves, pick
from mmkd.taps import Call, Record, recording
from mmkd.teachers import run_detector

#: The detector's own loss of a batch.
Loss = Callable[[Tensor, list], Mapping[str, Any]]


def labelled_first(
    images: Tensor, samples: Sequence
) -> tuple[Tensor, list, int]:
    """The batch with its labelled images before the others.

    Args:
        images: (N, 3, H, W).
        samples: mmdet's sample of each image.

    Returns:
        Images and samples, as they are where all are labelled, and the number
        of those that are labelled.
    """
    known = [index for index, one in enumerate(samples) if labelled(one)]
    if len(known) == len(samples):
        return images, list(samples), len(known)
    order = known + [
        index for index in range(len(samples)) if index not in set(known)
    ]
    return images[order], [samples[index] for index in order], len(known)


def partly_labelled(
    detector: nn.Module,
    loss: Loss,
    images: Tensor,
    samples: list,
    known: int,
    paths: Sequence[str],
) -> tuple[Mapping[str, Any], Record]:
    """A detector's loss of the labelled images, and its taps of all of them.

    Backbone and neck see the batch as one, so that batch normalisation does;
    the heads see the labelled images, and where a tap lies in them, the others
    in a pass of their own.

    Args:
        detector: The student.
        loss: Its own loss.
        images: The batch, labelled images first, (N, 3, H, W).
        samples: mmdet's sample of each.
        known: Number of labelled images.
        paths: Taps to record.

    Raises:
        ValueError: If no image is labelled, or a tap is only reached while
            losses are computed.
    """
    if not known:
        raise ValueError(
            f'The distiller got a batch of {len(samples)} images none of '
            f'which is labelled. Give every batch images of both kinds: '
            f"train_dataloader.batch_sampler=dict(type='mmkd."
            f"PartlyLabelledBatchSampler') over an "
            f'mmkd.PartlyLabelledDataset, or a ConcatDataset of the labelled '
            f'and the unlabelled set.'
        )
    rest = images[known:], samples[known:]
    with recording(detector, paths) as record:
        maps = detector.extract_feat(images)
        _check_once(detector, maps, len(samples))
        heads = [path for path in paths if not record.has(path)]
        with _features(detector, pick(maps, slice(known))):
            losses = loss(images[:known], samples[:known])
    if not heads:
        return losses, record
    others = pick(maps, slice(known, None))
    with (
        _features(detector, others),
        recording(detector, heads, stop=True) as other,
    ):
        run_detector(detector, *rest)
    numbers = known, len(samples) - known
    return losses, _joined(record, other, paths, heads, numbers)


def _check_once(detector: nn.Module, maps: Any, count: int) -> None:
    """The labelled images must be the first of what the heads are shown."""
    shown = {len(one) for one in leaves(maps)}
    if shown != {count}:
        raise ValueError(
            f'{type(detector).__name__} makes maps of {max(shown)} images '
            f'from a batch of {count}, so that it is not known which are '
            f'labelled. Train it on labelled images alone.'
        )


def _joined(
    record: Record,
    other: Record,
    paths: Sequence[str],
    heads: Sequence[str],
    numbers: tuple[int, int],
) -> Record:
    whole = Record(record.detector, paths)
    for path in paths:
        outputs = record.outputs(path)
        if path in heads:
            if not other.has(path):
                raise ValueError(
                    f'{path!r} gives nothing for images without labels, '
                    f'because it runs while losses are computed. Tap another '
                    f'part, or train on labelled images alone.'
                )
            outputs = [
                _of_batch(path, each, numbers)
                for each in zip(outputs, other.outputs(path), strict=True)
            ]
        for output in outputs:
            whole.add(path, Call((), {}, output))
    return whole


def _of_batch(path: str, each: Sequence, numbers: Sequence[int]) -> Any:
    for one, number in zip(each, numbers):
        shapes = [tuple(tensor.shape) for tensor in leaves(one)]
        strange = [shape for shape in shapes if shape[:1] != (number,)]
        if strange:
            raise ValueError(
                f'{path!r} cannot be tapped where some images have no '
                f'labels: images are not the first axis of its output, which '
                f'for {number} of them has the shape {strange[0]}. Tap the '
                f'neck, or train on labelled images alone.'
            )
    return join(each)


@contextmanager
def _features(detector: nn.Module, maps: Any) -> Iterator[None]:
    """Let the detector go on from maps that are there."""
    detector.__dict__['extract_feat'] = lambda *_: maps
    try:
        yield
    finally:
        del detector.__dict__['extract_feat']

"""What a detector costs to deploy: parameters and arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.analysis import get_model_complexity_info
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmkd.compat.checkpoint import TERM_PREFIX


def parameters(detector: nn.Module) -> int:
    """Number of weights that are deployed; those of terms are not."""
    return sum(
        one.numel()
        for name, one in detector.named_parameters()
        if not name.startswith(TERM_PREFIX)
    )


def gflops(detector: nn.Module, size: tuple[int, int]) -> float:
    """Billions of multiply-accumulates of one forward pass.

    Counted by mmengine's ``get_model_complexity_info``, which calls one
    multiply-accumulate one FLOP, as MMDetection's tables do. Post-processing
    is not counted.

    Args:
        detector: Any detector, on the CPU.
        size: Height and width of the image, pixels.
    """
    detector.eval()
    metas = sample(size)
    image = torch.zeros(1, 3, *size)
    with quiet():  # it names every operator it need not count
        counted = get_model_complexity_info(
            _Forward(detector, metas),
            inputs=(image,),
            show_table=False,
            show_arch=False,
        )
    return counted['flops'] / 1e9


class _Counter(TorchDispatchMode):
    """Counts multiply-accumulates; torch's own asks modules for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=output)
            self.total += flops // 2
        return output


def multiply_accumulates(run: Callable[[], Any]) -> int:
    """Those of matrix products and convolutions, forward and backward.

    Example:
        >>> multiply_accumulates(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        30
    """
    with _Counter() as counter:
        run()
    return counter.total


def bytes_kept(run: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Args:
        run: The forward pass.
        own: Tensors that are there anyway, such as weights.

    Example:
        >>> one = torch.ones(3, requires_grad=True)
        >>> bytes_kept(lambda: one.exp(), [one])
        12
    """
    there = {one.untyped_storage().data_ptr() for one in own}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(one: Tensor) -> Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(one.detach())  # or its place would be given away
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        run()
    return sum(kept.values())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep MMEngine's logger from chatting inside."""
    logger = MMLogger.get_current_instance()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def sample(size: tuple[int, int]) -> DetDataSample:
    """An image's sample, neither scaled nor padded, as a test packs it."""
    return DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )


class _Forward(nn.Module):
    """The detector without post-processing, as the counter calls it."""

    def __init__(self, detector: nn.Module, sample: DetDataSample) -> None:
        super().__init__()
        self.detector, self.sample = detector, sample

    def forward(self, image: Tensor) -> tuple:
        return self.detector._forward(image, [self.sample])

"""A teacher that knows nothing: its own weights, shuffled."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.compat.checkpoint import read_checkpoint, state_dict_of
from mmkd.configs import student_config
from mmkd.files import whole
from mmkd.randomness import preserved
from mmkd.teachers import run_detector, without_init


def save_shuffled(
    settings: Config, weights: Path, batches: Iterable[Any], out: Path
) -> Path:
    """Write a checkpoint that has a teacher's statistics and none of its
    knowledge.

    The entries of every weight of two or more dimensions change places within
    it, so that their distribution stays as it is; the running statistics of
    BatchNorm are measured anew, so that the maps keep their scale.

    Args:
        settings: The teacher's config.
        weights: Its checkpoint.
        batches: Training batches on which BatchNorm is measured.
        out: The file to write.

    Returns:
        ``out``.
    """
    checkpoint = read_checkpoint(weights)
    init_default_scope(settings.get('default_scope', 'mmdet'))
    with preserved(0):
        detector = MODELS.build(without_init(student_config(settings.model)))
        detector.load_state_dict(state_dict_of(checkpoint))
        shuffle(detector)
        calibrate(detector, batches)
    out.parent.mkdir(parents=True, exist_ok=True)
    meta = checkpoint.get('meta', {})
    kept = {key: meta[key] for key in ('dataset_meta',) if key in meta}
    with whole(out) as part:
        torch.save(dict(state_dict=detector.state_dict(), meta=kept), part)
    return out


@torch.no_grad()
def shuffle(detector: nn.Module) -> None:
    """Let the entries of each weight change places within it."""
    for weight in detector.parameters():
        if weight.ndim > 1:
            flat = weight.flatten()
            order = torch.randperm(len(flat), device=flat.device)
            weight.copy_(flat[order].view_as(weight))


@torch.no_grad()
def calibrate(detector: nn.Module, batches: Iterable[Any]) -> None:
    """Measure the running statistics of every BatchNorm anew.

    The mean over the batches, whatever the layers' momentum; layers that are
    meant to stay in eval mode are measured as well.
    """
    norms = [one for one in detector.modules() if isinstance(one, _BatchNorm)]
    momenta = [one.momentum for one in norms]
    detector.eval()
    for one in norms:
        one.reset_running_stats()
        one.momentum = None
        one.train()
    for batch in batches:
        data = detector.data_preprocessor(batch, training=False)
        run_detector(detector, data['inputs'], data['data_samples'])
    for one, momentum in zip(norms, momenta):
        one.momentum = momentum
    detector.eval()

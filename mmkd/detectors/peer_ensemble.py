"""Peers after their training: one of them alone, or all as one detector."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.models.utils import weighted_boxes_fusion
from mmdet.structures import SampleList
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torchvision.ops import batched_nms

from mmkd.checks import check_fraction, check_name
from mmkd.compat.checkpoint import (
    TERM_PREFIX,
    add_trust_option,
    read_checkpoint,
    state_dict_of,
    trusting,
)
from mmkd.configs import read_config, student_config
from mmkd.files import check_free, whole
from mmkd.pixels import Pixels, translate
from mmkd.registry import DETECTORS, MODELS
from mmkd.terms.peers import STUDENT, TEACHER

BEST = 'best'
#: How boxes of several detectors are brought together.
FUSIONS = ('nms', 'wbf')


def students_in(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights of each student of a checkpoint, under its own names.

    Args:
        state: State dict of a detector that was trained with a
            :class:`mmkd.terms.peers.PeersTerm`.

    Returns:
        By name, the distilled student first. The online teacher is none.

    Raises:
        ValueError: If there are no peers in it.
    """
    term = _term_of(state)
    found: dict[str, dict[str, Tensor]] = {
        STUDENT: {
            key: value
            for key, value in state.items()
            if not key.startswith(TERM_PREFIX)
        }
    }
    prefix = f'{term}peers.'
    for key, value in state.items():
        if key.startswith(prefix):
            name, _, rest = key.removeprefix(prefix).partition('.')
            if name != TEACHER:
                found.setdefault(name, {})[rest] = value
    return found


def best_in(state: Mapping[str, Tensor]) -> str:
    """Name of the student whose detection loss was lowest at the end."""
    names = list(students_in(state))
    return names[int(state[f'{_term_of(state)}merit'].argmin())]


def _term_of(state: Mapping[str, Tensor]) -> str:
    found = [
        key.removesuffix('merit')
        for key in state
        if key.startswith(TERM_PREFIX) and key.endswith('.merit')
    ]
    if len(found) != 1:
        raise ValueError(
            f'Expected a checkpoint of a training with one PeersTerm, got one '
            f'with {len(found)}. Name the file that such a training wrote.'
        )
    return found[0]


def export_peer(
    source: str | Path, target: str | Path, peer: str = BEST
) -> str:
    """Write one student as a checkpoint of its own plain config.

    Args:
        source: Checkpoint of the training.
        target: File to write.
        peer: Name of the student, or ``'best'``.

    Returns:
        Its name.

    Raises:
        ValueError: If there is no such student.
    """
    checkpoint = read_checkpoint(source)
    state = state_dict_of(checkpoint, prefer_ema=False)
    students = students_in(state)
    check_name(str(source), 'student', peer, [BEST, *students])
    name = best_in(state) if peer == BEST else peer
    meta = checkpoint.get('meta', {})
    with whole(target) as part:
        torch.save(dict(meta=meta, state_dict=students[name]), part)
    return name


@MODELS.register_module()
class PeerEnsemble(BaseDetector):
    """Students that answer together.

    Each sees the image, and their boxes are brought together. It costs as
    much as all of them: report it as that. A checkpoint of the training loads
    as it is.

    Args:
        students: ``dict(config=…)`` of each by name, the distilled one as
            ``student`` and the others as they were called; ``cfg_options`` as
            for a teacher.
        fuse: ``'nms'`` or ``'wbf'``, see :func:`fuse_boxes`.
        iou_threshold: Overlap from which boxes are the same object.
        max_per_img: Most boxes of an image.
        data_preprocessor: That of the first student, if None.

    Raises:
        ValueError: If a setting is unknown or there is no student.
    """

    def __init__(
        self,
        students: Mapping[str, Mapping],
        fuse: str = 'nms',
        iou_threshold: float = 0.5,
        max_per_img: int = 100,
        data_preprocessor: Mapping | None = None,
        init_cfg: Mapping | None = None,
    ) -> None:
        who = 'PeerEnsemble'
        check_name(who, 'fuse', fuse, FUSIONS)
        check_fraction(who, iou_threshold=iou_threshold)
        if not students:
            raise ValueError(
                f'{who} needs at least one student, got students={students}. '
                f"Write students=dict(student=dict(config='FILE.py'))."
            )
        models = {
            name: student_config(
                read_config(
                    one['config'],
                    f'{who}: student {name!r}',
                    one.get('cfg_options'),
                ).model
            )
            for name, one in students.items()
        }
        first = next(iter(models.values()))
        super().__init__(
            data_preprocessor or first.get('data_preprocessor'), init_cfg
        )
        self.students = nn.ModuleDict(
            {name: DETECTORS.build(model) for name, model in models.items()}
        )
        self.fuse, self.iou_threshold = fuse, iou_threshold
        self.max_per_img = max_per_img
        self._register_load_state_dict_pre_hook(self._take_from_training)

    def _take_from_training(
        self, state: dict[str, Tensor], prefix: str, *_: Any
    ) -> None:
        """Bring the names of a training's checkpoint into those of here."""
        own = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if not any(key.startswith(TERM_PREFIX) for key in own):
            return
        found = students_in(own)
        for name in self.students:
            check_name('The checkpoint', 'student', name, found)
        for key in own:
            del state[prefix + key]
        for name in self.students:
            for key, value in found[name].items():
                state[f'{prefix}students.{name}.{key}'] = value

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Features of the first student."""
        return next(iter(self.students.values())).extract_feat(batch_inputs)

    def loss(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> dict[str, Any]:
        """Every student's own losses, side by side."""
        return {
            f'{name}_{key}': value
            for name, one, images in self._shown(
                batch_inputs, batch_data_samples
            )
            for key, value in one.loss(
                images, copy.deepcopy(batch_data_samples)
            ).items()
        }

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: SampleList = None
    ) -> tuple:
        return tuple(
            one._forward(batch_inputs, batch_data_samples)
            for one in self.students.values()
        )

    def predict(
        self,
        batch_inputs: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = True,
    ) -> SampleList:
        """Boxes of all students, brought together image by image."""
        said = [
            one.predict(images, copy.deepcopy(batch_data_samples), rescale)
            for _, one, images in self._shown(batch_inputs, batch_data_samples)
        ]
        for sample, *answers in zip(batch_data_samples, *said):
            sample.pred_instances = self._fused(
                [one.pred_instances for one in answers]
            )
        return batch_data_samples

    def _fused(self, answers: Sequence[InstanceData]) -> InstanceData:
        boxes, scores, labels = fuse_boxes(
            *(
                [one[key] for one in answers]
                for key in ('bboxes', 'scores', 'labels')
            ),
            self.fuse,
            self.iou_threshold,
        )
        most = slice(self.max_per_img)
        return InstanceData(
            bboxes=boxes[most], scores=scores[most], labels=labels[most]
        )

    def _shown(self, images: Tensor, samples: SampleList) -> list[tuple]:
        """Each student with the images in its own normalisation."""
        shapes = [
            tuple(one.metainfo.get('img_shape', images.shape[-2:])[:2])
            for one in samples
        ]
        own = Pixels.of(self, 'PeerEnsemble')
        return [
            (
                name,
                one,
                translate(images, shapes, own, Pixels.of(one, name)),
            )
            for name, one in self.students.items()
        ]


def fuse_boxes(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    how: str = 'nms',
    iou_threshold: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """One set of boxes out of those of several detectors.

    With ``'nms'`` the best of overlapping boxes of a class stays as it is.
    With ``'wbf'``, which is MMDetection's, it becomes the mean of all that
    overlap, weighted by their scores, and its score is the mean of theirs,
    less what only a few of the detectors have seen.

    Args:
        boxes: Of each detector, x1 y1 x2 y2, (M, 4).
        scores: Their scores, (M,).
        labels: Their classes, (M,).
        how: ``'nms'`` or ``'wbf'``.
        iou_threshold: Overlap from which boxes are the same object.

    Returns:
        Boxes (R, 4), scores and labels (R,), the best first.

    Reference:
        Solovyev et al., "Weighted boxes fusion: Ensembling boxes from
        different object detection models", Image and Vision Computing 2021,
        arXiv:1910.13302.
    """
    like, of_classes = boxes[0], labels[0]
    if how == 'nms':
        boxes, scores, labels = map(torch.cat, (boxes, scores, labels))
        kept = batched_nms(boxes, scores, labels, iou_threshold)
        return boxes[kept], scores[kept], labels[kept]
    found = [
        (one.prod(1) > 0).nonzero()[:, 0]
        for one in (box[:, 2:] - box[:, :2] for box in boxes)
    ]  # it warns of every box without an area
    boxes, scores, labels = (
        [one[index].cpu() for one, index in zip(group, found)]
        for group in (boxes, scores, labels)
    )
    boxes, scores, labels = weighted_boxes_fusion(
        boxes, scores, labels, iou_thr=iou_threshold
    )
    return boxes.view(-1, 4).to(like), scores.to(like), labels.to(of_classes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``export_peer.py``.

    Args:
        arguments: Words of the command line; those of the process if None.

    Returns:
        Exit status: 0, or 1 after a message on what to do.
    """
    parser = argparse.ArgumentParser(
        prog='export_peer.py',
        description='Writes one student of a training with peers as a plain '
        'checkpoint of its own config.',
    )
    parser.add_argument('checkpoint', help='of the training')
    parser.add_argument('out', help='file to write')
    parser.add_argument(
        '--peer',
        default=BEST,
        help='name of the student; default: the one whose detection loss was '
        'lowest at the end',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a file of that name'
    )
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    try:
        check_free(options.out, overwrite=options.overwrite)
        with trusting(*options.trust_checkpoint):
            name = export_peer(options.checkpoint, options.out, options.peer)
    except (OSError, ValueError) as error:
        print(f'export_peer.py: {error}', file=sys.stderr)
        return 1
    print(f'{options.out}: {name}')
    return 0

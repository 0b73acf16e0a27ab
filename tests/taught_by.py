"""Students of the tiny configs, somewhere in their training."""

from __future__ import annotations

from pathlib import Path

import pytest
import rois
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmkd.configs import read_config
from mmkd.terms.queries import asks

ROOT = Path(__file__).parents[1]
CLASSES = 6
ITERATIONS = 1000


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Random weights of a teacher, by its config, drawn once."""
    folder, files = tmp_path_factory.mktemp('teachers'), {}

    def weights(config):
        if config not in files:
            file = folder / f'{len(files)}.pth'
            files[config] = tiny.save_teacher(read_config(config).model, file)
        return str(files[config])

    return weights


def tiny_model(path, weights):
    """Config of a distilled student, whose teachers have random weights."""
    model = read_config(path).model
    for teacher in model.teachers.values():
        teacher.checkpoint = weights(teacher.config)
    return model


def taught(path, weights):
    """A student after one step, so that its own average is another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # tiny configs name their teachers from there
        init_default_scope('mmdet')
        torch.manual_seed(0)
        student = MODELS.build(tiny_model(path, weights))
    student.init_weights()
    student.train()
    student.loss(*batch(student))
    parts = [student.backbone]
    if asks(student):  # all layers begin with the boxes they are given
        parts.append(student.bbox_head)
    with torch.no_grad():
        for part in parts:
            for one in part.parameters():
                one.add_(0.02 * torch.randn_like(one))
    return student


def go_to(hub, progress):
    """The training stands there."""
    hub.update_info('max_iters', ITERATIONS)
    hub.update_info('iter', round(ITERATIONS * progress))


def moment(phases):
    """The middle of the longest phase whose terms teach the backbone.

    Of one whose terms teach another part, if there is none.
    """
    if not phases.given:
        return 0.5
    lengths = [one.length for one in phases]
    longest = max(
        (one for one in phases if one.terms != () and one.train != ()),
        key=lambda one: (_trains_backbone(one), one.length),
    )
    index = list(phases).index(longest)
    return (sum(lengths[:index]) + longest.length / 2) / sum(lengths)


def _trains_backbone(phase):
    parts = phase.train or ('backbone',)
    return any(part.split('.')[0] == 'backbone' for part in parts)


def counting(student):
    """Names of the terms that count now."""
    progress = moment(student.phases)
    return [
        name
        for name, term in student.terms.items()
        if term.schedule(progress) and student.phases.at(progress).counts(name)
    ]


def batch(student, boxes=4, seed=0):
    images, samples = tiny.batch(
        shapes=((96, 96), (64, 80)), seed=seed, boxes=boxes, classes=CLASSES
    )
    if hasattr(getattr(student, 'roi_head', None), 'mask_head'):
        rois.add_masks(samples)
    add_predictions(samples, seed)
    return images, samples


def add_predictions(samples, seed=0, count=6):
    """What a teacher may have said of the images before the training."""
    generator = torch.Generator().manual_seed(seed)
    for one in samples:
        points = 60 * torch.rand(count, 2, generator=generator)
        extent = 8 + 20 * torch.rand(count, 4, generator=generator)
        one.teacher_predictions = InstanceData(
            points=points,
            strides=8 * 2 ** (2 * torch.rand(count, generator=generator)),
            bboxes=torch.cat(
                [points - extent[:, :2], points + extent[:, 2:]], 1
            ),
            labels=torch.randint(0, CLASSES, (count, 1), generator=generator),
            logits=torch.randn(count, 1, generator=generator),
        )


def shares(student, images, samples, seed=1):
    """Shares of the terms that count now, the random numbers held fixed."""
    torch.manual_seed(seed)
    idle = {f'loss_kd_{name}' for name in student.terms} - {
        f'loss_kd_{name}' for name in counting(student)
    }
    return {
        name: value
        for name, value in student.loss(images, samples).items()
        if name.startswith('loss_kd_') and name not in idle
    }


def own(student):
    """Parameters of the student, without those of the terms."""
    return [
        one
        for name, one in student.named_parameters()
        if not name.startswith('terms.')
    ]

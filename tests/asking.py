"""Two detectors of queries in one step, in which nothing is dropped."""

from __future__ import annotations

import copy

import detrs
import tiny

from mmkd.structures import Step
from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.memory_maps import MAPS
from mmkd.terms.queries import DECODER, ENCODER, HEAD

PATHS = [ENCODER, MAPS, DECODER, HEAD]


def detector(kind, seed=0, **settings):
    return detrs.built(kind, seed, **settings).eval()


def recorded(model, images, samples):
    """One pass as in a training if the detector trains, else as a teacher."""
    with recording(model, PATHS) as record:
        if model.training:
            model.loss(images, samples)
        else:
            run_detector(model, images, samples)
    return record


def step_of(student, teacher, **batch):
    """A step of one batch, see :func:`tiny.batch`."""
    images, samples = tiny.batch(**batch)
    shown = recorded(teacher, images, samples)
    return Step(
        student=recorded(student, images, samples),
        images=images,
        samples=samples,
        teachers={'big': lambda images, grad=False, *more: shown},
    )


def permuted(model, order):
    """The same detector, whose queries stand in another order."""
    return detrs.reorder(copy.deepcopy(model), order)


def distilled(student, teacher, term, folder):
    """A student with one term, x, and a teacher of random weights."""
    # Detectors write into the config that they are built from.
    student = copy.deepcopy(student)
    file = tiny.save_teacher(copy.deepcopy(teacher), folder / 'teacher.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    model = tiny.build(tiny.distilled(student, dict(big=big), dict(x=term)))
    model.init_weights()
    return model.train()

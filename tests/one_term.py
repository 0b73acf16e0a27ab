"""A student with one term, called x, and what it says."""

from __future__ import annotations

import pytest
import tiny
import torch


def builder(term):
    """A fixture that builds one with its teacher loaded.

    Args:
        term: Settings → config of the term.
    """

    @pytest.fixture
    def build(tmp_path, teacher_file):
        def build(student=None, teacher=None, phases=None, **settings):
            file = teacher_file
            if teacher is not None:
                file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
            teacher = teacher or tiny.retinanet(base=16)
            big = dict(config=dict(model=teacher), checkpoint=str(file))
            more = {} if phases is None else dict(phases=phases)
            model = tiny.build(
                tiny.distilled(
                    student or tiny.retinanet(),
                    dict(big=big),
                    dict(x=term(**settings)),
                    **more,
                )
            )
            model.teachers.load()
            return model.train()

        return build

    return build


def teacher_of(student):
    return student.teachers['big'].detector


def shares(losses):
    return {
        name.removeprefix('loss_kd_x_'): value
        for name, value in losses.items()
        if name.startswith('loss_kd_x')
    }


def state(module):
    return {key: one.clone() for key, one in module.state_dict().items()}


def same(module, before):
    return all(
        torch.equal(one, before[key])
        for key, one in module.state_dict().items()
    )

import mmkd  # noqa: F401, I001 - before mmdet, whose operators it brings
import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def teacher_file(tmp_path_factory):
    """Random weights of a RetinaNet twice as wide as the student."""
    path = tmp_path_factory.mktemp('teacher') / 'retinanet.pth'
    return tiny.save_teacher(tiny.retinanet(base=16), path)


@pytest.fixture
def teachers(teacher_file):
    return dict(
        big=dict(
            config=dict(model=tiny.retinanet(base=16)),
            checkpoint=str(teacher_file),
        )
    )


@pytest.fixture
def terms():
    return dict(
        pkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.PKDLoss', loss_weight=2.0),
        )
    )

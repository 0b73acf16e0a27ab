import mmkd  # noqa: F401, I001 - before mmdet, whose operators it brings
from functools import cache

import mmengine.config.utils
import pytest
import tiny
import torch

# YAPF writes its grammar into the user's cache when it is new and lets another
# process read it half written: it is written here, before there are workers.
import yapf  # noqa: F401
from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import MessageHub
from mmengine.visualization import Visualizer

# A hundred metafiles of a package are parsed for each config of it.
mmengine.config.utils.load = cache(mmengine.config.utils.load)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hub():
    """The message hub of a run that begins with the test and ends with it.

    Nothing of where another training stands is left in it, and no visualiser
    draws into the folder of another test, which is gone.
    """
    for kind in GLOBALS:
        kind._instance_dict.clear()
    yield MessageHub.get_instance('a run')
    for kind in GLOBALS:
        kind._instance_dict.clear()


#: Of which MMEngine keeps one instance of a name for the whole process.
GLOBALS = (MessageHub, Visualizer, DetLocalVisualizer)
#: What tests have measured, shown below their results.
FIGURES = []


@pytest.fixture
def tell():
    """Puts a line below the results: ``tell('50 kills survived')``."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section('figures')
        for line in FIGURES:
            terminalreporter.line(line)


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

"""Whichever detector teaches whichever: plans of all pairs, and two steps."""

from __future__ import annotations

import detrs
import families
import heads
import pytest
import rois
import tiny
import torch
from mmdet.models import FPN, GFL, GFLHead
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmkd.plan import plan
from mmkd.registry import DETECTORS, MODELS


class Ladder(FPN):
    """A neck that no package has, for a detector that none has."""


class Gauge(GFLHead):
    """Its head."""


class Surveyor(GFL):
    """Somebody's own detector."""


def own(base: int = tiny.BASE) -> dict:
    model = heads.gfl(base, convs=2)
    model['type'] = 'Surveyor'
    model['neck']['type'], model['bbox_head']['type'] = 'Ladder', 'Gauge'
    return model


#: One of each kind: anchors, points, distributions, centres, grids; one
#: stage, two and more, with masks; queries of three kinds; and one's own.
REPRESENTATIVES = dict(
    retinanet=lambda base: heads.retinanet(base, convs=2),
    fcos=lambda base: heads.fcos(base, convs=2),
    gfl=lambda base: heads.gfl(base, convs=2),
    yolox=families.yolox,
    rtmdet=families.rtmdet,
    ssd=families.ssd,
    centernet=families.centernet,
    faster=rois.faster,
    mask=families.mask_rcnn,
    cascade=rois.cascade,
    detr=lambda base: detrs.detr('detr', base),
    deformable=lambda base: detrs.detr('refine', base),
    dino=lambda base: detrs.detr('dino', base, queries=8),
    own=own,
)
NAMES = list(REPRESENTATIVES)
#: Each once as student and once as teacher.
RING = list(zip(NAMES, [*NAMES[5:], *NAMES[:5]]))
PAIRS = [
    pytest.param(
        *pair,
        marks=[] if pair in RING else pytest.mark.slow,
        id=f'{pair[0]}-from-{pair[1]}',
    )
    for pair in ((one, other) for one in NAMES for other in NAMES)
    if pair[0] != pair[1]
]


@pytest.fixture(autouse=True)
def begun(hub):
    """A training that begins, and knows the detector of somebody's own."""
    hub.update_info('iter', 0)  # YOLOX and others ask for it
    init_default_scope('mmdet')
    for kind in (Ladder, Gauge, Surveyor):
        DETECTORS.register_module(module=kind)
    yield
    for kind in (Ladder, Gauge, Surveyor):
        del DETECTORS._module_dict[kind.__name__]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('any')


def teacher(folder, name):
    """Config and weights of a representative, twice as wide in front."""
    config, weights = folder / f'{name}.py', folder / f'{name}.pth'
    if not weights.exists():
        model = REPRESENTATIVES[name](2 * tiny.BASE)
        Config(dict(model=model)).dump(config)
        tiny.save_teacher(model, weights)
    return str(config), str(weights)


@pytest.mark.parametrize(('student', 'name'), PAIRS)
def test_one_argument_and_any_pair_trains(folder, student, name):
    plain = Config(
        dict(
            model=REPRESENTATIVES[student](tiny.BASE),
            train_dataloader=dict(dataset=dict(type='CocoDataset')),
        )
    )
    found = plan(plain, *teacher(folder, name))
    assert all(row[1] and row[2] for row in found.rows)
    torch.manual_seed(0)
    model = MODELS.build(found.config.model)
    model.init_weights()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batch = families.batch(masks=student == 'mask')
    for _ in range(2):
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
        shares = [one for key, one in losses.items() if 'loss_kd_' in key]
        assert shares
        assert all(one.isfinite() and one > 0 for one in shares)
        optimizer.zero_grad()
        sum(shares).backward(retain_graph=True)
        assert any(one.grad is not None for one in model.backbone.parameters())
        optimizer.zero_grad()
        tiny.total(losses).backward()
        optimizer.step()
    _check_the_student_is_plain(model, plain)


def _check_the_student_is_plain(model, plain):
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith('terms.')
    }
    DETECTORS.build(plain.model).load_state_dict(state, strict=True)

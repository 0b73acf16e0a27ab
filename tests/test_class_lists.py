"""Teachers of other class lists teach what both know, by name."""

from __future__ import annotations

import copy
from functools import partial

import families
import heads
import pytest
import rois
import tiny
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmkd.classes import with_classes
from mmkd.registry import DETECTORS
from mmkd.taps import maps_of, recording
from mmkd.teachers import Teacher, run_detector

#: Of the data, and of a teacher that knows more of them.
OWN = ('cat', 'dog', 'cow')
MORE = ('yak', 'cow', 'cat', 'emu', 'dog')
PLACES = [MORE.index(name) for name in OWN]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def lively(model, seed=5):
    """A detector in evaluation whose every weight says something."""
    detector = tiny.build(copy.deepcopy(model))
    torch.manual_seed(seed)
    for name, one in detector.named_parameters():
        if one.ndim > 1:
            one.data.normal_(std=one[0].numel() ** -0.5)
        elif 'head' in name and name.endswith('bias'):
            one.data.normal_(std=0.1)
    return detector.eval()


@pytest.fixture
def save(tmp_path):
    def save(detector, names, name='teacher'):
        file = tmp_path / f'{name}.pth'
        meta = dict(dataset_meta=dict(classes=names))
        torch.save(dict(state_dict=detector.state_dict(), meta=meta), file)
        return str(file)

    return save


@pytest.fixture
def loaded(save):
    """A detector and the teacher that was cut from it."""

    def loaded(model, names, classes=OWN):
        whole = lively(model)
        teacher = Teacher(
            dict(model=model), save(whole, names), classes=classes
        )
        teacher.load()
        return whole, teacher

    return loaded


def unlimited(config):
    """Settings by which every class of an image is found."""
    if isinstance(config, dict):
        most = dict(max_per_img=2000, nms_pre=2000, topk=300)
        return type(config)(
            {key: most.get(key, unlimited(one)) for key, one in config.items()}
        )
    if isinstance(config, (list, tuple)):
        return type(config)(map(unlimited, config))
    return config


def predicted(detector):
    """What mmdet makes of a batch, an image after the other."""
    images, samples = tiny.batch()
    for one in samples:
        one.gt_instances = InstanceData()
    found = detector.predict(images, samples, rescale=False)
    return [one.pred_instances for one in found]


# The teacher is cut -----------------------------------------------------------

FAMILIES = dict(
    retinanet=tiny.retinanet,
    fcos=heads.fcos,
    gfl=heads.gfl,
    paa=families.paa,
    tood=families.tood,
    reppoints=families.reppoints,
    centernet=families.centernet,
    centernet_update=families.centernet_update,
    yolox=families.yolox,
    rtmdet=families.rtmdet,
    yolov3=families.yolov3,
    faster_rcnn=tiny.faster_rcnn,
    cascade_rcnn=families.cascade_rcnn,
    mask_rcnn=families.mask_rcnn,
    condinst=families.condinst,
    solo=families.solo,
    solov2=families.solov2,
)


@pytest.mark.parametrize('family', FAMILIES)
def test_in_another_order_a_teacher_finds_the_same(family, loaded):
    """Boxes, scores and masks by mmdet's own post-processing."""
    names = ('cow', 'cat', 'dog')
    model = FAMILIES[family]()
    model['test_cfg'] = unlimited(model['test_cfg'])
    whole, teacher = loaded(model, names)
    place = torch.tensor([OWN.index(name) for name in names])
    for one, other in zip(predicted(whole), predicted(teacher.detector)):
        assert len(one) == len(other) > 0
        assert len(set(one.labels.tolist())) == 3, 'or it says nothing'
        rows = [
            sorted(
                zip(
                    found.scores.tolist(),
                    labels.tolist(),
                    found.bboxes.tolist(),
                )
            )
            for found, labels in (
                (one, place[one.labels]),
                (other, other.labels),
            )
        ]
        for row, like in zip(*rows):
            assert row[0] == pytest.approx(like[0], abs=1e-5)
            assert row[1] == like[1]
            assert row[2] == pytest.approx(like[2], abs=1e-2)

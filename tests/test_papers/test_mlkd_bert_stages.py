"""MLKD-BERT's procedure: first the layers, then samples and soft targets."""

import pytest
import taught_by
import torch
from taught_by import ROOT, batch, go_to, taught

FOLDER = ROOT / 'configs' / 'mlkd-bert' / 'tiny'
SECOND = ('samples', 'kd', 'kd_box')
weights = taught_by.weights


@pytest.fixture(scope='module', params=['mlkd-bert', 'mlkd-bert-fpn'])
def student(request, weights):
    return taught(FOLDER / f'{request.param}_tiny.py', weights)


def heard(losses):
    return {
        name.removeprefix('loss_kd_')
        for name, value in losses.items()
        if name.startswith('loss_kd_') and value != 0
    }


def test_the_first_stage_has_the_layers_and_nothing_else(student, hub):
    go_to(hub, 0.1)
    losses = student.loss(*batch(student))
    names = heard(losses)
    assert names
    assert all(name.startswith('layers_') for name in names)
    assert {f'loss_kd_{name}' for name in SECOND} <= set(losses)
    assert not any('cls' in name or 'bbox' in name for name in losses)


def test_no_label_is_read_in_the_first_stage(student, hub):
    go_to(hub, 0.1)
    images, samples = batch(student)
    others = batch(student, seed=4)[1]
    assert student.loss(images, samples) == student.loss(images, others)


def test_the_second_stage_has_all_but_the_layers(student, hub):
    go_to(hub, 0.6)
    losses = student.loss(*batch(student))
    assert heard(losses) == {'samples_ss', 'samples_sc', 'kd', 'kd_box'}
    assert losses['loss_kd_layers'] == 0
    assert {'loss_cls', 'loss_bbox'} <= set(losses)


def test_a_stage_trains_no_weight_of_the_other(student, hub):
    for progress, own in ((0.1, ('layers',)), (0.6, SECOND)):
        go_to(hub, progress)
        student.zero_grad(set_to_none=True)
        losses = student.loss(*batch(student))
        sum(
            value if isinstance(value, torch.Tensor) else sum(value)
            for value in losses.values()
        ).backward()
        for name, term in student.terms.items():
            for one in term.parameters():
                assert one.requires_grad == (name in own)
                reached = one.grad is not None and bool(one.grad.any())
                assert reached == (name in own)
        head = [one.grad for one in student.bbox_head.parameters()]
        assert any(one is not None for one in head) == (progress > 0.5)

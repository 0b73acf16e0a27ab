from pathlib import Path

import pytest
import tiny
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from mmkd.analysis.budget import fit_widths, with_widths
from mmkd.analysis.cost import gflops, parameters
from mmkd.configs import read_config

ROOT = Path(__file__).parents[2]
STUDENT = (
    ROOT / 'configs/_base_/students/retinanet_r18_fpn_1x_coco_assisted.py'
)
ZOO = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
SIZE = (64, 64)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def assisted():
    model = tiny.retinanet()
    net = dict(tiny.backbone(8), out_indices=(1, 2, 3))
    model.backbone = dict(
        type='mmkd.ResidualBackbone',
        main=dict(net),
        assistant=dict(net),
        out_channels=(32, 64, 128),
    )
    model.neck.update(in_channels=[32, 64, 128], start_level=0)
    return model


def cost(model):
    return gflops(MODELS.build(model), SIZE)


@pytest.mark.parametrize(
    ('share', 'divisor', 'base'), [(0.25, 4, 48), (0.5, 2, 12), (1, 1, 7)]
)
def test_what_fits_is_within_the_budget_and_one_step_wider_is_not(
    share, divisor, base, monkeypatch
):
    """Counted by parameters, which takes less time."""
    monkeypatch.setattr(
        'mmkd.analysis.budget.gflops',
        lambda detector, size: parameters(detector),
    )

    def count(main, assistant):
        model = with_widths(assisted(), main, assistant)
        return parameters(MODELS.build(model))

    def of_steps(steps):
        return steps * divisor, max(1, round(share * steps)) * divisor

    given = tiny.retinanet(base=base)
    found = fit_widths(assisted(), given, share, divisor, SIZE)
    steps = found.main // divisor
    assert (found.main, found.assistant) == of_steps(steps)
    assert found.budget == parameters(MODELS.build(given))
    assert found.gflops == count(*of_steps(steps))
    assert found.gflops <= found.budget < count(*of_steps(steps + 1))


@pytest.mark.parametrize('width', [4, 8, 12, 20])
def test_what_costs_just_as_much_fits(width, monkeypatch):
    monkeypatch.setattr(
        'mmkd.analysis.budget.gflops',
        lambda detector, size: parameters(detector),
    )
    given = with_widths(assisted(), width, width)
    found = fit_widths(assisted(), given, 1, 4, SIZE)
    assert (found.main, found.assistant) == (width, width)


def test_what_is_counted_is_arithmetic():
    given = tiny.retinanet()
    found = fit_widths(assisted(), given, 1, 4, SIZE)
    assert found.budget == pytest.approx(cost(given))
    fits = with_widths(assisted(), found.main, found.assistant)
    assert found.gflops == pytest.approx(cost(fits))
    assert found.gflops <= found.budget


def test_widths_are_set_in_a_copy():
    model = assisted()
    changed = with_widths(model, 12, 4)
    assert changed.backbone.main.base_channels == 12
    assert changed.backbone.main.stem_channels == 12
    assert changed.backbone.assistant.base_channels == 4
    assert model.backbone.main.base_channels == 8


def test_the_assistant_is_counted():
    narrow, wide = (with_widths(assisted(), 8, one) for one in (4, 8))
    few, many = (parameters(MODELS.build(one)) for one in (narrow, wide))
    assert many > few
    assert cost(wide) > cost(narrow)


def test_the_published_student_keeps_within_the_model_it_is_cut_from():
    size = (64, 64)
    found = []
    for source in (STUDENT, ZOO):
        model = read_config(source).model
        model.backbone.init_cfg = None
        found.append(gflops(MODELS.build(model), size))
    assert found[0] <= found[1]


def test_what_does_not_fit_or_has_no_assistant_says_what_to_type():
    with pytest.raises(ValueError, match='divisor='):
        fit_widths(assisted(), tiny.retinanet(base=2), divisor=32, size=SIZE)
    with pytest.raises(ValueError, match='mmkd.ResidualBackbone'):
        fit_widths(tiny.retinanet(), tiny.retinanet(), size=SIZE)
    with pytest.raises(ValueError, match='share between 0 and 1'):
        fit_widths(assisted(), tiny.retinanet(), share=2, size=SIZE)

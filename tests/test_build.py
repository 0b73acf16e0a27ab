import logging

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from mmkd.build import build
from mmkd.losses.pkd import PKDLoss
from mmkd.necks.adapt import ConvAdapt
from mmkd.registry import MODELS, SCHEDULES


@pytest.mark.parametrize('kind', ['mmkd.PKDLoss', 'PKDLoss', PKDLoss])
def test_a_type_is_a_name_with_or_without_prefix_or_a_class(kind):
    loss = build(dict(type=kind, loss_weight=3.0), 'loss')
    assert type(loss) is PKDLoss
    assert loss.loss_weight == 3.0


def test_a_component_of_mmdet_is_found():
    init_default_scope('mmdet')
    assert isinstance(build(dict(type='FPN', **_fpn()), 'align'), nn.Module)
    assert isinstance(
        build(dict(type='mmdet.FPN', **_fpn()), 'align'), nn.Module
    )


def _fpn():
    return dict(in_channels=[4, 8], out_channels=8, num_outs=2)


def test_config_is_left_as_it_was():
    config = ConfigDict(type='mmkd.PKDLoss', loss_weight=3.0)
    build(config, 'loss')
    assert config == dict(type='mmkd.PKDLoss', loss_weight=3.0)


def test_defaults_fill_what_the_config_leaves_open():
    config = dict(type='mmkd.ConvAdapt', in_channels=4, out_channels=8)
    assert len(build(config, 'align', num_levels=3).adapts) == 3
    config['num_levels'] = 2
    assert len(build(config, 'align', num_levels=3).adapts) == 2


def test_misspelt_type_names_its_place_and_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"terms\.pkd\.loss has no type 'mmkd\.PKDLos'.*'mmkd\.PKDLoss'",
    ):
        build(dict(type='mmkd.PKDLos'), 'terms.pkd.loss')


def test_misspelt_type_without_prefix_names_its_place_as_well():
    with pytest.raises(ValueError, match=r"terms\.pkd\.loss.*'PKDLoss'"):
        build(dict(type='PKDLos'), 'terms.pkd.loss')


def test_misspelt_argument_names_its_place():
    with pytest.raises(ValueError, match=r'loss of type.*loss_wieght'):
        build(dict(type='mmkd.PKDLoss', loss_wieght=1.0), 'loss')


def test_missing_argument_is_named():
    with pytest.raises(ValueError, match='mmkd.MGDLoss.*channels'):
        build(dict(type='mmkd.MGDLoss'), 'loss')


@pytest.mark.parametrize('config', [None, 'mmkd.PKDLoss', dict(loss_weight=1)])
def test_what_is_no_component_is_an_error(config):
    with pytest.raises(ValueError, match="loss must be a dict with a 'type'"):
        build(config, 'loss')


def test_a_mistake_inside_keeps_its_own_words():
    with pytest.raises(ValueError, match='odd kernel_size'):
        build(
            dict(
                type=ConvAdapt,
                in_channels=4,
                out_channels=4,
                num_levels=1,
                kernel_size=2,
            ),
            'align',
        )


def test_schedules_build_under_any_scope_without_a_warning(monkeypatch):
    warned = []

    def listen(message, logger=None, level=logging.INFO):
        if level >= logging.WARNING:
            warned.append(message)

    monkeypatch.setattr('mmengine.logging.print_log', listen)
    init_default_scope('mmdet')
    schedule = build(
        dict(type='mmkd.StopAfter', fraction=0.5), 'schedule', SCHEDULES
    )
    assert schedule(0.4) == 1
    assert warned == []


def test_building_draws_nothing_that_the_component_does_not():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build(dict(type='mmkd.PKDLoss'), 'loss', MODELS)
    assert torch.equal(torch.rand(1), expected)


def test_a_misspelt_setting_is_told_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"loss of type 'mmkd.PKDLoss' has no setting 'loss_wieght'\. "
        r"Did you mean 'loss_weight'",
    ):
        build(dict(type='mmkd.PKDLoss', loss_wieght=1.0), 'loss')


def test_what_takes_any_setting_is_asked_itself():
    def kind(**settings):
        return settings

    assert build(dict(type=kind, anything=1), 'it') == dict(anything=1)

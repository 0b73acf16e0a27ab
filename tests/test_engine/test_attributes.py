import torch
from torch import nn

from mmkd.engine.attributes import (
    changed_attributes,
    plain_attributes,
    set_attributes,
)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.history = [1.0]
        self.size = None
        self.loss_weight = 2.0
        self.cache = torch.zeros(2)


def test_only_what_changed_in_training_is_kept():
    model = nn.Sequential(Head(), Head())
    before = plain_attributes(model)
    model[1].size, model[1].history = (64, 64), [1.0, 0.5]
    model[1].cache = torch.ones(2)
    changed = changed_attributes(model, before)
    assert changed == {'1': dict(size=(64, 64), history=[1.0, 0.5])}

    fresh = nn.Sequential(Head(), Head())
    fresh[1].loss_weight = 3.0  # the config was edited meanwhile
    set_attributes(fresh, changed)
    assert (fresh[1].size, fresh[1].loss_weight) == ((64, 64), 3.0)
    assert fresh[0].size is None


def test_training_mode_is_not_an_attribute():
    model = nn.Sequential(Head())
    before = plain_attributes(model)
    model.eval()
    assert changed_attributes(model, before) == {}

from types import SimpleNamespace

import pytest
import torch

from mmkd.structures import GroundTruth
from mmkd.terms.weights.disagreement import DisagreementWeight


def weight_of(own, other, classes, gt=None, shown=(16, 16), **settings):
    weight = DisagreementWeight(**settings)
    weight.teacher, weight.classes = 'big', classes
    step = SimpleNamespace(
        student=SimpleNamespace(at=lambda path: (own, 'boxes')),
        teacher=lambda name: SimpleNamespace(
            at=lambda path: (other, 'boxes'), size=shown
        ),
        images=torch.zeros(1, 3, 16, 16),
        gt=gt,
    )
    return weight(step)


def test_the_largest_difference_of_each_anchor():
    torch.manual_seed(0)
    own, other = torch.randn(2, 2, 6, 4, 5).unbind()
    (found,) = weight_of([own], [other], classes=3)
    assert found.shape == (2, 2, 4, 5)
    for n, a, y, x in torch.cartesian_prod(*map(torch.arange, (2, 2, 4, 5))):
        most = max(
            abs(
                torch.sigmoid(own[n, 3 * a + c, y, x])
                - torch.sigmoid(other[n, 3 * a + c, y, x])
            ).item()
            for c in range(3)
        )
        assert found[n, a, y, x].item() == pytest.approx(most, abs=1e-6)


def test_a_power_of_it():
    own = torch.logit(torch.tensor([0.9])).view(1, 1, 1, 1)
    other = torch.logit(torch.tensor([0.4])).view(1, 1, 1, 1)
    (found,) = weight_of([own], [other], classes=1, power=2.0)
    assert found.item() == pytest.approx(0.25)


def test_a_border_does_not_count_on_either_side():
    own, other = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 3, 3)
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)], shape=(16, 16), image_shapes=[(8, 16)]
    )
    (found,) = weight_of([own], [other], classes=1, gt=gt, shown=(24, 24))
    assert found.shape == (1, 1, 2, 2)
    assert found[0, 0, 0].all()
    assert not found[0, 0, 1].any()


def test_it_is_no_path_for_gradients():
    own = torch.randn(1, 2, 2, 2, requires_grad=True)
    assert not weight_of([own], [own.detach() + 1], 2)[0].requires_grad


def test_settings_are_checked():
    with pytest.raises(ValueError, match='power > 0'):
        DisagreementWeight(power=0)


def test_a_softmax_is_refused_on_either_side():
    def detector(sigmoid):
        head = torch.nn.Module()
        head.use_sigmoid_cls, head.cls_out_channels = sigmoid, 3
        model = torch.nn.Module()
        model.bbox_head = head
        return model

    def bind(own, other):
        weight = DisagreementWeight()
        weight.bind(
            SimpleNamespace(tap=lambda *x: None),
            detector(own),
            SimpleNamespace(
                name='big', tap=lambda x: None, detector=detector(other)
            ),
        )
        return weight

    assert bind(True, True).classes == 3
    with pytest.raises(ValueError, match="DisagreementWeight.*student's"):
        bind(False, True)
    with pytest.raises(ValueError, match="DisagreementWeight.*teacher's"):
        bind(True, False)

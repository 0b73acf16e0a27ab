import pytest
import tiny
import torch

from mmkd.analysis.cost import (
    gflops,
    multiply_accumulates,
    parameters,
)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)

    def _forward(self, image, samples):
        return (self.conv(image),)


def test_arithmetic_of_one_convolution_is_its_formula():
    # 9 taps × 3 input × 4 output channels at each of 10 × 20 cells
    assert gflops(Layer(), (10, 20)) == pytest.approx(
        9 * 3 * 4 * 10 * 20 / 1e9
    )


def test_a_convolution_takes_as_much_again_for_each_gradient():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    images = torch.zeros(1, 3, 8, 8)
    # Each of 8 x 8 cells of 5 channels sums 3 channels of 3 x 3.
    assert multiply_accumulates(lambda: layer(images)) == 64 * 5 * 27
    images.requires_grad_()
    both = multiply_accumulates(lambda: layer(images).sum().backward())
    assert both == 3 * 64 * 5 * 27


def test_weights_of_terms_are_not_deployed(teachers, terms):
    terms['pkd']['align'] = dict(
        type='mmkd.ConvAdapt', in_channels=16, out_channels=16
    )
    plain = tiny.build(tiny.retinanet())
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    assert parameters(student) == parameters(plain)
    assert parameters(plain) == sum(one.numel() for one in plain.parameters())

import pytest
import torch

from mmkd.structures.constants import constant


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.long])
def test_numbers_are_of_the_other_tensors_type(dtype):
    like = torch.ones(3, dtype=dtype)
    made = constant([[1, 2], [3, 4]], like)
    assert torch.equal(made, like.new_tensor([[1, 2], [3, 4]]))
    assert made.dtype == dtype


def test_another_type_can_be_asked_for():
    made = constant([1, 0], torch.ones(1), torch.bool)
    assert made.dtype == torch.bool
    assert made.tolist() == [True, False]


def test_it_goes_where_the_other_tensor_is():
    assert constant([1.0], torch.ones(1, device='meta')).device.type == 'meta'

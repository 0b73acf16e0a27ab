import pytest
import torch

from mmkd.ops.generation import generation_block, hide_strongest


@pytest.mark.parametrize(
    ('ratio', 'hidden'), [(0.0, 0), (0.3, 3), (0.65, 6), (1.0, 10)]
)
def test_the_ratio_is_the_share_of_each_image_that_is_hidden(ratio, hidden):
    torch.manual_seed(0)
    strength = (
        torch.rand(3, 1, 2, 5) * torch.tensor([1.0, 9, 0])[:, None, None, None]
    )
    mask = hide_strongest(strength, ratio)
    assert mask.shape == strength.shape
    assert set(mask.unique().tolist()) <= {0, 1}
    assert (mask == 0).sum((1, 2, 3)).tolist() == [hidden] * 3
    for one, kept in zip(strength[:2].flatten(1), mask[:2].flatten(1)):
        order = sorted(range(10), key=lambda place: -one[place].item())
        assert [kept[place].item() for place in order] == (
            [0.0] * hidden + [1.0] * (10 - hidden)
        )


def test_what_is_hidden_is_no_path_for_gradients():
    strength = torch.rand(1, 1, 3, 3, requires_grad=True)
    assert not hide_strongest(strength, 0.5).requires_grad


def test_generation_keeps_channels_and_size_and_sees_two_cells_far():
    block = generation_block(3)
    feature = torch.randn(1, 3, 7, 7, requires_grad=True)
    made = block(feature)
    assert made.shape == feature.shape
    made[0, :, 3, 3].sum().backward()
    reached = feature.grad[0].abs().sum(0) > 0
    assert reached[1:6, 1:6].any()
    assert not reached[0].any()
    assert not reached[:, 6].any()

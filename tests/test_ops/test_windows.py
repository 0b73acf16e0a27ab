import pytest
import torch
from mmdet.models.backbones.swin import ShiftWindowMSA
from torch import nn

from mmkd.ops.windows import grid_tokens, map_to_windows, windows_to_map


class Cut(nn.Module):
    """In the place of an attention: keeps the windows, mixes nothing."""

    def forward(self, windows, mask=None):
        self.windows, self.mask = windows, mask
        return windows


def cut(feature, window, shift):
    """Windows of a map as MMDetection cuts them, and their mask."""
    layer = ShiftWindowMSA(feature.shape[1], 1, window, shift)
    layer.w_msa = Cut()
    layer(feature.flatten(2).transpose(1, 2), tuple(feature.shape[2:]))
    return layer.w_msa.windows, layer.w_msa.mask


def numbered(height, width, images=2, channels=3):
    count = images * channels * height * width
    return torch.arange(1.0, count + 1).view(images, channels, height, width)


SIZES = [(8, 8), (8, 12), (6, 9), (3, 4)]
SHIFTS = [(4, 0), (4, 2), (4, 1), (3, 1)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('window', 'shift'), SHIFTS)
def test_windows_of_a_block_are_put_together_to_its_map(size, window, shift):
    feature = numbered(*size)
    windows, _ = cut(feature, window, shift)
    found = windows_to_map(windows, size, window, shift)
    assert torch.equal(found, feature)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('window', 'shift'), SHIFTS)
def test_windows_hold_what_a_block_lets_see_each_other(size, window, shift):
    """Two cells share a window here if its mask lets them there."""
    feature = numbered(*size, images=1, channels=1)
    ours = map_to_windows(feature, window, shift)
    assert ours.shape[2:] == (window**2, 1)
    windows, mask = cut(feature, window, shift)
    wanted = set()
    for index, one in enumerate(windows[..., 0].tolist()):
        for i, a in enumerate(one):
            for j, b in enumerate(one):
                if a and b and (mask is None or mask[index, i, j] == 0):
                    wanted.add((a, b))
    found = {
        (a, b)
        for one in ours[0, ..., 0].tolist()
        for a in one
        for b in one
        if a and b
    }
    assert found == wanted


def test_windows_stand_image_by_image_and_row_by_row():
    windows = map_to_windows(numbered(4, 4, images=2, channels=1), 2, 0)
    assert windows[0, :, :, 0].tolist() == [
        [1, 2, 5, 6],
        [3, 4, 7, 8],
        [9, 10, 13, 14],
        [11, 12, 15, 16],
    ]
    assert windows[1, 0, :, 0].tolist() == [17, 18, 21, 22]


def test_channels_of_a_window_are_those_of_its_cells():
    feature = numbered(4, 6)
    windows = map_to_windows(feature, 2, 0)
    assert windows.shape == (2, 6, 4, 3)
    assert torch.equal(windows[1, 5, 3], feature[1, :, 3, 5])


# Grids -----------------------------------------------------------------------


def test_a_token_is_the_mean_of_its_part():
    feature = numbered(4, 8)
    tokens, there = grid_tokens(feature, torch.ones(2, 1, 4, 8), (2, 2))
    assert tokens.shape == (2, 4, 3)
    assert there.all()
    parts = feature.unfold(2, 2, 2).unfold(3, 4, 4).mean((4, 5))
    torch.testing.assert_close(tokens, parts.flatten(2).transpose(1, 2))


def test_a_map_of_fewer_cells_is_its_own_grid():
    feature = numbered(3, 20)
    tokens, _ = grid_tokens(feature, torch.ones(2, 1, 3, 20), (16, 10))
    assert tokens.shape == (2, 30, 3)
    torch.testing.assert_close(tokens[0, 0], feature[0, :, 0, :2].mean(1))


def test_cells_that_do_not_count_may_hold_anything():
    feature, valid = numbered(4, 4), torch.ones(2, 1, 4, 4)
    valid[1, :, :, 1:] = 0
    before = grid_tokens(feature, valid, (2, 2))
    feature[1, :, :, 1:] = torch.inf
    tokens, there = grid_tokens(feature, valid, (2, 2))
    assert torch.equal(tokens, before[0])
    torch.testing.assert_close(tokens[1, 0], feature[1, :, :2, 0].mean(1))
    assert there.tolist() == [[True] * 4, [True, False, True, False]]
    assert (tokens[1, 1] == 0).all()


def test_half_precision_becomes_float32():
    tokens, _ = grid_tokens(
        numbered(4, 4).bfloat16(), torch.ones(2, 1, 4, 4), (2, 2)
    )
    assert tokens.dtype == torch.float32

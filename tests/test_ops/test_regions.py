import pytest
import torch

from mmkd.ops.regions import (
    jittered_boxes,
    pyramid_bins,
    pyramid_level,
    region_vectors,
)
from mmkd.structures import GroundTruth


def ground_truth(*boxes, shape=(32, 32)):
    return GroundTruth.from_boxes(
        [torch.tensor(one, dtype=torch.float32).view(-1, 4) for one in boxes],
        shape=shape,
    )


def ramp(height, width):
    """Channel 0 holds the column of each cell's centre, channel 1 the row."""
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return torch.stack([x, y])[None]


def test_a_linear_map_gives_its_value_at_the_centre_of_the_box():
    gt = ground_truth([[4, 8, 20, 24], [6, 6, 11, 25]])
    vectors = region_vectors(ramp(8, 8), gt)  # stride 4
    expected = torch.tensor([[12.0, 16.0], [8.5, 15.5]]) / 4
    torch.testing.assert_close(vectors, expected)


def test_rows_and_columns_have_strides_of_their_own():
    gt = ground_truth([[4, 8, 20, 24]], shape=(32, 64))
    vectors = region_vectors(ramp(16, 8), gt)
    expected = torch.tensor([[12.0 / 8, 16.0 / 2]])
    torch.testing.assert_close(vectors, expected)


def test_the_padded_size_gives_the_scale():
    gt = GroundTruth.from_boxes(
        [torch.tensor([[4.0, 8, 20, 24]])],
        shape=(32, 32),
        image_shapes=[(24, 20)],
    )
    torch.testing.assert_close(
        region_vectors(ramp(8, 8), gt), torch.tensor([[3.0, 4.0]])
    )


def test_each_box_reads_its_own_image():
    box = [8, 8, 24, 24]
    feature = torch.tensor([1.0, 2, 3]).view(3, 1, 1, 1).expand(3, 2, 8, 8)
    vectors = region_vectors(feature, ground_truth([box], [], [box, box]))
    assert vectors.tolist() == [[1, 1], [3, 3], [3, 3]]


def test_no_boxes_give_no_vectors_and_a_gradient_of_zero():
    feature = torch.ones(2, 3, 8, 8, requires_grad=True)
    vectors = region_vectors(feature, ground_truth([], []))
    assert vectors.shape == (0, 3)
    vectors.sum().backward()
    assert (feature.grad == 0).all()


def test_a_box_of_zero_size_gives_the_map_at_its_point():
    gt = ground_truth([[12, 16, 12, 16]])
    torch.testing.assert_close(
        region_vectors(ramp(8, 8), gt), torch.tensor([[3.0, 4.0]])
    )


def test_the_order_of_the_corners_does_not_matter():
    right = ground_truth([[4, 8, 20, 24]])
    wrong = ground_truth([[20, 24, 4, 8]])
    feature = ramp(8, 8)
    torch.testing.assert_close(
        region_vectors(feature, wrong), region_vectors(feature, right)
    )


def test_a_box_beyond_the_map_gives_zeros():
    gt = ground_truth([[100, 100, 120, 120]])
    assert region_vectors(ramp(8, 8), gt).tolist() == [[0, 0]]


def test_the_limit_takes_boxes_spread_evenly_over_the_batch():
    boxes = [[4.0 * k + 2, 4, 4 * k + 6, 8] for k in range(7)]
    vectors = region_vectors(ramp(8, 8), ground_truth(boxes), limit=3)
    assert vectors[:, 0].round().tolist() == [1, 3, 5]  # boxes 0, 2 and 4
    everything = region_vectors(ramp(8, 8), ground_truth(boxes), limit=7)
    assert len(everything) == 7


def test_no_value_is_read_on_the_host():
    gt = ground_truth([[4, 8, 20, 24]] * 5, [])
    feature = torch.ones(2, 3, 8, 8, device='meta')
    assert region_vectors(feature, gt, limit=3).shape == (3, 3)


def test_missing_ground_truth_is_named():
    with pytest.raises(ValueError, match='gt=None'):
        region_vectors(torch.ones(1, 2, 4, 4), None)


# A pyramid -------------------------------------------------------------------


def square(side):
    return [0.0, 0, side, side]


def test_the_level_follows_the_size_of_the_box():
    boxes = torch.tensor([square(side) for side in (0, 111, 112, 224, 447)])
    levels = pyramid_level(boxes, (8, 16, 32))
    assert levels.tolist() == [0, 0, 0, 1, 1]
    huge = torch.tensor([square(448), square(9000)])
    assert pyramid_level(huge, (8, 16, 32)).tolist() == [2, 2]


def test_side_and_stride_say_which_box_is_read_where():
    boxes = torch.tensor([square(side) for side in (19, 20, 40)])
    assert pyramid_level(boxes, (4, 8, 16), side=20, stride=8).tolist() == [
        0,
        1,
        2,
    ]
    # The root of the area counts: 10 x 40 is as 20 x 20.
    flat = torch.tensor([[0.0, 0, 10, 40]])
    assert pyramid_level(flat, (4, 8, 16), side=20, stride=8).tolist() == [1]


def test_each_box_is_read_at_its_level_alone():
    maps = [torch.full((2, 3, 8, 8), 1.0), torch.full((2, 3, 4, 4), 2.0)]
    maps[1][1] = 5.0
    boxes = torch.tensor([square(16.0)] * 3)
    bins = pyramid_bins(
        maps,
        boxes,
        image=torch.tensor([0, 0, 1]),
        level=torch.tensor([0, 1, 1]),
        shape=(32, 32),
        output_size=2,
    )
    assert bins.shape == (3, 3, 2, 2)
    assert bins.mean((1, 2, 3)).tolist() == [1, 2, 5]


def test_a_level_that_is_not_read_may_be_infinite():
    maps = [torch.ones(1, 1, 8, 8), torch.full((1, 1, 4, 4), torch.inf)]
    index = torch.zeros(1, dtype=torch.long)
    boxes = torch.tensor([square(16.0)])
    bins = pyramid_bins(maps, boxes, index, index, (32, 32))
    assert (bins == 1).all()


# Views -----------------------------------------------------------------------

SIZES = torch.tensor([[1000.0, 1000]])


def test_views_stand_behind_the_box_itself():
    torch.manual_seed(0)
    boxes = torch.tensor([[100.0, 200, 140, 280], [5, 5, 9, 9]])
    views = jittered_boxes(boxes, SIZES.expand(2, 2), 3, 0.1)
    assert views.shape == (2, 4, 4)
    assert torch.equal(views[:, 0], boxes)


def test_views_move_and_stretch_as_far_as_the_jitter_says():
    torch.manual_seed(0)
    boxes = torch.tensor([[100.0, 200, 140, 280]])
    views = jittered_boxes(boxes, SIZES, 4000, 0.2)[0, 1:]
    centre = (views[:, :2] + views[:, 2:]) / 2 - torch.tensor([120.0, 240])
    side = views[:, 2:] - views[:, :2]
    for found, most in (
        (centre[:, 0], 8),
        (centre[:, 1], 16),
        (side[:, 0] - 40, 8),
        (side[:, 1] - 80, 16),
    ):
        assert found.abs().max() <= most + 1e-3
        assert found.max() > 0.95 * most
        assert found.min() < -0.95 * most
        assert found.mean().abs() < 0.05 * most
    # Four draws of their own.
    draws = torch.cat([centre, side], 1).T
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.1


def test_without_jitter_views_are_the_box():
    boxes = torch.tensor([[100.0, 200, 140, 280]])
    views = jittered_boxes(boxes, SIZES, 2, 0.0)
    torch.testing.assert_close(views[0], boxes.expand(3, 4))


def test_views_end_at_the_border_of_their_image():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 50, 30]])
    views = jittered_boxes(boxes, torch.tensor([[50.0, 30]]), 500, 0.5)
    assert views.min() == 0
    assert views[..., 0::2].max() == 50
    assert views[..., 1::2].max() == 30

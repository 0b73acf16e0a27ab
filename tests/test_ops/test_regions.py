import pytest
import torch

from mmkd.ops.regions import region_vectors
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

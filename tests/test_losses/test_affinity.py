import math

import pytest
import torch

from mmkd.losses.affinity import AffinityLoss, affinity_loss
from mmkd.structures import GroundTruth


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 3, 6, 5).unbind()


def patches(image, size, mask):
    """Means over the cells that count, of each patch that has one."""
    channels, rows, columns = image.shape
    vectors = []
    for top in range(0, rows, size):
        for left in range(0, columns, size):
            cells = [
                (y, x)
                for y in range(top, min(top + size, rows))
                for x in range(left, min(left + size, columns))
                if mask[y, x]
            ]
            if cells:
                vectors.append(
                    [
                        sum(image[c, y, x].item() for y, x in cells)
                        / len(cells)
                        for c in range(channels)
                    ]
                )
    return vectors


def cosine(a, b):
    norms = math.sqrt(sum(v**2 for v in a)) * math.sqrt(sum(v**2 for v in b))
    return sum(p * q for p, q in zip(a, b)) / norms


def literal(student, teacher, size, mask):
    total = 0.0
    for s, t, here in zip(student, teacher, mask[:, 0]):
        own, other = patches(s, size, here), patches(t, size, here)
        places = range(len(own))
        error = sum(
            (cosine(own[i], own[j]) - cosine(other[i], other[j])) ** 2
            for i in places
            for j in places
        )
        total += error / len(own) ** 2
    return total / len(student)


@pytest.mark.parametrize('size', [1, 2, 3, 4])
def test_equals_a_literal_loop(maps, size):
    expected = literal(*maps, size, torch.ones(2, 1, 6, 5))
    assert affinity_loss(*maps, size).item() == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize('size', [1, 2, 4])
def test_masked_cells_are_in_no_patch(maps, size):
    mask = torch.ones(2, 1, 6, 5)
    mask[0, :, 5] = 0
    mask[1, :, :, 2:] = 0
    assert affinity_loss(*maps, size, mask).item() == pytest.approx(
        literal(*maps, size, mask), rel=1e-4
    )


def test_two_places_by_hand():
    # A right angle against one direction: the two pairs differ by 1,
    # the places with themselves by nothing.
    student = torch.tensor([[2.0, 0], [0, 3]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 4], [1, 4]]).view(1, 2, 1, 2)
    assert affinity_loss(student, teacher, 1).item() == pytest.approx(2 / 4)


def test_a_place_is_the_mean_of_its_cells():
    # Cells that cancel within a patch are not seen.
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 4, 4).unbind()
    board = torch.tensor([[1.0, -1], [-1, 1]]).repeat(2, 2)
    torch.testing.assert_close(
        affinity_loss(student + 5 * board, teacher, 2),
        affinity_loss(student, teacher, 2),
    )
    assert affinity_loss(student + 5 * board, student, 1) > 0.1


def test_the_mean_is_over_images(maps):
    student, teacher = maps
    single = [
        affinity_loss(student[n : n + 1], teacher[n : n + 1], 2)
        for n in range(2)
    ]
    torch.testing.assert_close(
        affinity_loss(student, teacher, 2), sum(single) / 2
    )


def test_scale_and_rotation_do_not_matter(maps):
    student, teacher = maps
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    turned = torch.einsum('ij,njhw->nihw', rotation, 300 * student)
    torch.testing.assert_close(
        affinity_loss(turned, teacher, 2), affinity_loss(student, teacher, 2)
    )
    assert affinity_loss(turned, student, 2) < 1e-10


def test_student_and_teacher_may_differ_in_channels(maps):
    student, teacher = maps
    wider = torch.cat([teacher, torch.zeros(2, 2, 6, 5)], 1)
    torch.testing.assert_close(
        affinity_loss(student, wider, 2), affinity_loss(student, teacher, 2)
    )


def test_gradient_is_that_of_finite_differences(maps):
    student, teacher = (one.double() for one in maps)
    mask = torch.ones(2, 1, 6, 5, dtype=torch.double)
    mask[1, :, :, 3:] = 0
    assert torch.autograd.gradcheck(
        lambda one: affinity_loss(one, teacher, 2, mask),
        student.requires_grad_(),
    )


def test_an_image_of_padding_alone_costs_nothing(maps):
    mask = torch.ones(2, 1, 6, 5)
    mask[1] = 0
    student, teacher = maps
    torch.testing.assert_close(
        affinity_loss(student, teacher, 2, mask),
        affinity_loss(student[:1], teacher[:1], 2) / 2,
    )


def padded():
    """Two images of a batch of 48x40 pixels; the second is narrower."""
    return GroundTruth.from_boxes(
        [torch.tensor([[2.0, 2, 9, 9]]), torch.zeros(0, 4)],
        shape=(48, 40),
        image_shapes=[(48, 40), (48, 24)],
        ignored=[torch.tensor([[20.0, 20, 30, 30]]), torch.zeros(0, 4)],
    )


def test_the_padded_border_does_not_count(maps):
    student, teacher = maps
    loss = AffinityLoss(loss_weight=3.0, patch_size=2)
    value = loss(student, teacher, padded())
    mask = torch.ones(2, 1, 6, 5)
    mask[1, :, :, 3:] = 0
    torch.testing.assert_close(
        value, 3 * affinity_loss(student, teacher, 2, mask)
    )
    kept = AffinityLoss(loss_weight=3.0, patch_size=2, keep_padding=True)
    torch.testing.assert_close(
        kept(student, teacher, padded()), loss(student, teacher)
    )
    student = student.clone()
    student[1, :, :, 3:] += 9
    torch.testing.assert_close(loss(student, teacher, padded()), value)


def test_patches_have_four_cells_a_side_unless_told_otherwise(maps):
    for value in (AffinityLoss()(*maps), affinity_loss(*maps)):
        torch.testing.assert_close(value, affinity_loss(*maps, 4))


def test_half_precision_is_not_used_under_autocast(maps):
    value = AffinityLoss(patch_size=1)(*maps)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(AffinityLoss(patch_size=1)(*maps), value)


def test_a_difference_in_size_names_the_fix(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='mmkd.ResizeAdapt'):
        AffinityLoss()(student[:, :, :4], teacher)


def test_an_impossible_patch_is_refused():
    with pytest.raises(ValueError, match='patch_size > 0'):
        AffinityLoss(patch_size=0)


def test_another_batch_of_ground_truth_is_refused(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='has 1, gt has 2'):
        AffinityLoss()(student[:1], teacher[:1], padded())

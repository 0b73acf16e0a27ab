import pytest
import torch
import torch.nn.functional as F

from mmkd.losses.fsp import FSPLoss, fsp_loss, fsp_matrix
from mmkd.structures import GroundTruth

#: Row and column of the cells that count in both maps below.
BOTH = ((0, 1), (1, 0))


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def pyramid(channels=(3, 2, 4), cells=(8, 4, 2), images=2):
    return tuple(
        torch.randn(images, width, size, size)
        for width, size in zip(channels, cells)
    )


def truth(shapes=((64, 64), (64, 32)), side=64):
    return GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * len(shapes),
        shape=(side, side),
        image_shapes=shapes,
    )


def test_two_channels_by_hand():
    a = torch.tensor([[[1.0, 2]], [[0, -1]]])[None]  # (1, 2, 1, 2)
    b = torch.tensor([[[3.0, 5]]])[None]  # (1, 1, 1, 2)
    # (1 * 3 + 2 * 5) / 2 and (0 * 3 - 1 * 5) / 2
    assert fsp_matrix(a, b).tolist() == [[[6.5], [-2.5]]]


def test_equals_a_literal_loop():
    a, b = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
    wanted = torch.zeros(2, 3, 5)
    for n in range(2):
        for i in range(3):
            for j in range(5):
                for h in range(2):
                    for w in range(4):
                        wanted[n, i, j] += a[n, i, h, w] * b[n, j, h, w] / 8
    torch.testing.assert_close(fsp_matrix(a, b), wanted)


def test_the_larger_map_enters_by_the_largest_of_each_window():
    large, small = torch.randn(1, 3, 4, 8), torch.randn(1, 2, 2, 4)
    wanted = fsp_matrix(F.max_pool2d(large, 2), small)
    torch.testing.assert_close(fsp_matrix(large, small), wanted)
    torch.testing.assert_close(
        fsp_matrix(small, large), wanted.transpose(1, 2)
    )


def test_the_loss_is_the_mean_square_over_entries_images_and_pairs():
    student, teacher = pyramid(), pyramid()
    total = 0.0
    for a, b in ((0, 1), (1, 2)):
        for image in range(2):
            one, other = (
                fsp_matrix(maps[a][image, None], maps[b][image, None])
                for maps in (student, teacher)
            )
            total += ((one - other) ** 2).sum() / one.numel() / 2
    found = FSPLoss(loss_weight=3.0)(student, teacher)
    torch.testing.assert_close(found, 3 * total / 2)


def test_pairs_are_chosen():
    student, teacher = pyramid(), pyramid()
    wanted = fsp_loss(
        fsp_matrix(student[0], student[2]), fsp_matrix(teacher[0], teacher[2])
    )
    found = FSPLoss(pairs=[(0, 2)])(student, teacher)
    torch.testing.assert_close(found, wanted)


def test_one_turn_of_all_cells_changes_no_flow():
    """Only what stands at the same cell of both maps is multiplied."""
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)
    order = torch.randperm(16)
    turned = [one.flatten(2)[..., order].view_as(one) for one in (a, b)]
    torch.testing.assert_close(fsp_matrix(*turned), fsp_matrix(a, b))
    apart = fsp_matrix(turned[0], b)
    assert (apart - fsp_matrix(a, b)).abs().max() > 0.1


def test_a_factor_of_the_maps_enters_squared():
    student, teacher = pyramid(), pyramid()
    zero = tuple(torch.zeros_like(one) for one in teacher)
    loss = FSPLoss()
    torch.testing.assert_close(
        loss(tuple(2 * one for one in student), zero),
        16 * loss(student, zero),
    )
    assert loss(student, teacher) > 0


def test_teacher_and_student_may_differ_in_resolution():
    fine = pyramid(cells=(16, 8, 4))
    coarse = tuple(F.max_pool2d(one, 2) for one in fine)
    student = pyramid()
    assert FSPLoss()(student, fine) > 0
    constant = tuple(
        one.mean((2, 3), keepdim=True).expand_as(one) for one in fine
    )
    smaller = tuple(one[..., ::2, ::2] for one in constant)
    assert FSPLoss()(smaller, constant, truth()) < 1e-10
    assert FSPLoss()(coarse, fine) > 0


def test_the_padded_border_is_in_no_product_mean_or_window():
    student, teacher, gt = pyramid(), pyramid(), truth()
    first = FSPLoss()(student, teacher, gt)
    for maps in (student, teacher):
        for one in maps:
            one[1, ..., one.shape[-1] // 2 :] = 1e4
    torch.testing.assert_close(FSPLoss()(student, teacher, gt), first)
    cut = [
        tuple(one[1:, ..., : one.shape[-1] // 2] for one in maps)
        for maps in (student, teacher)
    ]
    alone = FSPLoss()(
        *(tuple(one[1:] for one in maps) for maps in (student, teacher)),
        truth(((64, 32),)),
    )
    torch.testing.assert_close(alone, FSPLoss()(*cut))


def test_a_cell_counts_if_it_does_in_both_maps():
    a, b = torch.randn(2, 3, 2, 2), torch.randn(2, 4, 2, 2)
    one, other = torch.ones(2, 2, 1, 2, 2).unbind()
    one[0, 0, 0, 0] = other[0, 0, 1, 1] = 0
    found = fsp_matrix(a, b, one, other)
    pairs = [torch.outer(a[0, :, h, w], b[0, :, h, w]) for h, w in BOTH]
    torch.testing.assert_close(found[0], sum(pairs) / 2)
    torch.testing.assert_close(found[1], fsp_matrix(a, b)[1])


def test_an_image_of_which_nothing_counts_costs_nothing():
    a, b = torch.randn(1, 3, 4, 4), torch.randn(1, 2, 2, 2)
    a.requires_grad_()
    found = fsp_matrix(a, b, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2))
    found.sum().backward()
    assert (found == 0).all()
    assert a.grad.isfinite().all()


def test_gradient_is_that_of_finite_differences():
    student = [one.double().requires_grad_() for one in pyramid(images=1)]
    teacher = [one.double() for one in pyramid(images=1)]
    assert torch.autograd.gradcheck(
        lambda *maps: FSPLoss()(maps, teacher), student
    )


def test_other_channels_are_told_the_adapter():
    student, teacher = pyramid((4, 4, 4)), pyramid((8, 8, 8))
    with pytest.raises(ValueError, match='in_channels=4, out_channels=8'):
        FSPLoss()(student, teacher)
    with pytest.raises(ValueError, match=r'in_channels=\[3, 2, 4\]'):
        FSPLoss()(pyramid(), teacher)


def test_what_has_no_flow_is_refused():
    one = pyramid()
    with pytest.raises(ValueError, match='two or more'):
        FSPLoss()(one[:1], one[:1])
    with pytest.raises(ValueError, match='as many of both; got 3 .* 2'):
        FSPLoss()(one, one[:2])
    with pytest.raises(ValueError, match='maps 0 to 2.*names 3'):
        FSPLoss(pairs=[(0, 3)])(one, one)
    for pairs in ([], [(0,)], [(0, 1, 2)]):
        with pytest.raises(ValueError, match='needs pairs'):
            FSPLoss(pairs=pairs)

import pytest
import torch

from mmkd.losses.reviewkd import AttentionFusion, ReviewKDLoss, hcl_loss
from mmkd.structures import GroundTruth

CHANNELS, SIZES = (3, 4, 5), ((12, 10), (6, 5), (3, 3))


@pytest.fixture
def pyramids():
    """Three levels of the student and of a teacher with other channels."""
    torch.manual_seed(0)
    student = [torch.randn(2, c, *s) for c, s in zip(CHANNELS, SIZES)]
    teacher = [torch.randn(2, 2, *s) for s in SIZES]
    return student, teacher


@pytest.fixture
def loss():
    torch.manual_seed(0)
    loss = ReviewKDLoss(CHANNELS, (2, 2, 2), mid_channels=3, loss_weight=0.5)
    for module in loss.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.uniform_(module.bias)
            torch.nn.init.uniform_(module.running_mean)
    return loss.eval()


def span(index, count, cells):
    """The cells that adaptive pooling puts into a bin."""
    return range(index * cells // count, -(-(index + 1) * cells // count))


def literal_hcl(student, teacher, sizes, mask):
    """The weighted mean over the map and the sizes it is pooled to."""
    images, channels, rows, columns = student.shape
    total, weights = 0.0, 0.0
    for k, (height, width) in enumerate([(rows, columns), *sizes]):
        errors = []
        for n in range(images):
            for i in range(height):
                for j in range(width):
                    cells = [
                        (y, x)
                        for y in span(i, height, rows)
                        for x in span(j, width, columns)
                        if mask[n, 0, y, x]
                    ]
                    if not cells:
                        continue
                    for c in range(channels):
                        own, other = (
                            sum(one[n, c, y, x].item() for y, x in cells)
                            / len(cells)
                            for one in (student, teacher)
                        )
                        errors.append((own - other) ** 2)
        total += 0.5**k * sum(errors) / len(errors)
        weights += 0.5**k
    return total / weights


@pytest.mark.parametrize(
    ('size', 'pooled'),
    [
        ((7, 9), [(4, 4), (2, 2), (1, 1)]),
        ((4, 9), [(2, 2), (1, 1)]),
        ((9, 4), [(2, 2), (1, 1)]),
        ((2, 3), [(1, 1)]),
        ((1, 5), []),
    ],
)
def test_hcl_equals_a_literal_loop(size, pooled):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, *size).unbind()
    expected = literal_hcl(student, teacher, pooled, torch.ones(2, 1, *size))
    assert hcl_loss(student, teacher).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_hcl_leaves_masked_cells_out():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 7, 9).unbind()
    mask = torch.ones(2, 1, 7, 9)
    mask[0, :, 6] = 0
    mask[1, :, :, 4:] = 0
    expected = literal_hcl(student, teacher, [(4, 4), (2, 2), (1, 1)], mask)
    assert hcl_loss(student, teacher, mask).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_hcl_of_a_pattern_that_averages_away():
    # The board is 1 or -1 everywhere and 0 in every mean: 1 of 15 / 8.
    board = torch.tensor([[1.0, -1], [-1, 1]]).repeat(4, 4)[None, None]
    value = hcl_loss(board, torch.zeros(1, 1, 8, 8)).item()
    assert value == pytest.approx(8 / 15)


def test_hcl_of_an_empty_mask_is_zero():
    student = torch.ones(1, 2, 8, 8, requires_grad=True)
    value = hcl_loss(student, torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8))
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


def conv_norm(block, feature, padding):
    """Convolution and norm by running statistics, written out."""
    conv, norm = block
    made = torch.conv2d(feature, conv.weight, padding=padding)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    return made * scale[:, None, None] + shift[:, None, None]


def enlarged(feature, size):
    """Nearest neighbours, cell by cell."""
    rows, columns = feature.shape[-2:]
    y = torch.tensor([i * rows // size[0] for i in range(size[0])])
    x = torch.tensor([j * columns // size[1] for j in range(size[1])])
    return feature[:, :, y][:, :, :, x]


def literal_review(loss, student):
    results, handed = [], None
    for level in (2, 1, 0):
        fusion = loss.fusions[level]
        fused = conv_norm(fusion.enter, student[level], padding=0)
        if handed is not None:
            handed = enlarged(handed, fused.shape[-2:])
            weight = fusion.attention.weight[:, :, 0, 0]
            both = torch.cat([fused, handed], 1)
            logits = torch.einsum('ij,njhw->nihw', weight, both)
            logits = logits + fusion.attention.bias[:, None, None]
            share = 1 / (1 + (-logits).exp())
            fused = share[:, :1] * fused + share[:, 1:] * handed
        handed = fused
        results.append(conv_norm(fusion.leave, fused, padding=1))
    return results[::-1]


def test_review_equals_its_steps_written_out(loss, pyramids):
    student, _ = pyramids
    results = loss.review(student)
    assert [one.shape[1:] for one in results] == [(2, *s) for s in SIZES]
    for one, expected in zip(results, literal_review(loss, student)):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_sum_over_the_levels(loss, pyramids):
    student, teacher = pyramids
    pooled = ([(4, 4), (2, 2), (1, 1)], [(4, 4), (2, 2), (1, 1)])
    pooled = (*pooled, [(2, 2), (1, 1)])
    expected = sum(
        literal_hcl(one, other, sizes, torch.ones(2, 1, *size))
        for one, other, sizes, size in zip(
            literal_review(loss, student), teacher, pooled, SIZES
        )
    )
    assert loss(student, teacher).item() == pytest.approx(
        0.5 * expected, rel=1e-4
    )


def test_finer_levels_see_the_coarser_ones_and_not_the_reverse(loss, pyramids):
    student, _ = pyramids
    before = loss.review(student)
    for changed in range(3):
        other = [one + (level == changed) for level, one in enumerate(student)]
        same = [torch.equal(a, b) for a, b in zip(before, loss.review(other))]
        assert same == [level > changed for level in range(3)]


def test_every_level_learns_from_the_finest_teacher(pyramids):
    student, _ = pyramids
    student = [one.requires_grad_() for one in student]
    loss = ReviewKDLoss(CHANNELS, mid_channels=3)
    loss.review(student)[0].square().sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in student)


def test_the_coarsest_level_has_nothing_to_fuse(loss):
    assert [one.attention is None for one in loss.fusions] == [
        False,
        False,
        True,
    ]


def test_weights_start_as_in_the_authors_code():
    torch.manual_seed(0)
    fusion = AttentionFusion(64, 32, 48, fuse=True)
    for block, fan_in in ((fusion.enter, 64), (fusion.leave, 32 * 9)):
        bound = (3 / fan_in) ** 0.5
        assert block[0].weight.abs().max().item() == pytest.approx(
            bound, rel=0.01
        )
        assert block[0].bias is None
    assert fusion.attention.weight.shape == (2, 64, 1, 1)


def test_the_teacher_has_the_student_s_channels_unless_told_otherwise():
    loss = ReviewKDLoss((3, 4))
    assert loss.out_channels == (3, 4)
    assert loss.fusions[0].enter[0].out_channels == 256


def test_gradient_is_that_of_finite_differences(loss, pyramids):
    student, teacher = (
        [one[:1, :, :5, :4].double() for one in side] for side in pyramids
    )
    loss = loss.double()
    assert torch.autograd.gradcheck(
        lambda *maps: loss(maps, teacher),
        [one.requires_grad_() for one in student],
    )


def test_fusions_learn(loss, pyramids):
    loss.train()(*pyramids).backward()
    assert all(one.grad.abs().sum() > 0 for one in loss.parameters())


def padded():
    """Two images of a batch of 96x80 pixels; the second is narrower."""
    return GroundTruth.from_boxes(
        [torch.tensor([[2.0, 2, 9, 9]]), torch.zeros(0, 4)],
        shape=(96, 80),
        image_shapes=[(96, 80), (96, 40)],
        ignored=[torch.tensor([[20.0, 20, 30, 30]]), torch.zeros(0, 4)],
    )


def test_the_padded_border_is_in_no_mean(loss, pyramids):
    student, teacher = pyramids
    expected = 0.0
    for one, other, columns in zip(loss.review(student), teacher, (5, 3, 2)):
        mask = torch.ones_like(one[:, :1])
        mask[1, :, :, columns:] = 0
        expected = expected + 0.5 * hcl_loss(one, other, mask)
    value = loss(student, teacher, padded())
    torch.testing.assert_close(value, expected)
    other = [one.clone() for one in teacher]
    other[0][1, :, :, 5:] += 9
    torch.testing.assert_close(loss(student, other, padded()), value)
    loss.keep_padding = True
    torch.testing.assert_close(
        loss(student, teacher, padded()), loss(student, teacher)
    )


def test_half_precision_is_not_used_under_autocast(loss, pyramids):
    value = loss(*pyramids)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(loss(*pyramids), value)


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match='Give both one entry a level'):
        ReviewKDLoss((3, 4), (2, 2, 2))
    with pytest.raises(ValueError, match='mid_channels > 0'):
        ReviewKDLoss((3, 4), mid_channels=0)


def test_another_number_of_levels_is_named(loss, pyramids):
    student, teacher = pyramids
    with pytest.raises(ValueError, match='3 levels, got 2 maps'):
        loss(student[:2], teacher)
    with pytest.raises(ValueError, match='and 2 of the teacher'):
        loss(student, teacher[:2])


def test_other_channels_than_built_for_are_named(loss, pyramids):
    student, teacher = pyramids
    with pytest.raises(ValueError, match='Set its channels to 2'):
        loss(teacher, teacher)
    with pytest.raises(ValueError, match='Set its channels to 3'):
        loss(student, [student[0], *teacher[1:]])


def test_a_difference_in_size_names_the_fix(loss, pyramids):
    student, teacher = pyramids
    with pytest.raises(ValueError, match='mmkd.ResizeAdapt'):
        loss([student[0][:, :, :8], *student[1:]], teacher)


def test_another_batch_of_ground_truth_is_refused(loss, pyramids):
    student, teacher = ([one[:1] for one in side] for side in pyramids)
    with pytest.raises(ValueError, match='has 1, gt has 2'):
        loss(student, teacher, padded())

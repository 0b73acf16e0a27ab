import pytest
import torch

from mmkd.losses.pgd import (
    PGDBoxLoss,
    PGDClassLoss,
    cell_attention,
    pgd_box_loss,
    pgd_class_loss,
)
from mmkd.ops.attention import spatial_attention
from mmkd.structures import GroundTruth


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 5, 4, 3).unbind()


@pytest.fixture
def masks():
    """Weights of some cells, others of none."""
    torch.manual_seed(1)
    return (torch.rand(2, 2, 1, 4, 3) - 0.4).clamp(min=0).unbind()


def softmax(values):
    shares = [torch.exp(one) for one in values]
    return [one / sum(shares) for one in shares]


def over_channels(feature, n, y, x, temperature):
    """Attention in one cell, channel by channel."""
    column = [abs(one) / temperature for one in feature[n, :, y, x]]
    return [len(column) * one for one in softmax(column)]


def over_space(feature, n, temperature):
    """Attention over the cells of one image."""
    _, _, rows, columns = feature.shape
    cells = [(y, x) for y in range(rows) for x in range(columns)]
    means = [feature[n, :, y, x].abs().mean() / temperature for y, x in cells]
    shares = [len(cells) * one for one in softmax(means)]
    return dict(zip(cells, shares))


def literal_class_loss(student, teacher, foreground, background, temperature):
    images, channels, rows, columns = student.shape
    parts = dict(foreground=0.0, background=0.0, attention=0.0)
    for n in range(images):
        space = over_space(teacher, n, temperature)
        own = over_space(student, n, temperature)
        counts = {
            name: max(1, (mask[n] != 0).sum().item())
            for name, mask in (
                ('foreground', foreground),
                ('background', background),
            )
        }
        for y in range(rows):
            for x in range(columns):
                channel = over_channels(teacher, n, y, x, temperature)
                like = over_channels(student, n, y, x, temperature)
                error = sum(
                    channel[c]
                    * (student[n, c, y, x] - teacher[n, c, y, x]) ** 2
                    for c in range(channels)
                )
                for name, mask in (
                    ('foreground', foreground),
                    ('background', background),
                ):
                    parts[name] += (
                        mask[n, 0, y, x] / counts[name] * space[y, x] * error
                    )
                parts['attention'] += sum(
                    abs(a - b) for a, b in zip(channel, like)
                ) / (rows * columns)
                parts['attention'] += abs(space[y, x] - own[y, x])
    return {name: part / images for name, part in parts.items()}


def literal_box_loss(student, teacher, foreground, temperature):
    images, channels, rows, columns = student.shape
    error, attention, count = 0.0, 0.0, 0
    for n in range(images):
        for y in range(rows):
            for x in range(columns):
                weight = foreground[n, 0, y, x]
                if weight == 0:
                    continue
                count += 1
                channel = over_channels(teacher, n, y, x, temperature)
                like = over_channels(student, n, y, x, temperature)
                error += weight * sum(
                    channel[c]
                    * (student[n, c, y, x] - teacher[n, c, y, x]) ** 2
                    for c in range(channels)
                )
                attention += sum(abs(a - b) for a, b in zip(channel, like))
    return dict(
        foreground=error / channels / count, attention=attention / count
    )


def test_the_loss_of_classes_written_out(maps, masks):
    found = pgd_class_loss(*maps, *masks, temperature=0.6)
    expected = literal_class_loss(*maps, *masks, 0.6)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_the_loss_of_boxes_written_out(maps, masks):
    found = pgd_box_loss(*maps, masks[0], temperature=0.6)
    expected = literal_box_loss(*maps, masks[0], 0.6)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_attention_of_a_cell_is_a_softmax_over_its_channels(maps):
    """By hand: 4 and 0 at temperature 2, so e² / (e² + 1), of mean 1."""
    feature = torch.tensor([-4.0, 0.0]).view(1, 2, 1, 1)
    share = torch.tensor(2.0).sigmoid()
    expected = 2 * torch.stack([share, 1 - share]).view(1, 2, 1, 1)
    torch.testing.assert_close(cell_attention(feature, 2.0), expected)
    mean = cell_attention(maps[0]).mean(1)
    torch.testing.assert_close(mean, torch.ones_like(mean))


def test_cells_without_weight_do_not_matter(maps, masks):
    """But for attention over space, which every cell shares."""
    student, teacher = maps
    foreground, _ = masks
    nothing = torch.zeros_like(foreground)
    other = student + (foreground == 0) * torch.randn_like(student)
    for loss, more in ((pgd_class_loss, (nothing,)), (pgd_box_loss, ())):
        one, like = (
            loss(x, teacher, foreground, *more) for x in (student, other)
        )
        torch.testing.assert_close(one['foreground'], like['foreground'])
    torch.testing.assert_close(one['attention'], like['attention'])


def test_an_image_is_not_weighed_by_the_masks_of_another(maps):
    student, teacher = maps
    mask = torch.zeros(2, 1, 4, 3)
    mask[0, 0, 1, 1] = 1
    same = student.clone()
    same[0, :, 1, 1] = teacher[0, :, 1, 1]
    parts = pgd_class_loss(same, teacher, mask, mask)
    assert parts['foreground'] == 0
    assert parts['background'] == 0


def test_a_level_where_nothing_counts_costs_nothing_and_can_be_learnt(maps):
    student, teacher = maps
    student.requires_grad_()
    nothing = torch.zeros(2, 1, 4, 3)
    parts = pgd_box_loss(student, teacher, nothing)
    assert all(part == 0 for part in parts.values())
    sum(parts.values()).backward()
    assert student.grad.abs().sum() == 0
    parts = pgd_class_loss(student, teacher, nothing, nothing)
    assert parts['foreground'] == parts['background'] == 0


@pytest.mark.parametrize('part', ['foreground', 'background', 'attention'])
def test_the_student_learns_from_every_part(maps, masks, part):
    student, teacher = maps
    student.requires_grad_()
    pgd_class_loss(student, teacher, *masks)[part].backward()
    assert student.grad.any()
    if part != 'background':
        student.grad = None
        pgd_box_loss(student, teacher, masks[0])[part].backward()
        assert student.grad.any()


# Modules ---------------------------------------------------------------------


@pytest.fixture
def gt():
    """Cells of 8 pixels; the second image has a border of one column."""
    return GroundTruth.from_boxes(
        [torch.tensor([[4.0, 4, 12, 20]]), torch.tensor([[0.0, 0, 8, 8]])],
        shape=(32, 24),
        image_shapes=[(32, 24), (32, 16)],
        ignored=[torch.tensor([[16.0, 24, 24, 32]]), torch.zeros(0, 4)],
    )


FOREGROUND = [
    [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]],
    [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
]
BACKGROUND = [
    [[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 1, 0]],
    [[0, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]],
]


def mask_of(rows):
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def test_the_background_are_the_cells_that_no_box_overlaps(maps, masks, gt):
    expected = pgd_class_loss(*maps, masks[0], mask_of(BACKGROUND))
    found = PGDClassLoss(1.0, 1.0, 1.0)(*maps, gt, masks[0])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_without_a_weight_the_foreground_are_the_cells_of_boxes(maps, gt):
    expected = pgd_class_loss(*maps, mask_of(FOREGROUND), mask_of(BACKGROUND))
    found = PGDClassLoss(1.0, 1.0, 1.0)(*maps, gt)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    expected = pgd_box_loss(*maps, mask_of(FOREGROUND))
    found = PGDBoxLoss(1.0, 1.0)(*maps, gt)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_weight_of_boxes_needs_no_ground_truth(maps, masks):
    expected = pgd_box_loss(*maps, masks[0])
    found = PGDBoxLoss(1.0, 1.0)(*maps, weight=masks[0])
    torch.testing.assert_close(found['foreground'], expected['foreground'])


def test_every_part_has_its_weight(maps, masks, gt):
    plain = PGDClassLoss(1.0, 1.0, 1.0, temperature=0.6)
    loss = PGDClassLoss(2.0, 3.0, 5.0, temperature=0.6, loss_weight=0.5)
    one, other = (x(*maps, gt, masks[0]) for x in (plain, loss))
    for name, factor in dict(
        foreground=1, background=1.5, attention=2.5
    ).items():
        torch.testing.assert_close(other[name], factor * one[name])
    plain = PGDBoxLoss(1.0, 1.0, temperature=0.6)
    loss = PGDBoxLoss(2.0, 5.0, temperature=0.6, loss_weight=0.5)
    one, other = (x(*maps, gt, masks[0]) for x in (plain, loss))
    for name, factor in dict(foreground=1, attention=2.5).items():
        torch.testing.assert_close(other[name], factor * one[name])


def test_the_temperature_is_that_of_the_attentions(maps, masks, gt):
    found = PGDClassLoss(1.0, 1.0, 1.0, temperature=0.6)(*maps, gt, masks[0])
    expected = pgd_class_loss(*maps, masks[0], mask_of(BACKGROUND), 0.6)
    torch.testing.assert_close(found['foreground'], expected['foreground'])
    found = PGDBoxLoss(1.0, 1.0, temperature=0.6)(*maps, gt, masks[0])
    expected = pgd_box_loss(*maps, masks[0], 0.6)
    torch.testing.assert_close(found['foreground'], expected['foreground'])


def test_coarser_levels_count_more_but_not_their_attention(maps, masks, gt):
    levels = [
        PGDClassLoss(level_index=level)(*maps, gt, masks[0])
        for level in range(5)
    ]
    for level, factor in enumerate((1.0, 1.25, 1.5, 1.75, 2.0)):
        for name in ('foreground', 'background'):
            torch.testing.assert_close(
                levels[level][name], factor * levels[0][name]
            )
        assert levels[level]['attention'] == levels[0]['attention']
    steep = PGDClassLoss(level_index=1, level_step=1.0)(*maps, gt, masks[0])
    torch.testing.assert_close(
        steep['foreground'], 2 * levels[0]['foreground']
    )


def test_attention_over_space_is_that_of_the_whole_map():
    """One cell differs, so the student looks elsewhere in every cell."""
    teacher = torch.ones(1, 2, 2, 2)
    student = teacher.clone()
    student[0, :, 0, 0] = 3
    nothing = torch.zeros(1, 1, 2, 2)
    parts = pgd_class_loss(student, teacher, nothing, nothing, 1.0)
    expected = (spatial_attention(student, 1.0) - 1).abs().sum()
    torch.testing.assert_close(parts['attention'], expected)


@pytest.mark.parametrize('kind', [PGDClassLoss, PGDBoxLoss])
def test_channel_mismatch_names_the_fix(maps, gt, kind):
    student, teacher = maps
    with pytest.raises(ValueError, match=rf'{kind.__name__}.*in_channels=3'):
        kind()(student[:, :3], teacher, gt)


@pytest.mark.parametrize('kind', [PGDClassLoss, PGDBoxLoss])
def test_what_is_wrong_is_said(maps, kind):
    with pytest.raises(ValueError, match=rf'{kind.__name__}.*temperature > 0'):
        kind(temperature=0)
    with pytest.raises(ValueError, match=rf'{kind.__name__}.*gt=None'):
        kind()(*maps)

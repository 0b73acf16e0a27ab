import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkd.losses.semckd import SemCKDLoss, batch_relation, grid_relation
from mmkd.structures import GroundTruth


class Same(nn.Module):
    """A projector that leaves what is projected."""

    def forward(self, feature):
        return feature


def built(students=2, teachers=3, plain=False, seed=0, **settings):
    """A loss over layers of 4 channels, in evaluation.

    Args:
        plain: Whether projectors leave the maps as they are.
    """
    torch.manual_seed(seed)
    settings = dict(dict(grid=2, loss_weight=1.0), **settings)
    loss = SemCKDLoss((4,) * students, (4,) * teachers, **settings).eval()
    if plain:
        for row in loss.projectors:
            for j in range(teachers):
                row[j] = Same()
    return loss


@pytest.fixture
def pyramids():
    """Two layers of a student, three of a teacher; three images."""
    torch.manual_seed(1)
    sizes = (8, 4), (8, 4, 2)
    return [
        [torch.randn(3, 4, cells, cells) for cells in levels]
        for levels in sizes
    ]


@pytest.fixture
def flat():
    """Layers of one size, (3, 4, 4, 4) each."""
    torch.manual_seed(1)
    maps = torch.randn(5, 3, 4, 4, 4).unbind()
    return maps[:2], maps[2:]


def whole(levels):
    return [(one, torch.ones_like(one[:, :1])) for one in levels]


def padded():
    return GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 3,
        shape=(64, 64),
        image_shapes=[(64, 64), (32, 48), (64, 64)],
    )


def weights(loss, student, teacher):
    return loss.attention(whole(student), whole(teacher))


def test_parts_of_an_image_resemble_each_other_by_hand():
    # Parts (3, 4), (0, 2), (-6, -8) and nothing: cosines 4/5, -1, -4/5, 0.
    cells = torch.tensor([[3.0, 4], [0, 2], [-6, -8], [0, 0]])
    feature = cells.T.reshape(1, 2, 2, 2)
    found = grid_relation(feature, torch.ones(1, 1, 2, 2), 2).view(4, 4)
    expected = [
        [1, 0.8, -1, 0],
        [0.8, 1, -0.8, 0],
        [-1, -0.8, 1, 0],
        [0, 0, 0, 0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_part_is_the_mean_of_its_cells():
    torch.manual_seed(0)
    feature = torch.randn(2, 3, 6, 4)
    ones = torch.ones(2, 1, 6, 4)
    pooled = F.avg_pool2d(feature, (3, 2))
    torch.testing.assert_close(
        grid_relation(feature, ones, 2),
        grid_relation(pooled, ones[..., :2, :2], 2),
    )
    # What the border holds is in no part.
    valid = ones.clone()
    valid[..., 2:] = 0
    found = grid_relation(feature, valid, 2).view(2, 4, 4)
    assert (found[:, 1] == 0).all()
    assert (found[:, 0, 0] - 1).abs().max() < 1e-6


def test_images_of_a_batch_resemble_each_other_as_whole_maps():
    torch.manual_seed(0)
    feature = torch.randn(3, 2, 2, 4)
    valid = torch.ones(3, 1, 2, 4)
    valid[1, ..., 3:] = 0
    shown = (feature * valid).flatten(1)
    expected = [[sum(a * b) for b in shown] for a in shown]
    torch.testing.assert_close(
        batch_relation(feature, valid), torch.tensor(expected)
    )


@pytest.mark.parametrize('relation', ['grid', 'batch'])
def test_weights_are_those_of_a_literal_loop(pyramids, relation):
    student, teacher = pyramids
    loss = built(relation=relation, batch_size=3, soft=0.5, embed_factor=2)
    found = weights(loss, student, teacher)

    def vectors(levels, embeddings):
        """Query or key of each layer and image."""
        result = []
        for one, (first, _, second) in zip(levels, embeddings):
            ones = torch.ones_like(one[:, :1])
            relations = (
                grid_relation(one, ones, 2)
                if relation == 'grid'
                else batch_relation(one, ones)
            )
            row = []
            for x in relations:
                x = (first.weight @ x + first.bias).clamp(min=0)
                x = second.weight @ x + second.bias
                row.append(x / x.norm())
            result.append(row)
        return result

    queries = vectors(student, loss.queries)
    keys = vectors(teacher, loss.keys)
    assert found.shape == (3, 2, 3)
    for n in range(3):
        for i in range(2):
            powers = [
                math.exp((queries[i][n] @ keys[j][n]).item() / 0.5)
                for j in range(3)
            ]
            for j in range(3):
                expected = powers[j] / sum(powers)
                assert found[n, i, j].item() == pytest.approx(expected, 1e-4)


def test_widths_are_the_papers():
    """B -> 2 (B / 4) -> B / 4, and C -> 2 C' -> 2 C' -> C'."""
    loss = SemCKDLoss([5], [6], relation='batch', batch_size=64)
    first, _, second = loss.queries[0]
    assert first.weight.shape == (32, 64)
    assert second.weight.shape == (16, 32)
    convs = [
        one for one in loss.projectors[0][0] if isinstance(one, nn.Conv2d)
    ]
    assert [tuple(one.weight.shape) for one in convs] == [
        (12, 5, 1, 1),
        (12, 12, 3, 3),
        (6, 12, 1, 1),
    ]
    kinds = [type(one).__name__ for one in loss.projectors[0][0]]
    assert kinds == [
        *('Conv2d', 'BatchNorm2d', 'ReLU'),
        *('Conv2d', 'BatchNorm2d', 'ReLU', 'Conv2d'),
    ]
    loss = SemCKDLoss([5], [6], mid_channels=7)
    assert loss.keys[0][0].weight.shape == (128, 256)
    assert loss.projectors[0][0][3].weight.shape == (7, 7, 3, 3)


def test_weights_sum_to_one_over_the_teacher_and_differ(pyramids):
    found = weights(built(), *pyramids)
    torch.testing.assert_close(found.sum(2), torch.ones(3, 2))
    assert (found > 0).all()
    assert (found[0] != found[1]).all()
    assert (found[:, 0] != found[:, 1]).all()


def test_a_high_temperature_makes_all_pairs_equal(flat):
    found = weights(built(soft=1e6), *flat)
    torch.testing.assert_close(found, torch.full((3, 2, 3), 1 / 3))
    loss = built(soft=1e6, plain=True)
    mean = sum(F.mse_loss(s, t) for s in flat[0] for t in flat[1]) / 3
    torch.testing.assert_close(loss(*flat), mean / 2)


def test_one_layer_of_the_teacher_is_plain_imitation(flat):
    student, teacher = flat[0][:1], flat[1][:1]
    loss = built(1, 1, loss_weight=3.0)
    assert (weights(loss, student, teacher) == 1).all()
    projected = loss.projectors[0][0](student[0])
    torch.testing.assert_close(
        loss(student, teacher), 3 * F.mse_loss(projected, teacher[0])
    )


def test_pairs_are_weighted_image_by_image(flat):
    student, teacher = flat
    loss = built(loss_weight=2.0)
    shares, total = weights(loss, student, teacher), 0.0
    for n in range(3):
        for i in range(2):
            for j in range(3):
                projected = loss.projectors[i][j](student[i])[n]
                error = F.mse_loss(projected, teacher[j][n])
                total = total + shares[n, i, j] * error
    torch.testing.assert_close(loss(student, teacher), 2 * total / (3 * 2))


def test_order_of_the_layers_of_the_teacher_does_not_matter(flat):
    student, teacher = flat
    loss, order = built(), (2, 0, 1)
    before = loss(student, teacher)
    shares = weights(loss, student, teacher)
    loss.keys = nn.ModuleList(loss.keys[j] for j in order)
    loss.projectors = nn.ModuleList(
        nn.ModuleList(row[j] for j in order) for row in loss.projectors
    )
    turned = [teacher[j] for j in order]
    torch.testing.assert_close(loss(student, turned), before)
    torch.testing.assert_close(
        weights(loss, student, turned), shares[..., order]
    )


def test_every_pair_is_compared(flat):
    student, teacher = flat
    loss = built()
    before = loss(student, teacher)
    for row in loss.projectors:
        for project in row:
            with torch.no_grad():
                project[-1].bias += 1
            assert (loss(student, teacher) - before).abs() > 1e-3
            with torch.no_grad():
                project[-1].bias -= 1


def test_a_projected_student_that_is_all_targets_costs_nothing(flat):
    (student, _), _ = flat
    loss = built(1, 3, plain=True)
    assert loss([student], [student] * 3) == 0
    assert loss([student], [student, student, student + 1]) > 0.1


def test_of_a_pair_the_larger_map_is_pooled(pyramids):
    (fine, coarse), _ = pyramids
    pooled = F.avg_pool2d(fine, 2)
    loss = built(1, 1, plain=True)
    expected = F.mse_loss(pooled, coarse)
    torch.testing.assert_close(loss([fine], [coarse]), expected)
    torch.testing.assert_close(loss([coarse], [fine]), expected)


def test_only_cells_of_the_image_count(flat):
    student, teacher = flat
    loss = built(1, 1, plain=True)
    squares = (student[0] - teacher[0]).square()
    inside = squares[1, :, :2, :3]
    expected = (squares[0].mean() + inside.mean() + squares[2].mean()) / 3
    found = loss(student[:1], teacher[:1], padded())
    torch.testing.assert_close(found, expected)
    loss.keep_padding = True
    found = loss(student[:1], teacher[:1], padded())
    torch.testing.assert_close(found, squares.mean())


def test_the_border_of_either_side_counts_at_no_size(pyramids):
    loss, gt = built(), padded()
    before = loss(*pyramids, gt)
    for side in (0, 1):
        changed = [[one.clone() for one in levels] for levels in pyramids]
        for one in changed[side]:
            one[1, :, one.shape[2] // 2 :] += 5
        torch.testing.assert_close(loss(*changed, gt), before)
        assert (loss(*changed) - loss(*pyramids)).abs() > 1e-3


def test_weights_learn_and_teach(flat):
    """Queries, keys and, through them, the student get a gradient."""
    student = [one.clone().requires_grad_() for one in flat[0]]
    loss = built()
    found = weights(loss, student, flat[1])
    found[..., 0].sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in student)
    embeddings = [*loss.queries.parameters(), *loss.keys.parameters()]
    assert all(one.grad is not None for one in embeddings)
    assert sum(one.grad.abs().sum() for one in embeddings) > 0


@pytest.mark.parametrize('images', [1, 2, 3])
def test_parts_of_an_image_need_no_batch(flat, images):
    found = built()(*([one[:images] for one in side] for side in flat))
    single = [
        built()(*([one[n : n + 1] for one in side] for side in flat))
        for n in range(images)
    ]
    torch.testing.assert_close(found, sum(single) / images)


def test_the_last_batch_costs_nothing_and_keeps_the_graph(flat):
    loss = built(relation='batch', batch_size=4, embed_factor=2)
    student = [one.clone().requires_grad_() for one in flat[0]]
    value = loss(student, flat[1])
    value.backward()
    assert value == 0
    grads = [one.grad for one in [*student, *loss.parameters()]]
    assert all((one == 0).all() for one in grads)
    loss = built(relation='batch', batch_size=3, embed_factor=2)
    assert loss(*flat) > 0
    loss = built(relation='batch', batch_size=2, embed_factor=2)
    with pytest.raises(ValueError, match=r'Set batch_size=3, or use rel'):
        loss(*flat)


def test_pairs_far_apart_in_stride_have_no_weight(pyramids):
    student, teacher = pyramids
    loss = built(max_stride_ratio=2)
    found = weights(loss, student, teacher)
    torch.testing.assert_close(found.sum(2), torch.ones(3, 2))
    # Sizes 8 and 4 of the student, 8, 4 and 2 of the teacher.
    assert (found[:, 0, 2] == 0).all()
    assert (found[:, 0, :2] > 0).all()
    assert (found[:, 1] > 0).all()
    free = weights(built(), student, teacher)[:, 0, :2]
    torch.testing.assert_close(
        found[:, 0, :2], free / free.sum(1, keepdim=True)
    )
    before = loss(student, teacher)
    with torch.no_grad():
        loss.projectors[0][2][-1].bias += 1
    assert loss(student, teacher) == before
    before.backward()
    assert all(one.grad is not None for one in loss.parameters())
    with pytest.raises(ValueError, match="student's layer 0. Raise it"):
        built(2, 1, max_stride_ratio=2)(student, teacher[2:])


def test_half_precision_is_not_used_under_autocast(pyramids):
    loss = built()
    plain = loss(*pyramids)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(*pyramids), plain)
    loss = built(relation='batch', batch_size=3, embed_factor=2)
    plain = loss(*pyramids)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(*pyramids), plain)


def test_layers_that_it_was_not_built_for_are_named(flat):
    student, teacher = flat
    with pytest.raises(ValueError, match='2 layers of the student, got 1'):
        built()(student[:1], teacher)
    with pytest.raises(ValueError, match='Give teacher_channels one entry'):
        built()(student, teacher[:2])
    with pytest.raises(ValueError, match='Set its channels to 3'):
        built()(student, [one[:, :3] for one in teacher])
    with pytest.raises(ValueError, match='Set its channels to 3'):
        built()([one[:, :3] for one in student], teacher)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(relation='image'), "no relation 'image'"),
        (dict(relation='batch'), 'set batch_size to those of one device'),
        (dict(relation='batch', batch_size=3), 'Raise batch_size=3'),
        (dict(grid=1), 'Raise grid=1'),
        (dict(grid=0), 'grid > 0'),
        (dict(soft=0.0), 'soft > 0'),
        (dict(embed_factor=0), 'embed_factor > 0'),
        (dict(mid_channels=0), 'mid_channels > 0'),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SemCKDLoss([4], [4], **settings)


def test_as_many_numbers_as_the_factor_are_enough():
    loss = SemCKDLoss([4], [4], relation='batch', batch_size=4)
    assert loss.queries[0][2].weight.shape == (1, 2)

import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.losses.alp import ALPLoss, attention_weights, bucket_of
from mmkd.structures import GroundTruth


@pytest.fixture
def pyramids():
    """Two levels of a student, three of a teacher."""
    torch.manual_seed(0)
    sizes = (8, 4), (8, 4, 2)
    return [
        [torch.randn(2, 3, cells, cells).double() for cells in levels]
        for levels in sizes
    ]


@pytest.fixture
def flat():
    """Levels of one size."""
    torch.manual_seed(0)
    maps = torch.randn(5, 2, 3, 4, 4).double().unbind()
    return maps[:2], maps[2:]


def padded():
    return GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=(64, 64),
        image_shapes=[(64, 64), (32, 48)],
    )


def pooled(levels):
    return [one.mean((2, 3)) for one in levels]


def test_two_levels_and_three_layers_by_hand():
    """Vectors of two numbers, one image; e with the root of d = 2."""
    root = math.sqrt(2)
    student = [[1.0, 0.0], [1.0, 1.0]]
    teacher = [[root, 0.0], [0.0, 3.0], [0.0, 0.0]]
    # Products of the first level: root, 0, 0; over root: 1, 0, 0.
    # Of the second: root, 3, 0; over root: 1, 3 / root, 0.
    total = 0.0
    for vector, scores in zip(student, [(1, 0, 0), (1, 3 / root, 0)]):
        powers = [math.exp(one) for one in scores]
        shares = [one / sum(powers) for one in powers]
        mixed = [
            sum(share * layer[c] for share, layer in zip(shares, teacher))
            for c in range(2)
        ]
        total += sum((a - b) ** 2 for a, b in zip(vector, mixed)) / 2
    maps = [
        [torch.tensor(one).view(1, 2, 1, 1) for one in side]
        for side in (student, teacher)
    ]
    for compare in ('map', 'vector'):
        value = ALPLoss(compare=compare, loss_weight=6.0)(*maps)
        assert value.item() == pytest.approx(6 * total / 2, rel=1e-6)


def test_weights_are_above_zero_and_sum_to_one(pyramids):
    for attention in ('image', 'cell'):
        loss = ALPLoss(attention=attention)
        one = pyramids[0][1]
        teacher = [F.interpolate(x, (4, 4)) for x in pyramids[1]]
        ones = torch.ones(2, 1, 4, 4)
        weights = loss.weights(one, ones, [(x, ones) for x in teacher])
        assert weights.shape[-1] == 3
        assert (weights > 0).all()
        torch.testing.assert_close(
            weights.sum(-1), torch.ones(weights.shape[:-1]).double()
        )


def test_weights_depend_on_the_image_and_on_both_sides(pyramids):
    student, teacher = (torch.stack(pooled(one), 1) for one in pyramids)
    weights = attention_weights(student[:, 0], teacher)
    assert (weights[0] != weights[1]).all()
    assert (weights != attention_weights(student[:, 1], teacher)).all()
    assert (weights != attention_weights(student[:, 0], 2 * teacher)).any()


def test_a_scale_of_the_products_can_be_left_out(pyramids):
    student, teacher = (torch.stack(pooled(one), 1) for one in pyramids)
    root = math.sqrt(3)
    torch.testing.assert_close(
        attention_weights(student[:, 0], teacher, None),
        attention_weights(root * student[:, 0], teacher),
    )
    plain, scaled = ALPLoss(scale=None), ALPLoss()
    assert plain(*pyramids) != scaled(*pyramids)


def test_order_of_the_layers_of_the_teacher_does_not_matter(pyramids):
    student, teacher = pyramids
    for settings in (
        dict(),
        dict(compare='vector'),
        dict(attention='cell'),
    ):
        loss = ALPLoss(**settings)
        torch.testing.assert_close(
            loss(student, [teacher[index] for index in (2, 0, 1)]),
            loss(student, teacher),
        )
    vectors = torch.stack(pooled(teacher), 1)
    query = pooled(student)[0]
    torch.testing.assert_close(
        attention_weights(query, vectors[:, [2, 0, 1]]),
        attention_weights(query, vectors)[:, [2, 0, 1]],
    )


@pytest.mark.parametrize('attention', ['image', 'cell'])
def test_one_layer_of_the_teacher_is_plain_imitation(flat, attention):
    (student, _), (teacher, *_) = flat
    loss = ALPLoss(attention=attention, loss_weight=2.0)
    torch.testing.assert_close(
        loss([student], [teacher]), 2 * F.mse_loss(student, teacher)
    )


@pytest.mark.parametrize('attention', ['image', 'cell'])
def test_a_mixture_of_equal_layers_is_that_layer(flat, attention):
    (student, other), (teacher, *_) = flat
    loss = ALPLoss(attention=attention)
    one = loss([student, other], [teacher])
    torch.testing.assert_close(loss([student, other], [teacher] * 3), one)
    assert loss([teacher], [teacher] * 4) < 1e-12


@pytest.mark.parametrize('attention', ['image', 'cell'])
def test_maps_are_mixed_as_in_a_literal_loop(flat, attention):
    student, teacher = flat
    total = 0.0
    for one in student:
        for n in range(2):
            for y in range(4):
                for x in range(4):
                    at = (n, slice(None), y, x)
                    pick = at if attention == 'cell' else n
                    scores = [
                        (
                            one[pick] @ k[pick]
                            if attention == 'cell'
                            else one[n].mean((1, 2)) @ k[n].mean((1, 2))
                        ).item()
                        / math.sqrt(3)
                        for k in teacher
                    ]
                    powers = [math.exp(score) for score in scores]
                    mixed = sum(
                        power / sum(powers) * k[at]
                        for power, k in zip(powers, teacher)
                    )
                    total += (one[at] - mixed).square().mean().item()
    value = ALPLoss(attention=attention, loss_weight=1.0)(student, teacher)
    assert value.item() == pytest.approx(total / 64, rel=1e-9)


def test_no_layer_of_the_teacher_is_left_out(pyramids):
    student, teacher = pyramids
    for settings in (dict(), dict(compare='vector'), dict(attention='cell')):
        loss = ALPLoss(**settings)
        before = loss(student, teacher)
        for index in range(3):
            changed = list(teacher)
            changed[index] = changed[index] + 0.5
            assert (loss(student, changed) - before).abs() > 1e-3


def test_weights_carry_a_gradient_to_the_student():
    """With a mixture held fixed the gradient would be another."""
    torch.manual_seed(0)
    student = torch.randn(1, 4, 1, 1).double().requires_grad_()
    teacher = torch.randn(3, 1, 4, 1, 1).double().unbind()
    loss = ALPLoss(loss_weight=1.0)
    (found,) = torch.autograd.grad(loss([student], teacher), student)
    ones = torch.ones(1, 1, 1, 1)
    weights = loss.weights(student, ones, [(k, ones) for k in teacher])
    mixed = (weights[0, :, None, None, None] * torch.cat(teacher)).sum(0)
    fixed = 2 * (student[0] - mixed).detach() / 4
    assert (found[0] - fixed).abs().max() > 1e-2
    assert torch.autograd.gradcheck(lambda s: loss([s], teacher), student)


def test_vectors_are_means_and_need_no_common_size(pyramids):
    maps = [
        [one.mean((2, 3), keepdim=True) for one in side] for side in pyramids
    ]
    loss = ALPLoss(compare='vector')
    torch.testing.assert_close(loss(*pyramids), loss(*maps))
    assert (ALPLoss()(*pyramids) - loss(*pyramids)).abs() > 1e-3


def test_levels_are_resized_to_the_students():
    """Smaller ones of equal blocks come back as the blocks they are of."""
    torch.manual_seed(0)
    coarse = torch.randn(2, 3, 4, 4)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    loss = ALPLoss()
    assert loss([coarse], [fine]) < 1e-12
    flat = torch.randn(2, 3, 1, 1).expand(2, 3, 2, 2)
    assert loss([flat.repeat(1, 1, 4, 4)], [flat]) < 1e-10


@pytest.mark.parametrize('compare', ['map', 'vector'])
def test_an_image_counts_like_its_cells_alone(flat, compare):
    loss = ALPLoss(compare=compare)
    inside = [[one[1:, :, :2, :3] for one in side] for side in flat]
    first = [[one[:1] for one in side] for side in flat]
    expected = (loss(*first) + loss(*inside)) / 2
    torch.testing.assert_close(loss(*flat, padded()), expected)
    loss.keep_padding = True
    torch.testing.assert_close(loss(*flat, padded()), loss(*flat))


def test_buckets_by_hand():
    def buckets(students, teachers, bucket):
        return [
            [*range(teachers)[bucket_of(j, students, teachers, bucket)]]
            for j in range(students)
        ]

    assert buckets(2, 3, None) == [[0, 1, 2], [0, 1, 2]]
    assert buckets(2, 5, 'no') == [[0, 1], [2, 3, 4]]
    assert buckets(3, 6, 'no') == [[0, 1], [2, 3], [4, 5]]
    assert buckets(3, 6, 'po') == [[0, 1, 2], [1, 2, 3, 4], [3, 4, 5]]
    assert buckets(4, 2, 'no') == [[0], [0], [1], [1]]


def test_a_level_hears_its_bucket_alone(pyramids):
    student, teacher = pyramids
    loss = ALPLoss(bucket='no')
    # The first level looks at layer 0, the second at layers 1 and 2.
    parts = loss(student[:1], teacher[:1]) + loss(student[1:], teacher[1:])
    torch.testing.assert_close(loss(student, teacher), parts / 2)


def test_tokens_are_the_map_that_they_are_of(flat):
    student, teacher = flat
    tokens = [one.flatten(2).transpose(1, 2) for one in teacher]
    loss = ALPLoss(attention='cell')
    torch.testing.assert_close(
        loss(student, tokens, padded()), loss(student, teacher, padded())
    )


def test_half_precision_is_not_used_under_autocast(flat):
    flat = [[one.float() for one in side] for side in flat]
    for attention in ('image', 'cell'):
        loss = ALPLoss(attention=attention)
        plain = loss(*flat)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(loss(*flat), plain)


def test_errors_say_what_to_type(flat):
    student, teacher = flat
    loss = ALPLoss()
    fix = r"type='mmkd.ConvAdapt', in_channels=\[2, 2\], out_channels=3"
    with pytest.raises(ValueError, match=fix):
        loss([one[:, :2] for one in student], teacher)
    with pytest.raises(ValueError, match="teacher_tap='neck'"):
        loss(student, [teacher[0], teacher[1][:, :2]])
    with pytest.raises(ValueError, match='batches differ'):
        loss(student, [one[:1] for one in teacher])
    with pytest.raises(ValueError, match='got 2 of the student and 0 of'):
        loss(student, [])
    with pytest.raises(ValueError, match='0 of the student'):
        loss([], teacher)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(compare='token'), "no compare 'token'"),
        (dict(attention='query'), "no attention 'query'"),
        (dict(bucket='yes'), "no bucket='yes'. Use one of None, 'no', 'po'"),
        (dict(scale='d'), "no scale='d'"),
        (dict(compare='vector', attention='cell'), "Use attention='image'"),
    ],
)
def test_settings_that_are_unknown_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ALPLoss(**settings)

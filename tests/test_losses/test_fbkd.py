import pytest
import torch

from mmkd.losses.fbkd import FBKDLoss, attention_mask, distance, non_local
from mmkd.ops.attention import channel_attention, spatial_attention


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 4, 6, 8).unbind()


@pytest.fixture
def loss():
    """A loss whose adapters hand their input through."""
    loss = FBKDLoss(
        4,
        feature_weight=2.0,
        attention_weight=3.0,
        relation_weight=5.0,
        loss_weight=0.5,
    )
    torch.nn.init.dirac_(loss.adapt_feature.weight)
    torch.nn.init.dirac_(loss.adapt_spatial.weight)
    torch.nn.init.dirac_(loss.adapt_relation.weight)
    torch.nn.init.eye_(loss.adapt_channel.weight)
    for name, one in loss.named_parameters():
        if name.startswith('adapt') and name.endswith('bias'):
            torch.nn.init.zeros_(one)
    return loss


def test_each_part_is_its_formula(loss, maps):
    student, teacher = maps
    mask = (spatial_attention(student) + spatial_attention(teacher)) / 2
    mask = mask * (channel_attention(student) + channel_attention(teacher)) / 2
    for name, one in loss.named_parameters():
        if name.startswith('adapt'):  # it is the student that is adapted
            one.data.mul_(2)
    gap = 2 * student - teacher
    expected = dict(
        feature=0.5 * 2 * (mask * gap**2).sum().sqrt(),
        channel=0.5 * 3 * gap.mean((2, 3)).square().sum().sqrt(),
        spatial=0.5 * 3 * gap.mean(1).square().sum().sqrt(),
        relation=0.5 * 5 * gap.square().sum().sqrt(),  # blocks: identity
    )
    parts = loss(student, teacher)
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)


def test_equal_maps_cost_nothing_and_have_a_finite_gradient(loss, maps):
    student = maps[0].requires_grad_()
    parts = loss(student, student.detach())
    assert all(part == 0 for part in parts.values())
    sum(parts.values()).backward()
    assert student.grad.isfinite().all()


def test_distance_is_that_of_pythagoras():
    student = torch.tensor([[3.0, 4.0]])
    teacher = torch.zeros(1, 2)
    assert distance(student, teacher) == 5
    mask = torch.tensor([[4.0, 0.0]])
    assert distance(student, teacher, mask) == 6


def test_the_mask_has_mean_one_and_no_gradient(maps):
    student = maps[0].requires_grad_()
    mask = attention_mask(student, maps[1])
    assert not mask.requires_grad
    torch.testing.assert_close(mask.mean((1, 2, 3)), torch.ones(2))


def test_the_mask_shares_attention_between_both_models(maps):
    student, teacher = maps
    torch.testing.assert_close(
        attention_mask(student, teacher), attention_mask(teacher, student)
    )


def test_strong_channels_and_locations_count_more(loss):
    teacher = torch.zeros(1, 4, 6, 8)
    teacher[:, 1] += 4
    teacher[:, :, 2, 3] += 40
    weak, channel, location = torch.zeros(3, 1, 4, 6, 8).unbind()
    weak[0, 0, 0, 0] = channel[0, 1, 0, 0] = location[0, 0, 2, 3] = 0.1
    weak, channel, location = (
        loss(teacher + one, teacher)['feature']
        for one in (weak, channel, location)
    )
    assert channel > 1.5 * weak
    assert location > 1.5 * weak


def test_the_relation_equals_a_literal_loop(maps):
    feature = maps[0]
    block = non_local(4, reduction=2, pool_stride=2).eval()
    torch.nn.init.uniform_(block.conv_out.norm.weight)
    torch.nn.init.uniform_(block.conv_out.norm.running_mean)
    for conv in (block.g[0], block.phi[0], block.theta):
        torch.nn.init.normal_(conv.conv.weight)
        torch.nn.init.normal_(conv.conv.bias)
    result = block(feature)
    with torch.no_grad():
        theta = block.theta(feature)
        phi, g = (
            torch.stack(
                [
                    embedded[:, :, y : y + 2, x : x + 2].amax((2, 3))
                    for y in range(0, 6, 2)
                    for x in range(0, 8, 2)
                ],
                2,
            )
            for embedded in (block.phi[0](feature), block.g[0](feature))
        )
        said = torch.zeros(2, 2, 6, 8)
        for n in range(2):
            for y in range(6):
                for x in range(8):
                    for j in range(12):
                        affinity = theta[n, :, y, x] @ phi[n, :, j] / 12
                        said[n, :, y, x] += affinity * g[n, :, j]
        expected = feature + block.conv_out(said)
    torch.testing.assert_close(result, expected)


def test_the_relation_learns_on_both_sides(loss, maps):
    for block in (loss.student_relation, loss.teacher_relation):
        torch.nn.init.ones_(block.conv_out.norm.weight)
    sum(loss(*maps).values()).backward()
    for name, one in loss.named_parameters():
        assert one.grad.abs().sum() > 0, name


def test_a_fresh_block_is_the_identity_and_its_scale_learns(maps):
    loss = FBKDLoss(4)
    torch.testing.assert_close(loss.student_relation(maps[0]), maps[0])
    loss(*maps)['relation'].backward()
    for block in (loss.student_relation, loss.teacher_relation):
        assert block.conv_out.norm.weight.grad.abs().sum() > 0


def test_gradient_is_that_of_finite_differences(loss, maps):
    student, teacher = (one[:, :, :3, :4].double() for one in maps)
    loss = loss.double().eval()
    loss.student_relation.conv_out.norm.weight.data.fill_(1)

    def value(student):
        parts = loss(student, teacher)
        return parts['channel'], parts['spatial'], parts['relation']

    assert torch.autograd.gradcheck(value, student.requires_grad_())


def test_the_feature_gradient_treats_the_mask_as_constant(loss, maps):
    student, teacher = (one.double() for one in maps)
    student.requires_grad_()
    mask = attention_mask(student, teacher)
    (expected,) = torch.autograd.grad(
        (mask * (student - teacher) ** 2).sum().sqrt(), student
    )
    (got,) = torch.autograd.grad(
        loss.double()(student, teacher)['feature'], student
    )
    torch.testing.assert_close(got, expected)  # 0.5 * 2.0 of the fixture


def test_each_level_takes_its_own_stride_and_reduction():
    settings = dict(pool_stride=(8, 4, 2), reduction=(4, 4, 2))
    built = [FBKDLoss(16, **settings, level_index=k) for k in range(3)]
    strides = [one.student_relation.phi[1].kernel_size for one in built]
    inner = [one.teacher_relation.inter_channels for one in built]
    assert strides == [8, 4, 2]
    assert inner == [4, 4, 8]
    with pytest.raises(ValueError, match='pool_stride for level 3'):
        FBKDLoss(16, **settings, level_index=3)


def test_a_map_smaller_than_the_stride_is_pooled_to_one_cell():
    student, teacher = torch.randn(2, 2, 4, 1, 3).unbind()
    parts = FBKDLoss(4, pool_stride=8)(student, teacher)
    assert all(part.isfinite() for part in parts.values())


def test_half_precision_is_not_used_under_autocast(loss, maps):
    plain = loss(*maps)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(loss(*maps), plain)


def test_other_channels_than_built_for_are_named(maps):
    with pytest.raises(ValueError, match='Set its channels to 4'):
        FBKDLoss(8)(*maps)

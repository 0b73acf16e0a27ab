import pytest
import torch

from mmkd.losses.mgd import MGDLoss, random_mask


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 3, 6, 5).unbind()


def identity(loss):
    """Make the generation hand its input through, positive or negative."""
    channels = loss.channels
    first, _, second = loss.generation
    loss.generation[1] = torch.nn.Identity()
    for conv in (first, second):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    assert first.weight.shape == (channels, channels, 3, 3)
    return loss


def test_without_a_mask_and_with_identity_it_is_the_sum_over_images(maps):
    student, teacher = maps
    loss = identity(MGDLoss(3, loss_weight=0.5, mask_ratio=0.0))
    expected = 0.5 * (student - teacher).square().sum() / 2
    torch.testing.assert_close(loss(student, teacher), expected)


def test_with_everything_masked_out_the_student_does_not_matter(maps):
    student, teacher = maps
    student.requires_grad_()
    loss = identity(MGDLoss(3, loss_weight=1.0, mask_ratio=1.0))
    value = loss(student, teacher)
    torch.testing.assert_close(value, teacher.square().sum() / 2)
    value.backward()
    assert (student.grad == 0).all()


def test_the_ratio_is_the_share_that_is_masked_out():
    torch.manual_seed(0)
    mask = random_mask(torch.empty(4, 2, 200, 200), mask_ratio=0.65)
    assert mask.shape == (4, 1, 200, 200)
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask.mean().item() == pytest.approx(0.35, abs=5e-3)


def test_a_location_is_hidden_in_all_channels_of_its_image_alone(maps):
    student, teacher = torch.ones(2, 2, 3, 6, 5).unbind()
    loss = identity(MGDLoss(3, mask_ratio=0.5))
    seen = []
    loss.generation.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0])
    )
    loss(student, teacher)
    (masked,) = seen
    assert (masked == masked[:, :1]).all()
    assert (masked[0] != masked[1]).any()


def test_generation_is_conv_relu_conv(maps):
    student, teacher = maps
    loss = MGDLoss(3, loss_weight=1.0, mask_ratio=0.0)
    first, _, second = loss.generation
    hidden = torch.conv2d(student, first.weight, first.bias, padding=1)
    made = torch.conv2d(
        hidden.clamp(min=0), second.weight, second.bias, padding=1
    )
    torch.testing.assert_close(
        loss(student, teacher), (made - teacher).square().sum() / 2
    )


def test_the_mask_follows_the_seed_and_changes_from_step_to_step(maps):
    loss = MGDLoss(3)
    torch.manual_seed(1)
    first, second = loss(*maps), loss(*maps)
    torch.manual_seed(1)
    assert loss(*maps) == first
    assert first != second


def test_the_mask_is_drawn_in_evaluation_too(maps):
    loss = MGDLoss(3)
    torch.manual_seed(1)
    training = loss.train()(*maps)
    torch.manual_seed(1)
    assert loss.eval()(*maps) == training


def test_gradient_is_that_of_finite_differences(maps):
    student, teacher = (one.double() for one in maps)
    loss = MGDLoss(3, loss_weight=0.1).double()

    def value(student):
        torch.manual_seed(1)
        return loss(student, teacher)

    assert torch.autograd.gradcheck(value, student.requires_grad_())


def test_the_generation_learns(maps):
    loss = MGDLoss(3)
    loss(*maps).backward()
    assert all(one.grad.abs().sum() > 0 for one in loss.parameters())


def test_an_impossible_ratio_is_refused():
    with pytest.raises(ValueError, match='mask_ratio between 0 and 1'):
        MGDLoss(3, mask_ratio=65)


def test_other_channels_than_built_for_are_named(maps):
    with pytest.raises(ValueError, match='Set its channels to 3'):
        MGDLoss(4)(*maps)

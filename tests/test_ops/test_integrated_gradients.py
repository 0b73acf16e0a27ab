import pytest
import torch
from torch import nn

from mmkd.ops.integrated_gradients import blurred, integrated_gradients

W = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
X0 = torch.tensor([[0.0, 1.0], [-1.0, 4.0]])


def curved(seed=0):
    """A smooth function of an image that is nowhere linear."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 1)
    ).double()
    return lambda images: net(images).sigmoid()[:, 0]


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 6).double().unbind()


@pytest.mark.parametrize('steps', [1, 2, 7])
def test_of_a_linear_function_every_number_of_steps_is_exact(steps):
    found = integrated_gradients(
        lambda x: (W * x).sum((1, 2)) + 5, X, X0, steps
    )
    torch.testing.assert_close(found, W * (X - X0))


def test_a_cube_by_hand():
    """At the middle 3/4; at a quarter and three quarters 15/16."""
    one, zero = torch.ones(1), torch.zeros(1)
    for steps, wanted in ((1, 3 / 4), (2, 15 / 16)):
        found = integrated_gradients(lambda x: x[:, 0] ** 3, one, zero, steps)
        assert found.item() == pytest.approx(wanted)


def test_it_is_complete_up_to_the_error_of_the_steps(images):
    function, (image, baseline) = curved(), images
    whole = (function(image[None]) - function(baseline[None])).item()
    errors = [
        abs(
            integrated_gradients(function, image, baseline, steps).sum().item()
            - whole
        )
        for steps in (8, 32)
    ]
    # The midpoint rule: a sixteenth for four times the steps.
    assert errors[1] == pytest.approx(errors[0] / 16, rel=0.2)
    assert errors[1] < 1e-3 * abs(whole)


def test_plain_gradients_are_not_complete(images):
    function, (image, baseline) = curved(), images
    whole = (function(image[None]) - function(baseline[None])).item()
    leaf = image.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf[None]).sum(), leaf)
    plain = ((image - baseline) * slope).sum().item()
    found = integrated_gradients(function, image, baseline).sum().item()
    assert abs(plain - whole) > 100 * abs(found - whole)


def test_what_the_function_ignores_gets_nothing(images):
    image, baseline = images
    found = integrated_gradients(
        lambda x: x[:, 0].flatten(1).prod(1), image, baseline
    )
    assert found[0].abs().min() > 0
    assert not found[1:].any()


def test_how_many_points_are_seen_at_once_does_not_matter(images):
    function = curved()
    found = [
        integrated_gradients(function, *images, steps=7, batch=batch)
        for batch in (1, 3, 100)
    ]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_at_the_baseline_there_is_nothing_to_explain(images):
    assert not integrated_gradients(curved(), images[0], images[0]).any()


def test_it_leaves_no_graph_and_works_without_gradients(images):
    image = images[0].requires_grad_()
    with torch.no_grad():
        found = integrated_gradients(curved(), image, images[1])
    assert not found.requires_grad
    assert image.grad is None


@pytest.mark.parametrize(
    'wrong', [dict(steps=0), dict(batch=0), dict(baseline=X[:1])]
)
def test_numbers_below_one_and_other_shapes_are_refused(wrong):
    settings = dict(image=X, baseline=X0, steps=2, batch=2) | wrong
    with pytest.raises(ValueError, match='steps=32, batch=4'):
        integrated_gradients(lambda x: x.sum((1, 2)), **settings)


def test_blurring_takes_details_and_leaves_the_whole():
    torch.manual_seed(0)
    image = torch.randn(3, 48, 64)
    image[0] += 7
    found = blurred(image)
    assert found.shape == image.shape
    torch.testing.assert_close(
        found.mean((1, 2)), image.mean((1, 2)), atol=0.05, rtol=0
    )
    assert (found.std((1, 2)) < 0.2 * image.std((1, 2))).all()


def test_a_point_becomes_a_gaussian_of_a_sixteenth_in_both_directions():
    image = torch.zeros(1, 64, 96)
    image[0, 32, 48] = 1
    found = blurred(image)[0]
    assert found.sum().item() == pytest.approx(1, abs=1e-4)
    rows, columns = torch.arange(64) - 32.0, torch.arange(96) - 48.0
    for weight, place in ((found.sum(1), rows), (found.sum(0), columns)):
        deviation = (weight * place**2).sum().sqrt().item()
        assert deviation == pytest.approx(4, rel=0.03)

import pytest
import torch

from mmkd.ops.virtual import meta_gradient, virtual_step

LR = 0.1


def test_a_step_is_one_of_plain_descent():
    x = torch.randn(4, requires_grad=True)
    y = torch.randn(3, requires_grad=True)
    moved = virtual_step(dict(x=x, y=y), x.exp().sum(), LR)
    torch.testing.assert_close(moved['x'], x - LR * x.exp())
    assert torch.equal(moved['y'], y)


def test_steps_leave_parameters_and_gradients_as_they_were():
    w = torch.tensor(0.5, requires_grad=True)
    x = torch.randn(4, requires_grad=True)
    before = x.detach().clone()
    meta_gradient(
        [w],
        dict(x=x),
        lambda at: w * at['x'].square().sum(),
        lambda at: at['x'].exp().sum(),
        LR,
    )
    assert torch.equal(x, before)
    assert x.grad is None
    assert w.grad is None


@pytest.mark.parametrize('steps', [1, 2, 3])
def test_a_parabola_by_hand(steps):
    """x goes down w (x - 1)^2, then down (x - 3)^2, which judges it."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    loss, (slope,) = meta_gradient(
        [w],
        dict(x=x),
        lambda at: w * (at['x'] - 1) ** 2,
        lambda at: (at['x'] - 3) ** 2,
        LR,
        steps,
    )
    rest = 1 - 2 * LR * 0.7
    end = (1 + 4 * rest**steps - 3) * (1 - 2 * LR)
    bend = 4 * steps * rest ** (steps - 1) * -2 * LR
    assert loss.item() == pytest.approx(end**2)
    assert slope.item() == pytest.approx(2 * end * (1 - 2 * LR) * bend)


def test_a_knob_that_changes_nothing_has_no_slope():
    w, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    x = torch.ones(2, requires_grad=True)
    _, slopes = meta_gradient(
        [w, other],
        dict(x=x),
        lambda at: (w * at['x'].square()).sum(),
        lambda at: at['x'].square().sum(),
        LR,
    )
    assert (slopes[0] != 0).all()
    assert torch.equal(slopes[1], torch.zeros(2))


def test_an_outer_loss_of_constants_has_no_slope():
    w = torch.ones(2, requires_grad=True)
    x = torch.ones(2, requires_grad=True)
    _, (slope,) = meta_gradient(
        [w],
        dict(x=x),
        lambda at: (w * at['x']).sum(),
        lambda at: 0 * at['x'].sum(),
        LR,
    )
    assert torch.equal(slope, torch.zeros(2))


# A linear student of two teachers --------------------------------------------


class Toy:
    """Teachers give targets of images, a net weighs them image by image."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        made = dict(dtype=torch.float64)
        self.images = torch.randn(32, 4, **made)
        self.images[:, 0] = 1
        self.truth = self.images @ torch.randn(4, 2, **made)
        good = self.truth + 0.01 * torch.randn(32, 2, **made)
        bad = torch.randn(32, 2, **made)
        self.taught = torch.stack([good, bad], 1)  # images, teachers, outputs
        self.student = dict(w=torch.randn(4, 2, **made, requires_grad=True))
        self.net = torch.zeros(4, 2, **made, requires_grad=True)

    def weights(self):
        return (self.images @ self.net).softmax(1)

    def inner(self, at):
        error = (self.images @ at['w'])[:, None] - self.taught
        return (self.weights() * error.square().sum(2)).sum(1).mean()

    def outer(self, at):
        return (self.images @ at['w'] - self.truth).square().sum(1).mean()

    def lesson(self):
        return meta_gradient(
            [self.net], self.student, self.inner, self.outer, LR
        )


def virtual_step_of(toy):
    with torch.enable_grad():
        moved = virtual_step(toy.student, toy.inner(toy.student), LR)
    return {key: one.detach().requires_grad_() for key, one in moved.items()}


def test_the_slope_is_that_of_finite_differences():
    toy = Toy()
    with torch.no_grad():
        toy.net.copy_(torch.randn(4, 2))
    _, (slope,) = toy.lesson()
    step = 1e-6
    for index in range(toy.net.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                toy.net.view(-1)[index] += sign * step
            ends.append(toy.lesson()[0])
            with torch.no_grad():
                toy.net.view(-1)[index] -= sign * step
        wanted = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(
            slope.view(-1)[index], wanted, rtol=1e-5, atol=1e-9
        )


def test_an_untrained_teacher_sinks_below_an_equal_share():
    toy = Toy()
    optimiser = torch.optim.Adam([toy.net], lr=0.05)
    torch.testing.assert_close(
        toy.weights(), torch.full((32, 2), 0.5, dtype=torch.float64)
    )
    shares = []
    for _ in range(60):
        _, (toy.net.grad,) = toy.lesson()
        optimiser.step()
        with torch.no_grad():  # the student learns from the loss as it is
            toy.student = virtual_step_of(toy)
        shares.append(toy.weights()[:, 1].mean().item())
    assert shares[-1] < 0.3
    assert shares[-1] < shares[20] < 0.5

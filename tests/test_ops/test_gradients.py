import torch

from mmkd.ops.gradients import gradient


def test_is_the_gradient_that_backward_would_give():
    x = torch.randn(2, 3, requires_grad=True)
    y = torch.randn(4, requires_grad=True)
    loss = (x.exp().sum() * y.square().sum()).log()
    found = gradient(loss, [x, y])
    loss.backward()  # the graph was kept
    torch.testing.assert_close(
        found, torch.cat([x.grad.flatten(), y.grad.flatten()])
    )


def test_half_precision_does_not_flush_small_gradients():
    x = torch.ones(1, dtype=torch.float16, requires_grad=True)
    loss = (x * 1.0).float().sum() * 2.0**-26
    plain = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert plain == 0
    assert gradient(loss, [x]) == 2.0**-26


def test_a_loss_beside_the_maps_has_none():
    x = torch.ones(1, requires_grad=True)
    y = torch.ones(1, requires_grad=True)
    assert gradient(y.sum(), [x]) is None
    assert gradient(torch.ones(()), [x]) is None


def test_no_gradient_is_left_in_the_maps():
    x = torch.ones(3, requires_grad=True)
    gradient(x.sum(), [x])
    assert x.grad is None

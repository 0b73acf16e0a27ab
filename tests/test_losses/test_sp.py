import pytest
import torch

from mmkd.losses.sp import SPLoss, sp_loss
from mmkd.structures import GroundTruth


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(2, 5, 4).unbind()


@pytest.fixture
def gt():
    boxes = torch.tensor(
        [[2.0, 2, 16, 16], [4, 20, 30, 29], [10, 2, 28, 20], [3, 3, 9, 12]]
    )
    return GroundTruth.from_boxes([boxes[:1], boxes[1:]], shape=(32, 32))


def test_two_samples_by_hand():
    # Orthogonal ones are like themselves alone; rows of equal ones are
    # (1, 1) / sqrt(2).
    orthogonal = torch.tensor([[2.0, 0], [0, 5]])
    equal = torch.tensor([[3.0, 3], [3, 3]])
    row = (1 - 0.5**0.5) ** 2 + 0.5
    torch.testing.assert_close(
        sp_loss(orthogonal, equal), torch.tensor(2 * row / 4)
    )


def test_equals_a_literal_loop(vectors):
    matrices = []
    for samples in (one.tolist() for one in vectors):
        gram = [
            [sum(p * q for p, q in zip(a, b)) for b in samples]
            for a in samples
        ]
        norms = [sum(v**2 for v in row) ** 0.5 for row in gram]
        matrices.append(
            [v / norm for row, norm in zip(gram, norms) for v in row]
        )
    expected = sum((s - t) ** 2 for s, t in zip(*matrices)) / 25
    assert sp_loss(*vectors).item() == pytest.approx(expected, rel=1e-5)


def test_scale_and_rotation_do_not_matter(vectors):
    student, teacher = vectors
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    turned = 3 * student @ rotation
    torch.testing.assert_close(
        sp_loss(turned, teacher), sp_loss(student, teacher)
    )
    assert sp_loss(turned, student) < 1e-10
    assert sp_loss(teacher, student) > 1e-3


def test_gradient_is_that_of_finite_differences(vectors):
    student, teacher = (one.double() for one in vectors)
    assert torch.autograd.gradcheck(
        lambda s: sp_loss(s, teacher), student.requires_grad_()
    )


@pytest.mark.parametrize('count', [0, 1])
def test_too_few_samples_cost_nothing_and_keep_the_graph(count):
    student = torch.zeros(count, 4, requires_grad=True)
    value = sp_loss(student, torch.ones(count, 4))
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


def test_an_empty_map_has_a_finite_gradient(vectors):
    student = torch.zeros(5, 4, requires_grad=True)
    sp_loss(student, vectors[1]).backward()
    assert student.grad.isfinite().all()


def test_a_rotation_of_the_channels_of_a_map_does_not_matter(gt):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 8, 8).unbind()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    turned = torch.einsum('ij,njhw->nihw', rotation, 2 * student)
    loss = SPLoss(loss_weight=1e3)
    plain = loss(student, teacher, gt)
    assert plain > 1
    torch.testing.assert_close(loss(turned, teacher, gt), plain)


def test_a_map_enters_as_the_means_over_its_boxes(gt):
    steps = torch.arange(8) * 4 + 2.0
    y, x = torch.meshgrid(steps, steps, indexing='ij')
    student = torch.stack([x, y]).expand(2, 2, 8, 8)
    teacher = torch.stack([x - y, y, x * 0]).expand(2, 3, 8, 8)
    x, y = (gt.boxes[:, :2] + gt.boxes[:, 2:]).T / 2
    expected = sp_loss(
        torch.stack([x, y], 1), torch.stack([x - y, y, x * 0], 1)
    )
    torch.testing.assert_close(
        SPLoss(loss_weight=7.0)(student, teacher, gt), 7 * expected
    )


def test_half_precision_is_not_used_under_autocast(gt):
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 4, 8, 8).unbind()
    plain = SPLoss()(*maps, gt)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(SPLoss()(*maps, gt), plain)


def test_no_value_is_read_on_the_host(gt):
    maps = torch.ones(2, 2, 4, 8, 8, device='meta').unbind()
    assert SPLoss()(*maps, gt).shape == ()

from types import SimpleNamespace

import pytest
import torch

from mmkd.terms.weights.score import ScoreWeight


def step(scores, side='teacher'):
    outputs = SimpleNamespace(at=lambda path: (scores, ['boxes']), size=None)
    return SimpleNamespace(
        images=torch.zeros(2, 3, 8, 8),
        student=outputs if side == 'student' else None,
        teacher=lambda name: outputs if name == 'big' else None,
    )


@pytest.mark.parametrize('side', ['teacher', 'student'])
def test_the_likeliest_class_of_any_anchor_counts(side):
    torch.manual_seed(0)
    scores = [torch.randn(2, 6, 4, 5), torch.randn(2, 6, 2, 3)]
    weight = ScoreWeight(side)
    weight.teacher = 'big'
    found = weight(step(scores, side))
    for one, other in zip(found, scores):
        assert one.shape == (2, 1, *other.shape[2:])
        for n, y, x in torch.cartesian_prod(
            *map(torch.arange, (2, *other.shape[2:]))
        ):
            best = max(torch.sigmoid(z).item() for z in other[n, :, y, x])
            assert one[n, 0, y, x].item() == pytest.approx(best)


def test_a_power_lets_unlikely_cells_count():
    scores = [torch.logit(torch.tensor([0.25, 0.01])).reshape(1, 1, 1, 2)]
    weight = ScoreWeight(power=0.5)
    weight.teacher = 'big'
    (found,) = weight(step(scores))
    torch.testing.assert_close(
        found.flatten(), torch.tensor([0.5, 0.1]), rtol=1e-4, atol=1e-6
    )


def test_it_is_no_path_for_gradients():
    scores = [torch.randn(1, 2, 2, 2, requires_grad=True)]
    weight = ScoreWeight('student')
    assert not weight(step(scores, 'student'))[0].requires_grad


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(side='techer'), "side 'techer'.*'teacher'"),
        (dict(power=0), 'power > 0'),
    ],
)
def test_what_is_wrong_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        ScoreWeight(**settings)


def test_a_softmax_over_background_is_refused():
    head = torch.nn.Module()
    head.use_sigmoid_cls = False
    detector = torch.nn.Module()
    detector.bbox_head = head
    teacher = SimpleNamespace(
        name='big', tap=lambda path: None, detector=detector
    )
    with pytest.raises(ValueError, match='softmax over classes'):
        ScoreWeight().bind(None, None, teacher)

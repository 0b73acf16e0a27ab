import heads
import pytest
import tiny
import torch
from mmengine.structures import InstanceData

from mmkd.pixels import Pixels
from mmkd.structures import Step
from mmkd.terms.decoding import decode
from mmkd.terms.showing import (
    changed,
    room,
    seen,
    student_shown,
    teacher_shown,
)

PIXELS = Pixels((100.0, 50, 0), (10.0, 20, 50), True, 0.0, 32)


def step_of(model, images, samples, **settings):
    return Step(_Outputs(model), images, samples, **settings)


class _Outputs:
    """A step's student, of which nothing was recorded."""

    size = None

    def __init__(self, detector):
        self.detector = detector


@pytest.fixture
def batch():
    return tiny.batch()  # the second image is 96 x 112 of 128 x 128


def test_pixels_may_go_to_black_and_to_white_and_the_border_nowhere(batch):
    images, samples = torch.zeros(2, 3, 128, 128), batch[1]
    images[0, 1] = -2.5  # 50 - 2.5 * 20 = 0
    lower, upper = room(step_of(None, images, samples), PIXELS)
    assert (lower[0, 0] == -100).all()
    assert (upper[0, 0] == 155).all()
    assert (lower[0, 1] == 0).all()
    assert (upper[0, 1] == 255).all()
    assert (upper[0, 2] == 255).all()
    inside = torch.zeros(128, 128, dtype=torch.bool)
    inside[:96, :112] = True
    for one in (-lower[1, 0], upper[1, 0]):
        assert torch.equal(one > 0, inside)


def test_a_pixel_beyond_the_range_is_not_pulled_into_it(batch):
    images = torch.full((2, 3, 128, 128), 100.0)
    lower, upper = room(step_of(None, images, batch[1]), PIXELS)
    assert (upper == 0).all()
    assert (lower <= 0).all()


def test_a_change_is_in_values_of_pixels():
    images = torch.randn(1, 3, 2, 2)
    found = changed(images, torch.full((1, 3, 2, 2), 100.0), PIXELS)
    wanted = torch.tensor([10.0, 5, 2])[:, None, None].expand(1, 3, 2, 2)
    torch.testing.assert_close(found - images, wanted)
    same = changed(images, torch.zeros(1, 3, 2, 2), PIXELS)
    assert torch.equal(same, images)


def test_the_student_looks_in_eval_mode_and_is_left_as_it_was(batch):
    model = tiny.build(tiny.retinanet()).train()
    model.neck.eval()
    modes = [one.training for one in model.modules()]
    before = {key: one.clone() for key, one in model.state_dict().items()}
    images, samples = batch
    with student_shown(step_of(model, images, samples), images, 'neck') as own:
        assert not any(one.training for one in model.modules())
        found = own.maps()
    assert [one.training for one in model.modules()] == modes
    for key, one in model.state_dict().items():
        assert torch.equal(one, before[key])
    with torch.no_grad():
        wanted = model.eval().extract_feat(images)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


def test_a_teacher_keeps_the_graph_and_remembers_nothing(batch):
    shown = []

    def shower(images, grad):
        shown.append(grad)
        return _Outputs('teacher')

    step = step_of(None, *batch, teachers=dict(big=shower))
    found = teacher_shown(step, 'big', batch[0], 'neck')
    # Outputs asked for without a graph are those that a teacher keeps.
    assert shown == [True]
    assert found.outputs.detector == 'teacher'
    assert found.size == (128, 128)


@pytest.mark.parametrize('kind', ['retinanet', 'gfl', 'fcos'])
def test_scores_and_boxes_are_read_anchor_by_anchor(kind, batch):
    model = tiny.build(getattr(heads, kind)()).eval()
    images, samples = batch
    step = step_of(model, images, samples)
    with torch.no_grad(), student_shown(step, images, 'bbox_head') as own:
        outputs = model.bbox_head(model.extract_feat(images))
        logits, probs, boxes = own.logits(), own.probs(), own.boxes()
    wanted = decode(model.bbox_head, outputs[1])
    for level, one in enumerate(logits):
        anchors = one.shape[2]
        for anchor in range(anchors):
            part = slice(anchor * tiny.CLASSES, (anchor + 1) * tiny.CLASSES)
            torch.testing.assert_close(
                one[:, :, anchor], outputs[0][level][:, part]
            )
        torch.testing.assert_close(probs[level], one.sigmoid())
        torch.testing.assert_close(boxes[level], wanted[level])


def test_probabilities_follow_the_heads_activation(batch):
    model = tiny.retinanet()
    model.bbox_head.loss_cls = dict(type='CrossEntropyLoss')
    model = tiny.build(model).eval()
    images, samples = batch
    step = step_of(model, images, samples)
    with torch.no_grad(), student_shown(step, images, 'bbox_head') as own:
        probs = own.probs()
    assert probs[0].shape[1] == tiny.CLASSES + 1
    torch.testing.assert_close(
        probs[0].sum(1), torch.ones_like(probs[0][:, 0])
    )


def test_cells_over_a_border_of_the_teachers_own_are_left_out(batch):
    images, samples = batch
    samples[0].gt_instances = InstanceData()

    class Wide:
        detector, size = None, (128, 160)

        def at(self, path):
            return (torch.zeros(2, 4, 16, 20),)

    (found,) = seen(step_of(None, images, samples), Wide(), 'neck').maps()
    assert found.shape[-2:] == (16, 16)

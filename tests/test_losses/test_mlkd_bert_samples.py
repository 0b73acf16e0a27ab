import math

import pytest
import torch

from mmkd.losses import mlkd_bert_samples
from mmkd.losses.mlkd_bert_samples import MLKDBertSampleLoss
from mmkd.ops.contrast import supervised_contrast
from mmkd.ops.regions import region_vectors
from mmkd.structures import GroundTruth


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.fixture
def maps():
    """Strides 8 and 16 of two images of 64 pixels."""
    return [
        [torch.randn(2, channels, cells, cells) for cells in (8, 4)]
        for channels in (4, 6)
    ]


@pytest.fixture
def gt():
    return ground_truth()


def ground_truth(counts=(2, 1), labels=(0, 1, 0)):
    boxes = torch.tensor([[2.0, 2, 22, 22], [8, 4, 60, 56], [10, 30, 30, 50]])
    cuts = counts[0], counts[0] + counts[1]
    labels = torch.tensor(labels)
    return GroundTruth.from_boxes(
        [boxes[: cuts[0]], boxes[cuts[0] : cuts[1]]],
        shape=(64, 64),
        labels=[labels[: cuts[0]], labels[cuts[0] : cuts[1]]],
    )


def build(**settings):
    return MLKDBertSampleLoss(
        **{
            'student_channels': 4,
            'teacher_channels': 6,
            'canonical_size': 40,
            **settings,
        }
    )


def samples(levels, gt):
    """20, 52 and 20 pixels: the second is read from stride 16."""
    finer, coarser = (region_vectors(one, gt) for one in levels)
    return torch.stack([finer[0], coarser[1], finer[2]])


def literal_ss(student, teacher):
    def rows(vectors):
        found = []
        for a in vectors:
            logits = [(a @ b).item() / math.sqrt(len(a)) for b in vectors]
            total = sum(map(math.exp, logits))
            found.append([math.exp(one) / total for one in logits])
        return found

    values = [
        sum(q * math.log(q / p) for p, q in zip(own, other))
        for own, other in zip(rows(student), rows(teacher))
    ]
    return sum(values) / len(values)


def test_similarities_of_samples_equal_a_literal_loop(maps, gt):
    found = build()(*maps, gt)['ss']
    expected = literal_ss(*(samples(one, gt) for one in maps))
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('temperature', [0.1, 0.5])
def test_the_contrast_is_over_the_vectors_of_both(maps, gt, temperature):
    loss = build(temperature=temperature)
    student, teacher = (samples(one, gt) for one in maps)
    both = torch.cat([student @ loss.projection.weight.T, teacher])
    expected = supervised_contrast(
        both, torch.tensor([0, 1, 0, 0, 1, 0]), temperature
    )
    torch.testing.assert_close(loss(*maps, gt)['sc'], expected)


def test_a_rotation_of_the_teacher_changes_no_similarity(maps, gt):
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    turned = [torch.einsum('nchw,cd->ndhw', one, rotation) for one in maps[1]]
    loss = build()
    before, after = (loss(maps[0], one, gt) for one in (maps[1], turned))
    torch.testing.assert_close(after['ss'], before['ss'])
    assert not torch.isclose(after['sc'], before['sc'])


def test_the_same_maps_have_the_same_similarities(maps, gt):
    parts = build(student_channels=6)(maps[1], maps[1], gt)
    torch.testing.assert_close(
        parts['ss'], torch.tensor(0.0), atol=1e-6, rtol=0
    )


def test_classes_count_for_the_contrast_alone(maps):
    loss = build()
    one, other = (
        loss(*maps, ground_truth(labels=labels))
        for labels in ((0, 1, 0), (0, 0, 1))
    )
    assert one['ss'] == other['ss']
    assert not torch.isclose(one['sc'], other['sc'])


def test_the_parts_are_added_as_they_are_and_have_weights(maps, gt):
    plain = build()
    other = build(ss_weight=2.0, sc_weight=3.0, loss_weight=5.0)
    other.load_state_dict(plain.state_dict())
    before, after = (one(*maps, gt) for one in (plain, other))
    torch.testing.assert_close(after['ss'], 10 * before['ss'])
    torch.testing.assert_close(after['sc'], 15 * before['sc'])


def test_each_part_teaches_the_student(maps, gt):
    loss = build()
    for part, learns in (('ss', False), ('sc', True)):
        loss.zero_grad()
        student = [one.clone().requires_grad_() for one in maps[0]]
        loss(student, maps[1], gt)[part].backward()
        assert all(one.grad.abs().sum() > 0 for one in student)
        assert (loss.projection.weight.grad is not None) == learns


def test_one_object_is_like_itself_and_has_its_teacher(maps):
    parts = build()(*maps, ground_truth(counts=(1, 0)))
    assert parts['ss'] == 0
    assert parts['sc'] == 0


def test_without_a_box_it_is_zero_and_touches_its_weights(maps):
    loss = build()
    student = [one.clone().requires_grad_() for one in maps[0]]
    parts = loss(student, maps[1], ground_truth(counts=(0, 0)))
    assert list(parts) == ['ss', 'sc']
    sum(parts.values()).backward()
    for one in [*student, loss.projection.weight]:
        assert (one.grad == 0).all()


def test_objects_of_other_processes_take_part(maps, gt, monkeypatch):
    """Two processes with an image each are one with two images."""
    loss = build()
    first, second = (
        [[level[index : index + 1] for level in side] for side in maps]
        for index in (0, 1)
    )
    boxes = [
        GroundTruth.from_boxes(
            [gt.boxes[gt.image == index]],
            shape=gt.shape,
            labels=[gt.labels[gt.image == index]],
        )
        for index in (0, 1)
    ]
    others = list(loss._samples(*second, boxes[1]))
    monkeypatch.setattr(
        mlkd_bert_samples,
        'gather_rows',
        lambda rows: torch.cat([rows, others.pop(0)]),
    )
    found = loss(*first, boxes[0])
    assert others == []
    monkeypatch.undo()
    for part, expected in loss(*maps, gt).items():
        torch.testing.assert_close(found[part], expected)


def test_other_channels_name_the_setting(maps, gt):
    with pytest.raises(ValueError, match='student_channels, was built for 5'):
        build(student_channels=5)(*maps, gt)
    with pytest.raises(ValueError, match='teacher_channels, was built for 7'):
        build(teacher_channels=7)(*maps, gt)


def test_levels_and_boxes_must_be_there(maps, gt):
    with pytest.raises(ValueError, match='2 levels of the student and 1'):
        build()(maps[0], maps[1][:1], gt)
    with pytest.raises(ValueError, match='gt=None'):
        build()(*maps)


@pytest.mark.parametrize(
    'setting', ['temperature', 'canonical_size', 'output_size']
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(
        ValueError, match=f'MLKDBertSampleLoss needs {setting}'
    ):
        build(**{setting: 0})

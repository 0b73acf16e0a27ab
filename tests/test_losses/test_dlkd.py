import math

import pytest
import torch
from torch import nn

from mmkd.losses import dlkd
from mmkd.losses.dlkd import DLKDLoss, align_loss, correlate_loss
from mmkd.structures import GroundTruth

SETTINGS = dict(student_channels=4, teacher_channels=6, hidden_ratio=2)
PARTS = ['align', 'correlate', 'contrast']


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.fixture
def vectors():
    """Three objects with two views each; widths 4 and 6."""
    return torch.randn(3, 3, 4), torch.randn(3, 3, 6)


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
    first, second = counts
    return GroundTruth.from_boxes(
        [boxes[:first], boxes[first : first + second]],
        shape=(64, 64),
        labels=[
            torch.tensor(labels[:first], dtype=torch.long),
            torch.tensor(labels[first : first + second], dtype=torch.long),
        ],
    )


def build(**settings):
    return DLKDLoss(**{**SETTINGS, 'canonical_size': 40, **settings})


def rotation(channels):
    return torch.linalg.qr(torch.randn(channels, channels))[0]


def run(loss, maps, gt):
    torch.manual_seed(1)
    return loss(*maps, gt)


# Align -----------------------------------------------------------------------


def test_one_direction_a_right_angle_and_the_opposite():
    teacher = torch.tensor([[2.0, 0]])
    for student, expected in (
        ([[5.0, 0]], 0.0),
        ([[0.0, 3]], 2.0),
        ([[-1.0, 0]], 4.0),
    ):
        found = align_loss(torch.tensor(student), teacher)
        torch.testing.assert_close(found, torch.tensor(expected))


def test_alignment_is_the_mean_over_regions():
    student = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    teacher = torch.tensor([[1.0, 0], [1, 0], [-1, 0]])
    torch.testing.assert_close(
        align_loss(student, teacher), torch.tensor((0 + 2 + 4) / 3)
    )


def test_lengths_are_not_aligned():
    student, teacher = torch.randn(2, 5, 4)
    lengths = torch.rand(5, 1) + 0.5
    before = align_loss(student, teacher)
    torch.testing.assert_close(align_loss(lengths * student, teacher), before)
    torch.testing.assert_close(align_loss(student, lengths * teacher), before)
    assert 0 < before < 4


# Correlate -------------------------------------------------------------------


def literal(student, teacher, temperature):
    """View by view; objects stand first in their row."""

    def rows(vectors):
        found = []
        for one in vectors:
            for view in one[1:]:
                logits = [
                    (view @ other[0] / view.norm() / other[0].norm()).item()
                    / temperature
                    for other in vectors
                ]
                total = sum(map(math.exp, logits))
                found.append([math.exp(x) / total for x in logits])
        return found

    values = [
        sum(q * math.log(q / p) for p, q in zip(own, other))
        for own, other in zip(rows(student), rows(teacher))
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize('temperature', [0.5, 0.1])
def test_correlation_equals_a_literal_loop(vectors, temperature):
    found = correlate_loss(*vectors, temperature).item()
    assert found == pytest.approx(literal(*vectors, temperature), rel=1e-4)


def test_the_published_temperature_is_a_half(vectors):
    torch.testing.assert_close(
        correlate_loss(*vectors), correlate_loss(*vectors, 0.5)
    )


def test_a_multiple_of_the_teacher_correlates_fully(vectors):
    teacher = vectors[1]
    found = correlate_loss(3 * teacher, teacher)
    torch.testing.assert_close(found, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_a_rotation_of_the_teacher_changes_no_correlation(vectors):
    student, teacher = vectors
    torch.testing.assert_close(
        correlate_loss(student, teacher @ rotation(6)),
        correlate_loss(student, teacher),
    )


def test_objects_are_not_compared_with_each_other(vectors):
    """Only views with objects: no region is compared with itself."""
    student, teacher = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    teacher[0, :, 0] = teacher[1, :, 1] = 1  # each view as its object
    student[0, 0, 0] = student[1, 0, 1] = 1
    student[0, 1:, 1] = student[1, 1:, 0] = 1  # as the other one
    # p of cosines (1, 0) at temperature 1 against (0, 1): (2 p - 1) * 1.
    p = math.e / (1 + math.e)
    torch.testing.assert_close(
        correlate_loss(student, teacher, 1.0), torch.tensor(2 * p - 1)
    )


def test_one_object_has_nothing_to_correlate_with(vectors):
    assert correlate_loss(*(one[:1] for one in vectors)) == 0


# All of it -------------------------------------------------------------------


def test_parts_are_those_of_its_functions(maps, gt, monkeypatch):
    """The module, put together again from its layers."""
    loss = build(jitter=0.0).eval()
    parts = run(loss, maps, gt)
    assert list(parts) == PARTS
    own, other, labels = loss._regions(*maps, gt)
    assert own.shape == (3, 4, 4)
    assert other.shape == (3, 4, 6)
    rows, like = own.flatten(0, 1), other.flatten(0, 1)
    torch.testing.assert_close(
        parts['align'], 20 * align_loss(loss.aligner(rows), like)
    )
    torch.testing.assert_close(
        parts['correlate'],
        50 * correlate_loss(loss.correlator(rows).view(3, 4, 4), other),
    )
    both = torch.cat(
        [loss.student_embedding(rows), loss.teacher_embedding(like)]
    )
    classes = [one for one in (0, 1, 0) for _ in range(4)] * 2
    torch.testing.assert_close(
        parts['contrast'],
        dlkd.supervised_contrast(both, torch.tensor(classes), 0.07),
    )
    assert labels.tolist() == [0, 1, 0]


def test_regions_are_read_from_the_level_of_their_size(maps, gt):
    # 20, 52 and 20 pixels: the second from stride 16 on either side.
    loss = build(jitter=0.0)
    finer = [[level.clone() for level in side] for side in maps]
    for side in finer:
        side[1] += 100
    before, after = (loss._regions(*one, gt)[:2] for one in (maps, finer))
    for one, other in zip(before, after):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        torch.testing.assert_close(one[1] + 100, other[1])


def test_a_region_is_the_mean_over_its_box():
    gt = GroundTruth.from_boxes([torch.tensor([[8.0, 16, 24, 32]])], (64, 64))
    columns = torch.arange(8) + 0.5
    ramp = columns.expand(1, 4, 8, 8)
    loss = build(teacher_channels=4, jitter=0.0)
    own, other, _ = loss._regions([ramp], [ramp.transpose(2, 3)], gt)
    torch.testing.assert_close(own, torch.full((1, 4, 4), 2.0))
    torch.testing.assert_close(other, torch.full((1, 4, 4), 3.0))


def test_student_and_teacher_see_the_same_views(maps, gt):
    loss = build(teacher_channels=4)
    own, other, _ = loss._regions(maps[0], maps[0], gt)
    assert torch.equal(own, other)
    assert not torch.equal(own[:, 1], own[:, 0])
    assert not torch.equal(own[:, 1], own[:, 2])


def test_classes_of_the_boxes_count_for_the_contrast_alone(maps):
    loss = build().eval()
    one, other = (
        run(loss, maps, ground_truth(labels=labels))
        for labels in ((0, 1, 0), (0, 0, 1))
    )
    assert one['align'] == other['align']
    assert one['correlate'] == other['correlate']
    assert not torch.isclose(one['contrast'], other['contrast'])


def test_each_part_has_its_weight(maps, gt):
    one = build().eval()
    other = build(
        align_weight=2.0, correlate_weight=100.0, contrast_weight=3.0
    ).eval()
    other.load_state_dict(one.state_dict())
    before, after = (run(loss, maps, gt) for loss in (one, other))
    for part, factor in zip(PARTS, (0.1, 2.0, 3.0)):
        torch.testing.assert_close(after[part], factor * before[part])


def test_each_part_teaches_the_student_and_its_own_layers(maps, gt):
    own = dict(
        align={'aligner'},
        correlate={'correlator'},
        contrast={'student_embedding', 'teacher_embedding'},
    )
    loss = build()
    for part, layers in own.items():
        loss.zero_grad()
        student = [one.clone().requires_grad_() for one in maps[0]]
        run(loss, (student, maps[1]), gt)[part].backward()
        assert all(one.grad.abs().sum() > 0 for one in student)
        reached = {
            name.split('.')[0]
            for name, one in loss.named_parameters()
            if one.grad is not None and one.grad.abs().sum() > 0
        }
        assert reached == layers


def test_the_layers_are_as_wide_as_published():
    loss = DLKDLoss(student_channels=4, teacher_channels=6)
    shapes = {name: one.shape for name, one in loss.named_parameters()}
    assert shapes['aligner.0.weight'] == (16 * 6, 4)
    assert shapes['aligner.3.weight'] == (6, 16 * 6)
    assert shapes['correlator.0.weight'] == (4, 4)
    assert shapes['correlator.3.weight'] == (4, 4)
    assert shapes['student_embedding.weight'] == (128, 4)
    assert shapes['teacher_embedding.weight'] == (128, 6)
    for layers in (loss.aligner, loss.correlator):
        assert isinstance(layers[1], nn.BatchNorm1d)
        assert isinstance(layers[2], nn.ReLU)


def test_without_a_box_it_is_zero_and_touches_every_weight(maps):
    loss = build()
    student = [one.clone().requires_grad_() for one in maps[0]]
    parts = loss(student, maps[1], ground_truth(counts=(0, 0)))
    assert list(parts) == PARTS
    assert all(value == 0 for value in parts.values())
    sum(parts.values()).backward()
    for one in [*student, *loss.parameters()]:
        assert (one.grad == 0).all()


def test_one_box_is_aligned_and_correlates_with_nothing(maps):
    parts = run(build(), maps, ground_truth(counts=(1, 0)))
    assert parts['align'] > 0
    assert parts['correlate'] == 0


def test_objects_of_other_processes_take_part(maps, gt, monkeypatch):
    """Two processes with an image each are one with two images."""
    loss = build(jitter=0.0)
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
    others = list(loss._regions(*second, boxes[1]))
    monkeypatch.setattr(
        dlkd, 'gather_rows', lambda rows: torch.cat([rows, others.pop(0)])
    )
    found = loss(*first, boxes[0])
    assert others == []
    monkeypatch.undo()
    expected = loss(*maps, gt)
    for part in PARTS:
        torch.testing.assert_close(found[part], expected[part])


# Wrong use -------------------------------------------------------------------


def test_other_channels_name_the_setting(maps, gt):
    with pytest.raises(ValueError, match='student_channels, was built for 5'):
        build(student_channels=5)(*maps, gt)
    with pytest.raises(ValueError, match='teacher_channels, was built for 7'):
        build(teacher_channels=7)(*maps, gt)


def test_levels_must_be_as_many(maps, gt):
    with pytest.raises(ValueError, match='2 levels of the student and 1'):
        build()(maps[0], maps[1][:1], gt)


def test_missing_boxes_are_named(maps):
    with pytest.raises(ValueError, match='gt=None'):
        build()(*maps)


@pytest.mark.parametrize(
    ('setting', 'value'),
    [
        ('num_views', 0),
        ('temperature', 0.0),
        ('contrast_temperature', 0.0),
        ('hidden_ratio', 0),
        ('canonical_size', 0.0),
        ('output_size', 0),
        ('jitter', 1.5),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=f'DLKDLoss needs {setting}'):
        build(**{setting: value})

import copy
import math

import pytest
import tiny
import torch
from mmengine.structures import InstanceData
from test_contracts import Count, NobodyWaits, pretended, pretending
from torch import nn

from mmkd.structures import GroundTruth, Step
from mmkd.terms.conditional import (
    Decoder,
    InstanceConditionalTerm,
    Instances,
    attention_masks,
    box_error,
    class_error,
    conditional_distance,
    instances,
    waves,
)

#: Rows and columns of two levels, strides 16 and 32 of 64 x 96 pixels.
SHAPES = ((4, 6), (2, 3))
SIZE = (64, 96)
PARTS = {'distil', 'aux_class', 'aux_box'}


class Outputs:
    """What taps of a pass returned, for a term alone."""

    def __init__(self, maps, size=None):
        self.maps, self.size = maps, size

    def at(self, path):
        assert path == 'neck'
        return self.maps


def maps_of(channels, seed=0, images=2, shapes=SHAPES):
    torch.manual_seed(seed)
    return tuple(torch.randn(images, channels, *shape) for shape in shapes)


def samples_of(*boxes, shapes=None):
    """A sample for each list of ``(label, x1, y1, x2, y2)``."""
    _, samples = tiny.batch(((1, 1),) * len(boxes))
    for index, (sample, rows) in enumerate(zip(samples, boxes)):
        shape = SIZE if shapes is None else shapes[index]
        sample.set_metainfo(dict(img_shape=shape))
        table = torch.tensor(rows, dtype=torch.float).reshape(-1, 5)
        sample.gt_instances = InstanceData(
            bboxes=table[:, 1:], labels=table[:, 0].long()
        )
    return samples


BOXES = (
    [(2, 8, 8, 40, 56), (0, 50, 20, 90, 30), (1, 5, 40, 25, 60)],
    [(1, 30, 10, 70, 60)],
)


def step_of(student, teacher, samples, iteration=0, size=SIZE, shown=None):
    return Step(
        student=Outputs(student),
        images=torch.zeros(len(samples), 3, *size),
        samples=samples,
        iteration=iteration,
        teachers={'big': lambda *_: Outputs(teacher, shown)},
    )


def term_of(sham=False, **settings):
    torch.manual_seed(1)
    settings = {
        'num_classes': 3,
        'channels': 5,
        'in_channels': 4,
        'dim': 8,
        'heads': 2,
        'jitter': 0.0,
        'warmup': 0,
        'loss_weight': 1.0,
        **settings,
    }
    term = InstanceConditionalTerm('big', **settings)
    term.sham = sham
    return term


@pytest.fixture
def build(teachers):
    """A student that learns by the term alone."""

    def build(model=None, sham=False, **settings):
        term = {
            'type': 'mmkd.InstanceConditionalTerm',
            'teacher': 'big',
            'num_classes': tiny.CLASSES,
            'channels': 16,
            'dim': 16,
            'heads': 2,
            'warmup': 0,
            **settings,
        }
        teachers['big']['sham'] = sham
        model = model or tiny.retinanet()
        student = tiny.build(tiny.distilled(model, teachers, dict(x=term)))
        student.teachers.load()
        return student.train()

    return build


def shares(student, images, samples):
    losses = student.loss(images, samples)
    return {
        name.removeprefix('loss_kd_x_'): value
        for name, value in losses.items()
        if 'kd_x' in name
    }


# Written out -----------------------------------------------------------------


def literal(term, student, teacher, gt, found):
    """All parts, by loops over images, instances, heads, cells."""
    heads, dim = term.decoder.heads, term.value.out_features
    width = dim // heads
    decoder = term.decoder
    errors, classes, boxes = [], [], []
    for n, (height, across) in enumerate(gt.image_shapes):
        cells, own, places = [], [], []
        for one, other in zip(student, teacher):
            rows, columns = one.shape[-2:]
            inside = [
                math.ceil(rows * height / gt.shape[0]),
                math.ceil(columns * across / gt.shape[1]),
            ]
            for y in range(inside[0]):
                for x in range(inside[1]):
                    own.append(one[n, :, y, x])
                    cells.append(other[n, :, y, x])
                    places.append(
                        place((y + 1) / inside[0], (x + 1) / inside[1])
                    )
        values = [decoder.value(cell) for cell in cells]
        keys = [
            decoder.key(cell + decoder.place(where))
            for cell, where in zip(cells, places)
        ]
        guesses = [term.value(one) for one in own]
        masks = [[0.0] * len(cells) for _ in range(heads)]
        for k in range(found.real.shape[1]):
            if not found.there[n, k]:
                continue
            x1, y1, x2, y2 = found.boxes[n, k].tolist()
            middle = ((x1 + x2) / 2, (y1 + y2) / 2)
            told = layered(
                term.encoder,
                description(
                    int(found.labels[n, k]),
                    middle,
                    ((x2 - x1) * across, (y2 - y1) * height),
                    term.num_classes,
                ),
            )
            query = decoder.query(told)
            answer = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                logits = torch.stack(
                    [query[part] @ key[part] for key in keys]
                ) / math.sqrt(width)
                attention = logits.softmax(0)
                answer.append(
                    sum(a * v[part] for a, v in zip(attention, values))
                )
                if found.real[n, k]:
                    sharp = (logits / term.temperature).softmax(0)
                    for s in range(len(cells)):
                        masks[h][s] += sharp[s].item()
            answer = decoder.norms[0](told + decoder.out(torch.cat(answer)))
            answer = decoder.norms[1](answer + layered(decoder.feed, answer))
            said = layered(term.predictor, answer)
            sure = said[0].sigmoid()
            classes.append(-(sure if found.real[n, k] else 1 - sure).log())
            if found.real[n, k]:
                wide, high = x2 - x1, y2 - y1
                sides = [
                    (middle[0] - x1, wide),
                    (middle[1] - y1, high),
                    (x2 - middle[0], wide),
                    (y2 - middle[1], high),
                ]
                boxes.append(
                    sum(
                        (guess.sigmoid() - side).abs() / extent
                        for guess, (side, extent) in zip(said[1:], sides)
                    )
                )
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            error = 0.0
            for s in range(len(cells)):
                a, b = normal(guesses[s][part]), normal(values[s][part])
                error += masks[h][s] * ((a - b) ** 2).mean()
            count = sum(masks[h])
            errors.append(error / count if count else torch.tensor(0.0))
    return dict(
        distil=sum(errors) / len(errors),
        aux_class=sum(classes) / len(classes),
        aux_box=sum(boxes) / len(boxes),
    )


def layered(layers, vector):
    """Linear layers, with what is below 0 cut off between them."""
    linear = [one for one in layers if isinstance(one, nn.Linear)]
    for one in linear[:-1]:
        vector = one(vector).clamp(min=0)
    return linear[-1](vector)


def normal(vector):
    deviation = (vector.var(correction=0) + 1e-5).sqrt()
    return (vector - vector.mean()) / deviation


def place(y, x):
    """DETR's encoding of the y-th of all rows and the x-th of all columns."""
    found = []
    for share in (y, x):
        for i in range(64):
            angle = 2 * math.pi * share / 10000 ** (i / 64)
            found += [math.sin(angle), math.cos(angle)]
    return torch.tensor(found)


def description(label, middle, pixels, classes):
    found = [float(label == c) for c in range(classes)]
    for share in middle:
        angles = [2 * math.pi * share / 10000 ** (i / 64) for i in range(64)]
        found += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    for side in pixels:
        octave = sum(side >= limit for limit in (64, 128, 256, 512))
        found += [float(octave == o) for o in range(5)]
    return torch.tensor(found)


@pytest.mark.parametrize(
    ('shapes', 'settings'),
    [
        (None, {}),
        (((64, 96), (40, 50)), dict(temperature=0.4)),
        (((40, 50), (64, 96)), dict(negatives=0, heads=4)),
    ],
)
def test_equals_loops_over_instances_heads_and_cells(shapes, settings):
    term = term_of(**{'negatives': 2, **settings})
    # Weights that make differences of attention and answers large.
    with torch.no_grad():
        term.encoder[-1].weight.mul_(8)
        term.decoder.query.weight.mul_(3)
    student, teacher = maps_of(4), maps_of(5, seed=1)
    boxes = [
        [(c, x1 / 2, y1 / 2, x2 / 2, y2 / 2) for c, x1, y1, x2, y2 in rows]
        for rows in BOXES
    ]
    step = step_of(student, teacher, samples_of(*boxes, shapes=shapes))
    torch.manual_seed(5)
    found = instances(step.gt, 3, term.negatives, 300)
    torch.manual_seed(5)
    parts = term(step)
    expected = literal(term, student, teacher, step.gt, found)
    assert parts.keys() == PARTS
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


def test_attention_on_one_cell_leaves_that_cells_error():
    """Cell 2 differs by (1, -1) against (-1, 1) when normalised: 4."""
    query = torch.tensor([[[[1000.0, 0.0]]]])
    key = torch.zeros(1, 1, 4, 2)
    key[0, 0, 2, 0] = 1
    masks = attention_masks(
        query,
        key,
        torch.ones(1, 4, dtype=torch.bool),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert masks.tolist() == [[[0, 0, 1, 0]]]
    student, teacher = torch.randn(2, 1, 1, 4, 2)
    student[0, 0, 2] = torch.tensor([30.0, 10.0])
    teacher[0, 0, 2] = torch.tensor([-7.0, 7.0])
    torch.testing.assert_close(
        conditional_distance(student, teacher, masks), torch.tensor(4.0)
    )


def test_masks_add_up_real_instances_at_the_cells_that_are_asked():
    """Logits ln 3 and 0: three quarters and a quarter."""
    query = math.log(3) * torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0]])
    query = torch.stack([query[0], query[1], query[0] * 9])[None, None]
    key = torch.eye(4)[None, None, :3]  # the third is the border
    asked = torch.tensor([[True, True, False]])
    real = torch.tensor([[True, True, False]])
    masks = attention_masks(query, key, asked, real)
    torch.testing.assert_close(masks, torch.tensor([[[1.0, 1.0, 0.0]]]))
    real = torch.tensor([[True, False, False]])
    masks = attention_masks(query, key, asked, real)
    torch.testing.assert_close(masks, torch.tensor([[[0.75, 0.25, 0.0]]]))


def test_the_distance_is_a_mean_over_images_and_heads():
    """Opposite values cost 4, equal ones 0, a mask of 0 nothing."""
    student = torch.tensor([1.0, -1.0]).expand(2, 2, 3, 2).clone()
    teacher = student.clone()
    teacher[0, 1, 0] *= -1
    masks = torch.zeros(2, 2, 3)
    masks[0, 0] = 5
    masks[0, 1] = torch.tensor([1.0, 2, 1])
    distance = conditional_distance(student, teacher, masks)
    torch.testing.assert_close(distance, torch.tensor(4 / 4 / 4))
    torch.testing.assert_close(
        conditional_distance(3 * student + 2, teacher * 9 - 1, masks),
        distance,
    )


def test_errors_of_the_auxiliary_task_worked_by_hand():
    """Probabilities of a half, sides as in the comments."""
    found = Instances(
        labels=None,
        boxes=None,
        real=torch.tensor([[True, False, False]]),
        there=torch.tensor([[True, True, False]]),
    )
    logits = torch.tensor([[math.log(3), math.log(3), 50.0]])
    torch.testing.assert_close(
        class_error(logits, found),
        torch.tensor(-(math.log(0.75) + math.log(0.25)) / 2),
    )
    sides = torch.tensor([0.1, 0.6, 0.3, 0.1])  # 0.4 wide, 0.7 high
    said = torch.zeros(1, 3, 4)  # a half everywhere
    said[0, 1:] = 9
    torch.testing.assert_close(
        box_error(said, sides.expand(1, 3, 4), found),
        torch.tensor(0.4 / 0.4 + 0.1 / 0.7 + 0.2 / 0.4 + 0.4 / 0.7),
    )


def test_a_box_without_area_has_a_finite_error():
    found = Instances(None, None, *torch.ones(2, 1, 1, dtype=torch.bool))
    error = box_error(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), found)
    torch.testing.assert_close(error, torch.tensor(4 * 0.5 / 1e-3))


def test_nothing_that_is_there_costs_nothing():
    none = torch.zeros(1, 2, dtype=torch.bool)
    found = Instances(None, None, none, none)
    assert class_error(torch.ones(1, 2), found) == 0
    assert box_error(torch.ones(1, 2, 4), torch.ones(1, 2, 4), found) == 0


def test_the_decoder_is_multi_head_attention_in_a_layer_of_a_transformer():
    torch.manual_seed(0)
    decoder = Decoder(channels=6, dim=8, heads=4)
    other = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)
    with torch.no_grad():
        other.q_proj_weight.copy_(decoder.query.weight)
        other.k_proj_weight.copy_(decoder.key.weight)
        other.v_proj_weight.copy_(decoder.value.weight)
        biases = [decoder.query.bias, torch.zeros(8), decoder.value.bias]
        other.in_proj_bias.copy_(torch.cat(biases))
    other.out_proj = decoder.out
    told, cells = torch.randn(2, 3, 8), torch.randn(2, 10, 6)
    places = torch.randn(2, 10, 256)
    asked = torch.rand(2, 10) > 0.3
    query, key, _, answer = decoder(told, cells, places, asked)
    found, attention = other(
        told,
        cells + decoder.place(places),
        cells,
        key_padding_mask=~asked,
        average_attn_weights=False,
    )
    expected = decoder.norms[0](told + found)
    expected = decoder.norms[1](expected + decoder.feed(expected))
    torch.testing.assert_close(answer, expected)
    real = torch.tensor([[True, False, True], [False, True, False]])
    torch.testing.assert_close(
        attention_masks(query, key, asked, real),
        torch.einsum('nhks,nk->nhs', attention, real.float()),
    )


# Instances -------------------------------------------------------------------


def ground_truth(*boxes, shapes=None):
    samples = samples_of(*boxes, shapes=shapes)
    return GroundTruth.from_samples(samples, torch.zeros(1, 3, *SIZE))


def test_real_instances_stand_first_as_shares_of_their_own_image():
    gt = ground_truth(*BOXES, shapes=(SIZE, (60, 80)))
    found = instances(gt, 3, 2, 300)
    for n, (rows, (height, width)) in enumerate(zip(BOXES, (SIZE, (60, 80)))):
        for k, (label, x1, y1, x2, y2) in enumerate(rows):
            assert found.labels[n, k] == label
            torch.testing.assert_close(
                found.boxes[n, k],
                torch.tensor(
                    [x1 / width, y1 / height, x2 / width, y2 / height]
                ),
            )
        assert found.real[n].sum() == len(rows)
        assert found.real[n, : len(rows)].all()


@pytest.mark.parametrize(
    ('negatives', 'limit', 'counts'),
    [
        (5, 300, (18, 6, 0)),
        (5, 10, (10, 6, 0)),
        (5, 2, (3, 2, 0)),
        (1, 300, (6, 2, 0)),
        (0, 300, (3, 1, 0)),
    ],
)
def test_an_image_has_so_many_fakes_for_each_box(negatives, limit, counts):
    found = instances(ground_truth(*BOXES, []), 3, negatives, limit)
    assert found.there.sum(1).tolist() == list(counts)
    assert found.there.shape[1] == max(counts)
    for row, count in zip(found.there, counts):
        assert row[:count].all()
    assert not (found.real & ~found.there).any()


def test_fakes_have_class_and_size_of_a_box_and_are_anywhere():
    torch.manual_seed(0)
    rows = [(2, 10, 10, 20, 16), (1, 50, 20, 53, 30)]
    found = instances(ground_truth(rows), 2, 3000, 10**6)
    boxes, labels = found.boxes[0, 2:], found.labels[0, 2:]
    assert boxes.min() == 0
    assert boxes.max() == 1
    whole = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 1).all(1)
    assert whole.float().mean() > 0.6
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    for label, wide, high in ((2, 10, 6), (1, 3, 10)):
        mine = labels == label
        assert mine.float().mean() == pytest.approx(0.5, abs=0.05)
        for side, share in ((width, wide / 96), (height, high / 64)):
            torch.testing.assert_close(
                side[mine & whole],
                torch.tensor(share).expand(int((mine & whole).sum())),
            )
    middle = (boxes[:, :2] + boxes[:, 2:])[whole] / 2
    torch.testing.assert_close(
        middle.mean(0), torch.full((2,), 0.5), atol=0.02, rtol=0
    )
    assert torch.corrcoef(middle.T)[0, 1].abs() < 0.05
    # A uniform number between a and b has deviation (b - a) / sqrt 12.
    assert middle.std(0).tolist() == pytest.approx([0.27] * 2, abs=0.02)


def test_fakes_are_drawn_from_boxes_of_other_images_too():
    torch.manual_seed(0)
    found = instances(ground_truth([(2, 0, 0, 9, 9)], BOXES[1]), 1, 50, 300)
    assert set(found.labels[0].tolist()) == {1, 2}


def test_the_middle_is_told_with_a_shift_of_up_to_the_jitter():
    term = term_of(jitter=0.3)
    gt = ground_truth([(0, 20, 10, 60, 20)] * 500)
    found = instances(gt, 500, 0, 300)
    told, sides = term._tell(found, gt)
    extent = torch.tensor([40 / 96, 10 / 64])
    torch.testing.assert_close(
        sides[..., :2] + sides[..., 2:], extent.expand(1, 500, 2)
    )
    shift = (sides[..., :2] / extent - 0.5)[0]
    for one in shift.T:
        assert -0.3 <= one.min() < -0.28
        assert 0.28 < one.max() <= 0.3
        assert abs(one.mean()) < 0.02
    assert torch.corrcoef(shift.T)[0, 1].abs() < 0.15
    point = torch.tensor([20 / 96, 10 / 64]) + sides[..., :2]
    torch.testing.assert_close(told[..., 3:259], waves(point).flatten(2))


@pytest.mark.parametrize(
    ('side', 'octave'),
    zip((0, 63, 64, 127, 128, 511, 512, 5000), (0, 0, 1, 1, 2, 3, 4, 4)),
)
def test_sides_are_told_by_octaves_of_pixels(side, octave):
    gt = GroundTruth.from_boxes(
        [torch.tensor([[0.0, 0, side, 300]])], shape=(4096, 8192)
    )
    told, _ = term_of()._tell(instances(gt, 1, 0, 1), gt)
    wide, high = told[0, 0, -10:].view(2, 5)
    assert wide.tolist() == [float(one == octave) for one in range(5)]
    assert high.tolist() == [0, 0, 0, 1, 0]


def test_the_order_of_boxes_does_not_matter():
    term = term_of(negatives=0)
    student, teacher = maps_of(4), maps_of(5, seed=1)
    one, other = (
        term(step_of(student, teacher, samples_of(rows, BOXES[1])))
        for rows in (BOXES[0], BOXES[0][::-1])
    )
    for name in PARTS:
        torch.testing.assert_close(one[name], other[name])


def test_fakes_and_points_are_drawn_anew_from_the_global_stream():
    term = term_of(jitter=0.3)
    step = step_of(maps_of(4), maps_of(5), samples_of(*BOXES))
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(term(step))
    for name in PARTS:
        assert seen[0][name] == seen[1][name] != seen[2][name]


# Images ----------------------------------------------------------------------


def test_an_image_without_boxes_costs_nothing_and_counts_in_the_mean():
    term = term_of(negatives=0)
    student, teacher = maps_of(4), maps_of(5, seed=1)
    both = term(step_of(student, teacher, samples_of(BOXES[0], [])))
    alone = term(
        step_of(
            [one[:1] for one in student],
            [one[:1] for one in teacher],
            samples_of(BOXES[0]),
        )
    )
    torch.testing.assert_close(both['distil'], alone['distil'] / 2)
    for name in ('aux_class', 'aux_box'):
        torch.testing.assert_close(both[name], alone[name])


@pytest.mark.parametrize('annotated', [True, False])
def test_a_batch_without_boxes_is_zero_with_a_gradient_of_zero(annotated):
    term = term_of()
    samples = samples_of([], [])
    if not annotated:
        samples[0].gt_instances = InstanceData()
        del samples[1].gt_instances
    student = [one.requires_grad_() for one in maps_of(4)]
    parts = term(step_of(student, maps_of(5), samples))
    assert all(one == 0 for one in parts.values())
    sum(parts.values()).backward()
    for one in [*term.parameters(), *student]:
        assert one.grad.abs().sum() == 0


def test_the_padded_border_does_not_matter():
    """An image of 32 x 64 pixels, alone and in a batch of 64 x 96."""
    term = term_of(negatives=0)
    student, teacher = maps_of(4, images=1), maps_of(5, seed=1, images=1)
    samples = samples_of([(2, 8, 8, 40, 28)], shapes=[(32, 64)])
    padded = term(step_of(student, teacher, samples))
    cropped = [
        [
            one[..., : one.shape[2] // 2, : one.shape[3] // 3 * 2]
            for one in maps
        ]
        for maps in (student, teacher)
    ]
    alone = term(step_of(*cropped, samples, size=(32, 64)))
    for name in PARTS:
        torch.testing.assert_close(padded[name], alone[name])


def test_ignored_boxes_are_asked_like_the_rest():
    term = term_of(negatives=0)
    samples = samples_of(*BOXES)
    expected = term(step_of(maps_of(4), maps_of(5), samples))
    whole = torch.tensor([[0.0, 0, 96, 64]])
    samples[0].ignored_instances = InstanceData(
        bboxes=whole, labels=torch.zeros(1, dtype=torch.long)
    )
    found = term(step_of(maps_of(4), maps_of(5), samples))
    assert found == expected


def test_a_border_that_only_the_teacher_was_shown_is_cut_off():
    term = term_of(negatives=0)
    teacher = maps_of(5)
    step = step_of(maps_of(4), teacher, samples_of(*BOXES))
    expected = term(step)
    wider = [
        nn.functional.pad(one, (0, more, 0, more), value=9)
        for one, more in zip(teacher, (2, 1))
    ]
    step = step_of(maps_of(4), wider, samples_of(*BOXES), shown=(96, 128))
    assert term(step) == expected


def test_a_sham_teacher_is_asked_for_the_objects_that_it_sees(build):
    images, samples = tiny.batch(shapes=((128, 128), (96, 112), (64, 64)))
    settings = dict(negatives=0, jitter=0.0)
    found = shares(build(sham=True, **settings), images, samples)
    shown, following = images.roll(-1, 0), samples[1:] + samples[:1]
    expected = shares(build(**settings), shown, following)
    for name in ('aux_class', 'aux_box'):
        torch.testing.assert_close(found[name], expected[name])
    assert found['distil'] != expected['distil']


# Who learns ------------------------------------------------------------------


def test_only_the_student_and_one_projection_learn_by_distilling(build):
    student = build()
    found = shares(student, *tiny.batch())
    found['distil'].backward()
    reached = {
        name
        for name, one in student.named_parameters()
        if one.grad is not None and one.grad.abs().sum() > 0
    }
    own = {name for name in reached if name.startswith('terms.')}
    assert own == {'terms.x.value.weight', 'terms.x.value.bias'}
    assert {name.split('.')[0] for name in reached - own} == {
        'backbone',
        'neck',
    }
    teacher = student.teachers['big'].detector
    assert all(one.grad is None for one in teacher.parameters())


def test_only_the_decoder_learns_by_its_task(build):
    student = build()
    found = shares(student, *tiny.batch())
    (found['aux_class'] + found['aux_box']).backward()
    reached = {
        name
        for name, one in student.named_parameters()
        if one.grad is not None and one.grad.abs().sum() > 0
    }
    assert reached == {
        name
        for name, _ in student.named_parameters()
        if name.startswith('terms.x.') and 'x.value.' not in name
    }
    teacher = student.teachers['big'].detector
    assert all(one.grad is None for one in teacher.parameters())


def test_every_weight_gets_a_gradient(build):
    student = build()
    sum(shares(student, *tiny.batch()).values()).backward()
    for one in student.terms['x'].parameters():
        assert one.grad is not None


@pytest.mark.parametrize(
    ('iteration', 'part'), [(0, 0.25), (1, 0.5), (3, 1.0), (50, 1.0)]
)
def test_the_students_gradient_grows_while_the_projections_are_young(
    iteration, part
):
    seen = []
    for warmup in (0, 3):
        term = term_of(warmup=warmup, negatives=0)
        student = [one.requires_grad_() for one in maps_of(4)]
        step = step_of(student, maps_of(5), samples_of(*BOXES), iteration)
        value = term(step)['distil']
        value.backward()
        seen.append((value, student[1].grad, term.value.weight.grad))
    (plain, full, mine), (value, grown, same) = seen
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(grown, part * full)
    torch.testing.assert_close(same, mine)


def test_its_losses_fall_on_a_fixed_batch():
    """The draws are the same in each step."""
    term = term_of(dim=64, negatives=2, jitter=0.3)
    step = step_of(maps_of(4), maps_of(5, seed=1), samples_of(*BOXES))
    optimiser = torch.optim.Adam(term.parameters(), 1e-2)
    seen = []
    for _ in range(30):
        torch.manual_seed(0)
        parts = term(step)
        optimiser.zero_grad()
        sum(parts.values()).backward()
        optimiser.step()
        seen.append([parts['distil'], parts['aux_class'], parts['aux_box']])
    first, last = seen[0], seen[-1]
    assert last[0] < 0.5 * first[0]
    assert last[1] < 0.96 * first[1]
    assert last[2] < 0.3 * first[2]


@pytest.mark.slow
def test_the_decoder_learns_what_the_teacher_shows():
    """Where a class is, its channel is high; half of the queries are fakes.

    Without a look at the teacher the error is the logarithm of 2.
    """
    term = term_of(dim=64, negatives=1)
    optimiser = torch.optim.Adam(term.parameters(), 1e-3)
    seen = []
    for turn in range(250):
        torch.manual_seed(turn)
        rows, teacher = [], [0.1 * torch.randn(32, 5, *s) for s in SHAPES]
        for n in range(32):
            label = int(torch.randint(3, ()))
            x, y = (int(one) for one in torch.randint(4, (2,)))
            rows.append([(label, 16 * x, 8 * y, 16 * x + 32, 8 * y + 32)])
            rest = slice(y // 2, (y + 5) // 2)
            teacher[0][n, label, rest, x : x + 2] += 3
        step = step_of(maps_of(4, images=32), teacher, samples_of(*rows))
        parts = term(step)
        optimiser.zero_grad()
        sum(parts.values()).backward()
        optimiser.step()
        seen.append(parts['aux_class'].item())
    assert sum(seen[-20:]) / 20 < 0.9 * math.log(2)


# Settings --------------------------------------------------------------------


def test_weights_scale_their_parts():
    step = step_of(maps_of(4), maps_of(5), samples_of(*BOXES))
    found = []
    for weights in ((1.0, 1.0), (3.0, 0.5)):
        term = term_of(loss_weight=weights[0], aux_weight=weights[1])
        torch.manual_seed(0)
        found.append(term(step))
    for name, factor in dict(distil=3, aux_class=0.5, aux_box=0.5).items():
        assert found[0][name] > 0
        torch.testing.assert_close(found[1][name], factor * found[0][name])


def test_it_is_silent_without_a_weight():
    assert term_of(loss_weight=0.0).silent()
    assert not term_of(aux_weight=0.0).silent()


def test_the_published_settings_are_the_defaults():
    term = InstanceConditionalTerm('big', num_classes=80)
    assert (term.channels, term.in_channels) == (256, 256)
    assert term.value.weight.shape == (256, 256)
    assert (term.decoder.heads, term.negatives, term.limit) == (8, 5, 300)
    assert (term.jitter, term.temperature, term.warmup) == (0.3, 1, 1000)
    assert (term.loss_weight, term.aux_weight) == (8, 1)
    linear = [
        [one.out_features for one in layers if isinstance(one, nn.Linear)]
        for layers in (term.encoder, term.decoder.feed, term.predictor)
    ]
    assert linear == [[256] * 3, [1024, 256], [256, 256, 5]]


def test_levels_may_be_paired(build):
    student = build(
        tiny.retinanet(), levels=(1, 2), teacher_levels=(1, 2), negatives=0
    )
    both = shares(student, *tiny.batch())
    student = build(levels=(1, 2), negatives=0)
    same = shares(student, *tiny.batch())
    assert both == same
    with pytest.raises(
        ValueError, match=r'compares maps of one size.*\[\(8, 8'
    ):
        build(levels=(1, 2), teacher_levels=(0, 1))
    with pytest.raises(ValueError, match='compares maps of one size'):
        build(levels=(1, 2), teacher_levels=(1,))
    with pytest.raises(ValueError, match='levels 0 to 4; .* asks for'):
        build(levels=(1, 5))
    with pytest.raises(ValueError, match='levels 0 to 4; .* asks for'):
        build(teacher_levels=(-1,))


def test_settings_that_cannot_work_are_refused_while_the_model_is_built(build):
    with pytest.raises(ValueError, match=r'dim=20 and heads=8\. Try dim=24'):
        build(dim=20, heads=8)
    for name in ('temperature', 'heads', 'num_classes'):
        with pytest.raises(ValueError, match=f'{name} > 0'):
            build(**{name: 0})
    with pytest.raises(ValueError, match='num_classes=3 in it'):
        build(num_classes=80)
    with pytest.raises(ValueError, match='by channels, was built for 32'):
        build(channels=32, in_channels=16)
    with pytest.raises(ValueError, match='by in_channels, was built for 32'):
        build(in_channels=32)
    with pytest.raises(ValueError, match="Did you mean 'big'"):
        build(teacher='bigg')
    with pytest.raises(ValueError, match="Did you mean 'neck'"):
        build(tap='nek')


def test_a_backbone_that_told_classes_apart_does_not_matter(build):
    student = build()
    term = student.terms['x']
    assert term.teacher_names == ['big']
    student.backbone.num_classes = term.num_classes = 1000
    with pytest.raises(ValueError, match='of 3. Set num_classes=3 in it'):
        term.bind(student, student.teachers)


def test_the_tap_may_be_another(build):
    student = build(tap='backbone', levels=(2,), in_channels=32, channels=64)
    found = shares(student, *tiny.batch())
    assert all(one > 0 for one in found.values())


def test_a_two_stage_student_learns(build):
    student = build(tiny.faster_rcnn(), levels=(1, 2), teacher_levels=(0, 1))
    found = shares(student, *tiny.batch())
    found['distil'].backward()
    assert student.backbone.conv1.weight.grad.abs().sum() > 0


# Numbers and devices ---------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    term = term_of()
    student, teacher = (
        [(300 * one).to(dtype).requires_grad_() for one in maps]
        for maps in (maps_of(4), maps_of(5, seed=1))
    )
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16):
        found = term(step_of(student, teacher, samples_of(*BOXES)))
    torch.manual_seed(0)
    expected = term(
        step_of(
            [one.detach().float() for one in student],
            [one.detach().float() for one in teacher],
            samples_of(*BOXES),
        )
    )
    for name, one in found.items():
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, expected[name])
    sum(found.values()).backward()
    assert all(one.grad.isfinite().all() for one in student)
    assert all(one.grad is None for one in teacher)


def test_flat_maps_are_finite_with_their_gradient():
    term = term_of()
    student = [torch.zeros_like(one).requires_grad_() for one in maps_of(4)]
    teacher = [torch.zeros_like(one) for one in maps_of(5)]
    with torch.no_grad():
        term.value.bias.zero_()
    found = term(step_of(student, teacher, samples_of(*BOXES)))
    sum(found.values()).backward()
    assert all(one.grad.isfinite().all() for one in student)


def test_maps_and_boxes_are_left_as_they_were():
    student, teacher, samples = maps_of(4), maps_of(5), samples_of(*BOXES)
    step = step_of(student, teacher, samples)
    before = copy.deepcopy(step.gt)
    term_of()(step)
    assert all(one._version == 0 for one in [*student, *teacher])
    assert torch.equal(step.gt.boxes, before.boxes)
    assert torch.equal(step.gt.labels, before.labels)


def test_no_loop_runs_over_boxes():
    term, calls = term_of(), []
    for count in (2, 20):
        rows = [BOXES[0] * 7][0][:count]
        step = step_of(maps_of(4), maps_of(5), samples_of(rows, rows))
        term(step)
        with Count() as counted:
            sum(term(step).values()).backward()
        calls.append(counted.calls)
    assert calls[1] - calls[0] <= 2


@pretending
@pytest.mark.parametrize('boxes', [BOXES, ([], [])])
def test_nothing_is_read_back_from_the_device(boxes):
    with pretended(watched=False):
        with torch.device('cuda'):
            term = term_of()
            maps = maps_of(4), maps_of(5)
            samples = samples_of(*boxes, shapes=(SIZE, (40, 50)))
            step = step_of(*maps, samples)
            step.images = torch.zeros(2, 3, *SIZE)
        with NobodyWaits():
            parts = term(step)
        assert all(one.device.type == 'cuda' for one in parts.values())

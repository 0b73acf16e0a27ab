"""Boxes drawn from the distributions of a head."""

from __future__ import annotations

import heads
import numpy as np
import pytest
import tiny
import torch

from mmkd.analysis.box_draws import BoxDraws
from mmkd.datasets.hypotheses import Boxes
from mmkd.terms.decoding import decode

SIZE = (112, 96)  # width, height


def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=[(1.0, 1.0), (0.5, 2.0)], ids=['as stored', 'resized'])
def heard(request):
    """Boxes of a GFL, its image's sample and its distributions."""
    detector = tiny.build(heads.gfl()).eval()
    with torch.no_grad():
        detector.bbox_head.gfl_cls.bias += 4
        detector.bbox_head.gfl_reg.weight *= 20
    images, samples = tiny.batch(shapes=(SIZE[::-1],))
    samples[0].set_metainfo(dict(scale_factor=request.param))
    draws = BoxDraws(detector)
    with draws.listening(), torch.no_grad():
        (sample,) = detector.predict(images, samples)
    found = sample.pred_instances
    found = Boxes(
        found.bboxes.numpy(), found.scores.numpy(), found.labels.numpy()
    )
    assert len(found.labels) > 4
    return draws, found, sample


def inside(boxes, sample):
    """Which sides do not lie at the border, and boxes as the head sees."""
    boxes = boxes * np.tile(sample.scale_factor, 2)
    return (boxes > 0) & (boxes < np.tile(SIZE, 2)), boxes


def test_each_side_lies_on_a_bin_of_its_cell(heard):
    draws, found, sample = heard
    drawn = draws.draw(found, sample, rng(), 1.0, 20)
    assert drawn.shape == (20, *found.boxes.shape)
    free, boxes = inside(drawn, sample)
    # Cells lie at multiples of their stride, which are multiples of 8.
    apart = abs(boxes - 8 * np.round(boxes / 8))
    assert free.sum() > 100
    assert apart[free].max() < 1e-3
    assert boxes.min() >= 0
    assert (boxes.max((0, 1)) <= np.tile(SIZE, 2)).all()


def test_sides_of_coarse_cells_move_by_their_own_stride(heard):
    draws, _, sample = heard
    scores, maps = draws._said
    boxes = decode(draws.head, maps)[1][0, 0].flatten(1).T.numpy()
    size = np.tile(SIZE, 2)
    found = Boxes(
        boxes.clip(0, size) / np.tile(sample.scale_factor, 2),
        scores[1][0, 0].sigmoid().flatten().numpy(),
        np.zeros(len(boxes), int),
    )
    drawn = draws.draw(found, sample, rng(), 1.0, 20)
    free, boxes = inside(drawn, sample)
    assert free.sum() > 100
    assert abs(boxes - 16 * np.round(boxes / 16))[free].max() < 1e-3


def test_of_cells_with_one_box_the_score_tells_which(heard):
    draws, _, sample = heard
    scores, maps = draws._said
    logits = maps[0][0].unflatten(0, (4, -1))[:, :, 2]
    logits.fill_(-1e3)
    # From x = 16 one to the left and two to the right, surely; from x = 24
    # one or three to the left and one to the right.
    for cell, side, bins in (
        *((2, 0, [1]), (2, 2, [2]), (3, 0, [1, 3]), (3, 2, [1])),
        *((cell, side, [1]) for cell in (2, 3) for side in (1, 3)),
    ):
        logits[side, bins, cell] = 0
    scores[0][0, 0, 2, 2:4] = torch.tensor([-3.0, 2.0])
    box = np.array([[8, 8, 32, 24]]) / np.tile(sample.scale_factor, 2)
    for logit, sides in ((-3.0, {8}), (2.0, {0, 16})):
        sure = torch.tensor([logit]).sigmoid().numpy()
        found = Boxes(box, sure, np.zeros(1, int))
        drawn = draws.draw(found, sample, rng(), 1.0, 50)
        left = drawn[:, 0, 0] * sample.scale_factor[0]
        assert set(left.round(6).tolist()) == sides


def test_the_mean_of_many_is_the_box_that_is_found(heard):
    draws, found, sample = heard
    drawn = draws.draw(found, sample, rng(), 1.0, 4000)
    free, _ = inside(drawn, sample)
    free = free.all(0)
    assert free.sum() > 5
    error = (drawn.mean(0) - found.boxes)[free]
    noise = drawn.std(0)[free] / 4000**0.5
    assert (abs(error) < 5 * noise + 0.01).all()
    assert (noise > 0).any()


def test_frequencies_are_the_probabilities_of_the_bins(heard):
    draws, found, sample = heard
    drawn = draws.draw(found, sample, rng(), 1.0, 4000)
    cold = draws.draw(found, sample, rng(), 1e-4, 2)
    likeliest = (abs(drawn - cold[:1]) < 1e-3).mean(0)
    _, maps = draws._said
    reg = [one[0].unflatten(0, (4, -1)).softmax(1).amax(1) for one in maps]
    known = torch.cat([one.flatten() for one in reg]).numpy()
    free, _ = inside(cold, sample)
    for share in likeliest[free[0]]:
        assert abs(known - share).min() < 0.03


def test_draws_coincide_in_the_cold(heard):
    draws, found, sample = heard
    cold = draws.draw(found, sample, rng(), 1e-4, 5)
    assert (cold == cold[:1]).all()
    warm = draws.draw(found, sample, rng(), 1.0, 5)
    assert (warm != warm[:1]).any()


def test_nothing_found_draws_nothing(heard):
    draws, found, sample = heard
    none = found.at(np.zeros(len(found.labels), bool))
    assert draws.draw(none, sample, rng(), 1.0, 3).shape == (3, 0, 4)


def test_boxes_of_no_cell_are_refused(heard):
    draws, found, sample = heard
    moved = found._replace(boxes=found.boxes + 3)
    with pytest.raises(ValueError, match='Leave --bins out'):
        draws.draw(moved, sample, rng(), 1.0, 3)


def test_a_head_without_distributions_is_refused():
    with pytest.raises(ValueError, match=r'RetinaHead.*--jitter'):
        BoxDraws(tiny.build(tiny.retinanet()))

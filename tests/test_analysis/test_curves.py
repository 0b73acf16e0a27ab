import json
from itertools import pairwise

import mmcv
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from mmkd.analysis.curves import ap_history, curves, spread


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, to be looked into."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', keep)
    return figures


def written(annotation):
    """Extent of the words alone, without the line that leads to them."""
    return Text.get_window_extent(annotation)


def log(folder, lines):
    path = folder / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(lines))


def test_every_run_is_a_line_through_its_points(tmp_path, drawn):
    runs = {'alone': [(1, 10.0), (2, 20.0)], 'distilled': [(2, 25), (1, 12)]}
    path = curves(runs, tmp_path / 'a.png')
    assert mmcv.imread(path).shape[:2] == (480, 840)
    lines = drawn[0].axes[0].lines
    assert lines[0].get_xydata().tolist() == [[1, 10], [2, 20]]
    assert lines[1].get_xydata().tolist() == [[1, 12], [2, 25]]


def test_names_stand_beside_the_lines_in_their_colours(tmp_path, drawn):
    runs = {'alone': [(1, 10.0), (2, 20.0)], 'distilled': [(1, 12), (2, 25)]}
    curves(runs, tmp_path / 'a.png')
    axis = drawn[0].axes[0]
    labels = {text.get_text(): text.get_color() for text in axis.texts}
    colours = [line.get_color() for line in axis.lines]
    assert labels == {
        'alone  20.0': colours[0],
        'distilled  25.0': colours[1],
    }
    assert axis.get_legend() is None


def test_names_never_overlap(tmp_path, drawn):
    runs = {f'run {i}': [(1, 10.0), (9, 20.0 + i / 100)] for i in range(5)}
    curves(runs, tmp_path / 'a.png')
    boxes = [written(text) for text in drawn[0].axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))


def test_names_lie_inside_the_picture(tmp_path, drawn):
    runs = {'a student with a long name': [(1, 10.0), (9, 20.0)]}
    curves(runs, tmp_path / 'a.png')
    (text,) = drawn[0].axes[0].texts
    assert written(text).x1 <= drawn[0].bbox.x1


def test_one_evaluation_is_a_level_line(tmp_path, drawn):
    runs = {'teacher': [(50, 42.0)], 'alone': [(1, 10.0), (12, 20.0)]}
    curves(runs, tmp_path / 'a.png')
    level = drawn[0].axes[0].lines[0].get_xydata()
    assert level.tolist() == [[1, 42], [12, 42]]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='at least one evaluation'):
        curves({}, tmp_path / 'a.png')
    with pytest.raises(ValueError, match="none in 'alone'"):
        curves({'alone': []}, tmp_path / 'a.png')


def test_spread_keeps_distance_order_and_mean():
    values = np.sort(np.random.default_rng(0).normal(size=12))
    places = np.array(spread(values, 0.3))
    assert np.diff(places).min() >= 0.3 - 1e-9
    np.testing.assert_allclose(places.mean(), values.mean())


def test_spread_leaves_distant_values_alone():
    assert spread([1.0, 2.0, 4.0], 0.9) == [1.0, 2.0, 4.0]


def test_history_of_a_resumed_run_is_one(tmp_path):
    entry = '{{"coco/bbox_mAP": {}, "coco/bbox_mAP_50": 0.9, "step": {}}}'
    log(
        tmp_path / '20250101_000000',
        [
            json.dumps({'loss': 1.0, 'step': 7}),
            entry.format(0.1, 1),
            entry.format(0.2, 2),
            '{"coco/bbox_mA',
        ],
    )
    log(
        tmp_path / '20250102_000000',
        [entry.format(0.25, 2), entry.format(0.3, 3)],
    )
    assert ap_history(tmp_path) == [(1, 10.0), (2, 25.0), (3, 30.0)]
    assert ap_history(tmp_path, 'bbox_mAP_50') == [(1, 90), (2, 90), (3, 90)]


def test_history_of_nothing_is_empty(tmp_path):
    assert ap_history(tmp_path) == []

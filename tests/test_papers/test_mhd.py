"""MHD, the whole way: a teacher speaks, a file, a student without it."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope

from mmkd.analysis.hypotheses import find, main
from mmkd.configs import read_config
from mmkd.datasets.shapes import TINY, prepare_shapes
from mmkd.laboratory.preparation import preparations
from mmkd.teachers import Teacher

ROOT = Path(__file__).parents[2]
PATH = Path('configs/mhd/tiny/mhd_tiny.py')
IMAGES = 3


@pytest.fixture
def said(tmp_path, monkeypatch):
    """The command of the config, on three pictures."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    init_default_scope('mmdet')
    counts = {'train': IMAGES, 'val': 0, 'test': 1}
    prepare_shapes(TINY['out'], size=TINY['size'], counts=counts, say=len)
    (said,) = preparations(read_config(PATH), 'mhd_tiny')
    return said


def teach(said, seed=7):
    """A teacher of random weights that is sure enough to say something."""
    path = Path(said.checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.save_teacher(read_config(said.config).model, path, seed)
    saved = torch.load(path)
    saved['state_dict']['bbox_head.gfl_cls.bias'] += 4
    torch.save(saved, path)


def describe(said, *options):
    """Every image's sets of left sides and labels, as the file has them."""
    if not Path(said.checkpoint).exists():
        teach(said)
    assert main([*said.text.split()[1:], *options]) == 0
    cache = json.loads(said.out.read_text())
    places = [one['id'] for one in cache['categories']]
    found = {}
    for one in cache['annotations']:
        sets = found.setdefault(one['image_id'], {})
        sets.setdefault(one['hyp_id'], []).append(
            (one['bbox'][0], places.index(one['category_id']))
        )
    return found


def pictures():
    return DATASETS.build(read_config(PATH).train_dataloader.dataset)


def shown(data, index):
    """What one visit shows, likewise."""
    info = data.get_data_info(index)
    return info['img_id'], [
        (one['bbox'][0], one['bbox_label']) for one in info['instances']
    ]


def test_no_teacher_is_in_memory_while_the_student_learns(said):
    describe(said)
    gc.collect()
    model = MODELS.build(read_config(PATH).model)
    data = pictures()
    batch = pseudo_collate([data[index] for index in range(IMAGES)])
    batch = model.data_preprocessor(batch, training=True)
    losses = model.loss(batch['inputs'], batch['data_samples'])
    assert tiny.total(losses).isfinite()
    assert not any(isinstance(one, Teacher) for one in gc.get_objects())


def test_every_visit_shows_one_whole_hypothesis_and_never_the_truth(said):
    sets = describe(said)
    data = pictures()
    seen = set()
    for _ in range(40):
        for index in range(IMAGES):
            image, found = shown(data, index)
            assert found in sets[image].values()
            seen.add((image, tuple(found)))
    assert len(seen) > 5 * IMAGES  # they differ


def test_one_hypothesis_is_plain_pseudo_labelling(said):
    options = ('--generator', 'nbest', '--num-hypotheses', '1')
    describe(said, *options, '--score-thr', '0.45')
    teacher = Teacher(said.config, said.checkpoint)
    teacher.load()
    config = read_config(said.config)
    settings = dict(
        config.train_dataloader.dataset,
        pipeline=config.test_dataloader.dataset.pipeline,
        test_mode=True,
    )
    images, data = DATASETS.build(settings), pictures()
    counts = []
    for index in range(IMAGES):
        wanted = find(teacher, images[index])
        wanted = wanted.at(wanted.scores >= 0.45)
        _, found = shown(data, index)
        assert [label for _, label in found] == wanted.labels.tolist()
        left = [x for x, _ in found]
        np.testing.assert_allclose(left, wanted.boxes[:, 0], atol=0.01)
        counts.append(len(found))
    assert sum(counts) > 0


def test_another_teacher_says_something_else(said):
    before = describe(said)
    assert describe(said) == before
    teach(said, seed=8)
    assert describe(said) != before


def test_boxes_are_drawn_from_the_bins_of_the_head(said, capsys):
    def sides(sets):
        return {
            x
            for one in sets.values()
            for rows in one.values()
            for x, _ in rows
        }

    found, drawn = sides(describe(said)), sides(describe(said, '--bins'))
    # Cells lie at multiples of the strides, and bins as far apart.
    assert all(x % 8 == 0 for x in drawn)
    assert len(drawn) > 5
    assert not all(x % 8 == 0 for x in found)
    words = [*said.text.split()[1:], '--bins', '--generator', 'nbest']
    assert main(words) == 1
    assert 'Choose sample or mbr' in capsys.readouterr().err

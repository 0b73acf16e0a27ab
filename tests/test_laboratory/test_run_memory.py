import json
import math

import numpy as np
import pytest
import tiny
from mmengine.config import Config

from mmkd.laboratory.run_memory import (
    ENOUGH,
    PastRun,
    RunMemory,
    configuration_of,
    configure,
    cosine,
    meta_features,
)

LIKE = dict(images=100.0, classes=3.0, ratio=0.5)


def past(result=30.0, features=LIKE, **configuration):
    return PastRun(features, configuration, result)


@pytest.fixture
def memory(tmp_path):
    return RunMemory(tmp_path / 'deep' / 'memory.json')


def test_nothing_is_suggested_by_nothing(memory):
    assert memory.suggest(LIKE) is None


def test_an_identical_run_gives_its_configuration_exactly(memory):
    memory.add(past(lr=0.0123456789, alpha=0.1 + 0.2))
    for images in range(200, 220):
        memory.add(past(features=dict(LIKE, images=images), lr=9.0))
    assert memory.suggest(LIKE) == dict(lr=0.0123456789, alpha=0.1 + 0.2)


def test_of_identical_runs_the_best_counts(memory):
    for result, lr in ((20.0, 1.0), (40.0, 2.0), (30.0, 3.0)):
        memory.add(past(result, lr=lr))
    assert memory.suggest(LIKE) == dict(lr=2.0)


def test_it_is_the_mean_of_the_five_most_alike(memory):
    for lr in range(1, 6):
        memory.add(past(features=dict(LIKE, images=100.0 + lr), lr=float(lr)))
    for lr in range(3):
        other = dict(images=1.0, classes=1e6, ratio=0.9)
        memory.add(past(features=other, lr=1000.0 + lr))
    assert memory.suggest(LIKE) == dict(lr=3.0)


def test_cosine_is_that_of_logarithms():
    one, other = dict(a=math.e - 1, b=0.0), dict(a=math.e - 1, b=math.e - 1)
    assert cosine(one, other) == pytest.approx(1 / math.sqrt(2))


def test_the_file_is_read_again_and_holds_each_run_once(memory):
    for _ in range(2):
        memory.add(past(lr=1.0))
    memory.add(past(lr=2.0))
    again = RunMemory(memory.path)
    assert [dict(x.configuration) for x in again.runs] == [
        dict(lr=1.0),
        dict(lr=2.0),
    ]
    again.add(past(lr=2.0))
    assert len(json.loads(memory.path.read_text())['runs']) == 2
    assert [one.name for one in memory.path.parent.iterdir()] == [
        'memory.json'
    ]


@pytest.mark.parametrize('text', ['{', '[]', '{}', '{"runs": [{"x": 1}]}'])
def test_a_file_that_is_no_memory_is_refused(tmp_path, text):
    path = tmp_path / 'memory.json'
    path.write_text(text)
    with pytest.raises(ValueError, match='Name another file with --memory'):
        RunMemory(path)


class Stump:
    """A regression that says the mean of what it was taught, by weight."""

    def __init__(self, **settings):
        pass

    def fit(self, rows, values, sample_weight):
        assert len(rows) == len(values) == len(sample_weight) > ENOUGH
        self.value = np.average(values, weights=sample_weight)

    def predict(self, rows):
        return np.full(len(rows), self.value)


@pytest.fixture
def many(memory):
    memory.runs = [
        past(float(k), dict(LIKE, images=k), lr=1e-2, temperature=20.0)
        for k in range(1, ENOUGH + 2)
    ]
    return memory


def test_more_than_fifty_are_asked_by_a_regression(many, monkeypatch):
    import sys
    from types import SimpleNamespace

    ensemble = SimpleNamespace(GradientBoostingRegressor=Stump)
    monkeypatch.setitem(sys.modules, 'sklearn', SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'sklearn.ensemble', ensemble)
    found = many.suggest(LIKE | dict(images=1e5))
    assert found['lr'] == pytest.approx(1e-2)
    assert found['temperature'] == 8.0, 'bounds of the paper'


def test_without_scikit_learn_it_is_told_what_to_type(many, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'sklearn', None)
    monkeypatch.setitem(sys.modules, 'sklearn.ensemble', None)
    with pytest.raises(ModuleNotFoundError, match='pip install scikit-learn'):
        many.suggest(LIKE | dict(images=1e5))


# What is described -----------------------------------------------------------


def boxes(*entries):
    return [
        dict(image_id=image, category_id=label, bbox=[0, 0, *size])
        for image, label, size in entries
    ]


def test_features_are_those_of_data_and_models():
    annotations = dict(
        images=[dict(id=x, width=100, height=50) for x in range(4)],
        categories=[dict(id=x) for x in range(3)],
        annotations=[
            *boxes((0, 0, (10, 20)), (0, 0, (20, 10)), (1, 1, (50, 25))),
            dict(image_id=2, category_id=1, bbox=[0, 0, 9, 9], iscrowd=1),
        ],
    )
    teacher, student = (
        tiny.build(tiny.retinanet(base=base)) for base in (16, 8)
    )
    found = meta_features(annotations, teacher, student)
    assert 18 <= len(found) <= 25
    assert all(isinstance(one, float) for one in found.values())
    wanted = dict(
        images=4,
        classes=3,
        boxes=3,
        boxes_an_image=0.75,
        images_without_boxes=0.5,
        width=100,
        height=50,
        aspect=2,
        rarest_class=1 / 3,
        commonest_class=2 / 3,
        same_head=1,
        teacher_parameters=sum(x.numel() for x in teacher.parameters()),
        student_parameters=sum(x.numel() for x in student.parameters()),
        teacher_channels=128,
        student_channels=64,
    )
    wanted['size_50%'] = math.sqrt(200 / 5000)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name
    assert found['ratio'] == (
        found['student_parameters'] / found['teacher_parameters']
    )
    assert found['class_entropy'] == pytest.approx(
        -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    )


def test_data_without_boxes_are_described():
    annotations = dict(
        images=[dict(id=0, width=9, height=9)], categories=[], annotations=[]
    )
    model = tiny.build(tiny.retinanet())
    found = meta_features(annotations, model, model)
    assert all(math.isfinite(one) for one in found.values())


SETTINGS = dict(
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, weight_decay=1e-4)),
    model=dict(
        terms=dict(
            a=dict(loss=dict(temperature=2.0, loss_weight=1.0)),
            b=dict(losses=[dict(temperature=4.0, loss_weight=3.0)]),
        )
    ),
)


def test_a_configuration_is_read_and_set():
    settings = Config(SETTINGS)
    assert configuration_of(settings, 0.01) == dict(
        lr=0.01, weight_decay=1e-4, eps=0.01, temperature=3.0, alpha=2.0
    )
    wanted = dict(
        lr=0.5, weight_decay=0.25, eps=0.01, temperature=6.0, alpha=1.0
    )
    other = configure(settings, wanted)
    assert configuration_of(other, 0.01) == wanted
    assert other.model.terms.a.loss.temperature == 4.0, 'ratios are kept'
    assert settings.optim_wrapper.optimizer.lr == 0.01
    assert settings.model.terms.a.loss.temperature == 2.0

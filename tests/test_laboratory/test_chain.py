import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from mmengine.config import Config

from mmkd.datasets.shapes import TINY, prepare_shapes
from mmkd.laboratory import chain as module
from mmkd.laboratory.chain import (
    Chain,
    Model,
    Walk,
    gains,
    main,
    nearest,
    sizes,
)
from mmkd.laboratory.run_memory import RunMemory

ROOT = Path(__file__).resolve().parents[2]
TINY_CONFIGS = Path('configs/_base_/tiny')
TEACHER = TINY_CONFIGS / 'gfl_teacher.py'
MIDDLE = TINY_CONFIGS / 'gfl_middle_teacher.py'
STUDENT = Path('configs/ld/tiny/ld_tiny.py')


@pytest.mark.parametrize('links', [1, 2, 3, 7])
def test_consecutive_sizes_have_one_ratio(links):
    found = sizes(52e6, 11e6, links)
    assert len(found) == links + 1
    assert found[0] == pytest.approx(52e6)
    assert found[-1] == pytest.approx(11e6)
    ratios = [other / one for one, other in pairwise(found)]
    assert ratios == pytest.approx([(11 / 52) ** (1 / links)] * links)


def test_a_student_that_is_not_smaller_has_no_chain():
    with pytest.raises(ValueError, match='Choose a smaller student'):
        sizes(10, 10, 2)


def test_the_nearest_models_are_taken_by_ratio_and_once():
    known = dict(a=100, b=60, c=39, d=12)
    assert nearest(known, [50.0]) == ['b']
    assert nearest(known, [48.0]) == ['c'], 'by their ratio'
    assert nearest(known, [41.0, 40.0]) == ['b', 'c']
    assert nearest(dict(a=5), [6.0, 4.0]) == ['a']


def test_a_gain_is_relative_and_to_the_final_student():
    assert not gains(40.0, 40.39, 0.01)
    assert gains(40.0, 40.5, 0.01)
    assert not gains(40.0, 39.0, 0.01)
    assert not gains(0.0, 0.0, 0.01)
    assert gains(0.0, 0.1, 0.01)


# The trainings ---------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository whose tiny trainings take four steps."""
    shutil.copytree(ROOT / 'configs' / '_base_', tmp_path / 'configs/_base_')
    (tmp_path / STUDENT).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / STUDENT, tmp_path / STUDENT)
    for path in (tmp_path / TINY_CONFIGS).glob('*.py'):
        text = path.read_text().replace('640', '4').replace('160', '4')
        path.write_text(text.replace('interval=5', 'interval=1'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TINY, 'counts', dict(train=16, val=0, test=2))
    prepare_shapes(**TINY)
    (tmp_path / 'teacher.pth').write_bytes(b'weights')
    return tmp_path


@pytest.fixture
def make(root):
    def make(student=STUDENT, **settings):
        return Chain(
            Model(TEACHER),
            root / 'teacher.pth',
            Model(student),
            root / 'work',
            **settings,
        )

    return make


def scored(monkeypatch, scores):
    """Trainings that end at once; AP by the models between."""
    asked = []

    def carry_out(runs, jobs):
        for run in runs:
            asked.append(run.folder)

    def walked(chain, between, runs):
        names = tuple(one.name for one in between)
        return Walk(names, scores[len(names)], runs[-1].final)

    monkeypatch.setattr(module, 'carry_out', carry_out)
    monkeypatch.setattr(Chain, '_walked', walked)
    return asked


def test_each_link_learns_from_the_one_before(make):
    chain = make()
    first, last = chain.links([Model(MIDDLE)])
    assert last.needs == (first,)
    taught = Config.fromfile(first.config).model
    assert taught.type == 'mmkd.Distiller'
    assert taught.backbone.base_channels == 12
    assert taught.teachers.big.checkpoint == str(chain.checkpoint)
    assert Path(taught.teachers.big.config) == TEACHER.resolve()
    taught = Config.fromfile(last.config).model
    assert taught.backbone.base_channels == 8
    assert taught.teachers.big.checkpoint == str(first.final)
    assert taught.teachers.big.config == str(first.config)
    assert taught.terms == chain.student.settings.model.terms


def test_links_are_trained_as_the_student_is(make):
    chain = make(seed=3)
    (first, _) = chain.links([Model(MIDDLE)])
    settings = Config.fromfile(first.config)
    assert settings.train_cfg.max_iters == 4
    assert settings.optim_wrapper == chain.student.settings.optim_wrapper
    assert first.options == ('randomness.seed=3',)


def test_chains_are_judged_on_validation_images_where_there_are_any(make):
    chain = make()
    settings = chain.settings
    settings.val_dataloader = dict(dataset=dict(ann_file='val.json'))
    settings.val_evaluator = dict(type='CocoMetric', ann_file='val.json')
    link = chain.link(chain.student, 'a.py', 'a.pth')
    assert link.test_evaluator.ann_file == 'val.json'
    assert link.test_dataloader.dataset.ann_file == 'val.json'


def test_what_two_chains_have_in_common_is_one_folder(make, root):
    one, other = (make().links([Model(MIDDLE)]) for _ in range(2))
    assert [x.folder for x in one] == [x.folder for x in other]
    direct = make().links([])
    assert direct[0].folder != one[1].folder, 'its teacher is another'
    (root / 'better.pth').write_bytes(b'other weights')
    chain = make()
    chain.checkpoint = root / 'better.pth'
    changed = chain.links([Model(MIDDLE)])
    assert not {x.folder for x in changed} & {x.folder for x in one}


def test_a_chain_of_one_is_none(make):
    with pytest.raises(ValueError, match='a model between teacher and stu'):
        make().walk([])
    with pytest.raises(ValueError, match='2 or more'):
        make().grow([Model(MIDDLE)], most=1)


def test_sizes_must_fall(make):
    with pytest.raises(ValueError, match='Name them from large to small'):
        make().walk([Model(TEACHER)])


def test_candidates_outside_of_the_sizes_do_not_count(make):
    with pytest.raises(ValueError, match='Name --candidates of such sizes'):
        make().grow([Model(TEACHER), Model(TINY_CONFIGS / 'gfl.py')], most=4)


@pytest.fixture
def middles(root):
    found = []
    for base in (10, 12, 14):
        path = root / TINY_CONFIGS / f'gfl{base}.py'
        text = (root / MIDDLE).read_text()
        text = text.replace('12', str(base))
        path.write_text(
            text.replace(
                '[24, 48, 96]', f'[{2 * base}, {4 * base}, {8 * base}]'
            )
        )
        found.append(Model(path))
    return found


@pytest.mark.parametrize(
    ('scores', 'walked', 'best'),
    [
        ([30.0, 30.2], 2, 1),  # more, but not by a hundredth
        ([30.0, 29.0], 2, 0),
        ([30.0, 31.0, 31.1], 3, 2),
        ([30.0, 31.0, 30.0], 3, 1),
        ([30.0, 31.0, 32.0, 33.0], 4, 3),
    ],
)
def test_it_grows_as_long_as_the_final_student_gains(
    make, middles, monkeypatch, scores, walked, best
):
    asked = scored(monkeypatch, scores)
    found = make().grow(middles, most=4)
    assert len(found.names) == best
    assert len(asked) == sum(range(1, walked + 1))


def test_one_link_between_is_of_the_middle_size(make, middles, monkeypatch):
    scored(monkeypatch, [30.0, 31.0, 30.0])
    chain = make()
    found = chain.grow(middles, most=2)
    middle = sizes(chain.teacher.size, chain.student.size, 2)[1]
    wanted = min(middles, key=lambda one: abs(one.size - middle))
    assert found.names == (wanted.name,)


@pytest.mark.parametrize('count', [0, 2])
def test_a_student_learns_from_one_teacher(make, root, count):
    teachers = {
        f't{k}': dict(config='x', checkpoint='y') for k in range(count)
    }
    path = root / 'student.py'
    path.write_text(
        f'_base_ = {str(TINY_CONFIGS / "gfl.py")!r}\n'
        f'model = dict(teachers={teachers!r})\n'
    )
    with pytest.raises(ValueError, match=f'{count} teachers. Name a config'):
        make(path)


def test_a_teacher_without_weights_is_told(root, capsys):
    words = [str(TEACHER), 'none.pth', str(STUDENT), '--chain', str(MIDDLE)]
    assert main(words) == 1
    assert 'no weights none.pth. Name a file' in capsys.readouterr().err


def test_suggestions_need_a_memory(make):
    with pytest.raises(ValueError, match='add --memory FILE'):
        make(suggested=True)


def test_past_runs_set_the_trainings(make, root):
    chain = make(memory=root / 'memory.json')
    wanted = dict(lr=0.125, weight_decay=0.5, eps=0.25, alpha=0.75)
    wanted['temperature'] = 5.0
    chain.memory.add(module.PastRun(chain.features, wanted, 30.0))
    other = make(memory=root / 'memory.json', suggested=True)
    assert other.eps == 0.25
    (run,) = other.links([])
    settings = Config.fromfile(run.config)
    assert settings.optim_wrapper.optimizer.lr == 0.125
    loss = settings.model.terms.ld.loss
    assert (loss.loss_weight, loss.temperature) == (0.75, 5.0)


@pytest.mark.slow
def test_the_command_walks_a_chain_and_remembers_it(root, capsys):
    import tiny

    from mmkd.configs import read_config

    tiny.save_teacher(read_config(TEACHER).model, root / 'teacher.pth')
    words = [str(TEACHER), 'teacher.pth', str(STUDENT)]
    words += ['--candidates', str(MIDDLE), '--memory', 'memory.json']
    words += ['--work-dir', 'work']
    assert main(words) == 0
    files = {path: path.stat().st_mtime for path in root.rglob('iter_4.pth')}
    assert len(files) == 3, 'the student alone, one between, and the student'
    runs = RunMemory('memory.json').runs
    assert [[*one.chain] for one in runs] == [
        ['gfl_teacher', 'ld_tiny'],
        ['gfl_teacher', 'gfl_middle_teacher', 'ld_tiny'],
    ]
    said = json.loads(Path('memory.json').read_text())
    capsys.readouterr()
    words[3:5] = ['--chain', str(MIDDLE)]
    assert main(words) == 0
    assert capsys.readouterr().out.count('done before') == 2
    assert {path: path.stat().st_mtime for path in files} == files
    assert len([*root.rglob('iter_4.pth')]) == 3
    assert json.loads(Path('memory.json').read_text()) == said
    assert main([*words, '--suggest']) == 0
    assert 'Past runs suggest: lr 0.002' in capsys.readouterr().out

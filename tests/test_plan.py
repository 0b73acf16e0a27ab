"""One argument: a detector is named, and teaches."""

import re
import subprocess
import sys
from pathlib import Path

import detrs
import pytest
import runs
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmkd.cli import main
from mmkd.configs import read_config, student_config
from mmkd.distillers.distiller import Distilling
from mmkd.plan import fitting, plan, published_weights, written
from mmkd.recipes import RECIPES, look, recipe
from mmkd.registry import DETECTORS, MODELS
from mmkd.structures.ground_truth import labelled

quick_starts = runs.quick_starts
WIDE = dict(base=16)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    runs.write_coco(folder)
    return folder


@pytest.fixture
def files(data, tmp_path):
    """Writes student, teacher and weights as files; returns their paths."""

    def files(student=None, teacher=None, meta=None, **settings):
        student = student or tiny.retinanet()
        teacher = teacher or tiny.retinanet(**WIDE)
        paths = [tmp_path / f'{name}.py' for name in ('student', 'teacher')]
        config = runs.config(
            data, tmp_path / 'run', epochs=1, model=student, **settings
        )
        config.dump(paths[0])
        Config(dict(model=teacher)).dump(paths[1])
        weights = tmp_path / 'teacher.pth'
        init_default_scope('mmdet')
        tiny.save_teacher(teacher, weights, meta=meta)
        return [str(one) for one in (*paths, weights)]

    return files


# The plan --------------------------------------------------------------------


def test_the_plan_says_what_is_compared_with_what(files):
    found = plan(*files(tiny.faster_rcnn(channels=8)), 'mimic')
    # Faster R-CNN has strides 4 to 64, RetinaNet 8 to 128.
    assert found.rows == (
        (
            'mimic',
            'neck[1]',
            'neck[0]',
            '8',
            '8 of 16',
            'ConvAdapt',
            'MimicLoss, weight 2',
        ),
        ('', 'neck[2]', 'neck[1]', '16', '8 of 16', '', ''),
        ('', 'neck[3]', 'neck[2]', '32', '8 of 16', '', ''),
        ('', 'neck[4]', 'neck[3]', '64', '8 of 16', '', ''),
    )
    # Four convolutions of 1 x 1 from 8 to 16 channels, with bias.
    assert 4 * (8 * 16 + 16) == 576
    assert 'Terms add 0.00 M weights' in str(found)
    assert found.config.model.student == 'FasterRCNN'


def test_a_default_weighs_its_terms_by_their_gradients(files):
    found = plan(*files())
    assert [row[0] for row in found.rows if row[0]] == [
        'default.pkd',
        'default.cwd_scores',
    ]
    assert [row[-1] for row in found.rows if row[-1]] == [
        'PKDLoss, share 1',
        'CWDLoss, share 0.5',
    ]


def test_a_share_weighs_any_method_by_its_gradient(files):
    found = plan(*files(), 'pkd', 0.3)
    assert found.rows[0][0] == 'balanced.pkd'
    assert found.rows[0][-1] == 'PKDLoss, share 0.3'
    assert found.config.model.terms.balanced.share == 0.3


@pytest.mark.parametrize(
    ('method', 'share', 'said'),
    [
        ('pkd', 0.0, '--share'),
        ('pkd', -1.0, '--share'),
        ('default', 1.0, 'its own shares'),
        ('default_predicted', 1.0, 'its own shares'),
        ('inherit', 1.0, 'has none'),
    ],
)
def test_a_share_that_would_do_nothing_is_refused(method, share, said):
    with pytest.raises(ValueError, match=said):
        plan('student.py', 'teacher.py', 'teacher.pth', method, share)


def test_a_student_may_begin_with_its_teacher_s_parts(files):
    """Neck and head, which are alike where the backbones are."""
    found = plan(*files(teacher=tiny.retinanet()), 'inherit')
    teacher = found.config.model.teachers.teacher
    assert teacher.inherit == ('neck', 'bbox_head')
    assert not found.config.model.terms.nothing.loss.loss_weight
    found = plan(*files(), 'inherit')  # necks of other widths below
    assert found.config.model.teachers.teacher.inherit == ('bbox_head',)
    with pytest.raises(ValueError, match="'inherit' does not fit"):
        plan(*files(tiny.retinanet(channels=8)), 'inherit')


def test_with_photographs_it_starts_from_a_head_that_means_the_same(files):
    assert 'inherit' not in plan(*files()).config.model.teachers.teacher
    found = plan(*files(), 'default_predicted')
    assert found.config.model.teachers.teacher.inherit == ('bbox_head',)
    detector = MODELS.build(found.config.model)
    detector.init_weights()
    head = detector.teachers['teacher'].detector.bbox_head.state_dict()
    for name, value in detector.bbox_head.state_dict().items():
        assert torch.equal(value, head[name])


def test_a_head_of_more_classes_than_its_teacher_s_is_its_own(files):
    names = ('disc', 'square', 'unheard_of')
    paths = files(meta=dict(dataset_meta=dict(classes=names)))
    found = plan(*paths, 'default_predicted')
    assert any('and not' in one for one in found.notes)
    assert 'inherit' not in found.config.model.teachers.teacher


def test_the_config_is_the_student_s_and_three_keys_more(files):
    student, teacher, weights = files()
    found = plan(student, teacher, weights, 'pkd')
    plain = read_config(student)
    assert student_config(found.config.model) == plain.model
    assert found.config.model.teachers == dict(
        teacher=dict(config=teacher, checkpoint=weights)
    )
    pair = look(plain, read_config(teacher))
    assert found.config.model.terms == recipe('pkd', pair)
    for key in set(plain) - {'model'}:
        assert found.config[key] == plain[key]


def test_a_step_takes_as_long_as_its_arithmetic(files):
    """Three units of the student's own forward pass, one of the teacher's."""
    same = plan(*files(teacher=tiny.retinanet()), 'pkd')
    (note,) = [one for one in same.notes if 'a step is' in one]
    # The teacher stops behind the neck, the student's head runs besides.
    ratio = float(re.search(r'a step is ([\d.]+) times', note)[1])
    assert 1 < ratio < 4 / 3


@pytest.mark.parametrize('method', ['fbkd', 'reviewkd'])
def test_a_batchnorm_counts_one_cell_of_one_image(files, method):
    """The coarsest level of the image that is looked at has one cell."""
    found = plan(*files(), method)
    assert any('multiply-accumulates' in one for one in found.notes)


@pytest.mark.slow
def test_what_fits_can_be_planned(files):
    paths = files()
    student, teacher = map(read_config, paths[:2])
    fits = fitting(
        student, dict(config=paths[1]), look(student, teacher, 'teacher')
    )
    for method, reason in fits.items():
        if reason is None:
            assert plan(*paths, method).config


def test_planning_leaves_the_random_state_alone(files):
    paths = files()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    plan(*paths, 'mgd')
    assert torch.equal(torch.get_rng_state(), before)


# What fits -------------------------------------------------------------------


@pytest.fixture(scope='module')
def fits():
    init_default_scope('mmdet')
    student = Config(dict(model=tiny.faster_rcnn()))
    teacher = dict(config=dict(model=tiny.retinanet(**WIDE)))
    pair = look(student, Config(teacher['config']), 'teacher')
    return fitting(student, teacher, pair)


def test_every_method_is_tried(fits):
    assert list(fits) == list(RECIPES)


@pytest.mark.parametrize('method', ['cwd_scores', 'ld', 'crosskd', 'inherit'])
def test_what_does_not_fit_says_why(fits, method):
    """A two-stage student has no dense head, and the necks differ."""
    assert fits[method]


def test_methods_on_features_fit_unlike_heads(fits):
    on_features = {'mimic', 'at', 'cwd', 'pkd', 'fgd', 'mgd', 'rkd', 'default'}
    assert not [name for name in on_features if fits[name]]


def test_each_tap_is_seen_once_and_nothing_else_changes(fits, monkeypatch):
    """Most methods look at the same maps."""
    student = Config(dict(model=tiny.faster_rcnn()))
    teacher = dict(config=dict(model=tiny.retinanet(**WIDE)))
    pair = look(student, Config(teacher['config']), 'teacher')
    seen = []
    plain = Distilling.dry_step

    def counted(self, images, samples):
        seen.append(tuple(self._student_paths(list(self.terms))))
        return plain(self, images, samples)

    monkeypatch.setattr(Distilling, 'dry_step', counted)
    assert fitting(student, teacher, pair) == fits
    # When it is built, and once for each other set of taps.
    assert len(seen[1:]) == len(set(seen[1:])) < 6
    fitted = [name for name, why in fits.items() if why is None]
    assert len(fitted) > 15


def test_a_detector_that_is_given_proposals_can_be_planned(files):
    fast = tiny.faster_rcnn()
    del fast['rpn_head']
    fast.type = 'FastRCNN'
    del fast.train_cfg['rpn'], fast.train_cfg['rpn_proposal']
    del fast.test_cfg['rpn']
    found = plan(*files(fast))
    assert found.pair.tap == 'neck'
    assert any('a step is' in one for one in found.notes)


def test_what_fits_can_be_built(fits, tmp_path):
    student, teacher = tiny.faster_rcnn(), tiny.retinanet(**WIDE)
    pair = look(dict(model=student), dict(model=teacher), 'teacher')
    for name in ('fgd', 'icd', 'reviewkd'):
        assert fits[name] is None
        one = dict(teacher=dict(config=dict(model=teacher)))
        MODELS.build(tiny.distilled(student, one, recipe(name, pair)))


def test_a_method_that_does_not_fit_names_those_that_do(files):
    with pytest.raises(ValueError, match="'ld' does not fit") as caught:
        plan(*files(), 'ld')
    assert 'reg_max' in str(caught.value)
    named = re.search(r'--method (.*)\.$', str(caught.value))[1].split(', ')
    assert {'pkd', 'cwd_scores', 'crosskd'} <= set(named)
    assert 'ld' not in named
    plan(*files(), named[-2])


def test_an_unknown_method_gets_the_nearest_name(files):
    """At once: no method need be tried for that."""
    with pytest.raises(ValueError, match="'pdk'.*'pkd'") as caught:
        plan(*files(), 'pdk')
    assert 'does not fit' not in str(caught.value)


# Classes ---------------------------------------------------------------------


def said(classes):
    return dict(dataset_meta=dict(classes=classes))


def compared(found):
    return [row[0] for row in found.rows if row[0]]


BOTH = ['default.pkd', 'default.cwd_scores']


def test_classes_of_other_names_leave_features(files):
    """As many of them: shapes alone would not tell."""
    paths = files(meta=said(('one', 'another', 'x', 'y')))
    found = plan(*paths)
    assert compared(found) == ['default.pkd']
    assert 'only methods on features apply' in str(found)
    assert 'classes' not in found.config.model.teachers.teacher
    with pytest.raises(ValueError, match='only methods on features'):
        plan(*paths, 'cwd_scores')


@pytest.mark.parametrize('method', ['predicted', 'maskd'])
def test_without_a_common_class_no_term_compares_any(files, method):
    """Also where nothing but the term itself knows that it does."""
    paths = files(meta=said(('one', 'another', 'x')))
    with pytest.raises(ValueError, match='share none') as caught:
        plan(*paths, method)
    named = str(caught.value).rpartition('--method ')[2]
    assert 'pkd' in named
    assert 'predicted' not in named


def test_heads_of_other_kinds_are_told_of_another_way(files):
    found = str(plan(*files(tiny.faster_rcnn())))
    assert '--method predicted' in found
    assert '--method predicted' not in str(plan(*files()))
    queries = plan(*files(detrs.detr('dab'), detrs.detr('detr', base=16)))
    assert '--method predicted' not in str(queries)
    taps = {row[0]: row[2] for row in queries.rows if row[0]}
    assert taps == {
        'default.pkd': 'neck[0]',
        'default.answers': 'forward_decoder, bbox_head',
    }
    found = plan(*files(tiny.faster_rcnn()), 'predicted')
    assert found.rows[0][:3] == ('predicted', 'neck', 'neck')


def test_classes_in_another_order_are_compared_by_name(files):
    paths = files(meta=said(runs.NAMES[::-1]))
    found = plan(*paths)
    assert compared(found) == BOTH
    assert 'they are compared by name' in str(found)
    assert found.config.model.teachers.teacher.classes == runs.NAMES


def test_a_teacher_of_more_classes_is_cut_to_the_student_s(files):
    """Its head has another size, which a hand-written config would state."""
    more = ('x', *runs.NAMES[1:], 'y', runs.NAMES[0])
    teacher = tiny.retinanet(**WIDE, classes=len(more))
    found = plan(*files(teacher=teacher, meta=said(more)))
    assert compared(found) == BOTH
    model = MODELS.build(found.config.model)
    cut = model.teachers['teacher']
    assert cut.detector.bbox_head.num_classes == len(runs.NAMES)
    model.init_weights()
    assert cut.loaded


def test_of_a_teacher_of_fewer_classes_these_are_compared(files):
    fewer = runs.NAMES[:0:-1]
    teacher = tiny.retinanet(**WIDE, classes=len(fewer))
    paths = files(teacher=teacher, meta=said(fewer))
    found = plan(*paths, 'soft_target')
    assert found.config.model.teachers.teacher.classes == (
        None,
        *runs.NAMES[1:],
    )
    assert f'not ({runs.NAMES[0]})' in str(found)
    term = found.config.model.terms.soft_target
    assert term.loss.num_classes == len(fewer)
    MODELS.build(found.config.model).init_weights()
    with pytest.raises(ValueError, match="'bckd' does not .* all classes"):
        plan(*paths, 'bckd')


def test_what_compares_no_classes_says_nothing_of_them(files):
    """A config states what it needs and no more."""
    found = plan(*files(meta=said(runs.NAMES[::-1])), 'pkd')
    assert 'classes' not in found.config.model.teachers.teacher


def test_a_head_that_is_inherited_has_the_student_s_order(files):
    paths = files(teacher=tiny.retinanet(), meta=said(runs.NAMES[::-1]))
    found = plan(*paths, 'inherit')
    assert found.config.model.teachers.teacher.classes == runs.NAMES
    student = MODELS.build(found.config.model)
    student.init_weights()
    own = student.bbox_head.retina_cls.weight
    state = torch.load(paths[2], weights_only=False)['state_dict']
    assert torch.equal(own, state['bbox_head.retina_cls.weight'].flip(0))


def test_classes_of_weights_that_are_elsewhere_are_the_config_s(files):
    """Nothing is downloaded to plan: the data set of the config names them."""
    student, *_ = files()
    zoo = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    found = plan(student, zoo, method='mimic')
    assert 'tells apart 80 classes, (person, bicycle, car, …)' in str(found)


def test_the_same_classes_are_compared(files):
    found = plan(*files(meta=said(runs.NAMES)))
    assert compared(found) == BOTH
    assert 'classes' not in found.config.model.teachers.teacher


def test_what_cannot_be_counted_is_not_told(files, monkeypatch):
    """Of random weights a second stage may be left without a proposal."""

    def run(*_):
        raise ValueError('expected a non-empty list of Tensors')

    assert 'multiply-accumulates' in str(plan(*files()))
    monkeypatch.setattr('mmkd.plan.run_detector', run)
    found = str(plan(*files()))
    assert 'Terms add no weights.' in found
    assert 'multiply-accumulates' not in found


# Bad input -------------------------------------------------------------------


def test_a_smaller_teacher_is_a_warning(files):
    paths = files(student=tiny.retinanet(**WIDE), teacher=tiny.retinanet())
    assert 'Warning: the teacher has' in str(plan(*paths, 'pkd'))
    assert 'Warning' not in str(plan(*files(), 'pkd'))


def test_a_detector_may_learn_from_itself(files):
    """Trained before, as it has a checkpoint: no mistake, and said."""
    student, _, weights = files(teacher=tiny.retinanet())
    for teacher in (student, files(teacher=tiny.retinanet())[1]):
        found = str(plan(student, teacher, weights, 'pkd'))
        assert 'one and the same detector' in found
        assert 'Warning' not in found
    assert 'the same detector' not in str(plan(*files(), 'pkd'))


def test_weights_of_another_detector_are_refused_before_the_data(files):
    """And of the same one with another head, which says what to type."""
    student, teacher, _ = files()
    _, _, other = files(teacher=tiny.faster_rcnn())
    Config(dict(model=tiny.retinanet(**WIDE))).dump(teacher)
    with pytest.raises(ValueError, match='checkpoint of another detector'):
        plan(student, teacher, other)
    _, _, head = files(teacher=tiny.retinanet(**WIDE, classes=5))
    Config(dict(model=tiny.retinanet(**WIDE))).dump(teacher)
    with pytest.raises(ValueError, match='Only the head differs'):
        plan(student, teacher, head, 'pkd')


def test_a_student_with_teachers_is_refused(files, tmp_path):
    student, teacher, weights = files()
    taught = tmp_path / 'taught.py'
    taught.write_text(plan(student, teacher, weights).text(tmp_path))
    with pytest.raises(ValueError, match='teachers of its own'):
        plan(taught, teacher, weights)


@pytest.mark.parametrize('kind', ['RetinaHead', 'NoSuchKind', None])
def test_a_teacher_of_another_task_is_refused(files, tmp_path, kind):
    student, _, weights = files()
    other = tmp_path / 'other.py'
    Config(dict(model=dict(type=kind, backbone={}))).dump(other)
    with pytest.raises(ValueError, match='teacher must be a detector') as one:
        plan(student, other, weights)
    assert str(kind) in str(one.value)


def test_weights_that_nobody_published_have_to_be_named(files):
    student, teacher, _ = files()
    with pytest.raises(FileNotFoundError, match='--teacher-checkpoint'):
        plan(student, teacher)


def test_published_weights_are_those_of_the_package():
    config = 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'
    address = published_weights(config)
    assert re.match(r'https://.*/retinanet_r101_fpn_1x_coco_\w+-\w+', address)


def test_a_teacher_that_is_not_there_is_named_at_once(files):
    student, _, weights = files()
    with pytest.raises(FileNotFoundError, match='The teacher has no config'):
        plan(student, 'techer.py', weights)
    with pytest.raises(FileNotFoundError, match='The student has no config'):
        plan('studnet.py', student, weights)
    with pytest.raises(FileNotFoundError, match='mmdet::retinanet/nothing'):
        plan(student, 'mmdet::retinanet/nothing.py', weights)
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
        plan(*files()[:2], 'nowhere.pth')


# A detector that nobody has seen ---------------------------------------------


@pytest.fixture
def own():
    """A detector whose kinds no package knows; small images are refused."""
    from mmdet.models import FPN, RetinaHead, RetinaNet

    class Tower(RetinaHead):
        pass

    class Pyramid(FPN):
        pass

    class Own(RetinaNet):
        def extract_feat(self, images):
            if images.shape[-1] < 300:
                raise RuntimeError('selected index k out of range')
            return super().extract_feat(images)

    kinds = (Tower, Pyramid, Own)
    for kind in kinds:
        DETECTORS.register_module(module=kind)
    model = tiny.retinanet()
    model.type = 'Own'
    model.neck.type, model.bbox_head.type = 'Pyramid', 'Tower'
    yield model
    for kind in kinds:
        del DETECTORS._module_dict[kind.__name__]


def test_a_detector_of_the_user_s_own_learns(files, own):
    found = plan(*files(student=own))
    assert [row[0] for row in found.rows if row[0]] == [
        'default.pkd',
        'default.cwd_scores',
    ]
    # By a larger image, as the smallest one is refused.
    assert [row[3] for row in found.rows[:5]] == ['8', '16', '32', '64', '128']
    assert '384 x 384' in found.notes[-1]


# The file --------------------------------------------------------------------


def test_what_is_written_reads_as_the_plan(files, tmp_path):
    found = plan(*files(tiny.faster_rcnn()), 'fgd')
    path = tmp_path / 'deeper' / 'written.py'
    path.parent.mkdir()
    path.write_text(found.text(path.parent))
    assert read_config(path).model == found.config.model
    assert max(map(len, path.read_text().splitlines())) < 200
    assert "_base_ = '../student.py'" in path.read_text()


@pytest.mark.parametrize(
    'value',
    [
        {},
        (),
        (1,),
        dict(a=[], b=(2,), c=None, d='x' * 90),
        dict(a=[dict(b=list(range(40))), 'y' * 60], c=tuple('z' * 50)),
    ],
)
def test_a_value_is_written_as_it_is_typed(value):
    assert eval(written(value)) == value


@pytest.mark.usefixtures('quick_starts')
def test_a_run_by_one_argument_is_that_of_its_file(files, tmp_path, capsys):
    student, *teacher = files()
    named = ['--teacher', teacher[0], '--teacher-checkpoint', teacher[1]]
    own = tmp_path / 'own.py'
    word = ['--method', 'pkd']
    assert not main(
        ['train', student, *named, *word, '--print-config', str(own)]
    )
    assert not main(
        ['train', student, *named, *word, '--work-dir', str(tmp_path / 'a')]
    )
    assert 'PKDLoss, weight 10' in capsys.readouterr().out
    assert not main(['train', str(own), '--work-dir', str(tmp_path / 'b')])
    one, other = (
        torch.load(tmp_path / name / 'epoch_1.pth', weights_only=False)
        for name in 'ab'
    )
    assert one['state_dict'].keys() == other['state_dict'].keys()
    for key, value in one['state_dict'].items():
        assert torch.equal(value, other['state_dict'][key]), key


# Photographs that nobody labelled --------------------------------------------


@pytest.fixture
def scarce(files, data, tmp_path):
    """Two labelled images of six, one tested on; the command to train."""
    student, teacher, weights = files(validate=True)
    config = Config.fromfile(student)
    config.train_dataloader.dataset.indices = [0, 1]
    config.val_dataloader.dataset.indices = [2]
    config.test_dataloader = config.val_dataloader
    config.test_cfg, config.test_evaluator = {}, config.val_evaluator
    config.dump(student)
    return [student, '--teacher', teacher, '--teacher-checkpoint', weights]


def test_photographs_are_half_of_each_batch(scarce, data):
    student, _, teacher, _, weights = scarce
    found = plan(student, teacher, weights, unlabelled=data / 'images')
    loader = found.config.train_dataloader
    plain = read_config(student)
    assert loader.dataset.dataset == plain.train_dataloader.dataset
    assert loader.dataset.without == [plain.val_dataloader.dataset]
    assert loader.sampler == plain.train_dataloader.sampler
    assert 'Half of each batch has no labels' in str(found)
    assert found.config.val_dataloader == plain.val_dataloader


def test_a_file_says_of_photographs_what_the_plan_does(scarce, data, tmp_path):
    student, _, teacher, _, weights = scarce
    found = plan(student, teacher, weights, unlabelled=data / 'images')
    path = tmp_path / 'written.py'
    path.write_text(found.text(tmp_path))
    assert read_config(path).train_dataloader == found.config.train_dataloader
    assert 'dataset=_base_.train_dataloader.dataset' in path.read_text()


def test_a_file_deletes_nothing_that_is_not_there(files, data, tmp_path):
    """Of a base that has no batch sampler."""
    student, teacher, weights = files(iters=2)
    found = plan(student, teacher, weights, unlabelled=data / 'images')
    path = tmp_path / 'written.py'
    path.write_text(found.text(tmp_path))
    assert read_config(path).train_dataloader == found.config.train_dataloader


@pytest.mark.usefixtures('quick_starts')
def test_what_is_trained_on_is_three_photographs_more(
    scarce, data, tmp_path, capsys, monkeypatch
):
    """Of six, two are labelled and one is validated on."""
    seen = []
    step = Distilling.loss

    def watched(self, images, samples):
        seen.append([(one.img_id, labelled(one)) for one in samples])
        return step(self, images, samples)

    monkeypatch.setattr(Distilling, 'loss', watched)
    words = ['--unlabelled', str(data / 'images')]
    words += ['--cfg-options', 'train_cfg.max_epochs=6']
    assert not main(['train', *scarce, *words])
    assert "by 'default_predicted'" in capsys.readouterr().out
    assert len(seen) == 6  # one step an epoch, as of two images alone
    assert all(own[1] and not other[1] for own, other in seen)
    ids = [own[0] for own, _ in seen], [other[0] for _, other in seen]
    assert sorted(ids[0]) == [0, 0, 0, 1, 1, 1]
    names = ['003.png', '004.png', '005.png']
    assert sorted(ids[1]) == sorted(2 * names)


@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        ('detr', r'images are not the first axis .* --method default_pred'),
        # It would ask for boxes to denoise.
        ('dino', 'AttributeError.*bboxes.* --method default_predicted'),
    ],
)
def test_queries_learn_from_photographs_by_what_they_can(
    files, data, kind, said
):
    paths = files(detrs.detr(kind), detrs.detr(kind))
    folder = data / 'images'
    with pytest.raises(ValueError, match=said):
        plan(*paths, 'default', unlabelled=folder)
    found = plan(*paths, 'default_predicted', unlabelled=folder)
    assert [*found.config.model.terms.default.terms] == ['pkd']
    found.config.model.terms.predicted.score_thr = 0.0  # of random weights
    model = MODELS.build(found.config.model)
    model.init_weights()
    images, samples = tiny.batch()
    samples[1].gt_instances = InstanceData()
    losses = model.train().loss(images, samples)
    assert losses['loss_kd_predicted_task'] > 0
    assert losses['loss_kd_default_pkd'] > 0


def test_photographs_that_are_not_there_are_missed_at_once(
    scarce, data, capsys
):
    assert main(['train', *scarce, '--unlabelled', 'nowhere']) == 1
    assert "got 'nowhere', which is none" in capsys.readouterr().err
    words = ['--cfg-options', 'train_dataloader.batch_size=1']
    folder = str(data / 'images')
    assert main(['train', *scarce, '--unlabelled', folder, *words]) == 1
    assert '0 unlabelled of 1' in capsys.readouterr().err


# The command -----------------------------------------------------------------


@pytest.mark.parametrize(
    'word',
    [
        ['--method', 'pkd'],
        ['--share', '1'],
        ['--teacher-checkpoint', 'a.pth'],
        ['--unlabelled', 'photographs'],
        ['--print-config'],
    ],
    ids=lambda word: word[0],
)
def test_words_on_a_teacher_want_one(files, word, capsys):
    assert main(['train', files()[0], *word]) == 1
    assert f'{word[0]} says how a teacher teaches' in capsys.readouterr().err


def test_a_written_config_replaces_none(files, tmp_path, capsys):
    student, teacher, weights = files()
    own = tmp_path / 'own.py'
    command = ['train', student, '--teacher', teacher]
    command += ['--teacher-checkpoint', weights, '--print-config', str(own)]
    assert main(command) == 0
    before = own.read_text()
    assert main(command) == 1
    assert 'Name another file' in capsys.readouterr().err
    assert own.read_text() == before


def test_options_are_known_to_the_plan_and_to_its_file(files, capsys):
    """One class more: the heads' scores have other shapes then."""
    student, teacher, weights = files()
    command = ['train', student, '--teacher', teacher]
    command += ['--teacher-checkpoint', weights, '--print-config']
    option = 'model.bbox_head.num_classes=5'
    later = 'model.teachers.teacher.cache=1.5'
    assert main([*command, '--cfg-options', option, later]) == 0
    printed = capsys.readouterr().out
    path = Path(student).with_name('printed.py')
    path.write_text(printed)
    model = read_config(path).model
    assert list(model.terms.default.terms) == ['pkd']
    assert model.bbox_head.num_classes == 5
    assert model.teachers.teacher.cache == 1.5


def test_what_is_printed_is_a_config_and_nothing_else(files):
    """As a shell sends it to a file."""
    student, teacher, weights = files()
    command = [sys.executable, '-m', 'mmkd.cli', 'train', student]
    command += ['--teacher', teacher, '--teacher-checkpoint', weights]
    done = subprocess.run(
        [*command, '--print-config'], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compile(done.stdout, 'printed.py', 'exec')
    assert 'loaded into' in done.stderr


def test_a_run_has_a_folder_of_its_own(files, monkeypatch, tmp_path):
    from mmkd import cli

    student, teacher, weights = files()
    text = Path(student).read_text()
    Path(student).write_text(re.sub(r'\nwork_dir.*', '', text))
    seen = []
    monkeypatch.setattr(
        'mmkd.engine.preflight.check_training',
        lambda config, data: seen.append(config.work_dir) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        words = ['--teacher-checkpoint', weights, '--method', 'pkd']
        cli.main(['train', student, '--teacher', teacher, *words])
    assert seen == ['work_dirs/student_pkd']

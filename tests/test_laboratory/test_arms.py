import json
from dataclasses import replace

import pytest
import tiny
from mmengine.config import Config

from mmkd.laboratory import arms, digests
from mmkd.laboratory.digests import code_digest
from mmkd.recipes import look


@pytest.fixture(scope='module')
def student():
    return Config(
        dict(
            model=tiny.retinanet(),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=100),
            train_dataloader=dict(dataset=dict(type='CocoDataset')),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            randomness=dict(deterministic=True),
        )
    )


@pytest.fixture(scope='module')
def pair(student):
    return look(student, dict(model=tiny.retinanet(base=16)))


@pytest.fixture(scope='module')
def teacher():
    return dict(config='teacher.py', checkpoint='teacher.pth')


# What arms are ---------------------------------------------------------------


def test_a_distilled_arm_differs_from_alone_in_the_model(
    student, teacher, pair
):
    alone = arms.alone(student).settings.to_dict()
    taught = arms.distilled(student, teacher, pair, 'pkd').settings.to_dict()
    one, other = alone.pop('model'), taught.pop('model')
    (watching,) = taught.pop('custom_hooks')  # takes no part
    assert watching == dict(type='mmkd.DiagnosticsHook', interval=10)
    assert alone == taught
    assert other.pop('student') == one['type']
    assert other.pop('type') == 'mmkd.Distiller'
    del one['type'], other['terms'], other['teachers']
    assert one == other


def test_the_sham_arm_differs_in_what_the_teacher_is_shown(
    student, teacher, pair
):
    real = arms.distilled(student, teacher, pair, 'pkd', 1.0)
    sham = arms.sham(replace(real, step_ratio=1.4), 'sham', sham=True)
    assert (real.kind, sham.kind) == ('distilled', 'sham')
    assert (sham.name, sham.title) == ('pkd_sham', 'pkd, sham')
    assert real.method == sham.method == 'pkd'
    assert sham.step_ratio == 1.4
    one, other = real.settings.to_dict(), sham.settings.to_dict()
    assert other['model']['teachers']['teacher'].pop('sham')
    assert not one['model']['teachers']['teacher'].pop('sham')
    assert one == other


def test_inheriting_alone_is_a_kind_of_its_own(student, teacher, pair):
    arm = arms.distilled(student, teacher, pair, 'inherit')
    assert arm.kind == 'inherited'
    assert arm.settings.model.teachers.teacher.inherit == ('bbox_head',)


def test_the_students_config_is_left_as_it_was(student, teacher, pair):
    before = json.dumps(student.to_dict(), default=str)
    arms.distilled(student, teacher, pair, 'fgd', 1.0)
    arms.same_time(student, 1.5, ['fgd'])
    arms.seeded(arms.alone(student), 3, 2, 10)
    assert json.dumps(student.to_dict(), default=str) == before


def test_a_users_own_config_is_a_method(student, teacher, pair, tmp_path):
    """Its teacher is the comparison's, whatever its name there."""
    file = tmp_path / 'mine.py'
    file.write_text(
        "model = dict(type='mmkd.Distiller', student='RetinaNet',\n"
        "    teachers=dict(big=dict(config='x.py', inherit=('neck',))),\n"
        "    terms=dict(own=dict(type='mmkd.FeatureTerm', teacher='big',\n"
        "        loss=dict(type='mmkd.PKDLoss'))),\n"
        "    phases=[dict(freeze='neck')])\n"
        'optim_wrapper = dict(clip_grad=dict(max_norm=35))\n'
    )
    arm = arms.distilled(student, teacher, pair, str(file))
    assert arm.name == 'mine'
    assert arm.settings.model.terms.own.teacher == 'teacher'
    assert arm.settings.model.phases == [dict(freeze='neck')]
    given = arm.settings.model.teachers.teacher
    assert given.config == 'teacher.py'
    assert given.inherit == ('neck',)
    assert arm.settings.optim_wrapper.clip_grad.max_norm == 35


def test_a_users_own_module_is_imported_and_its_code_counts(
    student, teacher, pair, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    module, config = tmp_path / 'my_own_loss.py', tmp_path / 'mine.py'
    module.write_text('SCALE = 1\n')
    config.write_text(
        "model = dict(type='mmkd.Distiller', student='RetinaNet',\n"
        "    teachers=dict(big=dict(config='x.py')), terms=dict())\n"
        "custom_imports = dict(imports=['my_own_loss'])\n"
    )
    student.custom_imports = dict(imports='json')
    arm = arms.distilled(student, teacher, pair, str(config))
    named = arm.settings.custom_imports['imports']
    assert named == ['json', 'my_own_loss']
    before = code_digest(arm.settings)
    module.write_text('SCALE = 1  # a comment\n')
    digests._meaning.cache_clear()
    assert code_digest(arm.settings) == before
    module.write_text('SCALE = 2\n')
    digests._meaning.cache_clear()
    assert code_digest(arm.settings) != before


def test_a_plain_config_is_no_method(student, teacher, pair, tmp_path):
    file = tmp_path / 'plain.py'
    file.write_text("model = dict(type='RetinaNet')\n")
    with pytest.raises(ValueError, match=r'no distillation config.*recipe'):
        arms.distilled(student, teacher, pair, str(file))


# Longer schedules ------------------------------------------------------------


def schedule(unit, length, *schedulers):
    return Config(
        dict(train_cfg={unit: length}, param_scheduler=list(schedulers))
    )


def test_a_warm_up_keeps_its_length_and_the_rest_is_stretched():
    warm = dict(type='LinearLR', by_epoch=False, begin=0, end=20)
    cosine = dict(
        type='CosineAnnealingLR', by_epoch=False, begin=20, end=100, T_max=80
    )
    longer = arms.stretch(schedule('max_iters', 100, warm, cosine), 1.4)
    one, other = longer.param_scheduler
    assert longer.train_cfg.max_iters == 140
    assert (one.begin, one.end) == (0, 20)
    assert (other.begin, other.end, other['T_max']) == (20, 140, 120)


def test_epochs_are_rounded_up_and_milestones_move():
    steps = dict(
        type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11]
    )
    warm = dict(type='LinearLR', by_epoch=False, begin=0, end=500)
    longer = arms.stretch(schedule('max_epochs', 12, warm, steps), 1.3)
    assert longer.train_cfg.max_epochs == 16  # 15.6
    assert longer.param_scheduler[0].end == 500
    assert longer.param_scheduler[1].end == 16
    assert longer.param_scheduler[1].milestones == [11, 15]  # 10.7, 14.7


def test_the_same_length_is_the_same_schedule():
    cosine = dict(
        type='CosineAnnealingLR', by_epoch=False, begin=0, end=100, T_max=100
    )
    settings = schedule('max_iters', 100, cosine)
    assert arms.stretch(settings, 1.0).to_dict() == settings.to_dict()


# Seeds -----------------------------------------------------------------------


def test_a_seed_fixes_the_labels_in_every_arm(student, teacher, pair):
    one = arms.seeded(arms.alone(student), 1, 5, 50)
    other = arms.seeded(
        arms.distilled(student, teacher, pair, 'pkd'), 1, 5, 50
    )
    indices = one.train_dataloader.dataset.indices
    assert indices == other.train_dataloader.dataset.indices
    assert len(set(indices)) == 5
    assert one.randomness == dict(deterministic=True, seed=1)
    another = arms.seeded(arms.alone(student), 2, 5, 50)
    assert another.train_dataloader.dataset.indices != indices


def test_the_labels_are_chosen_inside_of_wrapped_sets(student):
    wrapped = Config(student.to_dict())
    wrapped.train_dataloader.dataset = dict(
        type='RepeatDataset', dataset=dict(type='CocoDataset')
    )
    arm = arms.alone(wrapped)
    settings = arms.seeded(arm, 0, 3, 10)
    assert len(settings.train_dataloader.dataset.dataset.indices) == 3


def test_more_labels_than_images_is_an_error():
    with pytest.raises(ValueError, match='Ask for 1 to 10'):
        arms.subset(0, 11, 10)


# Images without labels -------------------------------------------------------

LOAD, ANNOTATE, PACK = (
    dict(type=name)
    for name in ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs')
)


@pytest.fixture
def few(student, teacher, pair):
    """A distilled arm with five images a batch."""
    one = Config(student.to_dict())
    one.train_dataloader = dict(
        batch_size=5,
        sampler=dict(type='InfiniteSampler'),
        batch_sampler=dict(type='AspectRatioBatchSampler'),
        dataset=dict(
            type='RepeatDataset',
            dataset=dict(type='CocoDataset', pipeline=[LOAD, ANNOTATE, PACK]),
        ),
    )
    return arms.distilled(one, teacher, pair, 'pkd')


def test_what_has_no_labels_is_the_rest_of_the_training_set(few):
    plain = arms.seeded(few, 1, 4, 10).train_dataloader
    loader = arms.seeded(arms.unlabelled(few), 1, 4, 10).train_dataloader
    known, rest = (one.dataset for one in loader.dataset.datasets)
    assert known.indices == plain.dataset.dataset.indices
    assert sorted([*known.indices, *rest.indices]) == list(range(10))
    assert known.pipeline == [LOAD, ANNOTATE, PACK]
    assert rest.pipeline == [LOAD, PACK]
    assert loader.batch_size == 5
    assert loader.batch_sampler == dict(type='mmkd.PartlyLabelledBatchSampler')
    assert loader.sampler == few.settings.train_dataloader.sampler


def test_it_is_compared_as_a_method_of_its_own(few):
    one = arms.unlabelled(few)
    assert (one.name, one.method) == ('pkd_unlabelled', 'pkd_unlabelled')
    assert one.kind == 'distilled'
    assert one.settings.model == few.settings.model


def test_they_may_lie_in_a_folder_of_their_own(few, tmp_path):
    (tmp_path / 'a.jpg').touch()
    for split in ('val', 'test'):
        few.settings[f'{split}_dataloader'] = dict(
            dataset=dict(ann_file=split)
        )
    plain = arms.seeded(few, 1, 4, 10).train_dataloader
    one = arms.unlabelled(few, str(tmp_path))
    loader = arms.seeded(one, 1, 4, 10).train_dataloader
    assert loader.dataset.dataset == plain.dataset
    assert loader.dataset.unlabelled == str(tmp_path)
    files = [known.ann_file for known in loader.dataset.without]
    assert files == ['val', 'test']
    assert loader.batch_sampler == dict(type='mmkd.PartlyLabelledBatchSampler')
    assert 'unlabelled' not in few.settings.train_dataloader.dataset


def test_a_batch_of_one_image_cannot_be_mixed(few):
    few.settings.train_dataloader = dict(batch_size=1)
    with pytest.raises(ValueError, match='2 or more'):
        arms.unlabelled(few)


def test_a_sampler_that_chooses_images_cannot_be_mixed(few):
    few.settings.train_dataloader.sampler.type = 'ClassAwareSampler'
    with pytest.raises(ValueError, match='the config has a ClassAwareSampler'):
        arms.unlabelled(few)


def test_photographs_of_a_method_s_config_are_told_of(few, tmp_path):
    """They would be left out without a word otherwise."""
    shown = dict(dataset=dict(unlabelled='photographs'))
    Config(dict(train_dataloader=shown)).dump(tmp_path / 'mine.py')
    own = Config.fromfile(tmp_path / 'mine.py')
    with pytest.raises(ValueError, match=r'mine\.py.*--unlabelled photogr'):
        arms._take_the_rest(few.settings, own)

"""What a distilled detector promises, each with a test that can fail."""

import copy

import pytest
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper

from mmkd.losses.pkd import pkd_loss
from mmkd.taps import recording


def train(detector, steps=3, clip=None, seed=11):
    torch.manual_seed(seed)
    optimiser = OptimWrapper(
        torch.optim.SGD(
            detector.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
        ),
        clip_grad=clip,
    )
    detector.train()
    for step in range(steps):
        data = tiny.pixels(*tiny.batch(seed=step))
        log = detector.train_step(data, optimiser)
    return log


def digest(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_identical(one, other):
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert different == []


@pytest.fixture
def student(teachers, terms):
    return tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))


# 1. The teacher is its checkpoint -----------------------------------------


def test_teacher_is_its_checkpoint_before_and_after_training(
    student, teacher_file
):
    saved = torch.load(teacher_file)['state_dict']
    student.init_weights()
    teacher = student.teachers['big'].detector
    assert_identical(saved, digest(teacher))
    train(student)
    assert_identical(saved, digest(teacher))


def test_teacher_gets_no_gradient_and_stays_in_eval_mode(student):
    student.init_weights()
    train(student, steps=1)
    teacher = student.teachers['big'].detector
    student.train()
    assert all(one.grad is None for one in teacher.parameters())
    assert not any(one.requires_grad for one in teacher.parameters())
    assert not any(one.training for one in teacher.modules())


def test_optimiser_state_dict_and_ema_never_see_the_teacher(student):
    student.init_weights()
    teacher = student.teachers['big'].detector
    theirs = {id(one) for one in teacher.parameters()}
    assert theirs.isdisjoint(id(one) for one in student.parameters())
    assert not any('big' in key for key in student.state_dict())
    ema = ExponentialMovingAverage(student)
    assert ema.module.teachers['big'] is student.teachers['big']
    assert theirs.isdisjoint(id(one) for one in ema.parameters())


def test_init_weights_of_an_untrained_teacher_is_never_used(
    student, teacher_file
):
    """Changing the file changes the loss: the file is what teaches."""
    student.init_weights()
    images, samples = tiny.batch()
    before = student.loss(images, samples)['loss_kd_pkd']
    with torch.no_grad():
        for one in student.teachers['big'].detector.neck.parameters():
            one.normal_()
    after = student.loss(images, samples)['loss_kd_pkd']
    assert (before - after).abs() > 1e-3


def test_teacher_sees_images_in_its_own_normalisation(teachers, terms):
    other = dict(
        type='DetDataPreprocessor',
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 2.0, 3.0],
        bgr_to_rgb=False,
        pad_size_divisor=32,
    )
    teachers['big']['config'] = dict(
        model=tiny.retinanet(base=16, pixels=other)
    )
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    student.teachers.load()
    teacher = student.teachers['big']
    seen = []
    handle = teacher.detector.backbone.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    data = tiny.pixels(*tiny.batch())
    expected = teacher.detector.data_preprocessor(
        copy.deepcopy(data), training=True
    )['inputs']
    processed = student.data_preprocessor(data, training=True)
    student.loss(processed['inputs'], processed['data_samples'])
    handle.remove()
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-4)
    assert (seen[0][1, :, 96:] == 0).all(), 'the border is zero again'


def test_partly_matching_file_is_an_error_that_counts(teachers, terms):
    teachers['big']['config'] = dict(model=tiny.retinanet(base=16, classes=5))
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    before = digest(student.teachers['big'].detector)
    with pytest.raises(ValueError, match='2 have another shape') as error:
        student.init_weights()
    assert 'num_classes' in str(error.value)
    assert_identical(before, digest(student.teachers['big'].detector))


def test_checkpoint_of_another_architecture_is_an_error(
    teachers, terms, tmp_path
):
    file = tiny.save_teacher(tiny.faster_rcnn(), tmp_path / 'faster.pth')
    teachers['big']['checkpoint'] = str(file)
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    with pytest.raises(ValueError, match='another detector'):
        student.init_weights()


def test_missing_checkpoint_stops_training_but_not_inference(teachers, terms):
    teachers['big']['checkpoint'] = 'no/such/file.pth'
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    images, samples = tiny.batch()
    student.eval()
    assert len(student.predict(images, samples)) == 2
    with pytest.raises(FileNotFoundError, match=r'no/such/file\.pth'):
        student.init_weights()
    with pytest.raises(FileNotFoundError, match=r'teachers\.big\.checkpoint'):
        student.loss(images, samples)


# 2. The teacher runs as far as asked --------------------------------------


def test_neck_tap_never_runs_the_head(student, monkeypatch):
    student.init_weights()
    teacher = student.teachers['big'].detector

    def forbidden(*args):
        raise AssertionError('the head of the teacher ran')

    monkeypatch.setattr(teacher.bbox_head, 'forward', forbidden)
    monkeypatch.setattr(teacher.bbox_head, 'forward_single', forbidden)
    losses = student.loss(*tiny.batch())
    assert losses['loss_kd_pkd'].isfinite()


def test_backbone_tap_never_runs_the_neck(teachers, terms, monkeypatch):
    terms['pkd'].update(tap='backbone.layer2', levels=None)
    terms['pkd']['align'] = dict(
        type='mmkd.ConvAdapt', in_channels=16, out_channels=32, num_levels=1
    )
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    student.teachers.load()
    teacher = student.teachers['big'].detector

    def forbidden(*args):
        raise AssertionError('the neck of the teacher ran')

    monkeypatch.setattr(teacher.neck, 'forward', forbidden)
    assert student.loss(*tiny.batch())['loss_kd_pkd'].isfinite()


def test_teacher_builds_no_graph(student, monkeypatch):
    student.init_weights()
    teacher = student.teachers['big']
    run, records = teacher.run, []
    monkeypatch.setattr(
        teacher,
        'run',
        lambda *args, **kwargs: (
            records.append(run(*args, **kwargs)) or records[-1]
        ),
    )
    student.loss(*tiny.batch())
    assert len(records) == 1
    assert not any(one.requires_grad for one in records[0].at('neck'))


def test_idle_term_runs_no_teacher(teachers, terms, monkeypatch):
    terms['pkd']['schedule'] = dict(type='mmkd.StopAfter', fraction=0.0)
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    student.teachers.load()
    monkeypatch.setattr(
        student.teachers['big'], 'run', lambda *_: pytest.fail('it ran')
    )
    assert student.loss(*tiny.batch())['loss_kd_pkd'] == 0


@pytest.mark.parametrize('progress', [0.0, 0.3, 0.6, 0.9])
def test_a_teacher_runs_in_the_steps_in_which_a_term_asks_it(
    teachers, terms, hub, progress
):
    """Each by itself: one is asked first, the other later."""
    teachers['other'] = copy.deepcopy(teachers['big'])
    terms['late'] = dict(terms['pkd'], teacher='other')
    terms['pkd']['schedule'] = dict(type='mmkd.StopAfter', fraction=0.5)
    terms['late']['schedule'] = dict(type='mmkd.Between', begin=0.2, end=0.8)
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    student.teachers.load()
    ran = []
    for name, teacher in student.teachers.items():
        plain = teacher.detector._forward
        teacher.detector._forward = lambda *given, name=name, run=plain: (
            ran.append(name) or run(*given)
        )
    hub.update_info('max_iters', 10)
    hub.update_info('iter', round(10 * progress))
    student.loss(*tiny.batch())
    wanted = dict(big=progress < 0.5, other=0.2 <= progress < 0.8)
    assert ran == [name for name, runs in wanted.items() if runs]


def saved(detector):
    """Bytes that a step keeps for its backward pass, besides weights."""
    weights = {
        one.untyped_storage().data_ptr() for one in detector.parameters()
    }
    kept = {}  # holds them, or their places would be given away

    def keep(one):
        storage = one.untyped_storage()
        kept[storage.data_ptr()] = storage
        return one

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one)
    with hooks:
        detector.train().loss(*tiny.batch())
    return sum(
        one.nbytes() for place, one in kept.items() if place not in weights
    )


@pytest.mark.parametrize('base', [16, 48])
@pytest.mark.parametrize(
    ('loss', 'maps'),
    [
        # The teacher's map; the student's is kept by its own head.
        ('MimicLoss', 1),
        # The student's less its mean, and both of unit deviation.
        ('PKDLoss', 3),
    ],
)
def test_beside_the_student_s_own_memory_are_tapped_maps_alone(
    tmp_path, terms, base, loss, maps
):
    """However wide the teacher is; 4 KiB are let for sums and masks."""
    wide = tiny.retinanet(base=base)
    file = tiny.save_teacher(wide, tmp_path / 'wide.pth')
    big = dict(config=dict(model=wide), checkpoint=str(file))
    terms['pkd']['loss'] = dict(type=f'mmkd.{loss}')
    student = tiny.build(
        tiny.distilled(tiny.retinanet(), dict(big=big), terms)
    )
    student.teachers.load()
    with torch.no_grad():
        images, _ = tiny.batch()
        tapped = student.teachers['big'].detector.extract_feat(images)[:3]
    room = sum(one.numel() * one.element_size() for one in tapped)
    more = saved(student) - saved(tiny.build(tiny.retinanet()))
    assert room <= more <= maps * room + 4096


# 3. The checkpoint is the student -----------------------------------------


def test_checkpoint_loads_in_the_plain_student(teachers, terms):
    terms['pkd']['align'] = dict(
        type='mmkd.ConvAdapt', in_channels=16, out_channels=16
    )
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    plain = tiny.build(tiny.retinanet(), seed=5)
    report = plain.load_state_dict(student.state_dict(), strict=False)
    assert report.missing_keys == []
    assert report.unexpected_keys
    assert all(key.startswith('terms.') for key in report.unexpected_keys)
    images, samples = tiny.batch()
    one, other = (
        detector.eval().predict(images, copy.deepcopy(samples))
        for detector in (student, plain)
    )
    for a, b in zip(one, other):
        torch.testing.assert_close(
            a.pred_instances.bboxes, b.pred_instances.bboxes, rtol=0, atol=0
        )
        torch.testing.assert_close(
            a.pred_instances.scores, b.pred_instances.scores, rtol=0, atol=0
        )


def test_distilled_detector_is_still_its_own_class(student):
    plain = tiny.build(tiny.retinanet())
    assert isinstance(student, type(plain))
    names = [name for name, _ in plain.named_modules()]
    assert [
        name for name, _ in student.named_modules() if 'terms' not in name
    ] == names


def test_layer_decay_groups_the_student_as_it_would_alone(student):
    from mmdet.engine.optimizers.layer_decay_optimizer_constructor import (
        get_layer_id_for_convnext,
    )

    plain = tiny.build(tiny.retinanet())
    for name, _ in plain.named_parameters():
        assert name in dict(student.named_parameters())
        assert get_layer_id_for_convnext(name, 12) >= 0


# 4. Weight zero is plain training ------------------------------------------


@pytest.mark.parametrize('clip', [None, dict(max_norm=1.0)])
def test_weight_zero_equals_plain_training_bit_for_bit(teachers, terms, clip):
    terms['pkd']['loss']['loss_weight'] = 0.0
    terms['mgd'] = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        levels=(0, 1),
        loss=dict(type='mmkd.MGDLoss', channels=16, loss_weight=0.0),
    )
    settings = tiny.retinanet()
    settings.backbone.plugins = None
    plain = tiny.build(settings)
    plain.init_weights()  # draws from where building left the stream
    student = tiny.build(tiny.distilled(settings, teachers, terms))
    student.init_weights()
    train(plain, clip=clip)
    train(student, clip=clip)
    trained = digest(student)
    own = digest(plain)
    assert_identical(own, {key: trained[key] for key in own})


def test_checking_the_pair_leaves_the_terms_as_built(teachers, terms):
    terms['pkd']['align'] = dict(
        type='mmkd.ConvAdapt', in_channels=16, out_channels=16, norm=True
    )
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    means = [
        value
        for key, value in student.state_dict().items()
        if key.endswith('running_mean')
    ]
    assert means
    assert all((one == 0).all() for one in means)
    assert student.terms.training


def test_terms_that_draw_random_numbers_leave_the_stream_alone(
    teachers, terms
):
    terms['pkd']['loss'] = dict(type='mmkd.MGDLoss', channels=16)
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    student.teachers.load()
    images, samples = tiny.batch()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    student.loss(images, samples)
    assert torch.equal(torch.rand(3), expected)


# The share of the loss is the equation -------------------------------------


def test_share_is_the_sum_over_levels_of_the_loss(student):
    student.init_weights()
    images, samples = tiny.batch()
    teacher = student.teachers['big'].detector
    with torch.no_grad():
        theirs = teacher.extract_feat(images)
    with recording(student, ['neck']) as record:
        losses = student.loss(images, samples)
    own = record.at('neck')
    expected = 2 * sum(pkd_loss(own[i], theirs[i]) for i in range(3))
    torch.testing.assert_close(losses['loss_kd_pkd'], expected)


def test_distillation_alone_moves_the_backbone(student):
    student.init_weights()
    student.train()
    student.loss(*tiny.batch())['loss_kd_pkd'].backward()
    assert student.backbone.conv1.weight.grad.abs().sum() > 0
    assert student.bbox_head.retina_cls.weight.grad is None


def test_whole_config_as_student_is_the_same_detector(teachers, terms):
    beside = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    inside = tiny.build(
        ConfigDict(
            type='mmkd.Distiller',
            student=tiny.retinanet(),
            teachers=teachers,
            terms=terms,
        )
    )
    assert_identical(digest(beside), digest(inside))


def test_image_without_boxes_is_finite(student):
    student.init_weights()
    images, samples = tiny.batch(boxes=0)
    assert tiny.total(student.loss(images, samples)).isfinite()


# Inheriting ------------------------------------------------------------------


def test_inheriting_copies_neck_and_head_and_nothing_else(teachers, terms):
    teachers['big'] = dict(
        config=dict(model=tiny.retinanet(depth=34)),
        checkpoint=teachers['big']['checkpoint'],
        inherit=True,
    )
    teachers['big']['checkpoint'] = _deeper_teacher(teachers)
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    torch.manual_seed(0)
    student.init_weights()
    teacher = student.teachers['big'].detector
    for part in ('neck', 'bbox_head'):
        assert_identical(
            digest(getattr(student, part)), digest(getattr(teacher, part))
        )
    own = student.backbone.conv1.weight
    assert not torch.equal(own, teacher.backbone.conv1.weight)


def _deeper_teacher(teachers):
    from pathlib import Path

    folder = Path(teachers['big']['checkpoint']).parent
    return str(tiny.save_teacher(tiny.retinanet(depth=34), folder / 'r34.pth'))


def test_inheriting_parts_that_differ_is_an_error(teachers, terms):
    teachers['big']['inherit'] = True
    with pytest.raises(ValueError, match="cannot inherit 'neck'") as told:
        tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    assert "inherit=('bbox_head',), which fits" in str(told.value)
    teachers['big']['inherit'] = ('bbox_head',)
    tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))


def test_where_no_part_fits_none_is_proposed(teachers, terms):
    teachers['big']['inherit'] = True
    student = tiny.retinanet(channels=8)
    with pytest.raises(ValueError, match='differ.*Set inherit=False') as told:
        tiny.build(tiny.distilled(student, teachers, terms))
    assert 'which fits' not in str(told.value)


# 6. Mistakes fail while the model is built -----------------------------------


def broken(teachers, terms, error=ValueError, match='', **change):
    terms['pkd'].update(change)
    with pytest.raises(error, match=match):
        tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))


def test_misspelt_tap_suggests_the_nearest(teachers, terms):
    broken(
        teachers, terms, match="'nek' to tap. Did you mean 'neck'", tap='nek'
    )


def test_misspelt_tap_names_the_term(teachers, terms):
    broken(teachers, terms, match="Term 'pkd'", tap='nek')


def test_misspelt_teacher_suggests_the_nearest(teachers, terms):
    broken(teachers, terms, match="Did you mean 'big'", teacher='bigg')


def test_misspelt_loss_suggests_the_nearest(teachers, terms):
    broken(
        teachers,
        terms,
        match="Did you mean 'mmkd.PKDLoss'",
        loss=dict(type='mmkd.PKDLos'),
    )


def test_misspelt_argument_names_the_place(teachers, terms):
    broken(
        teachers,
        terms,
        match='loss_wieght',
        loss=dict(type='mmkd.PKDLoss', loss_wieght=1.0),
    )


def test_level_out_of_range_names_the_range(teachers, terms):
    broken(teachers, terms, match='levels 0 to 4', levels=(4, 5))


def test_channels_that_differ_name_the_adapter(teachers, terms):
    broken(
        teachers,
        terms,
        match="ConvAdapt', in_channels=8, out_channels=16",
        tap='backbone',
        levels=(0,),
    )


def test_strides_that_differ_are_noticed(teachers, terms):
    broken(teachers, terms, match='Only the size', teacher_levels=(1, 2, 3))


def test_teacher_config_that_does_not_exist(teachers, terms):
    teachers['big']['config'] = 'mmdet::retinanet/retinanet_r5O_fpn_1x_coco.py'
    broken(teachers, terms, FileNotFoundError, 'retinanet_r50_fpn_1x_coco.py')


def test_no_terms_is_an_error(teachers):
    with pytest.raises(ValueError, match='at least one term'):
        tiny.build(tiny.distilled(tiny.retinanet(), teachers, {}))


def test_class_lists_in_another_order_stop_the_training(
    teachers, terms, teacher_file, tmp_path, monkeypatch
):
    file = tiny.save_teacher(
        tiny.retinanet(base=16),
        tmp_path / 'named.pth',
        meta=dict(dataset_meta=dict(classes=('cat', 'dog', 'cow'))),
    )
    teachers['big']['checkpoint'] = str(file)
    terms['pkd'].update(tap='bbox_head', output=0)
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    from mmkd.distillers import distiller

    monkeypatch.setattr(
        distiller, 'training_classes', lambda: ('dog', 'cat', 'cow')
    )
    with pytest.raises(ValueError, match="first differ at 0.*'cat'.*'dog'"):
        student.loss(*tiny.batch())


# A loss that is not a number -------------------------------------------------


def test_nan_stops_before_the_next_step_and_before_saving(
    student, monkeypatch
):
    # Another test's training may have left its place behind.
    monkeypatch.setattr('mmkd.distillers.distiller.position', lambda: (0, 0.0))
    student.init_weights()
    images, samples = tiny.batch()
    with torch.no_grad():
        student.teachers['big'].detector.neck.fpn_convs[0].conv.weight.fill_(
            float('nan')
        )
    student.loss(images, samples)
    with pytest.raises(FloatingPointError, match='loss_kd_pkd = nan'):
        student.state_dict()
    with pytest.raises(FloatingPointError, match='iteration 1'):
        student.loss(images, samples)


def test_a_level_that_is_no_number_is_named_in_its_own_step_alone(student):
    student.init_weights()
    term = student.terms['pkd']
    plain = term.losses[1].forward
    term.losses[1].forward = lambda *given: plain(*given) * float('nan')
    student.check_pair()  # as while it is built
    assert term.by_level == {}
    del term.losses[1].forward
    student.loss(*tiny.batch())
    student._guard.check()
    term.losses[1].forward = lambda *given: plain(*given) * float('nan')
    student.loss(*tiny.batch())
    assert term.by_level == {}
    with pytest.raises(FloatingPointError, match='term pkd at level 1 = nan'):
        student._guard.check()


def test_a_copy_of_a_student_has_no_witness(student):
    student._guard.witness = print
    assert copy.deepcopy(student)._guard.witness is None


def test_bare_names_resolve_in_mmdet():
    assert MODELS.build(dict(type='PKDLoss')).loss_weight == 1.0
    assert MODELS.build(dict(type='mmkd.PKDLoss')).loss_weight == 1.0

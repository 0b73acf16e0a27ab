"""SimKD: the head is the teacher's, and stays it."""

import copy

import families
import heads
import pytest
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmkd.configs import read_config, student_config
from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.simkd import SimKDTerm

LEVELS = 5
ADAM = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=0.01))
PHASE = dict(train=('backbone', 'neck'), supervised=False)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def projected(model, channels=16, **settings):
    """A student whose neck ends in a projector."""
    return ConfigDict(
        model,
        neck=[
            model.neck,
            dict(
                type='mmkd.SimKDProjector',
                in_channels=model.neck.out_channels,
                out_channels=channels,
                num_levels=model.neck.num_outs,
                **settings,
            ),
        ],
    )


def deep(model, convs=2):
    model.bbox_head.stacked_convs = convs
    return model


def narrow(model, channels=8):
    """A student whose neck is narrower than the head that it reuses."""
    model = copy.deepcopy(model)
    model.neck.out_channels = channels
    return model


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Teachers with random weights, by name."""
    folder = tmp_path_factory.mktemp('teachers')
    models = dict(
        retinanet=deep(tiny.retinanet(base=16)),
        faster=tiny.faster_rcnn(base=16),
    )
    return {
        name: dict(
            config=dict(model=model),
            checkpoint=str(tiny.save_teacher(model, folder / f'{name}.pth')),
        )
        for name, model in models.items()
    }


def config(
    files, student=None, teacher='retinanet', inherit='bbox_head', **term
):
    settings = dict(phases=[PHASE])
    settings.update(term.pop('model', {}))
    return tiny.distilled(
        student or projected(narrow(deep(tiny.retinanet()))),
        dict(big=dict(files[teacher], inherit=inherit)),
        dict(simkd=dict(type='mmkd.SimKDTerm', teacher='big', **term)),
        **settings,
    )


def built(config, seed=0):
    torch.manual_seed(seed)
    student = MODELS.build(config)
    student.init_weights()
    return student.train()


def faster(files):
    return config(
        files,
        student=projected(narrow(tiny.faster_rcnn())),
        teacher='faster',
        inherit=('rpn_head', 'roi_head'),
        reuse=('rpn_head', 'roi_head'),
    )


def late(files, reuse_from=1, **settings):
    """Reused from a convolution on: those before it project."""
    towers = ('cls_convs', 'reg_convs')
    return config(
        files,
        student=deep(tiny.retinanet()),
        inherit=[
            *(
                f'bbox_head.{tower}.{conv}'
                for tower in towers
                for conv in range(reuse_from, 2)
            ),
            'bbox_head.retina_cls',
            'bbox_head.retina_reg',
        ],
        reuse_from=reuse_from,
        model=dict(
            phases=[
                dict(
                    train=(
                        'backbone',
                        'neck',
                        *(
                            f'bbox_head.{tower}.{conv}'
                            for tower in towers
                            for conv in range(reuse_from)
                        ),
                    ),
                    supervised=False,
                )
            ]
        ),
        **settings,
    )


def head_state(detector):
    return {
        key: one.clone()
        for key, one in detector.state_dict().items()
        if 'head' in key
    }


def teacher_maps(student, images):
    big = student.teachers['big'].detector
    return big, tuple(one.clone() for one in big.extract_feat(images))


def assert_same_detections(student, other, images, samples):
    with torch.no_grad():
        found, expected = (
            one.predict(images, copy.deepcopy(samples))
            for one in (student, other)
        )
    for one, same in zip(found, expected):
        one, same = one.pred_instances, same.pred_instances
        assert len(one) > 0
        assert torch.equal(one.bboxes, same.bboxes)
        assert torch.equal(one.scores, same.scores)
        assert torch.equal(one.labels, same.labels)


# The loss --------------------------------------------------------------------


def test_it_is_the_mean_squared_error_of_the_maps_summed_over_levels(files):
    student = built(config(files)).eval()
    images, samples = tiny.batch()
    (share,) = student.loss(images, samples).values()
    _, wanted = teacher_maps(student, images)
    expected = sum(
        (one - other).square().mean()
        for one, other in zip(student.extract_feat(images), wanted)
    )
    torch.testing.assert_close(share, expected)


@pytest.mark.parametrize('make', [config, faster])
def test_with_the_teachers_maps_its_detections_and_no_loss(
    files, make, monkeypatch
):
    """The projector is made to say what the teacher's neck says."""
    student = built(make(files)).eval()
    images, samples = tiny.batch()
    big, maps = teacher_maps(student, images)
    monkeypatch.setattr(student.neck[1], 'forward', lambda *_: maps)
    with torch.no_grad():
        (share,) = student.loss(images, samples).values()
    assert share == 0
    assert_same_detections(student, big, images, samples)
    off = tuple(one + 0.1 for one in maps)
    monkeypatch.setattr(student.neck[1], 'forward', lambda *_: off)
    with torch.no_grad():
        (share,) = student.loss(images, samples).values()
    assert share.item() == pytest.approx(0.01 * LEVELS, rel=1e-3)


@pytest.mark.parametrize(
    'family',
    [heads.gfl, heads.atss, heads.fcos, families.yolox, families.rtmdet],
)
def test_heads_of_other_families_are_reused_as_well(
    family, tmp_path, monkeypatch
):
    big, small = (ConfigDict(family(base)) for base in (16, 8))
    one = dict(
        config=dict(model=big),
        checkpoint=str(tiny.save_teacher(big, tmp_path / 'big.pth')),
    )
    model = ConfigDict(
        big, backbone=small.backbone, neck=dict(small.neck, out_channels=8)
    )
    projector = dict(
        type='mmkd.SimKDProjector',
        in_channels=8,
        out_channels=big.neck.out_channels,
        num_levels=big.neck.get('num_outs', 3),
    )
    model.neck = [model.neck, projector]
    student = built(config(dict(retinanet=one), student=model)).eval()
    images, samples = tiny.batch()
    assert student.loss(images, samples)['loss_kd_simkd'] > 0
    teacher, maps = teacher_maps(student, images)
    monkeypatch.setattr(student.neck[1], 'forward', lambda *_: maps)
    assert_same_detections(student, teacher, images, samples)


def detr(base, layers):
    """DETR, whose decoder reads the memory of its encoder."""
    model = read_config('mmdet::detr/detr_r50_8xb2-150e_coco.py').model
    model.backbone.update(
        depth=18,
        base_channels=base,
        stem_channels=base,
        frozen_stages=-1,
        init_cfg=None,
    )
    model.neck.in_channels = [8 * base]
    model.num_queries = model.test_cfg.max_per_img = 10
    model.bbox_head.num_classes = tiny.CLASSES
    model.encoder.num_layers, model.decoder.num_layers = layers, 1
    return model


def test_a_decoder_is_reused_behind_an_encoder_that_imitates(
    tmp_path, hub, monkeypatch
):
    # DETR's head changes the config that it is built from.
    file = tiny.save_teacher(detr(16, layers=2), tmp_path / 'detr.pth')
    one = dict(config=dict(model=detr(16, layers=2)), checkpoint=str(file))
    parts = ('decoder', 'query_embedding', 'bbox_head')
    student = built(
        config(
            dict(retinanet=one),
            student=detr(8, layers=1),
            inherit=parts,
            reuse=parts,
            tap='encoder',
            model=dict(
                phases=[
                    dict(
                        train=('backbone', 'neck', 'encoder'),
                        supervised=False,
                    )
                ]
            ),
        )
    )
    optimiser = build_optim_wrapper(student, ADAM)
    student.train_step(tiny.pixels(*tiny.batch()), optimiser)
    big = student.teachers['big'].detector
    own, given = student.state_dict(), big.state_dict()
    same = [key for key in given if key.startswith(parts)]
    assert len(same) > 20
    assert all(torch.equal(own[key], given[key]) for key in same)
    with recording(big, ['encoder']) as record, torch.no_grad():
        run_detector(big, *tiny.batch())
    memory = record.at('encoder')
    monkeypatch.setattr(student.encoder, 'forward', lambda **_: memory)
    student.eval()
    assert_same_detections(student, big, *tiny.batch())
    with torch.no_grad():
        assert student.loss(*tiny.batch())['loss_kd_simkd'] == 0


def test_labels_do_not_matter(files):
    student = built(config(files)).eval()
    images, samples = tiny.batch()
    found = student.loss(images, samples)
    for one in samples:
        del one.gt_instances, one.ignored_instances
    assert student.loss(images, samples) == found
    assert list(found) == ['loss_kd_simkd']


def test_where_objects_are_may_count_more(files):
    weight = dict(type='mmkd.ScoreWeight')
    loss = dict(type='mmkd.WeightedMSELoss')
    student = built(config(files, weight=weight, loss=loss)).eval()
    images, samples = tiny.batch(shapes=((128, 128), (128, 128)))
    (share,) = student.loss(images, samples).values()
    big, maps = teacher_maps(student, images)
    scores = [one.sigmoid().amax(1, True) for one in big.bbox_head(maps)[0]]
    expected = 0
    for own, other, score in zip(student.extract_feat(images), maps, scores):
        error = (own - other).square().mean(1, keepdim=True)
        expected += (score * error).sum() / score.sum()
    torch.testing.assert_close(share, expected)


# The head --------------------------------------------------------------------


@pytest.mark.parametrize('make', [config, faster])
def test_the_head_is_the_teachers_before_and_after_training(files, make, hub):
    student = built(make(files))
    given = head_state(student.teachers['big'].detector)
    optimiser = build_optim_wrapper(student, ADAM)
    hub.update_info('max_iters', 8)
    before = {k: one.clone() for k, one in student.state_dict().items()}
    for iteration in range(4):
        hub.update_info('iter', iteration)
        student.train_step(tiny.pixels(*tiny.batch()), optimiser)
    after = student.state_dict()
    own = head_state(student)
    assert own.keys() == given.keys()
    assert all(torch.equal(own[key], given[key]) for key in given)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    for part in ('backbone.', 'neck.0.', 'neck.1.'):
        assert any(key.startswith(part) for key in moved)
    assert any(
        key.startswith('neck.1.') and key.endswith('running_mean')
        for key in moved
    )


def test_what_is_deployed_is_the_plain_student_with_the_teachers_head(files):
    """Head and projector are in the checkpoint, the teacher is not."""
    whole = config(files)
    student = built(whole).eval()
    plain = MODELS.build(student_config(whole))
    state = {
        key: one
        for key, one in student.state_dict().items()
        if not key.startswith('terms.')
    }
    assert plain.load_state_dict(state, strict=True)
    assert not any('big' in key for key in state)
    assert_same_detections(plain.eval(), student, *tiny.batch())


def test_once_it_has_learnt_only_the_teachers_head_says_what_it_says(
    files, hub
):
    """Another head on the same maps does not."""
    student = built(config(files))
    optimiser = build_optim_wrapper(student, ADAM)
    batch = tiny.pixels(*tiny.batch())
    inputs = student.data_preprocessor(batch)['inputs']
    big = student.teachers['big'].detector
    with torch.no_grad():
        wanted = big.bbox_head(big.extract_feat(inputs))[0]

    def distance(head):
        with torch.no_grad():
            found = head(student.extract_feat(inputs))[0]
        return sum(
            (one - other).square().mean() for one, other in zip(found, wanted)
        )

    start = distance(student.bbox_head)
    losses = [
        student.train_step(batch, optimiser)['loss_kd_simkd']
        for _ in range(25)
    ]
    assert losses[-1] < 0.7 * losses[0]
    end = distance(student.bbox_head)
    assert end < 0.7 * start
    other = tiny.build(deep(tiny.retinanet()), seed=5).bbox_head
    assert distance(other) > 2 * end


def test_a_head_that_is_trained_is_refused(files):
    for model in (
        dict(phases=None),
        dict(phases=[dict(supervised=False)]),
        dict(
            phases=[dict(train=('backbone', 'neck', 'bbox_head.retina_reg'))]
        ),
    ):
        student = built(config(files, model=model))
        with pytest.raises(ValueError, match=r"train=\('backbone', 'neck'\)"):
            student.loss(*tiny.batch())


def test_with_labels_the_detection_loss_counts_as_well(files):
    phase = dict(PHASE, supervised=True)
    student = built(config(files, model=dict(phases=[phase])))
    losses = student.loss(*tiny.batch())
    assert {'loss_cls', 'loss_bbox', 'loss_kd_simkd'} == set(losses)


@pytest.mark.parametrize('inherit', [False, ['bbox_head.retina_cls']])
def test_a_head_of_its_own_is_refused(files, inherit):
    with pytest.raises(ValueError, match="inherit='bbox_head'"):
        built(config(files, inherit=inherit))


def change(part, **settings):
    def changed(model):
        model = copy.deepcopy(model)
        place = model
        for name in part.split('.'):
            place = place[name]
        place.update(settings)
        return model

    return changed


@pytest.mark.parametrize(
    ('changed', 'named'),
    [
        (
            change('bbox_head.anchor_generator', octave_base_scale=3),
            'prior_generator.octave_base_scale',
        ),
        (
            change('bbox_head.anchor_generator', strides=[4, 8, 16, 32, 64]),
            'prior_generator.strides',
        ),
        (
            change('bbox_head.bbox_coder', target_stds=[0.1, 0.1, 0.2, 0.2]),
            'bbox_coder.stds',
        ),
        (
            change('bbox_head.bbox_coder', type='LegacyDeltaXYWHBBoxCoder'),
            'bbox_coder.type',
        ),
        (change('bbox_head', reg_decoded_bbox=True), 'reg_decoded_bbox'),
        (change('bbox_head', type='PISARetinaHead'), 'type'),
    ],
)
def test_a_head_that_would_read_boxes_otherwise_is_refused(
    files, changed, named
):
    student = projected(changed(deep(tiny.retinanet())))
    with pytest.raises(ValueError, match=rf'bbox_head\.{named} is .+ Take'):
        MODELS.build(config(files, student=student))


@pytest.mark.parametrize(
    'setting',
    [dict(stacked_convs=3), dict(num_classes=4), dict(feat_channels=8)],
)
def test_a_head_of_other_shapes_is_refused(files, setting):
    student = projected(change('bbox_head', **setting)(deep(tiny.retinanet())))
    with pytest.raises(ValueError, match="cannot inherit 'bbox_head'"):
        MODELS.build(config(files, student=student))


def test_what_only_losses_know_may_differ(files):
    model = deep(tiny.retinanet())
    model.bbox_head.loss_cls.gamma = 1.5
    built(config(files, student=projected(model)))


def test_classes_must_mean_the_same_unless_only_proposals_are_reused():
    assert SimKDTerm('big').compares_classes()
    assert SimKDTerm('big', reuse=('rpn_head', 'roi_head')).compares_classes()
    assert not SimKDTerm('big', reuse='rpn_head').compares_classes()


def test_a_part_that_one_lacks_is_named(files):
    with pytest.raises(ValueError, match="no such part.+mean 'bbox_head'"):
        MODELS.build(config(files, reuse='box_head'))
    with pytest.raises(ValueError, match="teacher 'big' has no such part"):
        MODELS.build(
            config(
                files,
                student=projected(tiny.faster_rcnn()),
                inherit=False,
                reuse=('rpn_head', 'roi_head'),
            )
        )


def test_a_neck_that_the_head_cannot_read_names_the_projector(files):
    wide = projected(deep(tiny.retinanet()), channels=24)
    with pytest.raises(ValueError, match='Set out_channels=16 in mmkd.SimKD'):
        MODELS.build(config(files, student=wide))
    coarse = projected(deep(tiny.retinanet()), pool=2)
    with pytest.raises(ValueError, match='sizes that the head.+Set pool='):
        MODELS.build(config(files, student=coarse))


# From a convolution on -------------------------------------------------------


def test_from_a_convolution_on_the_towers_before_it_are_compared(files):
    student = built(late(files)).eval()
    images, samples = tiny.batch()
    (share,) = student.loss(images, samples).values()
    big, theirs = teacher_maps(student, images)
    own = student.extract_feat(images)
    expected = sum(
        (
            getattr(student.bbox_head, tower)[0](one)
            - getattr(big.bbox_head, tower)[0](other)
        )
        .square()
        .mean()
        for tower in ('cls_convs', 'reg_convs')
        for one, other in zip(own, theirs)
    )
    torch.testing.assert_close(share, expected)


def test_what_lies_behind_it_stays_the_teachers_and_the_rest_learns(
    files, hub
):
    student = built(late(files))
    given = head_state(student.teachers['big'].detector)
    before = head_state(student)
    optimiser = build_optim_wrapper(student, ADAM)
    student.train_step(tiny.pixels(*tiny.batch()), optimiser)
    own = head_state(student)
    spared = ('bbox_head.cls_convs.0.', 'bbox_head.reg_convs.0.')
    for key in given:
        if key.startswith(spared):
            assert not torch.equal(own[key], before[key])
        else:
            assert torch.equal(own[key], given[key])


@pytest.mark.parametrize('family', [heads.gfl, heads.atss, heads.fcos])
def test_other_heads_name_what_is_the_teachers_from_a_convolution_on(
    family, tmp_path
):
    model = ConfigDict(family(16, convs=2))
    one = dict(
        config=dict(model=model),
        checkpoint=str(tiny.save_teacher(model, tmp_path / 'big.pth')),
    )
    whole = config(
        dict(retinanet=one),
        student=ConfigDict(family(8, convs=2)),
        reuse_from=1,
        model=dict(
            phases=[
                dict(
                    train=(
                        'backbone',
                        'neck',
                        'bbox_head.cls_convs.0',
                        'bbox_head.reg_convs.0',
                    ),
                    supervised=False,
                )
            ]
        ),
    )
    student = built(whole)
    assert student.loss(*tiny.batch())['loss_kd_simkd'] > 0
    parts = student.terms['simkd'].parts
    learns = {
        name for name, one in student.named_parameters() if one.requires_grad
    }
    for name, _ in student.bbox_head.named_parameters(prefix='bbox_head'):
        first = '_convs.0.' in name
        assert first == (name in learns)
        assert first != name.startswith(tuple(f'{one}.' for one in parts))


def test_of_the_last_convolution_on_the_predictors_alone_are_reused(files):
    student = built(late(files, reuse_from=2))
    assert student.terms['simkd'].parts == (
        'bbox_head.retina_cls',
        'bbox_head.retina_reg',
    )
    assert student.loss(*tiny.batch())['loss_kd_simkd'] > 0


def test_of_the_towers_too_objects_may_count_more(files):
    weight = dict(type='mmkd.ScoreWeight')
    loss = dict(type='mmkd.WeightedMSELoss')
    found = [
        built(late(files, loss=loss, **more)).eval().loss(*tiny.batch())
        for more in (dict(), dict(weight=weight))
    ]
    first, second = (one['loss_kd_simkd'] for one in found)
    assert first > 0
    assert second > 0
    assert first != second


def test_a_part_of_the_head_that_is_not_inherited_is_named(files):
    whole = late(files)
    whole.teachers.big.inherit = whole.teachers.big.inherit[:-1]
    with pytest.raises(ValueError, match='reuses bbox_head.retina_reg of'):
        MODELS.build(whole)


def test_wrong_settings_say_what_to_type(files):
    with pytest.raises(ValueError, match="reuse='bbox_head'"):
        SimKDTerm('big', reuse=())
    for wrong in (
        dict(reuse_from=-1),
        dict(reuse_from=1, reuse=('rpn_head', 'roi_head')),
        dict(reuse_from=1, levels=(0, 1)),
    ):
        with pytest.raises(ValueError, match='reuse_from=0'):
            SimKDTerm('big', **wrong)
    with pytest.raises(ValueError, match='at most 2'):
        MODELS.build(config(files, reuse_from=3))
    with pytest.raises(ValueError, match="no tower 'cls_convs'"):
        MODELS.build(
            config(
                files,
                student=projected(tiny.faster_rcnn()),
                teacher='faster',
                inherit='rpn_head',
                reuse='rpn_head',
                reuse_from=1,
            )
        )


def test_the_dry_pass_does_not_ask_what_is_trained(files):
    """Phases begin with the first step; a model is checked before."""
    student = built(config(files, model=dict(phases=None)))
    step, broken = student.dry_step(*tiny.batch())
    assert broken is None
    assert student.terms['simkd'](step) > 0

"""Names, positions and logs of the distiller; its promises stand apart."""

import pytest
import tiny
import torch
from torch import nn

from mmkd.distillers.distiller import distilling, flatten, position
from mmkd.registry import MODELS


@pytest.fixture
def watching():
    """A loss with a part that is only watched."""

    class WatchingLoss(nn.Module):
        def forward(self, student, teacher, gt=None):
            return dict(near=student.mean(), watch_peak=teacher.max())

    before = dict(MODELS._module_dict), dict(MODELS.peer._module_dict)
    MODELS.register_module(module=WatchingLoss)
    yield dict(type='mmkd.WatchingLoss')
    for registry, entries in zip((MODELS, MODELS.peer), before):
        registry._module_dict.clear()
        registry._module_dict.update(entries)


def watched(teachers, loss, name='kd'):
    term = dict(type='mmkd.FeatureTerm', teacher='big', levels=0, loss=loss)
    model = tiny.build(
        tiny.distilled(tiny.retinanet(), teachers, {name: term})
    )
    model.teachers.load()
    return model


# Where the training is -------------------------------------------------------


def test_outside_of_a_training_nothing_has_progressed(hub):
    assert position() == (0, 0.0)


def test_progress_is_the_share_of_iterations_done(hub):
    hub.update_info('max_iters', 200)
    hub.update_info('iter', 50)
    assert position() == (50, 0.25)


def test_progress_never_exceeds_one(hub):
    hub.update_info('max_iters', 200)
    hub.update_info('iter', 300)
    assert position() == (300, 1.0)


# What is logged --------------------------------------------------------------


def test_a_scalar_is_logged_under_the_terms_name():
    assert flatten('pkd', 3.0) == {'loss_kd_pkd': 3.0}


def test_parts_are_logged_apart_and_watched_ones_are_no_loss():
    named = flatten('fgd', dict(focal=1.0, watch_peak=2.0))
    assert named == {'loss_kd_fgd_focal': 1.0, 'kd_fgd_peak': 2.0}


def test_a_watched_part_is_logged_and_not_summed(teachers, watching):
    model = watched(teachers, watching)
    losses = model.loss(*tiny.batch())
    total, log = model.parse_losses(losses)
    assert log['kd_kd_peak'] > 0
    torch.testing.assert_close(total, tiny.total(losses))


@pytest.mark.parametrize('name', ['logit_loss', 'lossless'])
def test_a_name_that_would_make_watched_parts_count_is_refused(
    teachers, watching, name
):
    """MMEngine sums every key that contains ``loss``."""
    with pytest.raises(ValueError, match=name):
        watched(teachers, watching, name)


def test_a_schedule_scales_what_counts_and_not_what_is_watched(
    teachers, watching
):
    plain = watched(teachers, watching).loss(*tiny.batch())
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        levels=0,
        loss=watching,
        schedule=dict(type='mmkd.Constant', factor=0.25),
    )
    model = tiny.build(
        tiny.distilled(tiny.retinanet(), teachers, dict(kd=term))
    )
    model.teachers.load()
    scaled = model.loss(*tiny.batch())
    torch.testing.assert_close(
        scaled['loss_kd_kd_near'], plain['loss_kd_kd_near'] / 4
    )
    assert scaled['kd_kd_peak'] == plain['kd_kd_peak']


def test_terms_are_logged_side_by_side(teachers, terms):
    terms['cwd'] = dict(terms['pkd'], loss=dict(type='mmkd.CWDLoss'))
    model = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    model.teachers.load()
    losses = model.loss(*tiny.batch())
    assert {'loss_kd_pkd', 'loss_kd_cwd', 'loss_cls'} <= set(losses)


# The class -------------------------------------------------------------------


def test_one_class_is_made_for_each_detector():
    plain = type(tiny.build(tiny.retinanet()))
    assert distilling(plain) is distilling(plain)
    assert issubclass(distilling(plain), plain)
    assert distilling(plain).__name__ == 'DistilledRetinaNet'


def test_weights_initialised_from_the_top_are_those_of_the_student_alone(
    teachers,
):
    """``init_cfg`` of a detector reaches all its parts; a term is none."""
    settings = tiny.retinanet()
    settings.init_cfg = dict(type='Normal', layer='Conv2d', std=0.01)
    terms = dict(
        mgd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1),
            loss=dict(type='mmkd.MGDLoss', channels=16),
        )
    )
    plain = tiny.build(settings)
    plain.init_weights()
    model = tiny.build(tiny.distilled(settings, teachers, terms))
    built = model.terms.mgd.losses[0].generation[0].weight.clone()
    model.init_weights()
    own, theirs = plain.state_dict(), model.state_dict()
    assert [k for k in own if not torch.equal(own[k], theirs[k])] == []
    after = model.terms.mgd.losses[0].generation[0].weight
    assert torch.equal(after, built), 'a term keeps what it was built with'


# Mistakes --------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['teachers', 'terms'])
@pytest.mark.parametrize('name', ['a.b', 'a b', '1a', ''])
def test_a_name_must_fit_into_a_key(teachers, terms, kind, name):
    both = dict(teachers=teachers, terms=terms)
    both[kind] = {name: next(iter(both[kind].values()))}
    with pytest.raises(ValueError, match='Use letters, digits'):
        tiny.build(tiny.distilled(tiny.retinanet(), **both))


def test_a_teacher_without_config_suggests_what_was_meant(terms):
    teachers = dict(big=dict(confg='a.py'))
    with pytest.raises(ValueError, match="Teacher 'big' has no.*'confg'"):
        tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))


def test_a_misspelt_argument_of_a_teacher_names_teacher_and_nearest(
    teachers, terms
):
    teachers['big']['checkpiont'] = teachers['big'].pop('checkpoint')
    with pytest.raises(
        ValueError, match="Teacher 'big'.*'checkpiont'.*'checkpoint'"
    ):
        tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))


def test_keys_beside_a_whole_config_are_refused(teachers, terms):
    config = tiny.distilled(tiny.retinanet(), teachers, terms)
    config.student = tiny.retinanet()
    with pytest.raises(ValueError, match=r'beside it, .*backbone.*_base_'):
        tiny.build(config)

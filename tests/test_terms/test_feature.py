import pytest
import tiny
import torch
from torch import nn

from mmkd.losses.mimic import mimic_loss
from mmkd.registry import MODELS
from mmkd.taps import recording
from mmkd.terms.feature import FeatureTerm

MIMIC = dict(type='mmkd.MimicLoss')


class Outputs:
    def __init__(self, size=None, **values):
        self.values, self.size = values, size

    def at(self, path):
        return self.values[path]


class Step:
    """As much of a step as the term reads."""

    dry = False

    def __init__(self, student, teacher, size=(64, 64), shown=None):
        self.student = Outputs(**student)
        self.shown = Outputs(shown or size, **teacher)
        self.images = torch.zeros(2, 3, *size)
        self.gt = None

    def teacher(self, name):
        assert name == 'big'
        return self.shown


def pyramid(levels=3, channels=4, cells=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(
            2, channels, cells >> level, cells >> level, generator=generator
        )
        for level in range(levels)
    )


@pytest.fixture
def register():
    """Registers classes for one test."""
    before = dict(MODELS._module_dict), dict(MODELS.peer._module_dict)
    yield lambda kind: MODELS.register_module(module=kind)
    for registry, entries in zip((MODELS, MODELS.peer), before):
        registry._module_dict.clear()
        registry._module_dict.update(entries)


# Pairing ---------------------------------------------------------------------


def test_share_is_the_sum_over_levels():
    own, theirs = pyramid(), pyramid(seed=1)
    share = FeatureTerm('big', MIMIC)(Step(dict(neck=own), dict(neck=theirs)))
    expected = sum(mimic_loss(a, b) for a, b in zip(own, theirs))
    torch.testing.assert_close(share, expected)


def test_levels_choose_and_order():
    own, theirs = pyramid(), pyramid(seed=1)
    term = FeatureTerm('big', MIMIC, levels=(2, 0))
    share = term(Step(dict(neck=own), dict(neck=theirs)))
    expected = mimic_loss(own[2], theirs[2]) + mimic_loss(own[0], theirs[0])
    torch.testing.assert_close(share, expected)


def test_one_level_may_be_a_number():
    own, theirs = pyramid(), pyramid(seed=1)
    term = FeatureTerm('big', MIMIC, levels=1)
    share = term(Step(dict(neck=own), dict(neck=theirs)))
    torch.testing.assert_close(share, mimic_loss(own[1], theirs[1]))


def test_the_teachers_levels_pair_with_the_students_by_position():
    own, theirs = pyramid(cells=8), pyramid(levels=4, seed=1)
    term = FeatureTerm('big', MIMIC, levels=(0, 1), teacher_levels=(1, 2))
    share = term(Step(dict(neck=own), dict(neck=theirs)))
    expected = mimic_loss(own[0], theirs[1]) + mimic_loss(own[1], theirs[2])
    torch.testing.assert_close(share, expected)


def test_sides_may_be_tapped_at_different_parts():
    own, theirs = pyramid(), pyramid(seed=1)
    term = FeatureTerm('big', MIMIC, tap='neck', teacher_tap='fpn')
    share = term(Step(dict(neck=own), dict(fpn=theirs)))
    torch.testing.assert_close(
        share, sum(mimic_loss(a, b) for a, b in zip(own, theirs))
    )


def test_maps_of_several_taps_follow_each_other():
    own, theirs = pyramid(), pyramid(seed=1)
    term = FeatureTerm('big', MIMIC, tap=('c2', 'neck'), levels=(0, 2))
    share = term(
        Step(
            dict(c2=own[0], neck=own[1:]), dict(c2=theirs[0], neck=theirs[1:])
        )
    )
    expected = mimic_loss(own[0], theirs[0]) + mimic_loss(own[2], theirs[2])
    torch.testing.assert_close(share, expected)


def test_an_output_of_a_head_is_chosen_on_either_side():
    own, theirs = pyramid(), pyramid(seed=1)
    other = pyramid(channels=9)
    term = FeatureTerm('big', MIMIC, tap='head', output=0, teacher_output=1)
    share = term(Step(dict(head=(own, other)), dict(head=(other, theirs))))
    expected = sum(mimic_loss(a, b) for a, b in zip(own, theirs))
    torch.testing.assert_close(share, expected)


def test_a_loss_for_all_levels_sees_them_at_once(register):
    class JointLoss(nn.Module):
        scope = 'levels'

        def forward(self, student, teacher, gt=None):
            assert gt == 'boxes'
            return student[0].mean() * teacher[-1].mean() * len(teacher)

    register(JointLoss)
    own, theirs = pyramid(), pyramid(levels=5, seed=1)
    step = Step(dict(neck=own), dict(neck=theirs))
    step.gt = 'boxes'
    share = FeatureTerm('big', dict(type='mmkd.JointLoss'))(step)
    torch.testing.assert_close(share, own[0].mean() * theirs[4].mean() * 5)


def test_named_parts_are_summed_by_name(register):
    class PartsLoss(nn.Module):
        def forward(self, student, teacher, gt=None):
            return dict(near=student.mean(), watch_far=teacher.mean())

    register(PartsLoss)
    own, theirs = pyramid(), pyramid(seed=1)
    share = FeatureTerm('big', dict(type='mmkd.PartsLoss'))(
        Step(dict(neck=own), dict(neck=theirs))
    )
    assert set(share) == {'near', 'watch_far'}
    torch.testing.assert_close(share['near'], sum(one.mean() for one in own))


# Weights a level -------------------------------------------------------------


def test_a_loss_that_learns_has_its_own_weights_a_level():
    term = FeatureTerm(
        'big', dict(type='mmkd.MGDLoss', channels=4), levels=(0, 1, 2)
    )
    assert len(term.losses) == 3
    weights = [loss.generation[0].weight for loss in term.losses]
    assert len({id(one) for one in weights}) == 3
    term(Step(dict(neck=pyramid()), dict(neck=pyramid(seed=1)))).backward()
    assert all(one.grad.abs().sum() > 0 for one in weights)


def test_a_loss_that_asks_is_told_its_level(register):
    class LevelLoss(nn.Module):
        def __init__(self, level_index):
            super().__init__()
            self.level_index = level_index

        def forward(self, student, teacher, gt=None):
            return 10**self.level_index * student.new_ones(())

    register(LevelLoss)
    step = Step(dict(neck=pyramid()), dict(neck=pyramid()))
    loss = dict(type='mmkd.LevelLoss')
    assert FeatureTerm('big', loss, levels=(2, 0))(step) == 101


def test_without_levels_their_number_must_be_known():
    with pytest.raises(ValueError, match=r'MGDLoss.*levels=\(0, 1, 2, 3, 4\)'):
        FeatureTerm('big', dict(type='mmkd.MGDLoss', channels=4))


def test_an_adapter_is_built_for_the_levels():
    term = FeatureTerm(
        'big',
        MIMIC,
        levels=(0, 2),
        align=dict(type='mmkd.ConvAdapt', in_channels=4, out_channels=6),
    )
    assert len(term.align.adapts) == 2
    own, theirs = pyramid(), pyramid(channels=6, seed=1)
    share = term(Step(dict(neck=own), dict(neck=theirs)))
    aligned = term.align((own[0], own[2]))
    expected = sum(
        mimic_loss(a, b) for a, b in zip(aligned, (theirs[0], theirs[2]))
    )
    torch.testing.assert_close(share, expected)


def test_sizes_are_brought_to_the_teachers():
    term = FeatureTerm('big', MIMIC, align=dict(type='mmkd.ResizeAdapt'))
    own, theirs = pyramid(cells=8), pyramid(cells=16, seed=1)
    share = term(Step(dict(neck=own), dict(neck=theirs)))
    assert share.isfinite()
    with pytest.raises(ValueError, match='Only the size differs'):
        FeatureTerm('big', MIMIC)(Step(dict(neck=own), dict(neck=theirs)))


def test_weights_on_the_teachers_side_learn_and_the_teacher_does_not():
    theirs = tuple(one.requires_grad_() for one in pyramid(6, 6, 32, seed=1))
    term = FeatureTerm(
        'big',
        MIMIC,
        levels=(0, 1),
        teacher_align=dict(
            type='mmkd.ConvAdapt', in_channels=6, out_channels=4
        ),
    )
    own = pyramid(cells=32)
    term(Step(dict(neck=own), dict(neck=theirs))).backward()
    weights = list(term.teacher_align.parameters())
    assert all(one.grad is not None for one in weights)
    assert all(one.grad is None for one in theirs)


# A border that only the teacher saw ------------------------------------------


@pytest.mark.parametrize('stride', [4, 8, 16, 32, 64, 128])
def test_the_teachers_border_is_cut_off(stride):
    """Convolutions of stride s leave ceil(size / s) cells."""

    def cells(size):
        return tuple(-(-one // stride) for one in size)

    size, shown = (96, 160), (128, 192)
    own = torch.randn(2, 4, *cells(size))
    theirs = torch.randn(2, 4, *cells(shown))
    step = Step(dict(neck=(own,)), dict(neck=(theirs,)), size, shown)
    share = FeatureTerm('big', MIMIC)(step)
    height, width = own.shape[-2:]
    torch.testing.assert_close(
        share, mimic_loss(own, theirs[..., :height, :width])
    )


def test_images_of_one_size_leave_the_maps_alone():
    """An odd stride is no reason to cut where nothing was added."""
    own, theirs = pyramid(1, cells=13), pyramid(1, cells=13, seed=1)
    step = Step(dict(neck=own), dict(neck=theirs), (100, 100))
    share = FeatureTerm('big', MIMIC)(step)
    torch.testing.assert_close(share, mimic_loss(own[0], theirs[0]))


# Silence and classes ---------------------------------------------------------


def test_weight_zero_is_silent():
    assert FeatureTerm('big', dict(MIMIC, loss_weight=0.0)).silent()
    assert not FeatureTerm('big', dict(MIMIC, loss_weight=0.1)).silent()


@pytest.mark.parametrize(
    ('tap', 'teacher_tap', 'expected'),
    [
        ('neck', None, False),
        ('bbox_head', None, True),
        ('roi_head.bbox_head', None, True),
        ('backbone', 'bbox_head', False),
        ('rpn_head', None, False),
        ('bbox_head', 'rpn_head', False),
        (('neck', 'bbox_head'), None, True),
    ],
)
def test_only_heads_compare_classes(tap, teacher_tap, expected):
    term = FeatureTerm('big', MIMIC, tap=tap, teacher_tap=teacher_tap)
    assert term.compares_classes() == expected


# Mistakes --------------------------------------------------------------------


@pytest.mark.parametrize('levels', [(), (-1,), (0, -2)])
def test_levels_are_positions(levels):
    with pytest.raises(ValueError, match='0 is the finest'):
        FeatureTerm('big', MIMIC, levels=levels)


def test_levels_of_both_sides_pair_one_to_one():
    with pytest.raises(ValueError, match='must pair one to one; got 2 and 1'):
        FeatureTerm('big', MIMIC, levels=(0, 1), teacher_levels=(1,))


def test_a_level_beyond_the_last_names_the_range():
    term = FeatureTerm('big', MIMIC, levels=(0, 3))
    with pytest.raises(ValueError, match=r'levels 0 to 2; .* asks for 3'):
        term(Step(dict(neck=pyramid()), dict(neck=pyramid())))


def test_another_number_of_maps_is_an_error_unless_chosen():
    step = Step(dict(neck=pyramid(2)), dict(neck=pyramid(3)))
    with pytest.raises(ValueError, match=r"2 maps at 'neck'.*has 3"):
        FeatureTerm('big', MIMIC)(step)


def test_a_teacher_that_is_not_there_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no teacher 'bigg'.*'big'"):
        FeatureTerm('bigg', MIMIC).bind(nn.Module(), dict(big=None))


# In a detector ---------------------------------------------------------------


def head_share(teachers, **settings):
    terms = dict(
        kd=dict(type='mmkd.FeatureTerm', teacher='big', loss=MIMIC, **settings)
    )
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    student.teachers.load()
    return student, student.loss(*tiny.batch())['loss_kd_kd']


def test_class_scores_of_a_head_are_compared_level_by_level(teachers):
    student, share = head_share(teachers, tap='bbox_head', output=0)
    images, _ = tiny.batch()
    teacher = student.teachers['big'].detector
    with torch.no_grad(), recording(student, ['bbox_head']) as record:
        theirs = teacher.bbox_head(teacher.extract_feat(images))[0]
        student.bbox_head(student.extract_feat(images))
    own = record.at('bbox_head')[0]
    expected = sum(mimic_loss(a, b) for a, b in zip(own, theirs))
    torch.testing.assert_close(share, expected, rtol=1e-4, atol=1e-6)


def test_a_layer_called_once_a_level_gives_a_pyramid(teachers):
    _, whole = head_share(teachers, tap='bbox_head', output=0)
    _, layer = head_share(teachers, tap='bbox_head.retina_cls')
    torch.testing.assert_close(layer, whole)


def test_an_output_of_a_method_called_once_a_level_is_that_output(teachers):
    """``forward_single`` returns scores and boxes of its level."""
    _, whole = head_share(teachers, tap='bbox_head', output=0)
    _, single = head_share(teachers, tap='bbox_head.forward_single', output=0)
    torch.testing.assert_close(single, whole)


# The teacher's classifier ----------------------------------------------------


def test_a_loss_is_shown_the_classifier_once_it_is_loaded(teachers):
    """While the model is built the teacher has other weights."""
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='bbox_head.cls_convs.0',
        loss=dict(type='mmkd.LSHLoss', channels=16, hash_num=9),
    )
    student = tiny.build(
        tiny.distilled(tiny.retinanet(), teachers, dict(lsh=term))
    )
    big = student.teachers['big']
    loss = student.terms.lsh.losses[0]
    early = big.detector.bbox_head.retina_cls.weight.std()
    torch.testing.assert_close(loss.std, early)
    student.loss(*tiny.batch())
    late = big.detector.bbox_head.retina_cls.weight.std()
    assert big.loaded
    assert late != early
    torch.testing.assert_close(loss.std, late)
    loss.std.fill_(5.0)
    student.loss(*tiny.batch())
    assert loss.std == 5


def test_a_teacher_without_a_classifier_is_refused_with_advice():
    teacher = tiny.retinanet()
    head = dict(
        type='RepPointsHead', num_classes=3, in_channels=16, feat_channels=16
    )
    head.update(point_feat_channels=16, norm_cfg=None)
    teacher['bbox_head'], teacher['train_cfg'] = head, None
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        loss=dict(type='mmkd.LSHLoss', channels=16, hash_num=9),
    )
    big = dict(config=dict(model=teacher))
    with pytest.raises(ValueError, match='RepPointsHead has none. Set std='):
        tiny.build(
            tiny.distilled(tiny.retinanet(), dict(big=big), dict(x=term))
        )

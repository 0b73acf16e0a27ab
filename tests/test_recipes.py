import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import detrs
import heads
import pytest
import tiny
import torch
from asking import distilled
from mmcv.ops import MaskedConv2d
from mmdet.models import RetinaNet
from mmdet.models.dense_heads import GARetinaHead
from mmengine.config import Config
from mmengine.registry import init_default_scope

import mmkd
from mmkd.configs import read_config
from mmkd.recipes import (
    DEFAULT,
    NO_LOGITS,
    RECIPES,
    _stated,
    inherits,
    look,
    recipe,
)
from mmkd.registry import MODELS

#: Methods for detectors of queries alone.
OF_QUERIES = (
    *('alp', 'backward_pass', 'clock', 'cmkd', 'd3etr', 'detrdistill'),
    *('dlkd', 'kd_detr', 'lsh', 'mhkd', 'mlkd_bert'),
)


@pytest.fixture(scope='module')
def pair():
    student = dict(model=tiny.retinanet())
    return look(student, dict(model=tiny.retinanet(base=16)), 'big')


@pytest.fixture
def build(tmp_path):
    def build(student, teacher, terms):
        file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        model = tiny.build(tiny.distilled(student, dict(big=big), terms))
        model.init_weights()
        return model.train()

    return build


# A look at two detectors -----------------------------------------------------


def test_levels_are_paired_by_stride(pair):
    assert [level.stride for level in pair.levels] == [8, 16, 32, 64, 128]
    assert all(level.channels == (16, 16) for level in pair.levels)
    assert all(level.scores for level in pair.levels)


def test_a_level_that_one_side_lacks_is_left_out():
    student = tiny.retinanet()
    teacher = tiny.faster_rcnn()  # strides 4 to 64
    pair = look(dict(model=student), dict(model=teacher))
    assert [level.stride for level in pair.levels] == [8, 16, 32, 64]
    assert [level.student for level in pair.levels] == [0, 1, 2, 3]
    assert [level.teacher for level in pair.levels] == [1, 2, 3, 4]


def test_scores_of_other_classes_are_not_compared():
    one, other = tiny.retinanet(classes=3), tiny.retinanet(classes=4)
    pair = look(dict(model=one), dict(model=other))
    assert not any(level.scores for level in pair.levels)
    with pytest.raises(ValueError, match='no class scores of one shape'):
        recipe('cwd_scores', pair)


def test_scores_that_are_no_logits_are_not_compared():
    """TOOD's are probabilities."""
    model = heads.atss()
    model['bbox_head'].update(
        type='TOODHead', stacked_convs=2, num_dcn=0, anchor_type='anchor_free'
    )
    del model['bbox_head']['loss_centerness']
    model['train_cfg'] = dict(
        initial_epoch=1,
        initial_assigner=dict(type='ATSSAssigner', topk=9),
        assigner=dict(type='TaskAlignedAssigner', topk=9),
        alpha=1,
        beta=6,
        allowed_border=-1,
        pos_weight=-1,
    )
    model = dict(model=dict(model, type='TOOD'))
    pair = look(model, model)
    assert not any(level.scores for level in pair.levels)
    with pytest.raises(ValueError, match='no logits'):
        recipe('cwd_scores', pair)


def test_a_look_leaves_the_random_state_as_it_was(pair):

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = dict(model=tiny.retinanet())
    look(model, model)
    assert torch.equal(torch.rand(2), expected)


def test_a_neck_that_is_said_not_to_be_there_is_not_tapped():
    """CornerNet's config says ``neck=None``."""
    model = tiny.retinanet(channels=32)
    model.backbone.out_indices = (3,)
    model.neck = None
    model.bbox_head.in_channels = model.bbox_head.feat_channels = (
        8 * model.backbone.base_channels
    )
    model.bbox_head.anchor_generator.strides = [32]
    pair = look(dict(model=model), dict(model=tiny.retinanet()))
    assert pair.tap == 'backbone'
    assert [one.stride for one in pair.levels] == [32]


def test_strides_are_those_that_a_head_states():
    """Of a map of two cells nobody sees whether they are 100 or 128 wide."""
    head = SimpleNamespace(
        prior_generator=SimpleNamespace(strides=[(64, 64), (100, 100)])
    )
    assert _stated(head, [64, 128]) == [64, 100]
    assert _stated(head, [64, 128, 128]) == [64, 128, 128]
    assert _stated(SimpleNamespace(), [64, 128]) == [64, 128]


def test_a_detector_whose_eval_returns_nothing_is_looked_at(monkeypatch):
    """mmdet's own distillers are such."""
    model = dict(model=tiny.retinanet())
    expected = look(model, model)
    monkeypatch.setattr(RetinaNet, 'eval', _silent_eval)
    assert look(model, model) == expected


def _silent_eval(self):
    self.train(False)


def test_a_teacher_that_sees_one_image_at_a_time_gives_no_scores():
    """Guided anchors mask their convolutions, of one image, in eval mode."""
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    layer = MaskedConv2d(2, 2, 3, padding=1)
    assert layer(torch.rand(1, 2, 4, 4), mask).shape == (1, 2, 4, 4)
    with pytest.raises(AssertionError):
        layer(torch.rand(2, 2, 4, 4), mask)
    assert issubclass(GARetinaHead, NO_LOGITS)


def test_icd_needs_classes():
    rpn = dict(tiny.faster_rcnn(), type='RPN')
    del rpn['roi_head']
    pair = look(dict(model=tiny.faster_rcnn()), dict(model=tiny.retinanet()))
    with pytest.raises(ValueError, match='RPN tells none apart'):
        recipe('icd', replace(pair, student=rpn))


@pytest.fixture
def strangers():
    """Strides 8 and 16 against 32 and 64."""
    one, other = tiny.retinanet(), tiny.retinanet(base=16, channels=24)
    one.neck.end_level, one.neck.num_outs = 2, 2
    one.bbox_head.anchor_generator.strides = [8, 16]
    other.neck.start_level = 3
    other.neck.num_outs = 2
    other.bbox_head.anchor_generator.strides = [32, 64]
    return one, other


def test_without_a_common_stride_the_nearest_levels_are_paired(strangers):
    (level,) = look(*(dict(model=one) for one in strangers)).levels
    assert (level.student, level.teacher, level.stride) == (1, 0, 32)
    assert level.channels == (16, 24)
    assert level.resized
    assert not level.scores


@pytest.mark.parametrize('method', ['pkd', 'at', 'fgd', 'reviewkd', DEFAULT])
def test_levels_of_unlike_strides_teach(strangers, build, method):
    pair = look(*(dict(model=one) for one in strangers), 'big')
    model = build(*strangers, recipe(method, pair))
    losses = model.loss(*tiny.batch())
    tiny.total(
        {key: one for key, one in losses.items() if 'loss_kd' in key}
    ).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


# Terms -----------------------------------------------------------------------


@pytest.mark.parametrize('method', sorted(RECIPES))
@pytest.mark.parametrize('share', [None, 0.5])
def test_every_method_trains_a_pair_of_unequal_widths(build, method, share):
    if method == 'ld':  # compares distributions
        student, teacher = heads.gfl(), heads.gfl(base=16)
    elif method == 'proposal':  # looks at second stages
        student, teacher = tiny.faster_rcnn(), tiny.faster_rcnn(base=16)
    elif method in OF_QUERIES:
        student, teacher = (detrs.detr('dab', base) for base in (8, 16))
    else:
        student, teacher = tiny.retinanet(), tiny.retinanet(channels=24)
    pair = look(dict(model=student), dict(model=teacher), 'big')
    model = build(student, teacher, recipe(method, pair, share))
    losses = model.loss(*tiny.batch())
    shares = [v for k, v in losses.items() if k.startswith('loss_kd')]
    tiny.total(dict(loss=sum(shares))).backward() if any(
        one.requires_grad for one in shares
    ) else None
    reached = model.backbone.conv1.weight.grad is not None
    assert reached == (method != 'inherit')


def test_channels_that_differ_get_a_convolution():
    one, other = tiny.retinanet(), tiny.retinanet(channels=24)
    pair = look(dict(model=one), dict(model=other))
    align = recipe('pkd', pair)['pkd']['align']
    assert align['in_channels'] == [16] * 5
    assert align['out_channels'] == [24] * 5
    assert 'align' not in recipe('rkd', pair)['rkd'], 'compares no channels'


def test_channels_that_agree_get_none(pair):
    assert 'align' not in recipe('pkd', pair)['pkd']


def test_a_share_wraps_and_none_keeps_published_weights(pair):
    ((name, group),) = recipe('pkd', pair, 0.5).items()
    assert (name, group['type']) == ('balanced', 'mmkd.BalancedTerm')
    assert group['share'] == 0.5
    assert group['terms'] == recipe('pkd', pair)
    assert recipe('pkd', pair)['pkd']['loss']['loss_weight'] == 10.0


def test_published_weights_are_those_of_the_coco_configs(pair):
    """The losses of a recipe are those that the method's config has."""
    init_default_scope('mmdet')
    files = dict(
        pkd='pkd/pkd_retinanet_r50-from-r101_fpn_1x_coco.py',
        cwd='cwd/cwd_retinanet_r50-from-x101-64x4d_fpn_2x_coco.py',
        at='at/at_retinanet_r50-from-r101_fpn_1x_coco.py',
        mimic='mimic/mimic_gfl_r50-from-r101_fpn_1x_coco.py',
        fgd='fgd/fgd_retinanet_r50-from-r101_fpn_2x_coco.py',
        mgd='mgd/mgd_retinanet_r50-from-x101-64x4d_fpn_2x_coco.py',
        defeat='defeat/defeat_retinanet_r50-from-r101_fpn_1x_coco.py',
    )
    for method, file in files.items():
        published = Config.fromfile(f'configs/{file}').model.terms[method].loss
        ours = recipe(method, pair)[method]['loss']
        one, other = (
            MODELS.build(dict(loss, **narrow))
            for loss, narrow in (
                (ours, {}),
                (published, {'channels': 16} if 'channels' in ours else {}),
            )
        )
        settings = [
            {
                key: value
                for key, value in vars(loss).items()
                if isinstance(value, (int, float, bool))
            }
            for loss in (one, other)
        ]
        assert settings[0] == settings[1], method


def test_the_default_uses_scores_only_where_heads_agree(pair):
    full = recipe(DEFAULT, pair)['default']
    assert list(full['terms']) == ['pkd', 'cwd_scores']
    other = look(dict(model=tiny.retinanet()), dict(model=tiny.faster_rcnn()))
    assert list(recipe(DEFAULT, other)['default']['terms']) == ['pkd']


def test_a_method_without_anchors_says_what_else_there_is(pair):
    from dataclasses import replace

    points = dict(type='MlvlPointGenerator', strides=[8])
    for head in (dict(), dict(anchor_generator=points)):
        free = replace(pair, student=dict(type='FCOS', bbox_head=head))
        with pytest.raises(ValueError, match=r'FCOS has none.*fgd'):
            recipe('fgfi', free)


def test_a_misspelt_method_gets_the_nearest_name(pair):
    with pytest.raises(ValueError, match="Did you mean 'fgd'"):
        recipe('fgdd', pair)


# Heads -----------------------------------------------------------------------


def test_heads_are_looked_at():
    one, other = heads.gfl(convs=2), heads.gfl(base=16, convs=4)
    other['bbox_head']['feat_channels'] = 24
    found = look(dict(model=one), dict(model=other)).heads
    assert (found.classes, found.sigmoid, found.bins) == (3, True, 4)
    assert (found.convs, found.widths, found.strides) == (2, (16, 24), True)


def test_parts_are_alike_by_what_they_mean_and_not_by_shapes():
    """Other losses change nothing; other anchors make other boxes."""
    one = tiny.retinanet()
    assert alike(one, tiny.retinanet(base=16)) == ('bbox_head',)
    other = copy.deepcopy(one)
    other.bbox_head.loss_cls.gamma = 1.5
    other.bbox_head.init_cfg = dict(type='Normal', layer='Conv2d', std=0.1)
    assert alike(one, other) == ('neck', 'bbox_head')
    other.bbox_head.anchor_generator.octave_base_scale = 8
    assert alike(one, other) == ('neck',)
    assert alike(one, tiny.faster_rcnn()) == ()


def test_parts_of_a_detector_of_queries_are_alike():
    """The states that it begins with are a parameter of its own."""
    models = [detrs.detr('deformable') for _ in range(2)]
    assert {'decoder', 'bbox_head', 'level_embed'} <= {*alike(*models)}
    pair = look(*(dict(model=one) for one in models))
    assert inherits('inherit', pair) == pair.alike
    predicted = 'default_predicted'
    assert inherits(predicted, pair) is False  # one head of many decoders


def test_two_stages_start_from_both_heads():
    one = tiny.faster_rcnn()
    other = copy.deepcopy(one)
    other.train_cfg.rcnn.sampler.num = 7
    pair = look(dict(model=one), dict(model=other))
    heads = ('rpn_head', 'roi_head')
    assert inherits('default_predicted', pair) == heads
    assert inherits('default', pair) is inherits('pkd', pair) is False
    assert inherits('inherit', pair)[0] == 'neck'


@pytest.mark.parametrize('folder', ['configs/laboratory/bccd', 'demo/configs'])
def test_the_ablation_is_the_default_but_for_the_start(folder):
    root = Path(mmkd.__file__).parents[1]
    student, teacher = (
        read_config(root / folder / f'{one}.py')
        for one in ('student', 'teacher')
    )
    pair = look(student, teacher)
    own = read_config(
        root / 'configs/laboratory/ablations/default_teacher_head.py'
    )
    assert own.model.terms.to_dict() == recipe('default', pair)
    start = own.model.teachers.teacher.inherit
    assert start == inherits('default_predicted', pair) == ('bbox_head',)


def test_the_default_for_images_without_labels(pair):
    terms = recipe('default_predicted', pair, 1.0)
    learnt = terms.pop('predicted')
    assert terms == recipe('default', pair)
    assert learnt == dict(
        type='mmkd.PredictedBoxTerm', teacher='big', where='unlabelled'
    )
    assert inherits('default_predicted', pair) == ('bbox_head',)


def alike(student, teacher):
    return look(dict(model=student), dict(model=teacher)).alike


def test_what_heads_do_not_share():
    one, other = heads.gfl(bins=4), heads.gfl(bins=8)
    assert look(dict(model=one), dict(model=other)).heads.bins is None
    mixed = look(dict(model=heads.gfl()), dict(model=heads.atss())).heads
    assert mixed.bins is None
    assert mixed.convs == 1
    two_stage = look(
        dict(model=tiny.retinanet()), dict(model=tiny.faster_rcnn())
    )
    assert two_stage.heads is None


def test_a_method_that_does_not_fit_names_one_that_does():
    pair = look(dict(model=tiny.retinanet()), dict(model=tiny.retinanet()))
    with pytest.raises(ValueError, match=r'ld compares.*crosskd'):
        recipe('ld', pair)
    with pytest.raises(ValueError, match=r'RetinaNet has none.*bckd'):
        recipe('proposal', pair)
    pair = look(dict(model=tiny.retinanet()), dict(model=tiny.faster_rcnn()))
    with pytest.raises(ValueError, match=r'gid compares.*pkd'):
        recipe('gid', pair)
    with pytest.raises(ValueError, match=r'crosskd runs.*pkd'):
        recipe('crosskd', pair)


def test_the_crossing_leaves_the_teacher_a_layer():
    one = heads.gfl(convs=4)
    pair = look(dict(model=one), dict(model=heads.gfl(base=16, convs=4)))
    term = recipe('crosskd', pair)['cross']
    assert term['convs'] == 3
    assert 'align' not in term


# Queries ---------------------------------------------------------------------


def test_methods_of_queries_fit_what_two_decoders_share():
    models = {
        kind: dict(model=detrs.detr(kind)) for kind in ('dab', 'deformable')
    }
    pair = look(models['dab'], models['dab'], 'big')
    assert pair.asks
    assert pair.queries.form
    assert pair.queries.maps == ('self', 'cross')
    assert recipe('d3etr', pair)['d3etr'] == dict(
        type='mmkd.D3ETRTerm', teacher='big'
    )
    assert recipe('detrdistill', pair)['detrdistill'] == dict(
        type='mmkd.DETRDistillTerm', teacher='big', channels=(16, 16)
    )
    pair = look(models['dab'], models['deformable'])
    assert not pair.queries.form
    term = recipe('d3etr', pair)['d3etr']
    assert term['fixed_weight'] == term['cross_weight'] == 0
    assert 'self_weight' not in term
    assert recipe('detrdistill', pair)['detrdistill']['prior_weight'] == 0


@pytest.mark.parametrize(
    'method', ['alp', 'cmkd', 'd3etr', 'detrdistill', 'dlkd', 'lsh', 'mhkd']
)
def test_methods_of_queries_teach_unlike_decoders(method, tmp_path):
    student, teacher = detrs.detr('deformable'), detrs.detr('detr')
    plain = [copy.deepcopy(one) for one in (student, teacher)]
    pair = look(*(dict(model=one) for one in plain), 'big')
    file = tiny.save_teacher(copy.deepcopy(teacher), tmp_path / 'big.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    model = tiny.build(
        tiny.distilled(student, dict(big=big), recipe(method, pair))
    ).train()
    model.teachers.load()
    losses = model.loss(*tiny.batch())
    tiny.total(
        {key: one for key, one in losses.items() if 'loss_kd' in key}
    ).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ('kinds', 'softmax'),
    [(('detr', 'detr'), True), (('detr', 'deformable'), False)],
)
def test_scores_of_queries_are_compared_as_their_heads_give_them(
    kinds, softmax, tmp_path
):
    student, teacher = map(detrs.detr, kinds)
    plain = [copy.deepcopy(one) for one in (student, teacher)]
    pair = look(*(dict(model=one) for one in plain), 'big')
    assert pair.queries.softmax is softmax
    terms = recipe('cmkd', pair)
    assert ('activation' in terms['cmkd']['loss']) is softmax
    file = tiny.save_teacher(copy.deepcopy(teacher), tmp_path / 'big.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    model = tiny.build(tiny.distilled(student, dict(big=big), terms)).train()
    model.teachers.load()
    assert 'loss_kd_cmkd' in str(list(model.loss(*tiny.batch())))


@pytest.mark.parametrize('method', OF_QUERIES)
def test_methods_of_queries_refuse_pairs_without(method, pair):
    assert not pair.asks
    with pytest.raises(ValueError, match=f'{method} compares decoders'):
        recipe(method, pair)


def test_heads_of_queries_are_crossed_by_the_name_of_dense_ones(tmp_path):
    """With a layer between states of unlike width."""
    student = detrs.detr('dab')
    teacher = copy.deepcopy(student)
    pair = look(*(dict(model=one) for one in (student, teacher)), 'big')
    assert 'align' not in recipe('crosskd', pair)['cross']
    wide = replace(pair, queries=replace(pair.queries, widths=(16, 24)))
    align = recipe('crosskd', wide)['cross']['align']
    assert (align['in_channels'], align['out_channels']) == (16, 24)
    term = recipe('crosskd', pair)['cross']
    losses = distilled(student, teacher, term, tmp_path).loss(*tiny.batch())
    assert {'loss_kd_x_cls', 'loss_kd_x_box'} <= set(losses)


@pytest.mark.parametrize('method', ['kd_detr', 'clock'])
@pytest.mark.parametrize('kinds', [('deformable', 'refine'), ('dab', 'dab')])
def test_detectors_of_queries_teach_by_asking(method, kinds, tmp_path):
    student, teacher = (
        detrs.detr(kind, base=base) for kind, base in zip(kinds, (8, 16))
    )
    pair = look(*(dict(model=one) for one in (student, teacher)), 'big')
    assert pair.asks
    (term,) = recipe(method, pair).values()
    model = distilled(student, teacher, term, tmp_path)
    losses = model.loss(*tiny.batch())
    tiny.total(
        {key: one for key, one in losses.items() if 'loss_kd' in key}
    ).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('kinds', [('dab', 'dab'), ('detr', 'deformable')])
def test_queries_are_never_compared_by_their_number(kinds):
    """DAB-DETR's scores have four axes, and are no map for all that."""
    models = [dict(model=detrs.detr(kind)) for kind in kinds]
    pair = look(*models, 'big')
    assert not any(level.scores for level in pair.levels)
    with pytest.raises(ValueError, match='cwd_scores|scores'):
        recipe('cwd_scores', pair)
    (term,) = recipe(DEFAULT, pair).values()
    assert set(term['terms']) == {'pkd', 'answers'}
    by_index = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='bbox_head',
        output=0,
        loss=dict(type='mmkd.CWDLoss'),
    )
    big = dict(config=models[1])
    with pytest.raises(ValueError, match='nothing in common'):
        MODELS.build(
            tiny.distilled(models[0]['model'], dict(big=big), dict(x=by_index))
        )


def test_memories_teach_what_other_classes_allow():
    model = dict(model=detrs.detr('dab'))
    pair = replace(look(model, model), comparable=False)
    (term,) = recipe('clock', pair).values()
    assert not MODELS.build(term).compares_classes()

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

from mmkd.structures import Step
from mmkd.taps import recording
from mmkd.terms.mlkd_bert import (
    Layer,
    MLKDBertLayersTerm,
    attention_of,
    uniform_map,
)

NARROW = dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
WIDE = dict(embed_dims=16, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16))
CHANNELS = (8, 16, 32, 64)


def swin(window_size=4, **settings):
    """A RetinaNet on Swin, its weights large enough to be unlike."""
    settings = {**NARROW, **settings}
    model = tiny.retinanet()
    model.backbone = dict(
        type='SwinTransformer',
        window_size=window_size,
        drop_path_rate=0.0,
        **settings,
    )
    width = settings['embed_dims']
    model.neck.in_channels = [width * 2**stage for stage in range(4)]
    detector = tiny.build(model, seed=width)
    with torch.no_grad():
        for one in detector.backbone.parameters():
            if one.dim() > 1:
                one.normal_(std=0.3)
    return detector.eval()


@pytest.fixture(scope='module')
def student():
    return swin()


@pytest.fixture(scope='module')
def teacher():
    return swin(**WIDE)


class Teacher:
    """As much of a teacher as a term binds."""

    memory = None

    def __init__(self, detector):
        self.detector, self.paths = detector, []

    def tap(self, path):
        self.paths.append(path)


def build(**settings):
    torch.manual_seed(5)
    return MLKDBertLayersTerm(
        **{
            'teacher': 'big',
            'student_channels': CHANNELS,
            'teacher_channels': [2 * one for one in CHANNELS],
            **settings,
        }
    )


def watched(detector, paths, images, part='backbone'):
    with recording(detector, paths) as record:
        detector.extract_feat(images)
    return record


def step_of(term, student, teacher, shapes=((64, 64), (64, 48)), shown=None):
    """A step in which both extract features, as the term asks."""
    images, samples = tiny.batch(shapes=shapes)
    images = images[..., :64, :64]
    big = Teacher(teacher)
    term.bind(student, {'big': big})
    own = watched(student, term.student_paths, images)
    more = F.pad(images, (0, shown or 0, 0, shown or 0))
    other = watched(teacher, big.paths, more)
    other.size = tuple(more.shape[-2:])
    return Step(
        own, images, samples, teachers={'big': lambda images, grad: other}
    )


def run(term, student, teacher, **settings):
    return term(step_of(term, student, teacher, **settings))


def divergence(student, teacher):
    """Mean over rows of two groups of tokens, by hand."""

    def rows(tokens):
        found = []
        for a in tokens:
            logits = [(a @ b).item() / math.sqrt(len(a)) for b in tokens]
            top = max(logits)
            total = sum(math.exp(one - top) for one in logits)
            found.append([one - top - math.log(total) for one in logits])
        return found

    values = [
        sum(math.exp(q) * (q - p) for p, q in zip(own, other))
        for own, other in zip(rows(student), rows(teacher))
    ]
    return sum(values) / len(values)


WHOLE = ((64, 64), (64, 64))


# Which layers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ('student', 'teacher', 'expected'),
    [
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (2, 2, [0, 1]),
        (2, 6, [2, 5]),
        (3, 2, [0, 1, 1]),
        (1, 4, [3]),
    ],
)
def test_layers_are_spaced_uniformly_and_the_last_meet(
    student, teacher, expected
):
    assert uniform_map(student, teacher) == expected


def test_the_taps_are_those_of_the_layers_that_are_paired(student, teacher):
    term, big = build(), Teacher(teacher)
    term.bind(student, {'big': big})
    blocks = [(0, 1), (1, 1), (2, 1), (2, 3), (3, 1)]
    assert [path for path in big.paths if path.endswith('proj')] == [
        f'backbone.stages.{stage}.blocks.{block}.attn.w_msa.proj'
        for stage, block in blocks
    ]
    own = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    assert term.student_paths == [
        'backbone.patch_embed',
        *(
            f'backbone.stages.{stage}.blocks.{block}{part}'
            for stage, block in own
            for part in ('', '.attn.w_msa.proj')
        ),
    ]


def test_a_map_of_layers_may_be_given(student, teacher):
    term = build(layer_map=[[0], [0], [0, 2], [1]])
    big = Teacher(teacher)
    term.bind(student, {'big': big})
    assert 'backbone.stages.2.blocks.2' in big.paths
    assert 'backbone.stages.2.blocks.3' not in big.paths


# The parts -------------------------------------------------------------------


def test_unlike_heads_widths_depths_and_windows_run(student):
    teacher = swin(window_size=2, **WIDE)
    parts = run(build(), student, teacher)
    assert list(parts) == ['emb', 'mha', 'ffn']
    assert all(value > 0 for value in parts.values())
    assert all(value.isfinite() for value in parts.values())


def test_a_network_has_its_own_relations_but_other_features(student):
    term = build(teacher_channels=CHANNELS)
    parts = run(term, student, student)
    zero = torch.tensor(0.0)
    for part in ('emb', 'mha'):
        torch.testing.assert_close(parts[part], zero, atol=1e-5, rtol=0)
    assert parts['ffn'] > 0
    with torch.no_grad():
        for one in term.projections:
            one.weight.copy_(torch.eye(len(one.weight))[..., None, None])
    ffn = run(term, student, student)['ffn']
    torch.testing.assert_close(ffn, zero, atol=1e-5, rtol=0)


def test_the_attention_of_a_stage_equals_a_literal_loop(student, teacher):
    """Two heads in 4 x 4 cells, and in each of them the teacher's four."""
    term = build(
        levels=(1,),
        student_channels=(16,),
        teacher_channels=(32,),
        layer_map=[[0]],  # not shifted, so that windows are as they are
    )
    step = step_of(term, student, teacher, shapes=WHOLE)
    path = 'backbone.stages.1.blocks.0.attn.w_msa.proj'
    own, other = (
        watched(one, [path], step.images).inputs(path)[0]
        for one in (student, teacher)
    )
    values = [
        divergence(one[:, cut * 8 : cut * 8 + 8], like[:, 16 * cut :][:, :16])
        for one, like in zip(own[0], other[0])
        for cut in (0, 1)
    ]
    expected = sum(values) / len(values)
    assert term(step)['mha'].item() == pytest.approx(expected, rel=1e-3)


def test_embeddings_equal_a_literal_loop_on_the_grid(student, teacher):
    term = build(grid=(4, 8))
    step = step_of(term, student, teacher, shapes=WHOLE)
    tokens = []
    for outputs in (
        step.student,
        watched(teacher, ['backbone.patch_embed'], step.images),
    ):
        found, size = outputs.at('backbone.patch_embed')
        assert size == (16, 16)
        cells = found.transpose(1, 2).unflatten(2, size)
        tokens.append(F.avg_pool2d(cells, (4, 2)).flatten(2).transpose(1, 2))
    values = [divergence(one, like) for one, like in zip(*tokens)]
    expected = sum(values) / len(values)
    assert term(step)['emb'].item() == pytest.approx(expected, rel=1e-3)


def test_outputs_are_the_mean_squared_error_through_a_matrix(student, teacher):
    term = build(levels=(3,), student_channels=(64,), teacher_channels=(128,))
    step = step_of(term, student, teacher, shapes=WHOLE)
    own = step.student.at('backbone.stages.3.blocks.0')
    path = 'backbone.stages.3.blocks.1'
    other = watched(teacher, [path], step.images).at(path)
    weight = term.projections[0].weight[:, :, 0, 0]
    torch.testing.assert_close(
        term(step)['ffn'], F.mse_loss(own @ weight.T, other)
    )


def test_layers_are_added(student, teacher):
    """The third stage has two."""
    settings = dict(student_channels=(32,), teacher_channels=(64,))
    both = build(levels=(2,), **settings)
    parts = run(both, student, teacher, shapes=WHOLE)
    for part in ('mha', 'ffn'):
        singles = []
        for left in (0, 1):
            term = build(levels=(2,), **settings)
            step = step_of(term, student, teacher, shapes=WHOLE)
            term.pairs = [[term.pairs[0][left]]]
            singles.append(term(step)[part])
        torch.testing.assert_close(sum(singles), parts[part])


def test_stages_are_added(student, teacher):
    parts = run(build(), student, teacher)
    for part in ('mha', 'ffn'):
        term = build()
        total = 0
        for index, (own, other) in enumerate(
            zip(term.student_channels, term.teacher_channels)
        ):
            single = build(
                levels=(index,),
                student_channels=(own,),
                teacher_channels=(other,),
            )
            single.projections[0].load_state_dict(
                term.projections[index].state_dict()
            )
            total = total + run(single, student, teacher)[part]
        torch.testing.assert_close(total, parts[part])


def test_splits_may_be_a_number(student, teacher):
    one, other = (
        run(build(splits=splits), student, teacher)['mha']
        for splits in ('student', 1)
    )
    assert not torch.isclose(one, other)


def test_each_part_has_its_weight(student, teacher):
    before = run(build(), student, teacher)
    after = run(
        build(emb_weight=2.0, mha_weight=3.0, ffn_weight=0.5),
        student,
        teacher,
    )
    for part, factor in (('emb', 2), ('mha', 3), ('ffn', 0.5)):
        torch.testing.assert_close(after[part], factor * before[part])


def test_each_part_teaches_what_stands_before_it(student, teacher):
    backbone = student.backbone
    term = build()
    parts = run(term, student, teacher)
    last = backbone.stages[3].blocks[0]
    first = backbone.patch_embed.projection.weight
    watched = (first, last.attn.w_msa.qkv.weight, last.ffn.layers[1].weight)
    for part, reached in (
        ('emb', (True, False, False)),
        ('mha', (True, True, False)),
        ('ffn', (True, True, True)),
    ):
        grads = torch.autograd.grad(
            parts[part], watched, retain_graph=True, allow_unused=True
        )
        assert reached == tuple(
            one is not None and bool(one.abs().sum() > 0) for one in grads
        )
    sum(parts.values()).backward()
    assert all(one.grad.abs().sum() > 0 for one in term.parameters())
    assert all(one.grad is None for one in teacher.parameters())
    student.zero_grad()


def test_nothing_is_said_without_weights():
    assert build(emb_weight=0, mha_weight=0, ffn_weight=0).silent()
    assert not build(emb_weight=0, mha_weight=1, ffn_weight=0).silent()
    settings = dict(attn=False, emb_weight=0, ffn_weight=0)
    assert build(**settings, mha_weight=1).silent()


# What does not matter --------------------------------------------------------


@pytest.fixture
def parts(student, teacher):
    """The three parts of one pair of layers, as functions of two maps."""
    term = build()
    step = step_of(term, student, teacher, shapes=((64, 64), (64, 40)))
    (own, _) = term.pairs[2][1]
    assert own.shift == 2
    projection = term.projections[2]
    return dict(
        emb=lambda *maps: term._embedding(step, *maps),
        mha=lambda *maps: term._attention(step, own, *maps),
        ffn=lambda *maps: term._output(step, projection, *maps),
    )


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8)


def test_what_stands_in_the_padded_border_has_no_influence(parts, maps):
    for part in parts.values():
        before = part(*maps)
        changed = [one.clone() for one in maps]
        for one, value in zip(changed, (torch.inf, 9.0)):
            one[1, :, :, 5:] = value  # 40 of 64 pixels
        torch.testing.assert_close(part(*changed), before)
        changed = [one.clone() for one in maps]
        for one in changed:
            one[1, :, :, 4] += torch.randn_like(one[1, :, :, 4])
        assert not torch.isclose(part(*changed), before)


def groups(width):
    """Cells that see each other in windows of 4, shifted by 2."""
    cuts = [(0, 2), (2, 6), (6, 8)]
    for top, bottom in cuts:
        for left, right in cuts:
            if left < width:
                yield slice(top, bottom), slice(left, min(right, width))


def test_attention_is_related_where_the_shifted_block_has_it(parts, maps):
    """The padded border of the second image is in none of the windows."""
    total = count = 0
    for image, width in ((0, 8), (1, 5)):
        for rows, columns in groups(width):
            student, teacher = (
                one[image, :, rows, columns].flatten(1).T for one in maps
            )
            for half in (0, 1):
                value = divergence(
                    student[:, 16 * half :][:, :16],
                    teacher[:, 32 * half :][:, :32],
                )
                total += value * len(student)
                count += len(student)
    found = parts['mha'](*maps).item()
    assert found == pytest.approx(total / count, rel=1e-3)


def test_outputs_are_averaged_over_the_cells_of_images(parts, maps):
    student, teacher = maps
    weight = build().projections[2].weight
    error = (F.conv2d(student, weight) - teacher).square()
    cells = torch.cat([error[0].flatten(), error[1, :, :, :5].flatten()])
    torch.testing.assert_close(parts['ffn'](*maps), cells.mean())


@pytest.mark.parametrize('block', [0, 1])
def test_attention_stands_where_its_tokens_do(student, block):
    """What the block mixes of it, cell by cell, is what it returns."""
    path = f'backbone.stages.2.blocks.{block}'
    module = student.backbone.stages[2].blocks[block]
    layer = Layer.of(module, path)
    assert layer.shift == 2 * block
    images, _ = tiny.batch(shapes=WHOLE)
    outputs = watched(
        student, [path, f'{path}.attn', layer.attention], images[:, :, :96]
    )
    found = attention_of(outputs, layer)
    assert found.shape == (2, 32, 6, 8)
    mixed = module.attn.w_msa.proj(found.flatten(2).transpose(1, 2))
    torch.testing.assert_close(mixed, outputs.at(f'{path}.attn'))


def test_relations_know_no_channels_and_outputs_do(parts, maps):
    """Rotated within each of the two splits."""
    student, teacher = maps
    blocks = [torch.linalg.qr(torch.randn(32, 32))[0] for _ in range(2)]
    rotation = torch.block_diag(*blocks)
    turned = torch.einsum('nchw,cd->ndhw', teacher, rotation)
    for name in ('emb', 'mha'):
        torch.testing.assert_close(
            parts[name](student, turned), parts[name](*maps)
        )
    before, after = (parts['ffn'](student, one) for one in (teacher, turned))
    assert not torch.isclose(before, after)


def test_cells_of_one_window_may_change_places(student, teacher, maps):
    """Both sides alike, in a block that is not shifted."""
    term = build()
    step = step_of(term, student, teacher, shapes=WHOLE)
    own, _ = term.pairs[2][0]
    assert own.shift == 0

    def moved(one):
        one = one.clone()
        one[:, :, :4, :4] = one[:, :, :4, :4].flip(2).transpose(2, 3)
        return one

    torch.testing.assert_close(
        term._attention(step, own, *map(moved, maps)),
        term._attention(step, own, *maps),
    )
    # From one window to another is no such change.
    other = [one.roll(2, 2) for one in maps]
    assert not torch.isclose(
        term._attention(step, own, *other),
        term._attention(step, own, *maps),
    )


def test_a_border_that_only_the_teacher_was_shown_is_dropped(student, teacher):
    """Windows of four: their attention sees nothing beyond 64 pixels."""
    term = build(levels=(0,), student_channels=(8,), teacher_channels=(16,))
    term.layer_map = [[0]]
    one = run(term, student, teacher, shapes=WHOLE)
    other = run(term, student, teacher, shapes=WHOLE, shown=64)
    for part, value in one.items():
        torch.testing.assert_close(other[part], value)


def test_autocast_changes_nothing_of_the_loss(student, teacher):
    term = build()
    step = step_of(term, student, teacher)
    before = term(step)
    with torch.autocast('cpu', torch.bfloat16):
        found = term(step)
    for part, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, before[part])


def test_ignored_boxes_are_tokens_like_others(student, teacher):
    term = build()
    step = step_of(term, student, teacher)
    before = term(step)
    for sample in step.samples:
        sample.ignored_instances = sample.gt_instances.clone()
    del step.gt
    assert len(step.gt.ignored)
    assert term(step) == before


# Without attention -----------------------------------------------------------


@pytest.fixture(scope='module')
def convolutions():
    return tiny.build(tiny.retinanet(), seed=1), tiny.build(
        tiny.retinanet(base=16, channels=24), seed=2
    )


def plain(**settings):
    return build(
        **{
            'attn': False,
            'student_channels': (16, 16),
            'teacher_channels': (24, 24),
            **settings,
        }
    )


def test_maps_stand_for_embeddings_and_outputs(convolutions):
    term = plain(levels=(1, 2), grid=(2, 2))
    step = step_of(term, *convolutions, shapes=WHOLE)
    found = term(step)
    assert list(found) == ['fpn_emb', 'fpn_ffn']
    student = step.student.at('neck')
    teacher = watched(convolutions[1], ['neck'], step.images).at('neck')
    emb = ffn = 0
    for level, projection in zip((1, 2), term.projections):
        weight = projection.weight
        own, other = student[level], teacher[level]
        ffn = ffn + F.mse_loss(F.conv2d(own, weight), other)
        tokens = (
            F.adaptive_avg_pool2d(one, 2).flatten(2).transpose(1, 2)
            for one in (own, other)
        )
        values = [divergence(*pair) for pair in zip(*tokens)]
        emb += sum(values) / len(values)
    torch.testing.assert_close(found['fpn_ffn'], ffn)
    assert found['fpn_emb'].item() == pytest.approx(emb, rel=1e-3)


def test_the_weights_hold_for_maps_as_well(convolutions):
    before = run(plain(), *convolutions)
    after = run(plain(emb_weight=3.0, ffn_weight=2.0), *convolutions)
    torch.testing.assert_close(after['fpn_emb'], 3 * before['fpn_emb'])
    torch.testing.assert_close(after['fpn_ffn'], 2 * before['fpn_ffn'])


# Wrong use -------------------------------------------------------------------


def bind(term, student, teacher):
    term.bind(student, {'big': Teacher(teacher)})


def test_a_backbone_without_attention_names_the_way_out(
    student, teacher, convolutions
):
    with pytest.raises(ValueError, match="student's 'backbone'.*attn=False"):
        bind(build(), convolutions[0], teacher)
    with pytest.raises(ValueError, match="teacher's 'backbone'.*attn=False"):
        bind(build(), student, convolutions[1])


def test_other_channels_name_the_stage(student, teacher):
    with pytest.raises(ValueError, match=r'stage 1 of the student, .* 16\.'):
        bind(build(student_channels=(8, 8, 32, 64)), student, teacher)
    with pytest.raises(ValueError, match='Set teacher_channels'):
        bind(build(teacher_channels=CHANNELS), student, teacher)


def test_other_channels_of_maps_name_the_setting(convolutions):
    with pytest.raises(ValueError, match='student_channels, was built for 8'):
        run(plain(student_channels=(8, 8)), *convolutions)
    with pytest.raises(ValueError, match='teacher_channels, was built for 8'):
        run(plain(teacher_channels=(8, 8)), *convolutions)


def test_stages_must_be_there(student, teacher):
    with pytest.raises(ValueError, match='4 stages, 0 to 3'):
        bind(build(levels=(1, 2, 3, 4)), student, teacher)


@pytest.mark.parametrize(
    'layer_map', [[[0], [0], [0], [0]], [[0], [0], [0, 4], [0]]]
)
def test_a_map_of_layers_must_fit(student, teacher, layer_map):
    with pytest.raises(ValueError, match='2 blocks and the teacher 4, 0 to 3'):
        bind(build(layer_map=layer_map), student, teacher)


def test_splits_must_divide_the_channels(student, teacher):
    with pytest.raises(ValueError, match=r'cuts 8 channels .* into 3 splits'):
        bind(build(splits=3), student, teacher)


def test_blocks_that_are_computed_anew_are_refused(teacher):
    with pytest.raises(ValueError, match='with_cp=False'):
        bind(build(), swin(with_cp=True), teacher)


def test_tokens_must_be_as_many(student, teacher):
    other = swin(**WIDE, strides=(2, 2, 2, 2), patch_size=2)
    with pytest.raises(ValueError, match=r'\(16, 16\) rows .* \(32, 32\)'):
        run(build(), student, other)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match='4 levels, 4 .* and 3'):
        build(teacher_channels=(8, 8, 8))
    with pytest.raises(ValueError, match='1 levels, 4'):
        build(levels=(1,))
    with pytest.raises(ValueError, match='at least 1'):
        build(student_channels=(), teacher_channels=())
    with pytest.raises(ValueError, match="layer_map 'uniforn'.*'uniform'"):
        build(layer_map='uniforn')
    with pytest.raises(ValueError, match="splits 'teacher'"):
        build(splits='teacher')
    with pytest.raises(ValueError, match='splits > 0'):
        build(splits=0)
    with pytest.raises(ValueError, match='columns > 0'):
        build(grid=(4, 0))


def test_an_unknown_teacher_is_named(student):
    with pytest.raises(ValueError, match="no teacher 'big'"):
        build().bind(student, {})


def test_a_teacher_with_a_cache_is_refused(student, teacher):
    big = Teacher(teacher)
    big.memory = object()
    with pytest.raises(ValueError, match="cache=0 for teacher 'big'"):
        build().bind(student, {'big': big})

"""MaKD of DETRs: thin encoders and decoders, matrix by matrix."""

import copy

import detrs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkd.detectors.factorized import (
    LowRankAttention,
    LowRankLinear,
    factorize,
)
from mmkd.taps import recording
from mmkd.terms.multi_aspect import ASPECTS, MultiAspectTerm
from mmkd.terms.queries import ask, question

PARTS = ('encoder', 'decoder')
FEW = dict(queries=6)
KINDS = ['detr', 'conditional', 'dab', 'deformable', 'two_stage', 'dino']


def pair(kind='detr', ratio=0.3, parts=PARTS, **settings):
    """A detector made thin, and the whole one that it is made of."""
    teacher = detrs.built(kind, **FEW)
    for name, one in teacher.named_modules():
        if name.endswith('attention_weights'):  # zeros at first
            nn.init.normal_(one.weight)
    student = copy.deepcopy(teacher)
    factorize(student, ratio, PARTS)
    term = MultiAspectTerm('big', parts=parts, **settings)
    return term, detrs.step_of(term, student, teacher)


# Thin attention --------------------------------------------------------------


def calls():
    torch.manual_seed(0)
    query, key = torch.randn(5, 3, 8), torch.randn(7, 3, 8)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[0, 2] = True
    return (query, key, key + 1), dict(
        key_padding_mask=padding, attn_mask=mask
    )


@pytest.mark.parametrize('first', [True, False])
def test_of_full_rank_it_is_the_whole_attention(first):
    whole = nn.MultiheadAttention(8, 2, batch_first=first).eval()
    nn.init.normal_(whole.in_proj_bias)
    thin = LowRankAttention(whole, rank=8).eval()
    thin.load_state_dict(whole.state_dict())
    given, masks = calls()
    if first:
        given = [one.transpose(0, 1) for one in given]
    for one, other in zip(thin(*given, **masks), whole(*given, **masks)):
        torch.testing.assert_close(one, other)


def test_it_is_the_attention_of_its_products():
    whole = nn.MultiheadAttention(8, 2).eval()
    thin = LowRankAttention(whole, rank=2).eval()
    thin.load_state_dict(whole.state_dict())
    whole.in_proj_weight.data = thin.in_proj_weight
    whole.out_proj.weight.data = thin.out_proj.weight
    given, masks = calls()
    for one, other in zip(thin(*given, **masks), whole(*given, **masks)):
        torch.testing.assert_close(one, other)


def test_what_is_missing_are_the_singular_values_left_out():
    whole = nn.MultiheadAttention(8, 2)
    thin = LowRankAttention(whole, rank=3)
    thin.load_state_dict(whole.state_dict())
    error = (whole.in_proj_weight - thin.in_proj_weight).norm()
    left = [
        torch.linalg.svdvals(one)[3:] for one in whole.in_proj_weight.chunk(3)
    ]
    torch.testing.assert_close(error, torch.cat(left).norm())
    weights = sum(one.numel() for one in thin.parameters())
    assert weights == 4 * 3 * (8 + 8) + 4 * 8  # r (m + n), and biases


def test_its_rows_drop_out_in_training_alone():
    whole = nn.MultiheadAttention(8, 2, dropout=0.5)
    thin = LowRankAttention(whole, rank=8)
    given, _ = calls()
    assert not torch.equal(thin(*given)[0], thin(*given)[0])
    thin.eval()
    assert torch.equal(thin(*given)[0], thin(*given)[0])


def test_attention_with_keys_of_its_own_stays_whole():
    model = nn.ModuleDict(
        dict(
            part=nn.ModuleDict(
                dict(
                    plain=nn.MultiheadAttention(8, 2),
                    added=nn.MultiheadAttention(8, 2, add_bias_kv=True),
                    other=nn.MultiheadAttention(8, 2, kdim=4),
                )
            )
        )
    )
    found = factorize(model, 0.5, 'part')
    assert list(found) == ['part.plain.in_proj', 'part.plain.out_proj']


@pytest.mark.parametrize('kind', KINDS)
def test_what_shrinks_is_what_projects(kind):
    model = detrs.built(kind, **FEW)
    before = dict(model.named_parameters())
    found = factorize(model, 0.3, PARTS)
    ends = {path.rpartition('.')[2] for path in found}
    known = {'in_proj', 'out_proj', 'value_proj', 'output_proj', '0', '1'}
    conditional = {f'{a}{b}_proj' for a in 'qk' for b in ('content', 'pos')}
    conditional |= {'qpos_sine_proj', 'v_proj'}
    assert ends <= known | conditional
    places = 'query_scale', 'ref_point_head', 'ref_anchor_head'
    assert not [path for path in found for one in places if one in path]
    for path, one in found.items():
        rows, columns = one.out_features, one.in_features
        kept = one.up.numel() + one.down.numel()
        assert kept == one.rank * (rows + one.stacked * columns)
        assert kept < rows * columns, path
    places = [name for name in before if 'sampling_offsets' in name]
    now = dict(model.named_parameters())
    assert all(now[name] is before[name] for name in places)


# The term --------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_of_full_rank_there_is_nothing_to_learn(kind):
    term, step = pair(kind, 'full')
    found = term(step)
    assert found.keys() == set(ASPECTS)
    for name, one in found.items():
        assert one < 1e-6, name
    thin = step.student.detector.modules()
    assert any(isinstance(one, LowRankLinear) for one in thin)


@pytest.mark.parametrize('kind', KINDS)
def test_a_thin_one_learns_and_the_whole_one_does_not(kind):
    term, step = pair(kind)
    found = term(step)
    assert found.keys() == set(ASPECTS)
    assert all(one > 0 and one.isfinite() for one in found.values())
    sum(found.values()).backward()
    student, teacher = step.student.detector, step.teacher('big').detector
    assert student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(one.grad is None for one in teacher.parameters())


def test_aspects_of_attention_equal_the_formula():
    term, step = pair('detr', parts='decoder.layers.1.self_attn')
    sides = step.student, step.teacher('big')
    path = 'decoder.layers.1.self_attn.attn'
    said = []
    for side in sides:
        module = side.detector.get_submodule(path)
        _, given = side.inputs(path)
        weights = module.in_proj_weight.chunk(3)
        biases = module.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(given[name], weight, bias)
            for name, weight, bias in zip(
                ('query', 'key', 'value'), weights, biases
            )
        )  # T, N, C
        heads = [
            one.unflatten(-1, (4, 4)).permute(1, 2, 0, 3) for one in (q, k)
        ]
        rows = (heads[0] @ heads[1].mT / 4**0.5).softmax(-1)
        said.append(dict(q=q, k=k, v=v, o=side.at(path)[0], attn=rows))
    found = term(step)
    assert found.keys() == {'q', 'k', 'v', 'o', 'attn'}
    for aspect in 'qkvo':
        wanted = F.mse_loss(*(one[aspect] for one in said))
        torch.testing.assert_close(found[aspect], wanted)
    own, other = (one['attn'] for one in said)
    wanted = (other * (other / own).log()).sum(-1).mean()
    torch.testing.assert_close(found['attn'], wanted, rtol=1e-3, atol=1e-7)


def test_points_that_are_looked_at_have_weights_that_sum_to_one():
    term, step = pair('deformable', aspects=('attn',), parts='encoder')
    (path, read), *_ = term.sites['attn']
    (rows,) = read(step.student, path)
    assert rows.shape[-1] == 16  # four levels of four points
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    logits = step.student.at(path)
    torch.testing.assert_close(rows[..., 1, :], logits[..., 16:32].softmax(-1))


@pytest.mark.parametrize('kind', ['conditional', 'dab'])
def test_rows_of_conditional_attention_average_to_its_map(kind):
    term, step = pair(kind, aspects=('attn',), parts='decoder')
    for path, read in term.sites['attn']:
        (rows,) = read(step.student, path)
        torch.testing.assert_close(rows.mean(1), step.student.at(path)[1])


def test_a_matrix_before_its_relu_is_compared_as_a_whole():
    teacher = detrs.built('detr', **FEW)
    student = copy.deepcopy(teacher)
    factorize(student, 0.3, PARTS)
    for layer in student.encoder.layers:
        nn.init.normal_(layer.ffn.layers[0][0].bias)
    term = MultiAspectTerm('big', parts='encoder', aspects=('ffn1',))
    step = detrs.step_of(term, student, teacher)
    total = []
    for index in range(2):
        path = f'encoder.layers.{index}.ffn.layers.0.0'
        said = []
        for side in (step.student, step.teacher('big')):
            (x,), _ = side.inputs(path)
            said.append(side.detector.get_submodule(path)(x))
        assert (said[0] < 0).any()
        total.append(F.mse_loss(*said))
    torch.testing.assert_close(term(step)['ffn1'], sum(total) / 2)


@pytest.mark.parametrize('aspect', ASPECTS)
@pytest.mark.parametrize('kind', ['detr', 'dab', 'deformable'])
def test_every_aspect_teaches_its_own_matrices(kind, aspect):
    term, step = pair(kind, aspects=(aspect,))
    (share,) = term(step).values()
    share.backward()
    layer = step.student.detector.decoder.layers[-1]
    attention = layer.self_attn
    if aspect in ('ffn1', 'ffn2', 'hidden'):
        first, second, *_ = layer.ffn.layers
        own = [first[0] if aspect == 'ffn1' else second]
    elif kind == 'dab':
        ends = dict(q='qcontent_proj', k='kcontent_proj', v='v_proj')
        ends |= dict(o='out_proj', attn='qcontent_proj')
        own = [getattr(attention, ends[aspect])]
    else:
        one = attention.attn
        own = [one.out_proj if aspect == 'o' else one.in_proj]
    index = 'qkv'.find(aspect) if aspect in 'qkv' and kind != 'dab' else 0
    for one in own:
        for factor in (one.up, one.down):
            assert factor.grad[index].abs().sum() > 0


@pytest.mark.parametrize('kind', ['two_stage', 'dino'])
def test_a_decoder_whose_queries_are_chosen_is_asked_the_teachers(kind):
    term, step = pair(kind, parts='decoder', aspects=('hidden',))
    assert term.asks
    shown, model = step.teacher('big'), step.student.detector
    paths = [f'decoder.layers.{index}' for index in range(2)]
    with recording(model, paths) as record:
        ask(step.student, question(shown))
    total = [F.mse_loss(record.at(path), shown.at(path)) for path in paths]
    torch.testing.assert_close(term(step)['hidden'], sum(total) / 2)


@pytest.mark.parametrize('kind', ['detr', 'dab', 'deformable'])
def test_queries_that_are_learnt_are_compared_without_a_second_pass(kind):
    term, step = pair(kind)
    assert not term.asks
    model = step.student.detector
    with recording(model, ['forward_decoder']) as record:
        term(step)
    assert not record.has('forward_decoder')


def test_an_encoder_alone_asks_nothing():
    assert not pair('dino', parts='encoder')[0].asks


def test_queries_that_change_are_refused_in_decoders():
    teacher = detrs.built('ddq', **FEW)
    with pytest.raises(ValueError, match=r"Set parts=\('encoder',\)"):
        MultiAspectTerm('big', parts=PARTS).bind(
            teacher, dict(big=detrs.Shown(teacher))
        )
    term, step = pair('ddq', parts=('encoder',))
    assert all(one > 0 for one in term(step).values())

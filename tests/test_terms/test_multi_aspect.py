"""MaKD: every matrix, every block, every row of attention."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from swins import swin, thin

from mmkd.ops.low_rank import truncated
from mmkd.taps import recording
from mmkd.terms.multi_aspect import ASPECTS, rows_divergence

ALL = ('backbone', 'neck', 'bbox_head')


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    return tiny.save_teacher(
        swin(), tmp_path_factory.mktemp('whole') / 'swin.pth'
    )


@pytest.fixture
def build(file):
    def build(ratio=0.5, teacher=None, inherit=ALL, student=None, **term):
        model = tiny.distilled(
            student or thin(ratio),
            dict(
                whole=dict(
                    config=dict(model=teacher or swin()),
                    checkpoint=str(file),
                    inherit=inherit,
                )
            ),
            dict(
                aspects=dict(
                    type='mmkd.MultiAspectTerm', teacher='whole', **term
                )
            ),
        )
        student = tiny.build(model)
        student.init_weights()
        return student.train()

    return build


def shares(student, seed=3):
    losses = student.loss(*tiny.batch(seed=seed))
    start = 'loss_kd_aspects_'
    return {
        key.removeprefix(start): one
        for key, one in losses.items()
        if key.startswith(start)
    }


def test_a_student_of_full_rank_has_nothing_to_learn(build):
    found = shares(build('full'))
    assert set(found) == set(ASPECTS)
    for one in found.values():
        assert one < 1e-6


def test_it_starts_as_the_nearest_product_of_the_teacher(build):
    student = build()
    layer = student.backbone.stages[1].blocks[0].ffn.layers[1]
    whole = student.teachers['whole'].detector
    dense = whole.backbone.stages[1].blocks[0].ffn.layers[1].weight
    up, down = truncated(dense, layer.rank)
    torch.testing.assert_close(layer.weight, up @ down)
    assert student.backbone.patch_embed.projection.weight.equal(
        whole.backbone.patch_embed.projection.weight
    )


def test_each_aspect_is_the_mean_over_its_layers_by_hand(build):
    student = build()
    found = shares(student)
    whole = student.teachers['whole'].detector
    images, _ = tiny.batch(seed=3)
    blocks = [f'backbone.stages.{i}.blocks.0' for i in range(4)]
    ends = dict(
        qkv='attn.w_msa.qkv',
        o='attn.w_msa.proj',
        attn='attn.w_msa.softmax',
        ffn1='ffn.layers.0.0',
        ffn2='ffn.layers.1',
    )
    paths = [*blocks, *(f'{b}.{end}' for b in blocks for end in ends.values())]
    with torch.no_grad():
        outputs = []
        for one in (student, whole):
            with recording(one, paths) as record:
                one.extract_feat(images)
            outputs.append(record)

    def mean(distance, end=''):
        return torch.stack(
            [
                distance(*(one.at(f'{block}{end}') for one in outputs))
                for block in blocks
            ]
        ).mean()

    for aspect in ('o', 'ffn1', 'ffn2'):
        wanted = mean(F.mse_loss, f'.{ends[aspect]}')
        torch.testing.assert_close(found[aspect], wanted)
    # A block hands on its tokens with the size of their grid.
    torch.testing.assert_close(found['hidden'], mean(F.mse_loss))
    for index, aspect in enumerate('qkv'):

        def third(student, teacher, index=index):
            width = student.shape[-1] // 3
            part = slice(index * width, (index + 1) * width)
            return F.mse_loss(student[..., part], teacher[..., part])

        torch.testing.assert_close(
            found[aspect], mean(third, f'.{ends["qkv"]}')
        )

    def divergence(student, teacher):
        rows = student.shape[:-1].numel()
        return F.kl_div(student.log(), teacher, reduction='sum') / rows

    torch.testing.assert_close(
        found['attn'],
        mean(divergence, f'.{ends["attn"]}'),
        atol=1e-6,
        rtol=1e-3,
    )


def test_rows_of_attention_sum_to_one(build):
    student = build()
    path = 'backbone.stages.0.blocks.0.attn.w_msa.softmax'
    with recording(student, [path]) as record:
        student.extract_feat(tiny.batch()[0])
    rows = record.at(path).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_divergence_of_two_coins():
    student = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    teacher = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    wanted = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert rows_divergence(student, teacher).item() == pytest.approx(
        wanted / 2
    )


def test_divergence_of_a_masked_token_is_finite_and_teaches():
    student = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = rows_divergence(student, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert loss == 0
    assert student.grad.isfinite().all()


@pytest.mark.parametrize('aspect', ASPECTS)
def test_every_aspect_teaches_its_own_matrices(build, aspect):
    student = build(aspects=(aspect,))
    (share,) = shares(student).values()
    share.backward()
    block = student.backbone.stages[3].blocks[0]
    attention = block.attn.w_msa
    own = dict(
        o=attention.proj, ffn1=block.ffn.layers[0][0], ffn2=block.ffn.layers[1]
    ).get(aspect, attention.qkv)
    index = 'qkv'.find(aspect) if aspect in 'qkv' else 0
    for factor in (own.up, own.down):
        assert factor.grad[index].abs().sum() > 0
    if aspect in 'qkv':
        others = [one for one in range(3) if one != index]
        assert own.up.grad[others].abs().sum() == 0


def test_weights_by_name_scale_their_aspect(build):
    one = shares(build(aspects=dict(o=1.0, hidden=1.0)))
    other = shares(build(aspects=dict(o=3.0, hidden=0.5), loss_weight=2.0))
    torch.testing.assert_close(other['o'], 6 * one['o'])
    torch.testing.assert_close(other['hidden'], one['hidden'])


def test_without_weight_it_does_not_run(build):
    student = build(loss_weight=0.0)
    assert student.terms['aspects'].silent()


def test_the_loss_falls_over_a_few_steps(build):
    student = build()
    optimiser = torch.optim.AdamW(student.backbone.parameters(), lr=3e-3)
    totals = []
    for _ in range(6):
        total = sum(shares(student).values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]


def test_an_unknown_aspect_is_refused_with_the_nearest(build):
    with pytest.raises(ValueError, match="no aspect 'hiden'.*'hidden'"):
        build(aspects=('hiden',))


def test_a_detector_without_attention_is_refused(teachers):
    with pytest.raises(ValueError, match='reads layers of attention'):
        tiny.build(
            tiny.distilled(
                tiny.retinanet(),
                teachers,
                dict(a=dict(type='mmkd.MultiAspectTerm', teacher='big')),
            )
        )


def test_a_student_of_another_width_is_refused(build, file, tmp_path):
    wide = swin(embed_dims=16)
    wide.neck.in_channels = [32, 64, 128]
    student = dict(
        wide, type='mmkd.Factorized', detector='RetinaNet', rank_ratio=0.5
    )
    with pytest.raises(ValueError, match='outputs of one shape'):
        build(student=student, inherit=False)


def test_a_student_that_inherits_from_another_width_is_refused(build):
    wide = swin(embed_dims=16)
    wide.neck.in_channels = [32, 64, 128]
    student = dict(
        wide, type='mmkd.Factorized', detector='RetinaNet', rank_ratio=0.5
    )
    with pytest.raises(ValueError, match='Factorize the detector whose'):
        build(student=student)

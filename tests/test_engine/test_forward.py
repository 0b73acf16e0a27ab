"""Students in other precisions and layouts, compiled, or computed twice."""

import copy

import pytest
import runs
import tiny
import torch
from mmengine.optim import OptimWrapper
from mmengine.runner.activation_checkpointing import (
    turn_on_activation_checkpointing as theirs,
)
from torch.optim import SGD

from mmkd.engine.forward import (
    compile_parts,
    turn_on_activation_checkpointing,
)

data, quick_starts = runs.data, runs.quick_starts

#: At necks and heads, with weights of its own, by passes of its own.
TERMS = dict(
    pkd=dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='neck',
        levels=(0, 1, 2),
        loss=dict(type='mmkd.PKDLoss'),
    ),
    fgd=dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='neck',
        levels=(0, 1, 2),
        loss=dict(type='mmkd.FGDLoss', channels=16),
    ),
    scores=dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='bbox_head',
        output=0,
        levels=(0, 1, 2, 3, 4),
        loss=dict(type='mmkd.CWDLoss'),
    ),
    cross=dict(type='mmkd.CrossHeadTerm', teacher='big', convs=1),
)
#: At a layer inside of the backbone.
INSIDE = dict(
    stage=dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        tap='backbone.layer3',
        levels=(0,),
        align=dict(type='mmkd.ConvAdapt', in_channels=32, out_channels=64),
        loss=dict(type='mmkd.MimicLoss'),
    )
)


@pytest.fixture(scope='module')
def build(tmp_path_factory):
    teacher = tiny.retinanet(base=16)
    file = tmp_path_factory.mktemp('teacher') / 'big.pth'
    tiny.save_teacher(copy.deepcopy(teacher), file)

    def model(terms):
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        return tiny.distilled(tiny.retinanet(), dict(big=big), terms)

    def build(terms=TERMS):
        torch.manual_seed(1)
        found = tiny.build(model(terms))
        found.init_weights()
        return found.train()

    build.model = model
    return build


def taught(model, images=None):
    """Losses of a batch, and the gradient of all weights in one vector."""
    batch, samples = tiny.batch()
    losses = model.loss(batch if images is None else images(batch), samples)
    tiny.total(losses).backward()
    gradient = [
        one.grad.flatten().float()
        for one in model.parameters()
        if one.grad is not None
    ]
    return losses, torch.cat(gradient)


@pytest.fixture(scope='module')
def plain(build):
    return taught(build())


def assert_same(found, wanted):
    for name, value in wanted[0].items():
        torch.testing.assert_close(found[0][name], value)
    assert found[1].shape == wanted[1].shape, 'another weight has none'
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


# Precision and layout --------------------------------------------------------


def test_half_precision_teaches_what_single_does(build, plain):
    model = build()
    with torch.autocast('cpu', torch.bfloat16):
        losses, gradient = taught(model)
    for name, value in losses.items():
        if 'loss_kd' in name:
            assert value.dtype == torch.float32, name
            assert value.item() == pytest.approx(
                plain[0][name].item(), rel=0.02
            )
    assert torch.cosine_similarity(gradient, plain[1], 0) > 0.99


def test_channels_last_teaches_what_channels_first_does(build, plain):
    model = build().to(memory_format=torch.channels_last)
    found = taught(
        model, lambda one: one.contiguous(memory_format=torch.channels_last)
    )
    assert_same(found, plain)


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(build):
    batches = [tiny.batch(seed=number) for number in (0, 1)]
    model = build()
    before = model.backbone.conv1.weight.detach().clone()
    wrapper = OptimWrapper(SGD(model.parameters(), 0.1), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 2)
    for one in batches:
        wrapper.update_params(tiny.total(model.loss(*one)))
    expected = torch.zeros_like(before)
    for one in batches:
        other = build()
        tiny.total(other.loss(*one)).backward()
        expected += other.backbone.conv1.weight.grad / 2
    found = (before - model.backbone.conv1.weight) / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# Compiled --------------------------------------------------------------------


def test_compiled_parts_teach_what_others_do(build, plain):
    torch.compiler.reset()
    model = build()
    called = []

    def backend(graph, inputs):
        called.append(graph)
        return graph.forward

    parts = compile_parts(model, dict(backend=backend))
    assert parts == ['backbone', 'neck']
    assert_same(taught(model), plain)
    assert called, 'nothing was compiled'


def test_a_part_is_not_compiled_around_a_tap(build):
    parts = compile_parts(build(INSIDE), dict(backend='eager'))
    assert parts == ['neck']


# Computed twice --------------------------------------------------------------


@pytest.mark.parametrize('terms', [TERMS, INSIDE])
def test_what_is_forgotten_teaches_as_well(build, terms):
    """Images have no gradient, and a layer inside is tapped."""
    model = build(terms)
    turn_on_activation_checkpointing(model, ['backbone', 'neck'])
    assert_same(taught(model), taught(build(terms)))


def test_a_tap_that_no_gradient_leaves_is_told(build):
    """As MMEngine checkpoints."""
    model = build(INSIDE)
    theirs(model, 'backbone')
    with pytest.raises(ValueError, match=r"through 'backbone\.layer3'"):
        taught(model)


def test_a_tap_that_learns_nothing_by_design_is_none(build):
    model = build(INSIDE)
    model.backbone.requires_grad_(False)
    taught(model)


def test_a_misspelt_part_is_told(build):
    with pytest.raises(ValueError, match="Did you mean 'backbone'"):
        turn_on_activation_checkpointing(build(), 'backbnoe')


# By a config -----------------------------------------------------------------


def test_a_config_asks_for_both(build, data, tmp_path):
    """And the training is the same."""
    found = []
    for number, settings in enumerate(
        [
            {},
            dict(compile=dict(backend='eager')),
            dict(activation_checkpointing=['backbone']),
        ]
    ):
        torch.compiler.reset()
        cfg = runs.config(
            data,
            tmp_path / str(number),
            epochs=None,
            iters=2,
            model=build.model(INSIDE),
            **settings,
        )
        weights = runs.train(cfg)['weights']
        found.append(weights['backbone.layer3.0.conv1.weight'])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-6)

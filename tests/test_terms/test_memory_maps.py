import detrs
import pytest
import tiny
import torch
from asking import detector, distilled, recorded, step_of

from mmkd.build import build
from mmkd.terms.memory_maps import MAPS, MemoryTerm
from mmkd.terms.queries import ENCODER
from mmkd.terms.query_matching import memory_maps

PADDED = dict(shapes=((128, 128), (96, 64)))


def term(loss='mmkd.MimicLoss', **settings):
    return dict(
        type='mmkd.MemoryTerm',
        teacher='big',
        loss=dict(type=loss),
        **settings,
    )


@pytest.mark.parametrize('kind', ['detr', 'dab', 'deformable', 'ddq'])
def test_maps_are_the_tokens_in_their_places(kind):
    record = recorded(detector(kind), *tiny.batch(**PADDED))
    memory, maps = record.at(ENCODER)['memory'], memory_maps(record)
    sizes = [tuple(one.shape[-2:]) for one in record.at(MAPS)]
    assert [tuple(one.shape[-2:]) for one in maps] == sizes
    start = 0
    for one in maps:
        rows, columns = one.shape[-2:]
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
            token = memory[:, start + row * columns + column]
            assert torch.equal(one[:, :, row, column], token)
        start += rows * columns
    assert start == memory.shape[1]


def test_detr_reads_the_last_map_of_several():
    record = recorded(detector('detr'), *tiny.batch())
    finer = torch.zeros(2, 16, 8, 8)

    class Several:
        detector, has = record.detector, record.has

        def at(self, path):
            maps = record.at(path)
            return maps if path == ENCODER else (finer, *maps)

    (one,) = memory_maps(Several())
    assert one.shape == record.at(MAPS)[0].shape


def test_tokens_of_other_maps_are_refused():
    record = recorded(detector('detr'), *tiny.batch())

    class Other:
        detector, has = record.detector, record.has

        def at(self, path):
            return (
                record.at(path) if path == ENCODER else torch.zeros(2, 1, 5, 5)
            )

    with pytest.raises(ValueError, match='DETR has a memory of 16 tokens'):
        memory_maps(Other())


def test_a_loss_sees_the_maps_of_both():
    student, teacher = detector('deformable'), detector('deformable', 1)
    step = step_of(student, teacher, **PADDED)
    own, other = (
        memory_maps(one) for one in (step.student, step.teacher('big'))
    )
    loss = build(dict(type='mmkd.MimicLoss'), 'loss')
    expected = sum(loss(*pair, step.gt) for pair in zip(own, other))
    found = MemoryTerm('big', dict(type='mmkd.MimicLoss'))(step)
    torch.testing.assert_close(found, expected)
    (level,) = MemoryTerm('big', dict(type='mmkd.MimicLoss'), levels=(2,))(
        step
    )[None]
    torch.testing.assert_close(level, loss(own[2], other[2], step.gt))


@pytest.mark.parametrize('kinds', [('deformable', 'ddq'), ('detr', 'dab')])
@pytest.mark.parametrize(
    'loss', ['mmkd.PKDLoss', 'mmkd.CWDLoss', 'mmkd.FGDFocalLoss']
)
def test_every_loss_on_maps_fits(kinds, loss, tmp_path):
    models = [detrs.detr(kind) for kind in kinds]
    model = distilled(*models, term(loss), tmp_path)
    losses = model.loss(*tiny.batch(**PADDED))
    shares = [one for key, one in losses.items() if 'loss_kd' in key]
    sum(shares).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    for one in model.teachers['big'].detector.parameters():
        assert one.grad is None


def test_other_widths_are_aligned(tmp_path):
    kinds = [detrs.detr(kind) for kind in ('detr', 'conditional')]
    with pytest.raises(ValueError, match='ConvAdapt.*in_channels=16'):
        distilled(*kinds, term(), tmp_path)
    align = dict(type='mmkd.ConvAdapt', in_channels=[16], out_channels=256)
    model = distilled(*kinds, term(align=align), tmp_path)
    assert model.loss(*tiny.batch())['loss_kd_x'] > 0


def test_other_numbers_of_maps_are_refused(tmp_path):
    kinds = [detrs.detr(kind) for kind in ('detr', 'deformable')]
    with pytest.raises(ValueError, match='has 1 maps.*4.*teacher_levels='):
        distilled(*kinds, term(), tmp_path)
    distilled(*kinds, term(levels=(0,), teacher_levels=(2,)), tmp_path)


def test_detectors_without_queries_are_refused(tmp_path):
    with pytest.raises(ValueError, match='student, .*RetinaNet, has none'):
        distilled(tiny.retinanet(), detrs.detr('dab'), term(), tmp_path)

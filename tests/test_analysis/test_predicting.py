import heads
import pictures
import pytest
import tiny
import torch
from families import ssd, yolox
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from mmkd.analysis import predicting
from mmkd.analysis.predicting import main
from mmkd.datasets.tracking import LoadPredictions
from mmkd.ops.edges import bin_places
from mmkd.registry import MODELS
from mmkd.store import PREDICTIONS, Store

SIZES = ((128, 160), (96, 128), (160, 128))


def fcos():
    model = heads.fcos()
    model['bbox_head']['norm_on_bbox'] = False  # else boxes without extent
    return model


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes the config and weights of a teacher, and its pictures."""
    monkeypatch.chdir(tmp_path)

    def make(model, *resize):
        pictures.draw(tmp_path, SIZES)
        detector = tiny.lively(model)
        torch.save(dict(state_dict=detector.state_dict()), 'teacher.pth')
        loader = dict(
            batch_size=2, dataset=pictures.dataset(tmp_path, *resize)
        )
        Config(
            dict(model=model, train_dataloader=loader, test_dataloader=loader)
        ).dump('teacher.py')
        return detector

    return make


def run(capsys, *options):
    capsys.readouterr()
    status = main(['teacher.py', 'teacher.pth', '--out', 'said', *options])
    told = capsys.readouterr()
    return status, told.out + told.err


def student(model, **settings):
    """The teacher itself, taught by what it said."""
    term = dict(type='mmkd.StoredPredictionTerm', **settings)
    found = MODELS.build(tiny.distilled(model, {}, dict(said=term)))
    found.load_state_dict(torch.load('teacher.pth')['state_dict'])
    return found


def shares(model, folder, *transforms, **more):
    """The greatest over the pictures."""
    load = dict(type='mmkd.LoadPredictions', folder='said', clip=False)
    load.update(more)
    track = dict(type='mmkd.TrackPixels')
    config = pictures.dataset(folder, track, *transforms, last=[load])
    found = {}
    for data in DATASETS.build(config):
        # One by one: in a wider border it would say something else.
        made = model.data_preprocessor(pseudo_collate([data]), training=True)
        with torch.no_grad():
            losses = model.loss(made['inputs'], made['data_samples'])
        for key, one in losses.items():
            if 'said' in key:
                found[key] = max(one, found.get(key, one))
    return found


@pytest.mark.parametrize('build', [heads.gfl, fcos, heads.atss])
def test_a_teacher_has_nothing_to_learn_from_what_it_said(
    make, capsys, tmp_path, build
):
    """Cells, anchors, boxes and scores are put back where they came from."""
    model = build()
    make(model)
    status, told = run(capsys, '--cells', '60', '--classes', '3')
    assert status == 0
    assert 'said: 3 images' in told
    learner = student(build()).eval()
    own = shares(learner, tmp_path)
    assert own['loss_kd_said_class'] < 1e-4
    assert own['loss_kd_said_box'] < 1e-3
    other = student(build()).eval()
    for one in other.parameters():
        one.data.add_(0.2 * torch.randn_like(one) * one.abs().mean())
    moved = shares(other, tmp_path)
    assert moved['loss_kd_said_class'] > 100 * own['loss_kd_said_class']


def test_of_several_anchors_the_nearest_is_asked(make, capsys, tmp_path):
    """Not always the one that said so, whose box is another one."""
    make(tiny.retinanet())
    run(capsys, '--cells', '40', '--classes', '3')
    learner = student(tiny.retinanet()).eval()
    assert all(one.isfinite() for one in shares(learner, tmp_path).values())


def test_what_is_kept_is_the_surest(make, capsys):
    """Literally: sort all anchors of all levels by their best class."""
    model = heads.fcos()
    detector = make(model)
    run(capsys, '--cells', '7', '--classes', '2')
    dataset = DATASETS.build(
        Config.fromfile('teacher.py').test_dataloader.dataset
    )
    for index in range(3):
        data = pseudo_collate([dataset[index]])
        made = detector.data_preprocessor(data, False)
        with torch.no_grad():
            maps = detector.bbox_head(detector.extract_feat(made['inputs']))
        height, width = made['data_samples'][0].img_shape
        found = []
        for logits, stride in zip(maps[0], detector.bbox_head.strides):
            for row in range(logits.shape[2]):
                for column in range(logits.shape[3]):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    if x < width and y < height:
                        top = logits[0, :, row, column].topk(2)
                        found.append((top.values[0].item(), x, y, stride, top))
        found.sort(key=lambda one: -one[0])
        store = Store('said', 'test')
        said = store.read(str(index).encode(), [PREDICTIONS], 'cpu')
        said = said[PREDICTIONS]
        for place, (_, x, y, stride, top) in enumerate(found[:7]):
            assert said['points'][place].tolist() == [x, y]
            assert said['strides'][place] == stride
            assert said['labels'][place].tolist() == top.indices.tolist()
            torch.testing.assert_close(
                said['logits'][place].float(), top.values, atol=0, rtol=1e-3
            )


def test_they_are_in_pixels_of_the_image_as_stored(make, capsys, tmp_path):
    """Asked at twice the size, they are told at the size on disk."""
    resize = dict(type='Resize', scale=(320, 320), keep_ratio=True)
    make(heads.gfl(), resize)
    run(capsys, '--cells', '30', '--classes', '3')
    learner = student(heads.gfl()).eval()
    found = shares(learner, tmp_path, resize)
    assert found['loss_kd_said_class'] < 1e-4
    assert found['loss_kd_said_box'] < 1e-3
    said = Store('said', '').read(b'0', [PREDICTIONS], 'cpu')[PREDICTIONS]
    assert (said['points'] < torch.tensor([160, 128])).all()


def test_distributions_are_put_back_where_they_came_from(
    make, capsys, tmp_path
):
    """Bin by bin, asked at twice the size that is on disk."""
    resize = dict(type='Resize', scale=(320, 320), keep_ratio=True)
    make(heads.gfl(), resize)
    assert run(capsys, '--cells', '30')[0] == 0
    learner = student(heads.gfl(), edge_weight=1.0, temperature=3.0).eval()
    found = shares(learner, tmp_path, resize, edges=True)
    assert found['loss_kd_said_edge'] < 1e-5
    for one in learner.parameters():
        one.data.add_(0.2 * torch.randn_like(one) * one.abs().mean())
    moved = shares(learner, tmp_path, resize, edges=True)
    assert moved['loss_kd_said_edge'] > 100 * found['loss_kd_said_edge']


def test_bins_and_boxes_are_of_one_anchor(make, capsys):
    """Boxes are the means of their edges, in pixels as stored."""
    resize = dict(type='Resize', scale=(480, 256), keep_ratio=False)
    make(heads.gfl(), resize)
    run(capsys)
    for image in '012':
        said = Store('said', '').read(image.encode(), [PREDICTIONS], 'cpu')
        said = said[PREDICTIONS]
        places = bin_places(said['origins'], said['steps'], 4)
        mean = (said['edges'].float().softmax(2) * places).sum(2)
        torch.testing.assert_close(mean, said['bboxes'], atol=0.1, rtol=1e-3)


def test_distributions_are_kept_where_there_are_some(make, capsys):
    def kept():
        said = Store('said', '').read(b'0', [PREDICTIONS], 'cpu')
        return 'edges' in said[PREDICTIONS]

    make(heads.gfl())
    assert run(capsys)[0] == 0
    assert kept()
    LoadPredictions('said', edges=True)
    status, told = run(capsys, '--no-edges')
    assert status == 1
    assert 'edges' in told
    assert run(capsys, '--no-edges', '--overwrite')[0] == 0
    assert not kept()
    with pytest.raises(ValueError, match=r'holds no distributions.*--edges'):
        LoadPredictions('said', edges=True)


def test_a_teacher_without_distributions_is_told(make, capsys):
    make(heads.fcos())
    status, told = run(capsys, '--edges')
    assert status == 1
    assert 'FCOSHead gives none' in told
    assert run(capsys)[0] == 0


def test_objectness_is_part_of_a_score(make, capsys):
    make(yolox())
    status, _ = run(capsys)
    assert status == 0


def test_a_teacher_of_a_softmax_is_told_of_another_way(make, capsys):
    make(ssd())
    status, told = run(capsys)
    assert status == 1
    assert 'tools/make_hypotheses.py' in told


def test_it_goes_on_where_it_was_interrupted(make, capsys, monkeypatch):
    make(heads.gfl())
    asked = []
    plain = predicting.surest

    def surest(*given):
        asked.append(given)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(predicting, 'surest', surest)
        with pytest.raises(KeyboardInterrupt):
            run(capsys)
        with pytest.raises(ValueError, match='not finished'):
            LoadPredictions('said')
        run(capsys)
    assert len(asked) == 4
    status, told = run(capsys, '--cells', '5')
    assert status == 1
    assert 'cells differ' in told
    assert run(capsys, '--cells', '5', '--overwrite')[0] == 0


@pytest.mark.parametrize('option', ['--cells', '--classes'])
def test_nothing_is_not_kept(make, capsys, option):
    make(heads.gfl())
    status, told = run(capsys, option, '0')
    assert status == 1
    assert 'at least one' in told

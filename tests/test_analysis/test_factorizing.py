"""A detector of thin matrices, written for plain MMDetection."""

import pytest
import tiny
import torch
from mmengine.config import Config
from swins import swin

from mmkd.analysis.factorizing import main
from mmkd.configs import read_config


@pytest.fixture
def files(tmp_path):
    config = tmp_path / 'whole.py'
    Config(dict(model=swin().to_dict())).dump(config)
    weights = tiny.save_teacher(
        swin(),
        tmp_path / 'whole.pth',
        meta=dict(dataset_meta=dict(classes=('a', 'b', 'c'))),
    )
    return str(config), str(weights)


def built(out):
    model = tiny.build(read_config(out).model)
    checkpoint = torch.load(out.with_suffix('.pth'), weights_only=True)
    model.load_state_dict(checkpoint['state_dict'])
    return model.eval(), checkpoint


def test_at_full_rank_what_is_written_detects_as_the_whole_one(
    files, tmp_path
):
    out = tmp_path / 'new' / 'thin.py'
    assert main([*files, '--out', str(out), '--rank-ratio', 'full']) == 0
    model, checkpoint = built(out)
    assert checkpoint['meta']['dataset_meta']['classes'] == ('a', 'b', 'c')
    whole = tiny.build(swin()).eval()
    whole.load_state_dict(torch.load(files[1])['state_dict'])
    images, _ = tiny.batch()
    with torch.no_grad():
        for one, other in zip(model._forward(images), whole._forward(images)):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert [path.name for path in sorted(out.parent.iterdir())] == [
        'thin.pth',
        'thin.py',
    ]


def test_it_says_what_each_layer_keeps_and_loses(files, tmp_path, capsys):
    out = tmp_path / 'thin.py'
    assert main([*files, '--out', str(out), '--rank-ratio', '0.3']) == 0
    said = capsys.readouterr().out
    model, _ = built(out)
    layer = model.backbone.stages[3].blocks[0].ffn.layers[1]
    whole = tiny.build(swin())
    whole.load_state_dict(torch.load(files[1])['state_dict'])
    dense = whole.backbone.stages[3].blocks[0].ffn.layers[1].weight
    values = torch.linalg.svdvals(dense)
    lost = (values[layer.rank :].norm() / values.norm()).item()
    (line,) = (
        one
        for one in said.splitlines()
        if one.startswith('backbone.stages.3.blocks.0.ffn.layers.1 ')
    )
    assert line.split(' | ')[1:3] == ['64 x 256', str(layer.rank)]
    assert float(line.split(' | ')[-1]) == pytest.approx(lost, abs=1e-3)
    assert 'layers keep' in said


def test_files_that_are_there_stay_unless_told(files, tmp_path, capsys):
    out = tmp_path / 'thin.py'
    out.write_text('mine')
    assert main([*files, '--out', str(out)]) == 1
    assert '--overwrite' in capsys.readouterr().err
    assert out.read_text() == 'mine'
    assert main([*files, '--out', str(out), '--overwrite']) == 0
    built(out)


def test_weights_of_another_detector_are_refused(files, tmp_path, capsys):
    other = tiny.save_teacher(tiny.retinanet(), tmp_path / 'other.pth')
    out = tmp_path / 'thin.py'
    assert main([files[0], str(other), '--out', str(out)]) == 1
    assert 'is not of the detector of' in capsys.readouterr().err
    assert not out.exists()


def test_an_ending_that_is_no_config_is_refused(files, tmp_path, capsys):
    assert main([*files, '--out', str(tmp_path / 'thin.json')]) == 1
    assert "It has '.py'" in capsys.readouterr().err

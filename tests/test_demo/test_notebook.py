import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')

NOTEBOOK = Path(__file__).resolve().parents[2] / 'demo' / 'distillation.ipynb'


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook):
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name='python3',
        resources=dict(metadata=dict(path=str(NOTEBOOK.parent))),
    )
    return client.execute()


def printed(notebook):
    return '\n'.join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == 'code'
        for output in cell.outputs
        if output.output_type == 'stream' and output.name == 'stdout'
    )


def pictures(notebook):
    return sum(
        'image/png' in output.get('data', {})
        for cell in notebook.cells
        if cell.cell_type == 'code'
        for output in cell.outputs
    )


def test_notebook_is_stored_without_outputs():
    for cell in read().cells:
        if cell.cell_type == 'code':
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_every_cell_runs(monkeypatch, tmp_path):
    """With one epoch and a few images: what it says is not looked at."""
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    notebook = read()
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    source = '\0'.join(cell.source for cell in code)
    for setting, value in (
        (r'EPOCHS = .*', 'EPOCHS = dict(teacher=1, alone=1, distilled=1)'),
        (r'IMAGES = .*', 'IMAGES = dict(train=32, val=16)'),
        # After so little training every score is small.
        (r'score_thr=0\.05', 'score_thr=0.0'),
    ):
        source, count = re.subn(setting, value, source)
        assert count == 1
    for cell, text in zip(code, source.split('\0')):
        cell.source = text
    notebook = run(notebook)
    assert pictures(notebook) == 4
    assert 'equal to its file: True' in printed(notebook)


@pytest.mark.slow
def test_teacher_is_above_both_students(monkeypatch, tmp_path):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    notebook = run(read())
    text = printed(notebook)
    ap = {
        name: float(value)
        for name, value in re.findall(r'^(\w+): .* AP ([\d.]+)$', text, re.M)
    }
    assert ap['teacher'] > max(ap['alone'], ap['distilled']) > 20
    far = re.findall(r'is ([\d.]+) from the teacher', text)
    alone, distilled = (float(one) for one in far)
    assert distilled < alone

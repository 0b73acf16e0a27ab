"""The quick start's configs; `make demo` is the rest."""

from pathlib import Path

from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]


def test_student_and_distilled_differ_in_the_model_alone():
    folder = ROOT / 'demo' / 'configs'
    alone = Config.fromfile(folder / 'student.py').to_dict()
    distilled = Config.fromfile(folder / 'distilled.py').to_dict()
    one, other = alone.pop('model'), distilled.pop('model')
    assert alone == distilled
    assert other.pop('student') == one['type']
    del other['teachers'], other['terms'], other['type'], one['type']
    assert one == other

import pytest
import tiny
from mmengine.config import Config, ConfigDict

from mmkd.configs import OWN_KEYS, read_config, student_config

FILE = "model = dict(type='FCOS', neck=dict(num_outs=5))\nlr = 0.1\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'fcos_r50.py'
    path.write_text(FILE)
    return path


@pytest.fixture
def sources(file):
    return dict(
        path=file,
        text=str(file),
        config=Config.fromfile(file),
        dict=dict(model=dict(type='FCOS', neck=dict(num_outs=5)), lr=0.1),
    )


@pytest.mark.parametrize('kind', ['path', 'text', 'config', 'dict'])
def test_a_config_is_read_from_anything_that_holds_one(sources, kind):
    config = read_config(sources[kind])
    assert config.model == dict(type='FCOS', neck=dict(num_outs=5))
    assert config.lr == 0.1


@pytest.mark.parametrize('kind', ['config', 'dict'])
def test_the_source_is_left_as_it_was(sources, kind):
    source = sources[kind]
    read_config(source, cfg_options={'model.neck.num_outs': 3, 'lr': 1})
    assert source['model']['neck']['num_outs'] == 5
    assert source['lr'] == 0.1


def test_options_replace_by_dotted_name(file):
    config = read_config(file, cfg_options={'model.neck.num_outs': 3})
    assert config.model.neck == dict(num_outs=3)
    assert config.model.type == 'FCOS'


def test_a_packaged_config_is_read_by_its_prefix():
    config = read_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert config.model.type == 'RetinaNet'
    assert config.model.backbone.depth == 50, 'the bases came along'


def test_a_missing_file_suggests_its_neighbour(file):
    with pytest.raises(
        FileNotFoundError, match=r"^Teacher 'r50' has no config.*fcos_r50\.py"
    ):
        read_config(file.with_name('fcos_r5O.py'), "Teacher 'r50'")


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match='folder .* does not exist'):
        read_config(tmp_path / 'none' / 'a.py')


def test_a_missing_packaged_config_suggests_the_nearest():
    with pytest.raises(
        FileNotFoundError,
        match="mean 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'",
    ):
        read_config('mmdet::retinanet/retinanet_r1O1_fpn_1x_coco.py')


@pytest.mark.parametrize('source', ['nopackage::a/b.py', 'mmdet::a.txt'])
def test_a_wrong_prefix_says_how_to_write_it(source):
    with pytest.raises(FileNotFoundError, match=r'mmdet::|package::'):
        read_config(source)


def test_the_student_beside_the_three_keys_is_the_plain_model():
    plain = tiny.retinanet()
    distilled = tiny.distilled(plain, dict(a=dict()), dict(b=dict()))
    assert student_config(distilled) == plain


def test_the_student_under_its_key_is_the_plain_model():
    plain = tiny.retinanet()
    distilled = dict(type='Distiller', student=plain, teachers={}, terms={})
    assert student_config(distilled) == plain


def test_a_plain_model_is_returned_as_it_is():
    plain = tiny.retinanet()
    assert student_config(plain) == plain
    assert isinstance(student_config(dict(plain)), ConfigDict)


def test_the_distillation_config_keeps_its_keys():
    distilled = tiny.distilled(tiny.retinanet(), dict(), dict())
    student_config(distilled)
    assert set(OWN_KEYS) <= set(distilled)


def test_phases_are_not_the_students():
    model = dict(
        type='mmkd.Distiller', student='FCOS', terms={}, phases=[dict()]
    )
    assert student_config(model) == dict(type='FCOS')


def test_a_package_that_is_not_there_is_named(tmp_path):
    """By the module that is missing, not by whoever tried to import it."""
    path = tmp_path / 'a.py'
    path.write_text("custom_imports = dict(imports=['my_ops.nested'])\n")
    with pytest.raises(ValueError, match="^me cannot read .*a.py'") as caught:
        read_config(path, 'me')
    said = str(caught.value)
    assert "No module named 'my_ops'. Install" in said
    assert said.endswith('PYTHONPATH=FOLDER')

import copy

import detrs
import mmengine.runner.checkpoint
import pytest
import tiny
import torch
from mmdet.models import RetinaNet
from mmengine.config import Config
from mmengine.registry import init_default_scope
from test_contracts import pretending
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkd.compat.checkpoint import CheckpointError
from mmkd.configs import student_config
from mmkd.pixels import Pixels
from mmkd.taps import recording
from mmkd.teachers import Teacher, Teachers, _sent, fed, run_detector

CLASSES = ('cat', 'dog', 'cow')


@pytest.fixture
def weights(teacher_file):
    return torch.load(teacher_file)['state_dict']


def teacher(checkpoint=None, **settings):
    init_default_scope('mmdet')
    settings.setdefault('config', dict(model=tiny.retinanet(base=16)))
    one = Teacher(checkpoint=checkpoint, name='big', **settings)
    one.tap('neck')
    return one


def loaded_weights(file, **settings):
    one = teacher(str(file), **settings)
    one.load()
    return one.detector.state_dict()


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert [k for k in state if not torch.equal(state[k], expected[k])] == []


@pytest.fixture
def save(tmp_path):
    def save(checkpoint, name='weights.pth'):
        torch.save(checkpoint, tmp_path / name)
        return tmp_path / name

    return save


def test_a_detector_whose_eval_returns_nothing_may_teach(monkeypatch):
    """mmdet's own distillers are such."""
    monkeypatch.setattr(
        RetinaNet, 'eval', lambda self: self.train(False) and 0
    )
    one = teacher()
    assert not one.detector.training
    assert not any(x.requires_grad for x in one.detector.parameters())


# Files as users have them ----------------------------------------------------


def test_a_part_that_stands_twice_in_a_file_is_taken_once(save, weights):
    """DDQ's decoder is handed a part of its head when it is first trained."""
    twice = dict(weights)
    for name in ('weight', 'bias'):
        value = weights[f'bbox_head.retina_cls.{name}']
        twice[f'decoder.retina_cls.{name}'] = value.clone()
    assert_equal(loaded_weights(save(twice)), weights)
    twice['decoder.retina_cls.bias'][0] += 1
    with pytest.raises(ValueError, match=r'1 are left over \(decoder.retina'):
        loaded_weights(save(twice))


def test_a_file_of_mmdet_3(save, weights):
    meta = dict(dataset_meta=dict(classes=CLASSES), mmengine_version='0.10.7')
    one = teacher(save(dict(state_dict=weights, meta=meta)))
    one.load()
    assert_equal(one.detector.state_dict(), weights)
    assert one.classes == CLASSES


def test_a_file_of_mmdet_2(save, weights):
    meta = dict(CLASSES=CLASSES, mmdet_version='2.25.0', config='...')
    file = save(dict(state_dict=weights, meta=meta, optimizer=dict(step=3)))
    one = teacher(file)
    one.load()
    assert_equal(one.detector.state_dict(), weights)
    assert one.classes == CLASSES


def test_a_bare_state_dict_says_nothing_of_classes(save, weights):
    one = teacher(save(weights))
    one.load()
    assert_equal(one.detector.state_dict(), weights)
    assert one.classes is None


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.'])
def test_names_with_a_wrappers_prefix(save, weights, prefix):
    wrapped = {f'{prefix}{key}': value for key, value in weights.items()}
    file = save(dict(state_dict=wrapped, meta={}))
    assert_equal(loaded_weights(file), weights)


@pytest.mark.parametrize('ema', [True, False])
def test_an_ema_file_of_mmengine_has_the_average_under_plain_names(
    save, weights, ema
):
    """EMAHook saves it as ``state_dict`` and the trained beside it."""
    trained = {key: value + 1 for key, value in weights.items()}
    beside = {f'module.{key}': value for key, value in trained.items()}
    file = save(
        dict(
            state_dict=weights,
            ema_state_dict=dict(beside, steps=torch.tensor(4)),
        )
    )
    expected = weights if ema else trained
    assert_equal(loaded_weights(file, ema=ema), expected)


@pytest.mark.parametrize('ema', [True, False])
def test_an_ema_file_of_mmdet_2_has_both_in_one_dict(save, weights, ema):
    trained = {key: value + 1 for key, value in weights.items()}
    twins = {
        f'ema_{key.replace(".", "_")}': value for key, value in trained.items()
    }
    file = save(dict(state_dict={**weights, **twins}))
    expected = weights if ema else trained
    assert_equal(loaded_weights(file, ema=ema), expected)


def test_a_distilled_checkpoint_teaches_as_its_student(save, weights):
    """Its terms' own weights are no detector's."""
    extra = {'terms.pkd.align.adapts.0.0.weight': torch.zeros(2, 2, 1, 1)}
    file = save(dict(state_dict={**weights, **extra}))
    assert_equal(loaded_weights(file), weights)


def test_a_distillation_config_teaches_as_its_student(
    teacher_file, teachers, terms
):
    model = tiny.distilled(tiny.retinanet(base=16), teachers, terms)
    one = teacher(str(teacher_file), config=Config(dict(model=model)))
    one.load()
    assert type(one.detector).__name__ == 'RetinaNet'


def test_a_config_file_with_other_classes(tmp_path, save):
    path = tmp_path / 'config.py'
    path.write_text(f'model = {tiny.retinanet(base=16).to_dict()!r}')
    file = tmp_path / 'five.pth'
    tiny.save_teacher(tiny.retinanet(base=16, classes=5), file)
    options = {'model.bbox_head.num_classes': 5}
    one = teacher(file, config=path, cfg_options=options)
    one.load()
    assert one.detector.bbox_head.num_classes == 5
    with pytest.raises(ValueError, match='set num_classes for this teacher'):
        teacher(file, config=path).load()


def test_an_address_is_downloaded(weights, monkeypatch):
    asked = []

    def download(address, *args, **kwargs):
        asked.append(address)
        return dict(state_dict=weights, meta=dict(CLASSES=CLASSES))

    monkeypatch.setattr(mmengine.runner.checkpoint, 'load_url', download)
    address = 'https://download.example.org/mmdetection/retinanet.pth'
    one = teacher(address)
    one.check_file()
    assert asked == [], 'nothing is fetched before training starts'
    one.load()
    one.load()
    assert asked == [address]
    assert_equal(one.detector.state_dict(), weights)


# Files that do not fit -------------------------------------------------------


def complaint(file, error=ValueError, **settings):
    one = teacher(file, **settings)
    before = copy.deepcopy(one.detector.state_dict())
    with pytest.raises(error) as caught:
        one.load()
    assert not one.loaded
    assert_equal(one.detector.state_dict(), before)
    return str(caught.value)


def test_missing_and_left_over_names_are_counted(save, weights):
    weights = dict(weights)
    del weights['backbone.conv1.weight'], weights['backbone.bn1.weight']
    weights['extra.weight'] = torch.zeros(1)
    message = complaint(save(dict(state_dict=weights)))
    assert f'Of {len(weights) + 1} tensors 2 are missing' in message
    assert 'backbone.conv1.weight' in message
    assert '0 have another shape' in message
    assert '1 are left over (extra.weight)' in message
    assert 'checkpoint of another detector' in message


def test_many_names_are_cut(save, weights):
    message = complaint(save(dict(state_dict=dict(list(weights.items())[:3]))))
    assert message.count('backbone.') <= 4
    assert ', …)' in message


def test_no_checkpoint_named_is_an_error_that_says_what_to_type():
    assert "big=dict(checkpoint='FILE.pth')" in complaint(
        None, FileNotFoundError
    )


def test_a_missing_file_names_the_option(tmp_path):
    message = complaint(tmp_path / 'none.pth', FileNotFoundError)
    assert "Teacher 'big'" in message
    assert 'model.teachers.big.checkpoint=FILE.pth' in message


@pytest.mark.parametrize('kept', [0, 100, 50_000])
def test_a_truncated_file_is_noticed_before_it_is_read(
    teacher_file, tmp_path, kept
):
    file = tmp_path / 'cut.pth'
    file.write_bytes(teacher_file.read_bytes()[:kept])
    assert "Teacher 'big'" in complaint(file, CheckpointError)


def test_a_broken_file_does_not_stop_inference(
    teachers, terms, teacher_file, tmp_path
):
    """As a missing one does not: the student needs neither."""
    file = tmp_path / 'cut.pth'
    file.write_bytes(teacher_file.read_bytes()[:100])
    teachers['big']['checkpoint'] = str(file)
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    images, samples = tiny.batch()
    assert len(student.eval().predict(images, samples)) == 2
    with pytest.raises(CheckpointError):
        student.init_weights()


# Structure -------------------------------------------------------------------


def test_nothing_is_fetched_to_build_it():
    """Pretrained backbones of its config would be overwritten anyway."""
    model = tiny.retinanet(base=16)
    model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='torchvision://resnet18'
    )
    one = teacher(config=dict(model=model))
    assert 'torchvision://' not in repr(
        [getattr(part, 'init_cfg', 0) for part in one.detector.modules()]
    )
    assert model.backbone.init_cfg.type == 'Pretrained', 'config untouched'


def test_everything_is_frozen_and_in_eval_mode_before_loading():
    detector = teacher().detector
    assert not any(one.training for one in detector.modules())
    assert not any(one.requires_grad for one in detector.parameters())


def test_copies_share_it(teacher_file):
    one = teacher(str(teacher_file))
    assert copy.deepcopy(one) is one
    assert copy.deepcopy(Teachers(big=one))['big'] is one
    assert copy.deepcopy(dict(inside=[one]))['inside'][0] is one


def test_a_wrong_tap_is_refused():
    with pytest.raises(ValueError, match="RetinaNet has no submodule 'nek'"):
        teacher().tap('nek')


def test_it_says_what_it_is(teacher_file):
    one = teacher(str(teacher_file))
    assert 'not loaded yet' in repr(one)
    one.load()
    assert 'retinanet.pth (loaded)' in repr(one)


def test_several_are_loaded_and_checked_together(teacher_file, tmp_path):
    one, other = teacher(str(teacher_file)), teacher(tmp_path / 'none.pth')
    both = Teachers(one=one, other=other)
    with pytest.raises(FileNotFoundError):
        both.check_files()
    Teachers(one=one).load()
    assert one.loaded


# What it is shown ------------------------------------------------------------


def with_divisor(divisor):
    return tiny.retinanet(
        base=16, pixels=dict(tiny.PIXELS, pad_size_divisor=divisor)
    )


def student_pixels():
    mean, std = tiny.PIXELS['mean'], tiny.PIXELS['std']
    return Pixels(tuple(mean), tuple(std), True, 0, 32)


@pytest.fixture
def narrow():
    """A batch of 96x96, a multiple of 32 and not of 64."""
    images, samples = tiny.batch(shapes=((96, 96), (80, 90)))
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(96, 96)))
    return images[..., :96, :96].contiguous(), samples


def test_it_sees_the_batch_padded_to_its_own_divisor(teacher_file, narrow):
    images, samples = narrow
    one = teacher(str(teacher_file), config=dict(model=with_divisor(64)))
    one.load()
    record = one.run(images, samples, student_pixels())
    padded = torch.nn.functional.pad(images, (0, 32, 0, 32))
    assert record.size == (128, 128)
    with torch.no_grad():
        expected = one.detector.extract_feat(padded)
    for a, b in zip(record.at('neck'), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_term_compares_the_cells_that_both_saw(
    teacher_file, teachers, terms, narrow
):
    from mmkd.losses.pkd import pkd_loss

    teachers['big']['config'] = dict(model=with_divisor(64))
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    student.teachers.load()
    images, samples = narrow
    with recording(student, ['neck']) as record:
        losses = student.loss(images, samples)
    own = record.at('neck')
    padded = torch.nn.functional.pad(images, (0, 32, 0, 32))
    with torch.no_grad():
        theirs = student.teachers['big'].detector.extract_feat(padded)
    expected = 0
    for mine, other in zip(own[:3], theirs[:3]):
        height, width = mine.shape[-2:]
        assert other.shape[-1] > width
        expected += 2 * pkd_loss(mine, other[..., :height, :width])
    torch.testing.assert_close(losses['loss_kd_pkd'], expected)


def test_samples_go_on_describing_the_students_batch(teacher_file, narrow):
    images, samples = narrow
    one = teacher(str(teacher_file), config=dict(model=with_divisor(64)))
    one.load()
    for sample in samples:
        del sample.batch_input_shape
    one.run(images, samples, student_pixels())
    shapes = [sample.get('batch_input_shape', (96, 96)) for sample in samples]
    assert [tuple(shape) for shape in shapes] == [(96, 96)] * 2


def test_a_head_that_reads_the_padded_size_is_told_its_own(
    teacher_file, narrow, monkeypatch
):
    """Query-based detectors mask what lies beyond ``batch_input_shape``."""
    images, samples = narrow
    one = teacher(str(teacher_file), config=dict(model=with_divisor(64)))
    one.load()
    told = []
    forward = one.detector._forward
    monkeypatch.setattr(
        one.detector,
        '_forward',
        lambda images, samples: (
            told.append(tuple(samples[0].batch_input_shape))
            or forward(images, samples)
        ),
    )
    one.run(images, samples, student_pixels())
    assert told == [(128, 128)]
    assert samples[0].batch_input_shape == (96, 96)


def test_a_graph_to_the_images_is_kept_on_demand(teacher_file):
    one = teacher(str(teacher_file))
    one.load()
    images, samples = tiny.batch()
    images.requires_grad_()
    record = one.run(images, samples, student_pixels())
    assert not record.at('neck')[0].requires_grad
    record = one.run(images, samples, student_pixels(), grad=True)
    record.at('neck')[0].sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(one.grad is None for one in one.detector.parameters())


def test_taps_of_one_run_can_be_chosen(teacher_file):
    one = teacher(str(teacher_file))
    one.load()
    images, samples = tiny.batch()
    record = one.run(images, samples, student_pixels(), paths=['backbone'])
    assert record.has('backbone')
    assert not record.has('neck')


def test_heads_can_be_fed():
    detector = tiny.build(tiny.retinanet()).eval()
    images, samples = tiny.batch()
    maps = tuple(2 * one for one in detector.extract_feat(images))
    with pytest.raises(ZeroDivisionError), fed(detector, maps):
        found = detector._forward(images, samples)
        raise ZeroDivisionError
    for one, other in zip(found, detector.bbox_head(maps)):
        assert all(torch.equal(*pair) for pair in zip(one, other))
    assert not torch.equal(detector.extract_feat(images)[0], maps[0])


def test_a_two_stage_teacher_runs_to_its_heads(tmp_path):
    file = tiny.save_teacher(tiny.faster_rcnn(), tmp_path / 'faster.pth')
    one = teacher(str(file), config=dict(model=tiny.faster_rcnn()))
    one.load()
    one.tap('roi_head.bbox_head')
    images, samples = tiny.batch()
    record = one.run(images, samples, student_pixels())
    scores, boxes = record.at('roi_head.bbox_head')
    assert scores.shape[1] == tiny.CLASSES + 1
    assert boxes.shape[1] == 4 * tiny.CLASSES


def test_running_by_hand_computes_no_loss():
    detector = tiny.build(tiny.retinanet()).eval()
    images, samples = tiny.batch()
    with recording(detector, ['bbox_head']) as record, torch.no_grad():
        run_detector(detector, images, samples)
    assert len(record.at('bbox_head')) == 2


# Inheriting ------------------------------------------------------------------


# On a device of its own ----------------------------------------------------


@pretending
@pytest.mark.parametrize(
    ('home', 'own'), [('cpu', 'cuda'), ('cuda', 'cpu'), ('cuda:0', 'cuda:1')]
)
def test_it_sees_on_its_device_and_is_heard_on_the_student_s(
    teacher_file, home, own, monkeypatch
):
    """Devices without values: one that meets the other raises."""
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    one = teacher(str(teacher_file), device=own)
    one.load()
    images, samples = tiny.batch()
    # As no module can be moved that holds what is no tensor.
    monkeypatch.setattr(one.detector, 'to', lambda to: move(one.detector, to))
    with FakeTensorMode(), torch.no_grad():
        move(one.detector, home)
        images = moved(images, home)
        record = one.run(images, samples, student_pixels())
        said = [*record.at('neck'), *record.inputs('neck')[0][0]]
        wanted = [images.device, moved(images, own).device]
        weight = next(one.detector.parameters())
    assert {one.device for one in said} == {wanted[0]}
    assert weight.device == wanted[1]


def move(detector, device):
    for part in detector.modules():
        for group in (part._parameters, part._buffers):
            for name, value in group.items():
                if value is not None:
                    group[name] = moved(value, device)


def moved(value, device):
    """The same tensor on the device, without values."""
    found = torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, torch.nn.Parameter):
        found = torch.nn.Parameter(found, requires_grad=False)
    return found


@pytest.mark.parametrize(
    ('there', 'waits'), [('cpu', True), ('cuda:1', False)]
)
def test_nothing_waits_but_who_reads_from_the_cpu(there, waits):
    """What is on its way to the CPU is not there yet."""
    asked = []

    class Elsewhere:
        device = torch.device('cuda:0')

        def to(self, device, non_blocking=False):
            asked.append((device, non_blocking))

    _sent(Elsewhere(), torch.device(there))
    assert asked == [(torch.device(there), not waits)]


def test_what_is_there_already_is_not_touched():
    one = torch.ones(2)
    assert _sent(one, torch.device('cpu')) is one


@pytest.mark.parametrize('cache', [0.0, 1.0])
def test_its_own_device_changes_nothing_of_what_it_says(teacher_file, cache):
    images, samples = tiny.batch()
    said = []
    for settings in (dict(), dict(device='cpu')):
        one = teacher(str(teacher_file), cache=cache, **settings)
        one.load()
        said.append(one.run(images, samples, student_pixels()).at('neck'))
    for ours, theirs in zip(*said):
        assert torch.equal(ours, theirs)


def test_a_device_that_is_not_there_is_told_when_it_is_to_run(
    teacher_file, teachers, terms, monkeypatch, caplog
):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    one = teacher(str(teacher_file), device='cuda:1')
    with pytest.raises(ValueError, match=r"'big' has device='cuda:1'.*cuda:0"):
        one.load()
    teacher(str(teacher_file), device='cuda:0').check_file()
    teachers['big']['device'] = 'cuda:1'
    student = tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms))
    with torch.no_grad():  # inference needs none
        student.eval().predict(*tiny.batch())
    with pytest.raises(ValueError, match='leave device out'):
        student.loss(*tiny.batch())


def test_a_kind_of_device_that_is_not_there_is_told(teacher_file):
    one = teacher(str(teacher_file), device='meta')
    with pytest.raises(ValueError, match='this machine has cpu'):
        one.check_file()


def test_what_is_no_device_is_told_while_it_is_built():
    with pytest.raises(ValueError, match=r"such as 'cuda:1' .*device='gpu'"):
        teacher(device='gpu')


@pytest.mark.parametrize(
    'term',
    [dict(type='mmkd.BoxTerm'), dict(type='mmkd.CrossHeadTerm', convs=1)],
)
def test_terms_that_run_its_layers_are_told_that_it_is_elsewhere(
    teachers, term
):
    teachers['big']['device'] = 'cpu'
    terms = dict(x=dict(term, teacher='big'))
    with pytest.raises(ValueError, match="'big' has device='cpu'.*FeatureT"):
        # While it is built, if it can be checked then.
        tiny.build(tiny.distilled(tiny.retinanet(), teachers, terms)).loss(
            *tiny.batch()
        )


def test_one_name_is_one_part(teacher_file):
    one = teacher(str(teacher_file), inherit='bbox_head')
    one.load()
    student = tiny.build(tiny.retinanet())
    before = student.neck.fpn_convs[0].conv.weight.clone()
    one.lend(student)
    own, given = student.bbox_head, one.detector.bbox_head
    assert torch.equal(own.retina_cls.weight, given.retina_cls.weight)
    assert own.retina_cls.weight is not given.retina_cls.weight
    assert own.retina_cls.weight.requires_grad
    assert torch.equal(student.neck.fpn_convs[0].conv.weight, before)


def test_inheriting_is_reported(teacher_file, monkeypatch):
    said = []
    monkeypatch.setattr(
        'mmkd.teachers.print_log',
        lambda message, *args, **kwargs: said.append(message),
    )
    one = teacher(str(teacher_file), inherit=['bbox_head'])
    one.load()
    one.lend(tiny.build(tiny.retinanet()))
    count = len(one.detector.bbox_head.state_dict())
    assert f'inherits {count} tensors of bbox_head' in said[-1]
    assert 'backbone, neck keep their own' in said[-1]


def test_a_misspelt_part_suggests_the_nearest(teacher_file):
    one = teacher(str(teacher_file), inherit=['box_head'])
    one.load()
    with pytest.raises(ValueError, match="mean 'bbox_head'"):
        one.lend(tiny.build(tiny.retinanet()))


def test_a_part_within_a_part_is_inherited_alone(teacher_file, monkeypatch):
    said = []
    monkeypatch.setattr(
        'mmkd.teachers.print_log',
        lambda message, *args, **kwargs: said.append(message),
    )
    one = teacher(
        str(teacher_file),
        inherit=['bbox_head.cls_convs.0', 'bbox_head.retina_reg'],
    )
    one.load()
    student = tiny.build(tiny.retinanet())
    before = student.bbox_head.retina_cls.weight.clone()
    one.lend(student)
    own, given = student.bbox_head, one.detector.bbox_head
    for path in ('cls_convs.0.conv', 'retina_reg'):
        mine, theirs = (side.get_submodule(path) for side in (own, given))
        assert torch.equal(mine.weight, theirs.weight)
        assert torch.equal(mine.bias, theirs.bias)
    assert torch.equal(own.retina_cls.weight, before)
    assert 'inherits 4 tensors of bbox_head.cls_convs.0, ' in said[-1]
    assert 'backbone, neck keep their own' in said[-1]


def test_a_misspelt_part_within_a_part_suggests_the_nearest(teacher_file):
    one = teacher(str(teacher_file), inherit='bbox_head.cls_conv.0')
    one.load()
    with pytest.raises(ValueError, match="mean 'bbox_head.cls_convs.0'"):
        one.lend(tiny.build(tiny.retinanet()))


def test_a_parameter_of_the_detector_itself_is_inherited(tmp_path):
    model = detrs.detr('deformable')
    file = tiny.save_teacher(model, tmp_path / 'detr.pth')
    one = Teacher(dict(model=model), file, inherit=('encoder', 'level_embed'))
    one.load()
    student = tiny.build(detrs.detr('deformable'), seed=1)
    one.lend(student)
    assert torch.equal(student.level_embed, one.detector.level_embed)
    assert student.level_embed.requires_grad
    theirs = one.detector.query_embedding.weight
    assert not torch.equal(student.query_embedding.weight, theirs)


def test_the_backbone_is_never_inherited_by_true(teacher_file):
    one = teacher(str(teacher_file), inherit=True)
    one.load()
    with pytest.raises(ValueError, match='cannot inherit'):
        one.lend(tiny.build(tiny.retinanet()))  # necks differ in channels


def test_the_students_config_is_that_of_the_teacher_that_it_was():
    """A teacher's own config survives a round through the distiller's."""
    model = tiny.retinanet(base=16)
    assert student_config(tiny.distilled(model, {}, {})) == model


# The sham teacher, a control ------------------------------------------------


def test_a_sham_teacher_is_shown_the_next_image(teacher_file):
    """Other sizes too: it must be told where its image ends."""
    real, sham = teacher(str(teacher_file)), teacher(str(teacher_file))
    sham.sham = True
    images, samples = tiny.batch()
    targets = []
    for one in (real, sham):
        one.load()
        targets.append(one.run(images, samples, student_pixels()).at('neck'))
    for own, others in zip(*targets):
        torch.testing.assert_close(others, own.flip(0))
        assert not torch.allclose(others, own)


def test_a_sham_teacher_needs_a_second_image(teacher_file):
    one = teacher(str(teacher_file), sham=True)
    one.load()
    images, samples = tiny.batch(shapes=((128, 128),))
    with pytest.raises(ValueError, match='batch_size to 2 or more'):
        one.run(images, samples, student_pixels())

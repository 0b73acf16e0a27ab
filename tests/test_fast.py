"""A teacher in less time: the same answers, or none of it."""

import pytest
import tiny
import torch
from torch import nn

from mmkd import fast
from mmkd.fast import Fast, Speed, difference, fastest, speed_of
from mmkd.registry import MODELS
from mmkd.structures.nested import leaves
from mmkd.taps import Call, Record, recording
from mmkd.teachers import run_detector

ALL = Speed(channels_last=True, fuse_bn=True)
HALF = Speed('bf16', channels_last=True, fuse_bn=True, tolerance=0.05)
PATHS = ('neck', 'bbox_head')


def frozen(detector):
    """In eval mode, with BatchNorm that has seen data."""
    torch.manual_seed(1)
    for one in detector.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.normal_(std=0.1)
            one.running_var.uniform_(0.5, 1.5)
    return detector.eval().requires_grad_(False)


@pytest.fixture
def teacher():
    return frozen(tiny.build(tiny.retinanet()))


@pytest.fixture
def images():
    return tiny.batch()[0]


def runner(paths=PATHS):
    def run(detector, images):
        run.seen.append(detector)
        with torch.no_grad(), recording(detector, paths, stop=True) as record:
            run_detector(detector, images, tiny.batch()[1])
        return record

    run.seen = []
    return run


def batch_norms(detector):
    return [x for x in detector.modules() if isinstance(x, nn.BatchNorm2d)]


# The same answers ------------------------------------------------------------


def test_folded_and_channels_last_says_the_same(teacher, images):
    run = runner()
    one = Fast(teacher, ALL, 'The teacher')
    one.watch(run, images, PATHS)
    record = one.watch(run, images, PATHS)
    plain = run(teacher, images)
    for path in PATHS:
        torch.testing.assert_close(
            leaves(record.outputs(path)),
            leaves(plain.outputs(path)),
            atol=1e-4,
            rtol=1e-4,
        )
    # Once itself to compare, then the copy alone.
    assert run.seen[0] is teacher
    assert run.seen[1] is run.seen[2] is one._copy
    assert batch_norms(teacher)
    assert not batch_norms(one._copy)
    assert record.at('neck')[0].is_contiguous(
        memory_format=torch.channels_last
    )


def test_the_teacher_itself_stays_its_checkpoint(teacher, images):
    before = {key: one.clone() for key, one in teacher.state_dict().items()}
    strides = [one.stride() for one in teacher.parameters()]
    record = Fast(teacher, HALF, 'The teacher').watch(runner(), images, PATHS)
    assert record.detector is teacher
    assert [one.stride() for one in teacher.parameters()] == strides
    after = teacher.state_dict()
    assert list(after) == list(before)
    for key, one in after.items():
        assert torch.equal(one, before[key])
        assert one.dtype == before[key].dtype


def test_half_precision_is_inside_and_not_outside(teacher, images):
    one = Fast(teacher, HALF, 'The teacher')
    run = runner()
    record = one.watch(run, images, PATHS)
    weights = {
        x.weight.dtype
        for x in one._copy.modules()
        if hasattr(x, 'weight') and isinstance(x, nn.Conv2d)
    }
    assert weights == {torch.bfloat16}
    for path in PATHS:
        assert {x.dtype for x in leaves(record.outputs(path))} == {
            torch.float32
        }
    error = difference(run(teacher, images), record)
    assert 1e-4 < error < 0.05


def test_a_gradient_to_the_images_is_the_teacher_s_own(tmp_path, images):
    model = distilled(tmp_path, fast=True)
    (one,) = model.teachers.values()
    one.load()
    samples = tiny.batch()[1]
    images.requires_grad_()
    record = one.run(images, samples, model._pixels, ['neck'], grad=True)
    record.at('neck')[0].sum().backward()
    assert images.grad.abs().sum() > 0
    assert one.fast is None


# Or none of it ---------------------------------------------------------------


class Backwards(nn.Module):
    """Its convolution comes after the BatchNorm that stands behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.conv(self.bn(images))


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def _forward(self, images, samples):
        return self.backbone(images)


def test_a_wrong_fold_is_seen_and_undone(images, caplog):
    torch.manual_seed(0)
    teacher = frozen(Detector(Backwards()))
    run = runner(('backbone',))
    one = Fast(teacher, ALL, 'The teacher')
    for _ in range(2):
        record = one.watch(run, images, ('backbone',))
    assert one._chosen == Speed(channels_last=True)
    plain = run(teacher, images)
    assert difference(plain, record) < 1e-5
    assert batch_norms(one._copy)


def test_what_fails_is_not_used(images, caplog):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, images):
            return self.conv(images.view(-1).view(images.shape))

    teacher = frozen(Detector(Picky()))
    run = runner(('backbone',))
    one = Fast(teacher, Speed(channels_last=True), 'The teacher')
    for _ in range(2):
        record = one.watch(run, images, ('backbone',))
    assert one._chosen is None
    assert run.seen[-1] is teacher
    assert difference(run(teacher, images), record) == 0


def test_a_tap_inside_of_a_fold_is_compared_when_it_comes(teacher, images):
    """What a convolution says before its BatchNorm is no more to be had."""
    one = Fast(teacher, ALL, 'The teacher')
    one.watch(runner(), images, PATHS)
    assert one._chosen == ALL
    inside = ('backbone.layer1.0.conv1', 'neck')
    record = one.watch(runner(inside), images, inside)
    assert one._chosen == Speed(channels_last=True)
    plain = runner(inside)(teacher, images)
    assert difference(plain, record) < 1e-4


def test_a_strict_tolerance_leaves_half_precision_alone(teacher, images):
    one = Fast(teacher, Speed('bf16', tolerance=1e-5), 'The teacher')
    run = runner()
    for _ in range(2):
        record = one.watch(run, images, PATHS)
    assert one._chosen is None
    assert difference(run(teacher, images), record) == 0


def test_new_weights_make_a_new_copy(teacher, images):
    run = runner()
    one = Fast(teacher, ALL, 'The teacher')
    one.watch(run, images, PATHS)
    with torch.no_grad():
        for weight in teacher.neck.parameters():
            weight.mul_(2.0)
    record = one.watch(run, images, PATHS)
    assert difference(run(teacher, images), record) < 1e-4


def test_difference_by_hand():
    def record(*values):
        found = Record(nn.Identity(), ['it'])
        found.add('it', Call((), {}, [torch.tensor(x) for x in values]))
        return found

    assert difference(record([3.0, 4.0]), record([3.0, 4.0])) == 0
    found = difference(record([3.0, 4.0]), record([3.0, 5.0]))
    assert found == pytest.approx(1 / 5)
    assert difference(record([3.0]), record([float('nan')])) == float('inf')
    assert difference(record([3]), record([4])) == float('inf')
    assert difference(record([3.0]), record([3.0, 3.0])) == float('inf')


# In a config -----------------------------------------------------------------


def distilled(tmp_path, **settings):
    teacher = tiny.retinanet(base=16)
    weights = tmp_path / 'teacher.pth'
    if not weights.exists():
        tiny.save_teacher(teacher, weights)
    settings.update(config=dict(model=teacher), checkpoint=str(weights))
    loss = dict(type='mmkd.PKDLoss')
    term = dict(type='mmkd.FeatureTerm', teacher='big', loss=loss)
    torch.manual_seed(0)
    return MODELS.build(
        tiny.distilled(tiny.retinanet(), dict(big=settings), dict(pkd=term))
    )


@pytest.mark.parametrize('speed', [True, dict(precision='bf16')])
def test_a_fast_teacher_teaches_the_same(tmp_path, speed):
    shares = []
    for given in (False, speed):
        model = distilled(tmp_path, fast=given)
        (teacher,) = model.teachers.values()
        assert teacher.fast is None  # looked at plainly while it is built
        losses = model.loss(*tiny.batch())
        losses['loss_kd_pkd'].backward()
        shares.append(losses['loss_kd_pkd'].item())
    assert teacher.fast._chosen is not None
    assert shares[1] == pytest.approx(shares[0], rel=0.02)
    assert shares[1] > 0


def test_settings_are_checked_while_the_model_is_built(tmp_path):
    with pytest.raises(ValueError, match="'presision'.*'precision'"):
        distilled(tmp_path, fast=dict(presision='bf16'))
    with pytest.raises(ValueError, match="'fp8'.*precision|precision 'fp8'"):
        distilled(tmp_path, fast=dict(precision='fp8'))
    with pytest.raises(ValueError, match='tolerance > 0'):
        distilled(tmp_path, fast=dict(tolerance=0))


def test_on_a_processor_it_is_single_precision():
    found = fastest(torch.device('cpu'))
    assert found == ALL
    assert speed_of(False, torch.device('cpu')) is None
    off = dict(channels_last=False, fuse_bn=False)
    assert speed_of(off, torch.device('cpu')) is None


def test_backbone_and_neck_are_compiled(teacher, images, monkeypatch):
    compiled = []

    def compile(function):
        compiled.append(function.__self__)
        return function

    monkeypatch.setattr(fast.torch, 'compile', compile)
    one = Fast(teacher, Speed(compile=True), 'The teacher')
    run = runner()
    record = one.watch(run, images, PATHS)
    assert compiled[:2] == [one._copy.backbone, one._copy.neck]
    assert difference(run(teacher, images), record) == 0


def test_what_is_tolerated_is_taken(teacher, images, monkeypatch):
    monkeypatch.setattr(fast, 'difference', lambda *_: ALL.tolerance)
    one = Fast(teacher, ALL, 'The teacher')
    one.watch(runner(), images, PATHS)
    assert one._chosen == ALL

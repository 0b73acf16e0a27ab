import runs
import tiny
import torch

from mmkd.compat.checkpoint import read_checkpoint
from mmkd.laboratory.pace import load_batches
from mmkd.laboratory.shuffled import calibrate, save_shuffled, shuffle
from mmkd.teachers import Teacher

data = runs.data


def test_entries_change_places_and_their_distribution_stays():
    model = tiny.build(tiny.retinanet())
    before = {name: one.clone() for name, one in model.named_parameters()}
    torch.manual_seed(0)
    shuffle(model)
    for name, one in model.named_parameters():
        old = before[name]
        assert torch.equal(one.flatten().sort()[0], old.flatten().sort()[0])
        if one.ndim > 1 and old.unique().numel() > 9:
            assert not torch.equal(one, old), name
        elif one.ndim == 1:
            assert torch.equal(one, old), name


def test_norms_are_measured_over_all_batches_alike():
    """The first BatchNorm's mean is that of the convolution before it."""
    model = tiny.build(tiny.retinanet())
    images, samples = tiny.batch(shapes=((128, 128),) * 2)
    batches = [tiny.pixels(images + shift, samples) for shift in (0, 1)]
    calibrate(model, batches)
    seen = [
        model.backbone.conv1(
            model.data_preprocessor(tiny.pixels(images + shift, samples))[
                'inputs'
            ]
        )
        for shift in (0, 1)
    ]
    expected = torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0)
    torch.testing.assert_close(
        model.backbone.bn1.running_mean, expected.detach()
    )
    assert model.backbone.bn1.momentum == 0.1
    assert not any(one.training for one in model.modules())


def test_the_file_loads_as_a_teacher_and_knows_nothing(data, tmp_path):
    model = tiny.retinanet(base=16)
    file = tiny.save_teacher(
        model,
        tmp_path / 'teacher.pth',
        meta=dict(dataset_meta=dict(classes=runs.NAMES)),
    )
    settings = runs.config(data, tmp_path, iters=2, model=model)
    out = save_shuffled(
        settings, file, load_batches(settings), tmp_path / 'shuffled.pth'
    )
    teacher = Teacher(config=dict(model=model), checkpoint=str(out))
    teacher.load()
    assert teacher.classes == runs.NAMES
    own = read_checkpoint(file)['state_dict']['backbone.conv1.weight']
    other = teacher.detector.backbone.conv1.weight
    assert not torch.equal(own, other)
    again = save_shuffled(
        settings, file, load_batches(settings), tmp_path / 'again.pth'
    )
    one, two = (read_checkpoint(x)['state_dict'] for x in (out, again))
    assert all(torch.equal(one[key], two[key]) for key in one)

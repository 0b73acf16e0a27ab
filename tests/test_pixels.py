import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from test_contracts import pretended, pretending
from torch import nn

from mmkd.pixels import Pixels, kept, translate, valid_area

RGB = dict(
    type='DetDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)
CAFFE = dict(
    type='DetDataPreprocessor',
    mean=[103.53, 116.28, 123.675],
    std=[1.0, 2.0, 3.0],
    bgr_to_rgb=False,
    pad_size_divisor=32,
)
RAW = dict(
    type='DetDataPreprocessor',
    pad_size_divisor=64,
    pad_value=114,
)
LITE = dict(
    type='DetDataPreprocessor',
    mean=[127.0] * 3,
    std=[128.0] * 3,
    bgr_to_rgb=True,
    pad_size_divisor=64,
)
ALL = dict(rgb=RGB, caffe=CAFFE, raw=RAW, lite=LITE)
SHAPES = ((64, 96), (50, 70))


def processor(settings):
    return MODELS.build(settings)


def of(settings):
    detector = nn.Module()
    detector.data_preprocessor = processor(settings)
    return Pixels.of(detector, 'Teacher')


def loaded():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(
            0, 256, (3, *shape), generator=generator, dtype=torch.uint8
        )
        for shape in SHAPES
    ]


def processed(settings):
    return processor(settings)(dict(inputs=loaded()), training=False)['inputs']


@pytest.mark.parametrize('target', ALL)
@pytest.mark.parametrize('source', ALL)
def test_translated_equals_processed_by_the_other(source, target):
    """The slow way is to process the pictures again, as the teacher would.

    A teacher pads what the student's batch already is: where the student's
    is larger, the rest is border.
    """
    settings = ALL[source], ALL[target]
    translated = translate(
        processed(settings[0]), SHAPES, of(settings[0]), of(settings[1])
    )
    expected = processed(settings[1])
    height, width = expected.shape[-2:]
    torch.testing.assert_close(
        translated[..., :height, :width], expected, rtol=1e-4, atol=1e-3
    )
    border = settings[1].get('pad_value', 0)
    assert (translated[..., height:, :] == border).all()
    assert (translated[..., width:] == border).all()


def test_equal_settings_return_the_batch_itself():
    images = processed(RGB)
    assert translate(images, SHAPES, of(RGB), of(RGB)) is images


def test_the_batch_is_left_as_it_was():
    images = processed(RGB)
    before = images.clone()
    translate(images, SHAPES, of(RGB), of(CAFFE))
    assert torch.equal(images, before)


def test_a_full_batch_has_no_border_to_fill():
    """A zero pixel inside an image stays what it means."""
    images = torch.zeros(1, 3, 32, 32)
    moved = translate(images, [(32, 32)], of(RGB), of(RAW))
    expected = torch.tensor(RGB['mean']).flip(0)
    torch.testing.assert_close(moved[0, :, 5, 5], expected)


def test_gradient_flows_to_the_images_where_they_show():
    images = processed(RGB).requires_grad_()
    translate(images, SHAPES, of(RGB), of(CAFFE)).sum().backward()
    # back from the teacher's std to the student's, in the teacher's order
    factor = torch.tensor(RGB['std']) / torch.tensor(CAFFE['std']).flip(0)
    torch.testing.assert_close(images.grad[1, :, 20, 20], factor)
    assert (images.grad[1, :, 50:] == 0).all()


def test_half_precision_batches_stay_so():
    images = processed(RGB).half()
    assert translate(images, SHAPES, of(RGB), of(LITE)).dtype == torch.half


def test_settings_are_read_off_the_preprocessor():
    pixels = of(RGB)
    torch.testing.assert_close(pixels.mean, tuple(RGB['mean']))
    torch.testing.assert_close(pixels.std, tuple(RGB['std']))
    assert (pixels.swapped, pixels.divisor) == (True, 32)
    raw = of(RAW)
    assert (raw.mean, raw.std, raw.swapped) == ((0,) * 3, (1,) * 3, False)
    assert raw.pad_value == 114


def test_the_preprocessor_of_several_branches_is_unwrapped():
    detector = nn.Module()
    detector.data_preprocessor = MODELS.build(
        dict(type='MultiBranchDataPreprocessor', data_preprocessor=CAFFE)
    )
    assert Pixels.of(detector, 'Teacher') == of(CAFFE)


def test_one_mean_for_all_channels_is_spread():
    settings = dict(
        type='DetDataPreprocessor', mean=[5.0], std=[2.0], pad_size_divisor=1
    )
    assert of(settings).mean == (5.0, 5.0, 5.0)
    assert of(settings).std == (2.0, 2.0, 2.0)


def test_another_kind_of_preprocessor_is_an_error_that_names_it():
    detector = nn.Module()
    detector.data_preprocessor = MODELS.build(
        dict(type='BaseDataPreprocessor')
    )
    with pytest.raises(TypeError, match="Teacher 'big'.*BaseDataPreprocessor"):
        Pixels.of(detector, "Teacher 'big'")


def test_valid_area_is_one_where_there_are_pixels():
    area = valid_area([(2, 3), (4, 1)], (4, 4))
    expected = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    expected[0, 0, :2, :3] = True
    expected[1, 0, :, :1] = True
    assert torch.equal(area, expected)


@pretending
def test_nobody_waits_for_means_to_arrive():
    source, target = of(RGB), of(CAFFE)
    with pretended():
        images = torch.empty(2, 3, 64, 96, device='cuda')
        found = translate(images, SHAPES, source, target)
        assert found.device.type == 'cuda'


# Pixels kept for teachers ----------------------------------------------------


def keeping(settings, keep=(True, True)):
    """A batch as processed, and samples that keep what was loaded."""
    data = dict(
        inputs=loaded(),
        data_samples=[
            DetDataSample(metainfo=dict(img_shape=shape)) for shape in SHAPES
        ],
    )
    for one, sample, kept_ in zip(data['inputs'], data['data_samples'], keep):
        if kept_:
            picture = one.permute(1, 2, 0).numpy()
            sample.set_metainfo(dict(teacher_img=picture))
    return processor(settings)(data, False)['inputs'], data['data_samples']


@pytest.mark.parametrize('settings', ALL.values(), ids=ALL)
def test_kept_pixels_are_what_the_preprocessor_would_have_made(settings):
    images, samples = keeping(settings)
    marked = images.clone()
    for index, (height, width) in enumerate(SHAPES):
        marked[index, :, :height, :width] += 1
    found = kept(marked, samples, of(settings))
    assert torch.equal(found, images)
    assert not torch.equal(found, marked), 'the batch itself is left alone'


def test_images_that_keep_nothing_are_as_the_student_sees_them():
    images, samples = keeping(RGB, (False, True))
    found = kept(images + 1, samples, of(RGB))
    assert torch.equal(found[0], images[0] + 1)
    height, width = SHAPES[1]
    assert torch.equal(
        found[1, :, :height, :width], images[1, :, :height, :width]
    )
    assert kept(images, keeping(RGB, (False, False))[1], of(RGB)) is None


def test_flipped_views_of_arrays_and_half_precision_are_understood():
    images, samples = keeping(RGB)
    picture = samples[0].teacher_img
    samples[0].set_metainfo(dict(teacher_img=picture[:, ::-1]))
    found = kept(images, samples, of(RGB))
    assert torch.equal(found[0, :, :64, :96], images[0, :, :64, :96].flip(2))
    assert kept(images.half(), samples, of(RGB)).dtype == torch.float16


def test_kept_pixels_of_another_size_are_refused():
    images, samples = keeping(RGB)
    samples[1].set_metainfo(dict(img_shape=(40, 70)))
    with pytest.raises(ValueError, match=r'40 x 70, got 50 x 70.*KeepForT'):
        kept(images, samples, of(RGB))

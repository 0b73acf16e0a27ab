import pytest
import torch

from mmkd.checks import (
    check_channels,
    check_fraction,
    check_name,
    check_positive,
    check_same_shape,
    suggest,
)


def maps(student, teacher):
    return torch.zeros(student), torch.zeros(teacher)


def complaint(student, teacher):
    with pytest.raises(ValueError) as error:
        check_same_shape('PKDLoss', *maps(student, teacher))
    message = str(error.value)
    assert message.startswith('PKDLoss compares maps of one shape, got')
    assert f'student {student} and teacher {teacher}' in message
    return message


def test_equal_shapes_pass():
    check_same_shape('PKDLoss', *maps((2, 4, 8, 8), (2, 4, 8, 8)))


def test_channels_alone_get_a_convolution():
    message = complaint((2, 128, 40, 40), (2, 256, 40, 40))
    assert (
        "add align=dict(type='mmkd.ConvAdapt', in_channels=128, "
        'out_channels=256)' in message
    )
    assert 'resize' not in message


def test_size_alone_gets_levels_or_a_resize():
    message = complaint((2, 8, 40, 40), (2, 8, 20, 20))
    assert 'teacher_levels=' in message
    assert "type='mmkd.ResizeAdapt'" in message
    assert 'ConvAdapt' not in message


def test_both_get_both():
    message = complaint((2, 8, 40, 40), (2, 16, 20, 20))
    assert 'in_channels=8, out_channels=16' in message
    assert "resize='student'" in message


def test_another_batch_is_no_matter_of_adapters():
    message = complaint((2, 8, 40, 40), (4, 16, 20, 20))
    assert 'same images' in message
    assert 'Adapt' not in message


def test_another_number_of_dimensions_is_another_kind_of_output():
    assert 'one kind' in complaint((2, 8), (2, 8, 4, 4))


def test_the_proposed_adapter_can_be_typed():
    """What the message says to add builds, and makes the shapes equal."""
    from mmkd.build import build

    student, teacher = maps((2, 3, 4, 4), (2, 5, 4, 4))
    with pytest.raises(ValueError) as error:
        check_same_shape('PKDLoss', student, teacher)
    typed = str(error.value).split('align=')[1].split(' to this term')[0]
    align = build(eval(typed, dict(dict=dict)), 'align', num_levels=1)
    check_same_shape('PKDLoss', *align((student,)), teacher)


def test_channels_must_be_those_built_for():
    check_channels('MGDLoss', torch.zeros(1, 8, 2, 2), 8)
    with pytest.raises(ValueError, match='built for 8 channels.*to 16'):
        check_channels('MGDLoss', torch.zeros(1, 16, 2, 2), 8)


def test_a_misspelt_name_gets_the_nearest():
    check_name('RetinaNet', 'submodule', 'neck', ['backbone', 'neck'])
    with pytest.raises(
        ValueError, match="RetinaNet has no submodule 'nek'.*mean 'neck'"
    ):
        check_name('RetinaNet', 'submodule', 'nek', iter(['backbone', 'neck']))


def test_a_name_like_none_of_them_gets_the_list():
    assert suggest('xyz', ['neck', 'head']) == "It has 'neck', 'head'."


def test_a_long_list_is_cut():
    text = suggest('xyz', [f'part{index}' for index in range(20)])
    assert text.endswith(', ….')
    assert text.count('part') == 12


def test_nothing_to_choose_from_is_said():
    assert suggest('xyz', []) == 'It has none.'


@pytest.mark.parametrize('value', [0, -1.0, float('nan')])
def test_positive_means_above_zero(value):
    check_positive('CWDLoss', temperature=0.1)
    with pytest.raises(ValueError, match='CWDLoss needs temperature > 0'):
        check_positive('CWDLoss', other=1, temperature=value)


@pytest.mark.parametrize('value', [-0.1, 1.1, float('nan')])
def test_a_fraction_lies_between_zero_and_one(value):
    check_fraction('MGDLoss', none=0, some=0.5, all=1)
    with pytest.raises(ValueError, match='mask_ratio between 0 and 1'):
        check_fraction('MGDLoss', mask_ratio=value)

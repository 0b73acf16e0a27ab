import pytest
import tiny
import torch
from torch import nn

from mmkd.taps import crop, maps_of, pick_levels, recording, resolve


class Block(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU(inplace=inplace)
        self.gate = None

    def forward(self, x, scale=1.0):
        return self.act(self.conv(x) * scale)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls = nn.Conv2d(4, 2, 1)

    def forward(self, levels):
        return [self.cls(one) for one in levels], [one * 2 for one in levels]

    def get_targets(self, boxes, weight=1):
        return dict(labels=boxes + weight)


class Detector(nn.Module):
    """As small as a thing can be that is tapped as a detector is."""

    def __init__(self, inplace=False):
        super().__init__()
        self.block = Block(inplace)
        self.head = Head()
        self.finished = 0

    def forward(self, x):
        levels = [self.block(x), self.block(x[..., ::2, ::2], scale=3.0)]
        outputs = self.head.forward(levels)  # as mmdet calls some heads
        self.head.get_targets(torch.zeros(2), weight=5)
        self.finished += 1
        return outputs


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return Detector()


@pytest.fixture
def images():
    return torch.randn(1, 3, 4, 4)


def state(module):
    """Everything that an instance holds, of all its parts."""
    return {
        name: {key: id(value) for key, value in vars(one).items()}
        for name, one in module.named_modules()
    }


# What is recorded ------------------------------------------------------------


def test_output_is_the_very_tensor_that_was_returned(detector, images):
    with recording(detector, ['head']) as record:
        classes, _ = detector(images)
    assert record.at('head')[0][0] is classes[0]
    assert record.detector is detector


def test_calls_by_forward_are_recorded_as_well(detector, images):
    """A forward hook would never see ``head.forward(x)``."""
    with recording(detector, ['head']) as record:
        detector(images)
    assert len(record.at('head')) == 2


def test_one_call_gives_its_output_and_several_a_tuple(detector, images):
    with recording(detector, ['block', 'head.cls', 'head']) as record:
        detector(images)
    fine, coarse = record.at('block')
    assert (fine.shape[-1], coarse.shape[-1]) == (4, 2)
    assert [one.shape[1] for one in record.at('head.cls')] == [2, 2]
    assert isinstance(record.at('head'), tuple), 'one call: as it returned'


def test_a_method_is_recorded_with_what_it_was_given(detector, images):
    with recording(detector, ['head.get_targets']) as record:
        detector(images)
    assert record.at('head.get_targets')['labels'].tolist() == [5, 5]
    args, named = record.inputs('head.get_targets')
    assert args[0].tolist() == [0, 0]
    assert named == dict(weight=5)


def test_inputs_are_those_of_the_last_call(detector, images):
    with recording(detector, ['block']) as record:
        detector(images)
    args, named = record.inputs('block')
    assert args[0].shape[-1] == 2
    assert named == dict(scale=3.0)


def test_gradient_flows_through_what_was_recorded(detector, images):
    with recording(detector, ['block']) as record:
        detector(images)
    sum(one.sum() for one in record.at('block')).backward()
    assert detector.block.conv.weight.grad.abs().sum() > 0


def test_targets_of_a_real_head_are_recorded_in_its_loss():
    detector = tiny.build(tiny.retinanet())
    images, samples = tiny.batch()
    with recording(detector, ['bbox_head.get_targets', 'neck']) as record:
        detector.loss(images, samples)
    labels = record.at('bbox_head.get_targets')[0]
    assert [one.shape[0] for one in labels] == [2] * 5
    assert [len(one) for one in record.at('neck')[:1]] == [2]


def test_what_was_never_called_is_an_error_that_names_it(detector):
    with recording(detector, ['block']) as record:
        pass
    assert not record.has('block')
    for ask in (record.at, record.inputs):
        with pytest.raises(
            RuntimeError, match="Detector did not call 'block'"
        ):
            ask('block')


def test_a_path_that_was_not_tapped_is_an_error(detector, images):
    with recording(detector, ['block']) as record:
        detector(images)
    assert not record.has('head')
    with pytest.raises(RuntimeError, match="did not call 'head'"):
        record.at('head')


def test_output_overwritten_in_place_is_an_error(images):
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with recording(layers, ['0', '1']) as record:
        layers(images)
    with pytest.raises(RuntimeError, match="'0' was overwritten"):
        record.at('0')
    assert record.at('1').min() >= 0


def test_whether_a_gradient_gets_there_is_known_of_what_was_overwritten(
    images,
):
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with recording(layers, ['0', '1']) as record:
        layers(images)
    assert record.learns('0')
    assert record.learns('1')
    with torch.no_grad(), recording(layers, ['0']) as record:
        layers(images)
    assert not record.learns('0')


def test_an_inplace_layer_after_a_copy_does_no_harm(images):
    detector = Detector(inplace=True)
    with recording(detector, ['block.conv']) as record:
        detector.block(images)  # scaled in between
    assert record.at('block.conv').min() < 0


def test_output_inside_of_lists_is_watched_as_well(detector, images):
    with recording(detector, ['head']) as record:
        _, boxes = detector(images)
    boxes[1].add_(1)
    with pytest.raises(RuntimeError, match='overwritten'):
        record.at('head')


def test_the_norm_before_an_inplace_activation_of_resnet_is_refused():
    detector = tiny.build(tiny.retinanet())
    images, _ = tiny.batch()
    with recording(detector, ['backbone.layer1.0.bn1', 'neck']) as record:
        detector.extract_feat(images)
    with pytest.raises(RuntimeError, match='inplace=False'):
        record.at('backbone.layer1.0.bn1')
    assert len(record.at('neck')) == 5


# What stays behind: nothing --------------------------------------------------


def test_nothing_stays_in_the_model(detector, images):
    before = state(detector)
    with recording(detector, ['block', 'block.conv', 'head'], stop=True):
        detector(images)
    with recording(detector, ['head.get_targets']):
        detector.head.get_targets(torch.zeros(2))
    assert state(detector) == before


def test_nothing_stays_after_an_error_inside(detector, images):
    before = state(detector)
    with pytest.raises(ZeroDivisionError), recording(detector, ['block']):
        detector(images)
        raise ZeroDivisionError
    after = state(detector)
    assert after.pop('') != before.pop(''), 'the pass itself was counted'
    assert after == before


def test_nothing_stays_after_a_path_that_is_wrong(detector):
    before = state(detector)
    with pytest.raises(ValueError), recording(detector, ['block', 'nek']):
        pytest.fail('the block must not run')
    assert state(detector) == before


def test_a_forward_of_the_instances_own_is_called_and_put_back(
    detector, images
):
    """As torch.compile and quantisers leave one."""
    detector.block.forward = own = lambda x, scale=1.0: x * 0 + 9
    with recording(detector, ['block']) as record:
        detector.block(images)
    assert (record.at('block') == 9).all()
    assert detector.block.forward is own


def test_recordings_can_be_nested(detector, images):
    before = state(detector)
    with recording(detector, ['block']) as outer:
        with recording(detector, ['block', 'head']) as inner:
            detector(images)
        detector.block(images)
    assert len(inner.at('block')) == 2
    assert len(outer.at('block')) == 3
    detector.finished = 0
    assert state(detector) == before


def test_one_path_given_twice_is_recorded_once(detector, images):
    with recording(detector, ['head.get_targets'] * 2) as record:
        detector.head.get_targets(torch.zeros(1))
    assert isinstance(record.at('head.get_targets'), dict)


def test_state_dict_is_the_same_while_recording(detector):
    keys = list(detector.state_dict())
    with recording(detector, ['block', 'head.cls']):
        assert list(detector.state_dict()) == keys


# Stopping --------------------------------------------------------------------


def run_until(detector, paths, images):
    with recording(detector, paths, stop=True) as record:
        detector(images)
    return record


def test_what_comes_after_the_last_tap_never_runs(
    detector, images, monkeypatch
):
    monkeypatch.setattr(
        detector.head, 'get_targets', lambda *_, **__: pytest.fail('it ran')
    )
    record = run_until(detector, ['head'], images)
    assert len(record.at('head')) == 2
    assert detector.finished == 0


def test_all_taps_are_waited_for_whatever_their_order(detector, images):
    record = run_until(detector, ['head.get_targets', 'block'], images)
    assert record.has('block')
    assert record.has('head.get_targets')


def test_a_part_inside_waits_until_its_owner_returned(detector, images):
    """``head.cls`` runs once a level: the first call is not the end."""
    assert len(run_until(detector, ['head.cls'], images).at('head.cls')) == 2


def test_a_tap_that_is_never_called_lets_the_pass_end(detector, images):
    detector.unused = nn.Identity()
    record = run_until(detector, ['block', 'unused'], images)
    assert detector.finished == 1
    assert record.has('block')
    assert not record.has('unused')


def test_without_taps_the_pass_ends(detector, images):
    run_until(detector, [], images)
    assert detector.finished == 1


def test_an_error_before_the_stop_is_not_swallowed(detector, images):
    with pytest.raises(RuntimeError, match='expected'):
        run_until(detector, ['head'], images[:, :2])


# Paths -----------------------------------------------------------------------


def test_a_path_resolves_to_module_and_method(detector):
    assert resolve(detector, 'block') == (detector.block, 'forward')
    assert resolve(detector, 'block.conv') == (detector.block.conv, 'forward')
    assert resolve(detector, 'head.get_targets') == (
        detector.head,
        'get_targets',
    )
    assert resolve(detector, 'forward') == (detector, 'forward')


def test_members_of_lists_are_found_by_their_number():
    detector = tiny.build(tiny.retinanet())
    owner, name = resolve(detector, 'neck.fpn_convs.2.conv')
    assert owner is detector.neck.fpn_convs[2].conv
    assert name == 'forward'


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('nek', "Detector has no submodule 'nek' to tap. It has 'block'"),
        ('blok', "'blok' to tap. Did you mean 'block'"),
        ('block.con', "Detector.block has no submodule 'con'.*mean 'conv'"),
        ('block.conv.weight', "Detector.block.conv has no submodule 'weight'"),
        ('head.get_targets.labels', "no submodule 'get_targets'"),
        ('finished', "no submodule 'finished'"),
        ('block.gate', "no submodule 'gate'"),
        ('', "no submodule ''"),
    ],
)
def test_a_wrong_path_says_where_it_ends(detector, path, message):
    with pytest.raises(ValueError, match=message):
        resolve(detector, path)


# Maps ------------------------------------------------------------------------

ONE, TWO = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)


@pytest.mark.parametrize(
    ('value', 'output', 'expected'),
    [
        (ONE, None, (ONE,)),
        ([ONE, TWO], None, (ONE, TWO)),
        ((ONE, TWO), None, (ONE, TWO)),
        (([ONE, TWO], [TWO, ONE]), 0, (ONE, TWO)),
        (([ONE, TWO], [TWO, ONE]), 1, (TWO, ONE)),
        ((ONE, TWO), 1, (TWO,)),
    ],
)
def test_whatever_a_part_returns_becomes_a_tuple_of_maps(
    value, output, expected
):
    found = maps_of(value, 'The tap', output)
    assert isinstance(found, tuple)
    assert all(a is b for a, b in zip(found, expected))
    assert len(found) == len(expected)


def test_several_lists_need_a_choice():
    with pytest.raises(ValueError, match='The tap.*got list, list.*output=0'):
        maps_of(([ONE], [TWO]), 'The tap')


def test_an_output_beyond_the_last_is_an_error():
    with pytest.raises(ValueError, match=r'output=2 .* returns 2\. Use .* 2'):
        maps_of(([ONE], [TWO]), 'The tap', 2)


def test_what_holds_no_maps_is_an_error():
    with pytest.raises(ValueError, match='got dict'):
        maps_of(dict(a=ONE), 'The tap')


@pytest.mark.parametrize(
    ('levels', 'expected'),
    [(None, 'abc'), ((0, 2), 'ac'), ([2, 0], 'ca')],
)
def test_levels_are_picked_in_their_order(levels, expected):
    assert ''.join(pick_levels(tuple('abc'), levels, 'It')) == expected


@pytest.mark.parametrize('level', [3, -1])
def test_a_level_beyond_the_last_is_an_error(level):
    with pytest.raises(ValueError, match=rf'It .* 0 to 2; .* for {level}\.'):
        pick_levels(tuple('abc'), (0, level), 'It')


@pytest.mark.parametrize('size', [(64, 64), (60, 33), (33, 60), (1, 64)])
def test_cells_beyond_the_students_border_are_dropped(size):
    """A convolution of stride 32 covers a border of less than a cell."""
    for stride in (8, 16, 32):
        every = torch.arange(64 // stride).float()
        whole = every[:, None] + every / 100
        (found,) = crop([whole], (64, 64), size)
        rows, columns = (-(-side // stride) for side in size)
        torch.testing.assert_close(found, whole[:rows, :columns])


def test_maps_of_the_students_own_size_stay_whole():
    for shown in (None, (5, 7)):
        assert crop([ONE], shown, (5, 7))[0] is ONE

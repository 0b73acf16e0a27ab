"""What a step costs: who is timed, on what, and what is made of it."""

import json

import detrs
import families
import pytest
import runs
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmkd.laboratory import benchmark
from mmkd.laboratory.benchmark import (
    ARMS,
    Arm,
    Settings,
    Timing,
    main,
    measure,
    page,
    report,
    saved,
    synthetic,
)

data = runs.data
QUICK = Settings(blocks=2, steps=2, warm_up=1, batches=3)
FACTS = dict(
    device='A machine',
    memory='peak',
    threads=1,
    precision='float32',
    image=[64, 64],
    batch=2,
    boxes=3.0,
    data='noise',
    weights='random',
    student='RetinaNet',
    teachers=dict(big='RetinaNet'),
    blocks=3,
    steps=1,
    versions=dict(mmkd='1'),
)


@pytest.fixture
def config(data, tmp_path):
    init_default_scope('mmdet')
    teacher = tiny.retinanet(base=16)
    weights = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    model = tiny.distilled(
        tiny.retinanet(),
        dict(big=dict(config=dict(model=teacher), checkpoint=str(weights))),
        dict(
            pkd=dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                loss=dict(type='mmkd.PKDLoss'),
            )
        ),
    )
    return runs.config(data, tmp_path / 'run', epochs=1, model=model)


def timing(**seconds):
    memory, work = dict(plain=1, full=2), dict(plain=1000, terms=100)
    return Timing('one', seconds, dict(pkd=[0.5]), memory, work, FACTS)


# What is made of the times ---------------------------------------------------


def test_ratios_by_hand():
    one = timing(
        plain=[1.0, 2.0, 9.0],
        null=[1.0, 2.0, 9.0],
        teacher=[0.5, 0.5, 0.5],
        full=[3.0, 3.0, 30.0],
    )
    assert one.median('plain') == 2000
    assert one.floor == pytest.approx((2.5 + 0.1 * 2) / 2)
    assert one.of_plain()[0] == pytest.approx(3 / 2)
    assert one.of_floor()[0] == pytest.approx(3 / 2.7)


def test_times_without_spread_have_no_interval():
    one = timing(
        plain=[1.0] * 5, null=[1.0] * 5, teacher=[0.5] * 5, full=[1.5] * 5
    )
    assert one.of_plain() == pytest.approx((1.5, 1.5, 1.5))
    assert one.of_floor() == pytest.approx((1.5 / 1.6,) * 3)


def test_null_is_compared_round_by_round():
    """A machine that slows down hides nothing of a constant difference."""
    pace = [1.0, 2.0, 4.0, 8.0, 16.0]
    one = timing(
        plain=pace, null=[x + 0.003 for x in pace], teacher=pace, full=pace
    )
    assert one.null_more() == pytest.approx((3.0, 3.0, 3.0))


def test_rounds_are_drawn_as_a_whole():
    """A machine that slows all arms alike makes no ratio uncertain."""
    pace = [1.0, 2.0, 4.0, 8.0, 16.0]
    one = timing(
        plain=pace,
        null=pace,
        teacher=pace,
        full=[3 * x for x in pace],
    )
    assert one.of_plain() == pytest.approx((3.0, 3.0, 3.0))
    assert one.of_floor() == pytest.approx((3 / 2.1,) * 3)


def test_the_page_is_written_from_what_was_kept(tmp_path):
    one = timing(plain=[2.0], null=[2.01], teacher=[0.5], full=[3.0])
    (tmp_path / 'one.json').write_text(json.dumps(one.as_dict()))
    (line,) = (x for x in page(tmp_path).splitlines() if '64 x 64' in x)
    assert [x.strip() for x in line.strip('|').split('|')] == [
        'one',
        '64 x 64, 2, 3',
        '2000',
        '+10.0 (+10.0 to +10.0)',
        '500',
        '3000',
        '1.50 (1.50 to 1.50)',
        '10.0',
        '1.35',
        '1.11 (1.11 to 1.11)',
        '1, 2',
    ]
    assert 'A machine, 1 threads' in page(tmp_path)
    assert 'times the student' in report(one)


def test_a_page_keeps_what_is_written_around_its_tables(tmp_path):
    one = timing(plain=[2.0], null=[2.01], teacher=[0.5], full=[3.0])
    (tmp_path / 'one.json').write_text(json.dumps(one.as_dict()))
    path = tmp_path / 'page.md'
    path.write_text(page(tmp_path).replace('# Speed', '# Pace') + 'The end.\n')
    plan = dict(student='small', teacher='big', method='fgd')
    facts = dict(FACTS, plan=plan)
    other = dict(one.as_dict(), facts=facts, config='small-from-big_fgd')
    (tmp_path / 'small-from-big_fgd.json').write_text(json.dumps(other))
    text = page(tmp_path, path)
    assert text.startswith('# Pace')
    assert text.endswith('The end.\n')
    assert text.count('| one |') == text.count('| fgd |') == 1
    assert text.count('A machine') == 1
    assert '**small**, taught by **big**' in text
    path.write_text(text)
    assert page(tmp_path, path) == text


# What is timed ---------------------------------------------------------------


def test_all_four_take_turns_on_the_same_batches(config, monkeypatch):
    seen = []
    step = Arm.__call__

    def noted(self, batch):
        kind = 'plain'
        if hasattr(self.model, 'terms'):
            factor = self.model.terms.pkd.schedule(0.5)
            kind = 'full' if factor else 'null'
        seen.append((kind, id(batch)))
        step(self, batch)

    monkeypatch.setattr(Arm, '__call__', noted)
    found = measure(config, QUICK, 'tiny')
    by_arm = {
        arm: [batch for kind, batch in seen if kind == arm]
        for arm in ('plain', 'null', 'full')
    }
    # One step to warm up, two rounds of two; on a CPU memory takes none.
    assert len(by_arm['plain']) == 5
    assert by_arm['plain'] == by_arm['null'] == by_arm['full']
    assert len(set(by_arm['plain'])) == 3
    assert {
        arm: len(one) for arm, one in found.seconds.items()
    } == dict.fromkeys(ARMS, 2)
    assert all(one > 0 for each in found.seconds.values() for one in each)
    assert list(found.terms) == ['pkd']
    assert found.facts['boxes'] > 0
    assert found.work['plain'] > 10**6
    assert found.work['terms'] == 0


def test_null_is_a_distiller_of_which_nothing_counts(config):
    arms = benchmark._arms(config, QUICK)
    batch = benchmark.load(config, QUICK)[0]
    losses = {}
    for name, arm in arms.items():
        torch.manual_seed(0)
        losses[name] = arm.model.loss(*arm.shown(batch))
    for key, value in losses['plain'].items():
        for name in ('null', 'full'):
            assert torch.equal(
                torch.stack(list(value)), torch.stack(list(losses[name][key]))
            )
    assert losses['null']['loss_kd_pkd'] == 0
    assert losses['full']['loss_kd_pkd'] > 0


def test_the_teacher_stops_where_its_taps_do(config):
    full = benchmark._arms(config, QUICK)['full']
    (teacher,) = full.model.teachers.values()
    called = []
    for part in (teacher.detector.neck, teacher.detector.bbox_head):
        part.register_forward_pre_hook(
            lambda *one: called.append(type(one[0]))
        )
    benchmark.TeacherPass(full).ready(benchmark.load(config, QUICK)[0])()
    assert [one.__name__ for one in called] == ['FPN']


def test_pixels_are_prepared_once_in_a_step(config):
    """The floor is a step and a pass, not two of what comes before both."""
    full = benchmark._arms(config, QUICK)['full']
    take = benchmark.TeacherPass(full).ready(benchmark.load(config, QUICK)[0])
    full.model.data_preprocessor.forward = None
    take()


def test_random_weights_fetch_nothing(config):
    config.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='nowhere.pth'
    )
    settings = Settings(random_weights=True, boxes=1.0, size=(64, 64))
    arms = benchmark._arms(config, settings)
    assert 'nowhere' not in str(arms['full'].model.backbone.init_cfg)


def test_a_detector_that_writes_into_its_config_is_built_again(config):
    model = detrs.detr('refine')
    model.num_queries = 4
    config.model = tiny.distilled(
        model,
        dict(big=dict(config=dict(model=detrs.detr('refine')))),
        dict(pkd=config.model.terms.pkd),
    )
    settings = Settings(
        blocks=1,
        steps=1,
        batches=1,
        random_weights=True,
        boxes=2.0,
        size=(64, 64),
    )
    found = measure(config, settings, 'refine')
    assert found.median('full') > 0


def test_a_term_s_gradient_ends_at_the_taps(config):
    """Nothing of the student but the tapped maps takes part."""
    arm = benchmark._arms(config, QUICK)['full']
    seen = []
    term = arm.model.terms.pkd

    def noted(step):
        maps = step.student.at('neck')
        seen.extend(maps)
        assert all(one.is_leaf and one.requires_grad for one in maps)
        return type(term).forward(term, step)

    term.forward = noted
    taken = benchmark._Terms(arm, benchmark.Clock('cpu'))(
        benchmark.load(config, QUICK)[:1]
    )
    assert taken['pkd'] > 0
    assert all(one.grad.abs().sum() > 0 for one in seen)
    assert all(one.grad is None for one in arm.model.parameters())


@pytest.mark.parametrize('align', [None, 'mmkd.ConvAdapt'])
def test_what_a_term_multiplies_is_that_of_its_own_layers(config, align):
    """A 1 x 1 convolution: once forward, twice backward."""
    width = config.model.neck.out_channels
    if align:
        config.model.terms.pkd.align = dict(
            type=align,
            in_channels=width,
            out_channels=width,
            num_levels=config.model.neck.num_outs,
        )
    settings = Settings(
        batches=1, batch_size=2, random_weights=True, boxes=2.0, size=(64, 96)
    )
    batches = benchmark.load(config, settings)
    full = benchmark._arms(config, settings)['full']
    found = benchmark._Terms(full, benchmark.Clock('cpu')).work(batches[0])
    images, _ = full.shown(batches[0])
    cells = sum(one[0, 0].numel() for one in full.model.extract_feat(images))
    assert found == (3 * 2 * cells * width**2 if align else 0)


def test_what_a_layer_keeps_is_counted_by_hand():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 5, bias=False)
            self.two = nn.Linear(5, 6, bias=False)

        def loss(self, images, samples):
            return self.two(self.one(images).square()).sum()

    class Fake:
        model = Model()
        precision = benchmark.nullcontext()

        def shown(self, batch):
            return batch, []

    # The images; what is squared; what the second layer multiplies.
    floats = 3 * 4 + 3 * 5 + 3 * 5
    assert saved(Fake(), torch.randn(3, 4)) == 4 * floats


def test_noise_has_the_boxes_one_likes():
    init_default_scope('mmdet')
    config = Config(dict(model=families.mask_rcnn()))
    settings = Settings(boxes=5.0, size=(64, 96), batch_size=4, batches=30)
    batches = synthetic(config, settings)
    samples = [one for batch in batches for one in batch['data_samples']]
    counts = torch.tensor([len(one.gt_instances) for one in samples]).float()
    assert counts.mean().item() == pytest.approx(5, abs=0.7)
    assert counts.std() > 1
    for one in samples:
        found = one.gt_instances
        assert (found.labels < tiny.CLASSES).all()
        assert (found.bboxes[:, 2:] > found.bboxes[:, :2]).all()
        assert found.masks.masks.shape == (len(found), 64, 96)
    assert batches[0]['inputs'][0].shape == (3, 64, 96)


@pytest.mark.parametrize('masks', [True, False])
def test_noise_has_masks_where_the_pipeline_loads_them(config, masks):
    """RTMDet assigns by masks where there are any."""
    pipeline = config.train_dataloader.dataset.pipeline
    pipeline[1] = dict(type='LoadAnnotations', with_bbox=True, with_mask=masks)
    settings = Settings(boxes=5.0, size=(64, 96), batches=1)
    for one in synthetic(config, settings)[0]['data_samples']:
        assert ('masks' in one.gt_instances) is masks
        assert ('masks' in one.ignored_instances) is masks


# The command -----------------------------------------------------------------


def test_the_command_prints_and_keeps(config, tmp_path, capsys):
    path = tmp_path / 'taught.py'
    config.dump(path)
    out = tmp_path / 'out'
    given = [str(path), '--out', str(out), '--page', str(tmp_path / 'page.md')]
    few = [
        '--blocks',
        '2',
        '--steps',
        '1',
        '--warm-up',
        '1',
        '--device',
        'cpu',
    ]
    noise = ['--synthetic', '3', '--size', '64', '64', '--random-weights']
    assert main([*given, *few, *noise]) == 0
    said = capsys.readouterr().out
    assert 'images 64 x 64, batch 2' in said
    assert '+ pkd' in said
    kept = json.loads((out / 'taught.json').read_text())
    assert kept['facts']['weights'] == 'random'
    assert '| taught |' in (tmp_path / 'page.md').read_text()


def test_methods_are_timed_for_a_student_and_a_teacher(
    config, tmp_path, capsys
):
    weights = tmp_path / 'big.pth'
    big = dict(model=tiny.retinanet(base=16))
    tiny.save_teacher(tiny.retinanet(base=16), weights)
    plain = Config(dict(config.to_dict(), model=tiny.retinanet()))
    for name, one in dict(small=plain, big=Config(big)).items():
        one.dump(tmp_path / f'{name}.py')
    command = [str(tmp_path / 'small.py'), '--out', str(tmp_path)]
    command += ['--device', 'cpu', '--synthetic', '3', '--size', '64', '64']
    for word in ('blocks', 'steps', 'warm-up'):
        command += [f'--{word}', '1']
    teacher = ['--teacher', str(tmp_path / 'big.py')]
    teacher += ['--teacher-checkpoint', str(weights)]
    assert main([*command, *teacher, '--methods', 'pkd', 'fgd']) == 0
    said = capsys.readouterr().out
    for method in ('pkd', 'fgd'):
        assert f'small-from-big_{method}: RetinaNet of RetinaNet' in said
        kept = tmp_path / f'small-from-big_{method}.json'
        kept = json.loads(kept.read_text())
        assert [method] == list(kept['terms'])
        assert kept['facts']['plan'] == dict(
            student='small', teacher='big', method=method
        )
    assert main([*command, '--methods', 'pkd']) == 1
    assert 'there is none' in capsys.readouterr().err


def test_a_plain_config_is_refused(tmp_path, capsys):
    path = tmp_path / 'plain.py'
    Config(dict(model=tiny.retinanet())).dump(path)
    assert main([str(path), '--out', str(tmp_path)]) == 1
    assert '--print-config' in capsys.readouterr().err


def test_missing_weights_and_data_say_what_to_type(config, tmp_path):
    config.model.teachers.big.checkpoint = 'nowhere.pth'
    with pytest.raises(FileNotFoundError, match='--random-weights'):
        measure(config, QUICK, 'tiny')
    config.train_dataloader.dataset.data_root = str(tmp_path / 'nothing')
    with pytest.raises(FileNotFoundError, match='--synthetic'):
        measure(config, QUICK, 'tiny')

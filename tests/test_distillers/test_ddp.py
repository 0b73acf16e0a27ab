"""Two processes, one term that stops half-way, no unused parameter."""

import heads
import pytest
import tiny
import torch
from kept_said import keep
from mmengine.dist import all_gather
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import distributed, multiprocessing

from mmkd.terms.term import Term

STEPS = 4


#: First by the teacher, then by the labels.
PHASES = [
    dict(train='backbone', terms='mimic', supervised=False),
    dict(train=('neck', 'bbox_head'), terms=()),
]


def student(teacher_file, balanced=False, phases=None):
    """A tiny student with a term that has weights of its own."""
    teachers = dict(
        big=dict(
            config=dict(model=tiny.retinanet(base=16)),
            checkpoint=str(teacher_file),
        )
    )
    terms = dict(
        mimic=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1),
            align=dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=16),
            loss=dict(type='mmkd.MimicLoss'),
            schedule=dict(type='mmkd.StopAfter', fraction=0.5),
        )
    )
    if balanced:
        terms = dict(mimic=dict(type='mmkd.BalancedTerm', terms=terms))
        terms['mimic']['interval'] = 1
    model = tiny.build(
        tiny.distilled(tiny.retinanet(), teachers, terms, phases=phases)
    )
    model.init_weights()
    return model


def train(model, rank):
    """Half of the steps with the term, half without it.

    Returns:
        The wrapped model and what each step logged for the term.
    """
    wrapped = MMDistributedDataParallel(
        module=model, find_unused_parameters=model.phases.given
    )
    optimiser = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    hub = MessageHub.get_current_instance()
    hub.update_info('max_iters', STEPS)
    logged = []
    for step in range(STEPS):
        hub.update_info('iter', step)
        data = tiny.pixels(*tiny.batch(seed=10 * rank + step))
        log = wrapped.train_step(data, optimiser)
        logged.append(
            sum(v.item() for k, v in log.items() if 'loss_kd_mimic' in k)
        )
    return logged


def weights(model):
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def attempt(teacher_file, rank, balanced=False, phases=None):
    """What a run logged and whether all processes ended alike."""
    model = student(teacher_file, balanced, phases)
    before = weights(model.terms)
    try:
        logged = train(model, rank)
    except RuntimeError as error:
        return dict(error=str(error))
    ends = all_gather(weights(model))
    return dict(
        logged=logged,
        alike=all(torch.equal(ends[0], one) for one in ends),
        processes=len(ends),
        learnt=not torch.equal(before, weights(model.terms)),
        norms=getattr(model.terms.mimic, 'norms', None),
    )


def batch_of(step):
    """Two images of one size, the first for the first process."""
    shapes = ((tiny.SIZE, tiny.SIZE),) * 2
    return tiny.pixels(*tiny.batch(shapes=shapes, seed=20 + step))


def taught_from(teacher_file, cache=0.0):
    """A student whose own losses are divided by what all processes saw."""
    model = heads.fcos()
    model['backbone']['norm_eval'] = True  # else images see their neighbours
    big = dict(
        config=dict(model=tiny.retinanet(base=16)),
        checkpoint=str(teacher_file),
        cache=cache,
    )
    term = dict(
        type='mmkd.FeatureTerm',
        teacher='big',
        levels=(0, 1),
        align=dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=16),
        loss=dict(type='mmkd.MimicLoss', loss_weight=3.0),
    )
    found = tiny.build(tiny.distilled(model, dict(big=big), dict(x=term)))
    found.init_weights()
    return found.train()


def learn(model, images=slice(None)):
    """Two steps on some of the images of each batch.

    Returns:
        The weights, and what the term logged.
    """
    optimiser = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    plain, logged = getattr(model, 'module', model), []
    for step in range(2):
        data = {key: one[images] for key, one in batch_of(step).items()}
        logged.append(model.train_step(data, optimiser)['loss_kd_x'].item())
    return weights(plain), logged


def from_cache(teacher_file, rank, folder):
    model = taught_from(teacher_file, str(folder / 'big'))
    model.teachers['big'].detector._forward = None  # does not run
    before = weights(model)
    wrapped = MMDistributedDataParallel(module=model)
    after, logged = learn(wrapped, slice(rank, rank + 1))
    hits = model.teachers['big'].memory.hits
    return dict(before=before, after=after, logged=logged, hits=hits)


def work(rank, address, teacher_file, result):
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=address, rank=rank, world_size=2
    )
    found = dict(
        touching=attempt(teacher_file, rank),
        balanced=attempt(teacher_file, rank, balanced=True),
        phases=attempt(teacher_file, rank, phases=PHASES),
        cached=from_cache(teacher_file, rank, result.parent),
    )
    # As it would be if an idle term left its weights out of the step.
    Term.touch = lambda self: 0.0
    found['silent'] = attempt(teacher_file, rank)
    torch.save(found, f'{result}.{rank}')
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def runs(teacher_file, tmp_path_factory):
    """Results of both processes."""
    folder = tmp_path_factory.mktemp('ddp')
    keep(taught_from(teacher_file), folder, [batch_of(0), batch_of(1)])
    address = f'file://{folder / "meet"}'
    multiprocessing.start_processes(
        work,
        args=(address, teacher_file, folder / 'result'),
        nprocs=2,
        start_method='fork',
    )
    return [torch.load(f'{folder / "result"}.{rank}') for rank in range(2)]


def test_a_term_that_stops_half_way_needs_no_unused_parameters(runs):
    for run in (one['touching'] for one in runs):
        assert 'error' not in run
        assert [value > 0 for value in run['logged']] == [True] * 2 + [
            False
        ] * 2


def test_both_processes_end_with_equal_weights(runs):
    for run in (one['touching'] for one in runs):
        assert run['processes'] == 2
        assert run['alike']
        assert run['learnt']


def test_phases_follow_each_other_in_both_processes(runs):
    for run in (one['phases'] for one in runs):
        assert 'error' not in run, run['error']
        assert [value > 0 for value in run['logged']] == [True] * 2 + [
            False
        ] * 2
        assert run['alike']
        assert run['learnt']


def test_each_process_saw_its_own_images(runs):
    first, second = (one['touching']['logged'] for one in runs)
    assert first[:2] != second[:2]


def test_weights_by_gradient_are_those_of_all_processes(runs):
    """Measured on each one's images, and averaged."""
    one, other = (run['balanced'] for run in runs)
    for run in (one, other):
        assert 'error' not in run, run['error']
        assert run['alike']
        assert run['learnt']
        assert run['norms'].item() > 0
    assert torch.equal(one['norms'], other['norms'])
    assert one['logged'][:2] != other['logged'][:2]


def test_two_that_read_a_cache_are_one_that_sees_all_images(
    runs, teacher_file
):
    """And whose teacher runs."""
    one = taught_from(teacher_file)
    before = weights(one)
    after, logged = learn(one)
    for run in (one['cached'] for one in runs):
        assert run['hits'] == 2
        assert torch.equal(run['before'], before)
        moved = run['after'] - before
        assert (run['after'] - after).norm() < 1e-4 * moved.norm()
    both = torch.tensor([one['cached']['logged'] for one in runs])
    assert (both[0] - both[1]).abs().min() > 1e-3
    torch.testing.assert_close(both.mean(0), torch.tensor(logged))


def test_without_touching_its_weights_the_run_would_fail(runs):
    for run in (one['silent'] for one in runs):
        assert 'Expected to have finished reduction' in run['error']


@pytest.fixture
def alone(tmp_path):
    """A distributed run of one process, as torchrun starts on one GPU."""
    distributed.init_process_group(
        'gloo',
        init_method=f'file://{tmp_path / "meet"}',
        rank=0,
        world_size=1,
    )
    yield
    distributed.destroy_process_group()


def test_a_distributed_run_of_one_process_is_one_too(alone, teacher_file):
    run = attempt(teacher_file, 0)
    assert 'error' not in run, run['error']
    assert run['processes'] == 1

import pytest
import torch
from torch import distributed, multiprocessing

from mmkd.ops.gather import gather_rows

#: Of either process.
ROWS = (3, 2)


def rows_of(rank):
    return 10.0 * rank + torch.arange(6.0).view(3, 2)[: ROWS[rank]]


def work(rank, address, result):
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=address, rank=rank, world_size=2
    )
    rows = rows_of(rank).requires_grad_()
    together = gather_rows(rows)
    ((rank + 1) * together.square()).sum().backward()
    labels = gather_rows(torch.arange(ROWS[rank]))
    torch.save((together.detach(), rows.grad, labels), f'{result}.{rank}')
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gather')
    address = f'file://{folder / "meet"}'
    multiprocessing.start_processes(
        work, (address, folder / 'result'), nprocs=2, start_method='fork'
    )
    return [torch.load(folder / f'result.{rank}') for rank in (0, 1)]


def test_all_processes_have_the_rows_of_all_in_their_order(found):
    expected = torch.cat([rows_of(rank) for rank in (0, 1)])
    for together, _, labels in found:
        assert torch.equal(together, expected)
        assert labels.tolist() == [0, 1, 2, 0, 1]
        assert labels.dtype == torch.int64


def test_the_gradient_is_the_sum_over_processes(found):
    # 2 x times the factors 1 and 2 of the two processes.
    for rank, (_, grad, _) in enumerate(found):
        torch.testing.assert_close(grad, 6 * rows_of(rank))


def test_alone_the_rows_are_their_own():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows

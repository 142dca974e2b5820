"""Groups of ranks, and the collectives between them."""

import os
import time

import pytest
import torch
from ranked import on_ranks

from conan_engine.errors import UserError
from conan_engine.parallel.mesh import Mesh


def _check(mesh):
    rank, world = mesh.rank, mesh.world
    assert [mesh.any(rank == one) for one in range(world)] == [True] * world and not mesh.any(False)
    assert torch.equal(mesh.reduce_scatter(torch.arange(2.0 * world)), torch.arange(2.0 * rank, 2.0 * rank + 2) * world)
    assert mesh.max(torch.tensor([rank, -rank])).tolist() == [world - 1, 0]
    mine = torch.arange(4.0)[:, None].mul(10**rank).requires_grad_()
    mesh.gather_with_gradient(mine, [4] * world).mul(torch.arange(4.0 * world)[:, None] + rank).sum().backward()
    # row r of all is multiplied by r + rank on every rank: its gradient is the sum of that over the ranks
    rows = torch.arange(4.0) + 4 * rank
    assert torch.equal(mine.grad[:, 0], world * rows + sum(range(world)))


def test_gather_gives_each_row_everyones_gradient():
    on_ranks(3, _check)


def _places(mesh):
    assert (mesh.tensor.world, mesh.tensor.rank, mesh.data.world, mesh.data.rank) == (
        2,
        mesh.rank % 2,
        2,
        mesh.rank // 2,
    )
    mine = torch.tensor([10.0**mesh.rank])
    assert mesh.tensor.sum(mine.clone()).item() == (11, 11, 1100, 1100)[mesh.rank]  # neighbours share a model
    assert mesh.data.sum(mine.clone()).item() == (101, 1010, 101, 1010)[mesh.rank]
    assert mesh.sum(mine).item() == 1111


def test_four_ranks_make_two_copies_of_the_model_on_two_ranks_each():
    on_ranks(4, _places, tensor=2)


def test_ranks_that_make_no_whole_copies_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="tensor_parallel is 2, which does not divide the 3 ranks"):
        Mesh("cpu", 2)


def _late(_, meet):
    torch.distributed.destroy_process_group()
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    mesh = Mesh("cpu", timeout=2)
    with mesh.together():
        if rank == 0:
            time.sleep(4)
    assert mesh.sum(torch.ones(1)).item() == 2
    started = time.monotonic()
    assert mesh.of_all(lambda: time.sleep(0.3 * rank) or rank) == [0, 1] and time.monotonic() - started > 0.3


@pytest.mark.slow
def test_what_ranks_do_together_may_take_longer_than_a_collective(tmp_path):
    on_ranks(2, _late, str(tmp_path / "meet"))

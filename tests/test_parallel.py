"""AdamW over one flat, sharded buffer is torch's AdamW, on one rank and on two."""

import datetime
import os
import time

import pytest
import torch
from ranked import on_ranks

from conan_engine.parallel import Group, ShardedAdamW

STEPS, LR, DECAY = 5, 1e-2, 1e-2


def _model():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))  # 58 weights: padded on three ranks


def _data(step):
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(step))


def _expected():
    model = _model()
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=DECAY)
    for step in range(STEPS):
        adam.zero_grad()
        model(_data(step)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _trained(group, restart=None):
    """The weights after STEPS steps; `restart`: a step at which model and optimiser are made anew from their state."""
    model = _model()
    optimizer = ShardedAdamW(model, group, LR, DECAY)
    own = slice(group.rank * 6 // group.world, (group.rank + 1) * 6 // group.world)
    for step in range(STEPS):
        if step == restart:
            weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state()
            model = _model()
            model.load_state_dict(weights)
            optimizer = ShardedAdamW(model, group, LR, DECAY)
            optimizer.load_state(state, steps=step)
        model(_data(step)[own]).square().sum().backward()
        norm = optimizer.reduce_gradients()
        optimizer.step(LR, scale=min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.zero_gradients()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("restart", [None, 2])
def test_one_rank_is_torchs_adamw(restart):
    torch.testing.assert_close(_trained(Group("cpu"), restart), _expected(), rtol=1e-5, atol=1e-6)


def _check(group, path):
    assert [group.any(group.rank == rank) for rank in range(group.world)] == [True] * group.world and not group.any(False)
    rank, world, weights = group.rank, group.world, _trained(group, restart=3)
    assert torch.equal(group.gather(weights[None]), weights.expand(world, -1))  # all ranks hold the same
    mine = torch.arange(4.0)[:, None].mul(10**rank).requires_grad_()
    group.gather_with_gradient(mine).mul(torch.arange(4.0 * world)[:, None] + rank).sum().backward()
    # row r of all is multiplied by r + rank on every rank: its gradient is the sum of that over the ranks
    rows = torch.arange(4.0) + 4 * rank
    assert torch.equal(mine.grad[:, 0], world * rows + sum(range(world)))
    if rank == 0:
        torch.save(weights, path)


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_are_torchs_adamw_and_gather_gives_each_row_everyones_gradient(tmp_path, world):
    on_ranks(world, _check, str(tmp_path / "weights.pt"))
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), _expected(), rtol=1e-5, atol=1e-6)


def _late(_, meet):
    torch.distributed.destroy_process_group()
    rank, patience = int(os.environ["RANK"]), datetime.timedelta(seconds=2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=patience)
    group = Group("cpu")
    if rank == 0:
        time.sleep(4)
    group.barrier()
    assert group.sum(torch.ones(1)).item() == 2


def test_a_barrier_waits_longer_than_other_collectives(tmp_path):
    on_ranks(2, _late, str(tmp_path / "meet"))

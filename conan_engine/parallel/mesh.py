"""The ranks of a run, the groups that they form, and the collectives within a group."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from conan_engine.errors import UserError
from conan_engine.parallel import watch
from conan_engine.parallel.cpu import settle_memory
from conan_engine.parallel.device import choose

if TYPE_CHECKING:
    from torch import Tensor


# torch 2.13 renamed these collectives
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Waiting:
    """How long the work of this rank's device waits for what other ranks send, between `begin` and `end`."""

    def __init__(self) -> None:
        self.spans: list | None = None

    def begin(self) -> None:
        self.spans = []

    def end(self) -> float:
        """Milliseconds waited since `begin`."""
        spans, self.spans = self.spans, None
        if spans and not isinstance(spans[-1][1], float):
            spans[-1][1].synchronize()  # the device may not have reached the last event yet
        return sum(
            1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end) for start, end in spans or ()
        )

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        spans = self.spans
        if spans is None:
            yield
            return
        start = _now(device)
        yield
        spans.append((start, _now(device)))


def _now(device):
    """A time, or on CUDA an event that the device will reach."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


waiting = Waiting()


class Group:
    """Ranks that share something; this rank is number `rank` of `world`, on `device`.

    Every collective is the identity if world is 1. A collective passes gradients only if it says so. handle: torch's
    process group; None means all ranks.
    """

    def __init__(self, device: str | torch.device = "cpu", rank: int = 0, world: int = 1, handle: Any = None) -> None:
        self.device, self.rank, self.world, self._handle = torch.device(device), rank, world, handle

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            with waiting.on(self.device):
                dist.all_reduce(tensor, group=self._handle)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, element by element, in place."""
        if self.world > 1:
            with waiting.on(self.device):
                dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._handle)
        return tensor

    def counts(self, n: int) -> list[int]:
        """The n of every rank, in rank order."""
        return self.gather(torch.tensor([n], device=self.device)).tolist()

    def gather(self, tensor: Tensor, counts: list[int] | None = None) -> Tensor:
        """Concatenate [n, ...] of all ranks in rank order: [world * n, ...]. counts: the n of each rank; None means
        equal.
        """
        if self.world == 1:
            return tensor
        if counts:
            most = max(counts)
            return (
                torch.cat([rows[:n] for rows, n in zip(self.gather(_filled(tensor, most)).split(most), counts)])
                if most
                else tensor
            )
        out = tensor.new_empty(self.world * len(tensor), *tensor.shape[1:])
        with waiting.on(self.device):
            _all_gather(out, tensor.contiguous(), group=self._handle)
        return out

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """This rank's [n, ...] of the sum over ranks of [world * n, ...]."""
        if self.world == 1:
            return tensor
        out = tensor.new_empty(len(tensor) // self.world, *tensor.shape[1:])
        with waiting.on(self.device):
            _reduce_scatter(out, tensor.contiguous(), group=self._handle)
        return out

    def gather_with_gradient(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """The same as `gather`; each rank's rows receive the sum of all ranks' gradients for them.

        The backward pass is a collective too, also on ranks without rows.
        """
        return tensor if self.world == 1 else _Gather.apply(tensor, self, counts)

    def share(self, count: int) -> slice:
        """This rank's slice of `count` things in a row, which must divide evenly."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def start_reduce_scatter(self, flat: Tensor) -> Any:
        """Start to sum `flat` [world * n] over ranks, in place. Each rank has the sum in its `share`; the rest is
        lost.

        Returns what to `wait` for, or None.
        """
        return (
            _reduce_scatter(flat[self.share(len(flat))], flat, group=self._handle, async_op=True)
            if self.world > 1
            else None
        )

    def start_gather(self, flat: Tensor) -> Any:
        """Start to fill `flat` [world * n] with the `share` of each rank. Returns what to `wait` for, or None."""
        return (
            _all_gather(flat, flat[self.share(len(flat))], group=self._handle, async_op=True)
            if self.world > 1
            else None
        )


class Mesh(Group):
    """All ranks of a run, as a grid.

    `tensor` neighbours share one copy of the model (the group `tensor`). Ranks at the same place of each copy hold the
    same part of it and share out the data (the group `data`).
    """

    def __init__(self, device: str = "auto", tensor: int = 1, timeout: float = 600) -> None:
        """timeout: seconds after which a collective gives up, and a rank without a sign of life counts as gone."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        super().__init__(choose(device, int(os.environ.get("LOCAL_RANK", 0))), rank, world)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        else:
            settle_memory()
        if world % tensor:
            raise UserError(
                f"tensor_parallel is {tensor}, which does not divide the {world} ranks; start a multiple of it"
            )
        if world > 1:
            self._timeout = datetime.timedelta(seconds=timeout)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if cuda else "gloo", timeout=self._timeout)
            # for collectives that must not wait for the device
            self._host = dist.new_group(backend="gloo", timeout=self._timeout)
        copies = range(world // tensor)
        self.tensor = self._subgroup([[copy * tensor + place for place in range(tensor)] for copy in copies])
        self.data = self._subgroup([[copy * tensor + place for copy in copies] for place in range(tensor)])
        if world > 1:
            watch.begin(dist.distributed_c10d._get_default_store(), rank, world, timeout)

    def _subgroup(self, every):
        """The Group of this rank among `every`, disjoint lists of ranks. torch requires that all ranks create all
        groups.
        """
        for ranks in every:
            handle = dist.new_group(ranks, timeout=self._timeout) if 1 < len(ranks) < self.world else None
            if self.rank in ranks:
                mine = Group(self.device, ranks.index(self.rank), len(ranks), handle)
        return mine

    def close(self) -> None:
        watch.end()
        if dist.is_initialized():
            dist.destroy_process_group()

    def any(self, here: bool) -> bool:
        """Whether `here` is true on any rank. Does not wait for the device."""
        if self.world > 1:
            count = torch.tensor(int(here))
            dist.all_reduce(count, group=self._host)
            here = bool(count)
        return here

    def gather_objects(self, value: Any) -> list:
        """The value of every rank, any picklable object, in rank order. Does not wait for the device."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self._host)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave this context together, even if some are in it for hours.

        No rank waits in a collective meanwhile, which would take a slow rank for a dead one, and all ranks hear
        signals. Do not use `any` within it.
        """
        if self.world == 1:
            yield
            return
        within, failed = [True], []

        def ask():
            pause = 0.001
            try:
                while self.any(bool(within)):
                    time.sleep(pause)
                    pause = min(0.2, 1.5 * pause)
            except RuntimeError as error:
                failed.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        yield
        within.clear()
        while thread.is_alive():
            thread.join(0.01)
        if failed:
            raise failed[0]

    def of_all(self, work: Callable[[], Any]) -> list:
        """The results of work() on every rank, in rank order, however long it takes on some."""
        with self.together():
            value = work()
        return self.gather_objects(value)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, counts):
        ctx.group, ctx.counts = group, counts
        return group.gather(tensor, counts)

    @staticmethod
    def backward(ctx, gradient):
        most = max(ctx.counts)
        if not most:
            return gradient, None, None
        everyones = torch.cat([_filled(rows, most) for rows in gradient.split(ctx.counts)])
        return ctx.group.reduce_scatter(everyones)[: ctx.counts[ctx.group.rank]], None, None


def _filled(tensor, rows):
    """Append rows of zeros up to `rows` rows."""
    return (
        tensor if len(tensor) == rows else torch.cat((tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])))
    )

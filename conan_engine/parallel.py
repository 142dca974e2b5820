"""Data parallelism by hand: the process group, collectives with gradient, and AdamW over one flat, sharded buffer."""

import datetime
import os
import time

import torch
import torch.distributed as dist

from conan_engine.cpu import settle_memory
from conan_engine.device import choose


class Group:
    """The ranks that share one run. `rank`, `world`, `device`; every collective is the identity when world is 1."""

    def __init__(self, device="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = choose(device, int(os.environ.get("LOCAL_RANK", 0)))
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        else:
            settle_memory()
        if self.world > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if cuda else "gloo")
            # rank 0 may prepare data for hours; a collective of nccl gives up after ten minutes
            self._patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self):
        """Wait for all ranks, for as long as it takes; meanwhile signals are heard."""
        if self.world > 1:
            work = dist.barrier(self._patient, async_op=True)
            while not work.is_completed():
                time.sleep(0.01)
            work.wait()

    def any(self, here):
        """Whether `here` is true on some rank. Does not wait for the device."""
        if self.world > 1:
            count = torch.tensor(int(here))
            dist.all_reduce(count, group=self._patient)
            here = bool(count)
        return here

    def sum(self, tensor):
        """The sum over ranks, without gradient; in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """Every rank's [n, ...] in rank order: [world * n, ...]; n is the same on all. No gradient."""
        if self.world == 1:
            return tensor
        out = tensor.new_empty(self.world * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(out, tensor.contiguous())
        return out

    def gather_with_gradient(self, tensor):
        """As `gather`; each rank's rows receive the sum of the gradients that all ranks have for them."""
        return tensor if self.world == 1 else _Gather.apply(tensor, self)

    def gather_objects(self, value):
        """Every rank's value of any picklable object, a list in rank order."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group, ctx.rows = group, len(tensor)
        return group.gather(tensor)

    @staticmethod
    def backward(ctx, gradient):
        total = ctx.group.sum(gradient.contiguous().clone())  # gloo has no reduce-scatter for every dtype; rows are few
        return total[ctx.group.rank * ctx.rows : (ctx.group.rank + 1) * ctx.rows], None


class ShardedAdamW:
    """AdamW with its state sharded over the ranks (ZeRO stage 1, arXiv 1910.02054).

    All parameters become views of one flat float32 buffer and their gradients of another, so that a step is one
    reduction, one fused AdamW on this rank's slice, and one gather, whatever the number of layers.
    """

    def __init__(self, model, group, lr, weight_decay):
        self.group, self.model = group, model
        self.names = [name for name, _ in model.named_parameters()]
        parameters = [p for _, p in model.named_parameters()]
        self.sizes = [p.numel() for p in parameters]
        total = -(-sum(self.sizes) // group.world) * group.world  # padded: every rank's slice has the same size
        self.weights = torch.zeros(total, device=group.device)
        self.gradients = torch.zeros_like(self.weights)
        for p, weight, gradient in zip(parameters, self._views(self.weights), self._views(self.gradients)):
            weight.copy_(p.detach().flatten())
            p.data = weight.view_as(p)
            p.grad = gradient.view_as(p)
        shard = total // group.world
        self.slice = slice(group.rank * shard, (group.rank + 1) * shard)
        self.mine = torch.nn.Parameter(self.weights[self.slice])
        # Norm weights decay too: one flat slice cannot tell them apart, and at the paper's 1e-3 it makes no difference.
        self.adam = torch.optim.AdamW([self.mine], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)

    def _views(self, flat):
        return flat[: sum(self.sizes)].split(self.sizes)

    def reduce_gradients(self):
        """Sum the gradients over ranks; returns their global L2 norm, a float."""
        self.group.sum(self.gradients)
        return self.gradients.norm().item()

    def step(self, lr, scale):
        """One update with the gradients times `scale` (clipping)."""
        self.adam.param_groups[0]["lr"] = lr
        self.mine.grad = self.gradients[self.slice].mul_(scale)
        self.adam.step()
        if self.group.world > 1:
            self.weights.copy_(self.group.gather(self.mine.detach()))

    def zero_gradients(self):
        self.gradients.zero_()

    def state(self):
        """Both moments of every parameter by name, whole (gathered), for a checkpoint; the same for any number of ranks."""
        tensors = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            mine = self.adam.state[self.mine].get(moment) if self.adam.state else None
            flat = self.group.gather(mine if mine is not None else torch.zeros_like(self.mine))
            tensors |= {f"{moment}.{name}": view.clone() for name, view in zip(self.names, self._views(flat))}
        return tensors

    def load_state(self, tensors, steps):
        """What `state` gave after `steps` updates. The model's weights are loaded apart, in place."""
        moments = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            flat = torch.zeros_like(self.weights)
            for name, view in zip(self.names, self._views(flat)):
                view.copy_(tensors[f"{moment}.{name}"])
            moments[moment] = flat[self.slice].clone()
        self.adam.state[self.mine] = {"step": torch.tensor(float(steps)), **moments}



"""AdamW sharded over the data ranks (ZeRO 1, arXiv 1910.02054), with its communication hidden behind computation.

Parameters live in buckets, in the order of the forward pass. When the backward pass has finished a bucket, its
gradients are summed over the ranks while the backward pass continues, and each rank receives its share of the sum. Each
rank updates its share. The new weights are gathered, first layers first, while the next step begins; a module waits for
its own. A step sends one reduce-scatter and one all-gather of the parameters.

Per parameter, a rank holds the weight (2 bytes in bfloat16), its gradient (4), and for its share the float32 master
weight (4) and both moments (8). Where weights are float32, the share of them is the master weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adamw import adamw

from conan_engine.parallel.mesh import waiting
from conan_kernels import pointwise

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conan_engine.parallel.mesh import Group, Mesh


MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names
BETAS, EPS = (0.9, 0.95), 1e-8
BUCKET = 1 << 25  # parameters: 128 MB of gradients, large enough for full bandwidth, small enough to begin early


class Bucket:
    """Parameters one after another in flat buffers, padded with zeros so that all ranks' shares have the same size."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], group: Group, dtype: torch.dtype) -> None:
        """named: [(name, parameter)]. The parameters become views of `weights`, in this dtype."""
        self.group, self.names, self.parameters = group, *zip(*named)
        self.sizes = [p.numel() for p in self.parameters]
        # each tensor rank has its own part of these; of all others, the same
        self.cut = hasattr(self.parameters[0], "split_by")
        size = -(-sum(self.sizes) // group.world) * group.world
        self.weights = torch.zeros(size, device=group.device)
        self.gradients = torch.zeros_like(self.weights)
        self.share, self.pending = group.share(size), None
        for p, weight in zip(self.parameters, self.views(self.weights)):
            weight.copy_(p.detach().flatten())
        self.master = self.weights[self.share]
        if dtype != torch.float32:
            self.master, self.weights = self.master.clone(), self.weights.to(dtype)
        self.lend(self.weights)
        self.gradient_of = dict(zip(self.parameters, self.views(self.gradients)))
        self.unwritten = set()  # parameters whose gradients still hold another step's
        self.moments = {key: torch.zeros_like(self.master) for key in MOMENTS}
        if dtype == torch.float32:
            for p, gradient in self.gradient_of.items():
                p.grad = gradient.view_as(p)  # autograd adds to it directly

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat[: sum(self.sizes)].split(self.sizes)

    def lend(self, flat: Tensor) -> None:
        """Make the parameters views of `flat`."""
        for p, weight in zip(self.parameters, self.views(flat)):
            p.data = weight.view_as(p)

    def shared(self) -> Iterator[tuple[str, Tensor, int, slice]]:
        """(name, parameter, start, place) of what lies in this rank's share: `place`, a slice of the share, holds
        the parameter's numbers from `start` on.
        """
        end = 0
        for name, p, size in zip(self.names, self.parameters, self.sizes):
            begin, end = end, end + size
            first, last = max(begin, self.share.start), min(end, self.share.stop)
            if first < last:
                yield name, p, first - begin, slice(first - self.share.start, last - self.share.start)

    def add(self, p: nn.Parameter) -> None:
        """Add the gradient of p, whose dtype is not float32, to the sum."""
        pointwise.add_(self.gradient_of[p], p.grad.flatten(), first=p in self.unwritten)
        self.unwritten.discard(p)
        p.grad = None

    def zero_gradients(self) -> None:
        if self.weights.dtype == torch.float32:
            self.gradients.zero_()  # autograd adds to it
        else:
            self.unwritten = set(self.parameters)

    def finish_gradients(self) -> None:
        """The gradients of parameters that got none are zeros."""
        for p in self.unwritten:
            self.gradient_of[p].zero_()
        self.unwritten = set()

    def update(self, step: int, lr: float, decay: float, scale: float) -> None:
        """Update this rank's share with its gradients times `scale`; step: number of the update, from 1."""
        gradient, (mean, square) = self.gradients[self.share], self.moments.values()
        if self.master.is_cuda:
            rounded = None if self.weights.dtype == torch.float32 else self.weights[self.share]
            pointwise.adamw_(self.master, gradient, mean, square, rounded, step, lr, scale, BETAS, EPS, decay)
            return
        adamw(
            [self.master], [gradient.mul_(scale)], [mean], [square], [], [torch.tensor(float(step - 1))], fused=True,
            amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=decay, eps=EPS, maximize=False,
        )  # fmt: skip
        self.round_weights()

    def round_weights(self) -> None:
        """Set the weights that compute to this rank's share of the master weights."""
        if self.weights.dtype != torch.float32:
            self.weights[self.share].copy_(self.master)

    def publish(self) -> None:
        """Start to gather the new weights of all ranks' shares."""
        self.pending = self.group.start_gather(self.weights)

    def wait(self) -> None:
        """Wait for the collective that was started."""
        if self.pending:
            with waiting.on(self.group.device):
                self.pending.wait()
            self.pending = None


class ShardedAdamW:
    """The optimizer. A step: backward passes, with `send_next` before the last; `reduce_gradients`; `step`;
    `zero_gradients`.
    """

    def __init__(
        self, model: torch.nn.Module, mesh: Mesh, weight_decay: float, dtype: torch.dtype = torch.float32
    ) -> None:
        """dtype: of the weights that compute, float32 or bfloat16. Parameters that need no gradient get this dtype
        and stay as they are.
        """
        self.mesh = mesh
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
        self.buckets = [Bucket(part, mesh.data, dtype) for part in in_buckets(model)]
        self.home = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.home]
        for module in model.modules():
            own = dict.fromkeys(self.home[p] for p in module.parameters(recurse=False) if p in self.home)
            if own:
                self.hooks.append(module.register_forward_pre_hook(_wait_for(own)))
        # norm weights decay too: at the paper's 1e-3 it makes no difference, and a bucket is updated as a whole
        self.weight_decay, self.steps = weight_decay, 0
        self.zero_gradients()

    def send_next(self) -> None:
        """The next backward pass is the last of the step: send each bucket as it completes."""
        self.sending = True

    def _arrived(self, p):
        """The backward pass has added to p's gradient."""
        bucket = self.home[p]
        if p.dtype != torch.float32:
            bucket.add(p)
        if self.sending:
            self.missing[bucket].discard(p)
            while self.unsent and not self.missing[self.unsent[-1]]:
                self._send(self.unsent.pop())

    def _send(self, bucket):
        bucket.finish_gradients()
        if not bucket.cut:
            self.mesh.tensor.sum(bucket.gradients)  # each tensor rank had the gradients of its own tokens
        bucket.pending = self.mesh.data.start_reduce_scatter(bucket.gradients)

    def reduce_gradients(self) -> float:
        """Finish the sum of the gradients over ranks. Returns their global L2 norm, a float."""
        while self.unsent:
            self._send(self.unsent.pop())
        squares = torch.zeros((), device=self.mesh.device)
        for bucket in reversed(self.buckets):
            bucket.wait()
            if bucket.cut or self.mesh.tensor.rank == 0:  # what all tensor ranks hold counts once
                squares += bucket.gradients[bucket.share].norm().square()
        return self.mesh.sum(squares).sqrt().item()

    def step(self, lr: float, scale: float) -> None:
        """Update the weights with the gradients times `scale` (clipping)."""
        self.steps += 1
        for bucket in self.buckets:
            bucket.update(self.steps, lr, self.weight_decay, scale)
            bucket.publish()

    def zero_gradients(self) -> None:
        """Set all gradients to zero, before the next step."""
        for bucket in self.buckets:
            bucket.zero_gradients()
        # every rank sends the buckets in this order, whichever completes first
        self.sending = False
        self.unsent = list(self.buckets)
        self.missing = {bucket: set(bucket.parameters) for bucket in self.buckets}

    def blend(self, earlier: torch.nn.Module, share: float) -> None:
        """Set the weights to `share` (0 to 1) of themselves plus the rest of the weights of `earlier`, a model of
        the same shape. A collective.
        """
        begun = dict(earlier.named_parameters())
        with torch.no_grad():
            for bucket in self.buckets:
                bucket.wait()
                for name, _, start, place in bucket.shared():
                    now = bucket.master[place]
                    now.copy_(begun[name].flatten()[start : start + len(now)].lerp(now, share))
                bucket.round_weights()
                bucket.publish()

    def close(self) -> None:
        """Release the model: its weights are float32 again, and using it has no side effects. A collective."""
        for hook in self.hooks:
            hook.remove()
        for bucket in self.buckets:
            bucket.wait()
            if bucket.weights.dtype != torch.float32:
                bucket.lend(self.mesh.data.gather(bucket.master))
            for p in bucket.parameters:
                p.grad = None
        # gradients and moments, which the next stage's optimizer would find still there
        del self.buckets, self.home, self.unsent, self.missing

    def held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """This rank's part of a checkpoint, as tuples ("weight", "exp_avg" or "exp_avg_sq"; the parameter's name;
        start; the numbers from there on, a float32 view).

        Parameters that all tensor ranks hold come from the first of them. The other ranks' parts may still be on their
        way.
        """
        for bucket in self.buckets:
            if bucket.cut or self.mesh.tensor.rank == 0:
                for key in ("weight", *MOMENTS):
                    share = bucket.master if key == "weight" else bucket.moments[key]
                    for name, _, start, place in bucket.shared():
                        yield key, name, start, share[place]

    def load_state(self, pieces: Any, steps: int) -> None:
        """Load the moments from pieces.Pieces, which ranks of any mesh held after `steps` updates. The weights are
        those that the model has when the optimizer is made.
        """
        self.steps = steps
        for bucket in self.buckets:
            for name, p, start, place in bucket.shared():
                for key in MOMENTS:
                    pieces.read_into(bucket.moments[key][place], f"{key}.{name}", p, self.mesh.tensor, start)


def _wait_for(buckets):
    def wait(*_):
        for bucket in buckets:
            bucket.wait()

    return wait


def in_buckets(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The trained parameters of a model, (name, parameter), as they share out into buckets."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # parameters that all tensor ranks hold come first: norms, whose gradients are complete last
    of_kind = ([one for one in named if hasattr(one[1], "split_by") == cut] for cut in (False, True))
    return [part for kind in of_kind for part in _parts(kind)]


def _parts(named):
    """Split into consecutive groups of up to BUCKET parameters."""
    part, size = [], 0
    for name, p in named:
        if part and size + p.numel() > BUCKET:
            yield part
            part, size = [], 0
        part.append((name, p))
        size += p.numel()
    if part:
        yield part

"""Say what a run needs before anything is allocated."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from conan_engine.errors import UserError
from conan_engine.parallel.device import check_heads
from conan_engine.plan import devices, lengths
from conan_engine.plan.memory import Form, of_weights
from conan_engine.plan.predicting import Machines, Planner
from conan_engine.plan.replay import Links

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conan_engine.config import Config
    from conan_engine.parallel.mesh import Mesh
    from conan_engine.plan.predicting import Planned

GIB, HOUR, DAY = 2**30, 3600, 86_400
BETWEEN = 50.0  # GB/s each way of a GPU to other machines: 400 Gbit/s


def report(config: Config, mesh: Mesh) -> None:
    """Print the size of the model and the memory that a device needs. Raises UserError if the device has too little."""
    check_heads(mesh.device, config.model.head)
    cuda = mesh.device.type == "cuda"
    bfloat16 = config.precision == "bfloat16" or (cuda and config.precision == "auto")
    form = Form(mesh.device.type, bfloat16, config.recompute == "block", mesh.data.world, mesh.tensor.world)
    planner = Planner(config, _vocab_size(config), lengths.longest(config))
    layout = planner.layout(config.stages[0], form.tensor)
    fixed = sum(size for kind, size in of_weights(layout, form).items() if kind != "checkpoint")
    needs = max(planner.stage(name, form).memory for name in config.stages)
    # the ranks of a machine share its memory
    has = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if mesh.rank == 0:
        trained = f", {layout.trained / 1e6:,.2f}M of them in adapters trained" if config.lora.rank else ""
        print(
            f"{layout.whole / 1e6:,.0f}M parameters{trained}; per device ({mesh.world} in all) {fixed / GIB:.2f} GiB "
            f"of weights, gradients and optimizer state, at most {needs / GIB:.1f} GiB with activations; this one has "
            f"{has / GIB:.1f} GiB",
            flush=True,
        )
        if config.plan_only:
            print("\n".join(_whole(config, form, devices.of(mesh.device))), flush=True)
    if fixed > has and not config.plan_only:
        raise UserError(
            f"the model needs {fixed / GIB:.1f} GiB a device before activations, and this one has {has / GIB:.1f} GiB; "
            "use more ranks, which share out the optimizer's state, tensor_parallel, which shares out the weights, "
            "or a smaller [model]"
        )


def _vocab_size(config):
    return config.model.vocab_size or config.tokenizer.vocab_size


def _whole(config: Config, form: Form, here: devices.Device | None) -> Iterator[str]:
    """The lines of the whole plan. form: of this run. here: this machine's GPU, if it is known."""
    plan = config.plan
    device = devices.named(plan.device) if plan.device else here
    texts, source = lengths.of(config)
    planner = Planner(config, _vocab_size(config), texts)
    yield f"Lengths of texts: {source}."
    if not device:
        for name in config.stages:
            uneven = planner.uneven(name, form.data)
            yield from [f"\n{name}: {uneven}"] if uneven else _of_stage(planner, planner.stage(name, form), None)
        yield "\nFor the time of a run on GPUs: --plan.device=h200 --plan.gpus=8"
        return
    gpus = plan.gpus or form.data * form.tensor
    within, between = plan.links or (device.link, BETWEEN)
    machines = Machines(device, gpus, Links(within, between, plan.machine))
    yield (
        f"Predicted for {gpus:,} {device.name}, {plan.machine} a machine, with links of {within:g} GB/s "
        f"within a machine and {between:g} GB/s between two."
    )
    if gpus % config.tensor_parallel:
        raise UserError(f"plan.gpus is {gpus}; expected a multiple of tensor_parallel = {config.tensor_parallel}")
    check_heads(torch.device("cuda"), config.model.head)
    form = Form("cuda", True, form.recompute, gpus // config.tensor_parallel, config.tensor_parallel)
    if config.precision == "float32":
        raise UserError("plan.device: the time of float32 products is not known; leave --precision=float32 out")
    for name in config.stages:
        uneven = planner.uneven(name, form.data)
        yield from (
            [f"\n{name}: {uneven}"] if uneven else _of_stage(planner, planner.stage(name, form, machines), machines)
        )
    yield from _meshes(planner, machines)


def _of_stage(planner: Planner, one: Planned, machines: Machines | None) -> Iterator[str]:
    form, load = one.form, one.load
    other = planner.stage(one.name, form._replace(recompute=not form.recompute))
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in one.bytes.items())
    attention = one.work.of_pair * load.pairs * form.data / one.flop
    yield (
        f"\n{one.name}: {one.steps:,} steps of {load.tokens * form.data:,.0f} tokens; {form.data} data x {form.tensor} "
        f"tensor ranks; {'chunk_tokens' if one.cut.chunk_tokens else 'chunk'} {max(one.cut)}"
    )
    yield f"  memory of a device: {one.memory / GIB:.2f} GiB: {kinds}"
    yield f"    with recompute = {'none' if form.recompute else 'block'}: {other.memory / GIB:.2f} GiB"
    yield f"  work of a step: {one.flop:.2e} FLOP, {attention:.0%} of them attention's"
    if not machines:
        return
    time = one.time
    yield (
        f"  sent by a device in a step: {time.sent['data'] / 1e9:.2f} GB to data ranks, "
        f"{time.sent['tensor'] / 1e9:.2f} GB to tensor ranks"
    )
    yield (
        f"  time of a step: {1e3 * time.step:,.0f} ms, in which it waits {1e3 * time.waits_data:,.0f} ms for data "
        f"ranks and {1e3 * time.waits_tensor:,.0f} ms for tensor ranks; MFU {one.mfu(machines):.0%}"
    )
    yield f"  time of the stage: {_days(one.seconds)}, {_hours(one.seconds, machines)} GPU hours"
    if not one.fits(machines):
        yield f"  it does not fit: a {machines.device.name} has {machines.device.memory:g} GiB"


def _meshes(planner: Planner, machines: Machines) -> Iterator[str]:
    fitting = planner.fitting(machines)
    names = planner.config.stages
    if not fitting:
        yield f"\nThere is no mesh of {machines.gpus} {machines.device.name} on which all stages fit."
        return
    unit = "; t: chunk_tokens" if any(one.cut.chunk_tokens for stages in fitting for one in stages) else ""
    yield f"\nMeshes on which all stages fit, fastest first; chunk and ms a step of {', '.join(names)}{unit}:"
    yield (
        f"{'data x tensor':>14}  {'recompute':9}  {'chunk':>{8 * len(names)}}{'ms a step':>{10 * len(names)}}{'GiB':>7}"
        + (f"{'days':>9}{'GPU hours':>12}")
    )
    for stages in fitting:
        form, seconds = stages[0].form, sum(one.seconds for one in stages)
        yield (
            f"{form.data:>5} x {form.tensor:<6}  {'block' if form.recompute else 'none':9}  "
            + "".join(f"{str(one.cut):>8}" for one in stages)
            + "".join(f"{1e3 * one.time.step:10,.0f}" for one in stages)
            + f"{max(one.memory for one in stages) / GIB:7.0f}{seconds / DAY:9.1f}{_hours(seconds, machines):>12}"
        )


def _days(seconds):
    return f"{seconds / DAY:,.1f} days" if seconds >= DAY else f"{seconds / HOUR:,.1f} hours"


def _hours(seconds, machines):
    return f"{seconds / HOUR * machines.gpus:,.0f}"

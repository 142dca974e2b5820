"""What a step computes, counted, and how that is told."""

import pytest
import torch
from ranked import on_ranks
from step import Work as Benchmarked

from conan_engine.config import Lora, Model
from conan_engine.model.lora import adapt
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh, waiting
from conan_engine.plan import devices
from conan_engine.plan.flops import Work
from conan_engine.stages.packed import Packed, sizes

SHAPE = Model(layers=2, width=64, ffn=96, heads=4, kv_heads=2, head_dim=16)


def packed(lengths):
    lengths = torch.tensor(lengths)
    return Packed(
        torch.zeros(int(lengths.sum()), dtype=torch.int32), torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    )


@pytest.mark.parametrize("name", ["text", "pairs"])
def test_flop_are_those_of_the_benchmark_of_steps(name):
    wanted = Benchmarked(name, SHAPE, 500, 16)
    model = Transformer(SHAPE, 500)
    learnt = wanted.tokens if name == "text" else 0
    found = Work(model).flop(sizes(packed(wanted.lengths), Mesh("cpu"), name == "pairs", learnt))
    # there norms count too, and the token table only as the LM head
    assert found == pytest.approx(wanted.flops, rel=0.01)


def test_frozen_weights_have_no_gradient_to_compute():
    model, one = Transformer(SHAPE, 500), sizes(packed([1]), Mesh("cpu"), True)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    of_pair = 12 * 16 * 4 * 2
    assert Work(model).flop(one) == 6 * matrices + of_pair
    adapt(model, Lora(rank=4), 1)
    adapters = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad)
    assert Work(model).flop(one) == 4 * matrices + 6 * adapters + of_pair


@pytest.mark.parametrize("device", [devices.named("H100"), None])
def test_a_rate_is_told_where_the_devices_peak_is_known(device):
    found = Work(Transformer(SHAPE, 500, "bfloat16"), 2, device)
    one = sizes(packed([30, 0, 1]), Mesh("cpu"), False)
    tflops = found.flop(one) / 2.0 / 2 / 1e12
    assert found.rate(one, 2.0) == ({"tflops": tflops, "mfu": tflops / 989} if device else {})
    of_float32 = Work(Transformer(SHAPE, 500, "float32"), 2, device)
    assert of_float32.rate(one, 2.0) == {}, "the peak is that of other products"


def _sends(mesh):
    waiting.begin()
    for _ in range(3):
        mesh.sum(torch.ones(1000))
    assert 0 < waiting.end() < 10_000
    mesh.sum(torch.ones(10))
    waiting.begin()
    assert waiting.end() == 0


def test_what_ranks_wait_for_each_other_is_measured():
    on_ranks(2, _sends)

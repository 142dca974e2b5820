"""The plan's bytes, beside what autograd keeps, the optimizer holds and a GPU had."""

import contextlib
import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from ranked import on_ranks
from torch.autograd.graph import saved_tensors_hooks

from conan_engine.config import Config, Lora, Model
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.plan import memory
from conan_engine.plan.layout import Layout
from conan_engine.plan.loads import Load
from conan_engine.plan.memory import Form
from conan_kernels.pointwise import api

VOCABULARY = 320
SHAPE = Model(layers=3, width=96, ffn=224, heads=6, kv_heads=2, head_dim=32)
NORMED = Model(layers=2, width=64, ffn=160, heads=4, kv_heads=4, head_dim=16, qk_norm=True)


def load(tokens, **numbers):
    return Load(tokens=tokens, texts=4, pairs=0, learnt=0, at_once=tokens, parts=1, **numbers)


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch, products):
    """Tensors of device meta that the engine takes for a GPU's: shapes without numbers, kernels that do nothing."""
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *_: products == torch.bfloat16)
        patch.setattr(torch, "get_autocast_dtype", lambda *_: products)
        patch.setattr(torch.nn.Linear, "reset_parameters", lambda _: None)
        patch.setattr(api, "_tiles", MagicMock())
        yield


def kept(model, tokens, cu_seqlens):
    """Bytes that the backward pass of the hidden states would read, without the weights."""
    storages, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        held.append(tensor)  # or another tensor might get its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, cu_seqlens, 0.0)
    for p in model.parameters():
        storages.pop(p.untyped_storage()._cdata, None)
    assert hidden.requires_grad
    return sum(storages.values())


def output(shape, tokens):
    """Bytes of the hidden states, which the backward pass does not read."""
    return 4 * shape.width * tokens


@pytest.mark.parametrize("shape", [SHAPE, NORMED], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_activations_on_a_gpu_are_what_its_backward_pass_reads(monkeypatch, shape, recompute, products):
    T = 1000
    with as_on_a_gpu(monkeypatch, products):
        torch.set_default_dtype(products)
        try:
            model = Transformer(shape, VOCABULARY, recompute="block" if recompute else "none")
        finally:
            torch.set_default_dtype(torch.float32)
        found = kept(model, torch.empty(T, dtype=torch.int32), torch.empty(5, dtype=torch.int32))
    form = Form("cuda", products == torch.bfloat16, recompute)
    layout = Layout(Config(model=shape), "weak", VOCABULARY)
    planned = memory.of_step(layout, load(T), form)["activations"]
    if recompute:  # while a block's backward pass runs, what it reads is there too; the first block adds nothing to x
        whole = memory.of_step(layout, load(T), form._replace(recompute=False))["activations"]
        once = T * (8 * shape.width + 4 * shape.head + 12)
        planned -= (whole - once) / shape.layers + form.size * T * shape.width
    assert found == pytest.approx(planned - output(shape, T), rel=0.015)


@pytest.mark.parametrize("shape", [SHAPE, NORMED], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_on_a_cpu_are_what_its_backward_pass_reads(shape, precision):
    lengths = torch.tensor([120] * 8)
    model = Transformer(shape, VOCABULARY, precision).init_weights(1)
    cu_seqlens = torch.nn.functional.pad(lengths, (1, 0)).cumsum(0).int()
    T = int(lengths.sum())
    found = kept(model, torch.randint(VOCABULARY, (T,), dtype=torch.int32), cu_seqlens)
    layout = Layout(Config(model=shape), "weak", VOCABULARY)
    planned = memory.of_step(layout, load(T), Form("cpu", precision == "bfloat16"))["activations"]
    assert found == pytest.approx(planned - output(shape, T), rel=0.015)


def held(optimizer, model):
    """Bytes of the model and its optimizer on this rank, by the plan's kinds."""
    found = {"weights": sum(p.numel() * p.element_size() for p in model.parameters())}
    buckets = optimizer.buckets
    found["gradients"] = sum(b.gradients.nbytes for b in buckets)
    found["moments"] = sum(b.moments[key].nbytes for b in buckets for key in ("exp_avg", "exp_avg_sq"))
    separate = sum(b.master.nbytes for b in buckets if b.weights.dtype != torch.float32)
    return found | ({"master weights": separate} if separate else {})


def _holds(mesh, half):
    model = Transformer(SHAPE, VOCABULARY, "float32", mesh.tensor).init_weights(1)
    optimizer = ShardedAdamW(model, mesh, 0.0, torch.bfloat16 if half else torch.float32)
    layout = Layout(Config(model=SHAPE), "weak", VOCABULARY, mesh.tensor.world)
    # bfloat16 weights are what a GPU has
    planned = memory.of_weights(
        layout, Form("cuda" if half else "cpu", half, False, mesh.data.world, mesh.tensor.world)
    )
    for kind, size in held(optimizer, model).items():
        assert size == pytest.approx(planned[kind], rel=1e-3), kind
    assert layout.whole == sum(p.numel() for p in Transformer(SHAPE, VOCABULARY).parameters())


@pytest.mark.parametrize("half", [False, True])
def test_weights_and_the_optimizers_state_are_what_a_rank_holds(half):
    _holds(Mesh("cpu"), half)


def test_ranks_hold_their_shares():
    on_ranks(4, _holds, True, tensor=2)


def test_frozen_weights_have_no_gradients_and_no_moments():
    config = Config(model=SHAPE, lora=Lora(rank=4))
    layout = Layout(config, "weak", VOCABULARY)
    planned = memory.of_weights(layout, Form("cuda", True))
    assert planned["gradients"] == 4 * layout.trained < planned["weights"] / 4
    assert layout.parameters == Layout(Config(model=SHAPE), "weak", VOCABULARY).parameters + layout.trained


def test_an_lm_head_of_its_own_counts_until_the_contrastive_stages():
    config = Config(model=Model(layers=1, width=64, ffn=64, heads=2, kv_heads=2, tied=False))
    more = Layout(config, "pretrain", VOCABULARY).parameters - Layout(config, "weak", VOCABULARY).parameters
    assert more == VOCABULARY * 64


def test_the_text_step_of_the_h200_had_what_is_planned():
    results = Path(__file__).resolve().parents[2] / "benchmarks/results/step-h200.json"
    row = next(r for r in json.loads(results.read_text())["rows"] if (r["form"], r["work"]) == ("ours", "text"))
    layout, form, T = Layout(Config(), "pretrain", 150_000), Form("cuda", True), row["tokens"]
    step = memory.of_step(layout, load(T)._replace(learnt=T, both_ways=False), form)
    planned = sum((memory.of_weights(layout, form) | step).values())
    assert planned == pytest.approx(row["peak_bytes"], rel=0.05)

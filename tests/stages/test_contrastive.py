"""Gradient caching gives the gradient of the whole batch, on one rank and on several."""

import pytest
import torch
from ranked import on_ranks

from conan_engine.config import Model, Stage
from conan_engine.model import losses
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.stages.contrastive import embed_and_backward
from conan_engine.stages.packed import Packed


def _packed(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Packed(torch.randint(2**31 - 1, (sum(lengths),), dtype=torch.int32), cu_seqlens)


@pytest.mark.parametrize("settings", [{"chunk": 3}, {"chunk_tokens": 1}, {"chunk_tokens": 60}], ids=str)
def test_pieces_have_the_gradients_of_the_whole_batch(settings):
    shape = Model(layers=2, width=32, ffn=48, heads=2, kv_heads=1, context=64)
    model = Transformer(shape, 50, "float32").init_weights(1).double()
    lengths = torch.randint(1, 40, (20,)).tolist()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    whole = Packed(torch.randint(50, (sum(lengths),), dtype=torch.int32), cu_seqlens)
    weight = torch.randn(20, 32, dtype=torch.float64)  # of each text another: their order matters

    def found(settings):
        model.zero_grad()
        loss, last = embed_and_backward(
            model, whole, Stage(**settings), 0.6, "column", lambda x: ((x * weight).sum().tanh(), x[-1]), lambda: None
        )
        return loss, last, *(p.grad.clone() for p in model.parameters())

    for ours, expected in zip(found(settings), found({})):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("settings", "pieces"), [({}, 1), ({"chunk": 10}, 2), ({"chunk": 3}, 7)], ids=str)
def test_the_graph_of_the_last_piece_is_kept(settings, pieces):
    model = Transformer(Model(layers=1, width=8, ffn=8, heads=1, kv_heads=1, context=8), 50, "float32").init_weights(1)
    plain, events = model.embed, []

    def embed(*arguments):
        events.append("with a graph" if torch.is_grad_enabled() else "without")
        return plain(*arguments)

    model.embed = embed
    whole = _packed([3] * 20)._replace(tokens=torch.arange(60, dtype=torch.int32) % 50)
    embed_and_backward(
        model, whole, Stage(**settings), 1.0, "column", lambda x: (x.sum().tanh(),), lambda: events.append("exchange")
    )
    early = ["without"] * (pieces - 1) + ["with a graph"]
    again = ["with a graph"] * (pieces - 1)
    assert events == early + (again[:-1] + ["exchange"] + again[-1:] if again else ["exchange"])


def _a_step(mesh, parts, settings, path=None):
    """One step on 4 pairs of texts, of which each rank has so many; the norm of the gradients, and the weights after
    it."""
    torch.manual_seed(5)
    model = Transformer(Model(layers=2, width=16, ffn=24, heads=2, kv_heads=1, context=32), 50, "float32").init_weights(
        1
    )
    optimizer = ShardedAdamW(model, mesh, 0.0)
    texts = [torch.randint(50, (2 + i,), dtype=torch.int32) for i in range(8)]  # queries, then documents
    own = range(sum(parts[: mesh.rank]), sum(parts[: mesh.rank + 1]))
    mine = [texts[i] for i in own] + [texts[4 + i] for i in own]
    cu_seqlens = torch.tensor([0, *map(len, mine)]).cumsum(0, dtype=torch.int32)
    groups = torch.tensor([i + 1 for i in own], dtype=torch.int64)

    def loss_of(embeddings):
        queries, documents = embeddings.chunk(2)
        return losses.info_nce(queries, documents, groups, groups, 0.1, mesh)

    packed = Packed(torch.cat([torch.zeros(0, dtype=torch.int32), *mine]), cu_seqlens)
    loss, accuracy = embed_and_backward(model, packed, settings, 0.7, "column", loss_of, optimizer.send_next)
    norm = optimizer.reduce_gradients()
    optimizer.step(1e-2, 1.0)
    optimizer.close()
    found = (
        mesh.sum(loss).item(),
        mesh.sum(accuracy).item(),
        norm,
        torch.cat([p.detach().flatten() for p in model.parameters()]),
    )
    if path and mesh.rank == 0:
        torch.save(found, path)
    return found


@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.slow), {"chunk": 2}, {"chunk_tokens": 9}], ids=str
)
def test_a_rank_with_less_or_nothing_takes_part_in_the_step(tmp_path, settings):
    on_ranks(3, _a_step, (3, 0, 1), Stage(**settings), str(tmp_path / "found.pt"))
    *numbers, weights = torch.load(tmp_path / "found.pt")
    *expected, expected_weights = _a_step(Mesh("cpu"), (4,), Stage())
    assert numbers == pytest.approx(expected, rel=1e-5)
    # Adam's first step is the learning rate times the gradient's sign, unless that is as small as rounding
    assert ((weights - expected_weights).abs() < 1e-4).float().mean() > 0.98

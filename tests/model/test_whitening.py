"""A start from hidden states that crowd into few directions: init_whiten."""

import dataclasses

import numpy as np
import pytest
import torch
from ranked import on_ranks
from runs import one_line, train

from conan_engine.config import Model
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards
from conan_engine.evaluation.encoder import Encoder
from conan_engine.model import initial, whitening
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh

VOCAB, WIDTH = 64, 24
SHAPE = Model(layers=2, width=WIDTH, ffn=32, heads=4, kv_heads=2, context=200, vocab_size=VOCAB + 4)
TOLERANCE = 1e-3  # of what float32 states and eigenvectors of a condition number of some thousands keep


def _model(group=None, **settings):
    """A model with norms of its own and states that a few directions dominate."""
    model = Transformer(dataclasses.replace(SHAPE, **settings), VOCAB, "float32", group).init_weights(3)
    chance = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(0.5 + torch.rand(len(weight), generator=chance))
            elif name.endswith("_out.weight"):
                weight.mul_(10)
        model.embedding[:, :3] += torch.tensor([0.2, -0.1, 0.05])
    return model.eval()


@pytest.fixture
def shards(tmp_path):
    chance = np.random.default_rng(7)
    found = []
    for name, records in (("a", 500), ("b", 30)):
        with ShardWriter(tmp_path / name, kind="pairs", tokenizer_hash="ab" * 32, vocab_size=VOCAB) as writer:
            for _ in range(records):
                lengths = (0, 1, *chance.integers(1, 150, 2))
                writer.add([chance.zipf(1.5, n).clip(0, VOCAB - 1).astype(np.uint16) for n in lengths])
        found.append(Shards(tmp_path / name))
    return found


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "embedding_scale": 3.0}, {"tied": False}])
def test_turned_axes_change_nothing_else(settings):
    model, chance = _model(**settings), torch.Generator().manual_seed(5)
    torch.nn.init.ones_(model.norm)
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=chance, dtype=torch.float64))[0]
    tokens = torch.randint(0, VOCAB, (50,), generator=chance).int()
    cu_seqlens = torch.tensor([0, 1, 1, 30, 50], dtype=torch.int32)
    with torch.no_grad():
        before = model(tokens, cu_seqlens, 0.3)
        whitening.turn(model, axes)
        after = model(tokens, cu_seqlens, 0.3)
    torch.testing.assert_close(after, (before.double() @ axes).float(), rtol=TOLERANCE, atol=TOLERANCE)
    assert all((block.ffn_norm == 1).all() and (block.attention_norm == 1).all() for block in model.blocks)


def test_the_moments_are_those_of_every_token_by_its_rarity(shards, monkeypatch):
    monkeypatch.setattr(whitening, "RECORDS", 1000)  # all of them
    model, weights = _model(), initial.rarity(shards, VOCAB).double()
    expected, count = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0.0
    for source in shards:
        for record in range(len(source)):
            for field in range(4):
                tokens = torch.from_numpy(source.gather(np.array([record]), field, whitening.TOKENS)[0])
                if len(tokens):
                    with torch.no_grad():
                        hidden = model(tokens, torch.tensor([0, len(tokens)]).int()).double()
                    of_tokens = weights[tokens.long()]
                    expected += (of_tokens[:, None] * hidden).T @ hidden
                    count += of_tokens.sum()
    found = whitening.moments(model, shards, VOCAB, Mesh("cpu").data)
    torch.testing.assert_close(found, expected / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_the_directions_are_evened_out_and_the_strongest_come_first(shards, exponent):
    model, mesh = _model(), Mesh("cpu")
    torch.nn.init.ones_(model.norm)
    before = torch.linalg.eigvalsh(whitening.moments(model, shards, VOCAB, mesh.data)).flip(0)
    assert before[0] > 30 * before[-1] > 30 * whitening.FLOOR, (
        "there is something to even out, and nothing at the floor"
    )
    whitening.start(model, shards, VOCAB, exponent, mesh)
    after = whitening.moments(model, shards, VOCAB, mesh.data)
    expected = before ** (1 - 2 * exponent)
    expected = (expected / expected.mean()).diag()
    torch.testing.assert_close(after, expected, rtol=TOLERANCE, atol=10 * TOLERANCE)


def test_a_direction_without_length_is_not_blown_up(shards):
    model, mesh = _model(layers=1), Mesh("cpu")
    with torch.no_grad():
        model.embedding[:, 5:] = 0
        for block in model.blocks:
            block.attention_out.weight[5:] = 0
            block.ffn_out.weight[5:] = 0
    whitening.start(model, shards, VOCAB, 0.5, mesh)
    assert model.norm.isfinite().all()
    assert model.norm.max() <= model.norm.min() * (WIDTH / whitening.FLOOR) ** 0.5


def _on_ranks(mesh, folders, path):
    model = _model(mesh.tensor)
    whitening.start(model, [Shards(folder) for folder in folders], VOCAB, 0.25, mesh)
    whole = _model()
    whole.load_state_dict(torch.load(path))
    for (name, found), expected in zip(model.named_parameters(), whole.parameters()):
        split = getattr(found, "split_by", None)
        expected = split.cut(expected.data, mesh.tensor) if split else expected.data
        # the sign of an axis is arbitrary, so sizes are compared
        torch.testing.assert_close(found.data.abs(), expected.abs(), rtol=0.05, atol=2e-3, msg=name)


@pytest.mark.parametrize(("world", "tensor"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_start_alike(shards, tmp_path, world, tensor):
    model = _model()
    whitening.start(model, shards, VOCAB, 0.25, Mesh("cpu"))
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    on_ranks(world, _on_ranks, [source.directory for source in shards], tmp_path / "whole.pt", tensor=tensor)


def test_a_run_starts_so_and_goes_on_so(whole, tiny, tmp_path):
    options = [f"--init_from={whole}", "--init_whiten=0.25", "--weak.steps=2", "--weak.lr=1e-9"]
    code, _, err = train(tiny, tmp_path / "run", "--stages=['weak']", *options)
    assert code == 0, err
    model = Encoder.load(tmp_path / "run").model
    assert (model.norm.diff() > -1e-6).all() and model.norm[-1] > 1.5 * model.norm[0], "the strongest axis is first"
    for block in model.blocks:
        torch.testing.assert_close(block.ffn_norm, torch.ones_like(block.ffn_norm))

    code, out, err = train(tiny, tmp_path / "run", "--stages=['weak']", *options, "--weak.steps=3")
    assert code == 0 and "resuming after step 2 of weak" in out, err
    again = Encoder.load(tmp_path / "run").model
    torch.testing.assert_close(again.embedding, model.embedding, msg="whitened twice")


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ([], "stages holds ['pretrain']"),
        (["--stages=['weak']", "--lora.rank=2"], "lora.rank is above 0"),
        (["--stages=['weak']", "--model.pooling=last"], "model.pooling is not 'mean'"),
    ],
)
def test_where_it_cannot_be(whole, tiny, tmp_path, options, because):
    result = train(tiny, tmp_path / "run", f"--init_from={whole}", "--init_whiten=0.25", *options)
    one_line(result, f"init_whiten is 0.25; expected 0, since {because}")

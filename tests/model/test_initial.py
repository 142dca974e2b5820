"""What a new token table knows: spelling and rarity."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranked import on_ranks

from conan_engine.config import Config, Model
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards
from conan_engine.model import initial
from conan_engine.model.transformer import Transformer
from conan_engine.run import checkpoint

WORDS = [
    "path",
    "paths",
    "Path",
    " path",
    "graph",
    "of",
    "des",
    "zyx",
    "\ufffd",
    "\ufffd",
    "",
    "  ",
    "график",
    "графика",
]
SIZE = len(WORDS) + 2  # which 4 ranks can share


class Words:
    """As a tokenizer, of which only this is asked."""

    vocab_size = len(WORDS)

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)


def _shards(folder, kind, texts):
    with ShardWriter(folder, kind=kind, tokenizer_hash="ab" * 32, vocab_size=SIZE) as writer:
        for fields in texts:
            writer.add(fields)
    return Shards(folder)


def _model(group=None, **settings):
    shape = {
        "layers": 1,
        "width": 96,
        "ffn": 16,
        "heads": 4,
        "kv_heads": 4,
        "context": 32,
        "vocab_size": SIZE,
        "embedding_scale": 50.0,
    }
    return Transformer(Model(**shape | settings), len(WORDS), "float32", group).init_weights(3)


def test_words_spelled_alike_are_alike_and_others_are_not():
    texts = initial.token_texts(Words())
    assert texts[:4] == ["path", "paths", "path", "path"] and texts[8:12] == [""] * 4
    vectors = initial.spelled(texts, 4096, seed=5)
    torch.testing.assert_close(vectors.square().mean(1), torch.ones(len(WORDS)))
    cosines = F.normalize(vectors) @ F.normalize(vectors).T
    chance = 6 / math.sqrt(4096)  # six standard deviations
    assert (cosines[[0, 0], [2, 3]] > 1 - 1e-5).all(), "case and space are not spelling"
    assert cosines[0, 1] > 0.2 and cosines[12, 13] > 0.2, "path and paths"
    rest = cosines[4:12].clone()
    rest[:, 4:12].fill_diagonal_(0)
    assert rest.abs().max() < chance, "the others, and each token that says nothing, are their own"
    again = initial.spelled(texts, 4096, seed=5)
    assert torch.equal(vectors, again) and not torch.allclose(vectors, initial.spelled(texts, 4096, seed=6))


def test_rarity_is_counted_by_text_where_it_is_most_frequent(tmp_path):
    # 5 texts: token 1 in 4, others in 1
    pairs = _shards(tmp_path / "a", "pairs", [([1, 1, 2], [1, 3], [1]), ([1], [4])])
    # 4 that are texts: token 2 in 3
    texts = _shards(tmp_path / "b", "text", [([2, 5],), ([2],), ([],), ([2],), ([6],)])
    found = initial.rarity([pairs, texts], SIZE)
    share = {1: 4 / 5, 2: 3 / 4, 3: 1 / 5, 4: 1 / 5, 5: 1 / 4, 6: 1 / 4}
    for token in range(SIZE):
        expected = max(initial.LEAST, math.log(share[token]) / math.log(initial.RAREST)) if token in share else 1.0
        assert found[token].item() == pytest.approx(expected, rel=1e-5)


def test_a_large_source_is_sampled_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(initial, "RECORDS", 10)
    monkeypatch.setattr(initial, "AT_ONCE", 3)
    texts = _shards(tmp_path / "a", "text", [([i % 2, 2 + i // 50],) for i in range(100)])
    found = initial.rarity([texts], SIZE)
    assert found[2] == found[3] == pytest.approx(math.log(0.5) / math.log(initial.RAREST))


def test_a_text_is_the_mean_of_its_words_each_as_heavy_as_it_is_rare(tmp_path):
    shards = _shards(tmp_path / "a", "text", [([0, 4],), ([0, 5],), ([0, 7],), ([0, 6, 12],)])
    model = _model()
    initial.start(model, Words(), [shards], Config())
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention_out.weight)
        torch.nn.init.zeros_(block.ffn_out.weight)
    words = F.normalize(model.embedding.detach()[:, :-1]).double()
    weights = initial.rarity([shards], SIZE).double()
    text = torch.tensor([0, 4, 4, 7, 12])
    expected = (words[text] * weights[text, None]).mean(0) * math.sqrt(96)
    found = model.embed(text.int(), torch.tensor([0, 5], dtype=torch.int32))[0].double()
    torch.testing.assert_close(found[:-1], expected, rtol=1e-4, atol=1e-5)
    assert found[-1] == 0 and weights[0] < 0.05 < weights[4]


@pytest.mark.parametrize(("vectors", "weights"), [("random", "equal"), ("random", "rarity"), ("spelling", "equal")])
def test_each_half_can_be_left_out(tmp_path, vectors, weights):
    shards = _shards(tmp_path / "a", "text", [([0, 4],), ([0, 5],)])
    plain, model = _model(), _model()
    initial.start(model, Words(), [shards], Config(token_vectors=vectors, token_weights=weights))
    same = torch.eq(model.embedding, plain.embedding)
    assert same[:, :-1].all() if vectors == "random" else not same[: len(WORDS), :-1].any()
    assert torch.equal(model.embedding[len(WORDS) :, :-1], plain.embedding[len(WORDS) :, :-1]), (
        "rows without a token stay"
    )
    assert model.norm[-1] == (weights == "equal")
    length = plain.embedding.square().mean().sqrt()
    assert 0.8 * length < model.embedding[: len(WORDS), :-1].square().mean().sqrt() < 1.2 * length


def test_a_run_starts_so(whole):
    model, *_ = checkpoint.load_model(whole)
    table = model.embedding.detach().abs().mean(0)
    assert table[-1] > 3 * table[:-1].max() and abs(model.norm[-1]) < 0.5 < abs(model.norm[:-1]).min()


def _part(mesh, folder, path):
    model = _model(mesh.tensor)
    initial.start(model, Words(), [Shards(folder)], Config())
    whole = model.embedding.split_by.join(mesh.tensor.gather(model.embedding.detach()[None]))
    if mesh.tensor.rank == 0:
        torch.save((whole, model.norm.detach()), path)


def test_ranks_that_share_a_model_start_as_one_does(tmp_path):
    folder = tmp_path / "a"
    model = _model()
    initial.start(model, Words(), [_shards(folder, "text", [([0, 4],), ([0, 5],)])], Config())
    on_ranks(4, _part, folder, str(tmp_path / "table.pt"), tensor=4)
    table, norm = torch.load(tmp_path / "table.pt")
    torch.testing.assert_close(table, model.embedding.detach())
    assert torch.equal(norm, model.norm)

"""What the language-modelling stages predict of a record."""

import pytest
import torch
from runs import shards_of

from conan_engine.config import Config, Sft, Source
from conan_engine.data import build
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.settings import load
from conan_engine.stages.language_modelling import LanguageModelling, chosen, hide
from conan_engine.stages.packed import Packed


@pytest.fixture
def instructions(tmp_path):
    """Records of (instruction, input, output); some parts are empty, as users' are."""
    records = [[[1, 2], [3, 4, 5], [6, 7]], [[], [8], [9, 10, 11]], [[12], [], [13]], [[], [], [14, 15]]]
    with ShardWriter(tmp_path / "shards", kind="instruction", tokenizer_hash="ab" * 32, vocab_size=100) as writer:
        for record in records:
            writer.add(record)
    return records, Shards(tmp_path / "shards", "ab" * 32)


def test_sft_learns_the_output_and_nothing_else(instructions):
    records, shards = instructions
    config = Config(sft=Sft(data={"a": Source()}, steps=3, batch=1, max_tokens=16))
    batch = LanguageModelling("sft", config, {"a": shards}, Mesh("cpu")).draw()
    wanted = {sum(map(tuple, record), ()): record for record in records}
    bounds = batch.cu_seqlens.tolist()
    assert len(bounds) == 5
    for start, end in zip(bounds, bounds[1:]):
        tokens = batch.tokens[start:end].tolist()
        instruction, text, output = wanted.pop(tuple(tokens))
        before = len(instruction) + len(text)
        # position p predicts token p + 1: all of the output, but its first token where nothing comes before it
        expected = [tokens[p + 1] if p + 1 >= before and p + 1 < len(tokens) else -100 for p in range(len(tokens))]
        assert batch.targets[start:end].tolist() == expected
    assert not wanted


def test_pretraining_predicts_every_token_but_a_sequences_first(tmp_path):
    with ShardWriter(tmp_path / "shards", kind="text", tokenizer_hash="ab" * 32, vocab_size=100) as writer:
        for record in ([5, 6, 7], [8], [9, 10]):
            writer.add([record])
    config = Config()
    config.pretrain.data, config.pretrain.batch, config.pretrain.max_tokens = {"a": Source()}, 1, 8
    batch = LanguageModelling("pretrain", config, {"a": Shards(tmp_path / "shards", "ab" * 32)}, Mesh("cpu")).draw()
    followers = {5: 6, 6: 7, 7: -100, 8: -100, 9: 10, 10: -100}
    assert [followers[token] for token in batch.tokens.tolist()] == batch.targets.tolist()


def test_a_hidden_token_is_to_be_found_from_the_one_before_it():
    sequences = Packed(
        torch.tensor([5, 6, 7, 8, 9, 10], dtype=torch.int32), torch.tensor([0, 0, 3, 3, 4, 6], dtype=torch.int32)
    )
    targets = torch.tensor([6, 7, 70, 80, 10, -100])  # 7 and 8 end pieces of texts that go on elsewhere
    hidden = torch.tensor([True, False, True, True, False, True])
    (tokens, cu_seqlens), left = hide(sequences, targets, hidden, 1)
    assert tokens.tolist() == [1, 6, 1, 1, 9, 1] and torch.equal(cu_seqlens, sequences.cu_seqlens)
    assert left.tolist() == [-100, 7, -100, -100, 10, -100]


def test_which_tokens_are_hidden_depends_on_the_step_and_on_no_rank():
    lengths = torch.randint(1, 80, (200,))
    sequences = Packed(
        torch.randint(50_000, (int(lengths.sum()),), dtype=torch.int32),
        torch.cat((torch.zeros(1), lengths.cumsum(0))).int(),
    )
    hidden = chosen(sequences, 0.2, 7)
    n = len(hidden)
    assert abs(hidden.float().mean() - 0.2) < 5 * (0.2 * 0.8 / n) ** 0.5
    assert torch.equal(torch.cat([chosen(part, 0.2, 7) for part in sequences.split(33)]), hidden)
    both = (hidden & chosen(sequences, 0.2, 8)).float().mean()
    assert abs(both - 0.04) < 5 * (0.04 * 0.96 / n) ** 0.5


def test_a_masked_pretraining_learns(tiny, untrained_run):
    config = load(tiny, [f"--out_dir={untrained_run}", "--pretrain.masked=0.2"])
    tokenizer = build.make_tokenizer(config.tokenizer, [], untrained_run)
    (source,) = config.pretrain.data
    shards = {source: shards_of(source, "pretrain", config.pretrain, tokenizer, untrained_run / "data")}
    stage = LanguageModelling("pretrain", config, shards, Mesh("cpu"))
    model = Transformer(config.model, tokenizer.vocab_size).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found, chunked = [], []
    for step in range(30):
        batch = stage.draw()
        found.append(stage.backward(model, batch, step)["loss"])
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        stage.settings.chunk, stage.settings.chunk_tokens = (3, 0) if step % 2 else (0, 100)
        chunked.append(stage.backward(model, batch, step)["loss"])
        stage.settings.chunk = stage.settings.chunk_tokens = 0
        if step < 2:
            assert all(torch.allclose(p.grad, old, atol=1e-6) for p, old in zip(model.parameters(), before))
        optimizer.step()
        optimizer.zero_grad()
    stage.close()
    assert found == pytest.approx(chunked, rel=1e-5)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])

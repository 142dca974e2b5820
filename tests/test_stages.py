"""What each stage takes from a record, and how far the soft mask is open when."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranked import on_ranks
from runs import one_line, shards_of, small_tokenizer, train, untimed, write_lines

from conan_engine import stages
from conan_engine.config import Config, Model, Sft, Source, Stage
from conan_engine.data import build
from conan_engine.data.shards import Shards, ShardWriter
from conan_engine.model import losses
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.settings import load
from conan_engine.stages import Packed, embed_and_backward


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [("linear", 0.25, 0.5), ("accelerating", 0.0625, 0.25), ("decelerating", 0.4375, 0.75)],
)
def test_soft_mask_schedules(schedule, quarter, half):
    alpha = stages.ALPHA[schedule]
    assert (alpha(0.0), alpha(0.25), alpha(0.5), alpha(1.0)) == (0.0, quarter, half, 1.0)


@pytest.mark.parametrize(("schedule", "alpha"), [("open", 1.0), ("closed", 0.0)])
def test_a_mask_that_does_not_open(schedule, alpha):
    assert [stages.ALPHA[schedule](progress) for progress in (0.0, 0.3, 1.0)] == [alpha] * 3


def weak_stage(tiny, run, *overrides):
    """The stage, its config, and a model for it."""
    config = load(tiny, [f"--out_dir={run}", *overrides])
    tokenizer = build.make_tokenizer(config.tokenizer, [], run)
    shards = {source: shards_of(source, "weak", config.weak, tokenizer, run / "data") for source in config.weak.data}
    return (
        stages.Weak(config, shards, {}, Mesh("cpu")),
        config,
        Transformer(config.model, tokenizer.vocab_size).init_weights(0),
    )


def test_a_token_budget_sets_how_many_pairs_a_step_has(tiny, untrained_run):
    stage, _, model = weak_stage(tiny, untrained_run, "--weak.batch_tokens=500")
    batches = [stage.draw() for _ in range(6)]
    assert all(500 - 2 * 32 < len(batch.tokens) <= 500 for batch, _ in batches)  # a pair has at most 2 x 32
    assert len({len(batch.records) for batch, _ in batches}) > 1
    assert stage.backward(model, batches[0], 0)["tokens"] == len(batches[0][0].tokens)
    stage.close()


def test_the_weak_stage_starts_causal_and_ends_bidirectional(tiny, untrained_run):
    stage, config, model = weak_stage(tiny, untrained_run, "--weak.steps=5")
    rows = [stage.backward(model, stage.draw(), step) for step in range(5)]
    assert [row["alpha"] for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {row["source"] for row in rows} == set(config.weak.data)


def test_the_weak_loss_is_the_mean_over_its_dims(tiny, untrained_run):
    stage, config, model = weak_stage(tiny, untrained_run, "--weak.dims=[8, 32]")
    batch, found = stage.draw(), {}
    for dims in ([], [8], [32], config.weak.dims):
        stage.settings.dims = dims
        found[tuple(dims)] = stage.backward(model, batch, 3)["loss"]
    assert found[8, 32] == pytest.approx((found[8,] + found[32,]) / 2, rel=1e-4) and found[8,] != pytest.approx(
        found[32,], rel=1e-3
    )
    assert found[32,] == pytest.approx(found[()], rel=1e-4)
    stage.close()


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
    batch = stages.LanguageModelling("sft", config, {"a": shards}, Mesh("cpu")).draw()
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
    batch = stages.LanguageModelling(
        "pretrain", config, {"a": Shards(tmp_path / "shards", "ab" * 32)}, Mesh("cpu")
    ).draw()
    followers = {5: 6, 6: 7, 7: -100, 8: -100, 9: 10, 10: -100}
    assert [followers[token] for token in batch.tokens.tolist()] == batch.targets.tolist()


def test_a_hidden_token_is_to_be_found_from_the_one_before_it():
    sequences = stages.Packed(
        torch.tensor([5, 6, 7, 8, 9, 10], dtype=torch.int32), torch.tensor([0, 0, 3, 3, 4, 6], dtype=torch.int32)
    )
    targets = torch.tensor([6, 7, 70, 80, 10, -100])  # 7 and 8 end pieces of texts that go on elsewhere
    hidden = torch.tensor([True, False, True, True, False, True])
    (tokens, cu_seqlens), left = stages.hide(sequences, targets, hidden, 1)
    assert tokens.tolist() == [1, 6, 1, 1, 9, 1] and torch.equal(cu_seqlens, sequences.cu_seqlens)
    assert left.tolist() == [-100, 7, -100, -100, 10, -100]


def test_which_tokens_are_hidden_depends_on_the_step_and_on_no_rank():
    lengths = torch.randint(1, 80, (200,))
    sequences = stages.Packed(
        torch.randint(50_000, (int(lengths.sum()),), dtype=torch.int32),
        torch.cat((torch.zeros(1), lengths.cumsum(0))).int(),
    )
    hidden = stages.chosen(sequences, 0.2, 7)
    n = len(hidden)
    assert abs(hidden.float().mean() - 0.2) < 5 * (0.2 * 0.8 / n) ** 0.5
    assert torch.equal(torch.cat([stages.chosen(part, 0.2, 7) for part in sequences.split(33)]), hidden)
    both = (hidden & stages.chosen(sequences, 0.2, 8)).float().mean()
    assert abs(both - 0.04) < 5 * (0.04 * 0.96 / n) ** 0.5


def test_a_masked_pretraining_learns(tiny, untrained_run):
    config = load(tiny, [f"--out_dir={untrained_run}", "--pretrain.masked=0.2"])
    tokenizer = build.make_tokenizer(config.tokenizer, [], untrained_run)
    (source,) = config.pretrain.data
    shards = {source: shards_of(source, "pretrain", config.pretrain, tokenizer, untrained_run / "data")}
    stage = stages.LanguageModelling("pretrain", config, shards, Mesh("cpu"))
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


LENGTHS = [3, 0, 1, 4, 2]


@pytest.mark.parametrize(("rows", "units"), [(None, 5), ([0, 2, 3, 5], 3)])
@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 5, 9])
def test_splitting_keeps_every_sequence_and_every_row_whole(chunk, rows, units):
    cu_seqlens = torch.tensor(np.concatenate(([0], np.cumsum(LENGTHS))), dtype=torch.int32)
    whole = stages.Packed(torch.arange(10), cu_seqlens)
    parts = whole.split(chunk, rows and torch.tensor(rows, dtype=torch.int32))
    assert torch.cat([part.tokens for part in parts]).tolist() == list(range(10))
    assert torch.cat([part.cu_seqlens.diff() for part in parts]).tolist() == LENGTHS
    assert all(part.cu_seqlens[0] == 0 for part in parts)
    firsts = np.cumsum([0, *(len(part.cu_seqlens) - 1 for part in parts)]).tolist()
    assert firsts == (rows or list(range(6)))[:: chunk or units] + ([5] if units % (chunk or units) else [])


def _packed(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Packed(torch.randint(2**31 - 1, (sum(lengths),), dtype=torch.int32), cu_seqlens)


def _texts(part):
    return [part.tokens[start:end].tolist() for start, end in zip(part.cu_seqlens, part.cu_seqlens[1:])]


@pytest.mark.parametrize("lengths", [[], [0], [9], [0, 0, 0], LENGTHS, [7] * 9, [30, 1], "random"])
@pytest.mark.parametrize("most", [1, 4, 7, 20, 10**6])
def test_a_budget_of_tokens_keeps_every_text_and_puts_neighbours_in_length_together(lengths, most):
    lengths = torch.randint(60, (50,)).tolist() if lengths == "random" else lengths
    whole = _packed(lengths)
    parts, order = whole.split_by_tokens(most)
    found, texts = [_texts(part) for part in parts], _texts(whole)
    assert all(part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == len(part.tokens) for part in parts)
    flat = [text for part in found for text in part]
    assert flat == (texts if order is None else [texts[i] for i in order])
    assert all(len(part.tokens) <= most or len(texts) == 1 for part, texts in zip(parts, found))
    if order is None:
        assert len(parts) == 1
        return
    assert [len(text) for text in flat] == sorted(lengths, reverse=True)
    for earlier, part in zip(found, parts[1:]):  # the shortest text before it had no room in it
        assert len(part.tokens) + len(earlier[-1]) > most


@pytest.mark.parametrize("rows", [None, [0, 2, 3, 5]])
@pytest.mark.parametrize("settings", [{}, {"chunk": 2}, {"chunk_tokens": 4}], ids=str)
def test_on_a_cpu_each_piece_is_sorted_by_length(settings, rows):
    whole = _packed(LENGTHS)
    parts, order = whole.cut(Stage(**settings), rows and torch.tensor(rows, dtype=torch.int32))
    found, texts = [_texts(part) for part in parts], _texts(whole)
    assert [text for part in found for text in part] == [texts[i] for i in order]
    for lengths in ([*map(len, part)] for part in found):
        assert lengths in (sorted(lengths), sorted(lengths, reverse=True))


def test_parts_stand_one_after_another():
    first, second = (
        stages.Packed(torch.arange(sum(n)), torch.tensor([0, *np.cumsum(n)], dtype=torch.int32))
        for n in ([2, 0, 3], [1, 4])
    )
    whole = stages.concatenate(first, second, first)
    empty = stages.Packed(first.tokens[:0], first.cu_seqlens[:1])
    assert [x.tolist() for x in stages.concatenate(empty, first, empty)] == [x.tolist() for x in first]
    assert whole.tokens.tolist() == [0, 1, 2, 3, 4] * 3 and whole.cu_seqlens.diff().tolist() == [2, 0, 3, 1, 4, 2, 0, 3]


def textbook(queries, documents, right, temperature):
    """Mean cross entropy in fp64 of each query over its own positive, documents[i], and those that are not right for
    it."""
    cosine = torch.nn.functional.cosine_similarity(queries[:, None].double(), documents[None].double(), dim=-1)
    own = torch.eye(*cosine.shape, dtype=torch.bool)
    logits = (cosine / temperature).masked_fill(right & ~own, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(queries)))


SEVERAL = [
    {
        "query": f"question {i % 4}",
        "pos": [f"answer {i}", f"answer {(i + 5) % 12}"],
        "neg": [f"answer {(i + 2) % 12}", f"wrong {i}"],
    }
    for i in range(12)
]


@pytest.fixture
def several(tiny, tmp_path):
    """A config whose pairs have queries of several positives, which other records give as negatives; and who is right
    by text."""
    path = write_lines(tmp_path / "several.jsonl", SEVERAL)
    right = {}
    for record in SEVERAL:
        right.setdefault(record["query"], set()).update(record["pos"])

    def make(name, *overrides):
        source = f'{{ "{path}" = 1 }}'
        tiny_like = (f"--{name}.{key}" for key in (f"data={source}", "max_tokens=16", "steps=3", "batch=16"))
        config = load(
            tiny, [f"--out_dir={tmp_path}", "--negatives.pool=4", "--negatives.count=2", *tiny_like, *overrides]
        )
        getattr(config, name).data = {str(path): Source()}
        tokenizer = small_tokenizer(tmp_path)
        model = Transformer(config.model, tokenizer.vocab_size).init_weights(0)
        shards = {str(path): shards_of(path, name, getattr(config, name), tokenizer, tmp_path / "data")}
        return config, tokenizer, model, shards

    def mask(queries, documents):
        return torch.tensor([[document in right[query] for document in documents] for query in queries])

    return make, mask


def texts_of(tokenizer, packed):
    bounds = packed.cu_seqlens.tolist()
    return [tokenizer.decode(packed.tokens[a:b].tolist()) for a, b in zip(bounds, bounds[1:])]


def test_a_weak_step_of_queries_with_several_positives_is_the_textbooks(several):
    make, mask = several
    config, tokenizer, model, shards = make("weak")
    stage = stages.Weak(config, shards, {}, Mesh("cpu"))
    batch = stage.draw()
    row = stage.backward(model, batch, 2)
    batch, _ = batch
    texts = texts_of(tokenizer, batch)
    embeddings = model.embed(batch.tokens, batch.cu_seqlens, 1.0, config.weak.mask)
    expected = textbook(*embeddings.chunk(2), mask(texts[:16], texts[16:]), config.weak.temperature)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    plain = textbook(*embeddings.chunk(2), mask(texts[:16], texts[16:]) & False, config.weak.temperature)
    assert plain > expected + 0.1, "counting them as negatives is another loss"
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    stage.close()


@pytest.mark.parametrize(("in_batch", "count"), [(False, 3), (False, 1), (True, 0), (True, 3)])
def test_a_source_has_as_many_negatives_as_it_asks_for(several, in_batch, count):
    make, mask = several
    config, tokenizer, model, shards = make("supervised", "--supervised.dims=[32]")
    config.supervised.sts = {}
    (name,) = shards
    config.supervised.data = {name: Source(in_batch_negatives=in_batch, hard_negatives=count)}
    stage = stages.Supervised(config, shards, {}, Mesh("cpu"))
    stage.mine(model, Mesh("cpu"))
    batch, _ = stage.draw()
    hard = np.empty((2, 0), np.int64) if count == 0 else stage.pools[name].draw(batch.records)[:2]
    hard = stages.Packed(*map(torch.from_numpy, shards[name].gather(*hard, 16)))
    assert len(hard.cu_seqlens) - 1 == 16 * count
    everything = stages.concatenate(stages.packed(batch), hard)
    embeddings = model.embed(everything.tokens, everything.cu_seqlens, 1.0, "column")
    texts = texts_of(tokenizer, everything)
    right = mask(texts[:16], texts[16:])
    if not in_batch:  # all but one's own
        own = torch.cat(
            (torch.eye(16, dtype=torch.bool), torch.eye(16, dtype=torch.bool).repeat_interleave(count, 1)), dim=1
        )
        assert not (right[:, 16:] & own[:, 16:]).any()
        right = ~own
    expected = textbook(embeddings[:16], embeddings[16:], right, config.supervised.temperature)
    row = stage.backward(model, (batch, None), 0)
    assert row["info_nce"] == pytest.approx(expected.item(), rel=1e-4)
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    stage.close()
    again = stages.Supervised(config, shards, {}, Mesh("cpu"))
    again.load_state(stage.state())
    assert again.pools.keys() == stage.pools.keys() == ({name} if count else set())


def test_retrieval_and_sts_together_or_by_turns(several, tiny):
    make, _ = several
    config, tokenizer, model, shards = make(
        "supervised", "--supervised.dims=[32]", "--negatives.low=-1", "--negatives.bound=-1"
    )
    (source,) = config.supervised.sts
    sts = {source: shards_of(source, "sts", config.supervised, tokenizer, Path(config.out_dir, "data"))}
    stage = stages.Supervised(config, shards, sts, Mesh("cpu"))
    stage.mine(model, Mesh("cpu"))
    batch = stage.draw()

    def step(balance, number):
        config.supervised.balance = balance
        model.zero_grad()
        row = stage.backward(model, batch, number)
        return row, torch.cat([p.grad.flatten() for p in model.parameters()])

    (whole, of_whole) = step("together", 1)
    (retrieval, of_retrieval) = step("alternating", 0)
    (similarity, of_similarity) = step("alternating", 1)
    assert retrieval["info_nce"] == pytest.approx(whole["info_nce"], rel=1e-4) and retrieval["cosent"] == 0
    assert similarity["cosent"] == pytest.approx(whole["cosent"], rel=1e-4) and similarity["info_nce"] == 0
    assert whole["loss"] == pytest.approx(retrieval["loss"] + similarity["loss"], rel=1e-4)
    torch.testing.assert_close(of_whole, of_retrieval + of_similarity, rtol=1e-3, atol=1e-5)
    assert similarity["tokens"] + retrieval["tokens"] == whole["tokens"]
    stage.close()


def test_a_supervised_step_never_takes_what_is_right_for_a_negative(several):
    make, mask = several
    config, tokenizer, model, shards = make("supervised", "--supervised.dims=[32]")
    config.supervised.sts = {}
    stage = stages.Supervised(config, shards, {}, Mesh("cpu"))
    stage.mine(model, Mesh("cpu"))
    ((name, pools),) = stage.pools.items()
    batch, _ = stage.draw()
    record, field, _ = pools.draw(batch.records)
    hard = stages.Packed(*map(torch.from_numpy, shards[name].gather(record, field, 16)))
    queries, positives, negatives = (texts_of(tokenizer, x) for x in (*stages.packed(batch).split(16), hard))
    assert (
        not mask(queries, negatives)[torch.arange(16), torch.arange(0, 32, 2)].any() and mask(queries, negatives).any()
    )
    row = stage.backward(model, (batch, None), 0)
    everything = stages.concatenate(stages.packed(batch), hard)
    embeddings = model.embed(everything.tokens, everything.cu_seqlens, 1.0, "column")
    expected = textbook(
        embeddings[:16], embeddings[16:], mask(queries, positives + negatives), config.supervised.temperature
    )
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    stage.close()


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


CLASSES = [
    {"text": f"a review of kind {i % 3}, number {i}", "label": ("good", "bad", "other")[i % 3]} for i in range(60)
]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (3, "3 different answers, so 2 hard negatives per query instead of 7"),
        (2, "2 different answers, so 1 hard negative per query"),
        (1, "1 different answers, so no hard negatives"),
    ],
)
def test_a_source_of_few_classes_has_what_negatives_it_has(tiny, tmp_path, classes, said):
    few = write_lines(
        tmp_path / "few.jsonl", [row for row in CLASSES if row["label"] in ("good", "bad", "other")[:classes]]
    )
    code, out, err = train(
        tiny,
        tmp_path / "run",
        "--stages=['supervised']",
        f"--supervised.data.{few}=1",
        "--supervised.steps=6",
        "--supervised.sts={}",
    )
    assert code == 0 and said in out + err, err
    rows = [row for row in untimed(tmp_path / "run") if row["source"] == str(few)]
    assert rows and all(np.isfinite(row["loss"]) for row in rows) and (classes == 1 or rows[0]["loss"] > 0)


def test_a_source_of_one_class_and_nothing_in_the_batch_is_refused(tiny, tmp_path):
    few = write_lines(tmp_path / "few.jsonl", [row for row in CLASSES if row["label"] == "good"])
    table = "{ weight = 1, in_batch_negatives = false }"
    one_line(
        train(tiny, tmp_path / "run", "--stages=['supervised']", f"--supervised.data.{few}={table}"),
        "all its queries have the same answer, and in_batch_negatives is false",
    )

"""The stream of batches: every record once an epoch, the same whoever asks, and an error that names what is wrong."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conan_engine import _loader
from conan_engine.data.loader import Loader
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards
from conan_engine.errors import UserError

property_test = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


def write(folder, kind, records, shard_bytes=2**20, vocab=2**24):
    """records: lists of fields; record i has score i / 4 and group i % 7."""
    with ShardWriter(folder, kind=kind, tokenizer_hash="ab" * 32, vocab_size=vocab, shard_bytes=shard_bytes) as writer:
        for i, fields in enumerate(records):
            writer.add(fields, i / 4, i % 7)
    return Shards(folder)


def loader(shards, batch, shape="records", **options):
    shards = shards if isinstance(shards, dict) else {"a": shards}
    weights = options.pop("weights", dict.fromkeys(shards, 1.0))
    kind = next(iter(shards.values())).kind
    return Loader(
        shards,
        weights,
        **{"kind": kind, "shape": shape, "batch": batch, "seed": 3, "group": Ranks(), "threads": 2, **options},
    )


def draw(stream, steps):
    batches = [stream.next() for _ in range(steps)]
    stream.close()
    return batches


def numbered(lengths):
    """Records of one field whose tokens are all different: (record, place) can be told from a token."""
    return [[[1000 * i + place for place in range(length)]] for i, length in enumerate(lengths)]


def same(first, second):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b)
        for a, b in zip(first, second)
        if a is not None
    )


worlds = st.sampled_from([1, 2, 3])
pair_lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40)


def pairs_of(lengths):
    return [[[100 * i + j for j in range(a)], [100 * i + 50 + j for j in range(b)]] for i, (a, b) in enumerate(lengths)]


@property_test
@given(
    lengths=pair_lengths,
    world=worlds,
    threads=st.integers(1, 4),
    shard_bytes=st.sampled_from([1, 400, 2**20]),
    per_rank=st.integers(1, 5),
    seed=st.integers(-5, 2**31),
)
def test_an_epoch_holds_every_pair_once_for_any_ranks_threads_and_shards(
    tmp_path_factory, lengths, world, threads, shard_bytes, per_rank, seed
):
    records = pairs_of(lengths)
    shards = write(tmp_path_factory.mktemp("shards"), "pairs", records, shard_bytes)
    batch = per_rank * world
    steps = -(-2 * len(records) // batch)
    ranks = [
        draw(loader(shards, batch, seed=seed, threads=threads, group=Ranks(rank, world)), steps)
        for rank in range(world)
    ]
    drawn = np.concatenate([ranks[rank][step].records for step in range(steps) for rank in range(world)])
    for epoch in range(2):
        assert sorted(drawn[epoch * len(records) :][: len(records)].tolist()) == list(range(len(records)))
    for found in itertools.chain(*ranks):
        n = len(found.records)
        sequences = [found.tokens[a:b].tolist() for a, b in zip(found.cu_seqlens, found.cu_seqlens[1:])]
        # all queries, then all positives
        assert sequences == [records[r][field] for field in range(2) for r in found.records]
        assert found.positions.tolist() == [i for sequence in sequences for i in range(len(sequence))]
        assert found.scores.tolist() == [r / 4 for r in found.records] and found.groups.tolist() == [
            r % 7 for r in found.records
        ]
        assert found.targets is found.mask is found.rows is None and n == per_rank


@property_test
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    room=st.integers(1, 30),
    world=worlds,
    threads=st.integers(1, 4),
    shard_bytes=st.sampled_from([1, 400, 2**20]),
)
def test_rows_hold_every_token_of_every_text_once_an_epoch(
    tmp_path_factory, lengths, room, world, threads, shard_bytes
):
    shards = write(tmp_path_factory.mktemp("shards"), "text", numbered(lengths), shard_bytes)
    seen = Counter()
    streams = [
        loader(shards, world, "rows", max_tokens=room, threads=threads, group=Ranks(rank, world))
        for rank in range(world)
    ]
    while sum(seen.values()) < sum(lengths):
        for stream in streams:  # one row each
            batch = stream.next()
            assert len(batch.tokens) <= room and batch.rows.tolist() == [0, len(batch.cu_seqlens) - 1]
            if sum(seen.values()) < sum(lengths):  # the last step may go on into the next epoch
                seen.update(batch.tokens.tolist())
                for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
                    tokens, targets = batch.tokens[start:end].tolist(), batch.targets[start:end].tolist()
                    ends = tokens[-1] % 1000 == lengths[tokens[-1] // 1000] - 1
                    assert tokens == list(range(tokens[0], tokens[-1] + 1)) and targets == [
                        *(t + 1 for t in tokens[:-1]),
                        -100 if ends else tokens[-1] + 1,
                    ]
                    assert batch.positions[start:end].tolist() == list(range(len(tokens)))
                assert torch.equal(batch.mask, batch.targets != -100)
    for stream in streams:
        stream.close()
    assert seen == Counter(token for (field,) in numbered(lengths) for token in field)


def test_best_fit_leaves_rows_nearly_full(tmp_path):
    lengths = np.random.default_rng().integers(1, 300, 3000).tolist()
    batches = draw(
        loader(write(tmp_path, "text", numbered(lengths)), 16, "rows", max_tokens=512), sum(lengths) // (16 * 512)
    )
    assert sum(len(batch.tokens) for batch in batches) > 0.98 * 16 * 512 * len(batches)


def three_sources(tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(1)
    lengths = {"a": rng.integers(1, 9, 50), "b": rng.integers(1, 30, 7), "c": rng.integers(1, 9, 1)}
    records = {
        name: numbered(n) if kind == "text" else [[field[0], field[0]] for field in numbered(n)]
        for name, n in lengths.items()
    }
    return {name: write(folder / name, kind, records[name]) for name in records}


@pytest.mark.parametrize(
    ("kind", "shape", "batch"), [("text", "rows", 6), ("pairs", "records", 6), ("pairs", "tokens", 200)]
)
@property_test
@given(stop=st.integers(0, 12), more=st.integers(1, 8), world=worlds, threads=st.integers(1, 3))
def test_stopped_anywhere_it_goes_on_as_if_never_stopped_on_any_number_of_ranks(
    tmp_path_factory, kind, shape, batch, stop, more, world, threads
):
    shards = three_sources(tmp_path_factory, kind)
    options = {"weights": {"a": 3.0, "b": 1.5, "c": 0.3}, "max_tokens": 12}
    whole = draw(loader(shards, batch, shape, **options), stop + more)
    first = loader(shards, batch, shape, threads=threads, **options)
    before = draw(first, stop)
    assert all(map(same, before, whole))
    assert first.state is None or first.state.nbytes <= 8 * (1 + 2 * len(shards))
    if shape == "tokens" and world > 1:
        return  # how many pairs fit depends on what the ranks can share evenly
    parts = []
    for rank in range(world):
        stream = loader(shards, batch, shape, group=Ranks(rank, world), threads=threads, **options)
        stream.state = first.state
        parts.append(draw(stream, more))
    for step, batches in enumerate(zip(*parts)):
        assert {found.source for found in batches} == {whole[stop + step].source}
        assert np.concatenate([found.records for found in batches]).tolist() == whole[stop + step].records.tolist()
        if kind == "text":
            assert torch.cat([found.targets for found in batches]).tolist() == whole[stop + step].targets.tolist()


@property_test
@given(lengths=pair_lengths, budget=st.integers(60, 300), world=worlds)
def test_a_token_budget_is_kept_and_no_pair_is_lost(tmp_path_factory, lengths, budget, world):
    shards = write(tmp_path_factory.mktemp("shards"), "pairs", pairs_of(lengths))
    streams = [loader(shards, budget, "tokens", max_tokens=8, group=Ranks(rank, world)) for rank in range(world)]
    drawn = []
    while len(drawn) < len(lengths):
        batches = [stream.next() for stream in streams]
        assert (
            len({len(batch.records) for batch in batches}) == 1
            and sum(len(batch.tokens) for batch in batches) <= budget
        )
        assert all(int(batch.cu_seqlens.diff().max()) <= 8 for batch in batches)
        drawn += np.concatenate([batch.records for batch in batches]).tolist()
    for stream in streams:
        stream.close()
    assert sorted(drawn[: len(lengths)]) == list(range(len(lengths)))


@given(weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=5))
@property_test
def test_steps_are_shared_out_by_weight_and_size(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("shards")
    sizes = [1, 4, 9, 16, 25]
    shards = {str(i): write(folder / str(i), "pairs", pairs_of([(1, 1)] * sizes[i])) for i in range(len(weights))}
    named = {str(i): weight for i, weight in enumerate(weights)}
    for size_power in (0.0, 0.5, 1.0):
        wanted = np.array([weight * n**size_power for weight, n in zip(weights, sizes)])
        sources = [batch.source for batch in draw(loader(shards, 1, weights=named, size_power=size_power), 400)]
        drawn = np.array([sources.count(name) for name in named])
        # within one percent, and never further off than this
        assert np.abs(drawn - 400 * wanted / wanted.sum()).max() < len(weights)


def test_long_run_shares_are_exact():
    weights = {"a": 0.61803, "b": 3.14159, "c": 0.001}
    shares = np.array(_loader.Mixture(list(weights.values())).drawn(10**6)) / 10**6
    np.testing.assert_allclose(shares, np.array(list(weights.values())) / sum(weights.values()), atol=2e-6)


@property_test
@given(count=st.integers(1, 80), steps=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_what_all_steps_draw_is_told_beforehand(tmp_path_factory, count, steps, seed):
    folder = tmp_path_factory.mktemp("shards")
    shards = {
        "a": write(folder / "a", "pairs", pairs_of([(1, 1)] * count)),
        "b": write(folder / "b", "pairs", pairs_of([(1, 1)] * 30)),
    }
    stream = loader(shards, 5, weights={"a": 2.0, "b": 1.0}, seed=seed)
    batches = draw(stream, steps)
    for name in shards:
        seen = [batch.records for batch in batches if batch.source == name]
        assert stream.drawn_from(name, steps).tolist() == sorted(
            set(np.concatenate(seen or [np.array([], int)]).tolist())
        )


def test_instructions_are_learnt_from_their_output_on(tmp_path):
    records = [[[1], [2, 3], [4, 5]], [[], [6], [7]], [[], [], [8, 9]]]
    batch = draw(loader(write(tmp_path, "instruction", records), 1, "rows", max_tokens=10), 1)[0]
    wanted = {1: [-100, -100, 4, 5, -100], 6: [7, -100], 8: [9, -100]}
    fields = {1: [0, 1, 3], 6: [0, 0, 1], 8: [0, 0, 0]}
    for i, (start, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:])):
        first = int(batch.tokens[start])
        assert batch.targets[start:end].tolist() == wanted.pop(first)
        assert (batch.fields[3 * i : 3 * i + 3] - start).tolist() == fields[first]
    assert not wanted


def test_of_a_conversation_every_answer_is_learnt_and_nothing_else(tmp_path):
    records = [
        [[1], [2, 3], [4, 5], [6, 7], [8], [], [9, 10]],  # two answers follow each other
        [[], [], [11, 12], [13], [14]],
    ]
    batch = draw(loader(write(tmp_path, "instruction", records), 1, "rows", max_tokens=20), 1)[0]
    wanted = {1: [-100, -100, 4, 5, -100, -100, 8, 9, 10, -100], 11: [12, -100, 14, -100]}
    fields = {1: [0, 1, 3, 5, 7, 8, 8], 11: [0, 0, 0, 2, 3]}
    starts = batch.cu_seqlens.tolist()
    assert batch.mask.tolist() == [target != -100 for target in batch.targets.tolist()]
    at = 0
    for start, end in zip(starts, starts[1:]):
        first = int(batch.tokens[start])
        assert batch.targets[start:end].tolist() == wanted.pop(first)
        assert (batch.fields[at : at + len(fields[first])] - start).tolist() == fields[first]
        at += len(fields[first])
    assert not wanted and batch.fields[at] == starts[-1]


# ---- faults


def flip(shards, token_byte, bit=4):
    """Spoils a byte of the first shard's tokens."""
    path = next(iter(sorted(shards.directory.glob("shard-*"))))
    data = bytearray(path.read_bytes())
    data[96 + token_byte] ^= 1 << bit
    path.write_bytes(data)
    return path


def test_a_damaged_block_names_shard_and_record_and_later_steps_say_it_again(tmp_path):
    long = numbered([9000, 9000, 9000])  # 3 bytes a token: a block holds 5,461
    shards = write(tmp_path, "text", long)
    path = flip(shards, 3 * 9000 + 3 * 6000)
    stream = loader(Shards(tmp_path), 3, "rows", max_tokens=9000)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{path.name}: record 1: the checksum of token block \d+ is wrong"):
            stream.next()
    stream.close()


@pytest.mark.parametrize(
    ("kind", "records", "options", "said"),
    [
        ("text", [[[1]], [[]]], {"shape": "rows"}, "record 1: has no tokens"),
        ("text", [[[1]], [[1], [2]]], {"shape": "rows"}, "record 1: has 2 fields, expected 1"),
        ("instruction", [[[], [], [1]], [[], [2], []]], {"shape": "rows"}, "record 1: field 2 has no tokens"),
        (
            "instruction",
            [[[], [], [1]], [[2], [2], [2], [2]]],
            {"shape": "rows"},
            "record 1: has 4 fields, expected 3, 5, 7",
        ),
        (
            "instruction",
            [[[], [], [1]], [[2], [2], [2], [2], []]],
            {"shape": "rows"},
            "record 1: field 4 has no tokens",
        ),
        (
            "instruction",
            [[[], [], [1]], [[2] * 9, [2], [2]]],
            {"shape": "rows"},
            "record 1: has 11 tokens, more than max_tokens = 8",
        ),
        ("pairs", [[[1], [1]], [[2]]], {}, "record 1: has 1 fields, expected 2"),
        ("pairs", [[[1], [1]], [[2], []]], {}, "record 1: field 1 has no tokens"),
    ],
)
def test_a_record_that_does_not_fit_is_named_or_left_out_and_counted(tmp_path, capfd, kind, records, options, said):
    shards = write(tmp_path, kind, records)
    stream = loader(shards, 2, max_tokens=8, **options)
    with pytest.raises(UserError, match=f"shard-00000.tokens: {said}"):
        draw(stream, 4)
    stream.close()
    stream = loader(shards, 2, max_tokens=8, skip_bad_records=True, **options)
    batch = draw(stream, 1)[0]
    said_so = [
        line
        for line in capfd.readouterr().err.splitlines()
        if f"left out: {shards.directory / 'shard-00000.tokens'}: {said}" in line
    ]
    assert len(said_so) == stream.skipped >= 1
    assert set(batch.tokens.tolist()) == {1}
    assert "shape" in options or len(batch.records) == 2  # pairs: another of the batch takes its place


def test_a_pair_larger_than_the_budget_is_named(tmp_path):
    stream = loader(write(tmp_path, "pairs", pairs_of([(9, 9)])), 10, "tokens")
    with pytest.raises(UserError, match=r"record 0: with it 1 records have 18 tokens, and the batch holds 10"):
        stream.next()
    stream.close()


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda path: path.unlink(), "was removed while in use"),
        (lambda path: path.write_bytes(path.read_bytes()), "was rewritten while in use"),
        (lambda path: os.truncate(path, 200), "while in use"),
    ],
)
def test_a_shard_taken_away_while_in_use_is_named(tmp_path, do, said):
    stream = loader(write(tmp_path, "text", numbered([50] * 2000)), 1, "rows", max_tokens=64)
    stream.next()
    time.sleep(0.01)  # file times are kept in steps
    do(tmp_path / "shard-00000.tokens")
    until = time.monotonic() + 30
    with pytest.raises(UserError, match=f"shard-00000.tokens: .*{said}"):
        while time.monotonic() < until:
            stream.next()
    stream.close()


def test_settings_that_do_not_fit_together_are_value_errors(tmp_path):
    shards = write(tmp_path, "pairs", pairs_of([(1, 1)]))
    for options in (
        {"shape": "rows", "max_tokens": 4},
        {"batch": 0},
        {"group": Ranks(2, 2)},
        {"batch": 3, "group": Ranks(0, 2)},
        {"threads": 0},
        {"weights": {"a": float("inf")}},
    ):
        with pytest.raises(ValueError):
            loader(shards, **{"batch": 2, **options}).next()
    stream = loader(shards, 2)
    stream.state = np.zeros(5, np.int64)
    with pytest.raises(ValueError, match="the sources have changed"):
        stream.next()


# ---- threads and processes


def test_batches_outlive_their_loader(tmp_path):
    stream = loader(write(tmp_path, "text", numbered([100] * 50)), 2, "rows", max_tokens=128)
    batches = draw(stream, 20)
    kept = [batch.tokens.clone() for batch in batches]
    del stream
    draw(loader(Shards(tmp_path), 2, "rows", max_tokens=128), 20)
    assert all(torch.equal(batch.tokens, copy) for batch, copy in zip(batches, kept))


def open_things():
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        len(open("/proc/self/maps").readlines()),
    )


def test_a_thousand_loaders_opened_and_closed_leave_nothing_behind(tmp_path):
    write(tmp_path, "text", numbered([30] * 200), shard_bytes=4000)

    def use(times):
        for _ in range(times):
            stream = loader(Shards(tmp_path), 2, "rows", max_tokens=64)
            stream.next()
            stream.close()

    use(100)
    files, threads, maps = open_things()
    memory = resident()
    use(1000)
    after = open_things()
    assert after[:2] == (files, threads) and after[2] <= maps + 8  # malloc maps arenas as it likes
    assert resident() - memory < 10 * 2**20


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_loader import Shards, loader
stream = loader(Shards({folder!r}), 2, "rows", max_tokens=64)
stream.next()
print("ready", flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "signals", "code"),
    [
        ("while True: stream.next()", [signal.SIGINT], -signal.SIGINT),
        ("", [], 0),  # the interpreter ends with threads at work
        (
            "import os; pid = os.fork()\nif pid == 0:\n  try: stream.next()\n  except RuntimeError as e: "
            "os._exit(7 if 'fork' in str(e) else 1)\nassert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) "
            "== 7; stream.next()",
            [],
            0,
        ),
    ],
    ids=["Ctrl-C", "exit", "fork"],
)
def test_a_process_ends_as_it_should(tmp_path, then, signals, code):
    write(tmp_path, "text", numbered([30] * 200))
    script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path), then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert not signals or "KeyboardInterrupt" in err

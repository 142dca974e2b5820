"""Pools mined from a source small enough to check by eye, and from more vectors than that, by any ranks, from wherever
a start stopped."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conan_engine.config import Negatives
from conan_engine.data.known import find
from conan_engine.errors import UserError
from conan_engine.negatives import mining
from conan_engine.negatives.mining import Corpus, Mining, by_quantile
from conan_engine.negatives.pools import Pools
from conan_engine.parallel.mesh import Mesh
from conan_engine.vectors import nearest
from conan_engine.vectors.blocks import Blocks


def mine(folder, shards, known, queries, embed, rule):
    corpus = Corpus(shards, known)
    Mining(corpus, known, queries, rule, 1, "x.jsonl", folder, Mesh("cpu")).run(embed)
    return Pools.mapped(corpus, queries, rule, folder)


def known_of(groups, given=(), queries=None):
    """Where every query is of its own, and no given negative anybody's positive; or as `queries` says."""
    groups = np.array(groups, np.int64)
    queries = np.arange(len(groups)) if queries is None else np.array(queries, np.int64)
    return find(queries, 10**6 + groups, groups, -5 - np.arange(int(np.sum(given))))


class FakeShards:
    """The part of Shards that negatives.py reads: records of (query, positive, given negatives...) with groups."""

    def __init__(self, groups, given):
        self._groups, self._given = np.array(groups, np.int64), np.array(given, np.int32)

    def __len__(self):
        return len(self._groups)

    def groups(self, records):
        return self._groups[records]

    def field_counts(self, records):
        return self._given[records] + 2

    def hashes(self, records, fields):
        return self._groups[records]


def test_corpus_holds_each_positive_once_and_every_given_negative():
    corpus = Corpus(FakeShards(groups=[7, 8, 7, 9], given=[0, 2, 1, 0]), known_of([7, 8, 7, 9], [0, 2, 1, 0]))
    assert list(zip(corpus.record, corpus.field, corpus.group)) == [
        (0, 1, 7),
        (1, 1, 8),
        (3, 1, 9),
        (1, 2, -1),
        (1, 3, -1),
        (2, 2, -1),
    ]
    assert corpus.given_start.tolist() == [0, 0, 2, 3, 3] and corpus.given.tolist() == [3, 4, 5]


def test_a_given_negative_of_many_records_is_one_document():
    """Records of several positives have the same given negatives, and one text is often a negative of many queries."""
    groups, given = np.array([7, 8, 7, 9]), [2, 2, 3, 0]
    hashes = np.array([50, 40, 40, 10**6 + 9, 60, 50, 60])  # record 1's second is record 3's positive
    corpus = Corpus(FakeShards(groups, given), find(np.arange(4), 10**6 + groups, groups, hashes))
    assert corpus.given.tolist() == [3, 4, 4, 2, 5, 3, 5]
    places = list(zip(corpus.record, corpus.field, corpus.group))
    assert places == [(0, 1, 7), (1, 1, 8), (3, 1, 9), (0, 2, -1), (0, 3, -1), (2, 2, -1)]


def test_pools_of_version_0_1_are_read(tmp_path):
    """There, each given negative was a document of its own: here 3 to 7, behind the positives."""
    groups, given = np.array([7, 8, 9]), [2, 2, 1]
    corpus = Corpus(FakeShards(groups, given), find(np.arange(3), 10**6 + groups, groups, np.array([5, 4, 4, 6, 5])))
    np.save(tmp_path / mining.POOLS, np.array([[3, 4, 1], [5, 6, 0], [7, 6, 1]]))
    (tmp_path / mining.ABOUT).write_text(json.dumps({"documents": 8}))
    found = Pools.mapped(corpus, np.arange(3), Negatives(count=2, pool=3), tmp_path)
    assert found.candidates.tolist() == [[3, 4, 1], [4, 5, 0], [3, 5, 1]]
    (tmp_path / mining.ABOUT).write_text(json.dumps({"documents": 9}))
    with pytest.raises(UserError, match="it holds other documents"):
        Pools.mapped(corpus, np.arange(3), Negatives(count=2, pool=3), tmp_path)


def test_mined_pools_leave_out_the_own_group_and_likely_false_negatives(tmp_path):
    generator = np.random.default_rng()
    groups = np.repeat(np.arange(40), 2)  # every positive text stands in two records
    shards = FakeShards(groups, given=np.zeros(80))
    text = generator.normal(size=(40, 16)).astype(np.float32)
    text[1] = text[0] * 1.0001  # another text that says the same: a false negative
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    rule = Negatives(count=3, pool=8)
    found = mine(tmp_path, shards, known_of(groups), np.arange(80), lambda records, fields: text[groups[records]], rule)
    own = found.corpus.group[found.candidates]
    assert not (own == groups[:, None]).any()
    assert not (own[groups == 0] == 1).any() and not (own[groups == 1] == 0).any()
    assert all(len(set(row)) == 8 for row in found.candidates)
    cosine = (text[groups][:, None] * text[own]).sum(-1)
    assert (np.diff(cosine[:, :4], axis=1) <= 2**-9).all(), "best first"


@pytest.mark.parametrize("cosine", [-0.5, 0.5])
def test_what_is_too_near_the_positive_is_no_negative_whatever_the_sign(tmp_path, cosine):
    """Query 0's positive has that cosine; of the others one is a little nearer than the bound and one a little
    further."""
    bound = cosine - 0.05 * abs(cosine)
    cosines = np.array([cosine, bound + 0.01, bound - 0.01, bound - 0.2])
    vectors = np.stack((cosines, np.sqrt(1 - cosines**2)), axis=1).astype(np.float32)
    asked = np.array([[1, 0]], np.float32)
    found = mine(
        tmp_path,
        FakeShards(range(4), np.zeros(4)),
        known_of(range(4)),
        np.arange(1),
        lambda r, f: np.where((f == 0)[:, None], asked[0], vectors[r]),
        Negatives(count=1, pool=2),
    )
    assert found.candidates.tolist() == [[2, 3]]


def test_bounds_by_quantile_are_cosines_of_what_was_mined_first(tmp_path):
    vectors = np.random.default_rng().normal(size=(60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = np.arange(60)
    rule = Negatives(count=3, pool=8, bounds="quantile", low=0.25, bound=0.75, max_ratio=2.0)
    found = mine(tmp_path, FakeShards(groups, np.zeros(60)), known_of(groups), groups, lambda r, f: vectors[r], rule)
    first = np.einsum("qe,qke->qk", vectors, vectors[found.corpus.group[found.candidates[:, :3]]])
    # the search finds the query's own document first, which no pool has: of the three that count, two are in use
    assert found.rule.low == pytest.approx(np.quantile(np.c_[np.ones(60), first[:, :2]], 0.25), abs=1e-3)
    assert 0.2 < (first[:, :2] < found.rule.low).mean() < 0.5 and found.rule.low < found.rule.bound <= 1.00001
    assert by_quantile(Negatives(), first.ravel()) == Negatives()


def test_random_negatives_are_no_ones_neighbours_and_never_the_querys_own(tmp_path):
    groups = np.arange(200)
    found = mine(
        tmp_path,
        FakeShards(groups, np.zeros(200)),
        known_of(groups),
        groups,
        None,
        Negatives(count=7, pool=8, index="random"),
    )
    documents = found.corpus.group[found.candidates]
    assert all(len(set(row)) == 8 for row in documents) and not (documents == groups[:, None]).any()
    assert len(np.unique(documents)) > 190


def test_given_negatives_come_first(tmp_path):
    groups = np.arange(30)
    shards = FakeShards(groups, given=[2] + [0] * 29)
    vectors = np.eye(30, dtype=np.float32)
    found = mine(
        tmp_path, shards, known_of(groups, [2]), np.arange(30), lambda r, f: vectors[r], Negatives(count=2, pool=6)
    )
    assert found.draw(np.array([0]))[1].tolist() == [2, 3]


def test_of_few_documents_a_query_has_all_others_once(tmp_path):
    shards, known = FakeShards(np.arange(5), np.zeros(5)), known_of(np.arange(5))
    rule = mining.fitted(Negatives(), Corpus(shards, known))
    assert (rule.count, rule.pool) == (4, 4) and mining.fitted(Negatives(count=3), Corpus(shards, known)).count == 3
    vectors = np.random.default_rng().normal(size=(5, 8)).astype(np.float32)
    found = mine(tmp_path, shards, known, np.arange(5), lambda r, f: vectors[r], rule).candidates
    assert [sorted(row) for row in found.tolist()] == [
        [other for other in range(5) if other != own] for own in range(5)
    ]


def test_no_positive_of_the_query_is_mined_or_taken_from_those_given(tmp_path):
    groups = np.arange(30)
    queries = np.arange(30) // 3  # three positives each
    vectors = np.random.default_rng().normal(size=(10, 8)).astype(np.float32)
    # what is right for a query is nearest
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[queries]
    shards = FakeShards(groups, given=[1] + [0] * 29)
    # record 0's given negative is record 1's positive
    known = find(queries, 10**6 + groups, groups, np.array([10**6 + 1]))
    for pool in (4, 25):  # found by the search alone, and filled up
        found = mine(
            tmp_path / str(pool),
            shards,
            known,
            np.arange(30),
            lambda r, f: vectors[r],
            Negatives(count=2, pool=pool, max_ratio=2.0),
        )
        assert (found.corpus.group[found.candidates] // 3 != queries[:, None]).all()


def test_a_query_that_everything_answers_is_named(tmp_path):
    shards = FakeShards(np.arange(9), np.zeros(9))
    known = find(np.zeros(9, np.int64), 10**6 + np.arange(9), np.arange(9), np.empty(0, np.int64))
    with pytest.raises(UserError, match="x.jsonl: record 0: no document is a negative for its query, 9 "):
        mine(
            tmp_path,
            shards,
            known,
            np.arange(9),
            lambda r, f: np.eye(9, dtype=np.float32)[r],
            Negatives(count=2, pool=4),
        )


def clustered(count, dim=32, chance=None):
    """Unit vectors around a few centres."""
    chance = chance or np.random.default_rng()
    vectors = chance.normal(size=(12, dim))[chance.integers(12, size=count)] + 0.7 * chance.normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    for module, name, value in ((mining, "TEXTS", 128), (mining, "QUERIES", 50), (nearest, "SLICE", 3200)):
        monkeypatch.setattr(module, name, value)


def rank_of(rank, world, tensor=1):
    """As much of a Mesh as mining asks for."""
    data = SimpleNamespace(rank=rank // tensor, world=world // tensor)
    within = SimpleNamespace(rank=rank % tensor, world=tensor)
    return SimpleNamespace(rank=rank, world=world, data=data, tensor=within, device=torch.device("cpu"))


def on_ranks(folder, world, embed, *what, tensor=1):
    """Mining by so many ranks, threads of this process; {rank: what it raised}."""
    raised = {}

    def run(rank):
        try:
            Mining(*what, folder, rank_of(rank, world, tensor)).run(lambda *texts: embed(rank, *texts))
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return raised


@pytest.fixture
def source():
    """(corpus, known, queries, embed, the groups of the records): 700 records of 350 documents, each query near its
    positive."""
    groups = np.sort(np.random.default_rng().permutation(np.repeat(np.arange(350), 2)))
    shards, known = FakeShards(groups, np.zeros(700)), known_of(groups)
    vectors = clustered(350)
    asked = vectors[groups] + 0.3 * clustered(700)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)

    def embed(records, fields):
        return np.where((fields == 0)[:, None], asked[records], vectors[groups[records]])

    return Corpus(shards, known), known, np.arange(0, 700, 2), embed, (vectors, asked, groups)


def test_the_nearest_are_the_textbooks(tmp_path, source, small_blocks):
    corpus, known, queries, embed, (vectors, asked, groups) = source
    rule = Negatives(count=3, pool=20, max_ratio=0.9)
    assert on_ranks(tmp_path, 1, lambda rank, *texts: embed(*texts), corpus, known, queries, rule, 1, "x") == {}
    found = Pools.mapped(corpus, queries, rule, tmp_path).candidates
    v, a = vectors.astype(np.float16).astype(np.float64), asked.astype(np.float16).astype(np.float64)
    for row, record in enumerate(queries):
        cosines = a[record] @ v.T
        positive = cosines[groups[record]]
        right = (cosines <= positive - 0.1 * abs(positive) + 1e-6) & (np.arange(350) != groups[record])
        # the search gives twice the pool before what is too near is left out
        order = [i for i in np.argsort(-cosines)[:40] if right[i]][:20]
        np.testing.assert_allclose(cosines[found[row][: len(order)]], cosines[order], atol=1e-6)
        assert groups[record] not in found[row] and len(set(found[row])) == 20


@pytest.mark.parametrize("index", ["Flat", "IVF8,SQfp16", "random"])
@pytest.mark.parametrize("stopped", [False, True])
def test_any_ranks_give_the_same_pools_from_wherever_a_start_stopped(tmp_path, source, small_blocks, index, stopped):
    corpus, known, queries, embed, _ = source
    rule = Negatives(
        count=3,
        pool=8,
        index=index,
        search="nprobe=4" if index.startswith("IVF") else "",
        dim=16,
        bounds="quantile",
        low=0.2,
    )
    asked = {}

    def watched(rank, records, fields):
        asked.setdefault(rank, []).append(len(records))
        if stopped and len(asked[rank]) == 2 and "again" not in asked:
            raise KeyboardInterrupt
        return embed(records, fields)

    pools = {}
    for name, world, tensor in (("one", 1, 1), ("three", 3, 1), ("four", 4, 2)):
        asked.clear()
        what = (corpus, known, queries, rule, 1, "x")
        if stopped and index != "random":
            raised = on_ranks(tmp_path / name, 1, watched, *what)
            assert isinstance(raised[0], KeyboardInterrupt)
        asked["again"] = []
        assert on_ranks(tmp_path / name, world, watched, *what, tensor=tensor) == {}
        of_first_in_a_copy = sum(
            sum(counts) for rank, counts in asked.items() if rank != "again" and rank % tensor == 0
        )
        assert of_first_in_a_copy == (0 if index == "random" else 700 + (128 if stopped else 0)), "each text once"
        pools[name] = Pools.mapped(corpus, queries, rule, tmp_path / name)
        mining.tidy(tmp_path)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["candidates.npy", "pools.json"]
        assert (pools[name].candidates == pools["one"].candidates).all() and pools[name].rule == pools["one"].rule
    if index != "random":
        assert 0 < pools["one"].rule.low < pools["one"].rule.bound < 1


def test_an_index_finds_nearly_all_of_the_nearest(tmp_path):
    groups, queries = np.arange(5000), np.arange(500)
    shards, known, vectors = FakeShards(groups, np.zeros(5000)), known_of(groups), clustered(5000)
    found = {}
    for index, search in (
        ("Flat", ""),
        ("IVF32,SQfp16", "nprobe=8"),
        ("IVF32,SQfp16", "nprobe=1"),
        ("RR32,IVF32,Flat", "nprobe=16"),
        ("HNSW16", "efSearch=64"),
    ):
        rule = Negatives(pool=16, index=index, search=search, max_ratio=2.0)
        found[search] = mine(
            tmp_path / (search or "exact"), shards, known, queries, lambda r, f: vectors[r], rule
        ).candidates
    shared = {
        search: np.mean([len(set(a) & set(b)) / 16 for a, b in zip(found[""], found[search])]) for search in found
    }
    assert shared["nprobe=8"] > 0.9 > shared["nprobe=1"]
    assert shared["efSearch=64"] > 0.9 and shared["nprobe=16"] > 0.9


def test_an_index_half_made_is_made_whole(tmp_path, source, small_blocks, monkeypatch):
    corpus, known, queries, embed, _ = source
    what = (corpus, known, queries, Negatives(count=3, pool=8, index="IVF8,SQfp16"), 1, "x")
    assert on_ranks(tmp_path / "whole", 1, lambda rank, *texts: embed(*texts), *what) == {}
    merged, stops = nearest._merged, ["while merging", "in the first part"]

    def stopping(*arguments):
        index = merged(*arguments)
        if stops:
            raise KeyboardInterrupt(stops.pop())
        return index

    finished = Blocks.finished

    def finishing(job, kind, number):
        if kind == "parts" and len(stops) == 2:
            raise KeyboardInterrupt(stops.pop())
        finished(job, kind, number)

    monkeypatch.setattr(nearest, "_merged", stopping)
    monkeypatch.setattr(Blocks, "finished", finishing)
    for _ in (1, 2):
        assert isinstance(
            on_ranks(tmp_path / "half", 1, lambda rank, *texts: embed(*texts), *what)[0], KeyboardInterrupt
        )
    assert on_ranks(tmp_path / "half", 1, lambda rank, *texts: embed(*texts), *what) == {}
    one, two = (np.load(tmp_path / name / "candidates.npy") for name in ("whole", "half"))
    np.testing.assert_array_equal(one, two)


def test_the_first_numbers_alone_are_compared(tmp_path):
    groups, vectors = np.arange(100), clustered(100)
    shards, known = FakeShards(groups, np.zeros(100)), known_of(groups)
    cut = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    one = mine(tmp_path / "cut", shards, known, groups, lambda r, f: cut[r], Negatives(pool=10)).candidates
    two = mine(tmp_path / "dim", shards, known, groups, lambda r, f: vectors[r], Negatives(pool=10, dim=8)).candidates
    np.testing.assert_array_equal(one, two)


def test_a_query_is_measured_by_its_own_positive(tmp_path):
    """Where documents of one class stand for each other, but one of them alone is searched."""
    groups = np.repeat(np.arange(20), 2)
    shards, known = FakeShards(groups, np.zeros(40)), known_of(groups)
    shards.hashes = lambda records, fields: np.asarray(records)  # no two texts are the same
    documents, asked = clustered(40), clustered(40)
    documents[1] = asked[1]  # record 1's own positive is as near as can be; the class's other one is not
    pools = mine(
        tmp_path,
        shards,
        known,
        np.arange(40),
        lambda r, f: np.where((f == 0)[:, None], asked[r], documents[r]),
        Negatives(count=2, pool=4, max_ratio=0.999),
    )
    nearest = np.argsort(-(asked[1] @ documents[2::2].T))[:4] + 1
    assert pools.candidates[1].tolist() == nearest.tolist()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            Negatives(pool=4, index="IVF2,Nothing"),
            "negatives.index: faiss cannot make 'IVF2,Nothing' of 50 vectors of 32 numbers",
        ),
        (Negatives(pool=4, index="IVF64,Flat"), "negatives.index: faiss cannot make 'IVF64,Flat' of 50 vectors"),
        (
            Negatives(pool=4, index="IVF2,Flat", search="nonsense=3"),
            "negatives.search: 'nonsense=3' does not fit the index 'IVF2,Flat'",
        ),
    ],
)
def test_what_faiss_does_not_know_is_named(tmp_path, rule, said):
    groups, vectors = np.arange(50), clustered(50)
    with pytest.raises(UserError, match=said) as error:
        mine(tmp_path, FakeShards(groups, np.zeros(50)), known_of(groups), groups, lambda r, f: vectors[r], rule)
    assert "\n" not in str(error.value)

"""A teacher's scores as targets: asked once for mined pools, right when a negative is replaced, in a step that is the
textbook's, on any ranks."""

import sys
import types

import numpy as np
import pytest
import torch
from runs import losses, one_line, shards_of, small_tokenizer, start, train, untimed, write_lines

from conan_engine.config import Source
from conan_engine.errors import UserError
from conan_engine.model.transformer import Transformer
from conan_engine.negatives import distilling
from conan_engine.parallel.mesh import Mesh
from conan_engine.settings import load
from conan_engine.stages.packed import Packed, concatenate, packed
from conan_engine.stages.supervised import Supervised
from conan_engine.stages.weak import Weak
from conan_engine.vectors.blocks import Blocks

RECORDS = [
    {"query": f"question {i}", "pos": [f"answer {i}", f"another {i}"], "neg": [f"wrong {i}", f"bad {i}"]}
    for i in range(40)
]
SCORED = [
    {**record, "pos_scores": [i, i + 0.25], "neg_scores": [i - 1.5, -i]} if i % 3 else record
    for i, record in enumerate(RECORDS)
]

# Scores and vectors that any process works out alike.
TEACHER = """
import hashlib
import numpy as np

def numbers(text, count):
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    return np.random.RandomState(seed).randn(count)

def score(queries, documents):
    return [numbers(f"{q}|{d}", 1)[0] for q, d in zip(queries, documents)]

class Model:
    def queries(self, texts):
        return np.stack([numbers("query: " + text, 8) for text in texts])

    def documents(self, texts):
        return np.stack([numbers(text, 8) for text in texts])

    def __call__(self, queries, documents):
        q, d = self.queries(queries), self.documents(documents)
        return (q * d).sum(1) / np.linalg.norm(q, axis=1) / np.linalg.norm(d, axis=1)

model = Model()
"""


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """The module own_teacher, here and in processes started from here."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/own_teacher.py").write_text(TEACHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    module = types.ModuleType("own_teacher")
    exec(TEACHER, vars(module))
    monkeypatch.setitem(sys.modules, "own_teacher", module)
    return module


@pytest.fixture
def make(tiny, tmp_path):
    """A supervised stage of some records, its pools mined, and its model and tokenizer."""

    def made(records, *overrides):
        path = write_lines(tmp_path / "pairs.jsonl", records)
        tiny_like = ("data={}", "steps=5", "batch=16", "sts={}", "dims=[8, 32]", "temperature=0.1")
        config = load(
            tiny,
            [
                f"--out_dir={tmp_path}",
                "--negatives.pool=6",
                "--negatives.count=3",
                *(f"--supervised.{one}" for one in tiny_like[1:]),
                *overrides,
            ],
        )
        config.supervised.data = {str(path): Source()}
        tokenizer = small_tokenizer(tmp_path)
        model = Transformer(config.model, tokenizer.vocab_size, "float32").init_weights(0)
        shards = {str(path): shards_of(path, "supervised", config.supervised, tokenizer, tmp_path / "data")}
        stage = Supervised(config, shards, {}, Mesh("cpu"))
        stage.mine(model, Mesh("cpu"))
        stage.teach(Mesh("cpu"))
        return stage, model, tokenizer, stage.pools[str(path)]

    return made


def text(tokenizer, shards, record, field):
    return tokenizer.decode(shards.gather(np.array([record]), np.array([field]))[0])


def pool_texts(tokenizer, pools, row):
    """(query, [positive, then the pool])."""
    corpus, record = pools.corpus, pools.queries[row]
    candidates = [text(tokenizer, corpus.shards, corpus.record[c], corpus.field[c]) for c in pools.candidates[row]]
    return text(tokenizer, corpus.shards, record, 0), [text(tokenizer, corpus.shards, record, 1), *candidates]


def test_targets_are_the_records_own_scores_where_nobody_else_gives_them(make):
    _, _, tokenizer, pools = make(SCORED, "--supervised.distil=kl")
    own = {
        (r["query"], t): s for r in SCORED for key in ("pos", "neg") for t, s in zip(r[key], r.get(f"{key}_scores", ()))
    }
    assert pools.targets.shape == (len(pools.queries), 7)
    for row in range(len(pools.queries)):
        query, documents = pool_texts(tokenizer, pools, row)
        assert len(set(documents)) == 7  # a record's positives share its negatives, which are one document each
        # what the record itself gives comes first
        expected = [own.get((query, document), np.nan) for document in documents[:3]]
        np.testing.assert_array_equal(pools.targets[row], np.array(expected + [np.nan] * 4, np.float32))
    assert 0.3 < np.isnan(pools.targets[:, 0]).mean() < 0.4


@pytest.mark.parametrize("name", ["score", "model"])
def test_a_teacher_scores_every_pool_once_from_wherever_it_was_stopped(make, teacher, monkeypatch, name):
    asked, finished, stops = [], Blocks.finished, [1]
    for method in ("documents", "queries"):
        given = getattr(teacher.Model, method)
        monkeypatch.setattr(
            teacher.Model,
            method,
            lambda self, texts, method=method, given=given: (
                asked.extend((method, t) for t in texts) or given(self, texts)
            ),
        )
    monkeypatch.setattr(
        teacher,
        "score",
        lambda queries, documents, given=teacher.score: (
            asked.extend(zip(queries, documents)) or given(queries, documents)
        ),
    )
    for size in ("QUERIES", "TEXTS", "PAIRS"):
        monkeypatch.setattr(distilling, size, 10)

    def stopping(self, what, number):
        finished(self, what, number)
        if "targets" in what and number == 2 and stops:
            stops.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr(Blocks, "finished", stopping)
    options = RECORDS, "--supervised.distil=kl", f"--supervised.teacher=own_teacher:{name}"
    with pytest.raises(KeyboardInterrupt):
        make(*options)
    _, _, tokenizer, pools = make(*options)
    assert not np.isnan(pools.targets).any()
    if name == "score":
        assert len(asked) == pools.targets.size
    else:  # a document of several pools once, but for the positives
        in_pools = {pools.corpus.record[c] * 10 + pools.corpus.field[c] for c in pools.candidates.ravel()}
        assert sum(kind == "documents" for kind, _ in asked) <= len(in_pools) + len(pools.queries) + 20
    for row in range(len(pools.queries)):
        query, texts = pool_texts(tokenizer, pools, row)
        expected = (teacher.score if name == "score" else teacher.model)([query] * 7, texts)
        np.testing.assert_allclose(pools.targets[row], expected, atol=1e-6 if name == "score" else 2e-3)
    before = len(asked)
    make(*options)
    assert len(asked) == before, "nobody is asked for what is known"


def textbook(kind, queries, documents, targets, temperature, scale, dims):
    """In fp64, query by query: the mean over queries of KL(teacher, model), or of the mean squared difference of leads,
    and over dims."""
    found = []
    for dim in dims:
        for query, own, target in zip(queries.double(), documents.double(), targets.double()):
            have = ~target.isnan()
            if not have[0] or have.sum() < 2:
                found.append(0.0 * query.sum())
                continue
            cosine = torch.stack([query[:dim] @ d[:dim] / query[:dim].norm() / d[:dim].norm() for d in own[have]])
            if kind == "kl":
                wanted = (target[have] / scale).softmax(0)
                found.append((wanted * (wanted.log() - (cosine / temperature).softmax(0).log())).sum())
            else:
                lead, wanted = cosine[0] - cosine[1:], (target[have][0] - target[have][1:]) * temperature / scale
                found.append((lead - wanted).square().mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_step_is_the_textbooks_also_when_negatives_are_replaced(make, teacher, kind, chunk):
    stage, model, tokenizer, pools = make(
        SCORED,
        f"--supervised.distil={kind}",
        "--supervised.teacher=own_teacher:score",
        "--supervised.distil_temperature=0.7",
        "--supervised.distil_weight=1.3",
        f"--supervised.chunk={chunk}",
        "--negatives.low=0.9",
        "--negatives.bound=0.9",
    )
    (name,) = stage.shards
    changed = False
    for step in range(4):
        batch, _ = stage.draw()
        record, field, _ = pools.draw(batch.records)
        hard = Packed(*map(torch.from_numpy, stage.shards[name].gather(record, field, 32)))
        everything = concatenate(packed(batch), hard)
        embeddings = model.embed(everything.tokens, everything.cu_seqlens, 1.0, "column")
        texts = [
            tokenizer.decode(everything.tokens[a:b].tolist())
            for a, b in zip(everything.cu_seqlens.tolist(), everything.cu_seqlens[1:].tolist())
        ]
        own = [[texts[16 + i], *texts[32 + 3 * i : 35 + 3 * i]] for i in range(16)]
        targets = torch.tensor([teacher.score([texts[i]] * 4, own[i]) for i in range(16)])
        documents = torch.cat((embeddings[16:32, None], embeddings[32:].view(16, 3, -1)), dim=1)
        expected = textbook(kind, embeddings[:16], documents, targets, 0.1, 0.7, [8, 32])
        gradients = torch.autograd.grad(1.3 * expected, list(model.parameters()))
        before, found = (pools.slot.copy(), pools.first.copy()), []
        for weight in (0.0, 1.3):
            stage.settings.distil_weight = weight
            pools.slot, pools.first = (x.copy() for x in before)
            model.zero_grad()
            row = stage.backward(model, (batch, None), step)
            found.append([p.grad.clone() for p in model.parameters()])
        assert row["distil"] == pytest.approx(expected.item(), rel=1e-4)
        assert row["loss"] == pytest.approx(row["info_nce"] + 1.3 * row["distil"], rel=1e-5)
        for without, together, gradient in zip(*found, gradients):
            torch.testing.assert_close(together - without, gradient, rtol=1e-3, atol=1e-5)
        changed |= (pools.slot > 2).any()
    assert changed, "a negative is replaced"
    stage.close()


def test_queries_of_which_the_teacher_says_nothing_add_nothing(make):
    stage, model, _, pools = make(SCORED, "--supervised.distil=margin_mse", "--supervised.distil_temperature=10")
    batch, _ = stage.draw()
    targets = pools.targets_of(batch.records)
    assert np.isnan(targets).any(1).all() and (~np.isnan(targets[:, 0])).any() and np.isnan(targets).all(1).any()
    row = stage.backward(model, (batch, None), 0)
    assert 0 < row["distil"] < 100 and all(p.grad.isfinite().all() for p in model.parameters())
    stage.close()


VECTORS = (
    "--weak.distil=cosine",
    "--weak.distil_teacher=own_teacher:model",
    "--weak.texts_batch=8",
    "--weak.distil_weight=0.7",
)


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_text_without_a_pair_is_to_be_where_the_teacher_has_it(tiny, tmp_path, teacher, chunk):
    pairs = write_lines(tmp_path / "pairs.jsonl", RECORDS)
    alone = [
        write_lines(tmp_path / "alone.jsonl", [{"text": f"another question {i}"} for i in range(30)]),
        write_lines(tmp_path / "halves.jsonl", RECORDS[:3]),
    ]
    config = load(
        tiny,
        [
            f"--out_dir={tmp_path}",
            *VECTORS,
            f"--weak.texts={{ '{alone[0]}' = 1, '{alone[1]}' = 1 }}",
            f"--weak.chunk={chunk}",
        ],
    )
    config.weak.data = {str(pairs): Source()}
    tokenizer = small_tokenizer(tmp_path)
    model = Transformer(config.model, tokenizer.vocab_size, "float32").init_weights(0)
    shards, texts = {str(pairs): shards_of(pairs, "weak", config.weak, tokenizer, tmp_path / "data")}, {}
    for path in alone:
        texts[str(path)] = shards_of(path, "texts", config.weak, tokenizer, tmp_path / "data")
    assert [len(s) for s in texts.values()] == [30, 3 * 5]
    stage = Weak(config, shards, texts, Mesh("cpu"))
    stage.teach(Mesh("cpu"))
    for step in range(4):
        batch, some = stage.draw()
        bounds = some.cu_seqlens.tolist()
        assert len(bounds) == 9
        wanted = torch.from_numpy(
            teacher.model.documents([tokenizer.decode(some.tokens[a:b].tolist()) for a, b in zip(bounds, bounds[1:])])
        )
        vectors = model.embed(some.tokens, some.cu_seqlens, *stage.attention(step)).double()
        expected = (1 - torch.nn.functional.cosine_similarity(vectors[:, :8], wanted)).mean()
        gradients, found = torch.autograd.grad(0.7 * expected, list(model.parameters())), []
        for weight in (0.0, 0.7):
            config.weak.distil_weight = weight
            model.zero_grad()
            row = stage.backward(model, (batch, some), step)
            found.append([p.grad.clone() for p in model.parameters()])
        assert row["distil"] == pytest.approx(expected.item(), rel=2e-3) and row["loss"] == pytest.approx(
            row["info_nce"] + 0.7 * row["distil"], rel=1e-5
        )
        for without, together, gradient in zip(*found, gradients):
            torch.testing.assert_close(together - without, gradient, rtol=5e-3, atol=1e-4)
    stage.close()


def distilling_run(tmp_path, run, tiny, *options):
    texts = write_lines(tmp_path / "alone.jsonl", [{"text": f"another question {i}"} for i in range(30)])
    pairs = write_lines(tmp_path / "scored.jsonl", RECORDS)
    sources = [f'--weak.texts={{ "{texts}" = 1 }}', f'--supervised.data={{ "{pairs}" = 1 }}']
    taught = [
        "--supervised.distil=kl",
        "--supervised.teacher=own_teacher:score",
        "--negatives.low=0.9",
        "--negatives.bound=0.9",
    ]
    return tiny, run, "--stages=['weak', 'supervised']", *VECTORS, *sources, *taught, *options


def test_a_run_that_distils_has_the_same_losses_after_a_kill(tiny, tmp_path, teacher):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, _, err = train(*distilling_run(tmp_path, whole, tiny))
    assert code == 0, err
    rows = untimed(whole)
    assert all(row["distil"] > 0 for row in rows) and rows[-1]["replaced"] > 0
    process = start(*distilling_run(tmp_path, stopped, tiny))
    while process.poll() is None and not (
        (stopped / "metrics.jsonl").exists() and len((stopped / "metrics.jsonl").read_text().splitlines()) >= 11
    ):
        pass
    process.kill()
    process.communicate()
    code, _, err = train(*distilling_run(tmp_path, stopped, tiny))
    assert code == 0 and untimed(stopped) == rows, err


@pytest.mark.slow
def test_a_run_that_distils_has_the_same_losses_on_a_mesh(tiny, tmp_path, teacher):
    whole, ranks = tmp_path / "whole", tmp_path / "ranks"
    code, _, err = train(*distilling_run(tmp_path, whole, tiny))
    assert code == 0, err
    code, _, err = train(*distilling_run(tmp_path, ranks, tiny, "--tensor_parallel=2"), ranks=4)
    assert code == 0, err
    for one, four in zip(untimed(whole), untimed(ranks)):
        assert one["source"] == four["source"] and one["distil"] == pytest.approx(four["distil"], rel=1e-3)
    assert [x[2] for x in losses(ranks)] == pytest.approx([x[2] for x in losses(whole)], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--supervised.distil=kl"], "supervised.distil: no record has scores"),
        (["--supervised.distil=cosine"], "expected '' or 'kl' or 'margin_mse'"),
        (
            ["--supervised.teacher=own_teacher:score"],
            "supervised.teacher is 'own_teacher:score'; expected none, since supervised.distil asks for no scores",
        ),
        (
            ["--supervised.distil=kl", "--supervised.teacher=own_teacher:nobody"],
            "supervised.teacher: cannot load 'own_teacher:nobody'",
        ),
        (["--supervised.distil=kl", "--negatives.count=0"], "no source has hard negatives that a teacher could score"),
        (["--weak.distil=cosine"], "weak.texts is {}; expected at least one source = weight"),
        (
            ["--weak.distil=cosine", "--weak.texts={ TEXTS = 1 }"],
            "weak.distil_teacher is ''; expected a teacher with vectors",
        ),
        (
            [*VECTORS[:1], "--weak.distil_teacher=own_teacher:score", "--weak.texts={ TEXTS = 1 }"],
            "weak.distil_teacher: own_teacher:score gives only scores, but vectors are needed",
        ),
        (
            [*VECTORS, "--weak.texts={ TEXTS = 1 }", "--model.width=4", "--weak.dims=[]", "--supervised.dims=[4]"],
            "have 8 numbers, the model's have 4; raise model.width",
        ),
    ],
)
def test_what_cannot_be_learnt_from_a_teacher_is_one_line(tiny, tmp_path, teacher, options, said):
    texts = write_lines(tmp_path / "alone.jsonl", [{"text": f"question {i}"} for i in range(30)])
    first = "--stages=['weak']" if any("weak" in option for option in options) else "--stages=['supervised']"
    options = [first, *(option.replace("TEXTS", f'"{texts}"') for option in options)]
    try:
        load(tiny, options)
    except UserError as error:
        assert said in str(error)
    else:  # what only a run finds out
        one_line(train(tiny, tmp_path / "run", *options), said)

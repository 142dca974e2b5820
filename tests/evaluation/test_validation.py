"""Validation: its numbers are the textbook's, the same for any ranks, and training does not feel it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranked import on_ranks
from runs import losses, one_line, shards_of, train, write_lines

from conan_engine.errors import UserError
from conan_engine.evaluation import validation
from conan_engine.parallel.mesh import Mesh
from conan_engine.run import checkpoint
from conan_engine.settings import load


@pytest.fixture(scope="module")
def held_out(tiny, tmp_path_factory):
    """Records of each kind that tiny.toml does not train on, as settings."""
    folder = tmp_path_factory.mktemp("held-out")
    for name, count in (("text", 30), ("instruction", 30), ("pairs", 40), ("sts", 40)):
        lines = [json.loads(line) for line in (tiny.parent / f"{name}.jsonl").read_text().splitlines()]
        write_lines(folder / f"{name}.jsonl", lines[:count])
    return [f"--validation.data.{folder}/{name}.jsonl=1" for name in ("text", "instruction", "pairs", "sts")]


@pytest.fixture(scope="module")
def validated(tiny, held_out, tmp_path_factory):
    run = tmp_path_factory.mktemp("validated") / "run"
    code, out, err = train(
        tiny, run, *held_out, "--validation.every=2", "--validation.keep_best=true", "--keep=1", "--save_every=5"
    )
    assert code == 0, err
    return run, out


def rows(run):
    return [
        row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "validation/seconds" in row
    ]


def test_every_stage_has_the_numbers_of_its_kind_and_training_does_not_feel_it(whole, validated):
    run, out = validated
    assert losses(run) == losses(whole)
    found = {(row["stage"], row["step"]): row for row in rows(run)}
    assert list(found) == [(stage, step) for stage in ("pretrain", "sft", "weak", "supervised") for step in (1, 3, 5)]
    for (stage, _), row in found.items():
        has = {
            key.split("/")[1] for key in row if key.startswith("validation/") and not key.startswith("validation//")
        } - {"seconds"}
        wanted = (
            {"loss"}
            if stage in ("pretrain", "sft")
            else {"loss", "ndcg@10", "recall@20"} | ({"spearman"} if stage == "supervised" else set())
        )
        assert has == wanted
        assert (
            ("validation/ndcg@10/8" in row) == ("validation/recall@20/16" in row) == (stage in ("weak", "supervised"))
        )
        assert all(math.isfinite(value) for key, value in row.items() if key.startswith("validation/"))
    assert found["pretrain", 5]["validation/loss"] < found["pretrain", 1]["validation/loss"]
    assert "weak step 2: validation loss" in out and (run / "loss.png").stat().st_size > 0


def test_the_best_checkpoint_stays_beside_the_newest(validated):
    run, _ = validated
    for stage, metric, best in (("pretrain", "loss", min), ("weak", "ndcg@10", max), ("supervised", "ndcg@10", max)):
        values = [(row[f"validation/{metric}"], row["step"] + 1) for row in rows(run) if row["stage"] == stage]
        wanted = best(values, key=lambda value: value[0])[1]
        kept = sorted(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob(f"{stage}-*"))
        assert kept == sorted({wanted, 6})
        _, state = checkpoint.newest(run / f"checkpoints/{stage}-{wanted:08d}")
        assert state["counters"]["best"] == {"step": wanted, "metric": metric, "value": best(values)[0]}
        model, *_ = checkpoint.load_model(run / f"checkpoints/{stage}-{wanted:08d}")
        assert model.config.width == 32


def test_a_resumed_run_knows_what_was_best(tiny, held_out, validated, tmp_path):
    run = shutil.copytree(validated[0], tmp_path / "run")
    for folder in run.glob("checkpoints/supervised-*"):
        shutil.rmtree(folder)
    shutil.rmtree(run / "checkpoints/weak-00000006")
    code, out, err = train(
        tiny, run, *held_out, "--validation.every=2", "--validation.keep_best=true", "--keep=1", "--save_every=5"
    )
    assert code == 0 and "resuming after step" in out, err
    without = [
        [
            {key: value for key, value in row.items() if key.startswith("validation") and key != "validation/seconds"}
            for row in rows(r)
        ]
        for r in (run, validated[0])
    ]
    assert without[0] == without[1]
    assert {f.name for f in (run / "checkpoints").iterdir()} == {
        f.name for f in (validated[0] / "checkpoints").iterdir()
    }


def _set(tiny, run, use, source, options=()):
    """(config, {source: Shards}) of a file's copy as the validation of a use."""
    path = run / f"held-out-{source.name}"
    if not path.exists():  # another rank's
        shutil.copy(source, path)
    config = load(tiny, [f"--out_dir={run}", f"--validation.data.{path}=1", *options])
    _, tokenizer, *_ = checkpoint.load_model(run)
    return config, {
        str(path): shards_of(path, use, getattr(config, "supervised" if use == "sts" else use), tokenizer, run / "data")
    }


def _numbers(group, tiny, run, use, source):
    model, *_ = checkpoint.load_model(run)
    config, held = _set(tiny, run, use, source)
    return validation.Validation("supervised" if use == "sts" else use, config, held, group).measure(
        model, 1.0 if use in ("supervised", "sts") else 0.3, "column"
    )


def _compare(group, tiny, run, path):
    for use, source in (
        ("pretrain", "text"),
        ("sft", "instruction"),
        ("weak", "pairs"),
        ("supervised", "label"),
        ("sts", "sts"),
    ):
        found = _numbers(group, tiny, run, use, tiny.parent / f"{source}.jsonl")
        if group.rank == 0:
            (path / f"{use}-{group.world}.json").write_text(
                json.dumps({key: value for key, value in found.items() if key != "validation/seconds"})
            )
        else:
            assert found == {}


def test_two_ranks_measure_exactly_what_one_does(tiny, untrained_run, tmp_path):
    run = shutil.copytree(untrained_run, tmp_path / "run")
    torch.set_num_threads(1)
    _compare(Mesh("cpu"), tiny, run, tmp_path)
    on_ranks(2, _compare, tiny, run, tmp_path)
    for path in tmp_path.glob("*-1.json"):
        found = json.loads(path.read_text())
        assert found and found == json.loads(path.with_name(path.name.replace("-1", "-2")).read_text())


CHATS = [
    {
        "messages": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "So."},
        ]
    }
]


def test_of_a_conversation_every_answer_counts(tiny, untrained_run, tmp_path):
    run = shutil.copytree(untrained_run, tmp_path / "run")
    config, held = _set(tiny, run, "sft", write_lines(tmp_path / "few.jsonl", CHATS))
    (shards,) = held.values()
    model, *_ = checkpoint.load_model(run)
    parts = [shards.gather([0], field)[0] for field in range(5)]
    tokens = torch.from_numpy(np.concatenate(parts)).long()
    logits = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32)) @ model.embedding.T
    learnt = torch.from_numpy(np.repeat([False, False, True, False, True], [len(part) for part in parts]))[1:]
    wanted = F.cross_entropy(logits[:-1][learnt].double(), tokens[1:][learnt]).item()
    found = validation.Validation("sft", config, held, Mesh("cpu")).measure(model, 0.0, "column")
    assert 0 < learnt.sum() < len(learnt) and found["validation/loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("use", "fields"), [("pretrain", 1), ("sft", 3)])
def test_the_language_models_loss_is_that_of_each_token_to_be_learnt(tiny, untrained_run, tmp_path, use, fields):
    source = write_lines(
        tmp_path / "few.jsonl",
        [{"text": "One."}, {"text": "Another text, and a much longer one, " * 12}]
        if fields == 1
        else [
            {"instruction": "Explain.", "input": "This", "output": "That and more."},
            {"instruction": "", "input": "", "output": "x"},
        ],
    )
    run = shutil.copytree(untrained_run, tmp_path / "run")
    config, held = _set(tiny, run, use, source)
    (shards,) = held.values()
    model, *_ = checkpoint.load_model(run)
    total, count = 0.0, 0
    for record in range(len(shards)):
        parts = [shards.gather([record], field)[0] for field in range(fields)]
        tokens = torch.from_numpy(np.concatenate(parts))[: getattr(config, use).max_tokens].long()
        hidden = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
        losses_ = F.cross_entropy((hidden[:-1] @ model.embedding.T).double(), tokens[1:], reduction="none")
        first = max(sum(map(len, parts[:-1])), 1)  # of an instruction the output alone
        total, count = total + losses_[first - 1 :].sum().item(), count + len(losses_[first - 1 :])
    found = validation.Validation(use, config, held, Mesh("cpu")).measure(model, 0.0, "column")
    assert found["validation/loss"] == pytest.approx(total / count, rel=1e-5)


def test_what_is_right_for_a_query_is_found_and_its_own_text_is_not(tiny, untrained_run, tmp_path):
    records = [
        {"query": "first question", "pos": ["answer one", "answer two"]},
        {"query": "second question", "pos": ["answer three"], "neg": ["answer one", "nobody's answer"]},
        {"query": "answer three", "pos": ["answer four"]},  # the text of a document
        {"query": "first question", "pos": ["answer five"]},
    ]
    source = write_lines(tmp_path / "few.jsonl", records)
    run = shutil.copytree(untrained_run, tmp_path / "run")
    config, held = _set(tiny, run, "weak", source)
    (shards,) = held.values()
    one = validation.Pairs(shards, np.arange(len(shards)), config.weak, config)
    texts = {
        text: shards.hashes([i], field)[0]
        for text, i, field in (
            ("one", 0, 1),
            ("two", 1, 1),
            ("three", 2, 1),
            ("nobody", 2, 3),
            ("four", 3, 1),
            ("five", 4, 1),
        )
    }
    order = {name: int(np.flatnonzero(np.sort(list(texts.values())) == value)[0]) for name, value in texts.items()}
    assert len(one.asked) == 3 and one.right.shape == one.itself.shape == (3, 6)
    asked = {tuple(shards.gather([r], 0)[0]): row for row, r in enumerate(one.records[one.asked])}
    for record, right in ((0, {"one", "two", "five"}), (2, {"three"}), (3, {"four"})):
        row = asked[tuple(shards.gather([record], 0)[0])]
        assert {name for name, column in order.items() if one.right[row, column]} == right
        assert [name for name, column in order.items() if one.itself[row, column]] == (["three"] if record == 3 else [])


def test_the_loss_of_pairs_is_infonce_over_batches_that_mask_what_is_right(tiny, untrained_run, tmp_path):
    source = tiny.parent / "pairs.jsonl"  # every fourth query has two positives
    run = shutil.copytree(untrained_run, tmp_path / "run")
    config, held = _set(tiny, run, "supervised", source, ["--validation.records=50"])
    (shards,) = held.values()
    model, *_ = checkpoint.load_model(run)
    found = validation.Validation("supervised", config, held, Mesh("cpu")).measure(model, 1.0, "column")
    records = validation._some(len(shards), 50)
    query, document = (
        model.embed(*map(torch.from_numpy, shards.gather(records, field, config.supervised.max_tokens))).double()
        for field in (0, 1)
    )
    asked, given = shards.hashes(records, 0), shards.hashes(records, 1)
    everything = np.arange(len(shards))
    right = {(q, d) for q, d in zip(shards.hashes(everything, 0), shards.hashes(everything, 1))}
    expected = []
    for start in range(0, 48, 8):
        rows = range(start, start + 8)
        masked = torch.tensor(
            [
                [
                    i != j and ((asked[i], given[j]) in right or given[j] == given[i] or given[j] == asked[i])
                    for j in rows
                ]
                for i in rows
            ]
        )
        for dim in config.supervised.dims:
            logits = (
                F.normalize(query[start : start + 8, :dim], dim=1)
                @ F.normalize(document[start : start + 8, :dim], dim=1).T
                / config.supervised.temperature
            )
            expected.append(F.cross_entropy(logits.masked_fill(masked, -math.inf), torch.arange(8)).item())
    assert found["validation/loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_several_sources_are_weighed_and_each_is_told(tiny, untrained_run, tmp_path):
    run = shutil.copytree(untrained_run, tmp_path / "run")
    lines = (tiny.parent / "text.jsonl").read_text().splitlines(keepends=True)
    held, options = {}, []
    for name, some in (("a", lines[:9]), ("b", lines[9:30])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(some))
        held |= _set(tiny, run, "pretrain", path)[1]
        options.append(f"--validation.data.{run}/held-out-{path.name}={1 if name == 'a' else 3}")
    model, *_ = checkpoint.load_model(run)
    found = validation.Validation("pretrain", load(tiny, options), held, Mesh("cpu")).measure(model, 0.0, "column")
    a, b = (found[f"validation/{path}/loss"] for path in held)
    assert a != b and found["validation/loss"] == pytest.approx((a + 3 * b) / 4)


def test_a_mistake_gets_one_line(tiny, whole, tmp_path):
    def refused(*options):
        return train(
            tiny, tmp_path / "run", "--stages=['pretrain']", f"--tokenizer.path={whole / 'tokenizer.model'}", *options
        )

    one_line(refused(f"--validation.data.{tiny.parent}/absent.jsonl=1"), "absent.jsonl")
    for options, said in (
        (
            [f"--validation.data.{tiny.parent}/text.jsonl=1"],
            "text.jsonl'; expected records held out: pretrain.data trains on these",
        ),
        (["--validation.every=0"], "validation.every is 0; expected a whole number in [1, 2**31)"),
        (["--validation.records=0"], "validation.records is 0"),
        (["--validation.metric=f1"], "validation.metric is 'f1'; expected 'loss' or 'ndcg@10'"),
        (["--validation.data.x.jsonl={ hard_negatives = 2 }"], "hard_negatives is 2; expected none here"),
    ):
        with pytest.raises(UserError) as error:
            load(tiny, options)
        assert said in str(error.value)


def test_a_source_for_stages_that_do_not_run_is_passed_over_with_a_line(tiny, whole, tmp_path):
    options = [
        "--stages=['pretrain']",
        "--pretrain.steps=1",
        f"--tokenizer.path={whole / 'tokenizer.model'}",
        f"--validation.data.{tiny.parent}/sts.jsonl=1",
    ]
    code, out, err = train(tiny, tmp_path / "run", *options)
    assert (
        code == 0 and out.count("sts.jsonl holds sts records, which none of pretrain takes: it is passed over") == 1
    ), err

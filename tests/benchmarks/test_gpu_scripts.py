"""The scripts for a GPU, rehearsed without one in their tiny form."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf_files import random_gguf
from runs import ROOT, write_lines

from conan_engine.evaluation import metrics, tasks


def rehearse(script, out, *arguments, **environment):
    command = ["bash", ROOT / "benchmarks/gpu" / script, *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_attention_stops_in_time_and_goes_on(tmp_path):
    code, said = rehearse("attention.sh", tmp_path, "--device", "cpu", MOST="30")
    assert code == 1 and "failed: attention" in said, said
    first = rows(tmp_path / "attn.json")
    code, said = rehearse("attention.sh", tmp_path, "--device", "cpu", MINUTES="4")
    everything = rows(tmp_path / "attn.json")
    assert code == 0 and len(everything) > len(first) > 0 and everything[: len(first)] == first, said
    assert all(row["difference"] < 1e-4 for row in everything)


@pytest.mark.slow
def test_ranks_share_a_device_and_send_while_they_compute(tmp_path):
    code, said = rehearse("ranks.sh", tmp_path, "--quick", DEVICE="cpu")
    assert code == 0, said
    found = {(row["form"], row.get("precision")): row for row in rows(tmp_path / "ranks.json")}
    for form in ("2 data ranks", "2 tensor ranks"):
        for precision, near in (("float32", 1e-3), ("bfloat16", 0.05)):
            row = found[form, precision]
            assert len(row["steps"]) == 18 and row["loss_off"] < near, row
    alone = found["gloo, one rank", None]
    assert alone["buckets"] >= alone["sent_in_backward"] > 0


@pytest.mark.slow
def test_hopper_runs_its_simulator_without_a_gpu(tmp_path):
    code, said = rehearse("hopper.sh", tmp_path, "--device", "cpu")
    assert code == 0 and "1 passed" in said, said


SMALL = """
out_dir = "{run}"
stages = ["weak", "supervised"]
init_from = "{model}"
[pretrain]
data = {{ "{folder}/text.jsonl" = 1 }}
steps = 2
batch = 2
max_tokens = 32
[weak]
data = {{ "{folder}/pairs.jsonl" = 1 }}
steps = 40
batch = 8
chunk = 4
max_tokens = 32
lr = 1e-3
dims = [16, 64]
[supervised]
data = {{ "{folder}/pairs.jsonl" = 1 }}
sts = {{ "{folder}/sts.jsonl" = 1 }}
steps = 2
batch = 4
sts_batch = 4
max_tokens = 32
dims = [16, 64]
[negatives]
pool = 8
[validation]
data = {{ "{folder}/sts.jsonl" = 0 }}
"""


@pytest.fixture
def small(tiny, tmp_path):
    """A config like configs/smollm.toml, of a small GGUF file and small texts; its run's folder."""
    model = random_gguf(tmp_path / "model.gguf")
    config = tmp_path / "small.toml"
    config.write_text(SMALL.format(run=tmp_path / "run", model=model, folder=tiny.parent))
    return config, tmp_path / "run"


@pytest.fixture
def held_out(tmp_path):
    """A file of small tasks, as pack.py writes it."""
    texts = [f"text {i} about {i % 7}" for i in range(60)]
    given = {
        "docs.ndcg@10": tasks.Search(texts[:20], texts[20:40], np.arange(20), metrics.ndcg),
        **{
            f"cross_lingual.{language}.recall@20": tasks.Search(texts[:20], texts[20:60], np.arange(20), metrics.recall)
            for language in tasks.LANGUAGES
        },
        **{
            f"sts.{kind}.spearman": tasks.Similarity(texts[:20], texts[40:60], np.arange(20) / 20)
            for kind in ("docs", "messages")
        },
        "classification.accuracy": tasks.Classification(texts[:20], ["a", "b"] * 10, texts[20:60], ["b", "a"] * 20),
    }
    tasks.save(given, tmp_path / "tasks.json.xz")
    return tmp_path / "tasks.json.xz"


def rows(path):
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_smollm_measures_trains_and_evaluates(small, held_out, tmp_path):
    config, run = small
    environment = {
        "CONFIG": str(config),
        "RUN": str(run),
        "TASKS": str(held_out),
        "PROBE": "1e-3 1e-2",
        "PROBE_STEPS": "2",
        "RATE_STEPS": "4",
        "TRAIN_SECONDS": "0.5",
        "BESIDE_MINUTES": "0.02",
    }
    code, said = rehearse("smollm.sh", tmp_path / "out", **environment)
    assert code == 0 or "failed: finetune" in said, said  # torch.compile needs a compiler that tests may lack
    trained = {(row["trainer"], row["question"]): row for row in rows(tmp_path / "out/finetune.json")}
    assert trained["ours", "rate"]["tokens_per_s"] > 0 and trained["sentence-transformers", "rate"]["tokens_per_s"] > 0
    assert trained["ours", "as many pairs"]["pairs"] == trained["sentence-transformers", "as many pairs"]["pairs"]
    stages = rows(tmp_path / "out/stages.json")
    assert [row["stage"] for row in stages] == [
        "start",
        "start, causal",
        "weak",
        "supervised",
        "no attention",
        "no blocks",
    ]
    assert 0 < stages[2]["steps"] <= 40 and all(0 <= row["docs.ndcg@10"] <= 1 for row in stages)
    assert (tmp_path / "out/probe-1e-2.jsonl").read_text().count("\n") == 2
    before = (tmp_path / "out/stages.json").read_bytes()
    rehearse("smollm.sh", tmp_path / "out", **environment | {"PROBE": ""})
    assert (tmp_path / "out/stages.json").read_bytes() == before, "what is there is not measured again"


@pytest.mark.slow
def test_recipe_writes_a_row_an_arm_and_goes_on(small, held_out, tmp_path):
    config, run = small
    environment = {"CONFIG": str(config), "RUN": str(run), "TASKS": str(held_out)}
    arms = ["SM + CLR + DHNM", "no STS", "LLM2Vec", "LoRA"]
    several = [word for arm in arms for word in ("--arm", arm)]
    code, said = rehearse("recipe.sh", tmp_path / "out", "--seeds", "1", *several[:4], **environment)
    first = rows(tmp_path / "out/small.json")
    assert code == 0 and [row["arm"] for row in first] == arms[:2], said
    code, said = rehearse("recipe.sh", tmp_path / "out", "--seeds", "1", *several, **environment)
    everything = rows(tmp_path / "out/small.json")
    assert (
        code == 0 and everything[:2] == first and [row["arm"] for row in everything] == [*arms[:2], "LLM2Vec", "LoRA"]
    ), said
    assert len({row["docs.ndcg@10"] for row in everything}) > 1 and all(
        0 < row["dims.16.ndcg@10"] <= 1 for row in everything
    )
    assert "all weights, else LoRA" in (tmp_path / "out/small.md").read_text()
    code, said = rehearse("recipe.sh", tmp_path / "out", "--seeds", "2", **environment, MINUTES="1", LAST_SECONDS="60")
    assert code == 0 and rows(tmp_path / "out/small.json") == everything, "no time is left for another arm"


@pytest.mark.slow
def test_small_trains_from_nothing_with_and_without_language_modelling(tiny, held_out, tmp_path):
    write_lines(tmp_path / "held.jsonl", ({"text": f"def text_{i}(about): return about[{i}]"} for i in range(40)))
    environment = {
        "CONFIG": str(tiny),
        "RUN": str(tmp_path / "run"),
        "TASKS": str(held_out),
        "RATE_STEPS": "4",
        "TRAIN_SECONDS": "0.02",
    }
    settings = [f"--validation.data.{tmp_path}/held.jsonl=1", "--validation.every=2", "--pretrain.steps=40"]
    code, said = rehearse("small.sh", tmp_path / "out", *settings, **environment)
    assert code == 0, said
    trained = {row["stage"]: row for row in rows(tmp_path / "out/rates.json")}
    assert list(trained) == ["pretrain", "sft", "weak", "supervised"] and 0 < trained["pretrain"]["steps"] < 40
    assert all(
        row["tokens_per_s"] > 0 and row["share"] > 0 and len(row["curve"]) == row["steps"] for row in trained.values()
    )
    assert [one["step"] for one in trained["sft"]["held_out"]] == [] and trained["pretrain"]["held_out"][-1][
        "validation/loss"
    ] > 0
    stages = ["start", "weak", "supervised", "no attention", "no blocks"]
    assert [row["stage"] for row in rows(tmp_path / "out/stages.json")] == ["start", "pretrain", "sft", *stages[1:]]
    assert [row["stage"] for row in rows(tmp_path / "out/stages-without.json")] == stages
    before = [(tmp_path / "out" / name).read_bytes() for name in ("rate.jsonl", "stages.json", "stages-without.json")]
    assert rehearse("small.sh", tmp_path / "out", *settings, **environment)[0] == 0
    assert [
        (tmp_path / "out" / name).read_bytes() for name in ("rate.jsonl", "stages.json", "stages-without.json")
    ] == before


@pytest.mark.slow
def test_encode_measures_texts_and_mining(small, held_out, tmp_path):
    config, run = small
    environment = {
        "CONFIG": str(config),
        "RUN": str(run),
        "TASKS": str(held_out),
        "TEXTS": "300",
        "BESIDE": "60",
        "DOCUMENTS": "3000",
        "DEVICE": "cpu",
    }
    code, said = rehearse("encode.sh", tmp_path / "out", **environment)
    assert code == 0, said
    encoded = rows(tmp_path / "out/encode.json")
    assert [(row["lengths"], row["texts"]) for row in encoded if row["form"] == "ours"] == [
        ("mixed", 60),
        ("equal", 60),
        ("mixed", 300),
    ]
    assert all(row["lowest_cosine"] > 0.9999 for row in encoded if row["form"] != "ours") and len(encoded) == 7
    mined = json.loads((tmp_path / "out/mining.json").read_text())
    assert mined["with index"]["recall"] > 0.999 and mined["queries"] == 3000


@pytest.mark.slow
def test_what_is_packed_is_unpacked_in_its_place(small, tmp_path, monkeypatch):
    import pack

    config, run = small
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    monkeypatch.setattr(pack, "PART", 10_000)
    monkeypatch.setattr(tasks, "load", dict)
    monkeypatch.setattr(sys, "argv", ["pack.py", str(config), str(tmp_path / "parts")])
    pack.main()
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2 and all(part.stat().st_size <= 10_000 for part in parts)
    (tmp_path / "there/benchmarks/gpu").mkdir(parents=True)
    (tmp_path / "there/benchmarks/gpu/unpack.sh").write_bytes((ROOT / "benchmarks/gpu/unpack.sh").read_bytes())
    subprocess.run(["bash", tmp_path / "there/benchmarks/gpu/unpack.sh", tmp_path / "parts"], check=True)
    packed = [
        path.relative_to(tmp_path)
        for top in ("run/data", "model.gguf", "run/tasks.json.xz")
        for path in [tmp_path / top, *(tmp_path / top).rglob("*")]
        if path.is_file()
    ]
    assert len(packed) > 5 and all(
        (tmp_path / "there" / path).read_bytes() == (tmp_path / path).read_bytes() for path in packed
    )

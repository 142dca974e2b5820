"""The pages' tables are those that the results give."""

import json

import tables


def test_the_pages_hold_what_is_made():
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.made(text) == text, f"{page}: run python benchmarks/tables.py"
    assert any(tables.MARKED.search(page.read_text(encoding="utf-8")) for page in tables.PAGES)


def test_attention_gives_a_line_a_batch_and_a_column_a_form(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    measured = {
        "old": (
            ("ours", "L = 2048", 0.3, 9e-3),
            ("ours", "L = 2048", 1.0, 9e-3),
            ("SDPA cuDNN", "L = 2048", 1.0, 5e-3),
            ("varlen", "log-normal", 1.0, 0.0205),
        ),
        "new": (
            ("ours", "L = 2048", 0.3, 3e-3),
            ("SDPA cuDNN", "L = 2048", 0.3, None),
            ("SDPA cuDNN", "L = 2048", 1.0, 2e-3),
            ("ours", "log-normal", 1.0, 6e-3),
        ),
    }
    for name, found in measured.items():
        rows = [
            {"form": form, "batch": batch, "tokens": 4096, "alpha": alpha, "D": 112}
            | ({"forward": 1e-3, "both": both} if both else {"left_out": "no"})
            for form, batch, alpha, both in found
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    head = "| batch | D | alpha | ours | flash-attention 2 |\n| --- | --- | --- | --- | --- |\n"
    lines = "| 2 x 2,048 | 112 | 0.3 | 1 / 2 |  |\n| log-normal, 4,096 tokens | 112 | 1 | 1 / 5 | 1 / 19.5 |\n"
    mark = "<!-- table attention old.json new.json -->\n"
    assert tables.made(f"x\n{mark}old\n<!-- end -->\ny") == f"x\n{mark}\n{head}{lines}\n<!-- end -->\ny"


def test_steps_and_infonce_take_ours_from_the_last_file_and_peers_from_the_last_that_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    step = lambda form, seconds: {
        "form": form, "work": "text", "tokens": 2000, "seconds": seconds, "tokens_per_s": 2000 / seconds, "share": 0.5,
        "peak_bytes": 2**30,
    }  # fmt: skip
    pairs = lambda form, seconds: [{"form": form, "N": 4096, "dims": d, "seconds": d * seconds} for d in (1, 7)]
    rows = {
        "old": [step("ours", 2), step("transformers", 4), *pairs("ours", 2e-3), *pairs("textbook", 3e-3)],
        "new": [step("ours", 1), *pairs("ours", 1e-3)],
    }
    for name, found in rows.items():
        for kind, key in (("step", "work"), ("infonce", "N")):
            of_kind = [row for row in found if key in row]
            (tmp_path / f"{kind}-{name}.json").write_text(json.dumps({"rows": of_kind}))
    assert tables.steps("step-old.json", "step-new.json").splitlines()[2:] == [
        "| next token, 2,000 tokens | ours | 1000 | 2,000 | 50% | 1 |",
        "| next token, 2,000 tokens | transformers | 4000 | 500 | 50% | 1 |",
    ]
    assert tables.infonce("infonce-old.json", "infonce-new.json").splitlines()[::2] == [
        "| N = M | ours, 1 / 7 dims | textbook |",
        "| 4,096 | 1 / 7 | 3 / 21 |",
    ]


def test_scores_stand_a_task_a_line_and_a_model_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "r.json").write_text(
        json.dumps(
            {
                "docs.ndcg@10": 0.41849,
                "docs.bm25.ndcg@10": 0.407,
                "cross_lingual.bm25.de.recall@20": 0.388,
                "cross_lingual.de.recall@20": 0.979,
            }
        )
    )
    (tmp_path / "s.json").write_text(
        json.dumps({"rows": [{"stage": "start", "docs.ndcg@10": 0.1, "sts.docs.spearman": 0.5}]})
    )
    (tmp_path / "p.json").write_text(json.dumps({"rows": [{"model": "MiniLM", "docs.ndcg@10": 0.487}]}))
    lines = tables.scores("base=r.json", "SmolLM2,=s.json", "p.json").splitlines()
    assert lines[0] == "|  | BM25 | base | SmolLM2, start | MiniLM |"
    assert lines[2:4] == [
        "| docs nDCG@10 | 0.407 | 0.418 | 0.100 | 0.487 |",
        "| de -> en Recall@20 | 0.388 | 0.979 |  |  |",
    ]
    assert "| STS of docs |  |  | 0.500 |  |" in lines


def test_trainers_stand_beside_each_other_on_the_same_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [
        {
            "trainer": name,
            "question": "rate",
            "data": [data],
            "precision": "float32",
            "tokens": 1234.5,
            "tokens_per_s": rate,
        }
        for data, name, rate in (
            ("a", "ours", 3000.4),
            ("a", "x", 1000),
            ("a", "y", 1500),
            ("b", "ours", 10),
            ("b", "y", 4),
        )
    ]
    (tmp_path / "f.json").write_text(json.dumps({"rows": [*rows, {**rows[0], "question": "as many pairs"}]}))
    assert tables.trainers("f.json").splitlines()[2:] == [
        "| `a` | float32 | 1,234 | 3,000 | 1,000 | 1,500 | 2.0 |",
        "| `b` | float32 | 1,234 | 10 |  | 4 | 2.5 |",
    ]


def test_a_part_has_its_share_of_each_step(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for precision, parts in (
        ("float32", {"products": (0.2, 0.4), "rest": (0.2, 0)}),
        ("bfloat16", {"products": (0.1, 0)}),
    ):
        rows = [{"part": part, "forward": ways[0], "backward": ways[1]} for part, ways in parts.items()]
        (tmp_path / f"{precision}.json").write_text(json.dumps({"precision": precision, "rows": rows}))
    assert tables.where("float32.json", "bfloat16.json").splitlines()[2:] == [
        "| products | 200 ms | 400 ms | 75.0% | 100 ms | 0 ms | 100.0% |",
        "| rest | 200 ms | 0 ms | 25.0% |  |  |  |",
    ]

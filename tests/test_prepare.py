"""`python -m conan_engine.prepare`: what it writes is what training takes; its parts, its table, its mistakes."""

import subprocess
import sys

import pytest
from runs import train, write_lines

COMMAND = [sys.executable, "-m", "conan_engine.prepare"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    pairs = [
        {"query": f"question {i} of a few", "pos": [f"answer {i} of some"], "score": 0.3 + i % 2} for i in range(60)
    ]
    for name, records in (
        ("text", [{"text": f"question {i} answer {i} of a few"} for i in range(80)]),
        ("pairs", pairs),
        ("held", pairs[:20]),
    ):
        write_lines(folder / f"{name}.jsonl", records)
    with open(folder / "text.jsonl", "a") as file:
        file.write("{broken\n")
    (folder / "c.toml").write_text(f"""
        stages = ["pretrain", "weak"]
        out_dir = "{folder}/run"
        skip_bad_records = true
        max_bad_share = 0.1
        model = {{ layers = 1, width = 32, heads = 2, kv_heads = 1, head_dim = 16, ffn = 32 }}
        tokenizer = {{ vocab_size = 300, train_bytes = 100_000 }}
        pretrain = {{ steps = 2, batch = 2, max_tokens = 32, data = {{ "{folder}/text.jsonl" = 1 }} }}
        weak = {{ steps = 2, batch = 8, max_tokens = 16, dims = [32], data = {{ "{folder}/pairs.jsonl" = 1 }} }}
        validation = {{ every = 1, data = {{ "{folder}/held.jsonl" = 1 }} }}
    """)
    return folder / "c.toml"


def prepare(config, *arguments):
    return subprocess.run([*COMMAND, config, *arguments], capture_output=True, text=True, timeout=120)


def test_training_takes_what_is_prepared_in_parts(config, tmp_path):
    run = f"--out_dir={tmp_path}/run"
    first = prepare(config, run, "--part", "2/2", "--workers", "1")
    assert first.returncode == 0 and "the other parts are not finished" in first.stdout, first.stderr
    done = prepare(config, run, "--part", "1/2")
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ") for line in done.stdout.splitlines()]
    assert [[cell for cell in (cell.strip() for cell in row) if cell][:3] for row in rows[1:]] == [
        [str(config.parent / name), use, count]
        for name, use, count in (
            ("text.jsonl", "pretrain", "80"),
            ("pairs.jsonl", "weak", "30"),
            ("held.jsonl", "weak", "10"),
        )
    ]
    assert rows[1][-1] == "1 broken JSON" and rows[2][-1] == "30 below min_score"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/data/**/*") if path.is_file()}
    code, _, err = train(config, tmp_path / "run")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/data/**/*") if path.is_file()} == before


@pytest.mark.parametrize(("arguments", "said"), [
    (["--part", "3/2"], "--part: got '3/2'; expected I/K with I from 1 to K"), (["--part", "x"], "--part: got 'x'"),
    (["--workers", "-1"], "--workers: got -1"),
    (["--nonsense=1"], "nonsense"), (["--weak.lrr=1"], "lrr"),
])  # fmt: skip
def test_a_mistake_is_one_line(config, arguments, said):
    done = prepare(config, *arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_on_ray(config, tmp_path):
    """As on processes; where Ray is installed."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2)
    try:
        for name, how in (("here", ["--workers", "1"]), ("there", ["--ray", "auto"])):
            done = prepare(config, f"--out_dir={tmp_path / name}", *how)
            assert done.returncode == 0, done.stderr
    finally:
        ray.shutdown()
    here, there = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("here", "there")
    )
    assert here == there

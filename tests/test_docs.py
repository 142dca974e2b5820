"""What the tutorials tell people to type works, on little data."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys

import pytest
from runs import ROOT, a_gpu_each, write_lines
from translating import Server, known_messages

from conan_engine import languages

TUTORIAL = (ROOT / "docs/cross-lingual.md").read_text()
PYTHON, TOML = (re.search(rf"```{kind}\n(.*?)```", TUTORIAL, re.DOTALL)[1] for kind in ("python", "toml"))
# what is less here: one pass over so little, no GPUs, an endpoint that knows these queries
SMALLER = {
    "steps = 2000": "steps = 4", "steps = 1000": "steps = 2", "save_every = 500": "save_every = 4",
    "every = 500": "every = 4", "batch = 512": "batch = 16", "batch = 64": "batch = 8",
    "max_tokens = 256": "max_tokens = 32", "[64, 128, 256, 512, 1024]": "[8, 32]", "IVF4096": "IVF4",
    "nprobe=32": "nprobe=4", "dim = 256": "dim = 16",
}  # fmt: skip


def _commands(section):
    """What is typed in a section, a list of lines."""
    text = re.search(rf"## {section}\..*?\n(.*?)(?=\n## |\Z)", TUTORIAL, re.DOTALL)[1]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\\n", "")
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


@pytest.mark.slow
def test_from_beirs_files_to_a_cross_lingual_model(tmp_path, untrained_run):
    a_gpu_each(2)
    messages = known_messages()
    chosen = random.sample(sorted(messages), 160)
    (tmp_path / "msmarco/qrels").mkdir(parents=True)
    write_lines(
        tmp_path / "msmarco/queries.jsonl",
        [{"_id": f"q{i}", "text": text, "metadata": {}} for i, text in enumerate(chosen)],
    )
    write_lines(
        tmp_path / "msmarco/corpus.jsonl",
        [{"_id": f"d{i}", "title": "", "text": f"The program says: {text}"} for i, text in enumerate(chosen)],
    )
    for split, numbers in (("train", range(120)), ("dev", range(120, 150))):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in numbers)
        (tmp_path / f"msmarco/qrels/{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    (tmp_path / "base").symlink_to(untrained_run)
    for name in ("conan_engine", "configs"):  # as in a clone
        (tmp_path / name).symlink_to(ROOT / name)
    toml = TOML
    for large, small in SMALLER.items():
        assert large in toml
        toml = toml.replace(large, small)
    (tmp_path / "clr.toml").write_text(toml)
    (tmp_path / "mine.toml").write_text("de = 2\nfr = 1\nja = 1\nru = 1\n")
    subprocess.run([sys.executable, "-c", PYTHON], cwd=tmp_path, check=True)
    server, bin_folder = Server(messages), os.path.dirname(sys.executable)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    said = []
    try:
        for command in _commands(3) + _commands(5) + _commands(6):
            command = command.replace("http://localhost:8000/v1", server.url).replace(
                "Qwen/Qwen2.5-7B-Instruct", "mine --shares mine.toml"
            )
            command = command.replace(
                "--nproc_per_node=8",
                "--nproc_per_node=2 --master_port=0 --rdzv_backend=c10d --rdzv_endpoint=localhost:0",
            )
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            said.append(done.stdout)
    finally:
        server.shutdown()
        server.server_close()
    rows = [json.loads(line) for line in (tmp_path / "train-clr.jsonl").read_text().splitlines()]
    assert len(rows) == 120 and {row["language"] for row in rows} == {"de", "fr", "ja", "ru"}
    results = json.loads((tmp_path / "runs/clr/retrieval-dev-clr.json").read_text())
    assert results["queries"] == 30 and results["documents"] == 160 and "ja.ndcg@10" in results
    assert (tmp_path / "clr-model/modules.json").exists()


def test_its_words_are_true():
    assert f"{len(languages.shares('paper'))} languages" in TUTORIAL
    commands = set(re.findall(r"-m (conan_engine\.\w+)", TUTORIAL))
    assert len(commands) >= 5 and all(map(importlib.util.find_spec, commands))

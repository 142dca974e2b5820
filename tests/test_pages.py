"""What README.md and docs/ tell people to type is taken, and does what they say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import error_lines
import numpy
import pytest
import settings_page
from runs import ROOT, a_gpu_each, losses, train, write_lines

from conan_engine.config import STAGES
from conan_engine.settings import from_dict, load

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
STARTS = "torchrun python make pip vllm curl sbatch export llama-embedding llama-server cut wget hf git ray".split()
# first words of commands that no test can run here -> what they need, which their page says
ELSEWHERE = {
    "vllm": "a GPU",
    "curl": "a GPU",
    "sbatch": "Slurm",
    "torchrun --nnodes": "machines",
    "export TORCH_DISABLE": "machines",
    "llama-": "llama.cpp",
    "wget": "msmarco.zip",
    "hf download": "base",
    "pip install": "",
}
LAST = ("--weak.steps=2 --weak.batch=8 --weak.max_tokens=32 --weak.chunk=0 --supervised.steps=2 --supervised.batch=4 "
        "--supervised.max_tokens=32 --supervised.chunk=0 --supervised.dims=[8,32] --negatives.pool=4 "
        "--negatives.count=2 --precision=float32")  # fmt: skip


def commands(text):
    """The commands of a page, as one types them: of its indented and its shell blocks."""
    text = re.sub(r"```(?!bash|shell).*?```", "", text, flags=re.DOTALL)
    found = []
    for block in re.findall(r"(?:^(?: {4}|$).*\n)+", text, re.MULTILINE):
        lines = re.sub(r"\\\n\s*", "", textwrap.dedent(block)).splitlines()
        found += [re.sub(r"^\$ |\s{2,}# .*", "", line.strip()) for line in lines]
    return [line for line in found if line.split(" ")[0] in STARTS]


TYPED = [(name, command) for name, text in TEXT.items() for command in commands(text)]
OF_TUTORIAL = "cross-lingual.md"  # whose commands tests/test_docs.py types
TRAINED = [
    (name, command)
    for name, command in TYPED
    if re.match(r"torchrun (?!--nnodes).*train\.py", command) and name != OF_TUTORIAL
]
RUN = [
    (name, command)
    for name, command in TYPED
    if re.match(r"(python|torchrun .*) -m conan_engine\.|cut ", command) and name != OF_TUTORIAL
]
OF_OTHERS = ("--format=", "--section.key=", "--nproc_per_node=", "--nnodes=")  # no settings of a run
SETTINGS = sorted(
    {
        one
        for text in TEXT.values()
        for one in re.findall(r"`(--[a-z_]+(?:\.[^`]*?)?=[^`]*)`", text)
        if not one.startswith(OF_OTHERS)
    }
)
TABLES = [one for text in TEXT.values() for one in re.findall(r"`(\"[^`]*\" = \{[^`]*\})`", text)]


def test_the_pages_have_commands():
    assert len(TYPED) > 40 and len(TRAINED) > 8 and len(SETTINGS) > 10 and len(TABLES) >= 1


@pytest.mark.parametrize(("page", "command"), TYPED)
def test_each_command_is_one_that_a_test_runs_or_that_says_what_it_needs(page, command):
    for start, needs in ELSEWHERE.items():
        if command.startswith(start):
            assert needs in TEXT[page]
            return
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word and word not in ("&&", ".", ".venv/bin/activate")} <= set(
            targets
        )
    elif "benchmarks/" in command:
        (script,) = (word for word in words if word.startswith("benchmarks/"))
        assert (ROOT / script).exists()
    else:
        assert (page, command) in TRAINED + RUN or page == OF_TUTORIAL


def _arguments(command):
    """The settings of a command that trains, with files that are there instead of those that it names."""
    words = shlex.split(command.replace("[--nproc_per_node=N]", "").replace("[CONFIG] [--section.key=value ...]", ""))
    words = words[words.index("conan_engine/train.py") + 1 :]
    config = words.pop(0) if words and not words[0].startswith("--") else "configs/demo.toml"
    return config, words


@pytest.mark.parametrize("command", [command for _, command in TRAINED])
def test_its_settings_are_taken(command, tiny, language_model):
    config, options = _arguments(command)
    path = ROOT / config if config.startswith("configs/") else tiny
    options = [option.replace("=FOLDER", f"={language_model}") for option in options]
    load(path, [option for option in options if option != "--init_from=RUN"])  # of the config's own shape


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_in_the_text_is_known(setting, language_model):
    options = shlex.split(setting)
    if not any(option.startswith(("--init_from=", "--lora.")) for option in options):
        load(ROOT / "configs/demo.toml", options)
        return
    options = [option for option in options if not option.startswith("--init_from=")]
    options += [f"--init_from={language_model}", "--weak.data.docstrings=1", "--supervised.data.docstrings=1"]
    load(ROOT / "configs/finetune.toml", options)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_in_the_text_is_known(tmp_path, table):
    (tmp_path / "x.toml").write_text("\n".join(f"[{stage}]\nsteps = 1\ndata = {{ {table} }}" for stage in STAGES))
    assert load(tmp_path / "x.toml").weak.data


def _section(page, head):
    """An indented part of a config that a page shows."""
    (found,) = re.findall(rf"(?:^    .*\n)*^    \[{head}\]\n(?:^    .*\n)+", TEXT[page], re.MULTILINE)[:1]
    return textwrap.dedent(found)


@pytest.mark.parametrize(("page", "head"), [("train.md", "validation"), ("data.md", "weak"), ("losses.md", "weak")])
def test_a_section_of_a_config_in_the_text_is_known(page, head):
    settings = tomllib.loads((ROOT / "configs/demo.toml").read_text())
    settings[head] |= tomllib.loads(_section(page, head))[head]
    assert from_dict(settings, page)


def test_the_settings_page_is_as_the_code_has_it():
    assert settings_page.page() == settings_page.PAGE.read_text(), "run python scripts/settings_page.py"


def test_the_troubleshooting_page_has_every_error_line():
    assert set(error_lines.on_page()) == set(error_lines.lines()), "python scripts/error_lines.py --check says which"


@pytest.fixture
def language_model(tmp_path):
    """A folder whose config.json is a Llama's, for settings that name a model."""
    sizes = {
        "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 9, "num_attention_heads": 4,
        "vocab_size": 512, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})
    )
    return tmp_path


@pytest.fixture(scope="session")
def exported(whole, tmp_path_factory):
    """A trained model as a folder of transformers."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    subprocess.run([sys.executable, "-m", "conan_engine.export", whole, folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture
def place(tmp_path, tiny, whole):
    """A folder like a clone, with what the commands name."""
    for name in ("conan_engine", "configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    shutil.copytree(whole, tmp_path / "RUN")
    (tmp_path / "runs/demo").symlink_to(tmp_path / "RUN")
    (tmp_path / "my").mkdir()
    pairs = [{"query": f"question {i}", "pos": [f"answer {i} of many"]} for i in range(40)]
    write_lines(tmp_path / "my/pairs.jsonl", pairs)
    write_lines(tmp_path / "FILE.jsonl", [{"text": f"text {i}"} for i in range(30)])
    write_lines(tmp_path / "Q.jsonl", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(10)])
    write_lines(tmp_path / "C.jsonl", [{"_id": f"d{i}", "title": "", "text": f"answer {i}"} for i in range(20)])
    (tmp_path / "corpus").mkdir()
    for name in ("corpus.jsonl", "docs.jsonl", "corpus/a.jsonl", "corpus/b.jsonl"):
        write_lines(tmp_path / name, [{"id": i, "text": f"answer {i} of {name}"} for i in range(60)])
    write_lines(tmp_path / "queries.jsonl", [{"id": f"q{i}", "text": f"question {i}"} for i in range(10)])
    (tmp_path / "R.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(10)))
    (tmp_path / "titles.tsv").write_text("".join(f"{i}\ttitle {i}\n" for i in range(5)))
    (tmp_path / "tiny.toml").symlink_to(tiny)
    return tmp_path


def _type(command, folder):
    """Type a command in a folder, with less to do; what it printed."""
    a_gpu_each(2)
    few = "--nproc_per_node=2 --master_port=0 --rdzv_backend=c10d --rdzv_endpoint=localhost:0"
    command = (
        re.sub(r"--nproc_per_node=\d+", few, command).replace("CONFIG", "tiny.toml").replace("--dim 256", "--dim 16")
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for _, command in TRAINED}))
def test_a_training_of_the_pages_runs(place, exported, command):
    config, options = _arguments(command)
    if "FOLDER" in command:
        (place / "FOLDER").symlink_to(exported)
        command = command.replace("--out_dir=RUN", "--out_dir=runs/tuned")
    elif not config.startswith("configs/finetune"):
        command = command.replace(config, "tiny.toml") if config in command else f"{command} tiny.toml"
    command = command.replace("[--nproc_per_node=N] ", "").replace(" [CONFIG] [--section.key=value ...]", "")
    out = f" --out_dir={place}/runs/new" if "--out_dir" not in command else ""
    _type(f"{command}{out} {LAST}", place)
    (metrics,) = {*place.glob("runs/*/metrics.jsonl")} - {place / "runs/demo/metrics.jsonl"}
    assert {row[0] for row in losses(metrics.parent)} >= {"weak", "supervised"}


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for _, command in RUN}))
def test_a_command_of_the_pages_runs(place, command):
    if ".follow" in command:
        pytest.importorskip("wandb")
    before = {path for path in place.rglob("*") if not path.is_symlink()}
    if ".mine" in command:  # of a run that has come as far
        _type("torchrun conan_engine/train.py CONFIG --stages=\"['pretrain','sft','weak']\" --out_dir=runs/new", place)
        command += " --out_dir=runs/new"
    elif "--vectors OUT" in command:  # of a corpus that was encoded, and is small
        _type("python -m conan_engine.encode RUN corpus/ OUT", place)
        command = command.replace("IVF4096", "IVF4")
    elif ".prepare" in command:
        command += " --out_dir=runs/new"
    said = _type(command, place)
    assert said or {path for path in place.rglob("*") if not path.is_symlink()} - before


@pytest.mark.slow
def test_the_export_page_is_true(place):
    for command in commands(TEXT["export.md"]):
        if "conan_engine.export" in command:
            _type(command, place)
    blocks = re.findall(r"```python\n(.*?)```", TEXT["export.md"], re.DOTALL)
    found = []
    for block in blocks:
        (place / "block.py").write_text(f"{block}\nimport numpy\nnumpy.save('vectors.npy', vectors)\n")
        _type("python block.py", place)
        found.append(numpy.load(place / "vectors.npy"))
    assert found[0].shape == (2, 32) and numpy.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.slow
def test_a_file_of_ones_own_trains_by_the_setting_that_names_it(tiny, untrained_run, tmp_path):
    path = tmp_path / "my=own" / "pairs.v2.jsonl"
    path.parent.mkdir()
    write_lines(path, [{"anchor": f"question {i}", "positive": f"answer {i}"} for i in range(40)])
    options = [
        "--stages=['weak']",
        "--weak.steps=2",
        f"--tokenizer.path={untrained_run}/tokenizer.model",
        f"--weak.data.{path}=1000",
    ]
    code, out, err = train(tiny, tmp_path / "run", *options)
    assert code == 0, err
    assert len(losses(tmp_path / "run")) == 2
    assert f'"source": "{path}"' in (tmp_path / "run/metrics.jsonl").read_text()

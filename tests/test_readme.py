"""What the README tells people to type is taken."""

import json
import re
import shlex
import textwrap

import pytest
from runs import ROOT, losses, train, write_lines

from conan_engine.config import STAGES
from conan_engine.settings import load

SETTINGS = sorted(set(re.findall(r"`(--[a-z_]+(?:\.[^`]*?)?=[^`]*)`", (ROOT / "README.md").read_text())))
TABLES = re.findall(r"`(\"[^`]*\" = \{[^`]*\})`", (ROOT / "README.md").read_text())


def test_it_names_settings():
    assert len(SETTINGS) >= 5 and len(TABLES) >= 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_its_settings_are_known(tmp_path, setting):
    options = shlex.split(setting)
    if not {"--init_from=FOLDER", "--init_from=RUN"} & set(options):
        load(ROOT / "configs/demo.toml", options)
        return
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})
    )
    options = [f"--init_from={tmp_path}" if option.startswith("--init_from=") else option for option in options]
    load(ROOT / "configs/finetune.toml", [*options, "--weak.data.docstrings=1", "--supervised.data.docstrings=1"])


@pytest.mark.parametrize("table", TABLES)
def test_its_tables_are_known(tmp_path, table):
    (tmp_path / "x.toml").write_text("\n".join(f"[{stage}]\nsteps = 1\ndata = {{ {table} }}" for stage in STAGES))
    assert load(tmp_path / "x.toml").weak.data


@pytest.mark.slow
def test_a_file_of_ones_own_trains_by_the_setting_that_it_names(tiny, untrained_run, tmp_path):
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


def test_its_section_on_validation_is_known(tmp_path):
    (section,) = re.findall(
        r"(?:^    .*\n)*^    \[validation\]\n(?:^    .*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    (tmp_path / "x.toml").write_text(
        (ROOT / "configs/demo.toml").read_text().partition("[validation]")[0] + textwrap.dedent(section)
    )
    assert load(tmp_path / "x.toml").validation.keep_best

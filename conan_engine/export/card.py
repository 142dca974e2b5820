"""Write the model card of an exported run: its data, its training, its scores, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from conan_engine import __version__
from conan_engine.run import checkpoint
from conan_engine.settings import from_dict

if TYPE_CHECKING:
    from conan_engine.evaluation.encoder import Encoder


def text(run: str | Path, encoder: Encoder, instruction: str = "") -> str:
    """The card as Markdown, with the front matter that the Hugging Face Hub reads; the owner adds a licence.

    instruction: what comes before queries.
    """
    folder, state = checkpoint.newest(run)
    home = folder.parent.parent
    config = from_dict(state["config"], f"{folder}/state.json")
    shape, dims, name = encoder.model.config, encoder.dims, home.resolve().name
    parameters = sum(p.numel() for p in encoder.model.parameters())
    front = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags:"]
    front += [
        f"- {tag}"
        for tag in ("sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka", "conan-engine")
    ]
    sizes = ", ".join(map(str, dims))
    small = dims[len(dims) // 2 - 1] if len(dims) > 1 else dims[0]
    lines = [
        *("---", *front, "---", "", f"# {name}", ""),
        f"A text-embedding model of {parameters / 1e6:,.1f}M parameters, trained by [Conan "
        f"engine](https://arxiv.org/abs/2509.12892) {__version__}. A text of up to "
        f"{encoder.max_tokens:,} tokens becomes a unit vector of {shape.width} numbers; its first {sizes} "
        "are embeddings too (Matryoshka), once normalised again.",
        *("", "## Use", "", "```python", "from sentence_transformers import SentenceTransformer", ""),
        'model = SentenceTransformer("FOLDER")  # this folder, or its name on the Hub; needs transformers 5.2 or newer',
        *(
            (
                f"queries = model.encode_query([...])  # puts {json.dumps(instruction, ensure_ascii=False)} and a "
                "new line before each",
                "documents = model.encode_document([...])",
            )
            if instruction
            else ("vectors = model.encode([...])",)
        ),
        f"small = model.encode([...], truncate_dim={small}, normalize_embeddings=True)",
        *(
            "```",
            "",
            f"With transformers alone: `AutoModel`, {_POOLED[shape.pooling]}, then normalise. It is a "
            f"bidirectional {'Qwen3' if shape.qk_norm else 'Llama'} (`is_causal: false`).",
        ),
        *("", "## Training", "", "| stage | steps | data (weights) | batch | longest text |", "|---|---|---|---|---|"),
    ]
    for stage in config.stages[: config.stages.index(state["stage"]) + 1]:
        about = getattr(config, stage)
        steps = state["step"] if stage == state["stage"] else about.steps
        sources = {**about.data, **getattr(about, "sts", {})}
        data = ", ".join(f"{Path(source).name} ({of.weight:g})" for source, of in sources.items())
        lines.append(
            f"| {stage} | {steps:,} | {data} | {about.batch:,} "
            f"{'rows' if stage in ('pretrain', 'sft') else 'queries'} | {about.max_tokens:,} tokens |"
        )
    lines += [
        "",
        f"{shape.layers} layers, width {shape.width}, {shape.heads} query and {shape.kv_heads} KV heads, FFN "
        f"{shape.ffn}, {len(encoder.model.embedding):,} tokens.",
    ]
    if config.init_from:
        lines[-1] += f" Training started from the weights of {Path(config.init_from).name}" + (
            f", its layers {config.init_layers}." if config.init_layers else "."
        )
    results = home / "results.json"
    if results.exists():
        lines += ["", "## Results", "", "| | score |", "|---|---|"]
        lines += [
            f"| {key} | {value:,.4g} |"
            for key, value in json.loads(results.read_text()).items()
            if not key.startswith("seconds")
        ]
    return "\n".join([*lines, ""])


_POOLED = {"mean": "the mean of the tokens' last hidden states", "last": "the last token's last hidden state"}
